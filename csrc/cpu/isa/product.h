// multiply() is the one matrix product: a register tile of a few rows times panels of
// packed columns, in a format of weights (formats.h).
//
// A panel holds W vectors of columns for all k, as [k][W][vector]; a vector may hold
// several k of each column. Panels are contiguous. Every sum runs over k in the same
// order, whatever the tile, so a result does not depend on the row's neighbours, on the
// split among threads, or on how a sequence is cut.
#pragma once

#include "formats.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Adds the products of vectors [begin, end) of a term's panels to sum[row][column_of(c)].
// It prefetches `lines` vectors for each.
template <class F, int rows, int width, int W, int lines, class Sum, int sums, class At>
[[gnu::always_inline]] inline void add_products_of(const TermAt& term, index begin,
                                                   index end, Sum (&sum)[rows][sums],
                                                   const At& column_of) {
  const char* const right = term.right;
  const auto column_at = [&]<int part>(int c, index k) {
    if (c < lines && part == 0) {
      constexpr int to_level_two = 2, to_level_one = 3;
      __builtin_prefetch(term.ahead + (k * lines + c) * F::bytes, 0,
                         lines == W ? to_level_one : to_level_two);
    }
    return F::template right<part>(right + c / W * term.panel +
                                   (k * W + c % W) * F::bytes);
  };
  const auto add = [&]<int part>(index k) {
    // The shorter side stays in registers for a k; the longer is read one vector at a
    // time.
    if constexpr (rows <= width) {
      typename F::Left left[rows];
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) left[r] = F::template left<part>(term.left[r], k);
#pragma GCC unroll 16
      for (int c = 0; c < width; ++c) {
        const auto found = column_at.template operator()<part>(c, k);
        // For two or three rows gcc would otherwise read the column for each row.
        const auto column = rows == 1 ? found : in_register(found);
        const int at = column_of(c);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          sum[r][at] = F::template add<part>(left[r], column, sum[r][at]);
        }
      }
    } else {
      typename F::Right column[width];
#pragma GCC unroll 16
      for (int c = 0; c < width; ++c) {
        column[c] = column_at.template operator()<part>(c, k);
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const auto left = F::template left<part>(term.left[r], k);
#pragma GCC unroll 16
        for (int c = 0; c < width; ++c) {
          const int at = column_of(c);
          sum[r][at] = F::template add<part>(left, column[c], sum[r][at]);
        }
      }
    }
  };
  for (index k = begin; k < end; ++k) {
    add.template operator()<0>(k);
    if constexpr (F::parts == 2) add.template operator()<1>(k);
  }
}

// Computes the products of some vectors of a term in sums of their own, to[row][c].
template <class F, int rows, int panels, int W, int lines>
[[gnu::always_inline]] inline void sum_products(const TermAt& term, Range range,
                                                typename F::Sum (&to)[rows][panels * W]) {
  constexpr int width = panels * W;
  typename F::Sum sum[rows][width];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < width; ++c) sum[r][c] = F::Sum::broadcast(0);
  }
  add_products_of<F, rows, width, W, lines>(term, range.begin, range.end, sum,
                                            [](int c) { return c; });
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < width; ++c) to[r][c] = sum[r][c];
  }
}

// Computes to = start + the terms (PanelProduct in kernels.h) for `rows` rows and
// `panels` panels of W vectors that go into C sums each.
//
// gcc keeps a 2-D array in registers only if every loop over it is unrolled. The sums are
// stored for the pointwise function, which is a separate call: inlined beside a cell's
// constants the product spills sums in the loop (AVX2, 4 gates: 67 instead of 111
// GFLOP/s).
template <class F, int rows, int panels, int W, int C, int lines>
void multiply(void* to, const StartAt& start, const TermAt* terms, int count) {
  using V = typename F::V;
  using S = typename V::scalar;
  constexpr int lanes = V::lanes, sums = panels * C, width = panels * W;
  S* const out = static_cast<S*>(to);
  const auto start_at = [&](int r, int c) {
    const S* const from = reinterpret_cast<const S*>(start.rows[r] + start.offset);
    return V::load(from + c % C * start.slot + c / C * start.panel);
  };
  if constexpr (F::continues) {
    V sum[rows][sums];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
      for (int c = 0; c < sums; ++c) sum[r][c] = start_at(r, c);
    }
    const auto add = [&]<int offset>(const TermAt& term) {
      const auto column_of = [](int c) { return c / W * C + offset + c % W; };
      add_products_of<F, rows, width, W, lines>(term, 0, F::vectors(term.K), sum,
                                                column_of);
    };
    for (int n = 0; n < count; ++n) {
      if (C == W || terms[n].column == 0) {
        add.template operator()<0>(terms[n]);
      } else {
        add.template operator()<C - W>(terms[n]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
      for (int c = 0; c < sums; ++c) sum[r][c].store(out + (r * sums + c) * lanes);
    }
  } else {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < sums; ++c) start_at(r, c).store(out + (r * sums + c) * lanes);
    }
    int n = 0;
    if constexpr (rows <= F::most_rows_of_two) {
      // Two operands of few rows share one reading of the weights.
      if (count > 1 && terms[0].right == terms[1].right) {
        const char* left[2 * rows];
        for (int r = 0; r < 2 * rows; ++r) left[r] = terms[r / rows].left[r % rows];
        TermAt both = terms[0];
        both.left = left;
        alignas(64) typename F::Sum part[2 * rows][width];
        sum_products<F, 2 * rows, panels, W, lines>(both, {0, F::vectors(both.K)}, part);
        for (; n < 2; ++n) {
          F::template finish<panels, W, C>(terms[n], part + n * rows, rows, out);
        }
      }
    }
    for (; n < count; ++n) {
      const index vectors = F::vectors(terms[n].K);
      for (index begin = 0; begin < vectors; begin += F::vectors_at_once) {
        const index most = begin + F::vectors_at_once;
        const Range range{begin, most < vectors ? most : vectors};
        alignas(64) typename F::Sum part[rows][width];
        sum_products<F, rows, panels, W, lines>(terms[n], range, part);
        F::template finish<panels, W, C>(terms[n], part, rows, out);
      }
    }
  }
}

// Returns the rows of the tallest tile of panels of W vectors that go into C sums.
template <class F>
constexpr int tallest_tile(int W, int C) {
  const int rows = F::most_sums / (F::continues ? C : W);
  return rows < 8 ? rows : 8;
}

// Returns how many panels to take at once so that enough independent sums hide the
// latency of an FMA: eight in theory, ten as measured (Emerald Rapids, 4 rows of 2
// vectors from L2: 177 instead of 148 GFLOP/s). If `reading` takes longer, four of 64
// bytes keep up with it. That is so for one row from beyond the first-level cache,
// because one stream of panels is read faster than two (Zen 5, LSTM, R of 256 KB: 190
// instead of 135 GB/s), and for any number of rows from beyond the second.
template <class F>
constexpr int panels_at_once(int rows, int W, int C, bool reading) {
  const int enough = sizeof(typename F::V) < 64 ? 8 : reading && F::continues ? 4 : 10;
  const int wanted = (enough + rows * W - 1) / (rows * W);
  const int most = F::most_sums / (rows * (F::continues ? C : W));
  return wanted < most ? wanted : most;
}

template <class F, int rows, int W, int C, int most, int panels = 1>
constexpr void fill_panels(PanelProduct& p) {
  p.multiply[rows - 1][panels - 1] = multiply<F, rows, panels, W, C, 0>;
  if constexpr (panels < most) fill_panels<F, rows, W, C, most, panels + 1>(p);
}

template <class F, int W, int C, int rows = 1>
constexpr void fill_rows(PanelProduct& p) {
  using V = typename F::V;
  constexpr int near = panels_at_once<F>(rows, W, C, false);
  static_assert(near <= PanelProduct::most_together);
  p.near[rows] = near;
  p.far[rows] = panels_at_once<F>(rows, W, C, true);
  fill_panels<F, rows, W, C, near>(p);
  // For short vectors the hardware prefetcher keeps up. Many tiles share a panel only if
  // each has at least half the rows of the tallest. One tile takes a panel alone only if
  // it is tall, or if reading is the limit.
  constexpr bool prefetches = sizeof(V) > 16 || V::registers == 32;
  constexpr bool is_tall = 2 * rows >= tallest_tile<F>(W, C);
  constexpr bool is_alone = panels_at_once<F>(rows, W, C, true) == 1;
  p.prefetch_one[rows - 1] = multiply < F, rows, 1, W, C,
                        prefetches && is_tall ? 1 : 0 > ;
  p.prefetch_all[rows - 1] = multiply < F, rows, 1, W, C,
                        prefetches && is_alone ? W : 0 > ;
  if constexpr (rows < tallest_tile<F>(W, C)) fill_rows<F, W, C, rows + 1>(p);
}

template <class F, int W, int C>
constexpr PanelProduct panel_product() {
  PanelProduct p{};
  p.width = W;
  p.sums = C;
  p.tile = tallest_tile<F>(W, C);
  fill_rows<F, W, C>(p);
  return p;
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
