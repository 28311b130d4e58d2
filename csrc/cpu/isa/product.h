// multiply() is the one matrix product: a register tile of a few rows times panels of
// packed columns, in the precision of the element type.
//
// A panel holds W vectors of columns for all k, as [k][W][lanes]; panels are contiguous.
// Rows are read in place. Every sum runs over k in order in one accumulator, whatever the
// tile, so a result does not depend on the row's neighbours, on the split among threads,
// or on how a sequence is cut.
#pragma once

#include "../../vec/math.h"
#include "../kernels.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Computes to = start + the terms (PanelProduct in kernels.h) for `rows` rows and
// `panels` panels of W vectors that go into C sums each. It prefetches `lines` vectors
// for each k.
//
// gcc keeps a 2-D array in registers only if every loop over it is unrolled. The sums are
// stored for the pointwise function, which is a separate call: inlined beside a cell's
// constants the product spills sums in the loop (AVX2, 4 gates: 67 instead of 111
// GFLOP/s).
template <class V, int rows, int panels, int W, int C, int lines>
void multiply(void* to, const StartAt& start, const TermAt* terms, int count) {
  using S = typename V::scalar;
  constexpr int lanes = V::lanes, sums = panels * C, width = panels * W;
  V sum[rows][sums];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const S* const from = reinterpret_cast<const S*>(start.rows[r] + start.offset);
#pragma GCC unroll 16
    for (int c = 0; c < sums; ++c) {
      sum[r][c] = V::load(from + c % C * start.slot + c / C * start.panel);
    }
  }
  const auto add = [&sum]<int offset>(const TermAt& term) {
    const S* const right = reinterpret_cast<const S*>(term.right);
    const S* const ahead = reinterpret_cast<const S*>(term.ahead);
    const index apart = term.panel / index{sizeof(S)};
    const auto left_at = [&](int r, index k) {
      return V::broadcast(reinterpret_cast<const S*>(term.left[r])[k]);
    };
    const auto column_at = [&](int c, index k) {
      if (c < lines) {
        constexpr int to_level_two = 2, to_level_one = 3;
        __builtin_prefetch(ahead + (k * lines + c) * lanes, 0,
                           lines == W ? to_level_one : to_level_two);
      }
      return V::load(right + c / W * apart + (k * W + c % W) * lanes);
    };
    // The shorter side stays in registers for a k; the longer is read one vector at a
    // time.
    for (index k = 0; k < term.K; ++k) {
      if constexpr (rows <= width) {
        V left[rows];
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) left[r] = left_at(r, k);
#pragma GCC unroll 16
        for (int c = 0; c < width; ++c) {
          // For two or three rows gcc would otherwise read the column for each row.
          const V column = rows == 1 ? column_at(c, k) : in_register(column_at(c, k));
          const int at = c / W * C + offset + c % W;
#pragma GCC unroll 16
          for (int r = 0; r < rows; ++r) sum[r][at] = fma(left[r], column, sum[r][at]);
        }
      } else {
        V column[width];
#pragma GCC unroll 16
        for (int c = 0; c < width; ++c) column[c] = column_at(c, k);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          const V left = left_at(r, k);
#pragma GCC unroll 16
          for (int c = 0; c < width; ++c) {
            const int at = c / W * C + offset + c % W;
            sum[r][at] = fma(left, column[c], sum[r][at]);
          }
        }
      }
    }
  };
  for (int n = 0; n < count; ++n) {
    if (C == W || terms[n].column == 0) {
      add.template operator()<0>(terms[n]);
    } else {
      add.template operator()<C - W>(terms[n]);
    }
  }
  S* const out = static_cast<S*>(to);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < sums; ++c) sum[r][c].store(out + (r * sums + c) * lanes);
  }
}

// This many accumulators fit the registers beside the shorter side of a tile and one
// vector.
template <class V>
constexpr int most_sums = V::registers == 32 ? 24 : 12;

template <class V>
constexpr int tallest_tile(int columns) {
  const int rows = most_sums<V> / columns;
  return rows < 8 ? rows : 8;
}

// Returns how many panels to take at once so that enough independent sums hide the
// latency of an FMA: eight in theory, ten as measured (Emerald Rapids, 4 rows of 2
// vectors from L2: 177 instead of 148 GFLOP/s). If `reading` takes longer, four of 64
// bytes keep up with it. That is so for one row from beyond the first-level cache,
// because one stream of panels is read faster than two (Zen 5, LSTM, R of 256 KB: 190
// instead of 135 GB/s), and for any number of rows from beyond the second.
template <class V>
constexpr int panels_at_once(int rows, int W, int C, bool reading) {
  const int enough = sizeof(V) < 64 ? 8 : reading ? 4 : 10;
  const int wanted = (enough + rows * W - 1) / (rows * W);
  const int most = most_sums<V> / (rows * C);
  return wanted < most ? wanted : most;
}

template <class V, int rows, int W, int C, int most, int panels = 1>
constexpr void fill_panels(PanelProduct& p) {
  p.multiply[rows - 1][panels - 1] = multiply<V, rows, panels, W, C, 0>;
  if constexpr (panels < most) fill_panels<V, rows, W, C, most, panels + 1>(p);
}

template <class V, int W, int C, int rows = 1>
constexpr void fill_rows(PanelProduct& p) {
  constexpr int near = panels_at_once<V>(rows, W, C, false);
  static_assert(near <= PanelProduct::most_together);
  p.near[rows] = near;
  p.far[rows] = panels_at_once<V>(rows, W, C, true);
  fill_panels<V, rows, W, C, near>(p);
  // For short vectors the hardware prefetcher keeps up. Many tiles share a panel only if
  // each has at least half the rows of the tallest. One tile takes a panel alone only if
  // it is tall, or if reading is the limit.
  constexpr bool prefetches = sizeof(V) > 16 || V::registers == 32;
  constexpr bool is_tall = 2 * rows >= tallest_tile<V>(C);
  constexpr bool is_alone = panels_at_once<V>(rows, W, C, true) == 1;
  p.prefetch_one[rows - 1] = multiply < V, rows, 1, W, C,
                        prefetches && is_tall ? 1 : 0 > ;
  p.prefetch_all[rows - 1] = multiply < V, rows, 1, W, C,
                        prefetches && is_alone ? W : 0 > ;
  if constexpr (rows < tallest_tile<V>(C)) fill_rows<V, W, C, rows + 1>(p);
}

template <class V, int W, int C>
constexpr PanelProduct panel_product() {
  PanelProduct p{};
  p.width = W;
  p.sums = C;
  p.tile = tallest_tile<V>(C);
  fill_rows<V, W, C>(p);
  return p;
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
