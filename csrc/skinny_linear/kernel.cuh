// Products of few rows, y = x W^T, that read the weights at memory's rate. A translation unit of its own: the build passes
// HYLO_T (type of all tensors: bf16, fp16), HYLO_B (rows of x, rounded up to 16, 32 or 64) and HYLO_CONV (0, or 1 where
// outputs go through a convolution, which takes 24 registers more).
//
// Blocks along x are a cluster that shares K, those along y have outputs of their own. What tensor cores take 64 of at once
// are outputs, so that few rows of x cost little.
#include "common/wgmma.cuh"
#include "skinny_linear/loader.cuh"
#include "skinny_linear/norm.cuh"
#include "skinny_linear/sums.cuh"

namespace hylo::skinny_linear {

template <class T, int kB, bool kConvolves>
class Block {
 public:
  static_assert(kB == 16 || kB == 32 || kB == 64, "rows of x that a product takes");

  __device__ __forceinline__ Block(const Params& p, unsigned char* shared)
      : p_(p),
        part_(p),
        stages_(shared),
        shared_(*reinterpret_cast<Shared*>(shared + p.stages * stage_size(kB))),
        sums_(reinterpret_cast<float*>(p.cluster == 1 ? shared : shared + p.stages * stage_size(kB) + kSmall)) {}

  __device__ __forceinline__ void run() const {
    const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
    const Loader<kB> loader(p_, part_, stages_, shared_);
    const bool loads = warp == kMultiplying / 32;
    if (loads && lane() == 0) {
      init();
      loader.prime();
    }
    fetch_parameters(p_);
    __syncthreads();
    if (p_.cluster > 1) cluster_arrive();
    await_kernel_before();
    if (!loads) {
      multiply(warp / 4);
    } else if (lane() == 0) {
      loader.run();
    }
  }

 private:
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < p_.stages; ++i) shared_.stages[i].init(1, kMultiplying);
    const int of_pair = kSlots * kQuad + (p_.norm == nullptr ? 0 : 2);
    if (p_.cluster > 1) shared_.sums.open(p_.cluster * part_.pairs(p_) * of_pair);
    fence_barrier_init();
  }

  __device__ __forceinline__ void multiply(int group) const {
    Sums<T, kB, kConvolves> sums(p_, part_, sums_, shared_);
    sums.fetch_beside();
    Norm<T, kB> norm;
    float d[kB / 2] = {};
    Turn turn;
#pragma unroll 1
    for (int i = 0; i < part_.count; ++i, turn.next(p_.stages)) {
      Handover& stage = shared_.stages[turn.at];
      unsigned char* const tiles = stages_ + turn.at * stage_size(kB);
      stage.full.wait(turn.phase);
      if (p_.norm != nullptr) norm.weigh(tiles + kGroups * kTileSize, shared_.norms[turn.at]);
      add_product(d, shared_address(tiles), group);
      stage.empty.arrive();
    }
    sums.run(d, norm);
  }

  // [64, 64] @ [64, B] -> [64, B]
  __device__ __forceinline__ void add_product(float (&d)[kB / 2], Word stage, int group) const {
    const DoubleWord a = wgmma::descriptor_k_major(stage + group * kTileSize);
    const DoubleWord b = wgmma::descriptor_k_major(stage + kGroups * kTileSize);
    wgmma::pin(d);
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      wgmma::product_shared<T, wgmma::kAlongK, wgmma::kAlongK>(d, a + k * wgmma::kNextKMajor,
                                                               b + k * wgmma::kNextKMajor, true);
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(d);
  }

  const Params& p_;
  const Part part_;
  unsigned char* const stages_;
  Shared& shared_;
  float* const sums_;
};

}  // namespace hylo::skinny_linear

extern "C" __global__ void __launch_bounds__(hylo::skinny_linear::kThreads, 2)
    skinny_linear_fwd_kernel_y(const __grid_constant__ hylo::skinny_linear::Params p) {
  const hylo::skinny_linear::Block<hylo::HYLO_T, HYLO_B, HYLO_CONV> block(p, hylo::aligned(hylo::dynamic_shared()));
  block.run();
}
