#include <vector>

#include "kernels.h"
#include "vec.h"

namespace fusedrnn::cuda {
namespace {

std::vector<const CellEntry*> gather() {
  std::vector<const CellEntry*> all;
  device::AllCells::each([&]<template <class> class CellOf>() {
    for (const CellEntry& entry : entries_of<CellOf>()) all.push_back(&entry);
  });
  return all;
}

}  // namespace

std::span<const CellEntry* const> cells() {
  static const auto all = gather();
  return all;
}

}  // namespace fusedrnn::cuda
