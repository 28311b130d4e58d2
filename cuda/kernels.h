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
  int member;  // of the cell's family (recurrence.h)
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

struct CellEntry {
  std::string_view name;
  int gates;
  bool has_c;
  int member;  // of its family, which shares the kernels
  Kernels (*kernels)(Precision);
};

std::span<const CellEntry* const> cells();

}  // namespace fusedrnn::cuda
