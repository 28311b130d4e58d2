// This header lists the shapes of panels that the layers need: two vectors of one matrix,
// those of the cells, and a last panel of one vector.
#pragma once

#include "../../cells/all.h"
#if defined(FUSEDRNN_WITH_TILES)
#include "tiles.h"
#elif defined(FUSEDRNN_WITH_ROW_PAIRS)
#include "row_pairs.h"
#else
#include "product.h"
#endif

namespace fusedrnn::FUSEDRNN_ARCH {

template <class V>
constexpr int variants = [] {
  int count = 0;
  AllCells::each([&]<template <class> class Cell>() {
    count += static_cast<int>(sizeof(Cell<V>::variants) / sizeof(Variant));
  });
  return count;
}();

struct PanelShape {
  int width, sums;
};
template <class V>
struct PanelShapes {
  PanelShape at[variants<V> + 2] = {{2, 2}};
  int count = 1;

  constexpr void add(PanelShape shape) {
    for (int n = 0; n < count; ++n) {
      if (at[n].width == shape.width && at[n].sums == shape.sums) return;
    }
    at[count++] = shape;
  }
};
template <class V>
constexpr PanelShapes<V> shapes = [] {
  PanelShapes<V> all;
  AllCells::each([&]<template <class> class Cell>() {
    constexpr Shape of = shape_of<Cell<V>>(0);
    all.add({of.gates * of.unit_vectors(), of.slots * of.unit_vectors()});
  });
  all.add({1, 1});
  return all;
}();

// PanelTable has a PanelProduct for each of the first `count` shapes. The last one, of
// one vector, is for backward alone.
template <class V, int count>
struct PanelTable {
  PanelProduct at[count];
};

template <class F, int count, int n = 0>
constexpr void add_panels(PanelTable<typename F::V, count>& to) {
  constexpr PanelShape shape = shapes<typename F::V>.at[n];
#if defined(FUSEDRNN_WITH_TILES)
  to.at[n] = tile_product<F, shape.width, shape.sums>();
#elif defined(FUSEDRNN_WITH_ROW_PAIRS)
  to.at[n] = row_pair_product<F, shape.width, shape.sums>();
#else
  to.at[n] = panel_product<F, shape.width, shape.sums>();
#endif
  if constexpr (n + 1 < count) add_panels<F, count, n + 1>(to);
}

template <class F, int count = shapes<typename F::V>.count>
constexpr auto panel_table = [] {
  PanelTable<typename F::V, count> table{};
  add_panels<F, count>(table);
  return table;
}();

}  // namespace fusedrnn::FUSEDRNN_ARCH
