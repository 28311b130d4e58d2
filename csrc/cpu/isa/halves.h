// This header has the functions for arrays of bfloat16: conversions of rows, packing, and
// the products of the gradients of weights, in a format of bfloat16 (narrow_formats.h).
//
// A row is bfloat16 or float32 in memory, by the bytes of an element, and is rounded to
// bfloat16 in either case.
#pragma once

#include "operands.h"
#include "shapes.h"

namespace fusedrnn::FUSEDRNN_ARCH {

constexpr index half = 2;  // bytes

// Loads bfloat16 from element k on, zeros from K on.
inline Vec<float> halves_at(const char* row, index k, index K) {
  constexpr index lanes = Vec<float>::lanes;
  if (K - k >= lanes) return from_halves(row + k * half);
  alignas(64) char rest[lanes * half] = {};
  if (k < K) __builtin_memcpy(rest, row + k * half, (K - k) * half);
  return from_halves(rest);
}
// Loads elements of `item` bytes from k on, rounded; null stands for a row of zeros.
template <index item>
inline Vec<float> rounded_at(const char* row, index k, index K) {
  if (!row) return Vec<float>::broadcast(0);
  if (item == half) return halves_at(row, k, K);
  return rounded_to_bfloat16(elements(reinterpret_cast<const float*>(row), k, K));
}

// widen converts n elements of bfloat16 to float32.
inline void widen(const char* from, index n, char* to) {
  using V = Vec<float>;
  float* const out = reinterpret_cast<float*>(to);
  index k = 0;
  for (; k + V::lanes <= n; k += V::lanes) from_halves(from + k * half).store(out + k);
  if (k < n) store_upto(halves_at(from, k, n), out + k, n - k);
}
// store_halves rounds x to bfloat16 and stores its first elements, at most left.
inline void store_halves(Vec<float> x, char* to, index left) {
  constexpr index lanes = Vec<float>::lanes;
  if (left >= lanes) return put_rounded(x, to);
  alignas(64) char rest[lanes * half];
  put_rounded(x, rest);
  __builtin_memcpy(to, rest, left * half);
}
// narrow_row rounds n elements of float32 to bfloat16.
inline void narrow_row(const char* from, index n, char* to) {
  constexpr index lanes = Vec<float>::lanes;
  const float* const row = reinterpret_cast<const float*>(from);
  index k = 0;
  for (; k + lanes <= n; k += lanes)
    put_rounded(Vec<float>::load(row + k), to + k * half);
  if (k < n) store_halves(elements(row, k, n), to + k * half, n - k);
}

// Writes rows of bfloat16 as operands.
template <bool widened, int grain>
void put_halves_left(const Rows& rows, Range places, index K, const Operand* to, int) {
  each_row(rows, places, [&](const float* found, index place) {
    const char* const row = reinterpret_cast<const char*>(found);
    char* const at = to->rows + place * to->apart;
    const index padding = round_up(K, grain) - K;
    if (widened) {
      widen(row, K, at);
      if (padding) __builtin_memset(at + K * 4, 0, padding * 4);
    } else {
      __builtin_memcpy(at, row, K * half);
      if (padding) __builtin_memset(at + K * half, 0, padding * half);
    }
  });
}

// Returns pairs of bfloat16, a in the lower halves and b in the upper ones, as the bits
// of a vector. The lower half of a NaN may have bits.
inline Vec<float> paired(Vec<float> a, Vec<float> b) {
  const Ints upper = Ints::broadcast(static_cast<int>(0xffff0000u));
  return floats(shifted_right<16>(bits(a)) + (bits(b) & upper));
}

// Loads the pairs of a row from element k on.
template <index item>
inline Vec<float> pairs_of(const char* row, index k, index K) {
  using V = Vec<float>;
  constexpr index lanes = V::lanes;
  V pairs;
  if (item == half && K - k >= 2 * lanes) {
    __builtin_memcpy(&pairs, row + k * half, sizeof(pairs));
    return pairs;
  }
  alignas(64) char both[2 * lanes * half];
  for (index n = 0; n < 2 * lanes; n += lanes) {
    if (item == half) {
      put_halves(bits(halves_at(row, k + n, K)), both + n * half);
    } else {
      const float* const values = reinterpret_cast<const float*>(row);
      put_rounded(elements(values, k + n, K), both + n * half);
    }
  }
  __builtin_memcpy(&pairs, both, sizeof(pairs));
  return pairs;
}

// Packs panels of rows of weights: [k / 2][vector][lane][2], K padded to `grain`.
template <int grain, index item>
void pack_pairs_of(const Matrix& of, int unit_vectors, Range panels, char* to) {
  using V = Vec<float>;
  constexpr index lanes = V::lanes;
  const int width = of.slots * unit_vectors;
  const index depth = round_up(of.K, grain), row_bytes = of.K * item;
  for (index panel = panels.begin; panel < panels.end; ++panel) {
    for (int vector = 0; vector < width; ++vector) {
      const index unit = (panel * unit_vectors + vector % unit_vectors) * lanes;
      const char* const rows =
          of.weight + (of.blocks[vector / unit_vectors] * of.H + unit) * row_bytes;
      char* at = to + vector * index{sizeof(V)};
      for (index k = 0; k < depth; k += 2 * lanes) {
        V square[lanes];
#pragma GCC unroll 16
        for (int u = 0; u < lanes; ++u) {
          const char* const row = rows + u * row_bytes;
          square[u] = unit + u < of.H ? pairs_of<item>(row, k, of.K) : V::broadcast(0);
          // The hardware prefetcher does not follow so many rows at once.
          __builtin_prefetch(row + (k + 4 * lanes) * item);
        }
        transpose(square);
        const index pairs = (depth - k) / 2, apart = width * index{sizeof(V)};
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (i < pairs) square[i].store(reinterpret_cast<float*>(at + i * apart));
        }
        at += lanes * apart;
      }
    }
    to += depth / 2 * width * index{sizeof(V)};
  }
}
template <int grain>
void pack_pairs(const Matrix& of, int unit_vectors, Range panels, char* to) {
  (of.item == half ? pack_pairs_of<grain, half>
                   : pack_pairs_of<grain, 4>)(of, unit_vectors, panels, to);
}

// Packs rows k of `own` to panels of two vectors, [k / 2][vector][lane][2], where row k
// is row_at(k), and `depth` is padded to `grain`. Two rows go to all panels before the
// next ones, as each is contiguous in memory.
template <int grain, index item, class F>
void pack_rows(const F& row_at, Range own, index depth, index N, Range panels, char* to) {
  using V = Vec<float>;
  constexpr index lanes = V::lanes;
  const index padded = round_up(depth, grain), panel_bytes = padded * 2 * lanes * half;
  const index end = own.end == depth ? padded : own.end;
  constexpr index ahead = 32;
  for (index k = own.begin; k < end; k += 2) {
    const auto row = [&](index at) { return at < depth ? row_at(at) : nullptr; };
    const char *const a = row(k), *const b = row(k + 1);
    const char *const a_later = row(k + ahead), *const b_later = row(k + 1 + ahead);
    char* start = to;
    for (index panel = panels.begin; panel < panels.end; ++panel, start += panel_bytes) {
      const index n = panel * 2 * lanes;
      // The hardware prefetcher does not follow rows that are far apart.
      if (a_later) __builtin_prefetch(a_later + n * item, 0, 2);
      if (b_later) __builtin_prefetch(b_later + n * item, 0, 2);
      const int width = N - n > lanes ? 2 : 1;
      float* const at = reinterpret_cast<float*>(start + k * width * lanes * half);
      for (int w = 0; w < width; ++w) {
        const index column = n + w * lanes;
        paired(rounded_at<item>(a, column, N), rounded_at<item>(b, column, N))
            .store(at + w * lanes);
      }
    }
  }
}

template <int grain>
void pack_right_halves(const char* const* rows, index item, Range own, index depth,
                       index N, char* to) {
  constexpr index columns = 2 * Vec<float>::lanes;
  const Range panels{0, (N + columns - 1) / columns};
  const auto row_at = [&](index k) { return rows[k]; };
  if (item == half) return pack_rows<grain, half>(row_at, own, depth, N, panels, to);
  pack_rows<grain, 4>(row_at, own, depth, N, panels, to);
}

template <int grain>
void pack_transposed_halves(const Matrix& of, Range panels, char* to) {
  const auto row_at = [&](index k) -> const char* {
    const index slot = k / of.P, unit = k - slot * of.P;
    if (unit >= of.H) return nullptr;
    return of.weight + (of.blocks[slot] * of.H + unit) * of.K * of.item;
  };
  const index depth = of.slots * of.P;
  if (of.item == half) {
    return pack_rows<grain, half>(row_at, {0, depth}, depth, of.K, panels, to);
  }
  pack_rows<grain, 4>(row_at, {0, depth}, depth, of.K, panels, to);
}

// Writes columns of rows of float32 as operands of `depth` elements, one for each column.
template <bool widened, int grain>
void pack_left_halves(const char* const* rows, index depth, Range columns, char* to) {
  using V = Vec<float>;
  constexpr index lanes = V::lanes, size = widened ? 4 : half;
  const index apart = operand_bytes(depth, grain, size), padded = round_up(depth, grain);
  const auto at = [&](index k, index column) {
    const char* const row = k < depth ? rows[k] + column * 4 : nullptr;
    return rounded_at<4>(row, 0, columns.end - column);
  };
  for (index column = columns.begin; column < columns.end; column += lanes) {
    char* const out = to + (column - columns.begin) * apart;
    for (index k = 0; k < padded; k += widened ? lanes : 2 * lanes) {
      V square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        square[i] = widened ? at(k + i, column)
                            : paired(at(k + 2 * i, column), at(k + 2 * i + 1, column));
      }
      transpose(square);
      for (index i = 0; i < lanes && column + i < columns.end; ++i) {
        square[i].store(reinterpret_cast<float*>(out + i * apart + k * size));
      }
    }
  }
}

// Adds a sum to some elements of dweight, or stores it.
inline void add_to(char* dweight, index item, Vec<float> sum, index left, bool first) {
  using V = Vec<float>;
  if (item == half) return store_halves(sum, dweight, left);
  float* const at = reinterpret_cast<float*>(dweight);
  store_upto(first ? sum : load_upto<V>(at, left) + sum, at, left);
}

// Adds the products of some columns with a panel of `width` vectors, at columns n of
// dweight.
template <class F, int width>
void add_panel_of_halves(const PanelProduct& product, TermAt term, const char* left,
                         index apart, Range columns, const Target& of, index n,
                         bool first, int* configured) {
  using V = Vec<float>;
  constexpr index lanes = V::lanes;
  alignas(64) float sums[most_tile_rows * width * lanes];
  alignas(64) const float zeros[lanes] = {};
  const char *starts[most_tile_rows], *rows[most_tile_rows];
  for (const char*& start : starts) start = reinterpret_cast<const char*>(zeros);
  term.left = rows;
  for (index column = columns.begin; column < columns.end; column += product.tile) {
    const index rest = columns.end - column;
    const int height = rest < product.tile ? static_cast<int>(rest) : product.tile;
    char* to[most_tile_rows];  // null for padding and other columns
    for (int r = 0; r < height; ++r) {
      rows[r] = left + (column - columns.begin + r) * apart;
      const index at = column + r - of.begin, block = at / of.padded;
      const index unit = at - block * of.padded;
      const bool real = at >= 0 && block < of.blocks && unit < of.units;
      const index element = (of.order[real ? block : 0] * of.units + unit) * of.N + n;
      to[r] = real ? of.dweight + element * of.item : nullptr;
      // The sums are added to when the product is done.
      for (index w = 0; w < width * lanes && to[r]; w += 16) {
        __builtin_prefetch(to[r] + w * of.item, 1);
      }
    }
    const StartAt start{starts, 0, 0, 0, height, configured};
    product.multiply[height - 1][0](sums, start, &term, 1);
    for (int r = 0; r < height; ++r) {
      for (index w = 0; w < width * lanes && n + w < of.N && to[r]; w += lanes) {
        const V sum = V::load(sums + r * width * lanes + w);
        add_to(to[r] + w * of.item, of.item, sum, of.N - n - w, first);
      }
    }
  }
}

// Adds leftᵀ · right to dweight, as add_products in gradients.h.
template <class F, int size>
void add_products_of_halves(const char* left, index depth, Range columns,
                            const Target& of, bool first) {
  constexpr index lanes = Vec<float>::lanes;
  const index end = of.begin + of.blocks * of.padded;
  if (!of.dweight || columns.end <= of.begin || columns.begin >= end) return;
  const index apart = operand_bytes(depth, F::grain, size);
  TermAt term{};
  term.K = depth;
  term.panel = round_up(depth, F::grain) * 2 * lanes * half;
  term.right = of.right;
  int configured = 0;
  constexpr auto& table = panel_table<F>;
  constexpr int last = shapes<Vec<float>>.count - 1;
  for (index n = 0; n < of.N; n += 2 * lanes, term.right += term.panel) {
    if (of.N - n > lanes) {
      add_panel_of_halves<F, 2>(table.at[0], term, left, apart, columns, of, n, first,
                                &configured);
    } else {
      add_panel_of_halves<F, 1>(table.at[last], term, left, apart, columns, of, n, first,
                                &configured);
    }
  }
#ifdef FUSEDRNN_WITH_TILES
  if (configured) Tiles::release();
#endif
}

// Adds Σ_k da[k] right[k] from few rows.
template <index item>
void add_outer_products_of_halves(const char* const* da, const char* const* right,
                                  index depth, Range columns, const Target& of,
                                  bool first) {
  using V = Vec<float>;
  constexpr index lanes = V::lanes;
  for (index column = columns.begin; column < columns.end; column += lanes) {
    V factors[most_outer_products];
    for (index k = 0; k < depth; ++k) {
      factors[k] = rounded_at<4>(da[k], column, columns.end);
    }
    for (index c = 0; c < lanes && column + c < columns.end; ++c) {
      const index at = column + c - of.begin, block = at / of.padded;
      const index unit = at - block * of.padded;
      if (at < 0 || block >= of.blocks || unit >= of.units) continue;
      char* const to = of.dweight + (of.order[block] * of.units + unit) * of.N * of.item;
      V factor[most_outer_products];
      for (index k = 0; k < depth; ++k) {
        float lane[lanes];
        factors[k].store(lane);
        factor[k] = V::broadcast(lane[c]);
      }
      for (index n = 0; n < of.N; n += lanes) {
        V sum = V::broadcast(0);
        for (index k = 0; k < depth; ++k) {
          sum = fma(factor[k], rounded_at<item>(right[k], n, of.N), sum);
        }
        add_to(to + n * of.item, of.item, sum, of.N - n, first);
      }
    }
  }
}
inline void add_outer_products_halves(const char* const* da, const char* const* right,
                                      index item, index depth, Range columns,
                                      const Target& of, bool first) {
  if (!of.dweight) return;
  (item == half ? add_outer_products_of_halves<half>
                : add_outer_products_of_halves<4>)(da, right, depth, columns, of, first);
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
