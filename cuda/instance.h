// The kernels of one cell, for every precision. A cell has a translation unit of its own,
// cuda/cells/<cell>.cu, so that they compile side by side.
#pragma once

#include "layer.h"

namespace fusedrnn::cuda {

// f(P{}) for the type behind a precision.
template <class F>
auto with_precision(Precision precision, const F& f) {
  switch (precision) {
    case Precision::float64:
      return f(Float64Exact{});
    case Precision::tf32:
      return f(OnTensorFloat32{});
    case Precision::bfloat16:
      return f(OnBFloat16{});
    case Precision::float16:
      return f(OnFloat16{});
    default:
      return f(Float32Exact{});
  }
}

template <template <class> class CellOf>
Kernels kernels_of(Precision precision) {
  return with_precision(precision, [](auto p) -> Kernels {
    using L = Layer<CellOf, decltype(p)>;
    return {L::packed_bytes,      L::pack,    L::saved_bytes,
            L::forward_workspace, L::forward, L::backward_workspace,
            L::backward,          L::choose};
  });
}

template <template <class> class CellOf>
constexpr CellEntry cell(std::string_view name) {
  using Cell = CellOf<device::Vec<float>>;
  return {name, Cell::gates, Cell::has_c, kernels_of<CellOf>};
}

}  // namespace fusedrnn::cuda
