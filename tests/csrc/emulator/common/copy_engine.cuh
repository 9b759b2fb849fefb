// What csrc/common/copy_engine.cuh writes in PTX, in C++, as far as emulated kernels need it. An address in shared memory
// is a distance from where a block's begins.
#pragma once

#include <string.h>

#include <functional>
#include <map>
#include <vector>

#include "common/portable.h"
#include "common/tensor_map.h"

namespace hylo {

inline Word shared_address(const void* pointer) {
  return static_cast<Word>(static_cast<const unsigned char*>(pointer) - emulated_dynamic_shared(-1));
}

inline void fence_async() {}
inline void fence_barrier_init() {}
inline void prefetch_map(const TensorMap&) {}
inline void prefetch_box(const TensorMap&, int, int, int, int) {}

inline unsigned char* aligned(unsigned char* shared) { return shared + (-shared_address(shared) & 1023); }

// Waiting for a parity goes on where the phase under way has the other one, as the hardware has it.
class Barrier {
 public:
  void init(int arrivals) {
    wanted_ = arrivals_ = arrivals;
    bytes_ = waiting_ = 0;
    busy_[0] = 1;
    busy_[1] = 0;
    late_copies().erase(this);
  }
  void arrive() { --arrivals_, end_phase(); }
  void arrive_expecting(int bytes) { bytes_ += bytes, arrive(); }
  void complete(int bytes) { bytes_ -= bytes, end_phase(); }
  void wait(int phase) {
    auto& late = late_copies();
    while (!late[this].empty()) {
      const auto copy = late[this].front();
      late[this].erase(late[this].begin());
      copy();
    }
    ++waiting_;
    emulated_await_zero(&busy_[phase]);
    --waiting_;
  }
  // At once where somebody waits for it already.
  void later(std::function<void()> copy) { waiting_ > 0 ? copy() : late_copies()[this].push_back(std::move(copy)); }

 private:
  static std::map<Barrier*, std::vector<std::function<void()>>>& late_copies() {
    static std::map<Barrier*, std::vector<std::function<void()>>> all;
    return all;
  }
  void end_phase() {
    if (arrivals_ > 0 || bytes_ != 0) return;
    arrivals_ = wanted_;
    busy_[0] ^= 1;
    busy_[1] ^= 1;
  }

  int wanted_, arrivals_, bytes_, waiting_;
  DoubleWord busy_[2];
};

struct Handover {
  Barrier full, empty;

  void init(int fillers, int emptiers) {
    full.init(fillers);
    empty.init(emptiers);
  }
};

// What the emulated driver makes of a tensor map; in elements of two bytes.
struct EmulatedMap {
  const unsigned short* tensor;
  long long sizes[4], strides[4];
  int box[4];
};

// Calls f(where it is in the tensor, whether that exists, distance in the box without the permutation) for each number of
// a box.
template <class F>
void emulated_each_number(const EmulatedMap& map, const int (&from)[4], const F& f) {
  const int rows = map.box[1] * map.box[2] * map.box[3];
  for (int row = 0; row < rows; ++row) {
    const long long at[3] = {from[1] + row % map.box[1], from[2] + row / map.box[1] % map.box[2],
                             from[3] + row / map.box[1] / map.box[2]};
    long long offset = 0;
    bool exists = true;
    for (int i = 0; i < 3; ++i) {
      exists = exists && at[i] >= 0 && at[i] < map.sizes[i + 1];
      offset += at[i] * map.strides[i + 1];
    }
    for (int column = 0; column < map.box[0]; ++column) {
      const bool inside = exists && from[0] + column < map.sizes[0];
      f(offset + from[0] + column, inside, static_cast<Word>(row * 128 + column * 2));
    }
  }
}

inline void emulated_copy_box(unsigned char* shared, Word address, const EmulatedMap& map, const int (&from)[4]) {
  emulated_each_number(map, from, [&](long long at, bool exists, Word offset) {
    const unsigned short value = exists ? map.tensor[at] : 0;
    const Word to = address + offset;
    memcpy(shared + (to ^ (to >> 7 & 7) << 4), &value, 2);
  });
}

inline void copy_box(void* shared, const TensorMap& map, Barrier& done, int x, int y, int z, int w) {
  EmulatedMap seen;
  memcpy(&seen, &map, sizeof(seen));
  unsigned char* const base = emulated_dynamic_shared(-1);
  const Word address = shared_address(shared);
  const auto run = [=, &done] {
    emulated_copy_box(base, address, seen, {x, y, z, w});
    done.complete(seen.box[0] * seen.box[1] * seen.box[2] * seen.box[3] * 2);
  };
  emulated_reverse ? done.later(run) : run();
}

// The other way, at once: what lies past the tensor's end is left out.
inline void copy_box_out(const TensorMap& map, const void* shared, int x, int y, int z, int w) {
  EmulatedMap seen;
  memcpy(&seen, &map, sizeof(seen));
  const Word address = shared_address(shared);
  const int from[4] = {x, y, z, w};
  emulated_each_number(seen, from, [&](long long at, bool exists, Word offset) {
    const Word place = address + offset;
    const void* const number = emulated_dynamic_shared(-1) + (place ^ (place >> 7 & 7) << 4);
    if (exists) memcpy(const_cast<unsigned short*>(seen.tensor) + at, number, 2);
  });
}
inline void commit_copies_out() {}
template <int kUnderWay>
void await_copies_out() {}

// Lane 8 i + n gives the address of row n of matrix i; a transposed row is a column of the registers.
template <int kCount>
void emulated_store_transposed(void* row, const Word (&r)[kCount]) {
  const int lane = emulated_lane();
  for (int i = 0; i < kCount; ++i) {
    for (int e = 0; e < 2; ++e) {
      void* const to = emulated_shuffle_of(row, 8 * i + 2 * (lane % 4) + e);
      const unsigned short value = static_cast<unsigned short>(r[i] >> 16 * e);
      memcpy(static_cast<unsigned char*>(to) + lane / 4 * 2, &value, 2);
    }
  }
}
inline void store_transposed(void* row, const Word (&r)[4]) { emulated_store_transposed(row, r); }

// Barriers by number, of each block.
struct NamedBarrier {
  struct Meeting {
    DoubleWord missing;
    bool any = false;
  };
  Meeting* now = nullptr;

  bool meet(int threads, bool answer, bool waits) {
    if (now == nullptr) now = new Meeting{static_cast<DoubleWord>(threads)};  // few: never given back
    Meeting* const mine = now;
    mine->any |= answer;
    if (--mine->missing == 0) now = nullptr;
    if (waits) emulated_await_zero(&mine->missing);
    return mine->any;
  }
};
inline NamedBarrier& emulated_barrier(int barrier) {
  static std::map<std::pair<unsigned char*, int>, NamedBarrier> all;
  return all[{emulated_dynamic_shared(-1), barrier}];
}
inline void sync_threads(int barrier, int threads) { emulated_barrier(barrier).meet(threads, false, true); }
inline void arrive_threads(int barrier, int threads) { emulated_barrier(barrier).meet(threads, false, false); }

}  // namespace hylo
