// The list of cells, for both backends. To add one: its header, and its name here.
// cuda/CMakeLists.txt reads the names of AllCells and compiles cuda/cell.cu once for
// each.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <template <class> class... Cells>
struct CellList {
  // f.operator()<Cell>(arguments) for each.
  template <class F>
  static constexpr void each(const F& f) {
    (f.template operator()<Cells>(), ...);
  }
};

using AllCells = CellList<Lstm, Gru, Rnn>;

}  // namespace fusedrnn::FUSEDRNN_ARCH
