// These are the precisions that a layer may compute in: the type of x, y and the weights
// in memory (Storage), of the products' operands, and of states and sums. A precision is
// an object because bfloat16 and float16 share their code.
#pragma once

#include "device.h"
#include "kernels.h"

namespace fusedrnn::cuda {

// Turns any NaN into the canonical one, because all bits set mean "not written"
// (product.h).
template <class A>
FUSEDRNN_DEVICE A with_canonical_nan(A x) {
  return x == x ? x : static_cast<A>(__builtin_nanf(""));
}

template <class S>
struct Exact {
  using Stored = Exact;  // the precision of kernels without a product
  using Storage = S;
  using Operand = S;
  using State = S;
  static constexpr bool on_matrix_units = false;

  static Exact of(Precision) { return {}; }
  FUSEDRNN_DEVICE S state(S x) const { return x; }
  FUSEDRNN_DEVICE S storage(S x) const { return x; }
  FUSEDRNN_DEVICE S operand(S x) const { return with_canonical_nan(x); }
  // Calls f with the matrix instruction; here there is none.
  template <class F>
  FUSEDRNN_DEVICE void with_mma(const F& f) const {
    f(0);
  }
};

struct OnTensorFloat32 {
  using Stored = Exact<float>;
  using Storage = float;
  using Operand = TensorFloat32;
  using State = float;
  static constexpr bool on_matrix_units = true;

  static OnTensorFloat32 of(Precision) { return {}; }
  FUSEDRNN_DEVICE float state(float x) const { return x; }
  FUSEDRNN_DEVICE float storage(float x) const { return x; }
  FUSEDRNN_DEVICE TensorFloat32 operand(float x) const {
    return to_tensor_float32(with_canonical_nan(x));
  }
  template <class F>
  FUSEDRNN_DEVICE void with_mma(const F& f) const {
    f(MmaTensorFloat32{});
  }
};

struct OnHalf {
  using Stored = OnHalf;
  using Storage = Half;
  using Operand = Half;
  using State = float;
  static constexpr bool on_matrix_units = true;

  bool bfloat;

  static OnHalf of(Precision precision) { return {precision == Precision::bfloat16}; }
  FUSEDRNN_DEVICE float state(Half x) const { return from_half(x, bfloat); }
  FUSEDRNN_DEVICE Half storage(float x) const { return to_half(x, bfloat); }
  FUSEDRNN_DEVICE Half operand(float x) const { return to_half(x, bfloat); }
  template <class F>
  FUSEDRNN_DEVICE void with_mma(const F& f) const {
    if (bfloat) {
      f(MmaBFloat16{});
    } else {
      f(MmaFloat16{});
    }
  }
};

}  // namespace fusedrnn::cuda
