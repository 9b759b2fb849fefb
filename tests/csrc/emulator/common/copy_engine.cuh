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
    bytes_ = 0;
    busy_[0] = 1;
    busy_[1] = 0;
    late_copies().erase(this);
  }
  void arrive() { --arrivals_, end_phase(); }
  void arrive_expecting(int bytes) { bytes_ += bytes, arrive(); }
  void complete(int bytes) { bytes_ -= bytes, end_phase(); }
  void wait(int phase) {
    Late& late = late_copies()[this];
    while (!late.copies.empty()) {
      const auto copy = late.copies.front();
      late.copies.erase(late.copies.begin());
      copy();
    }
    ++late.awaited;
    emulated_await_zero(&busy_[phase]);
    --late.awaited;
  }
  // When somebody waits for it, which may be now.
  void later(std::function<void()> copy) {
    Late& late = late_copies()[this];
    late.awaited > 0 ? copy() : late.copies.push_back(std::move(copy));
  }

 private:
  struct Late {
    std::vector<std::function<void()>> copies;
    int awaited = 0;  // by threads
  };
  static std::map<Barrier*, Late>& late_copies() {
    static std::map<Barrier*, Late> all;
    return all;
  }
  void end_phase() {
    if (arrivals_ > 0 || bytes_ != 0) return;
    arrivals_ = wanted_;
    busy_[0] ^= 1;
    busy_[1] ^= 1;
  }

  short wanted_, arrivals_;  // small, as blocks have room for barriers of 8 bytes and not much more
  int bytes_;
  DoubleWord busy_[2];
};

struct Handover {
  Barrier full, empty;

  void init(int fillers, int emptiers) {
    full.init(fillers);
    empty.init(emptiers);
  }
};

// What the emulated driver makes of a tensor map.
struct EmulatedMap {
  const unsigned char* tensor;
  int bytes;      // of a number
  bool permuted;  // rows of 128 bytes with their 16-byte pieces permuted; else one row behind the other
  long long sizes[4], strides[4];  // numbers, bytes
  int box[4];

  Word row_size() const { return permuted ? 128 : box[0] * bytes; }
  Word place(Word at) const { return permuted ? at ^ (at >> 7 & 7) << 4 : at; }
};
static_assert(sizeof(EmulatedMap) <= sizeof(TensorMap));

// Calls f(where it is in the tensor in bytes, whether that exists, distance in the box without the permutation) for each
// number of a box.
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
      f(offset + (from[0] + column) * map.strides[0], inside, row * map.row_size() + column * map.bytes);
    }
  }
}

inline void emulated_copy_box(unsigned char* shared, Word address, const EmulatedMap& map, const int (&from)[4]) {
  emulated_each_number(map, from, [&](long long at, bool exists, Word offset) {
    unsigned char* const to = shared + map.place(address + offset);
    exists ? memcpy(to, map.tensor + at, map.bytes) : memset(to, 0, map.bytes);
  });
}

inline void copy_box(void* shared, const TensorMap& map, Barrier& done, int x, int y, int z, int w) {
  EmulatedMap seen;
  memcpy(&seen, &map, sizeof(seen));
  unsigned char* const base = emulated_dynamic_shared(-1);
  const Word address = shared_address(shared);
  const auto run = [=, &done] {
    emulated_copy_box(base, address, seen, {x, y, z, w});
    done.complete(seen.box[0] * seen.box[1] * seen.box[2] * seen.box[3] * seen.bytes);
  };
  emulated_reverse ? done.later(run) : run();
}
inline DoubleWord cache_policy(bool read_once) { return read_once; }
inline void copy_box(void* shared, const TensorMap& map, Barrier& done, int x, int y, int z, int w, DoubleWord) {
  copy_box(shared, map, done, x, y, z, w);
}

inline void copy_in(void* shared, const void* global, int bytes, Barrier& done) {
  const auto run = [=, &done] {
    memcpy(shared, global, bytes);
    done.complete(bytes);
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
    const void* const number = emulated_dynamic_shared(-1) + seen.place(address + offset);
    if (exists) memcpy(const_cast<unsigned char*>(seen.tensor) + at, number, seen.bytes);
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
