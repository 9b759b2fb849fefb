#include "common/driver.h"

#include <dlfcn.h>

#include <optional>
#include <stdexcept>

namespace hylo {
namespace {

// From the driver API's documentation: these numbers are part of its binary interface.
constexpr int kSuccess = 0;
constexpr int kLocalBytes = 3;     // CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
constexpr int kRegisters = 4;      // CU_FUNC_ATTRIBUTE_NUM_REGS
constexpr int kMaxShared = 8;      // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kWideClusters = 14;  // CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
constexpr int kClusterDims = 4;    // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
constexpr int kEarly = 6;          // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
constexpr int kUint16 = 1;         // CU_TENSOR_MAP_DATA_TYPE_UINT16: the copy engine moves bits
constexpr int kUint32 = 2;         // CU_TENSOR_MAP_DATA_TYPE_UINT32
constexpr int kNoInterleave = 0;   // CU_TENSOR_MAP_INTERLEAVE_NONE
constexpr int kNoSwizzle = 0;      // CU_TENSOR_MAP_SWIZZLE_NONE
constexpr int kSwizzle128 = 3;     // CU_TENSOR_MAP_SWIZZLE_128B
constexpr int kPromote128 = 2;     // CU_TENSOR_MAP_L2_PROMOTION_L2_128B
constexpr int kFillZeros = 0;      // CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE

constexpr int kPortableCluster = 8;  // blocks

// CUlaunchAttribute and CUlaunchConfig.
struct alignas(8) LaunchAttribute {
  int id, padding;
  unsigned values[16];
};
static_assert(sizeof(LaunchAttribute) == 72);

struct LaunchConfig {
  unsigned grid[3], threads[3], shared_bytes;
  void* stream;
  const LaunchAttribute* attributes;
  unsigned attributes_count;
};
static_assert(sizeof(LaunchConfig) == 56);

struct Driver {
  int (*cuInit)(unsigned);
  int (*cuGetErrorName)(int, const char**);
  int (*cuGetErrorString)(int, const char**);
  int (*cuDeviceGet)(int*, int);
  int (*cuDevicePrimaryCtxRetain)(void**, int);
  int (*cuCtxGetCurrent)(void**);
  int (*cuCtxPushCurrent)(void*);
  int (*cuCtxPopCurrent)(void**);
  int (*cuModuleLoadData)(void**, const void*);
  int (*cuModuleGetFunction)(void**, void*, const char*);
  int (*cuFuncGetAttribute)(int*, int, void*);
  int (*cuFuncSetAttribute)(void*, int, int);
  int (*cuTensorMapEncodeTiled)(TensorMap*, int, std::uint32_t, void*, const std::uint64_t*, const std::uint64_t*,
                                const std::uint32_t*, const std::uint32_t*, int, int, int, int);
  int (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                        void**);
  int (*cuLaunchKernelEx)(const LaunchConfig*, void*, void**, void**);
  int (*cuOccupancyMaxActiveClusters)(int*, void*, const LaunchConfig*);
};

template <class Function>
void find(void* library, const char* symbol, Function& out) {
  out = reinterpret_cast<Function>(dlsym(library, symbol));
  if (out == nullptr) throw std::runtime_error(std::string("the CUDA driver is too old: it has no ") + symbol);
}

Driver open_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
  Driver driver;
  find(library, "cuInit", driver.cuInit);
  find(library, "cuGetErrorName", driver.cuGetErrorName);
  find(library, "cuGetErrorString", driver.cuGetErrorString);
  find(library, "cuDeviceGet", driver.cuDeviceGet);
  find(library, "cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain);
  find(library, "cuCtxGetCurrent", driver.cuCtxGetCurrent);
  find(library, "cuCtxPushCurrent_v2", driver.cuCtxPushCurrent);
  find(library, "cuCtxPopCurrent_v2", driver.cuCtxPopCurrent);
  find(library, "cuModuleLoadData", driver.cuModuleLoadData);
  find(library, "cuModuleGetFunction", driver.cuModuleGetFunction);
  find(library, "cuFuncGetAttribute", driver.cuFuncGetAttribute);
  find(library, "cuFuncSetAttribute", driver.cuFuncSetAttribute);
  find(library, "cuTensorMapEncodeTiled", driver.cuTensorMapEncodeTiled);
  find(library, "cuLaunchKernel", driver.cuLaunchKernel);
  find(library, "cuLaunchKernelEx", driver.cuLaunchKernelEx);
  find(library, "cuOccupancyMaxActiveClusters", driver.cuOccupancyMaxActiveClusters);
  return driver;
}

const Driver& driver() {
  static const Driver opened = open_driver();
  return opened;
}

void check(int status, const char* call) {
  if (status == kSuccess) return;
  const char* name = nullptr;
  const char* text = nullptr;
  driver().cuGetErrorName(status, &name);
  driver().cuGetErrorString(status, &text);
  throw std::runtime_error(std::string(call) + " failed with " + (name ? name : std::to_string(status).c_str()) + ": " +
                           (text ? text : "unknown error"));
}

// Makes a context current for a scope; costs one query where it is current already, as it is under torch.
class CurrentContext {
 public:
  explicit CurrentContext(void* wanted) {
    void* current = nullptr;
    check(driver().cuCtxGetCurrent(&current), "cuCtxGetCurrent");
    if (current == wanted) return;
    check(driver().cuCtxPushCurrent(wanted), "cuCtxPushCurrent");
    pushed_ = true;
  }
  ~CurrentContext() {
    void* popped = nullptr;
    if (pushed_) driver().cuCtxPopCurrent(&popped);
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  bool pushed_ = false;
};

// Makes any context current for a scope where none is, as on a thread that has not used torch yet. Tensor maps depend
// on none, but the driver makes them under one only.
class SomeContext {
 public:
  SomeContext() {
    void* current = nullptr;
    check(driver().cuCtxGetCurrent(&current), "cuCtxGetCurrent");
    if (current != nullptr) return;
    int device = 0;
    check(driver().cuDeviceGet(&device, 0), "cuDeviceGet");
    check(driver().cuDevicePrimaryCtxRetain(&current, device), "cuDevicePrimaryCtxRetain");
    scope_.emplace(current);
  }

 private:
  std::optional<CurrentContext> scope_;
};

}  // namespace

Kernel::Kernel(const std::string& cubin, const std::string& name, int device, int shared_bytes, int max_cluster)
    : shared_bytes_(shared_bytes) {
  int handle = 0;
  void* module = nullptr;
  check(driver().cuInit(0), "cuInit");
  check(driver().cuDeviceGet(&handle, device), "cuDeviceGet");
  check(driver().cuDevicePrimaryCtxRetain(&context_, handle), "cuDevicePrimaryCtxRetain");
  const CurrentContext scope(context_);
  check(driver().cuModuleLoadData(&module, cubin.data()), "cuModuleLoadData");
  check(driver().cuModuleGetFunction(&function_, module, name.c_str()), "cuModuleGetFunction");
  if (shared_bytes > 0) check(driver().cuFuncSetAttribute(function_, kMaxShared, shared_bytes), "cuFuncSetAttribute");
  if (max_cluster > kPortableCluster) {
    check(driver().cuFuncSetAttribute(function_, kWideClusters, 1), "cuFuncSetAttribute");
  }
}

void Kernel::launch(const Grid& grid, unsigned threads, void* params, void* stream) const {
  const CurrentContext scope(context_);
  void* arguments[] = {params};
  check(driver().cuLaunchKernel(function_, grid.x, grid.y, grid.z, threads, 1, 1, shared_bytes_, stream, arguments,
                                nullptr),
        "cuLaunchKernel");
}

void Kernel::launch_early(const Grid& grid, unsigned threads, void* params, void* stream) const {
  const CurrentContext scope(context_);
  void* arguments[] = {params};
  const LaunchAttribute early{kEarly, 0, {1}};
  const LaunchConfig config{{grid.x, grid.y, grid.z}, {threads, 1, 1}, shared_bytes_, stream, &early, 1};
  check(driver().cuLaunchKernelEx(&config, function_, arguments, nullptr), "cuLaunchKernelEx");
}

void Kernel::launch_clusters(const Grid& grid, unsigned cluster, unsigned threads, unsigned shared_bytes, void* params,
                             void* stream) const {
  const CurrentContext scope(context_);
  void* arguments[] = {params};
  const LaunchAttribute attributes[] = {{kClusterDims, 0, {cluster, 1, 1}}, {kEarly, 0, {1}}};
  const LaunchConfig config{{grid.x, grid.y, grid.z}, {threads, 1, 1}, shared_bytes, stream, attributes, 2};
  check(driver().cuLaunchKernelEx(&config, function_, arguments, nullptr), "cuLaunchKernelEx");
}

int Kernel::resident_clusters(unsigned cluster, unsigned threads, unsigned shared_bytes) const {
  const CurrentContext scope(context_);
  const LaunchAttribute size{kClusterDims, 0, {cluster, 1, 1}};
  const LaunchConfig config{{cluster, 1, 1}, {threads, 1, 1}, shared_bytes, nullptr, &size, 1};
  int clusters = 0;
  check(driver().cuOccupancyMaxActiveClusters(&clusters, function_, &config), "cuOccupancyMaxActiveClusters");
  return clusters;
}

int Kernel::registers() const { return attribute(kRegisters); }

int Kernel::local_bytes() const { return attribute(kLocalBytes); }

int Kernel::attribute(int which) const {
  const CurrentContext scope(context_);
  int value = 0;
  check(driver().cuFuncGetAttribute(&value, which, function_), "cuFuncGetAttribute");
  return value;
}

TensorMap box_map(std::uintptr_t tensor, const std::uint64_t (&sizes)[4], const std::int64_t (&strides)[4],
                  unsigned columns, unsigned rows, int row_dim, Box form) {
  const bool words = form == Box::kWords;
  const std::uint64_t bytes = words ? 4 : 2;
  std::uint64_t outer_strides[3];  // bytes; where a dim is 1, any valid number will do
  for (int i = 1; i < 4; ++i) {
    outer_strides[i - 1] = sizes[i] == 1 ? columns * bytes : static_cast<std::uint64_t>(strides[i]) * bytes;
  }
  std::uint32_t box[4] = {columns, 1, 1, 1};
  box[row_dim] = rows;
  const std::uint32_t every[4] = {1, 1, 1, 1};
  TensorMap map;
  const SomeContext scope;
  // Asked for 256 bytes at a time, memory gives up to 8 % fewer a second ("Time" in docs/mla_absorb.md).
  check(driver().cuTensorMapEncodeTiled(&map, words ? kUint32 : kUint16, 4, reinterpret_cast<void*>(tensor), sizes,
                                        outer_strides, box, every, kNoInterleave, words ? kNoSwizzle : kSwizzle128,
                                        kPromote128, kFillZeros),
        "cuTensorMapEncodeTiled");
  return map;
}

}  // namespace hylo
