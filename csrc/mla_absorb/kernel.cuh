// Absorbed latent attention of few new tokens, one launch. A translation unit of its own: the build passes HYLO_T (type
// of queries, cache and o: bf16, fp16), HYLO_R, HYLO_E, HYLO_N (query rows of a tile) and HYLO_SCALED (key scales in
// the rows of the cache); and HYLO_FP8, 1 where these rows are in fp8. block.cuh has HYLO_MEET_TWICE.
//
// Blocks along x are clusters that share the cached tokens, those along y have tiles of query rows of their own.
#include "common/cluster.cuh"
#include "common/dependent.cuh"
#include "mla_absorb/convert.cuh"
#include "mla_absorb/loaders.cuh"
#include "mla_absorb/merge_by_tokens.cuh"
#include "mla_absorb/rows.cuh"

#ifndef HYLO_FP8
#define HYLO_FP8 0
#endif

namespace hylo::mla_absorb {

template <class T, int kR, int kE, int kN, bool kScaled, bool kFp8>
class Block {
 public:
  static constexpr Dims kDims{kR, kE, kN, kScaled, kFp8};
  static constexpr Room kRoom = room(kDims);
  static_assert(kRoom.stages > 0, "too wide for shared memory");
  static constexpr bool kByRows = by_rows(kDims);
  using SharedHere = Shared<kN, kByRows>;
  static_assert(sizeof(SharedHere) <= small_size(kDims), "more than is kept free");

  __device__ __forceinline__ Block(const Params& p, unsigned char* shared)
      : p_(p),
        stages_(shared),
        queries_(stages_ + kRoom.stages * stage_size(kDims)),
        weights_(queries_ + kRoom.queries * queries_size(kDims)),
        received_(weights_ + results_size(kDims, kRoom.merged)),
        raw_(received_ + received_size(kDims, kRoom.merged)),
        shared_(*reinterpret_cast<SharedHere*>(shared + tiles_size(kDims))) {}

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      constexpr int kFillers = kFp8 ? kConverting : 1;
      for (int i = 0; i < kRoom.stages * parts_of(kDims); ++i) shared_.stages[i].init(kFillers, 128);
      for (int i = 0; i < kRoom.raw; ++i) shared_.stages[raw_barrier(kDims, i)].init(1, kConverting);
      if constexpr (kByRows) {
        for (int i = 0; i < kRoom.stages; ++i) shared_.weighed[i].init(128);
      }
      for (Handover& queries : shared_.queries) queries.init(32 * kQueryWarps, kAttending);
      shared_.mailbox.init();
      fence_barrier_init();
      prefetch_map(p_.cache);
    }
    __syncthreads();
    const bool meets = !kByRows && cluster_size() > 1;  // by rows, only when it merges
    if (meets) cluster_arrive();
    const int group = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x / 32 % 4);
    CacheLoader<kR, kE, kN, kScaled, kFp8> loader(p_, kFp8 ? raw_ : stages_, shared_);
    const First first = begin(loader, group == kGroups && warp == kQueryWarps);
    if (!first.exists()) {
      if (meets) cluster_wait();
      return;
    }
    if (group < kGroups) {
      claim_registers<attending_registers(kFp8)>();
      if (meets) cluster_wait();
      if constexpr (kByRows) {
        attend_together(first, group);
      } else {
        attend(first, group);
      }
    } else if (kFp8 && group > kGroups) {
      release_registers<kConvertingRegisters>();
      if constexpr (kFp8) convert(first, 32 * warp + lane());
    } else {
      release_registers<loading_registers(kFp8)>();
      if (warp == kQueryWarps) {
        loader.run(first);
      } else if constexpr (kByRows) {
        each_piece(p_, first, [](const Piece& piece, int) { pass_meetings<merging_rounds(kDims), true>(piece); });
      } else {
        const QueryLoader<kR, kE, kN, kScaled, kFp8> queries(p_);
        queries.run(first, 32 * warp + lane(), kRoom.queries, queries_, shared_);
      }
    }
  }

 private:
  // Rows in fp8, by one of kConverting threads.
  __device__ __forceinline__ void convert(const First& first, int thread) const {
    Converter<T, kR, kE, kN, kScaled> converter(p_, thread, raw_, stages_, shared_);
    each_piece_from(p_, first, kept_here(shared_), [&](const Piece& piece) {
      converter.run(piece);
      pass_meetings<merging_rounds(kDims), false>(piece);
    });
  }

  // What this block begins with. Of few sequences it is found while the kernel ahead still runs, from lengths that it
  // may yet change, and what the loader will bring is asked for: once that kernel has ended it is enough to see whether
  // they are the same.
  template <class Loader>
  __device__ __forceinline__ First begin(Loader& loader, bool loads) const {
    fetch_parameters(p_);
    if (p_.batch > kForeseen) {
      await_kernel_before();
      const First first = first_of_many<threads_of(kFp8)>(p_, shared_);
      if (loads && first.exists()) loader.look_up_first(first.piece);
      return first;
    }
    Ends ends = ends_of_few<kSoFar>(p_);
    bool waits = true;
#pragma unroll 1
    while (true) {
      const First first = first_of_few(p_, ends);
      const bool loads_first = loads && first.exists();
      if (waits) {
        if (loads_first) loader.look_ahead(first.piece);
        await_kernel_before();
        waits = false;
      }
      const Ends now = ends_of_few<kFinal>(p_);
      if (loads_first) loader.look_up_first(first.piece);  // on its way while the lengths are
      if (same(now, ends)) return first;
      ends = now;
    }
  }

  __device__ __forceinline__ void attend(const First& first, int group) const {
    Attention<T, kR, kE, kN, kScaled> attention(p_, group, weights_ + group * weights_size(kDims), shared_);
    MergerByTokens<T, kR, kE, kN, kScaled, kFp8> merger(p_, group, weights_, received_, shared_);
    unsigned tiles = 0;  // of the block, so far
    each_piece_either<kFp8>(p_, first, shared_, [&](const Piece& piece, int index) {
      const int buffer = uniform(index % kRoom.queries);
      Handover& queries = shared_.queries[buffer];
      const Turns turns = turns_here(p_, piece);
      attention.start();
      queries.full.wait(index / kRoom.queries & 1);
      // Warpgroups take turns by the block's tiles, not by a piece's: each has stages of its own then, and never waits
      // for a phase while the one before it is still to come.
      for (int i = (tiles ^ group) & 1; i < turns.count; i += kGroups) {
        const unsigned tile = tiles + i, turn = tile / kRoom.stages;
        const int at = uniform(static_cast<int>(tile % kRoom.stages));  // so that no lane computes descriptors
        Handover& stage = shared_.stages[at];
        stage.full.wait(turn & 1);
        attention.run(piece, token_of(p_, piece, turns, i), stages_ + at * stage_size(kDims),
                      queries_ + buffer * queries_size(kDims));
        stage.empty.arrive();
      }
      tiles += turns.count;
      queries.empty.arrive();
      merger.run(attention, piece, index == 0);
    });
  }

  // By rows.
  __device__ __forceinline__ void attend_together(const First& first, int group) const {
    AttentionByRows<T, kR, kE, kScaled> attention(p_, group, stages_, queries_, shared_);
    MergerByRows<T, kR, kE, kScaled> merger(p_, group, queries_, shared_);
    unsigned tiles = 0;  // of the block, so far
    First& kept = shared_.at[group][uniform(threadIdx.x / 32 % 4)];
    each_piece_from(p_, first, kept, [&](const Piece& piece) {
      const Turns turns = turns_here(p_, piece);
      sync_attending();  // what others sent in the place of queries has been read
      QueryLoader<kR, kE, kN, kScaled, kFp8>(p_).load(piece, queries_);
      sync_attending();
      attention.run(piece, turns, tiles);
      tiles += turns.count;
      merger.run(attention, piece);
    });
  }

  const Params& p_;
  unsigned char* const stages_;
  unsigned char* const queries_;
  unsigned char* const weights_;
  unsigned char* const received_;
  unsigned char* const raw_;  // rows in fp8
  SharedHere& shared_;
};

}  // namespace hylo::mla_absorb

extern "C" __global__ void __launch_bounds__(hylo::mla_absorb::threads_of(HYLO_FP8 != 0), 1)
    mla_absorb_fwd_kernel_decode(const __grid_constant__ hylo::mla_absorb::Params p) {
  using Block = hylo::mla_absorb::Block<hylo::HYLO_T, HYLO_R, HYLO_E, HYLO_N, HYLO_SCALED != 0, HYLO_FP8 != 0>;
  hylo::start_next_kernel();
  const Block block(p, hylo::aligned(hylo::dynamic_shared()));
  block.run();
}
