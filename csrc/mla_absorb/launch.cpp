#include "mla_absorb/launch.h"

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <numeric>

#include "common/divider.h"
#include "common/tensor_checks.h"
#include "mla_absorb/params.h"
#include "mla_absorb/work.cuh"

namespace hylo::mla_absorb {
namespace {

constexpr std::int64_t kMaxR = 576, kMaxE = 64, kWidthUnit = 16;
constexpr std::int64_t kLeastBox = 8;        // rows that swizzled tiles are made of
constexpr std::int64_t kMaxRowTiles = 16;    // each reads the cache once more
constexpr std::int64_t kMaxTokens = 1 << 30;
constexpr std::int64_t kMaxStride = std::int64_t{1} << 39;  // elements
constexpr int kRowsOfTile[] = {8, 16, 24, 32, 48, 64};
constexpr double kLog2E = 1.4426950408889634;

std::int64_t rows_of(const Inputs& x) { return x.q_nope.shape[1] * x.q_nope.shape[2]; }
bool has_fp8(const Inputs& x) { return x.cache.type == kUint8 || x.cache.type == kE4m3; }
std::int64_t page_of(const Inputs& x) { return x.cache.shape[1]; }
std::int64_t capacity_of(const Inputs& x) { return x.paged ? x.table.shape[1] * page_of(x) : x.cache.shape[1]; }

// Rows that no page ends within, a power of two.
std::int64_t rows_of_page(const Inputs& x) { return x.paged ? std::gcd(page_of(x), std::int64_t{kTokens}) : kTokens; }

// Bytes of a row of the cache with so many key scales.
std::int64_t row_bytes(const Inputs& x, std::int64_t scales) {
  const auto R = x.q_nope.shape[3], others = x.q_rope.shape[3] + scales;
  if (!has_fp8(x)) return (R + others) * x.cache.bytes();
  return fp8_row_size(static_cast<int>(R), static_cast<int>(others));
}

bool fits(const Dims& dims) {
  if (dims.fp8 && dims.N == 48) return false;  // the compiler would keep some of it in local memory
  return (dims.N <= most_rows(dims.R) || by_rows(dims)) && room(dims).stages > 0;
}

// As few tiles of rows as there can be, and those as small as can be. N is 0 where none fits.
Dims find_dims(Dims dims, std::int64_t rows) {
  int most = 0;
  for (const int of_tile : kRowsOfTile) {
    dims.N = of_tile;
    if (fits(dims)) most = of_tile;
  }
  dims.N = most;
  if (most == 0) return dims;
  const std::int64_t tiles = (rows + most - 1) / most;
  for (const int of_tile : kRowsOfTile) {
    dims.N = of_tile;
    if (of_tile * tiles >= rows && fits(dims)) return dims;
  }
  return dims;
}

// Tiles that a sequence's query rows take; those of all sequences, of which a cluster has one where sequences are taken
// whole; and tiles of tokens that there is room for.
std::int64_t row_tiles_of(const Inputs& x, const Dims& dims) { return (rows_of(x) + dims.N - 1) / dims.N; }
std::int64_t all_row_tiles(const Inputs& x, const Dims& dims) { return x.q_nope.shape[0] * row_tiles_of(x, dims); }
std::int64_t token_tiles_of(const Inputs& x) {
  return std::max<std::int64_t>((capacity_of(x) + kTokens - 1) / kTokens, 1);
}

// The largest clusters that the GPU holds one of for each sequence and tile of query rows, to take them whole; of no blocks
// where that is not worth it. Nothing is merged through memory then, which pays for multiprocessors left idle, unless blocks
// get too much to do. Measured on an H200 with 128+32, 128+64, 256+32, 256+64 and 512+64, 1 to 64 sequences of 1K to 16K.
Spread whole_spread(const Inputs& x, const Dims& dims) {
  struct Held {
    int cluster, clusters, worth;  // blocks; what the GPU holds at once; tiles of each block from which on it pays
  };
  // Three clusters of 16 leave those of the next launch room beside them.
  constexpr Held kHeld[] = {{16, 3, 2}, {16, 6, 4}, {8, 12, 2}, {4, 24, 2}, {2, 64, 2}, {1, 128, 1}};
  constexpr int kFew = 4, kMostOfFew = 12, kMost = 16;  // sequences; tiles of a block
  // Bytes of a block, where most multiprocessors have one, and where half of them are idle, which hurts sooner the longer it
  // takes a cluster to merge.
  constexpr int kMostBytes = 640 << 10, kFewBlocks = 80, kMostBytesOfFew = 352 << 10, kMostBytesInRounds = 256 << 10;
  const auto wanted = all_row_tiles(x, dims), tiles = token_tiles_of(x);
  for (const auto& [cluster, clusters, worth] : kHeld) {
    if (wanted > clusters || worth * cluster > tiles) continue;
    const std::int64_t of_block = (tiles + cluster - 1) / cluster;
    const int of_few = merging_rounds(dims) > 1 ? kMostBytesInRounds : kMostBytesOfFew;
    const int most_bytes = wanted * cluster > kFewBlocks ? kMostBytes : of_few;
    if (of_block > (x.q_nope.shape[0] < kFew ? kMostOfFew : kMost) || of_block * stage_size(dims) > most_bytes) return {};
    return {cluster, 0};
  }
  return {};
}

// Query rows that one tile has room for, in two or three, where few short sequences leave multiprocessors idle: each has
// less to merge, and what is read again comes from the second cache. More so where one tile's are merged in rounds.
Dims split_dims(const Inputs& x, const Dims& one) {
  constexpr std::int64_t kMostParts = 3, kLeastCluster = 4, kMostTiles = 8, kBlocks = 48, kBlocksForRounds = 96;
  const auto rows = rows_of(x), tiles = token_tiles_of(x);
  if (x.fixed || one.fp8 || by_rows(one) || one.N < rows) return one;
  Dims best = one;
  for (std::int64_t parts = 2; parts <= kMostParts; ++parts) {
    Dims dims = one;
    dims.N = *std::lower_bound(std::begin(kRowsOfTile), std::end(kRowsOfTile), (rows + parts - 1) / parts);
    const auto cluster = whole_spread(x, dims).cluster;
    if (dims.N >= best.N || cluster < kLeastCluster || tiles > kMostTiles * cluster) continue;
    const auto blocks = cluster * all_row_tiles(x, dims);
    if (blocks <= (merging_rounds(best) > 1 ? kBlocksForRounds : kBlocks)) best = dims;
  }
  return best;
}

struct Found {
  std::int64_t R, E, rows, batch, capacity;
  bool scaled, fp8, fixed;
  Dims dims;
  int raw_rows, shared;  // of its room

  bool is_of(const Found& x) const {
    return R == x.R && E == x.E && rows == x.rows && batch == x.batch && capacity == x.capacity && scaled == x.scaled &&
           fp8 == x.fp8 && fixed == x.fixed;
  }
};

// Calls ask for the same again and again, and some hundred divisions take a microsecond.
const Found& found_for(const Inputs& x) {
  thread_local Found last{};
  Found wanted{x.q_nope.shape[3], x.q_rope.shape[3], rows_of(x), x.q_nope.shape[0],
               capacity_of(x),    x.scaled,          has_fp8(x), x.fixed};
  if (!last.is_of(wanted)) {
    Dims dims{static_cast<int>(wanted.R), static_cast<int>(wanted.E), 0, wanted.scaled, wanted.fp8};
    dims = find_dims(dims, wanted.rows);
    wanted.dims = dims.N == 0 ? dims : split_dims(x, dims);
    wanted.raw_rows = room(wanted.dims).raw_rows;
    wanted.shared = shared_size(wanted.dims);
    last = wanted;
  }
  return last;
}

Dims dims_of(const Inputs& x) { return found_for(x).dims; }

// The rows of a page that one copy brings, a power of two.
std::int64_t box_rows(const Inputs& x) {
  return has_fp8(x) ? std::min<std::int64_t>(rows_of_page(x), found_for(x).raw_rows) : rows_of_page(x);
}

bool has_shapes(const Inputs& x) {
  if (x.q_nope.dims != 4 || x.q_rope.dims != 4 || x.cache.dims != 3) return false;
  const auto B = x.q_nope.shape[0], T = x.q_nope.shape[1], H = x.q_nope.shape[2];
  if (!has_shape(x.q_rope, B, T, H, x.q_rope.shape[3]) || !has_shape(x.lengths, B)) return false;
  if (x.has_starts && !has_shape(x.starts, B)) return false;
  if (x.cache.shape[2] * x.cache.bytes() < row_bytes(x, 0) || (!x.paged && x.cache.shape[0] != B)) return false;
  if (x.paged && (x.table.dims != 2 || x.table.shape[0] != B)) return false;
  if (!x.scaled) return true;
  if (x.scales.dims != 3) return false;
  const auto HK = x.scales.shape[2];
  return has_shape(x.scales, x.cache.shape[0], x.cache.shape[1], HK) && HK > 0 && H % HK == 0;
}

// Key scales come with the rows of the cache, or not at all.
std::string wrong_scales(const Inputs& x) {
  if (!x.scaled) return "";
  const auto HK = x.scales.shape[2], R = x.q_nope.shape[3], E = x.q_rope.shape[3];
  const auto at = has_fp8(x) ? fp8_rest_at(static_cast<int>(R)) + E * x.scales.bytes() : row_bytes(x, 0);
  const auto in_bytes = [](const Tensor& tensor, int dim) { return tensor.strides[dim] * tensor.bytes(); };
  bool view = x.scales.type == x.q_nope.type && x.scales.data == static_cast<const char*>(x.cache.data) + at &&
              row_bytes(x, HK) <= x.cache.shape[2] * x.cache.bytes();
  for (int i = 0; i < 2; ++i) view = view && (x.cache.shape[i] == 1 || in_bytes(x.scales, i) == in_bytes(x.cache, i));
  if (!view || (HK > 1 && x.scales.strides[2] != 1)) return "key_scale is no view of the rows of kv_cache, behind rope";
  if (HK > kMaxScales) return "key_scale has " + std::to_string(HK) + " heads, more than 16";
  return "";
}

std::string wrong_layout(const Inputs& x) {
  struct Named {
    const char* name;
    const Tensor* tensor;
  };
  const bool has_rope = x.q_rope.shape[3] > 0;
  for (const Named& of : {Named{"q_nope", &x.q_nope}, Named{"q_rope", if_there(has_rope, x.q_rope)},
                          Named{"kv_cache", &x.cache}}) {
    if (of.tensor != nullptr && !has_aligned_rows(*of.tensor)) {
      return std::string("the last dim of ") + of.name +
             " is not contiguous, or does not start at 16-byte multiples";
    }
  }
  for (int i = 0; i < 2; ++i) {
    const bool any = x.cache.shape[i] == 1 || (x.cache.strides[i] > 0 && x.cache.strides[i] < kMaxStride);
    if (!any) return "the strides of kv_cache are not positive, or too long";
  }
  if (x.paged && x.table.shape[1] > 1 && x.table.strides[1] != 1) {
    return "the last dim of block_table is not contiguous";
  }
  return "";
}

std::string wrong_sizes(const Inputs& x) {
  const auto R = x.q_nope.shape[3], E = x.q_rope.shape[3];
  if (R % kWidthUnit != 0 || R == 0 || R > kMaxR) {
    return "R is " + std::to_string(R) + ", not a multiple of 16 up to 576";
  }
  if (E % kWidthUnit != 0 || E > kMaxE) return "E is " + std::to_string(E) + ", not a multiple of 16 up to 64";
  if (x.cache.shape[0] == 0 || x.cache.shape[1] == 0) return "kv_cache is empty";
  if (x.q_nope.shape[0] > kMaxBatch) return "there are more than 8192 sequences";
  if (x.paged && rows_of_page(x) < kLeastBox) {
    return "pages of " + std::to_string(page_of(x)) + " tokens are not of a multiple of 8";
  }
  // The kernel divides by multiplying, which is exact up to 2^32.
  const auto capacity = capacity_of(x);
  if (capacity > kMaxTokens || (x.paged && capacity * page_of(x) >= std::int64_t{1} << 32)) {
    return "a sequence has room for " + std::to_string(capacity) + " tokens, too many";
  }
  const Dims dims = dims_of(x);
  if (dims.N == 0) return "R and E are too wide for shared memory";
  if (rows_of(x) > kMaxRowTiles * dims.N) {
    return "T H is " + std::to_string(rows_of(x)) + ", more query rows than it serves well (" +
           std::to_string(kMaxRowTiles * dims.N) + ")";
  }
  return "";
}

// Of what is read of each row; in fp8 as words, of which a box has enough for a whole row.
TensorMap cache_map(const Inputs& x) {
  const auto of = [](std::int64_t size) { return static_cast<std::uint64_t>(size); };
  const Tensor& cache = x.cache;
  const bool fp8 = has_fp8(x);
  const std::int64_t width = row_bytes(x, x.scaled ? x.scales.shape[2] : 0), bytes = fp8 ? 4 : cache.bytes();
  const std::int64_t in_element = bytes / cache.bytes();  // the strides of a single row or page may be any
  const std::uint64_t sizes[4] = {of(width / bytes), of(cache.shape[1]), of(cache.shape[0]), 1};
  const std::int64_t strides[4] = {1, cache.strides[1] / in_element, cache.strides[0] / in_element, 0};
  const int columns = fp8 ? raw_row_size(dims_of(x)) / 4 : kTile;
  return box_map(reinterpret_cast<std::uintptr_t>(cache.data), sizes, strides, static_cast<unsigned>(columns),
                 static_cast<unsigned>(box_rows(x)), 1, fp8 ? Box::kWords : Box::kHalves);
}

Queries queries_of(const Tensor& q) { return {q.data, q.strides[0], q.strides[1], q.strides[2]}; }

}  // namespace

std::string why_not(const Inputs& x, int device_type) {
  if (x.q_nope.device_type != device_type) return "q_nope is not on a CUDA device";
  if (!are_on_one_device({&x.q_nope, &x.q_rope, &x.cache, &x.lengths, if_there(x.has_starts, x.starts),
                          if_there(x.paged, x.table), if_there(x.scaled, x.scales)},
                         device_type)) {
    return "the tensors are not on one device";
  }
  if (!has_shapes(x)) return kWrongShapes;
  const ElementType& type = x.q_nope.type;
  if ((type != kBf16 && type != kFp16) || x.q_rope.type != type || (x.cache.type != type && !has_fp8(x))) {
    return "q_nope, q_rope and kv_cache, unless its rows are in fp8, are not of one dtype, bfloat16 or float16";
  }
  if (!is_integer(x.lengths) || (x.has_starts && !is_integer(x.starts)) || (x.paged && !is_integer(x.table))) {
    return "cache_seqlens, cache_starts or block_table are not int32 or int64";
  }
  for (const auto& wrong : {&wrong_sizes, &wrong_layout, &wrong_scales}) {
    if (std::string reason = wrong(x); !reason.empty()) return reason;
  }
  return "";
}

Kind kind_of(const Inputs& x) { return {x.q_nope.device, x.q_nope.type, dims_of(x)}; }

// By rows, on an H100 with 128 heads of 512+64, 1 to 128 sequences: clusters leave multiprocessors idle, and blocks that merge
// what they have of a sequence together need none. Of many sequences with little to read, each cut in two, a cluster of 2
// merges sooner.
Spread spread_by_rows(const Inputs& x) {
  constexpr int kMany = 16, kLittle = 1 << 18, kLeast = 2;
  const auto B = x.q_nope.shape[0];
  return {B > kMany && B * capacity_of(x) <= kLittle ? 2 : 1, kLeast};
}

// Longer and more sequences, measured on an H200 with 128+32, 128+64, 256+32, 256+64 and 512+64. Each block takes an equal
// share, and what is cut is merged by many blocks together. One sequence is cut into too many pieces for that: small clusters
// make them fewer, and leave few multiprocessors idle.
Spread spread_of(const Inputs& x) {
  constexpr int kFixedCluster = 4, kLeast = 2, kCluster = 4;
  if (x.fixed) return {kFixedCluster, 1};
  const Dims dims = dims_of(x);
  if (by_rows(dims)) return spread_by_rows(x);
  if (const Spread whole = whole_spread(x, dims); whole.cluster > 0) return whole;
  if (x.q_nope.shape[0] == 1) return {kCluster, kCluster};  // what there is room for may be short yet
  return {1, kLeast};
}

std::int64_t clusters_for(const Inputs& x, const Spread& spread) {
  return spread.least > 0 ? 1 : all_row_tiles(x, dims_of(x));
}

// Clusters that there is work for.
long long most_clusters(const Inputs& x, const Spread& spread, Cut cut) {
  const auto B = x.q_nope.shape[0];
  if (cut == kWhole) return B;
  if (cut == kByLength) return slots_of(static_cast<int>(B), static_cast<int>(capacity_of(x)), 0, cut);
  return (B * token_tiles_of(x) + spread.least - 1) / spread.least;
}

Plan plan_of(const Inputs& x, const Spread& spread, int resident) {
  const Dims dims = dims_of(x);
  const auto B = static_cast<int>(x.q_nope.shape[0]), capacity = static_cast<int>(capacity_of(x));
  Plan plan{};
  plan.spread = spread;
  plan.row_tiles = static_cast<int>(row_tiles_of(x, dims));
  plan.cut = x.fixed ? kByLength : spread.least == 0 ? kWhole : kTiles;
  const long long most = most_clusters(x, spread, plan.cut);
  plan.clusters = static_cast<int>(std::min<long long>(std::max(resident / plan.row_tiles, 1), most));
  plan.slots = slots_of(B, capacity, plan.clusters, plan.cut);
  const bool is_cut = plan.cut == kTiles ? plan.clusters > 1 : plan.slots > B;
  if (is_cut) {
    plan.tickets = plan.row_tiles * plan.slots * spread.cluster;
    plan.numbers = plan.row_tiles * plan.slots * partial_size(dims, spread.cluster);
  }
  return plan;
}

void launch(const Kernel& kernel, const Inputs& x, const Options& options, const Plan& plan, void* o, void* lse,
            void* partial, void* tickets, void* stream) {
  const auto H = x.q_nope.shape[2];
  const auto by = [](std::int64_t number) { return divider(static_cast<Word>(number)); };
  Params params{};
  params.cache = cache_map(x);
  params.latent = queries_of(x.q_nope);
  params.rope = queries_of(x.q_rope);
  params.lengths = integers_of(true, x.lengths);
  params.starts = integers_of(x.has_starts, x.starts);
  params.table = integers_of(x.paged, x.table);
  params.o = o;
  params.lse = static_cast<float*>(lse);
  params.partial = static_cast<float*>(partial);
  params.tickets = static_cast<int*>(tickets);
  params.batch = static_cast<int>(x.q_nope.shape[0]);
  params.heads = static_cast<int>(H);
  params.tokens = static_cast<int>(x.q_nope.shape[1]);
  params.capacity = static_cast<int>(capacity_of(x));
  params.page = static_cast<int>(page_of(x));
  while ((std::int64_t{1} << params.box_shift) < box_rows(x)) ++params.box_shift;
  params.clusters = plan.clusters;
  while (1 << params.cluster_shift < plan.spread.cluster) ++params.cluster_shift;
  params.least = plan.spread.least;
  params.slots = static_cast<int>(plan.slots);
  params.cut = plan.cut;
  params.causal = options.causal;
  params.scale = static_cast<float>(options.scale * kLog2E);
  params.by_heads = by(H);
  params.by_page = by(params.page);
  params.by_group = by(x.scaled ? H / x.scales.shape[2] : 1);
  const auto cluster = static_cast<unsigned>(plan.spread.cluster);
  const Grid grid{cluster * static_cast<unsigned>(plan.clusters), static_cast<unsigned>(plan.row_tiles), 1};
  const auto shared = static_cast<unsigned>(found_for(x).shared);
  kernel.launch_clusters(grid, cluster, threads_of(has_fp8(x)), shared, &params, stream);
}

}  // namespace hylo::mla_absorb
