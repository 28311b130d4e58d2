// This header computes dW += daᵀ x, dR += daᵀ h' and db += Σ da of a block of depth, the
// rows of one step or several. Sums run over the rows of a block in order, and then over
// the blocks.
#pragma once

#include "product.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Packs rows [own.begin, own.end) of panels of two vectors, the last of one if that is
// enough: [panel][k][width][lanes].
template <class S>
void pack_right(const char* const* rows, index, Range own, index depth, index N,
                char* to) {
  using V = Vec<S>;
  constexpr int lanes = V::lanes;
  for (index n = 0; n < N; n += 2 * lanes) {
    const int width = N - n > lanes ? 2 : 1;
    S* at = reinterpret_cast<S*>(to) + n * depth + own.begin * width * lanes;
    for (index k = own.begin; k < own.end; ++k) {
      const S* const from = reinterpret_cast<const S*>(rows[k]);
      for (int w = 0; w < width; ++w, at += lanes) {
        load_upto<V>(from + n + w * lanes, N - n - w * lanes).store(at);
      }
    }
  }
}

// The rows of a tile of the gradients are columns of da.
template <class S>
constexpr int gradient_tile = tallest_tile<Own<Vec<S>>>(2, 2);

// Packs tiles of columns: [tile][k][gradient_tile].
template <class S>
void pack_left(const char* const* rows, index depth, Range columns, char* to) {
  constexpr int tile = gradient_tile<S>;
  S* at = reinterpret_cast<S*>(to);
  for (index column = columns.begin; column < columns.end; column += tile) {
    const index left = columns.end - column;
    for (index k = 0; k < depth; ++k, at += tile) {
      const S* const from = reinterpret_cast<const S*>(rows[k]) + column;
      if (left >= tile) {
        __builtin_memcpy(at, from, tile * sizeof(S));
      } else {
        for (int r = 0; r < tile; ++r) at[r] = r < left ? from[r] : 0;
      }
    }
  }
}

template <class S, int width>
void add_tile(const S* left, const S* right, index depth, S* const* to, index n, index N,
              bool first) {
  using V = Vec<S>;
  constexpr int tile = gradient_tile<S>, lanes = V::lanes;
  for (int r = 0; r < tile; ++r) {
    for (int w = 0; w < width && to[r]; ++w) __builtin_prefetch(to[r] + n + w * lanes, 1);
  }
  V sum[tile][width];
#pragma GCC unroll 16
  for (int r = 0; r < tile; ++r) {
#pragma GCC unroll 2
    for (int w = 0; w < width; ++w) sum[r][w] = V::broadcast(0);
  }
  for (index k = 0; k < depth; ++k) {
    V column[width];
#pragma GCC unroll 2
    for (int w = 0; w < width; ++w) column[w] = V::load(right + (k * width + w) * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < tile; ++r) {
      const V factor = V::broadcast(left[k * tile + r]);
#pragma GCC unroll 2
      for (int w = 0; w < width; ++w) sum[r][w] = fma(factor, column[w], sum[r][w]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < tile; ++r) {
    if (!to[r]) continue;
#pragma GCC unroll 2
    for (int w = 0; w < width; ++w) {
      const index column = n + w * lanes, rest = N - column;
      S* const at = to[r] + column;
      store_upto(first ? sum[r][w] : load_upto<V>(at, rest) + sum[r][w], at, rest);
    }
  }
}

// Adds leftᵀ · right to dweight, for the packed columns that belong to it.
template <class S>
void add_products(const char* left, index depth, Range columns, const Target& of,
                  bool first) {
  constexpr int tile = gradient_tile<S>, lanes = Vec<S>::lanes;
  const index P = of.padded, end = of.begin + of.blocks * P;
  if (!of.dweight || columns.end <= of.begin || columns.begin >= end) return;
  S* const dweight = reinterpret_cast<S*>(of.dweight);
  S* rows[gradient_tiles_at_once][tile];  // null for padding and other columns
  for (int r = 0; r < gradient_tiles_at_once * tile; ++r) {
    const index column = columns.begin + r, at = column - of.begin;
    const bool real = column < columns.end && at >= 0 && column < end;
    const index block = real ? at / P : 0, unit = real ? at - block * P : of.units;
    rows[r / tile][r % tile] =
        unit < of.units ? dweight + (of.order[block] * of.units + unit) * of.N : nullptr;
  }
  for (index n = 0; n < of.N; n += 2 * lanes) {
    const S* const panel = reinterpret_cast<const S*>(of.right) + n * depth;
    for (index t = 0; t * tile < columns.end - columns.begin; ++t) {
      bool any = false;
      for (const S* row : rows[t]) any |= row != nullptr;
      if (!any) continue;
      const S* const packed = reinterpret_cast<const S*>(left) + t * tile * depth;
      if (of.N - n > lanes) {
        add_tile<S, 2>(packed, panel, depth, rows[t], n, of.N, first);
      } else {
        add_tile<S, 1>(packed, panel, depth, rows[t], n, of.N, first);
      }
    }
  }
}

// Adds the same from few rows, for which packing takes longer than the sums.
template <class S, int depth>
void add_outer_products_of(const char* const* da, const char* const* right, Range columns,
                           const Target& of, bool first) {
  using V = Vec<S>;
  constexpr index lanes = V::lanes;
  for (index column = columns.begin; column < columns.end; ++column) {
    const index at = column - of.begin, P = of.padded;
    if (at < 0 || at >= of.blocks * P || at % P >= of.units) continue;
    S* const to =
        reinterpret_cast<S*>(of.dweight) + (of.order[at / P] * of.units + at % P) * of.N;
    V factor[depth];
    for (int k = 0; k < depth; ++k) {
      factor[k] = V::broadcast(reinterpret_cast<const S*>(da[k])[column]);
    }
    for (index n = 0; n < of.N; n += lanes) {
      V sum = V::broadcast(0);
#pragma GCC unroll 4
      for (int k = 0; k < depth; ++k) {
        const S* const row = reinterpret_cast<const S*>(right[k]) + n;
        sum = fma(factor[k], load_upto<V>(row, of.N - n), sum);
      }
      store_upto(first ? sum : load_upto<V>(to + n, of.N - n) + sum, to + n, of.N - n);
    }
  }
}
template <class S>
void add_outer_products(const char* const* da, const char* const* right, index,
                        index depth, Range columns, const Target& of, bool first) {
  if (!of.dweight) return;
  if (depth == 1) return add_outer_products_of<S, 1>(da, right, columns, of, first);
  if (depth == 2) return add_outer_products_of<S, 2>(da, right, columns, of, first);
  if (depth == 3) return add_outer_products_of<S, 3>(da, right, columns, of, first);
  add_outer_products_of<S, 4>(da, right, columns, of, first);
}

// Computes Σ_k a[k] or Σ_k a[k] b[k], in order, of columns `own`. If it is not the first
// block, the sum starts at `to` if it `continues`, else it is added to `to` at the end.
template <class S, bool is_full>
void add_some_columns(const char* const* a, const char* const* b, index depth, index left,
                      index column, S* out, bool first, bool continues) {
  using V = Vec<S>;
  constexpr int lanes = V::lanes,
                at_once = 8;  // enough to hide the latency of an addition
  V sum[at_once] = {};
  const auto each = [&](const auto& f) {
#pragma GCC unroll 8
    for (int v = 0; v < at_once; ++v) {
      const index rest = is_full ? lanes : left - v * lanes;
      if (rest > 0) f(column + v * lanes, rest, sum[v]);
    }
  };
  if (continues && !first) {
    each([&](index at, index rest, V& of) { of = load_upto<V>(out + at, rest); });
  }
  for (index k = 0; k < depth; ++k) {
    const S* const x = reinterpret_cast<const S*>(a[k]);
    const S* const y = b ? reinterpret_cast<const S*>(b[k]) : nullptr;
    each([&](index at, index rest, V& of) {
      const V value = load_upto<V>(x + at, rest);
      of = b ? fma(value, load_upto<V>(y + at, rest), of) : of + value;
    });
  }
  each([&](index at, index rest, V& of) {
    const bool adds = !continues && !first;
    store_upto(adds ? load_upto<V>(out + at, rest) + of : of, out + at, rest);
  });
}
template <class S>
void add_columns(const char* const* a, const char* const* b, index depth, Range own,
                 char* to, bool first, bool continues) {
  constexpr index many = 8 * Vec<S>::lanes;
  S* const out = reinterpret_cast<S*>(to);
  for (index column = own.begin; column < own.end; column += many) {
    const index left = own.end - column;
    const auto add =
        left >= many ? add_some_columns<S, true> : add_some_columns<S, false>;
    add(a, b, depth, left, column, out, first, continues);
  }
}

template <class S>
void write_biases(const Shape& shape, const char* sums, index P, index H, Range own,
                  char* dbias_ih, char* dbias_hh) {
  for (index column = own.begin; column < own.end; ++column) {
    const int slot = static_cast<int>(column / P);
    const index unit = column % P;
    if (unit >= H) continue;
    const int input = shape.input[slot], recurrent = shape.recurrent[slot];
    const S sum = reinterpret_cast<const S*>(sums)[column];
    const auto put = [&](char* to, int block) {
      if (to && block >= 0) reinterpret_cast<S*>(to)[block * H + unit] = sum;
    };
    put(dbias_ih, input);
    put(dbias_hh, recurrent);
  }
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
