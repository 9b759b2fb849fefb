// The decode step of a whole Mamba2 block in one launch: short convolution, step size, state update, skip, gate and
// norm; fp32 from end to end. A translation unit of its own: the build passes HYLO_T (type of z, xbc and y), HYLO_C (of
// the conv state), HYLO_P (of the weights), HYLO_S (of the state), HYLO_K, HYLO_W (width of the convolution), HYLO_TEAM
// (threads of a block) and HYLO_ROWS (of a thread).
//
// Heads that share channels of x, b or c, or a norm, are a set. A cluster of blocks has the rows (V to each head) of
// one set and one sequence, and each block a run of them: it makes the convolution's outputs that its rows need, some
// of which other blocks make too. Once all blocks have read the conv state, the block with the first row that needs a
// channel writes that channel's next values. Sums of squares go to all blocks of the cluster.

#include "common/async_copy.cuh"
#include "common/cluster.cuh"
#include "common/dependent.cuh"
#include "ssd/step_rows.cuh"

namespace hylo::ssd {

// Channels of x, of b or of c that a block needs: those of several whole heads of these.
struct Channels {
  int first;       // of the convolution's
  int count;
  int others;      // how many of them, at the front, another block writes
  int first_head;  // of those heads
};

template <class T, class C, class P, class S, int kK, int kW, int kTeam, int kRows>
class Mamba2Block {
 public:
  __device__ __forceinline__ Mamba2Block(const Mamba2StepParams& p, unsigned char* shared)
      : p_(p), shared_(shared), first_(blockIdx.x * p.rows), set_head_(blockIdx.y * p.set), batch_(blockIdx.z) {}

  __device__ __forceinline__ void run() {
    if (!p_.settled_state) await_kernel_before();
    const long long pooled = read_index(p_.indices.data, p_.indices.stride, p_.indices.wide, batch_);
    if (pooled < 0) return clear();  // padding: all blocks of the cluster do
    C* conv_state = static_cast<C*>(p_.conv_state) + pooled * p_.conv_b;
    S* state = static_cast<S*>(p_.state) + pooled * p_.state_b;
    // Each pass is fetched as soon as there is room, and the first ones before anything else: before the kernel ahead has
    // ended, where that does not write the state.
    int slot = 0;
#pragma unroll 1
    for (int next = 0; next < p_.passes + p_.held; ++next) {
      if (next == p_.held) prepare(conv_state);
      if (next >= p_.held) {
        p_.held == p_.passes ? await_copies() : await_copies_but<1>();
        update(slot, rows_of(next - p_.held), state);
      }
      if (next < p_.passes) fetch(slot, rows_of(next), state);
      group_copies();
      slot = slot + 1 == p_.held ? 0 : slot + 1;
    }
    __syncthreads();
    square();
    __syncthreads();
    cluster_wait();
    norm(conv_state);
  }

 private:
  using Rows = StateRows<S, kK, kRows>;

  // Rows of one head that a thread has in one pass: all are there, or none.
  struct Part {
    int row;  // of the block
    bool there;
    int head;   // of the set
    int value;  // row of the head
  };

  __device__ __forceinline__ float* floats(int at) const { return reinterpret_cast<float*>(shared_ + at); }
  __device__ __forceinline__ C* window(int i) const {
    return reinterpret_cast<C*>(shared_ + p_.shared.windows) + i * kW;
  }
  __device__ __forceinline__ Inbox& inbox() const { return *reinterpret_cast<Inbox*>(shared_ + p_.shared.inbox); }
  __device__ __forceinline__ Step* steps() const { return reinterpret_cast<Step*>(shared_ + p_.shared.steps); }

  // Of a row of the block: its head in the set, and its row there.
  __device__ __forceinline__ int head_of(int row) const { return (first_ + row) / p_.by_values; }
  __device__ __forceinline__ int value_of(int row) const { return first_ + row - head_of(row) * p_.values; }
  __device__ __forceinline__ int channels() const { return x_.count + b_.count + c_.count; }

  __device__ __forceinline__ T& output(int row) const {
    return static_cast<T*>(p_.y)[(batch_ * p_.heads + set_head_) * p_.values + first_ + row];
  }

  __device__ __forceinline__ void clear() const {
    await_kernel_before();
    for (int row = threadIdx.x; row < p_.rows; row += kTeam) from_float(output(row), 0.0f);
  }

  // All that the rows' update and the norm need, but for the state.
  __device__ __forceinline__ void prepare(const C* conv_state) {
    if (threadIdx.x == 0) inbox().open(p_.sums);
    await_kernel_before();
    const int head = head_of(0) + threadIdx.x;
    const bool has_head = head <= head_of(p_.rows - 1);
    LoadedStep step = {};
    if (has_head) step = load_step(p_.gates, batch_, set_head_ + head);
    find_channels();
    const int count = channels();
#pragma unroll 1
    for (int i = threadIdx.x; i < count + p_.rows; i += kTeam) i < count ? convolve(i, conv_state) : gate(i - count);
    if (has_head) steps()[threadIdx.x] = make_step(p_.gates, step);
    __syncthreads();
    cluster_arrive();  // this block has read the conv state
  }

  __device__ __forceinline__ void find_channels() {
    const int b_first = p_.x_heads * p_.values, c_first = b_first + p_.b_heads * kK;
    x_ = channels_of(0, p_.x_group, p_.by_x_group, p_.values);
    b_ = channels_of(b_first, p_.b_group, p_.by_b_group, kK);
    c_ = channels_of(c_first, p_.c_group, p_.by_c_group, kK);
  }

  __device__ __forceinline__ Channels channels_of(int before, int group, const Divider& by_group, int width) const {
    const int head = (set_head_ + head_of(0)) / by_group, last = (set_head_ + head_of(p_.rows - 1)) / by_group;
    const bool began_before = (head * group - set_head_) * p_.values < first_;
    return {before + head * width, (last - head + 1) * width, began_before ? width : 0, head};
  }

  // The convolution's channel that is the i-th of the block.
  __device__ __forceinline__ int channel(int i) const {
    if (i < x_.count) return x_.first + i;
    i -= x_.count;
    return i < b_.count ? b_.first + i : c_.first + i - b_.count;
  }

  // Whether this block writes it.
  __device__ __forceinline__ bool writes(int i) const {
    if (i < x_.count) return i >= x_.others;
    i -= x_.count;
    return i < b_.count ? i >= b_.others : i - b_.count >= c_.others;
  }

  __device__ __forceinline__ void convolve(int i, const C* conv_state) const {
    const int at = channel(i);
    C r_window[kW];
    P r_weight[kW], r_bias = {};
    read(r_window, conv_state + at * kW);
    read(r_weight, static_cast<const P*>(p_.conv_weight) + at * kW);
    const T newest = static_cast<const T*>(p_.xbc)[batch_ * p_.xbc_b + at];
    if (p_.conv_bias != nullptr) r_bias = static_cast<const P*>(p_.conv_bias)[at];
    float sum = to_float(r_bias) + to_float(newest) * to_float(r_weight[kW - 1]);
#pragma unroll
    for (int w = 0; w < kW - 1; ++w) {
      r_window[w] = r_window[w + 1];
      sum += to_float(r_window[w]) * to_float(r_weight[w]);
    }
    from_float(r_window[kW - 1], to_float(newest));
    floats(p_.shared.channels)[i] = silu(sum);
    if (writes(i)) write(window(i), r_window);
  }

  __device__ __forceinline__ void gate(int row) const {
    const int value = value_of(row), head = set_head_ + head_of(row);
    const T z = static_cast<const T*>(p_.z)[batch_ * p_.z_b + head * p_.z_h + value];
    floats(p_.shared.weight)[row] = to_float(static_cast<const P*>(p_.norm_weight)[head * p_.values + value]);
    floats(p_.shared.gate)[row] = silu(to_float(z));
  }

  __device__ __forceinline__ Part rows_of(int pass) const {
    const int row = (pass * (kTeam / Rows::kLanes) + threadIdx.x / Rows::kLanes) * kRows;
    const bool there = row < p_.rows;
    const int safe_row = there ? row : 0;
    return {safe_row, there, head_of(safe_row), value_of(safe_row)};
  }

  __device__ __forceinline__ S* first_row(S* state, const Part& part) const {
    return state + (set_head_ + part.head) * p_.state_h + static_cast<long long>(part.value) * kK;
  }

  // Where a thread finds a piece of a row again.
  __device__ __forceinline__ Words* held(int slot, int i, int piece) const {
    return reinterpret_cast<Words*>(shared_) + ((slot * kRows + i) * Rows::kPieces + piece) * kTeam + threadIdx.x;
  }

  __device__ __forceinline__ void fetch(int slot, const Part& part, S* state) const {
    const Rows rows(threadIdx.x % Rows::kLanes);
    const S* from = first_row(state, part);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int piece = 0; piece < Rows::kPieces; ++piece) {
        const bool exists = part.there && rows.exists(piece);
        copy_async(held(slot, i, piece), exists ? from + i * kK + rows.column(piece) : from, exists);
      }
    }
  }

  __device__ __forceinline__ void update(int slot, const Part& part, S* state) const {
    const Rows rows(threadIdx.x % Rows::kLanes);
    const int head = set_head_ + part.head;
    const float* x = floats(p_.shared.channels);
    const float* b = x + x_.count + (head / p_.by_b_group - b_.first_head) * kK;
    const float* c = x + x_.count + b_.count + (head / p_.by_c_group - c_.first_head) * kK;
    x += (head / p_.by_x_group - x_.first_head) * p_.values + part.value;
    typename Rows::Vectors r_b, r_c;
    rows.read_vector(r_b, b);
    rows.read_vector(r_c, c);
    float sums[kRows], r_o[Rows::kLeft];
    rows.update(
        first_row(state, part), part.there, steps()[part.head - head_of(0)],
        [&](int i, int piece) { return *held(slot, i, piece); }, [&](int i) { return x[i]; }, r_b, r_c, sums);
    rows.sum(sums, r_o);
    if (part.there && rows.stores_sums()) write(floats(p_.shared.outputs) + part.row + rows.summed_row(), r_o);
  }

  // What is to be normed, and the squares of each 16 rows.
  __device__ __forceinline__ void square() const {
    float* outputs = floats(p_.shared.outputs);
#pragma unroll 1
    for (int first = 0; first < p_.rows; first += kTeam) {
      const int row = first + threadIdx.x;
      const bool there = row < p_.rows;
      float value = there ? outputs[row] : 0.0f;
      if (there && !p_.norm_before_gate) outputs[row] = value *= floats(p_.shared.gate)[row];
      value *= value;
#pragma unroll
      for (int offset = kRowUnit / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
      if (there && row % kRowUnit == 0) floats(p_.shared.parts)[row / kRowUnit] = value;
    }
  }

  // After the cluster's barrier: no block has still to read the conv state, and all inboxes are open.
  __device__ __forceinline__ void norm(C* conv_state) const {
    const bool alone = p_.sums == 0;  // no norm has rows of two blocks
    share_sums(alone);
    write_windows(conv_state);
    alone ? __syncthreads() : inbox().await();
    finish();
  }

  // Sums over this block's rows of each norm group go to all blocks.
  __device__ __forceinline__ void share_sums(bool alone) const {
    const int width = p_.norm_width, last = (first_ + p_.rows - 1) / p_.by_norm_width;
#pragma unroll 1
    for (int group = first_ / p_.by_norm_width; group <= last; ++group) {
      const int begin = max(group * width - first_, 0), end = min((group + 1) * width - first_, p_.rows);
      if (threadIdx.x >= (alone ? 1 : gridDim.x)) continue;
      float sum = 0.0f;
      for (int part = begin / kRowUnit; part < end / kRowUnit; ++part) sum += floats(p_.shared.parts)[part];
      float* to = floats(p_.shared.sums) + group * gridDim.x + blockIdx.x;
      if (alone) {
        *to = sum;
      } else {
        inbox().send(to, threadIdx.x, sum);
      }
    }
  }

  __device__ __forceinline__ void write_windows(C* conv_state) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < channels(); i += kTeam) {
      if (!writes(i)) continue;
      C r_window[kW];
      read(r_window, window(i));
      write(conv_state + channel(i) * kW, r_window);
    }
  }

  __device__ __forceinline__ void finish() const {
    const int width = p_.norm_width;
#pragma unroll 1
    for (int row = threadIdx.x; row < p_.rows; row += kTeam) {
      const int group = (first_ + row) / p_.by_norm_width;
      const int begin = group * width / p_.by_rows, end = ((group + 1) * width - 1) / p_.by_rows;
      float sum = 0.0f;
      for (int block = begin; block <= end; ++block) sum += floats(p_.shared.sums)[group * gridDim.x + block];
      float y = floats(p_.shared.outputs)[row] * rsqrtf(sum * p_.per_norm_width + p_.eps);
      y *= floats(p_.shared.weight)[row];
      if (p_.norm_before_gate) y *= floats(p_.shared.gate)[row];
      from_float(output(row), y);
    }
  }

  const Mamba2StepParams& p_;
  unsigned char* const shared_;
  const int first_;     // row of the block, of the set's
  const int set_head_;  // first head of the set
  const long long batch_;
  Channels x_, b_, c_;
};

// Of a multiprocessor: 64 registers a thread.
constexpr int kMamba2Blocks = 1024 / HYLO_TEAM;

}  // namespace hylo::ssd

extern "C" __global__ void __launch_bounds__(HYLO_TEAM, hylo::ssd::kMamba2Blocks)
    ssd_fwd_kernel_mamba2_step(const __grid_constant__ hylo::ssd::Mamba2StepParams p) {
  hylo::start_next_kernel();
  hylo::fetch_parameters(p);
  using hylo::bf16, hylo::fp16, hylo::fp32;
  using Block = hylo::ssd::Mamba2Block<HYLO_T, HYLO_C, HYLO_P, HYLO_S, HYLO_K, HYLO_W, HYLO_TEAM, HYLO_ROWS>;
  Block(p, hylo::dynamic_shared()).run();
}
