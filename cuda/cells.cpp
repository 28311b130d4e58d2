#include "cells.h"

#include <vector>

#include "kernels.h"

namespace fusedrnn::cuda {
namespace {

template <template <class> class... CellOf>
std::vector<const CellEntry*> gather() {
  std::vector<const CellEntry*> all;
  const auto add = [&](std::span<const CellEntry> variants) {
    for (const CellEntry& entry : variants) all.push_back(&entry);
  };
  (add(entries_of<CellOf>()), ...);
  return all;
}

}  // namespace

std::span<const CellEntry* const> cells() {
  using namespace device;
  static const auto all = gather<FUSEDRNN_CELLS>();  // of CMakeLists.txt: Lstm, Gru, …
  return all;
}

}  // namespace fusedrnn::cuda
