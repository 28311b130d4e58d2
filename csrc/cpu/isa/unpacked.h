// This header multiplies with weights as the user has them, for so few rows that packing
// would take longer. The terms of a sum come in the same order as from packed panels.
#pragma once

#include <utility>

#include "pack.h"
#include "product.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Returns the first row of weights of a vector of a panel.
template <class S>
const S* rows_of(const Matrix& of, int unit_vectors, index panel, int vector) {
  const int slot = vector / unit_vectors;
  const index unit =
      (panel * unit_vectors + vector % unit_vectors) * index{Vec<S>::lanes};
  return reinterpret_cast<const S*>(of.weight) + (of.blocks[slot] * of.H + unit) * of.K;
}

// Loads a square in which some rows or columns may not exist.
template <class V>
FUSEDRNN_LONG void load_edge(const Matrix& of, int unit_vectors, index panel, int vector,
                             index k, V (&square)[V::lanes]) {
  load_square(of, unit_vectors, panel, vector, k, of.K - k, square);
}

// Runs some rows of add_unpacked for one vector of a panel: to[row] += left · weightᵀ.
// The sums stay in registers for all k; squares of the weights are transposed on the way.
template <class S, int rows>
void add_vector(const Matrix& of, int unit_vectors, index panel, int vector,
                const S* const* left, S* const* to) {
  using V = Vec<S>;
  constexpr int lanes = V::lanes;
  constexpr index ahead = 4 * lanes;
  const S* const weight = rows_of<S>(of, unit_vectors, panel, vector);
  const bool ends = vector + 1 == of.slots * unit_vectors;
  const S* const next = rows_of<S>(of, unit_vectors, panel + ends, ends ? 0 : vector + 1);
  const index unit = (panel * unit_vectors + vector % unit_vectors) * lanes;
  const bool is_full = unit + lanes <= of.H;
  V sum[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) sum[r] = V::load(to[r]);
  index k = 0;
  for (; is_full && k + lanes <= of.K; k += lanes) {
    // The hardware prefetcher does not follow so many rows at once.
    const S* const later =
        k + ahead < of.K ? weight + k + ahead : next + k + ahead - of.K;
    V square[lanes];
#pragma GCC unroll 16
    for (int u = 0; u < lanes; ++u) {
      square[u] = V::load(weight + u * of.K + k);
      __builtin_prefetch(later + u * of.K);
    }
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        sum[r] = fma(V::broadcast(left[r][k + i]), square[i], sum[r]);
      }
    }
  }
  for (; k < of.K; k += lanes) {
    V square[lanes];
    load_edge(of, unit_vectors, panel, vector, k, square);
    for (int i = 0; i < lanes && k + i < of.K; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        sum[r] = fma(V::broadcast(left[r][k + i]), square[i], sum[r]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) sum[r].store(to[r]);
}

// Returns add_vector for `rows` rows.
template <class S, int... fewer>
auto vector_adder(int rows, std::integer_sequence<int, fewer...>) {
  static constexpr decltype(&add_vector<S, 1>) adders[] = {add_vector<S, fewer + 1>...};
  return adders[rows - 1];
}

// Computes sums[row][panel][C][lanes] += left · weightᵀ for weight (blocks·H, K), from
// vector `offset` of each panel on.
template <class S>
void add_unpacked(const Matrix& of, int unit_vectors, const S* const* left, int rows,
                  index panel, int together, int C, int offset, S* sums) {
  using V = Vec<S>;
  constexpr index lanes = V::lanes;
  constexpr int most = is_small                               ? 1
                       : V::registers == 32 && sizeof(S) == 4 ? most_unpacked_rows
                                                              : 4;
  const int width = of.slots * unit_vectors;
  for (int p = 0; p < together; ++p) {
    for (int vector = 0; vector < width; ++vector) {
      S* to[most_tile_rows];
      for (int r = 0; r < rows; ++r) {
        to[r] = sums + ((r * together + p) * C + offset + vector) * lanes;
      }
      for (int r = 0; r < rows; r += most) {
        const int count = rows - r < most ? rows - r : most;
        vector_adder<S>(count, std::make_integer_sequence<int, most>{})(
            of, unit_vectors, panel + p, vector, left + r, to + r);
      }
    }
  }
}

// Runs some rows and vectors of add_transposed.
template <class S, int rows, int vectors>
void add_columns_of(const Matrix& of, const S* const* left, index column, S* sums,
                    index row, int count) {
  using V = Vec<S>;
  constexpr index lanes = V::lanes, ahead = 8;
  const index N = of.K;
  V sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < vectors; ++c) {
      sum[r][c] = c < count ? V::load(sums + r * row + c * lanes) : V::broadcast(0);
    }
  }
  for (int slot = 0; slot < of.slots; ++slot) {
    const S* const weight =
        reinterpret_cast<const S*>(of.weight) + of.blocks[slot] * of.H * N + column;
    for (index k = 0; k < of.H; ++k) {
#pragma GCC unroll 16
      for (int c = 0; c < vectors; ++c) {
        const index rest = N - column - c * lanes;
        const S* const at = weight + k * N + c * lanes;
        __builtin_prefetch(at + ahead * N);
        const V value = rest > 0 ? load_upto<V>(at, rest) : V::broadcast(0);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          sum[r][c] = fma(V::broadcast(left[r][slot * of.P + k]), value, sum[r][c]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < vectors; ++c) {
      if (c < count) sum[r][c].store(sums + r * row + c * lanes);
    }
  }
}

// Computes sums[row][vectors][lanes] += left · weight for some columns of weight
// (blocks·H, K).
template <class S>
void add_transposed(const Matrix& of, const S* const* left, int rows, index column,
                    int vectors, S* sums) {
  using V = Vec<S>;
  // This is enough sums to hide the latency of an FMA, and long pieces of the weight's
  // rows.
  constexpr int at_once = V::registers == 32 ? 8 : 4;
  const index row = index{vectors} * V::lanes;
  const auto add = [&](const auto& add_rows, int r, int c, int most) {
    const int count = vectors - c < most ? vectors - c : most;
    add_rows(of, left + r, column + c * V::lanes, sums + r * row + c * V::lanes, row,
             count);
  };
  int r = 0;
  if constexpr (!is_small) {
    for (; r + 4 <= rows; r += 4) {
      constexpr int half = at_once / 2;
      for (int c = 0; c < vectors; c += half) {
        add(add_columns_of<S, 4, half>, r, c, half);
      }
    }
  }
  for (int c = 0; c < vectors; c += at_once) {
    int next = r;
    for (; next + 2 <= rows; next += 2) {
      add(add_columns_of<S, 2, at_once>, next, c, at_once);
    }
    if (next < rows) add(add_columns_of<S, 1, at_once>, next, c, at_once);
  }
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
