// The kernels of a family of cells, for every precision. A family has a translation unit
// of its own, cuda/cells/<family>.cu, so that they compile side by side.
#pragma once

#include "layer.h"

namespace fusedrnn::cuda {

template <class Family, class P>
constexpr Kernels kernels_in() {
  using L = Layer<Family, P>;
  return {L::packed_bytes,      L::pack,    L::saved_bytes,
          L::forward_workspace, L::forward, L::backward_workspace,
          L::backward,          L::choose};
}

template <class Family>
Kernels kernels_of(Precision precision) {
  switch (precision) {
    case Precision::float64:
      return kernels_in<Family, Exact<double>>();
    case Precision::tf32:
      return kernels_in<Family, OnTensorFloat32>();
    case Precision::bfloat16:
    case Precision::float16:
      return kernels_in<Family, OnHalf>();
    default:
      return kernels_in<Family, Exact<float>>();
  }
}

template <class Family>
constexpr CellEntry cell(std::string_view name, int member = 0) {
  using Cell = typename Family::template First<device::Vec<float>>;
  return {name, Cell::gates, Cell::has_c, member, kernels_of<Family>};
}

}  // namespace fusedrnn::cuda
