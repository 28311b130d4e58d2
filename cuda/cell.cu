// This file has the kernels of one cell in every precision. CMake compiles it once for
// each cell, FUSEDRNN_CELL, so that cells compile side by side.
#include <array>

#include "layer.h"
#include "rowwise.h"

namespace fusedrnn::cuda {
namespace {

template <class S, class L>
constexpr Runs<S> runs_of() {
  return {L::saved_bytes, L::forward_workspace, L::forward, L::backward_workspace,
          L::backward};
}

template <template <class> class CellOf, class P>
constexpr Kernels kernels_in() {
  using L = Layer<CellOf, P>;
  return {L::packed_bytes, L::pack, L::choose, L::candidates, runs_of<void, L>()};
}

template <template <class> class CellOf>
Kernels kernels_of(Precision precision) {
  switch (precision) {
    case Precision::float64:
      return kernels_in<CellOf, Exact<double>>();
    case Precision::tf32:
      return kernels_in<CellOf, OnTensorFloat32>();
    case Precision::bfloat16:
    case Precision::float16:
      return kernels_in<CellOf, OnHalf>();
    default:
      return kernels_in<CellOf, Exact<float>>();
  }
}

template <template <class> class CellOf>
auto make_entries() {
  using Cell = CellOf<device::Vec<float>>;
  // A cell of one gate has no option whose units need each other.
  Runs<float> rows32{};
  Runs<double> rows64{};
  if constexpr (Cell::gates > 1) {
    rows32 = runs_of<float, RowLayer<CellOf, float>>();
    rows64 = runs_of<double, RowLayer<CellOf, double>>();
  }
  constexpr std::size_t count = sizeof(Cell::variants) / sizeof(Variant);
  std::array<CellEntry, count> entries{};
  for (std::size_t i = 0; i < count; ++i) {
    entries[i] = {
        Cell::variants[i].name, Cell::gates,        Cell::has_c, Cell::peephole_count,
        static_cast<int>(i),    kernels_of<CellOf>, rows32,      rows64};
  }
  return entries;
}

}  // namespace

template <>
std::span<const CellEntry> entries_of<device::FUSEDRNN_CELL>() {
  static const auto entries = make_entries<device::FUSEDRNN_CELL>();
  return entries;
}

}  // namespace fusedrnn::cuda
