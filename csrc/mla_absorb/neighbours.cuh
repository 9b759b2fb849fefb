// What warps and blocks tell each other: votes of a warpgroup, barriers and numbers in the shared memory of the blocks
// of a cluster, tickets and numbers in global memory.
#pragma once

#include "common/chunks.cuh"
#include "common/cluster.cuh"
#include "common/copy_engine.cuh"
#include "common/global_access.cuh"

namespace hylo::mla_absorb {

// sync_threads that also says whether the answer of any of the threads is yes.
__device__ __forceinline__ bool any_of_threads(int barrier, int threads, bool answer) {
  int any;
  asm volatile(
      "{ .reg .pred mine, all; setp.ne.b32 mine, %1, 0; bar.red.or.pred all, %2, %3, mine; selp.b32 %0, 1, 0, all; }"
      : "=r"(any)
      : "r"(static_cast<int>(answer)), "r"(barrier), "r"(threads)
      : "memory");
  return any != 0;
}

// Of a block in its cluster, along x, and how many blocks the cluster has.
__device__ __forceinline__ int cluster_rank() {
  Word rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_size() {
  Word size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// What weights are relative to, and their sum.
struct alignas(8) Total {
  float top, sum;
};

// Somewhere in a block of the cluster, and its barrier that counts what comes there.
struct Place {
  Word address, barrier;

  __device__ __forceinline__ void send(int bytes_further, const float4& v) const {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            address + bytes_further),
        "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
        : "memory");
  }
};

// Says when the numbers are there that blocks of a cluster, this one included, put into its shared memory, where they
// lie at the same place in each. That its last numbers have been read is for the cluster's barrier to say.
class Mailbox {
 public:
  __device__ __forceinline__ void init() { barrier_.init(1); }

  __device__ __forceinline__ Place place(const void* shared, int rank) const {
    return {there(shared, rank), there(this, rank)};
  }
  __device__ __forceinline__ void send(const void* shared, int rank, const float4& v) {
    place(shared, rank).send(0, v);
  }
  __device__ __forceinline__ void send(const void* shared, int rank, const Total& v) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                     there(shared, rank)),
                 "f"(v.top), "f"(v.sum), "r"(there(this, rank))
                 : "memory");
  }

  // One thread says so, of each phase.
  __device__ __forceinline__ void expect(int bytes) { barrier_.arrive_expecting(bytes); }

  __device__ __forceinline__ void await(int phase) {
    asm volatile(
        "{ .reg .pred done; "
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1; "
        "@!done bra again; }" ::"r"(barrier_.address()),
        "r"(phase)
        : "memory");
  }

 private:
  Barrier barrier_;
};

// Numbers that blocks of other multiprocessors wrote: past the first cache, which does not know of that. Where nothing
// exists nothing is read, and v stays as it is. There is no branch, so that many are on their way together.
__device__ __forceinline__ void load_written(Total& v, const Total* address, bool exists) {
  asm volatile("{ .reg .pred there; setp.ne.b32 there, %3, 0; @there ld.global.cg.v2.f32 {%0, %1}, [%2]; }"
               : "+f"(v.top), "+f"(v.sum)
               : "l"(address), "r"(static_cast<int>(exists))
               : "memory");
}
__device__ __forceinline__ void load_written(float4& v, const float4* address, bool exists) {
  asm volatile("{ .reg .pred there; setp.ne.b32 there, %5, 0; @there ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4]; }"
               : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)
               : "l"(address), "r"(static_cast<int>(exists))
               : "memory");
}

// Adds to a ticket and gives what it was. Who finds what another has added sees all that the other wrote before. One
// thread adds, after a barrier of all threads whose writes others are to see, and before one of those that are to see
// the others' writes.
__device__ __forceinline__ int add_to(int* ticket, int number) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(ticket), "r"(number) : "memory");
  return before;
}
// The same where nobody looks for anything else than the ticket: it does not wait for what was written.
__device__ __forceinline__ int add_loosely(int* ticket, int number) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(ticket), "r"(number) : "memory");
  return before;
}
__device__ __forceinline__ int read_ticket(const int* ticket) {
  int now;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(ticket) : "memory");
  return now;
}
// Whether all others of `count` have drawn before. The last one leaves zero behind, for the next launch.
__device__ __forceinline__ bool draws_last(int* ticket, int count) {
  const bool last = add_to(ticket, 1) == count - 1;
  if (last) *ticket = 0;
  return last;
}

// Of the multiprocessor's clock.
__device__ __forceinline__ Word cycles() {
  Word now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  return now;
}

// store_transposed of two matrices: lane 8 i + n gives the address of row n of matrix i, for i below 2.
__device__ __forceinline__ void store_two_transposed(void* row, Word first, Word second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared::cta.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
               "r"(first), "r"(second)
               : "memory");
}

}  // namespace hylo::mla_absorb
