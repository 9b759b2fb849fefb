// Makes the records for the passes that do not solve themselves: in a kernel of its own ahead of them, or in blocks of
// the pass beside those that wait for each.
#pragma once

#include "gated_delta_rule/pipeline.cuh"
#include "gated_delta_rule/solver.cuh"

namespace hylo::gated_delta_rule {

// A warpgroup makes one record after the other, of chunks `step` apart of a head, and loads the next one's inputs as
// soon as it has read one's.
template <class T, int kK>
class Maker {
 public:
  // shared: maker_shared bytes. barrier: a named one for these 128 threads.
  __device__ __forceinline__ Maker(const Params& p, unsigned char* shared, int head, int step, int barrier)
      : p_(p), head_(head), step_(step), barrier_(barrier), shared_(shared), small_(*small(shared)) {}

  __device__ __forceinline__ void run(int first) {
    if (!any_wanted()) return;
    Place place = next(first);
    if (place.chunk.tokens == 0) return;
    if (copies()) {
      small_.loaded.init(1);
      fence_barrier_init();
    }
    Solver<T, kK> solver(p_, head_, reinterpret_cast<float*>(record()), small_.gates, barrier_);
    solver.sync();
    load(place.chunk);
    Place following = next(place.index + step_);
    solver.start(place.chunk, following.chunk);
    for (int turn = 0; place.chunk.tokens > 0; ++turn) {
      const Place last = following.chunk.tokens > 0 ? next(following.index + step_) : Place{};
      small_.loaded.wait(turn & 1);
      if (copies()) await_copies_out<0>();
      solver.solve(inputs(), inputs() + kTiles * kTileSize, place.chunk, last.chunk, [&] {
        if (copies()) announce();
        load(following.chunk);
      });
      solver.template write<true>(record());
      fence_async();
      solver.sync();
      if (copies()) send(place);
      place = following, following = last;
    }
    if (copies()) announce();
  }

 private:
  static constexpr int kTiles = kK / kTile;

  // Behind the tiles.
  struct Small {
    Gates gates[2];
    Barrier loaded;
  };
  static_assert(sizeof(Small) <= 2048);
  static __device__ __forceinline__ Small* small(unsigned char* shared) {
    return reinterpret_cast<Small*>(shared + maker_inputs(kK) + kSlotSize);
  }

  struct Place {
    Chunk chunk;
    int index;  // among all chunks
  };

  static __device__ __forceinline__ bool copies() { return threadIdx.x % kSolverThreads == 0; }
  // Anew each time: the products' descriptors would else be kept from record to record, for which there are no
  // registers.
  __device__ __forceinline__ unsigned char* inputs() const {
    unsigned char* inputs = shared_;
    asm volatile("" : "+l"(inputs));
    return inputs;
  }
  __device__ __forceinline__ unsigned char* record() const { return shared_ + maker_inputs(kK); }

  // Passes run through all sequences at once, so the first chunks of each are wanted first. Where sequences are packed,
  // only the device knows where they begin, and they come one after the other.
  __device__ __forceinline__ int index_of(int i) const {
    if (p_.cu_seqlens != nullptr) return i;
    return i % p_.sequences * chunks_of(p_.tokens) + i / p_.sequences;
  }

  // Whether this launch is to make a sequence's records.
  __device__ __forceinline__ bool wanted(int sequence) const {
    return taken(p_, sequence, head_) && (p_.ready == nullptr || !cut_here(p_, sequence, head_));
  }
  __device__ __forceinline__ bool any_wanted() const {
    for (int n = 0; n < p_.sequences; ++n) {
      if (wanted(n)) return true;
    }
    return false;
  }

  // The first of places i, i + step, ... that is wanted of this launch; with cu_seqlens fewer chunks may exist than
  // there is room for.
  __device__ __forceinline__ Place next(int i) {
    for (; i < p_.chunks; i += step_) {
      const Chunk chunk = chunk_at(p_, index_of(i));
      if (chunk.tokens == 0) break;
      if (chunk.sequence != sequence_) {
        sequence_ = chunk.sequence;
        wanted_ = wanted(sequence_);
      }
      if (wanted_) return {chunk, i};
    }
    return {};
  }

  __device__ __forceinline__ void load(const Chunk& chunk) const {
    if (!copies() || chunk.tokens == 0) return;
    small_.loaded.arrive_expecting(2 * kTiles * kTileSize);
#pragma unroll 1
    for (int i = 0; i < kTiles; ++i) {
      unsigned char* keys = shared_ + i * kTileSize;
      copy_box(keys, p_.k, small_.loaded, i * kTile, head_ / p_.group, chunk.begin, chunk.batch);
      copy_box(keys + kTiles * kTileSize, p_.q, small_.loaded, i * kTile, head_ / p_.group, chunk.begin, chunk.batch);
    }
  }

  // The record, by one thread.
  __device__ __forceinline__ void send(const Place& place) {
    const long long at = static_cast<long long>(index_of(place.index)) * p_.heads + head_;
    copy_out(p_.records + at * kRecordSize, record(), kRecordSize);
    commit_copies_out();
    sent_ = p_.ready == nullptr ? nullptr : p_.ready + at;
  }
  // That the record sent last is there, to those who wait for it. Done while the next one is half made, so that nobody
  // waits for the copy.
  __device__ __forceinline__ void announce() const {
    await_copies_done();
    if (sent_ != nullptr) say_ready(sent_);
  }

  const Params& p_;
  const int head_, step_, barrier_;
  unsigned char* const shared_;
  Small& small_;
  int* sent_ = nullptr;  // the flag of the record that was sent last
  int sequence_ = -1;    // of the last chunk looked at,
  bool wanted_ = false;  // and whether its records are
};

}  // namespace hylo::gated_delta_rule
