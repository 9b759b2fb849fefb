// What csrc/mla_absorb/neighbours.cuh and the numbers of csrc/common/chunks.cuh write in PTX, in C++. An address in a
// neighbour's shared memory has the block above 24 bits of distance.
#pragma once

#include "common/copy_engine.cuh"
#include "common/fast_math.cuh"
#include "common/global_access.cuh"

namespace hylo {

constexpr unsigned kAllLanes = 0xffffffffu;
inline int lane() { return threadIdx.x & 31; }
inline int uniform(int value) { return __shfl_sync(kAllLanes, value, 0); }

}  // namespace hylo

namespace hylo::mla_absorb {

inline bool any_of_threads(int barrier, int threads, bool answer) {
  return emulated_barrier(barrier).meet(threads, answer, true);
}

inline int cluster_size() { return static_cast<int>(emulated_cluster_size()); }
inline int cluster_rank() { return static_cast<int>(blockIdx.x) % cluster_size(); }

inline Word there(const void* shared, int rank) { return shared_address(shared) | static_cast<Word>(rank) << 24; }
inline unsigned char* emulated_place(Word address) {
  return emulated_dynamic_shared(static_cast<int>(address >> 24)) + (address & 0xffffff);
}
struct alignas(8) Total {
  float top, sum;
};

struct Place {
  Word address, barrier;

  template <class T>
  void send(int bytes_further, const T& value) const {
    memcpy(emulated_place(address + bytes_further), &value, sizeof(value));
    reinterpret_cast<Barrier*>(emulated_place(barrier))->complete(sizeof(value));
  }
};

class Mailbox {
 public:
  void init() { barrier_.init(1); }
  Place place(const void* shared, int rank) const { return {there(shared, rank), there(this, rank)}; }
  template <class T>
  void send(const void* shared, int rank, const T& v) {
    place(shared, rank).send(0, v);
  }
  void expect(int bytes) { barrier_.arrive_expecting(bytes); }
  void await(int phase) { barrier_.wait(phase); }

 private:
  Barrier barrier_;
};

template <class T>
void load_written(T& v, const T* address, bool exists) {
  if (exists) v = *address;
}

inline int add_to(int* ticket, int number) {
  emulated_let_others_go_ahead();
  const int before = *ticket;
  *ticket += number;
  return before;
}
inline int add_loosely(int* ticket, int number) { return add_to(ticket, number); }
inline int read_ticket(const int* ticket) { return *ticket; }
inline Word cycles() { return emulated_clock(); }
inline bool draws_last(int* ticket, int count) {
  const bool last = add_to(ticket, 1) == count - 1;
  if (last) *ticket = 0;
  return last;
}

inline void store_two_transposed(void* row, Word first, Word second) {
  const Word both[2] = {first, second};
  emulated_store_transposed(row, both);
}

}  // namespace hylo::mla_absorb
