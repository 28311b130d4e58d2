// Products with weights as the user has them, for so few rows that packing would take
// longer. The terms of a sum come in the same order as from packed panels.
#pragma once

#include "pack.h"
#include "product.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// sums[row][panel][C][lanes] += left · weightᵀ for weight (blocks·H, K), from vector
// `offset` of each panel on: squares of it are transposed on the way.
template <class S>
void add_unpacked(const Matrix& of, int unit_vectors, const S* const* left, int rows,
                  index panel, int together, int C, int offset, S* sums) {
  using V = Vec<S>;
  constexpr index lanes = V::lanes;
  constexpr index at_once = 8 * lanes;  // cache lines of a row before the next
  const int width = of.slots * unit_vectors;
  for (index begin = 0; begin < of.K; begin += at_once) {
    const index end = of.K - begin < at_once ? of.K : begin + at_once;
    for (int p = 0; p < together; ++p) {
      for (int vector = 0; vector < width; ++vector) {
        for (index k = begin; k < end; k += lanes) {
          const index depth = of.K - k < lanes ? of.K - k : lanes;
          V square[lanes];
          load_square(of, unit_vectors, panel + p, vector, k, depth, square);
          for (int r = 0; r < rows; ++r) {
            S* const to = sums + ((r * together + p) * C + offset + vector) * lanes;
            V sum = V::load(to);
            if (depth == lanes) {
#pragma GCC unroll 16
              for (int i = 0; i < lanes; ++i) {
                sum = fma(V::broadcast(left[r][k + i]), square[i], sum);
              }
            } else {
              for (int i = 0; i < depth; ++i) {
                sum = fma(V::broadcast(left[r][k + i]), square[i], sum);
              }
            }
            sum.store(to);
          }
        }
      }
    }
  }
}

// Some rows and vectors of add_transposed.
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

// sums[row][vectors][lanes] += left · weight for weight (blocks·H, K) of some columns.
template <class S>
void add_transposed(const Matrix& of, const S* const* left, int rows, index column,
                    int vectors, S* sums) {
  using V = Vec<S>;
  // Enough sums to hide the latency of an FMA, and long pieces of the weight's rows.
  constexpr int at_once = V::registers == 32 ? 8 : 4;
  const index row = index{vectors} * V::lanes;
  for (int c = 0; c < vectors; c += at_once) {
    const int count = vectors - c < at_once ? vectors - c : at_once;
    int r = 0;
    for (; r + 2 <= rows; r += 2) {
      add_columns_of<S, 2, at_once>(of, left + r, column + c * V::lanes,
                                    sums + r * row + c * V::lanes, row, count);
    }
    if (r < rows) {
      add_columns_of<S, 1, at_once>(of, left + r, column + c * V::lanes,
                                    sums + r * row + c * V::lanes, row, count);
    }
  }
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
