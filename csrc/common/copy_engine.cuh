// Hopper's bulk copies between global and shared memory, and the barriers in shared memory that say when they are done.
#pragma once

#include "common/portable.h"
#include "common/tensor_map.h"

namespace hylo {

__device__ __forceinline__ Word shared_address(const void* pointer) {
  return static_cast<Word>(__cvta_generic_to_shared(pointer));
}

// What ordinary stores put into shared memory is seen by the copy engine and by wgmma.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Phases alternate 0, 1, 0, ...: each completes after `arrivals` arrivals and all bytes that were announced in it.
class Barrier {
 public:
  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&bits_)), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&bits_)) : "memory");
  }
  __device__ __forceinline__ void arrive_expecting(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&bits_)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void wait(int phase) {
    asm volatile(
        "{ .reg .pred done; "
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
        "@!done bra again; }" ::"r"(shared_address(&bits_)),
        "r"(phase)
        : "memory");
  }
  __device__ __forceinline__ Word address() const { return shared_address(&bits_); }

 private:
  DoubleWord bits_;
};

// Something in shared memory that some fill and others empty. All lanes of a warp say so: of one lane that speaks for
// its warp compute-sanitizer's racecheck does not see that the others are done. What a copy fills anew is handed back only
// after what was loaded from it has been used: to arrive does not wait for loads, and the copy may overtake them.
struct Handover {
  Barrier full, empty;

  __device__ __forceinline__ void init(int fillers, int emptiers) {
    full.init(fillers);
    empty.init(emptiers);
  }
};

// Barriers that were just made are seen by the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Swizzled tiles are permuted by address bits, so they start at multiples of 1024.
__device__ __forceinline__ unsigned char* aligned(unsigned char* shared) {
  return shared + (-shared_address(shared) & 1023);
}

// Fetches a tensor map, so that the first copy need not wait for it.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// One box of a tensor map of four dims, coordinates innermost first. One thread issues it.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, Barrier& done, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(done.address()), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// How long the second cache keeps what a copy brings: as anything else, or less than that, for what nobody will read again.
__device__ __forceinline__ DoubleWord cache_policy(bool read_once) {
  DoubleWord policy;
  if (read_once) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
  }
  return policy;
}
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, Barrier& done, int x, int y, int z, int w,
                                         DoubleWord policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(done.address()), "r"(x), "r"(y), "r"(z), "r"(w), "l"(policy)
      : "memory");
}

// Has a box come as far as the second cache; what of it lies outside the tensor stays away.
__device__ __forceinline__ void prefetch_box(const TensorMap& map, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(x), "r"(y), "r"(z),
               "r"(w)
               : "memory");
}

// Contiguous bytes; both addresses and the size are multiples of 16.
__device__ __forceinline__ void copy_in(void* shared, const void* global, int bytes, Barrier& done) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(done.address())
               : "memory");
}

__device__ __forceinline__ void copy_out(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// One box back into a tensor, but for what lies past its end; copies of a thread are counted in groups.
__device__ __forceinline__ void copy_box_out(const TensorMap& map, const void* shared, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
__device__ __forceinline__ void commit_copies_out() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Returns when all but the thread's last kUnderWay groups have been read, so that their shared memory may change.
template <int kUnderWay>
__device__ __forceinline__ void await_copies_out() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kUnderWay) : "memory");
}
// The same of all groups, when what they wrote is there.
__device__ __forceinline__ void await_copies_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// 8 x 8 matrices of 16-bit numbers, straight or transposed on the way; lane 8 i + n gives the address of row n of
// matrix i.
__device__ __forceinline__ void load_matrices(Word (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_transposed(Word (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void store_matrices(void* row, const Word (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void store_transposed(void* row, const Word (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Waits for the `threads` threads that name the same barrier (0 is __syncthreads').
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// The same without waiting: only tells that this thread came so far.
__device__ __forceinline__ void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace hylo
