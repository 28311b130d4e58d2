// This is the list of cells for both backends. A new cell needs its header here and its
// name in AllCells, which cuda/CMakeLists.txt reads to compile cuda/cell.cu once for each
// cell.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <template <class> class... Cells>
struct CellList {
  // Calls f.operator()<Cell>() for each cell.
  template <class F>
  static constexpr void each(const F& f) {
    (f.template operator()<Cells>(), ...);
  }
};

using AllCells = CellList<Lstm, Gru, Rnn>;

}  // namespace fusedrnn::FUSEDRNN_ARCH
