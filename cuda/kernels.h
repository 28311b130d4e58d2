// This header is the table of layers: one entry per cell, with kernels for each
// precision.
#pragma once

#include <span>
#include <string_view>

#include "../csrc/contract.h"
#include "runtime.h"
#include "tuning.h"

namespace fusedrnn::cuda {

enum class Precision { float32, float64, tf32, bfloat16, float16 };

// ForwardOf is a call (csrc/contract.h) on a GPU. All memory is the device's. S is the
// element type or, if void, the precision's storage and state types. h0 and c0 may be
// null for zeros. The last axis of x is contiguous, its other strides are free; rows of y
// and dx are y_b and dx_b apart.
template <class S>
struct ForwardOf : fusedrnn::ForwardOf<S> {
  Precision precision;
  int device;
  Stream stream;
  void* workspace;
  const S *bias_ih, *bias_hh, *weight_hr;
  const void* packed;   // of this direction, or null if steps go row by row
  const void* lengths;  // (B,) int32 or int64, or null
  bool wide_lengths;
  const bool* resets;  // (T, B) at any strides, or null
  index resets_t, resets_b;
};

template <class S>
struct BackwardOf : ForwardOf<S>, GradientsOf<S> {
  bool adds_dx;  // whether dx is added to
};

using ForwardCall = ForwardOf<void>;
using BackwardCall = BackwardOf<void>;

// Returns the elements from one row of x to the next, by time and then by batch, or 0 if
// they are not constant.
template <class S>
index row_stride(const ForwardOf<S>& call) {
  const index stride = call.B > 1 ? call.x_b : call.T > 1 ? call.x_t : call.I;
  const bool constant = call.T == 1 || call.x_t == call.B * stride;
  return constant && stride >= call.I ? stride : 0;
}

struct PackCall {
  Precision precision;
  int device;
  Stream stream;
  index H;
  bool backward;
  const void *weight_hh, *bias_ih, *bias_hh;  // biases may be null
  void* packed;
};

// Runs has the functions of a layer: those of layer.h, or of rowwise.h in float32 or
// float64.
template <class S>
struct Runs {
  index (*saved_bytes)(const ForwardOf<S>&);
  index (*forward_workspace)(const ForwardOf<S>&);
  void (*forward)(const ForwardOf<S>&);
  index (*backward_workspace)(const BackwardOf<S>&);
  void (*backward)(const BackwardOf<S>&);
};
struct Kernels {
  index (*packed_bytes)(index H, bool backward);
  void (*pack)(const PackCall&);
  Plan (*choose)(const Sizes&, int device, bool backward);
  std::vector<Candidate> (*candidates)(const Sizes&, int device, bool backward);
  Runs<void> runs;
};

struct CellEntry {
  std::string_view name;
  int gates;
  bool has_c;
  int peepholes;  // gates that may read c
  int variant;    // of cells that share their kernels
  Kernels (*kernels)(Precision);
  Runs<float> rows32;  // empty for a cell without options that need rowwise.h
  Runs<double> rows64;
};

// state_element is the type of states and sums.
template <class A>
constexpr Element state_element = sizeof(A) == 8 ? Element::float64 : Element::float32;

// An Arena hands out parts of one block of memory. Without memory it only counts how many
// bytes are needed.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
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

// Returns a cell's entries, one for each of its variants; cell.cu defines it.
template <template <class> class CellOf>
std::span<const CellEntry> entries_of();
// Returns the entries of all cells.
std::span<const CellEntry* const> cells();

// A Conversion copies (T, B, N) of one element type to another, of which one is float32
// or both are alike.
struct Conversion {
  const void* from;
  index from_t, from_b;
  void* to;
  index to_t, to_b, T, B, N;
  Element from_element, to_element;
};
void convert(const Conversion&, int device, Stream);

// TakeSteps computes which steps rows take under a mask.
struct TakeSteps {
  const bool *mask, *resets;  // (T, B) at any strides; resets may be null
  index mask_t, mask_b, resets_t, resets_b;
  const void* lengths;  // (B,) int64 if wide, else int32; or null
  bool wide;
  int *times, *places;    // (T, B): the time of a step, the step of a time; or -1
  int* repeated[2];       // (T, B): the step before a time or at it, by direction; or -1
  int* counts;            // (B,)
  bool* resets_of_steps;  // (T, B), or null
  index T, B;
};
void take_steps(const TakeSteps&, int device, Stream);

// MoveRows copies to[t, b, :] = from[at[t, b], b, :] of (T, B, N). Where `at` is -1 the
// elements are those of `initial` (B, N), or 0 if that is null.
struct MoveRows : Conversion {
  const int* at;  // (T, B)
  const void* initial;
  Element initial_element;
};
void move_rows(const MoveRows&, int device, Stream);

// SumRepeated adds the gradients of the rows of y that repeat a step: to[k, b, :] =
// Σ from[t, b, :] over the times at which at[t, b] is k. Those where `at` is -1 are added
// to `initial` (B, N). Either result may be null.
struct SumRepeated : Conversion {
  const int* at;
  void* initial;
  Element initial_element;
  bool reverse;
};
void sum_repeated(const SumRepeated&, int device, Stream);

// drop_out is that of rows.h, for code that is not compiled as a kernel.
template <class S>
void drop_out(const Dropout<S>&, int device, Stream);

}  // namespace fusedrnn::cuda
