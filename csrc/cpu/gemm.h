// The one multiply: a register tile of a few rows times panels of packed columns.
//
// A panel holds W vectors' worth of columns for all k, as [k][W][lanes]; `panels` of them
// stand one after the other. Rows are read through a functor, element (r, k), so that
// rows of x, y or da are used where they lie. Every sum runs over k in order in one
// accumulator, whatever the tile, so a result does not depend on the row's neighbours, on
// the split among threads, or on how a sequence is cut.
#pragma once

#include "../vec/math.h"
#include "machine.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Rows at pointers p[r]; used where rows are at arbitrary places.
template <class S, int rows>
struct RowsAt {
  const S* p[rows];
  S operator()(int r, index k) const { return p[r][k]; }

  RowsAt from(index k) const {
    RowsAt later;
    for (int r = 0; r < rows; ++r) later.p[r] = p[r] + k;
    return later;
  }
};

// Rows packed side by side for each k.
template <class S, int rows>
struct PackedRows {
  const S* p;
  S operator()(int r, index k) const { return p[k * rows + r]; }
};

// One tile's turn: which piece of the depth of its panels it adds to its sums, and what
// it asks memory for meanwhile.
//
//   own    its panel a page ahead, as the machine itself looks no further than a page:
//          where panels come from beyond the second-level cache for one tile (Zen 5, R of
//          4 MB: 128 instead of 105 GB/s)
//   next   a part, one vector for each k, of what has its turn after this piece: where
//          each comes from afar once for many tiles, the first of which would wait
struct Turn {
  enum Asks { nothing, own, next };

  index piece = 0, pieces = 1;
  Asks asks = nothing;
  index next_panel = 0, next_piece = 0, part = 0;

  bool is_first() const { return piece == 0; }
  bool is_last() const { return piece + 1 == pieces; }
  // What this piece is of a depth of K, and what piece `of` is.
  Range depth(index K) const { return depth(K, piece); }
  Range depth(index K, index of) const {
    return {K * of / pieces, K * (of + 1) / pieces};
  }
};

// Packed panels on the right: column vector w of panel p at k. K is their depth.
template <class V, int W>
struct Panels {
  using S = typename V::scalar;
  static constexpr int width = W;
  const S* first;
  index K;

  Panels(const S* panels, index panel, index depth, const Turn& turn = {})
      : first(at(panels, panel, depth, turn.depth(depth))), K(depth) {}
  V operator()(int p, int w, index k) const {
    return V::load(first + ((p * K + k) * W + w) * V::lanes);
  }

 protected:
  static const S* at(const S* panels, index panel, index depth, Range piece) {
    return panels + (panel * depth + piece.begin) * W * V::lanes;
  }
};

// One panel, and a prefetch with each of the first `lines` vectors of a column.
template <class V, int W, int lines>
struct AskingPanel : Panels<V, W> {
  using typename Panels<V, W>::S;
  const S* ahead;

  AskingPanel(const S* panels, index panel, index depth, const Turn& turn)
      : Panels<V, W>(panels, panel, depth, turn) {
    if (turn.asks == Turn::own) {
      ahead = this->first + 4096 / sizeof(S);
    } else {
      const Range piece = turn.depth(depth, turn.next_piece);
      ahead = this->at(panels, turn.next_panel, depth, piece) +
              turn.part * (piece.end - piece.begin) * V::lanes;
    }
  }
  V operator()(int p, int w, index k) const {
    constexpr int to_level_two = 2, to_level_one = 3;
    if (w < lines) {
      __builtin_prefetch(ahead + (k * lines + w) * V::lanes, 0,
                         lines == W ? to_level_one : to_level_two);
    }
    return Panels<V, W>::operator()(p, w, k);
  }
};

// f.operator()<Right>() with what reads the panels and asks for what the turn says.
template <class V, int W, int together, class F>
inline void with_panels(const Turn& turn, const F& f) {
  if constexpr (together == 1) {
    if (turn.asks == Turn::own) return f.template operator()<AskingPanel<V, W, W>>();
    if (turn.asks == Turn::next) return f.template operator()<AskingPanel<V, W, 1>>();
  }
  f.template operator()<Panels<V, W>>();
}

// A matrix as it is on the right, N columns, seen as panels from column `first` on.
template <class V, int W>
struct Columns {
  static constexpr int width = W;
  const typename V::scalar* matrix;
  index N, first;
  V operator()(int p, int w, index k) const {
    constexpr index ahead = 8;
    const index column = first + (p * W + w) * V::lanes;
    __builtin_prefetch(matrix + (k + ahead) * N + column);
    return column < N ? load_upto<V>(matrix + k * N + column, N - column)
                      : V::broadcast(0);
  }
};

// Σ_k left(r, k) · right(p, w, k), to be added from column `offset` of each panel's sums
// on. `left` is not copied: gcc copies pointers just stored in pieces wider than those
// stores, which has to wait until every store before is in the cache.
template <class A, class B, int offset_ = 0>
struct Product {
  static constexpr int offset = offset_;
  const A& left;
  B right;
  index K;
};

// Where sums start: at zero, or where others ended.
struct Zero {
  template <class V>
  static V start(int, int) {
    return V::broadcast(0);
  }
};
template <class V, int rows, int columns>
struct Sums {
  V (&sum)[rows][columns];
  template <class>
  V start(int r, int c) const {
    return sum[r][c];
  }
};

// to[r][c] = start(r, c) + the products, one after the other, for `panels` panels of
// columns side by side.
//
// gcc keeps a 2-D array in registers only if every loop over it is unrolled, hence the
// local copy: the caller's loops need not be. And it is a call, because inlined beside a
// cell's constants it spills sums in the loop (AVX2, 4 gates: 67 instead of 111 GFLOP/s).
template <int panels, class V, int rows, int columns, class Start, class... Products>
[[gnu::noinline]] void multiply(V (&to)[rows][columns], const Start& start,
                                const Products&... products) {
  V sum[rows][columns];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < columns; ++c) sum[r][c] = start.template start<V>(r, c);
  }
  [[maybe_unused]] const auto add =
      [&sum]<class A, class B, int offset>(const Product<A, B, offset>& of) {
        constexpr int width = B::width, per_panel = columns / panels;
        // The shorter side stays in registers for a k, the longer comes one vector at a
        // time.
        for (index k = 0; k < of.K; ++k) {
          if constexpr (rows <= panels * width) {
            V left[rows];
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) left[r] = V::broadcast(of.left(r, k));
#pragma GCC unroll 16
            for (int c = 0; c < panels * width; ++c) {
              // gcc would read it again for each of two or three rows.
              const V column = rows == 1 ? of.right(c / width, c % width, k)
                                         : in_register(of.right(c / width, c % width, k));
              const int at = c / width * per_panel + offset + c % width;
#pragma GCC unroll 16
              for (int r = 0; r < rows; ++r)
                sum[r][at] = fma(left[r], column, sum[r][at]);
            }
          } else {
            V column[panels * width];
#pragma GCC unroll 16
            for (int c = 0; c < panels * width; ++c) {
              column[c] = of.right(c / width, c % width, k);
            }
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) {
              const V left = V::broadcast(of.left(r, k));
#pragma GCC unroll 16
              for (int c = 0; c < panels * width; ++c) {
                const int at = c / width * per_panel + offset + c % width;
                sum[r][at] = fma(left, column[c], sum[r][at]);
              }
            }
          }
        }
      };
  (add(products), ...);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < columns; ++c) to[r][c] = sum[r][c];
  }
}

// Accumulators that fit the registers beside the shorter side of a tile and one more
// vector.
template <class V>
constexpr int most_sums = V::registers == 32 ? 24 : 12;

template <class V>
constexpr int tallest_tile(int columns) {
  const int rows = most_sums<V> / columns;
  return rows < 8 ? rows : 8;
}

// Panels taken at once so that enough sums run side by side to hide the latency of an
// FMA: eight by the book, ten as seen (Emerald Rapids, 4 rows of 2 vectors from L2: 177
// instead of 148 GFLOP/s). Where reading takes longer four of 64 bytes keep up with it:
// one row from beyond the first-level cache, as one stream of panels is read faster than
// two (Zen 5, LSTM, R of 256 KB: 190 instead of 135 GB/s), any from beyond the second.
template <class V>
constexpr int panels_at_once(int rows, int W, bool reading) {
  const int sums = rows * W, enough = sizeof(V) < 64 ? 8 : reading ? 4 : 10;
  const int wanted = (enough + sums - 1) / sums, most = most_sums<V> / sums;
  return wanted < most ? wanted : most;
}

// Calls f.operator()<n>() for a run-time n in least..most.
template <int most, int least = 1, class F>
inline void with_count(index n, const F& f) {
  if constexpr (most > least) {
    if (n < most) return with_count<most - 1, least>(n, f);
  }
  f.template operator()<most>();
}

// Cuts [begin, end) into tiles of nearly equal height, at most `most` and at least
// `least`, which is (most + 1) / 2 where there are more than `most`.
template <int most, int least = 1, class F>
inline void for_tiles(index begin, index end, const F& f) {
  const index n = end - begin, tiles = (n + most - 1) / most;
  for (index tile = 0; tile < tiles; ++tile) {
    const index first = begin + n * tile / tiles;
    const index last = begin + n * (tile + 1) / tiles;
    with_count<most, least>(last - first,
                            [&]<int rows>() { f.template operator()<rows>(first); });
  }
}

// Rows of so many bytes and panels of so many, the latter cut into pieces of their depth
// where many tiles share them.
struct Blocking {
  index row_bytes, panel_bytes, pieces = 1;
  static constexpr index most_rows = 512;  // that share panels beyond `rows_first`
};

// f.operator()<rows, panels>(row, panel, turn) for each tile of rows × panels. Where all
// panels stay in any second-level cache, rows are the outer loop, so that what belongs to
// a row is read and written in order; else panels, so that each comes from afar once for
// as many rows as stay in that cache beside it and the next.
//
// Panels are taken to and fro: of more than a cache holds, what the last pass left there
// is met first (Zen 5, R of 1 MB in 1 MB: 0.83 instead of 0.92 ms). So a caller that
// comes again and again alternates `backwards`.
template <class V, int W, int most, class F>
inline void for_blocks(Range rows, Range panels, const Blocking& blocking, bool backwards,
                       const F& f) {
  constexpr index near_cache = 64 * 1024, own_cache = 512 * 1024, fewest_tiles = 4;
  constexpr int least = (most + 1) / 2;
  const auto& [row_bytes, panel_bytes, pieces] = blocking;
  const index count = panels.end - panels.begin, bytes = count * panel_bytes;
  const index height = rows.end - rows.begin;
  if (height == 0) return;
  const bool rows_first = height > most && bytes <= own_cache;
  const index room = second_level_cache / 4 * 3 - 2 * panel_bytes / pieces;
  const index tiles = room / (most * row_bytes);
  const index fitting = most * (tiles > fewest_tiles ? tiles : fewest_tiles);
  const index block = fitting < Blocking::most_rows ? fitting : Blocking::most_rows;
  if (height > block && !rows_first) {
    const index blocks = (height + block - 1) / block;
    // An even number of passes ends where it began.
    if (blocks % 2 == 0) backwards = false;
    for (index n = 0; n < blocks; ++n, backwards = !backwards) {
      const Range part{rows.begin + height * n / blocks,
                       rows.begin + height * (n + 1) / blocks};
      for_blocks<V, W, most>(part, panels, blocking, backwards, f);
    }
    return;
  }
  // The first of `taken` panels after `done`.
  const auto next = [&](index done, index taken) {
    return backwards ? panels.end - done - taken : panels.begin + done;
  };
  if (rows_first) {
    return for_tiles<most, least>(rows.begin, rows.end, [&]<int tile>(index row) {
      for (index done = 0; done < count; ++done) {
        f.template operator()<tile, 1>(row, next(done, 1), Turn{});
      }
      backwards = !backwards;
    });
  }
  if (height > most) {
    const bool far = 2 * bytes > second_level_cache;
    for (index done = 0; done < count; ++done) {
      const index panel = next(done, 1);
      for (index piece = 0; piece < pieces; ++piece) {
        Turn turn{piece, pieces};
        const bool on = piece + 1 < pieces;
        turn.next_panel = on || done + 1 == count ? panel : next(done + 1, 1);
        turn.next_piece = on ? piece + 1 : 0;
        if (far && (on || done + 1 < count)) turn.asks = Turn::next;
        for_tiles<most, least>(rows.begin, rows.end, [&]<int tile>(index row) {
          f.template operator()<tile, 1>(row, panel, turn);
          if (++turn.part == W) turn.asks = Turn::nothing;
        });
      }
    }
    return;
  }
  // A single tile takes several panels at once, shared out evenly, so that none is left
  // alone. Of its panels a little more than the cache holds is still met there.
  const bool beyond = bytes > second_level_cache / 4 * 5;
  Turn turn;
  if (beyond) turn.asks = Turn::own;
  with_count<most>(height, [&]<int tile>() {
    constexpr int most_near = panels_at_once<V>(tile, W, false);
    const bool reading = tile == 1 ? bytes > near_cache : beyond;
    const index most_now = reading ? panels_at_once<V>(tile, W, true) : most_near;
    for (index done = 0; done < count;) {
      const index left = count - done, groups = (left + most_now - 1) / most_now;
      const index taken = (left + groups - 1) / groups;
      with_count<most_near>(taken, [&]<int together>() {
        f.template operator()<tile, together>(rows.begin, next(done, together), turn);
      });
      done += taken;
    }
  });
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
