// Products that know of no cell, so that all cells share their tiles: rows at any place
// times one matrix, and da times weights transposed.
#pragma once

#include "gemm.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Where rows are that are multiplied, and where their products go, a few at a time.
template <class S>
struct RowList {
  static constexpr index most = 256;
  const S* left[most];
  S* to[most];
};

// to = left · matrix for the first `rows` of the list and some panels of N columns. The
// matrix is packed in panels of two vectors, of which the last may be narrow, and of a
// depth of which the first K count. Whole vectors are written where `padded`.
template <class V>
struct DenseProduct {
  using S = typename V::scalar;
  static constexpr int width = 2, lanes = V::lanes, columns = width * lanes;
  static constexpr int tile = tallest_tile<V>(width);

  const S* packed;
  index depth, K, N;
  bool last_is_narrow, padded;

  void run(const RowList<S>& list, index rows, Range panels) const {
    const index rest = N % columns;
    const bool narrow = last_is_narrow && rest > 0 && rest <= lanes &&
                        panels.end == (N + columns - 1) / columns;
    const index row_bytes = K * index{sizeof(S)};
    const Blocking blocking{row_bytes, row_bytes * columns};
    for_blocks<V, width, tile>(
        {0, rows}, {panels.begin, narrow ? panels.end - 1 : panels.end}, blocking, false,
        [&]<int height, int together>(index row, index panel, const Turn& turn) {
          multiply_tile<width, height, together>(list, row, panel, turn);
        });
    if (!narrow || panels.begin == panels.end) return;
    for_tiles<tile>(0, rows, [&]<int height>(index row) {
      multiply_tile<1, height, 1>(list, row, 2 * (panels.end - 1), Turn{});
    });
  }

 private:
  // A panel's number counts those of its own width.
  template <int vectors, int height, int together>
  void multiply_tile(const RowList<S>& list, index row, index panel,
                     const Turn& turn) const {
    RowsAt<S, height> left;
    for (int r = 0; r < height; ++r) left.p[r] = list.left[row + r];
    V sum[height][vectors * together];
    with_panels<V, vectors, together>(turn, [&]<class Right>() {
      const Right right(packed, panel, depth, turn);
      multiply<together>(sum, Zero{}, Product<RowsAt<S, height>, Right>{left, right, K});
    });
    for (int c = 0; c < vectors * together; ++c) {
      const index at = (panel * vectors + c) * lanes;
      for (int r = 0; r < height && at < N; ++r) {
        store_upto(sum[r][c], list.to[row + r] + at, padded ? lanes : N - at);
      }
    }
  }
};

// Sums of rows that wait for the next piece.
template <class V, int columns>
struct Waiting {
  typename V::scalar* sums;

  typename V::scalar* at(int r, int c) const {
    return sums + (r * columns + c) * V::lanes;
  }
  template <class>
  V start(int r, int c) const {
    return V::load(at(r, c));
  }
  template <int rows>
  void keep(const V (&sum)[rows][columns]) const {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) sum[r][c].store(at(r, c));
    }
  }
};

// Weights as backward reads them, in the order of the slots of da that they belong to:
// from packed panels or, where there are none, from weight (gates·H, N) as it is; the
// terms come in the same order.
template <class V>
struct TransposedWeight {
  using S = typename V::scalar;
  static constexpr int width = 2, lanes = V::lanes;

  const S *panels, *weight;
  const int* blocks;  // of the slots
  index N, H, P;
  int gates;
  S* sums;  // that wait

  // acc = da · weight for some columns, `vectors` to a panel, and slots from one on.
  // Returns whether the sums are complete; until the last piece they wait.
  template <int vectors, int rows, int columns>
  [[gnu::noinline]] bool multiply(V (&acc)[rows][columns], const RowsAt<S, rows>& da,
                                  index row, index column, const Turn& turn,
                                  int first_slot = 0) const {
    using FUSEDRNN_ARCH::multiply;
    constexpr int together = columns / vectors;
    if (!panels) {
      multiply<1>(acc, Zero{});
      for (int slot = 0; slot < gates; ++slot) {
        const RowsAt<S, rows> of_slot = da.from(slot * P);
        const Columns<V, vectors> right{weight + blocks[slot] * H * N, N, column};
        multiply<together>(
            acc, Sums<V, rows, columns>{acc},
            Product<RowsAt<S, rows>, Columns<V, vectors>>{of_slot, right, H});
      }
      return true;
    }
    const index depth = gates * P;
    const auto add = [&](const RowsAt<S, rows>& of, index K, const Turn& at,
                         const auto& start) {
      with_panels<V, vectors, together>(at, [&]<class Right>() {
        const Right right(panels, column / (vectors * lanes), depth, at);
        multiply<together>(acc, start, Product<RowsAt<S, rows>, Right>{of, right, K});
      });
    };
    if constexpr (columns == width && vectors == width) {
      if (turn.pieces > 1) {  // one to a slot
        const Waiting<V, width> waiting{sums + row % Blocking::most_rows * width * lanes};
        const Range piece = turn.depth(depth);
        const index K = turn.piece < first_slot ? 0 : piece.end - piece.begin;
        const RowsAt<S, rows> of = da.from(piece.begin);
        if (turn.is_first()) {
          add(of, K, turn, Zero{});
        } else {
          add(of, K, turn, waiting);
        }
        if (!turn.is_last()) waiting.keep(acc);
        return turn.is_last();
      }
    }
    Turn from = turn;
    if (first_slot > 0) from = {first_slot, gates};
    add(da.from(first_slot * P), depth - first_slot * P, from, Zero{});
    return true;
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
