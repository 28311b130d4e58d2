// The precisions a layer may compute in: the type of x, y and the weights in memory, that
// of the products' operands, and that of states and sums.
#pragma once

#include "device.h"

namespace fusedrnn::cuda {

struct Float32Exact {
  using Storage = float;
  using Operand = float;
  using State = float;
  static constexpr bool on_matrix_units = false;
};
struct Float64Exact {
  using Storage = double;
  using Operand = double;
  using State = double;
  static constexpr bool on_matrix_units = false;
};
struct OnTensorFloat32 {
  using Storage = float;
  using Operand = TensorFloat32;
  using State = float;
  static constexpr bool on_matrix_units = true;
};
struct OnBFloat16 {
  using Storage = BFloat16;
  using Operand = BFloat16;
  using State = float;
  static constexpr bool on_matrix_units = true;
};
struct OnFloat16 {
  using Storage = Float16;
  using Operand = Float16;
  using State = float;
  static constexpr bool on_matrix_units = true;
};

// From one element type to another, rounded to nearest.
template <class To, class From>
FUSEDRNN_DEVICE To convert(From x);

template <>
FUSEDRNN_DEVICE float convert(float x) {
  return x;
}
template <>
FUSEDRNN_DEVICE double convert(double x) {
  return x;
}
template <>
FUSEDRNN_DEVICE float convert(BFloat16 x) {
  return as_float(x);
}
template <>
FUSEDRNN_DEVICE float convert(Float16 x) {
  return as_float(x);
}
template <>
FUSEDRNN_DEVICE BFloat16 convert(float x) {
  return as_bfloat16(x);
}
template <>
FUSEDRNN_DEVICE Float16 convert(float x) {
  return as_float16(x);
}
template <>
FUSEDRNN_DEVICE TensorFloat32 convert(float x) {
  return as_tensor_float32(x);
}

}  // namespace fusedrnn::cuda
