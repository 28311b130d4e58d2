// This header multiplies with the tiles of a matrix unit: 16 rows at most, and one panel.
// Fewer rows than `fewest_rows` are multiplied in the same order of sums by vectors,
// which read a panel as fast (product.h).
#pragma once

#include "../../vec/amx.h"
#include "product.h"

namespace fusedrnn::FUSEDRNN_ARCH {

constexpr int fewest_rows = 4;

// Calls f.operator()<n>() for n from 0 to count - 1.
template <int count, int n = 0, class F>
[[gnu::always_inline]] inline void each_constant(const F& f) {
  f.template operator()<n>();
  if constexpr (n + 1 < count) each_constant<count, n + 1>(f);
}

// Adds the products of a term to tiles first, first + 1 and so on, one for each of the W
// vectors of a panel.
template <class F, int W, int first>
void add_tiles(const TermAt& term) {
  constexpr int left = 4, right = 5, rights = 3;
  constexpr index vectors_at_once = 16;  // of a column
  const index apart = term.left[1] - term.left[0], vectors = F::vectors(term.K);
  for (index at = 0; at < vectors; at += vectors_at_once) {
    Tiles::load<left>(term.left[0] + at * 4, apart);
    const char* const panel = term.right + at * W * F::bytes;
    each_constant<W>([&]<int c>() {
      Tiles::load<right + c % rights>(panel + c * F::bytes, W * F::bytes);
      F::template multiply_tiles<first + c, left, right + c % rights>();
    });
  }
}

// Computes a tile of `start.height` rows and one panel, as multiply() in product.h does.
template <class F, int W, int C>
void multiply_with_tiles(void* to, const StartAt& start, const TermAt* terms, int count) {
  using V = typename F::V;
  float* const out = static_cast<float*>(to);
  const int rows = start.height;
  if (*start.configured != rows) {
    Tiles::configure(rows);
    *start.configured = rows;
  }
  for (int r = 0; r < rows; ++r) {
    const float* const from =
        reinterpret_cast<const float*>(start.rows[r] + start.offset);
    for (int c = 0; c < C; ++c) {
      V::load(from + c * start.slot).store(out + (r * C + c) * V::lanes);
    }
  }
  if constexpr (F::tiles_continue) {
    each_constant<C>([&]<int c>() { Tiles::load<c>(out + c * V::lanes, C * F::bytes); });
    for (int n = 0; n < count; ++n) {
      if (C == W || terms[n].column == 0) {
        add_tiles<F, W, 0>(terms[n]);
      } else {
        add_tiles<F, W, C - W>(terms[n]);
      }
    }
    each_constant<C>([&]<int c>() { Tiles::store<c>(out + c * V::lanes, C * F::bytes); });
  } else {
    for (int n = 0; n < count; ++n) {
      alignas(64) typename F::Sum part[most_tile_rows][W];
      each_constant<W>([]<int c>() { Tiles::clear<c>(); });
      add_tiles<F, W, 0>(terms[n]);
      each_constant<W>([&]<int c>() { Tiles::store<c>(&part[0][c], W * F::bytes); });
      F::template finish<1, W, C>(terms[n], part, rows, out);
    }
  }
}

template <class F, int W, int C>
constexpr PanelProduct tile_product() {
  PanelProduct p = panel_product<F, W, C>();
  p.tile = most_tile_rows;
  for (int rows = fewest_rows; rows <= most_tile_rows; ++rows) {
    p.near[rows] = p.far[rows] = 1;
    p.multiply[rows - 1][0] = p.prefetch_one[rows - 1] = p.prefetch_all[rows - 1] =
        multiply_with_tiles<F, W, C>;
  }
  return p;
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
