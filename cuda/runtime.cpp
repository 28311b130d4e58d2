// This file implements runtime.h with the CUDA runtime and cuBLASLt.
#include "runtime.h"

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "blas.h"

namespace fusedrnn::cuda {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it for the next call
  const std::string message = std::string(what) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorMemoryAllocation) throw OutOfMemory(message);
  throw Error(message);
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "devices");
  return count;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "version of the CUDA runtime");
  return version;
}

namespace {

Device read_device(int ordinal) {
  const auto fact = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, ordinal), "attributes of a device");
    return value;
  };
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, ordinal), "attributes of a device");
  Device d;
  d.name = properties.name;
  d.capability = properties.major * 10 + properties.minor;
  d.multiprocessors = fact(cudaDevAttrMultiProcessorCount);
  d.shared_bytes = fact(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const bool clusters = d.capability >= 90 && fact(cudaDevAttrClusterLaunch);
  d.largest_cluster = clusters ? 16 : 1;
  d.clock = fact(cudaDevAttrClockRate) * 1e3;
  return d;
}

}  // namespace

const Device& device(int ordinal) {
  static std::mutex mutex;
  static std::map<int, std::unique_ptr<Device>> known;
  const std::lock_guard lock(mutex);
  auto& entry = known[ordinal];
  if (!entry) entry = std::make_unique<Device>(read_device(ordinal));
  return *entry;
}

int current_device() {
  int ordinal = 0;
  check(cudaGetDevice(&ordinal), "current device");
  return ordinal;
}

OnDevice::OnDevice(int ordinal) : before_(current_device()) {
  if (before_ != ordinal) check(cudaSetDevice(ordinal), "choice of a device");
}
OnDevice::~OnDevice() { cudaSetDevice(before_); }

namespace {

// Makes the device's pool keep freed memory, because each call allocates its scratch
// memory again.
void keep_memory() {
  static std::mutex mutex;
  static std::map<int, bool> configured;
  const std::lock_guard lock(mutex);
  const int ordinal = current_device();
  if (configured[ordinal]) return;
  cudaMemPool_t pool;
  check(cudaDeviceGetDefaultMemPool(&pool, ordinal), "memory pool");
  std::uint64_t all = UINT64_MAX;
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all),
        "memory pool");
  configured[ordinal] = true;
}

}  // namespace

void* allocate(index bytes, Stream stream) {
  keep_memory();
  void* memory = nullptr;
  if (bytes > 0) {
    check(cudaMallocAsync(&memory, static_cast<std::size_t>(bytes),
                          static_cast<cudaStream_t>(stream)),
          "memory of a device");
  }
  return memory;
}
void release(void* memory, Stream stream) noexcept {
  if (memory) cudaFreeAsync(memory, static_cast<cudaStream_t>(stream));
}
void copy(void* to, const void* from, index bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDefault,
                        static_cast<cudaStream_t>(stream)),
        "copy");
}
void clear(void* memory, index bytes, Stream stream) {
  if (!memory || bytes == 0) return;
  check(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(bytes),
                        static_cast<cudaStream_t>(stream)),
        "clearing of memory");
}
void synchronize(Stream stream) {
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "stream");
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "stream");
  return status != cudaStreamCaptureStatusNone;
}

Event::Event(Stream stream) {
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
  event_ = event;
  const cudaError_t status = cudaEventRecord(event, static_cast<cudaStream_t>(stream));
  if (status != cudaSuccess) cudaEventDestroy(event);
  check(status, "event");
}
Event::~Event() { cudaEventDestroy(static_cast<cudaEvent_t>(event_)); }
bool Event::is_done() const {
  return cudaEventQuery(static_cast<cudaEvent_t>(event_)) != cudaErrorNotReady;
}

Timer::Timer(Stream stream) : begin_(nullptr), end_(nullptr) {
  for (void** const at : {&begin_, &end_}) {
    cudaEvent_t event;
    check(cudaEventCreate(&event), "event");
    *at = event;
  }
  check(cudaEventRecord(static_cast<cudaEvent_t>(begin_),
                        static_cast<cudaStream_t>(stream)),
        "event");
}
Timer::~Timer() {
  for (void* const event : {begin_, end_}) {
    if (event) cudaEventDestroy(static_cast<cudaEvent_t>(event));
  }
}
void Timer::stop(Stream stream) {
  check(
      cudaEventRecord(static_cast<cudaEvent_t>(end_), static_cast<cudaStream_t>(stream)),
      "event");
}
double Timer::seconds() const {
  float milliseconds = 0;
  check(cudaEventSynchronize(static_cast<cudaEvent_t>(end_)), "event");
  check(cudaEventElapsedTime(&milliseconds, static_cast<cudaEvent_t>(begin_),
                             static_cast<cudaEvent_t>(end_)),
        "event");
  return milliseconds * 1e-3;
}

void order(Stream before, Stream after) {
  // A capturing stream cannot wait for another stream; the work before the capture was
  // waited for.
  if (is_capturing(after)) return;
  const Event queued(before);
  check(cudaStreamWaitEvent(static_cast<cudaStream_t>(after),
                            static_cast<cudaEvent_t>(queued.get())),
        "order of streams");
}

int device_of(const void* memory) {
  cudaPointerAttributes attributes;
  check(cudaPointerGetAttributes(&attributes, memory), "memory");
  const bool on_device =
      attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  return on_device ? attributes.device : -1;
}

namespace {
std::string blas_path = "libcublasLt.so.13";
}
void use_blas(const std::string& path) { blas_path = path; }

namespace blas {

const Library& library() {
  static const Library loaded = [] {
    void* const handle = dlopen(blas_path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
      throw Error(std::string("cuBLASLt is missing (") + dlerror() +
                  "); install it with: pip install \"fusedrnn[cuda13]\"");
    }
    const auto find = [&]<class F>(F& function, const char* symbol) {
      function = reinterpret_cast<F>(dlsym(handle, symbol));
      if (!function) throw Error(blas_path + " has no " + symbol);
    };
    Library l{};
    find(l.create, "cublasLtCreate");
    find(l.description_create, "cublasLtMatmulDescCreate");
    find(l.description_destroy, "cublasLtMatmulDescDestroy");
    find(l.description_set, "cublasLtMatmulDescSetAttribute");
    find(l.layout_create, "cublasLtMatrixLayoutCreate");
    find(l.layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(l.preference_create, "cublasLtMatmulPreferenceCreate");
    find(l.preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(l.preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(l.heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(l.matmul, "cublasLtMatmul");
    return l;
  }();
  return loaded;
}

namespace {

void check(int status, const char* what) {
  if (status != success) {
    throw Error(std::string("cuBLASLt, ") + what + ": status " + std::to_string(status));
  }
}

// Owned destroys a descriptor with its scope.
class Owned {
 public:
  Owned(void* object, int (*destroy)(void*)) : object_(object), destroy_(destroy) {}
  ~Owned() { destroy_(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  operator void*() const { return object_; }

 private:
  void* object_;
  int (*destroy_)(void*);
};

Handle handle() {
  static std::mutex mutex;
  static std::map<int, Handle> handles;
  const std::lock_guard lock(mutex);
  Handle& of_device = handles[current_device()];
  if (!of_device) check(library().create(&of_device), "handle");
  return of_device;
}

cudaDataType type_of(Element element) {
  switch (element) {
    case Element::float64:
      return CUDA_R_64F;
    case Element::bfloat16:
      return CUDA_R_16BF;
    case Element::float16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

// Our matrices are row-major, cuBLASLt's column-major, so it reads the transpose.
Owned layout(const Matrix& m) {
  Layout l = nullptr;
  check(library().layout_create(&l, type_of(m.element),
                                static_cast<std::uint64_t>(m.columns),
                                static_cast<std::uint64_t>(m.rows), m.stride),
        "layout");
  return {l, library().layout_destroy};
}

// Returns the largest power of two, up to 256, that divides an address and a stride in
// bytes.
std::uint32_t alignment(const Matrix& m) {
  constexpr std::uintptr_t element_bytes[] = {4, 8, 2, 2};
  const std::uintptr_t bits =
      reinterpret_cast<std::uintptr_t>(m.data) |
      static_cast<std::uintptr_t>(m.stride) * element_bytes[static_cast<int>(m.element)] |
      256;
  return static_cast<std::uint32_t>(bits & (~bits + 1));
}

using Key = std::tuple<int, int, Element, Element, bool, bool, index, index, index, index,
                       index, index, std::uint32_t, std::uint32_t, std::uint32_t>;

}  // namespace
}  // namespace blas

const index matmul_workspace = index{32} << 20;

void matmul(const Matrix& left, const Matrix& right, const Matrix& to, bool adds,
            bool tf32, void* workspace, Stream stream) {
  using namespace blas;
  if (to.rows == 0 || to.columns == 0) return;
  const Library& lt = library();
  const Handle own = handle();
  const bool wide = left.element == Element::float64;
  const Compute compute = wide ? compute_64f : tf32 ? compute_32f_fast_tf32 : compute_32f;
  // cuBLASLt computes toᵀ = rightᵀ leftᵀ, with each factor transposed if it is used as it
  // lies.
  Description raw = nullptr;
  blas::check(lt.description_create(&raw, compute, wide ? CUDA_R_64F : CUDA_R_32F),
              "description");
  const Owned description(raw, lt.description_destroy);
  const Transpose first = right.transposed ? op_t : op_n;
  const Transpose second = left.transposed ? op_t : op_n;
  blas::check(lt.description_set(description, desc_transa, &first, sizeof(first)),
              "transpose");
  blas::check(lt.description_set(description, desc_transb, &second, sizeof(second)),
              "transpose");
  const Owned a = layout(right), b = layout(left), c = layout(to);

  static std::mutex mutex;
  static std::map<Key, Algorithm> chosen;
  const int ordinal = current_device();
  const std::uint32_t aligned[] = {alignment(right), alignment(left), alignment(to)};
  const index depth = left.transposed ? left.rows : left.columns;
  const Key key{ordinal,          compute,   left.element, to.element, left.transposed,
                right.transposed, to.rows,   to.columns,   depth,      left.stride,
                right.stride,     to.stride, aligned[0],   aligned[1], aligned[2]};
  const std::lock_guard lock(mutex);
  auto found = chosen.find(key);
  if (found == chosen.end()) {
    Preference preference = nullptr;
    blas::check(lt.preference_create(&preference), "preference");
    const Owned prefers(preference, lt.preference_destroy);
    const auto prefer = [&](PreferenceAttribute attribute, const auto& value) {
      blas::check(lt.preference_set(prefers, attribute, &value, sizeof(value)),
                  "preference");
    };
    // Partial sums are added in float32 (float64), in order.
    prefer(pref_reduction_scheme_mask, reduction_in_compute_type);
    prefer(pref_max_workspace_bytes, static_cast<std::uint64_t>(matmul_workspace));
    prefer(pref_min_alignment_a_bytes, aligned[0]);
    prefer(pref_min_alignment_b_bytes, aligned[1]);
    prefer(pref_min_alignment_c_bytes, aligned[2]);
    prefer(pref_min_alignment_d_bytes, aligned[2]);
    Heuristic heuristic{};
    int count = 0;
    blas::check(
        lt.heuristic(own, description, a, b, c, c, prefers, 1, &heuristic, &count),
        "choice of an algorithm");
    if (count == 0) throw Error("cuBLASLt has no algorithm for a product");
    found = chosen.emplace(key, heuristic.algorithm).first;
  }
  const double one = 1, zero = 0;
  const float one_single = 1, zero_single = 0;
  const void* const alpha = wide ? static_cast<const void*>(&one) : &one_single;
  const void* const none = wide ? static_cast<const void*>(&zero) : &zero_single;
  void* const out = const_cast<void*>(to.data);
  blas::check(lt.matmul(own, description, alpha, right.data, a, left.data, b,
                        adds ? alpha : none, out, c, out, c, &found->second, workspace,
                        static_cast<std::size_t>(matmul_workspace),
                        static_cast<cudaStream_t>(stream)),
              "product");
}

}  // namespace fusedrnn::cuda
