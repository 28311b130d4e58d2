// This header packs weights in the order in which the products read them: panels
// (product.h) with the columns of all gates of a few hidden units together, so that a
// tile ends with whole units.
//
//   forward     [panel][k][slot][vector of units][lanes]
//   transposed  [panel][slot·P + unit][2 vectors of columns, the last 1 if enough][lanes]
//
// Padding is zero. The functions take the place of the first of some panels.
#pragma once

#include "../../vec/math.h"
#include "../kernels.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Loads one vector of a panel for `lanes` values of k, of which `left` exist, from weight
// (blocks·H, K): square[i] belongs to k + i.
template <class V>
inline void load_square(const Matrix& of, int unit_vectors, index panel, int vector,
                        index k, index left, V (&square)[V::lanes]) {
  using S = typename V::scalar;
  const int slot = vector / unit_vectors;
  const index unit = (panel * unit_vectors + vector % unit_vectors) * V::lanes;
  const S* const rows =
      reinterpret_cast<const S*>(of.weight) + (of.blocks[slot] * of.H + unit) * of.K + k;
#pragma GCC unroll 16
  for (int u = 0; u < V::lanes; ++u) {
    const bool real = unit + u < of.H;
    square[u] = real ? load_upto<V>(rows + u * of.K, left) : V::broadcast(0);
    // The hardware prefetcher does not follow so many rows at once.
    __builtin_prefetch(rows + u * of.K + 4 * V::lanes);
  }
  transpose(square);
}

template <class S>
index panel_bytes(int width, index K) {
  return K * width * Vec<S>::lanes * index{sizeof(S)};
}

template <class S>
void pack_panels(const Matrix& of, int unit_vectors, Range panels, char* to) {
  using V = Vec<S>;
  constexpr int lanes = V::lanes;
  const int width = of.slots * unit_vectors;
  for (index panel = panels.begin; panel < panels.end; ++panel) {
    S* const start = reinterpret_cast<S*>(to);
    for (int vector = 0; vector < width; ++vector) {
      S* column = start + vector * lanes;
      for (index k = 0; k < of.K; k += lanes, column += lanes * width * lanes) {
        V square[lanes];
        const index left = of.K - k;
        load_square(of, unit_vectors, panel, vector, k, left, square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (i < left) square[i].store(column + i * width * lanes);
        }
      }
    }
    to += panel_bytes<S>(width, of.K);
  }
}

// Packs some units of one slot for one panel of columns of weight (blocks·H, K), which
// starts at `to`.
template <class S>
FUSEDRNN_LONG void pack_columns(const Matrix& of, int slot, Range units, index panel,
                                S* to) {
  using V = Vec<S>;
  constexpr index lanes = V::lanes, columns = 2 * lanes, ahead = 32;
  const index N = of.K, first = panel * columns;
  const int width = N - first > lanes ? 2 : 1;
  const S* row = reinterpret_cast<const S*>(of.weight) +
                 (of.blocks[slot] * of.H + units.begin) * N + first;
  S* at = to + (slot * of.P + units.begin) * width * lanes;
  for (index unit = units.begin; unit < units.end; ++unit, row += N) {
    for (index n = 0; n < width * lanes; n += lanes, at += lanes) {
      // The hardware prefetcher does not follow rows that are far apart.
      __builtin_prefetch(row + n + ahead * N, 0, 2);
      const bool real = unit < of.H && first + n < N;
      (real ? load_upto<V>(row + n, N - first - n) : V::broadcast(0)).store(at);
    }
  }
}

// Packs the columns of weight (blocks·H, K) in panels of two vectors. A few rows go to
// all panels before the next rows: whole rows are contiguous in memory, while the rows of
// one panel lie on as many pages (LSTM, H = 1024: 2.6 instead of 4.2 ms).
template <class S>
void pack_transposed(const Matrix& of, Range panels, char* to) {
  constexpr index rows_at_once = 16;
  const index panel_values = of.slots * of.P * 2 * Vec<S>::lanes;
  for (int slot = 0; slot < of.slots; ++slot) {
    for (index begin = 0; begin < of.P; begin += rows_at_once) {
      const index end = begin + rows_at_once < of.P ? begin + rows_at_once : of.P;
      for (index panel = panels.begin; panel < panels.end; ++panel) {
        pack_columns(of, slot, {begin, end}, panel,
                     reinterpret_cast<S*>(to) + (panel - panels.begin) * panel_values);
      }
    }
  }
}

// Packs the biases as (slots, P): b_ih + b_hh where they meet in one sum, else each
// alone.
template <class S>
void pack_bias(const Shape& shape, const Parameters<char>& p, index P, char* to) {
  const index H = p.model.H;
  const S* const of_input = reinterpret_cast<const S*>(p.bias_ih);
  const S* const of_recurrent = reinterpret_cast<const S*>(p.bias_hh);
  for (int slot = 0; slot < shape.slots; ++slot) {
    const int input = shape.input[slot], recurrent = shape.recurrent[slot];
    S* const row = reinterpret_cast<S*>(to) + slot * P;
    for (index unit = 0; unit < P; ++unit) {
      S bias = 0;
      const bool real = unit < H;
      if (real && input >= 0 && of_input) bias += of_input[input * H + unit];
      if (real && recurrent >= 0 && of_recurrent) {
        bias += of_recurrent[recurrent * H + unit];
      }
      row[unit] = bias;
    }
  }
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
