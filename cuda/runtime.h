// This header is the host's side of a GPU: devices, memory, launches, matrix products.
// runtime.cpp implements it with the CUDA runtime and cuBLASLt, emulator/runtime.cpp with
// the host's memory.
//
// Everything is queued on the caller's stream and nothing waits for it. Failures throw an
// Error and leave the context unchanged.
#pragma once

#include <cstddef>
#include <list>
#include <stdexcept>
#include <string>

namespace fusedrnn::cuda {

using index = std::ptrdiff_t;
using Stream = void*;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct OutOfMemory : Error {
  using Error::Error;
};

struct Device {
  std::string name;
  int capability;  // 90 for 9.0
  int multiprocessors;
  index shared_bytes;  // the most that a block may use
  index largest_cluster;
  double clock;  // Hz, the highest
};

int device_count();  // throws Error where there is no driver
const Device& device(int ordinal);
int runtime_version();

int current_device();
// OnDevice makes a device current in the calling thread, and restores the one before.
class OnDevice {
 public:
  explicit OnDevice(int ordinal);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

// Returns the device whose memory this is, -1 for the host's.
int device_of(const void* memory);

void* allocate(index bytes, Stream stream);
void release(void* memory, Stream stream) noexcept;
void copy(void* to, const void* from, index bytes, Stream stream);
void clear(void* memory, index bytes, Stream stream);  // to zeros
void synchronize(Stream stream);
// Makes everything that is queued on `after` from now on wait for what is queued on
// `before`.
void order(Stream before, Stream after);
bool is_capturing(Stream stream);  // a graph

// An Event marks the work that is queued on a stream at one moment.
class Event {
 public:
  explicit Event(Stream stream);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  bool is_done() const;
  void* get() const { return event_; }

 private:
  void* event_;
};

// A Timer measures the time that a stream takes from its construction to stop().
class Timer {
 public:
  explicit Timer(Stream stream);
  ~Timer();
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  void stop(Stream stream);
  double seconds() const;  // waits for the end

 private:
  void *begin_, *end_;
};
// The recurrences of this thread's calls add a Timer each to this list, unless it is
// null.
inline thread_local std::list<Timer>* timers = nullptr;

struct Launch {
  int blocks_x, blocks_y, threads;
  index shared_bytes;
  bool clustered;    // all blocks of one y are a cluster
  bool cooperative;  // all blocks run at once
};
template <class Kernel>
void launch(const Kernel& kernel, const Launch& shape, Stream stream);
// Launches of(0) to of(count - 1), kernels of one type, each after the end of the one
// before.
template <class F>
void launch_in_order(index count, const F& of, const Launch& shape, Stream stream);
// Returns how many clusters of this shape run at once, 0 if none does.
template <class Kernel>
int clusters_at_once(const Launch& shape);

enum class Element { float32, float64, bfloat16, float16 };

struct Matrix {
  const void* data;
  Element element;
  index rows, columns, stride;  // in memory; stride: from one row to the next
  bool transposed;              // whether the operand is its transpose
};

extern const index matmul_workspace;  // bytes of scratch memory of a product

// Sets the path of cuBLASLt; by default the system's loader finds it.
void use_blas(const std::string& path);

// Computes to (rows of left, columns of right) = left · right, plus its content if
// `adds`. Sums are float32, or float64 for float64; operands are rounded to tf32 if
// `tf32`.
void matmul(const Matrix& left, const Matrix& right, const Matrix& to, bool adds,
            bool tf32, void* workspace, Stream stream);

}  // namespace fusedrnn::cuda
