// A layer backward, in stretches of steps from the last to the first. Within a stretch
// each step is a fused matmul Rᵀ·da + cell, mirrored from forward.h and shared out in the
// same way; then the stretch's da, still in cache, is multiplied into dW, dR, the biases
// and dx. So da never exists for the whole sequence.
//
// da lives in a ring of rows [slots][P], one step longer than a stretch because a step
// reads the da of the step after it.
//
// What a row's step before is owed waits in direct_ and dc_ until that step is taken, or
// until there is none and it is the gradient of h0 and c0.
#pragma once

#include "forward.h"

namespace fusedrnn::FUSEDRNN_ARCH {

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

template <template <class> class CellOf, class S>
class BackwardPass {
  using L = Layout<CellOf, S>;
  using V = typename L::V;
  using Cell = typename L::Cell;
  static constexpr int lanes = V::lanes;
  static constexpr int gates = L::gates, slots = L::slots;

  // The weight gradients' tile: rows are columns of da, packed; sums run over depth rows.
  static constexpr int grad_tile = L::back_tile;
  static constexpr index grad_tiles_at_once = 32;
  static constexpr index grad_depth = 256;
  static constexpr int few_rows = 4;

  const Backward<S>& p_;
  const L layout_;
  const index stretch_, ring_, record_, da_stride_;
  index* const schedules_;  // two per thread
  S* const da_;             // (ring, B, da_stride), each row (slots, P) and padding
  S* const dc_;             // (B, P)
  S* const direct_;         // (B, P) dh that reaches the step before past the matmul
  S* const c0_;             // (B, P)
  S* const dbias_;          // (slots, P)
  S* const zeros_;          // (P) of each thread
  S* const right_;          // panels of x and of h' for a block of depth
  S* const left_;           // per thread: columns of da for that depth; or sums that wait

 public:
  static index stretch(const Backward<S>& p, const L& layout) {
    constexpr index cache = 512 * 1024, enough_rows = 256;
    const index cached_rows = cache / (slots * layout.P * index{sizeof(S)});
    const index rows = cached_rows > enough_rows ? cached_rows : enough_rows;
    const index steps = rows / p.B > 1 ? rows / p.B : 1;
    return steps < p.T ? steps : p.T;
  }
  static constexpr index left_size = grad_depth * grad_tiles_at_once * grad_tile;
  static_assert(left_size >= (Blocking::most_rows + L::back_tile) * L::back_columns);
  static index right_width(index N) { return round_up(N, lanes); }
  static index depth_of(const Backward<S>& p, const L& layout) {
    const index rows = stretch(p, layout) * p.B;
    return rows < grad_depth ? rows : grad_depth;
  }
  static index workspace(const Backward<S>& p, int threads) {
    const L layout(p.I, p.H);
    const index rows = (stretch(p, layout) + 1) * p.B;
    const index right = right_width(p.I) + right_width(p.H);
    return Schedule::elements<S>(p, 2 * threads) + rows * layout.da_stride() +
           (3 * p.B + slots + threads) * layout.P + depth_of(p, layout) * right +
           threads * left_size;
  }

  BackwardPass(const Backward<S>& p, S* workspace, const Team& team)
      : p_(p),
        layout_(p.I, p.H),
        stretch_(stretch(p, layout_)),
        ring_(stretch_ + 1),
        record_(layout_.record()),
        da_stride_(layout_.da_stride()),
        schedules_(reinterpret_cast<index*>(workspace) +
                   2 * team.rank * Schedule::size(p)),
        da_(workspace + Schedule::elements<S>(p, 2 * team.count)),
        dc_(da_ + ring_ * p.B * da_stride_),
        direct_(dc_ + p.B * layout_.P),
        c0_(direct_ + p.B * layout_.P),
        dbias_(c0_ + p.B * layout_.P),
        zeros_(dbias_ + (slots + team.rank) * layout_.P),
        right_(dbias_ + (slots + team.count) * layout_.P),
        left_(right_ + depth_of(p, layout_) * (right_width(p.I) + right_width(p.H))) {}

  void run(const Team& team) const {
    const index panels = layout_.back_panels(p_.H);
    const Blocks<L> own(layout_, p_, panels, team, schedules_);
    const Schedule all(p_, Team::single(), schedules_ + Schedule::size(p_));
    start(own);
    for (index end = p_.T; end > 0; end -= stretch_) {
      const index begin = end > stretch_ ? end - stretch_ : 0;
      const index last = begin > 0 ? begin : -1;
      for (index s = end - 1; s >= last; --s) {
        take(own, s, team);
        if (!own.alone) team.meet();
      }
      if (own.alone) team.meet();
      add_weight_gradients(all, team, begin, end);
      write_dx(all, team, begin, end);
      if (own.alone) team.meet();
    }
  }

 private:
  S* left(const Team& team) const { return left_ + team.rank * left_size; }
  S* da(index s) const { return da_ + (s % ring_) * p_.B * da_stride_; }
  const S* saved(index s) const { return p_.saved + s * p_.B * record_; }
  const S* y(index s) const { return p_.y + p_.time(s) * p_.y_t; }
  StateBefore<S> h_before(index s) const {
    return {p_, s, zeros_, p_.h0, y(s > 0 ? s - 1 : 0), p_.H, p_.y_b};
  }

  Range units(const Blocks<L>& own) const {
    const index end = own.panels.end * L::back_columns;
    return {own.panels.begin * L::back_columns, end < p_.H ? end : p_.H};
  }

  // f.operator()<width, rows, columns>(row, first column, turn) for tiles of rows ×
  // columns (in vectors, `width` to a panel) over panels of N columns. A piece is a slot.
  template <class F>
  void for_columns(Range rows, Range panels, index N, bool backwards, const F& f) const {
    constexpr index large_panel = 160 * 1024;
    const index rest = N % L::back_columns;
    const bool narrow = rest > 0 && rest <= lanes && panels.end == layout_.back_panels(N);
    const Range full{panels.begin, narrow ? panels.end - 1 : panels.end};
    const index bytes = p_.weights ? layout_.back_panel_bytes() : 0;
    const Blocking blocking{layout_.back_depth() * index{sizeof(S)}, bytes,
                            bytes > large_panel ? gates : 1};
    for_blocks<V, L::back_width, L::back_tile>(
        rows, full, blocking, backwards,
        [&]<int height, int together>(index row, index panel, const Turn& turn) {
          constexpr int columns = together * L::back_width;
          f.template operator()<L::back_width, height, columns>(
              row, panel * L::back_columns, turn);
        });
    if (!narrow || panels.begin == panels.end) return;
    for_tiles<L::back_tile>(rows.begin, rows.end, [&]<int height>(index row) {
      f.template operator()<1, height, 1>(row, N - rest, Turn{});
    });
  }

  // dc and c0 into padded rows, the gradients of h_n where a row's last step looks for
  // dh. They are those of h0 and c0 for rows of length 0.
  void start(const Blocks<L>& own) const {
    const auto read = [](const S* from, index at, index left) {
      return from ? load_upto<V>(from + at, left) : V::broadcast(0);
    };
    const index working = own.rows.working();
    for (index j = 0; j < layout_.P && p_.resets; ++j) zeros_[j] = 0;
    for (index i = 0; i < own.rows.rows(); ++i) {
      const index b = own.rows.row(i);
      // Padding of da stays zero: a product runs over it, and there 0 · inf would be NaN.
      for (index n = 0; n < ring_ && units(own).end == p_.H && p_.H % lanes != 0; ++n) {
        for (int slot = 0; slot < slots; ++slot) {
          S* const row = da_ + (n * p_.B + b) * da_stride_;
          V::broadcast(0).store(row + (slot + 1) * layout_.P - lanes);
        }
      }
      for (index j = units(own).begin; j < units(own).end; j += lanes) {
        const index at = b * p_.H + j, to = b * layout_.P + j, left = p_.H - j;
        const V dh = read(p_.dh_n, at, left);
        dh.store(direct_ + to);
        if constexpr (Cell::has_c) {
          read(p_.dc_n, at, left).store(dc_ + to);
          read(p_.c0, at, left).store(c0_ + to);
        }
        if (i >= working) leave(b, j, dh);
      }
    }
  }

  // Where the rows of a step begin; at s = -1, which has none, those of step 0.
  struct Step {
    index s;
    const S *saved, *y, *dy;
    S *da, *da_after;
    StateBefore<S> h_before, c_before;
  };
  Step find(index s) const {
    const index now = s > 0 ? s : 0, before = s > 0 ? s - 1 : 0;
    return {
        s,
        Cell::saves ? saved(now) : nullptr,
        y(now),
        p_.dy ? p_.dy + p_.time(now) * p_.dy_t : nullptr,
        da(now),
        da(s + 1),
        h_before(now),
        {p_, now, zeros_, c0_, Cell::has_c ? saved(before) + slots * layout_.P : nullptr,
         layout_.P, record_}};
  }

  // What the cell reads and writes of the rows of a tile.
  template <int rows>
  struct CellRows {
    const S *saved[rows], *h[rows], *h_prev[rows], *c_prev[rows], *dy[rows];
    S *da[rows], *dc[rows], *direct[rows];
  };
  template <int rows>
  CellRows<rows> find(const Step& step, const TileRows<rows>& tile) const {
    CellRows<rows> of;
    if constexpr (Cell::saves) {
      tile.find(step.saved, record_, of.saved);
    } else {
      tile.find(step.y, p_.y_b, of.h);
    }
    if constexpr (Cell::has_direct) step.h_before.find(tile, of.h_prev);
    if constexpr (Cell::has_c) step.c_before.find(tile, of.c_prev);
    if constexpr (Cell::has_c) tile.find(dc_, layout_.P, of.dc);
    if (step.dy) tile.find(step.dy, p_.dy_b, of.dy);
    tile.find(step.da, da_stride_, of.da);
    tile.find(direct_, layout_.P, of.direct);
    return of;
  }

  // dh[rows][columns] of a tile's rows: Rᵀ da of the step after, unless there is none or
  // it is a row's reset, + dy, for the first `taken` that take this step, + what reaches
  // h past the matmul. Returns whether dh is complete.
  template <int width, int rows, int columns>
  bool sum_dh(V (&dh)[rows][columns], const Step& step, const TileRows<rows>& tile,
              const CellRows<rows>& of, bool is_last, index taken, index row,
              index column, const Turn& turn, const Team& team) const {
    if (!is_last) {
      Rows<S, rows> da;
      tile.template find<const S*>(step.da_after, da_stride_, da.p);
      const S* const R =
          p_.weights ? p_.weights + layout_.back_recurrent_panels() : nullptr;
      if (!multiply_transposed<width, &L::Cell::recurrent_gate>(
              dh, da, R, p_.weight_hh, p_.H, row, column, turn, left(team))) {
        return false;
      }
      for (int r = 0; r < rows && p_.resets; ++r) {
        if (!p_.is_reset(step.s + 1, tile.b[r])) continue;
        for (V& sum : dh[r]) sum = V::broadcast(0);
      }
    } else if (turn.is_last()) {
      multiply<1>(dh, Zero{});
    } else {
      return false;
    }
    const bool direct = Cell::has_direct || is_last;
    for (int n = 0; n < columns; ++n) {
      const index unit = column + n * lanes, left = p_.H - unit;
      if (unit >= layout_.P) break;
      for (int r = 0; r < rows; ++r) {
        if (step.dy && r < taken) {
          dh[r][n] = dh[r][n] + load_upto<V>(of.dy[r] + unit, left);
        }
        if (direct) dh[r][n] = dh[r][n] + V::load(of.direct[r] + unit);
      }
    }
    return true;
  }

  // acc = da · weight for some columns, from packed panels or, where there are none, from
  // weight (gates·H, N) itself; the terms come in the same order. Returns whether the
  // sums are complete; until the last piece they wait in `partial`.
  template <int width, auto blocks, int rows, int columns>
  bool multiply_transposed(V (&acc)[rows][columns], const Rows<S, rows>& da,
                           const S* panels, const S* weight, index N, index row,
                           index column, const Turn& turn, S* partial) const {
    if (!panels) {
      multiply<1>(acc, Zero{});
      for (int slot = 0; slot < gates; ++slot) {
        const Rows<S, rows> of_slot = da.from(slot * layout_.P);
        const Columns<V, width> right{weight + (*blocks)[slot] * p_.H * N, N, column};
        multiply<columns / width>(
            acc, Sums<V, rows, columns>{acc},
            Product<Rows<S, rows>, Columns<V, width>>{of_slot, right, p_.H});
      }
      return true;
    }
    const index depth = layout_.back_depth();
    const auto add = [&](const Rows<S, rows>& of, index K, const auto& start) {
      with_panels<V, width, columns / width>(turn, [&]<class Right>() {
        const Right right(panels, column / (width * lanes), depth, turn);
        multiply<columns / width>(acc, start,
                                  Product<Rows<S, rows>, Right>{of, right, K});
      });
    };
    if constexpr (columns == L::back_width && width == L::back_width) {
      if (turn.pieces > 1) {
        const Waiting<V, L::back_width> sums{partial +
                                             row % Blocking::most_rows * L::back_columns};
        const Range piece = turn.depth(depth);
        const Rows<S, rows> of = da.from(piece.begin);
        if (turn.is_first()) {
          add(of, piece.end - piece.begin, Zero{});
        } else {
          add(of, piece.end - piece.begin, sums);
        }
        if (!turn.is_last()) sums.keep(acc);
        return turn.is_last();
      }
    }
    add(da, depth, Zero{});
    return true;
  }

  // Prefetches what the cell will read of a row: while the matmul runs it comes from
  // afar, in pieces too short for the machine to foresee.
  template <int rows>
  void ask_for(const CellRows<rows>& of, int r, index column, int columns) const {
    const auto ask = [&](const S* p) {
      for (int n = 0; n < columns; ++n) __builtin_prefetch(p + column + n * lanes);
    };
    for (int slot = 0; slot < slots + Cell::has_c && Cell::saves; ++slot) {
      ask(of.saved[r] + slot * layout_.P);
    }
    if (Cell::has_c) ask(of.c_prev[r]);
    if (Cell::has_direct) ask(of.h_prev[r]);
    if (!Cell::saves) ask(of.h[r]);
    if (p_.dy) ask(of.dy[r]);
  }

  // dh and dc through the cell of rows that take step s; of those that took the step
  // after it as their first, they are the gradients of h0 and c0.
  void take(const Blocks<L>& own, index s, const Team& team) const {
    const bool backwards = (team.step + s) % 2 != 0;
    const Step step = find(s);
    const index taken = own.rows.count(s), later = own.rows.count(s + 1);
    for (const bool is_last : {false, true}) {
      const Range places =
          is_last ? Range{later, taken > later ? taken : later} : Range{0, later};
      for_columns(places, own.panels, p_.H, backwards,
                  [&]<int width, int rows, int columns>(index row, index column,
                                                        const Turn& turn) {
                    const auto tile = own.rows.template tile<rows>(row);
                    const CellRows<rows> of = find(step, tile);
                    const index here = taken - row;
                    for (int r = 0; r < rows && r < here && turn.is_last(); ++r) {
                      ask_for(of, r, column, columns);
                    }
                    V dh[rows][columns];
                    if (!sum_dh<width>(dh, step, tile, of, is_last, here, row, column,
                                       turn, team)) {
                      return;
                    }
                    for (int n = 0; n < columns; ++n) {
                      const index unit = column + n * lanes;
                      if (unit >= layout_.P) break;
                      for (int r = 0; r < rows; ++r) {
                        if (r < here) {
                          apply_cell(of, r, unit, dh[r][n], p_.is_reset(s, tile.b[r]));
                        } else {
                          leave(tile.b[r], unit, dh[r][n]);
                        }
                      }
                    }
                  });
    }
  }

  // From dh to da for a vector of units, and what the step before is owed.
  template <int rows>
  void apply_cell(const CellRows<rows>& of, int r, index unit, V dh,
                  bool is_reset) const {
    const index left = p_.H - unit;
    V v[slots];
    State<V> prev{}, now{};
    V dc = V::broadcast(0);
    if constexpr (Cell::saves) {
      for (int slot = 0; slot < slots; ++slot) {
        v[slot] = V::load(of.saved[r] + slot * layout_.P + unit);
      }
    } else {
      now.h = load_upto<V>(of.h[r] + unit, left);
    }
    if constexpr (Cell::has_direct) prev.h = load_upto<V>(of.h_prev[r] + unit, left);
    if constexpr (Cell::has_c) {
      prev.c = V::load(of.c_prev[r] + unit);
      now.c = V::load(of.saved[r] + slots * layout_.P + unit);
      dc = V::load(of.dc[r] + unit);
    }
    State<V> d = Cell::backward(v, prev, now, dh, dc);
    for (int slot = 0; slot < slots; ++slot) {
      store_upto(v[slot], of.da[r] + slot * layout_.P + unit, left);
    }
    if (is_reset) d = {V::broadcast(0), V::broadcast(0)};
    if constexpr (Cell::has_direct) d.h.store(of.direct[r] + unit);
    if constexpr (Cell::has_c) d.c.store(of.dc[r] + unit);
  }

  // The gradients of row b's h0 and c0.
  void leave(index b, index unit, V dh) const {
    const index to = b * p_.H + unit, left = p_.H - unit;
    store_upto(dh, p_.dh0 + to, left);
    if constexpr (Cell::has_c) {
      store_upto(V::load(dc_ + b * layout_.P + unit), p_.dc0 + to, left);
    }
  }

  // dx = Wᵀ da, rows of the stretch shared out.
  void write_dx(const Schedule& all, const Team& team, index begin, index end) const {
    for (index s = begin; s < end; ++s) {
      for (index i = all.count(s) + team.rank; i < all.rows(); i += team.count) {
        S* const dx = p_.dx + p_.time(s) * p_.dx_t + all.row(i) * p_.dx_b;
        for (index n = 0; n < p_.I; ++n) dx[n] = 0;
      }
    }
    const Range own = team.share(all.count(begin, end), L::back_tile);
    for_columns(
        own, {0, layout_.back_panels(p_.I)}, p_.I, false,
        [&]<int width, int rows, int columns>(index row, index column, const Turn& turn) {
          Rows<S, rows> a;
          S* to[rows];
          Schedule::Entry next = all.entry(begin, row);
          for (int r = 0; r < rows; ++r, all.advance(next)) {
            const index b = all.row(next.place);
            a.p[r] = da(next.s) + b * da_stride_ + L::first_input * layout_.P;
            to[r] = p_.dx + p_.time(next.s) * p_.dx_t + b * p_.dx_b;
          }
          V dx[rows][columns];
          if (!multiply_transposed<width, &L::Cell::input_gate>(
                  dx, a, p_.weights, p_.weight_ih, p_.I, row, column, turn, left(team))) {
            return;
          }
          for (int n = 0; n < columns; ++n) {
            const index at = column + n * lanes;
            if (at >= p_.I) break;
            for (int r = 0; r < rows; ++r) {
              store_upto(dx[r][n], to[r] + at, p_.I - at);
            }
          }
        });
  }

  // dW += daᵀ x, dR += daᵀ h', db += Σ da over the stretch; columns of da shared out.
  // Sums run over the rows of a depth block in order and then over the blocks.
  void add_weight_gradients(const Schedule& all, const Team& team, index begin,
                            index end) const {
    const Range own = team.share(slots * layout_.P, grad_tile);
    const index rows = all.count(begin, end);
    for (index done = 0; done < rows; done += grad_depth) {
      const index depth = rows - done < grad_depth ? rows - done : grad_depth;
      const S *da_row[grad_depth], *x_row[grad_depth], *h_row[grad_depth];
      Schedule::Entry next = all.entry(begin, done);
      for (index k = 0; k < depth; ++k, all.advance(next)) {
        const index b = all.row(next.place);
        da_row[k] = da(next.s) + b * da_stride_;
        x_row[k] = p_.x + p_.time(next.s) * p_.x_t + b * p_.x_b;
        h_row[k] = h_before(next.s)(b);
      }
      const bool first = end == p_.T && done == 0;
      if (depth <= few_rows) {
        with_count<few_rows>(depth, [&]<int count>() {
          add_outer_products<count>(da_row, x_row, h_row, own, first);
        });
        add_bias_gradients(da_row, depth, own, first);
        continue;
      }
      S* const x_panels = right_;
      S* const h_panels = right_ + depth * right_width(p_.I);
      if (done > 0) team.meet();  // the panels are still being read
      pack_right(team, x_row, depth, p_.I, x_panels);
      pack_right(team, h_row, depth, p_.H, h_panels);
      team.meet();

      S* const left_columns = left(team);
      constexpr index at_once = grad_tiles_at_once * grad_tile;
      for (index column = own.begin; column < own.end; column += at_once) {
        const Range block{column,
                          column + at_once < own.end ? column + at_once : own.end};
        pack_left(da_row, depth, block, left_columns);
        add_products<&L::Cell::input_gate>(left_columns, depth, block, L::first_input,
                                           x_panels, p_.I, p_.dweight_ih, first);
        add_products<&L::Cell::recurrent_gate>(left_columns, depth, block, 0, h_panels,
                                               p_.H, p_.dweight_hh, first);
      }
      add_bias_gradients(da_row, depth, own, first);
    }
    if (begin == 0) write_bias_gradients(own);
  }

  // The same from few rows, for which packing takes longer than the sums.
  template <int depth>
  void add_outer_products(const S* const* da_row, const S* const* x_row,
                          const S* const* h_row, Range own, bool first) const {
    const auto add = [&](index column, int block, const S* const* right, index N,
                         S* dweight) {
      if (block < 0) return;
      S* const to = dweight + (block * p_.H + column % layout_.P) * N;
      V factor[depth];
      for (int k = 0; k < depth; ++k) factor[k] = V::broadcast(da_row[k][column]);
      for (index n = 0; n < N; n += lanes) {
        V sum = V::broadcast(0);
        for (int k = 0; k < depth; ++k) {
          sum = fma(factor[k], load_upto<V>(right[k] + n, N - n), sum);
        }
        store_upto(first ? sum : load_upto<V>(to + n, N - n) + sum, to + n, N - n);
      }
    };
    for (index column = own.begin; column < own.end; ++column) {
      if (column % layout_.P >= p_.H) continue;
      const index slot = column / layout_.P;
      add(column, L::blocks.input[slot], x_row, p_.I, p_.dweight_ih);
      add(column, L::blocks.recurrent[slot], h_row, p_.H, p_.dweight_hh);
    }
  }

  // Panels of two vectors, the last of one if that is enough: [panel][k][width][lanes].
  // A thread packs some of the rows.
  static void pack_right(const Team& team, const S* const* from, index depth, index N,
                         S* to) {
    const Range own = team.share(depth);
    for (index n = 0; n < N; n += L::back_columns) {
      const int width = N - n > lanes ? L::back_width : 1;
      S* at = to + n * depth + own.begin * width * lanes;
      for (index k = own.begin; k < own.end; ++k) {
        for (int w = 0; w < width; ++w, at += lanes) {
          load_upto<V>(from[k] + n + w * lanes, N - n - w * lanes).store(at);
        }
      }
    }
  }

  // Tiles of columns: [tile][k][grad_tile].
  static void pack_left(const S* const* from, index depth, Range block, S* to) {
    for (index column = block.begin; column < block.end; column += grad_tile) {
      const index left = block.end - column;
      for (index k = 0; k < depth; ++k, to += grad_tile) {
        if (left >= grad_tile) {
          __builtin_memcpy(to, from[k] + column, grad_tile * sizeof(S));
        } else {
          for (int r = 0; r < grad_tile; ++r) to[r] = r < left ? from[k][column + r] : 0;
        }
      }
    }
  }

  // dweight (gates·H, N) += leftᵀ · right for the columns of da in `block` that belong to
  // slots from first_slot on, whose blocks of rows of dweight blocks[] gives.
  template <auto blocks>
  void add_products(const S* left, index depth, Range block, int first_slot,
                    const S* right, index N, S* dweight, bool first) const {
    const index slots_begin = first_slot * layout_.P;
    const index slots_end = slots_begin + gates * layout_.P;
    if (block.end <= slots_begin || block.begin >= slots_end) return;
    S* rows[grad_tiles_at_once][grad_tile];  // null for padding and other slots
    for (int r = 0; r < grad_tiles_at_once * grad_tile; ++r) {
      const index column = block.begin + r, at = column - slots_begin;
      const bool real = column < block.end && at >= 0 && column < slots_end;
      const index unit = real ? at % layout_.P : p_.H;
      rows[r / grad_tile][r % grad_tile] =
          unit < p_.H ? dweight + ((*blocks)[at / layout_.P] * p_.H + unit) * N : nullptr;
    }
    for (index n = 0; n < N; n += L::back_columns) {
      const S* const panel = right + n * depth;
      for (index tile = 0; tile * grad_tile < block.end - block.begin; ++tile) {
        bool any = false;
        for (const S* row : rows[tile]) any |= row != nullptr;
        if (!any) continue;
        const PackedRows<S, grad_tile> columns{left + tile * grad_tile * depth};
        if (N - n > lanes) {
          add_tile<L::back_width>(columns, panel, depth, rows[tile], n, N, first);
        } else {
          add_tile<1>(columns, panel, depth, rows[tile], n, N, first);
        }
      }
    }
  }

  template <int width>
  static void add_tile(const PackedRows<S, grad_tile>& left, const S* right, index depth,
                       S* const (&to)[grad_tile], index n, index N, bool first) {
    if (!first) {
      for (S* const row : to) {
        for (int w = 0; w < width && row; ++w) __builtin_prefetch(row + n + w * lanes, 1);
      }
    }
    V sum[grad_tile][width];
    multiply<1>(sum, Zero{},
                Product<PackedRows<S, grad_tile>, Panels<V, width>>{
                    left, {right, 0, depth}, depth});
    for (int r = 0; r < grad_tile; ++r) {
      if (!to[r]) continue;
      for (int w = 0; w < width; ++w) {
        const index column = n + w * lanes, rest = N - column;
        S* const at = to[r] + column;
        store_upto(first ? sum[r][w] : load_upto<V>(at, rest) + sum[r][w], at, rest);
      }
    }
  }

  void add_bias_gradients(const S* const* da_row, index depth, Range own,
                          bool first) const {
    // Eight sums side by side hide the latency of an addition.
    constexpr int at_once = 8;
    for (index column = own.begin; column < own.end; column += at_once * lanes) {
      with_count<at_once>((own.end - column + lanes - 1) / lanes, [&]<int vectors>() {
        V sum[vectors] = {};
        for (index k = 0; k < depth; ++k) {
          for (int v = 0; v < vectors; ++v) {
            const index at = column + v * lanes;
            sum[v] = sum[v] + load_upto<V>(da_row[k] + at, own.end - at);
          }
        }
        for (int v = 0; v < vectors; ++v) {
          const index at = column + v * lanes, left = own.end - at;
          S* const to = dbias_ + at;
          store_upto(first ? sum[v] : load_upto<V>(to, left) + sum[v], to, left);
        }
      });
    }
  }

  void write_bias_gradients(Range own) const {
    for (index column = own.begin; column < own.end; ++column) {
      const int slot = static_cast<int>(column / layout_.P);
      const index unit = column % layout_.P;
      if (unit >= p_.H) continue;
      const int input = L::blocks.input[slot], recurrent = L::blocks.recurrent[slot];
      if (input >= 0) p_.dbias_ih[input * p_.H + unit] = dbias_[column];
      if (recurrent >= 0) p_.dbias_hh[recurrent * p_.H + unit] = dbias_[column];
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
