// The host's side of a GPU: devices, memory, launches, matrix products. runtime.cpp does
// it with the CUDA runtime and cuBLASLt, emulator/runtime.cpp with the host's memory.
//
// Everything is queued on the caller's stream and nothing waits for it. Failures throw
// Error and leave the context as it was.
#pragma once

#include <cstddef>
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
  index shared_bytes;  // that a block may ask for
  index largest_cluster;
};

int device_count();  // throws Error where there is no driver
const Device& device(int ordinal);
int runtime_version();

int current_device();
// Makes a device the calling thread's, and the one before again.
class OnDevice {
 public:
  explicit OnDevice(int ordinal);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

// The device whose memory this is; -1 where it is the host's.
int device_of(const void* memory);

void* allocate(index bytes, Stream stream);
void release(void* memory, Stream stream) noexcept;
void copy(void* to, const void* from, index bytes, Stream stream);
void clear(void* memory, index bytes, Stream stream);  // to zeros
void synchronize(Stream stream);
// Makes all that is queued on `after` from now on wait for what is queued on `before`.
void order(Stream before, Stream after);
bool is_capturing(Stream stream);  // a graph

// The work that is queued on a stream at some moment.
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

struct Launch {
  int blocks_x, blocks_y, threads;
  index shared_bytes;
  bool clustered;    // all blocks of one y are a cluster
  bool cooperative;  // all blocks run at once
};
template <class Kernel>
void launch(const Kernel& kernel, const Launch& shape, Stream stream);
// of(0) to of(count - 1), kernels of one type, each after the end of the one before.
template <class F>
void launch_in_turn(index count, const F& of, const Launch& shape, Stream stream);
// The number of clusters of this shape that run at once; 0 where none does.
template <class Kernel>
int clusters_at_once(const Launch& shape);

enum class Element { float32, float64, bfloat16, float16 };

struct Matrix {
  const void* data;
  Element element;
  index rows, columns, stride;  // as it lies in memory, from one row to the next
  bool transposed;              // what is meant is its transpose
};

extern const index matmul_workspace;  // bytes of scratch memory of a product

// The place of cuBLASLt; without this it is looked for as the system does.
void use_blas(const std::string& path);

// to (rows of left, columns of right) = left · right, plus what is there if `adds`. Sums
// are float32, or float64 of float64; operands are rounded to tf32 if `tf32`.
void matmul(const Matrix& left, const Matrix& right, const Matrix& to, bool adds,
            bool tf32, void* workspace, Stream stream);

}  // namespace fusedrnn::cuda
