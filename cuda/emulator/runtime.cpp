// This file implements cuda/runtime.h without a GPU: memory is the host's, products are
// plain loops.
#include "../runtime.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>

#include "../device.h"
#include "launch.h"

namespace fusedrnn::cuda {

namespace {

// The device is small, so that small shapes reach every limit.
Device emulated{"emulator", 90, 12, 96 * 1024, 8, 1e9};

double value_at(const Matrix& m, index i) {
  switch (m.element) {
    case Element::float64:
      return static_cast<const double*>(m.data)[i];
    case Element::bfloat16:
      return from_half(static_cast<const Half*>(m.data)[i], true);
    case Element::float16:
      return from_half(static_cast<const Half*>(m.data)[i], false);
    default:
      return static_cast<const float*>(m.data)[i];
  }
}

double value_at(const Matrix& m, index row, index column) {
  return value_at(m, m.transposed ? column * m.stride + row : row * m.stride + column);
}

void set(const Matrix& m, index i, double value) {
  void* const data = const_cast<void*>(m.data);
  const auto single = static_cast<float>(value);
  switch (m.element) {
    case Element::float64:
      static_cast<double*>(data)[i] = value;
      break;
    case Element::bfloat16:
      static_cast<Half*>(data)[i] = to_half(single, true);
      break;
    case Element::float16:
      static_cast<Half*>(data)[i] = to_half(single, false);
      break;
    default:
      static_cast<float*>(data)[i] = single;
  }
}

// As on a GPU, after a kernel that failed every call fails.
std::string lost;
void require_context() {
  if (!lost.empty()) throw Error("the context is lost: " + lost);
}

}  // namespace

void run(const Launch& shape, const std::function<void()>& kernel) {
  require_context();
  static std::mt19937 seeds(7);
  const Device& gpu = device(0);
  const bool fits =
      shape.blocks_x >= 1 && shape.blocks_y >= 1 && shape.threads >= 32 &&
      shape.threads <= most_threads && shape.threads % 32 == 0 &&
      shape.shared_bytes <= gpu.shared_bytes &&
      (!shape.clustered || shape.blocks_x <= gpu.largest_cluster) &&
      (!shape.cooperative || shape.blocks_x * shape.blocks_y <= gpu.multiprocessors);
  if (!fits) throw Error("launch of a kernel: invalid configuration");
  try {
    emulator::run({shape.blocks_x, shape.blocks_y, shape.threads,
                   static_cast<std::size_t>(shape.shared_bytes),
                   shape.clustered || shape.cooperative, static_cast<unsigned>(seeds())},
                  kernel);
  } catch (const std::runtime_error& failure) {
    lost = failure.what();
    require_context();
  }
}

int device_count() { return 1; }
const Device& device(int) { return emulated; }
int runtime_version() { return 0; }
int current_device() { return 0; }
OnDevice::OnDevice(int) : before_(0) {}
OnDevice::~OnDevice() { (void)before_; }

void* allocate(index bytes, Stream) {
  require_context();
  if (bytes == 0) return nullptr;
  constexpr index most = index{1} << 32;
  void* const memory =
      bytes <= most
          ? std::aligned_alloc(256, static_cast<std::size_t>((bytes + 255) / 256 * 256))
          : nullptr;
  if (!memory) throw OutOfMemory("out of memory");
  // Unwritten memory is NaN in any precision.
  std::memset(memory, 0xff, static_cast<std::size_t>(bytes));
  return memory;
}
void release(void* memory, Stream) noexcept { std::free(memory); }
void copy(void* to, const void* from, index bytes, Stream) {
  require_context();
  if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
}
void clear(void* memory, index bytes, Stream) {
  if (memory) std::memset(memory, 0, static_cast<std::size_t>(bytes));
}
void synchronize(Stream) { require_context(); }
void order(Stream, Stream) {}
bool is_capturing(Stream) { return false; }
Event::Event(Stream) : event_(nullptr) {}
Event::~Event() = default;
bool Event::is_done() const { return true; }
namespace {
// The host's clock, in nanoseconds.
void* now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return reinterpret_cast<void*>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(time).count());
}
}  // namespace
Timer::Timer(Stream) : begin_(now()), end_(nullptr) {}
Timer::~Timer() = default;
void Timer::stop(Stream) { end_ = now(); }
double Timer::seconds() const {
  return static_cast<double>(static_cast<char*>(end_) - static_cast<char*>(begin_)) *
         1e-9;
}
void use_blas(const std::string&) {}
int device_of(const void*) { return 0; }

const index matmul_workspace = 256;

void matmul(const Matrix& left, const Matrix& right, const Matrix& to, bool adds, bool,
            void*, Stream) {
  const index depth = left.transposed ? left.rows : left.columns;
  if (depth == 0) throw Error("cuBLASLt has no product of depth 0");
  for (index i = 0; i < to.rows; ++i) {
    for (index j = 0; j < to.columns; ++j) {
      double sum = adds ? value_at(to, i, j) : 0;
      for (index k = 0; k < depth; ++k)
        sum += value_at(left, i, k) * value_at(right, k, j);
      set(to, i * to.stride + j, sum);
    }
  }
}

}  // namespace fusedrnn::cuda
