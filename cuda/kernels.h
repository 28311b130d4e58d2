// The table of layers: one entry per cell, with kernels for each precision.
#pragma once

#include <span>
#include <string_view>

#include "../csrc/problem.h"
#include "runtime.h"
#include "tuning.h"

namespace fusedrnn::cuda {

enum class Precision { float32, float64, tf32, bfloat16, float16 };

// Memory of the device throughout.
struct Call : Sizes {
  int variant;  // of cells that share their kernels
  Precision precision;
  int device;
  Stream stream;
  void* workspace;
  const void* x;  // (T, B, I)
  index x_t, x_b;
  const void *h0, *c0;  // (B, H), states
  const void* weight_ih;
  const void* packed;
  const void* lengths;  // (B,) int32 or int64, or null
  bool wide_lengths;
  const bool* resets;  // (T, B) at any strides, or null
  index resets_t, resets_b;
};

// From one row of x to the next, by time and then by batch; 0 where that is no constant.
template <class C>
index row_stride(const C& call) {
  const index stride = call.B > 1 ? call.x_b : call.T > 1 ? call.x_t : call.I;
  const bool constant = call.T == 1 || call.x_t == call.B * stride;
  return constant && stride >= call.I ? stride : 0;
}

struct ForwardCall : Call {
  void* y;  // (T, B, H), y_t = B y_b
  index y_t, y_b;
  void *h_n, *c_n;
  void* saved;  // null in inference
};

struct BackwardCall : Call {
  const void* y;
  index y_t, y_b;
  const void* saved;
  const void* dy;  // any strides but the last; or null
  index dy_t, dy_b;
  const void *dh_n, *dc_n;  // or null
  void* dx;                 // (T, B, I), rows dx_b apart
  index dx_b;
  bool adds_dx;  // to what is there
  int bptt;      // no gradient passes from chunk to chunk of so many times; 0: one
  void *dweight_ih, *dweight_hh, *dbias_ih, *dbias_hh;
  void *dh0, *dc0;
};

struct PackCall {
  Precision precision;
  int device;
  Stream stream;
  index H;
  bool backward;
  const void *weight_hh, *bias_ih, *bias_hh;  // biases may be null
  void* packed;
};

// What both directions are told; memory of the device throughout.
template <class A>
struct RowCall : Sizes {
  Model model;
  Options options;
  Vectors<const A> vectors;
  int device;
  Stream stream;
  void* workspace;
  bool tf32;
  const A* x;  // its last axis contiguous
  index x_t, x_b;
  const A *h0, *c0;  // or null: zeros
  const A *weight_ih, *weight_hh, *bias_ih, *bias_hh, *weight_hr;
  const void* lengths;
  bool wide_lengths;
  const bool* resets;
  index resets_t, resets_b;
  // Of the forward; backward reads all but trace. Contiguous, but y has rows y_b apart
  // and cells strides.
  A* y;
  index y_b;
  A *h_n, *c_n, *saved, *cells, *trace;
  index cells_t, cells_b;
};

template <class A>
struct RowBackCall : RowCall<A> {
  const A* dy;  // its last axis contiguous; or null
  index dy_t, dy_b;
  const A *dh_n, *dc_n;
  const A* dcells;
  index dcells_t, dcells_b;
  A* dx;
  index dx_b;
  bool adds_dx;
  A *dweight_ih, *dweight_hh, *dbias_ih, *dbias_hh, *dweight_hr;
  Vectors<A> dvectors;
  A *dh0, *dc0;
};

struct Kernels {
  index (*packed_bytes)(index H, bool backward);
  void (*pack)(const PackCall&);
  index (*saved_bytes)(const Sizes&);
  index (*forward_workspace)(const ForwardCall&);
  void (*forward)(const ForwardCall&);
  index (*backward_workspace)(const BackwardCall&);
  void (*backward)(const BackwardCall&);
  Plan (*choose)(const Sizes&, int device, bool backward);
};

// The layer with options, rowwise.h.
template <class A>
struct RowKernels {
  index (*saved_bytes)(const Sizes&, const Model&);
  index (*forward_workspace)(const RowCall<A>&);
  void (*forward)(const RowCall<A>&);
  index (*backward_workspace)(const RowBackCall<A>&);
  void (*backward)(const RowBackCall<A>&);
};

struct CellEntry {
  std::string_view name;
  int gates;
  bool has_c;
  int peepholes;  // gates that may see c
  int variant;    // of cells that share their kernels
  Kernels (*kernels)(Precision);
  RowKernels<float> rows32;
  RowKernels<double> rows64;
};

// Hands out parts of one piece of memory; of none, to learn how large it must be.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class E>
  E* take(index count) {
    E* const part = memory_ ? reinterpret_cast<E*>(memory_ + used_) : nullptr;
    used_ += round_up(count * index{sizeof(E)}, 256);
    return part;
  }
  index used() const { return used_; }

 private:
  char* memory_;
  index used_ = 0;
};

std::span<const CellEntry* const> cells();

// (T, B, N) of one element in another, where one of the two is float32 or both are alike.
struct Conversion {
  const void* from;
  index from_t, from_b;
  void* to;
  index to_t, to_b, T, B, N;
  Element from_element, to_element;
};
void convert(const Conversion&, int device, Stream);
// rows.h, for those who are not compiled as a kernel is.
template <class S>
void drop_out(const Dropout<S>&, int device, Stream);

}  // namespace fusedrnn::cuda
