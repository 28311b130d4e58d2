// A layer backward, in stretches of steps from the last to the first. Within a stretch
// each step is a fused matmul Rᵀ·da + cell, mirrored from forward.h and shared out in the
// same way; then the stretch's da, still in cache, is multiplied into dW, dR, the biases
// and dx. So da never exists for the whole sequence.
//
// da lives in a ring of rows of gradients (../rows.h), one step longer than a stretch
// because a step reads the da of the step after it.
//
// What a row's step before is owed waits in `direct` and `dc` until that step is taken,
// or until there is none and it is the gradient of h0 and c0.
#pragma once

#include "forward.h"

namespace fusedrnn::FUSEDRNN_ARCH {

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

  using Rows = RowWise<Cell, Walk<S, Cell::has_c>>;
  using Again = ForwardPass<CellOf, S>;

  // Scratch memory, of a thread and of all.
  struct Room : Carver<S> {
    index *own_schedule, *schedule;
    S* rows;    // of this thread
    S* zeros;   // (P) of this thread
    S* left;    // of this thread: columns of da for a block of depth; or sums that wait
    S* da;      // (ring, B) rows of gradients (rows.h)
    S* dc;      // (B, P)
    S* direct;  // (B, P) dh that reaches the step before past the matmul
    S* c0;      // (B, P)
    S* dbias;   // (slots, P)
    S* right;   // panels of x, of h' and of a second product's for a block of depth
    // Row by row
    S* mask;     // (B, P) of the h' that R sees
    S* seen;     // (stretch, B, P) h' as R sees it
    S* dh;       // (B, P)
    S* dm;       // (B, P) what a second product is of, or comes to
    S* sums;     // (vectors, P) gradients of the vectors
    S* records;  // (stretch + 1, B) computed again
    S* again;    // workspace of that

    Room(const Backward<S>& p, S* memory, int rank, int threads) : Carver<S>(memory) {
      const L layout(p.model);
      const index rows_of_P = p.B * layout.P, steps = stretch(p, layout);
      const index of_schedule = Schedule::elements<S>(p, 1);
      own_schedule =
          reinterpret_cast<index*>(this->of_thread(of_schedule, rank, threads));
      schedule = reinterpret_cast<index*>(this->of_thread(of_schedule, rank, threads));
      rows = this->of_thread(p.row_wise ? Rows::Walked::memory(layout.P, slots) : 0, rank,
                             threads);
      zeros = this->of_thread(layout.P, rank, threads);
      left = this->of_thread(left_size, rank, threads);
      da = this->take((steps + 1) * p.B * row_stride<S>(row(p, layout).values));
      dc = this->take(rows_of_P);
      direct = this->take(rows_of_P);
      c0 = this->take(rows_of_P);
      dbias = this->take(slots * layout.P);
      const index second = Second<L>(p.model).exists ? right_width(p.H) : 0;
      right = this->take(depth_of(p, layout) *
                         (right_width(p.I) + right_width(p.R) + second));
      mask = this->take(drops(p.options) ? rows_of_P : 0);
      seen = this->take(drops(p.options) ? steps * rows_of_P : 0);
      dh = this->take(p.row_wise ? rows_of_P : 0);
      dm = this->take(second ? rows_of_P : 0);
      sums = this->take(p.row_wise ? vectors * layout.P : 0);
      const bool is_again = computes_again(p);
      S none;  // it is only asked whether there is one
      const index record = record_stride<L>(p.model);
      records = this->take(is_again ? (steps + 1) * p.B * record : 0);
      again = this->take(is_again ? Again::workspace(forward_of(p, &none), threads) : 0);
    }
  };

  const Backward<S>& p_;
  const L layout_;
  const Record<Cell> record_at_;
  const GradientRow<Cell> row_;
  const index stretch_, ring_, record_, da_stride_;
  const Room room_;
  const Rows rows_;

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
    return Room(p, nullptr, 0, threads).used();
  }

  BackwardPass(const Backward<S>& p, S* workspace, const Team& team)
      : p_(p),
        layout_(p.model),
        record_at_{p.model.norm, layout_.P},
        row_(row(p, layout_)),
        stretch_(stretch(p, layout_)),
        ring_(stretch_ + 1),
        record_(record_stride<L>(p.model)),
        da_stride_(row_stride<S>(row_.values)),
        room_(p, workspace, team.rank, team.count),
        rows_(p, layout_.P, p.forward_weights, {room_.rows, layout_.P}) {}

  void run(const Team& team) const {
    const index panels = layout_.back_panels(p_.R);
    const Blocks<L> own(layout_, p_, panels, team, room_.own_schedule);
    const Schedule all(p_, Team::single(), room_.schedule);
    start(own);
    if (p_.row_wise) start_rows(own, team);
    for (index end = p_.T; end > 0; end -= stretch_) {
      const index begin = end > stretch_ ? end - stretch_ : 0;
      const index last = begin > 0 ? begin : -1;
      if (p_.row_wise) prepare(all, team, begin, end);
      for (index s = end - 1; s >= last; --s) {
        take(own, s, team);
        if (p_.row_wise) take_rows(own, team, s);
        if (!own.alone) team.meet();
      }
      if (own.alone) team.meet();
      add_weight_gradients(all, team, begin, end);
      if (p_.row_wise) add_vector_gradients(all, team, begin, end);
      write_dx(all, team, begin, end);
      if (own.alone || p_.row_wise) team.meet();
    }
  }

 private:
  S* da(index s) const { return room_.da + (s % ring_) * p_.B * da_stride_; }
  const S* saved(index s) const {
    return p_.saved ? p_.saved + s * p_.B * record_
                    : room_.records + s % ring_ * p_.B * record_;
  }
  const S* y(index s) const { return p_.y + p_.time(s) * p_.y_t; }
  StateBefore<S> cell_before(index s) const {
    const S* const left =
        Cell::has_c ? saved(s > 0 ? s - 1 : 0) + record_at_.cell() : nullptr;
    return {p_, s, room_.zeros, room_.c0, left, layout_.P, record_};
  }
  StateBefore<S> h_before(index s) const {
    return {p_, s, room_.zeros, p_.h0, y(s > 0 ? s - 1 : 0), p_.R, p_.y_b};
  }

  // Those of h that a thread owns.
  Range units(const Blocks<L>& own) const {
    const index end = own.panels.end * L::back_columns;
    return {own.panels.begin * L::back_columns, end < p_.R ? end : p_.R};
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
    const index working = own.rows.working();
    for (index j = 0; j < layout_.P && (p_.resets || p_.row_wise); ++j)
      room_.zeros[j] = 0;
    for (index i = 0; i < own.rows.rows(); ++i) {
      const index b = own.rows.row(i);
      // Padding of da stays zero: a product runs over it, and there 0 · inf would be NaN.
      for (index n = 0; n < ring_ && units(own).end == p_.R && p_.H % lanes != 0; ++n) {
        if (p_.row_wise) break;
        for (int slot = 0; slot < slots; ++slot) {
          S* const row = room_.da + (n * p_.B + b) * da_stride_;
          V::broadcast(0).store(row + (slot + 1) * layout_.P - lanes);
        }
      }
      for (index j = units(own).begin; j < units(own).end; j += lanes) {
        const V dh = read(p_.dh_n, b * p_.R + j, p_.R - j);
        dh.store(room_.direct + b * layout_.P + j);
        if (!p_.row_wise) start_cell(b, j);
        if (i >= working) leave(b, j, dh);
      }
    }
  }
  static V read(const S* from, index at, index left) {
    return from ? load_upto<V>(from + at, left) : V::broadcast(0);
  }
  void start_cell(index b, index j) const {
    if constexpr (Cell::has_c) {
      const index at = b * p_.H + j, to = b * layout_.P + j, left = p_.H - j;
      read(p_.dc_n, at, left).store(room_.dc + to);
      read(p_.c0, at, left).store(room_.c0 + to);
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
    const index now = s > 0 ? s : 0;
    return {s,
            Cell::saves ? saved(now) : nullptr,
            y(now),
            p_.dy ? p_.dy + p_.time(now) * p_.dy_t : nullptr,
            da(now),
            da(s + 1),
            h_before(now),
            cell_before(now)};
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
    if constexpr (Cell::has_c) tile.find(room_.dc, layout_.P, of.dc);
    if (step.dy) tile.find(step.dy, p_.dy_b, of.dy);
    tile.find(step.da, da_stride_, of.da);
    tile.find(room_.direct, layout_.P, of.direct);
    return of;
  }

  // dh[rows][columns] of a tile's rows: Rᵀ da of the step after, unless there is none or
  // it is a row's reset, + dy, for the first `taken` that take this step, + what reaches
  // h past the matmul. Returns whether dh is complete.
  template <int width, int rows, int columns>
  bool sum_dh(V (&dh)[rows][columns], const Step& step, const TileRows<rows>& tile,
              const CellRows<rows>& of, bool is_last, index taken, index row,
              index column, const Turn& turn) const {
    if (!is_last) {
      RowsAt<S, rows> da;
      tile.template find<const S*>(step.da_after + row_.recurrent, da_stride_, da.p);
      if (!recurrent().template multiply<width>(dh, da, row, column, turn,
                                                resets_before<Cell>(p_.model))) {
        return false;
      }
      for (int r = 0; r < rows && drops(p_.options); ++r) {
        for (int n = 0; n < columns && column + n * lanes < layout_.P; ++n) {
          dh[r][n] =
              dh[r][n] * V::load(room_.mask + tile.b[r] * layout_.P + column + n * lanes);
        }
      }
      for (int r = 0; r < rows && (p_.resets || p_.options.bptt); ++r) {
        if (!p_.is_cut(step.s + 1, tile.b[r], p_.options.bptt)) continue;
        for (V& sum : dh[r]) sum = V::broadcast(0);
      }
    } else if (turn.is_last()) {
      multiply<1>(dh, Zero{});
    } else {
      return false;
    }
    const bool direct = Cell::has_direct || is_last || p_.row_wise;
    for (int n = 0; n < columns; ++n) {
      const index unit = column + n * lanes, left = p_.R - unit;
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

  TransposedWeight<V> recurrent() const {
    const S* const panels =
        p_.weights ? p_.weights + layout_.back_recurrent_panels() : nullptr;
    return {panels, p_.weight_hh, L::Cell::recurrent_gate, p_.R, p_.H, layout_.P,
            gates,  room_.left};
  }
  TransposedWeight<V> input() const {
    return {p_.weights, p_.weight_ih, L::Cell::input_gate, p_.I, p_.H,
            layout_.P,  gates,        room_.left};
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
      for_columns(
          places, own.panels, p_.R, backwards,
          [&]<int width, int rows, int columns>(index row, index column,
                                                const Turn& turn) {
            const auto tile = own.rows.template tile<rows>(row);
            const CellRows<rows> of = find(step, tile);
            const index here = taken - row;
            for (int r = 0; r < rows && r < here && turn.is_last(); ++r) {
              ask_for(of, r, column, columns);
            }
            V dh[rows][columns];
            if (!sum_dh<width>(dh, step, tile, of, is_last, here, row, column, turn)) {
              return;
            }
            for (int n = 0; n < columns; ++n) {
              const index unit = column + n * lanes;
              if (unit >= layout_.P) break;
              for (int r = 0; r < rows; ++r) {
                if (r < here && p_.row_wise) {
                  dh[r][n].store(room_.dh + tile.b[r] * layout_.P + unit);
                } else if (r < here) {
                  apply_cell(of, r, unit, dh[r][n],
                             p_.is_cut(s, tile.b[r], p_.options.bptt));
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
  void apply_cell(const CellRows<rows>& of, int r, index unit, V dh, bool is_cut) const {
    const index left = p_.H - unit;
    V v[slots];
    State<V> prev{};
    V c{}, dc = V::broadcast(0);
    if constexpr (Cell::saves) {
      for (int slot = 0; slot < slots; ++slot) {
        v[slot] = V::load(of.saved[r] + slot * layout_.P + unit);
      }
    } else {
      v[0] = load_upto<V>(of.h[r] + unit, left);
    }
    if constexpr (Cell::has_direct) prev.h = load_upto<V>(of.h_prev[r] + unit, left);
    if constexpr (Cell::has_c) {
      prev.c = V::load(of.c_prev[r] + unit);
      c = V::load(of.saved[r] + slots * layout_.P + unit);
      dc = V::load(of.dc[r] + unit);
    }
    State<V> d = Cell::backward(v, prev, c, dh, dc, Plain<V>{p_.model.variant});
    for (int slot = 0; slot < slots; ++slot) {
      store_upto(v[slot], of.da[r] + slot * layout_.P + unit, left);
    }
    if (is_cut) d = {V::broadcast(0), V::broadcast(0)};
    if constexpr (Cell::has_direct) d.h.store(of.direct[r] + unit);
    if constexpr (Cell::has_c) d.c.store(of.dc[r] + unit);
  }

  // The gradients of row b's h0 and c0.
  void leave(index b, index unit, V dh) const {
    store_upto(dh, p_.dh0 + b * p_.R + unit, p_.R - unit);
    if (!p_.row_wise) leave_cell(b, unit);
  }
  void leave_cell(index b, index unit) const {
    if constexpr (Cell::has_c) {
      store_upto(V::load(room_.dc + b * layout_.P + unit), p_.dc0 + b * p_.H + unit,
                 p_.H - unit);
    }
  }

  // dx = Wᵀ da, rows of the stretch shared out.
  void write_dx(const Schedule& all, const Team& team, index begin, index end) const {
    if (!p_.dx) return;
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
          RowsAt<S, rows> a;
          S* to[rows];
          Schedule::Entry next = all.entry(begin, row);
          for (int r = 0; r < rows; ++r, all.advance(next)) {
            const index b = all.row(next.place);
            a.p[r] = da(next.s) + b * da_stride_ + row_.input;
            to[r] = p_.dx + p_.time(next.s) * p_.dx_t + b * p_.dx_b;
          }
          V dx[rows][columns];
          if (!input().template multiply<width>(dx, a, row, column, turn)) return;
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
    if (!p_.dweight_ih && !p_.dweight_hh && !p_.dweight_hr && !wants_biases()) return;
    const Range of_da = team.share(slots * layout_.P, grad_tile);
    const index rows = all.count(begin, end);
    for (index done = 0; done < rows; done += grad_depth) {
      const index depth = rows - done < grad_depth ? rows - done : grad_depth;
      const S *da_row[grad_depth], *x_row[grad_depth], *h_row[grad_depth];
      Schedule::Entry next = all.entry(begin, done);
      for (index k = 0; k < depth; ++k, all.advance(next)) {
        const index b = all.row(next.place);
        da_row[k] = da(next.s) + b * da_stride_;
        x_row[k] = p_.x + p_.time(next.s) * p_.x_t + b * p_.x_b;
        h_row[k] = seen_before(next.s, b);
      }
      const bool first = end == p_.T && done == 0;
      if (depth <= few_rows && !p_.row_wise) {
        with_count<few_rows>(depth, [&]<int count>() {
          add_outer_products<count>(da_row, x_row, h_row, of_da, first);
        });
        add_bias_gradients(da_row, depth, of_da, first);
        continue;
      }
      S* const x_panels = room_.right;
      S* const h_panels = x_panels + depth * right_width(p_.I);
      S* const second_panels = h_panels + depth * right_width(p_.R);
      if (done > 0) team.meet();  // the panels are still being read
      if (p_.dweight_ih) pack_right(team, x_row, depth, p_.I, x_panels);
      if (p_.dweight_hh) pack_right(team, h_row, depth, p_.R, h_panels);
      const bool twice = resets_before<Cell>(p_.model);
      if (twice || p_.model.projects) {
        const S* second_row[grad_depth];
        const index at = twice ? row_.reset : row_.m;
        for (index k = 0; k < depth; ++k) second_row[k] = da_row[k] + at;
        pack_right(team, second_row, depth, p_.H, second_panels);
      }
      team.meet();

      const int* const input = L::Cell::input_gate;
      const int* const recurrent = L::Cell::recurrent_gate;
      const auto add = [&]<int count>(Range columns, const Target(&targets)[count]) {
        constexpr index at_once = grad_tiles_at_once * grad_tile;
        for (index column = columns.begin; column < columns.end; column += at_once) {
          const Range block{
              column, column + at_once < columns.end ? column + at_once : columns.end};
          pack_left(da_row, depth, block, room_.left);
          for (const Target& to : targets) add_products(depth, block, to, first);
        }
      };
      const Target of_W{row_.input, gates, input, p_.H, x_panels, p_.I, p_.dweight_ih};
      Target of_R{row_.recurrent, gates, recurrent, p_.H, h_panels, p_.R, p_.dweight_hh};
      Range own = of_da;
      if (p_.model.norm) {
        own = team.share(2 * gates * layout_.P, grad_tile);
        own = {row_.input + own.begin, row_.input + own.end};
      }
      if (twice) {
        const Target of_new{row_.recurrent, 1,    recurrent,    p_.H,
                            second_panels,  p_.H, p_.dweight_hh};
        of_R.begin += layout_.P;
        of_R.order += 1;
        of_R.blocks -= 1;
        add(own, {of_W, of_R, of_new});
      } else {
        add(own, {of_W, of_R});
      }
      if (p_.model.projects && p_.dweight_hr) {
        constexpr int only[] = {0};
        const Range of_dh = team.share(round_up(p_.R, lanes), grad_tile);
        add({row_.dh + of_dh.begin, row_.dh + of_dh.end},
            {{row_.dh, 1, only, p_.R, second_panels, p_.H, p_.dweight_hr}});
      }
      add_bias_gradients(da_row, depth, of_da, first);
    }
    if (begin == 0) write_bias_gradients(of_da);
  }

  // The same from few rows, for which packing takes longer than the sums.
  template <int depth>
  void add_outer_products(const S* const* da_row, const S* const* x_row,
                          const S* const* h_row, Range own, bool first) const {
    const auto add = [&](index column, int block, const S* const* right, index N,
                         S* dweight) {
      if (block < 0 || !dweight) return;
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
      add(column, L::blocks.recurrent[slot], h_row, p_.R, p_.dweight_hh);
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

  // A matrix whose gradient is a product: its blocks of `units` rows belong to columns
  // from `begin` on, in this order, each block's from P to P.
  struct Target {
    index begin;
    int blocks;
    const int* order;
    index units;
    const S* right;
    index N;
    S* dweight;  // (blocks·units, N), or null
  };
  // dweight += leftᵀ · right for the columns in `block`, packed, that belong to it.
  void add_products(index depth, Range block, const Target& of, bool first) const {
    const S* const left = room_.left;
    const auto& [begin, blocks, order, units, right, N, dweight] = of;
    const index P = round_up(units, lanes), end = begin + blocks * P;
    if (!dweight || block.end <= begin || block.begin >= end) return;
    S* rows[grad_tiles_at_once][grad_tile];  // null for padding and other columns
    for (int r = 0; r < grad_tiles_at_once * grad_tile; ++r) {
      const index column = block.begin + r, at = column - begin;
      const bool real = column < block.end && at >= 0 && column < end;
      const index unit = real ? at % P : units;
      rows[r / grad_tile][r % grad_tile] =
          unit < units ? dweight + (order[at / P] * units + unit) * N : nullptr;
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
    if (!wants_biases()) return;
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
          S* const to = room_.dbias + at;
          store_upto(first ? sum[v] : load_upto<V>(to, left) + sum[v], to, left);
        }
      });
    }
  }

  bool wants_biases() const { return p_.dbias_ih || p_.dbias_hh; }
  void write_bias_gradients(Range own) const {
    if (!wants_biases()) return;
    for (index column = own.begin; column < own.end; ++column) {
      const int slot = static_cast<int>(column / layout_.P);
      const index unit = column % layout_.P;
      if (unit >= p_.H) continue;
      const int input = L::blocks.input[slot], recurrent = L::blocks.recurrent[slot];
      const S sum = room_.dbias[column];
      if (p_.dbias_ih && input >= 0) p_.dbias_ih[input * p_.H + unit] = sum;
      if (p_.dbias_hh && recurrent >= 0) p_.dbias_hh[recurrent * p_.H + unit] = sum;
    }
  }

  // Row by row

  static constexpr int peepholes = Cell::peepholes;
  static constexpr int vectors = peepholes + 2 * gates + 2;

  static GradientRow<Cell> row(const Backward<S>& p, const L& layout) {
    return {p.model, p.vectors.weight_ch != nullptr, layout.P, round_up(layout.R, lanes)};
  }
  static bool computes_again(const Backward<S>& p) {
    return !p.saved && saves_slots<Cell>(p.options);
  }
  // The steps as a forward problem, to compute them again.
  static Forward<S> forward_of(const Backward<S>& p, S* room_for_records) {
    Forward<S> f{};
    static_cast<Steps&>(f) = p;
    f.model = p.model;
    f.options = p.options;
    f.vectors = p.vectors;
    f.row_wise = true;
    f.weights = p.forward_weights;
    f.saved = room_for_records;
    return f;
  }

  // What R is multiplied by in the step of row b.
  const S* seen_before(index s, index b) const {
    return drops(p_.options) ? seen(s) + b * layout_.P : h_before(s)(b);
  }
  S* seen(index s) const { return room_.seen + s % stretch_ * p_.B * layout_.P; }
  S* records(index s) const { return room_.records + s % ring_ * p_.B * record_; }
  void meet(const Blocks<L>& own, const Team& team) const {
    if (!own.alone) team.meet();
  }

  void start_rows(const Blocks<L>& own, const Team& team) const {
    rows_.e.start(p_.options, layout_.P);
    const index all = own.rows.rows(), working = own.rows.working();
    const Range places = own.alone ? Range{0, all} : team.share(all);
    for (index i = places.begin; i < places.end; ++i) {
      const index b = own.rows.row(i);
      for (index j = 0; j < p_.H; j += lanes) {
        start_cell(b, j);
        if (i >= working) leave_cell(b, j);
      }
      if (drops(p_.options)) {
        draw_seen(p_.options, b, p_.R, room_.mask + b * layout_.P);
      }
      // As padding of da is for the plain kernels.
      for (index n = 0; n < ring_; ++n) {
        S* const row = room_.da + (n * p_.B + b) * da_stride_;
        for (index j = 0; j < da_stride_; ++j) row[j] = 0;
      }
    }
    team.meet();
  }

  // What the rows of a stretch need that was not saved.
  void prepare(const Schedule& all, const Team& team, index begin, index end) const {
    const bool again = computes_again(p_);
    if (!drops(p_.options) && !again) return;
    const Range own = team.share(all.count(begin, end));
    each_entry(all, begin, own, [&](index s, index b) {
      const S* const h = h_before(s)(b);
      const S* const mask = room_.mask + b * layout_.P;
      S* const to = seen(s) + b * layout_.P;
      for (index j = 0; j < p_.R && drops(p_.options); j += lanes) {
        const index left = p_.R - j;
        store_upto(load_upto<V>(h + j, left) * V::load(mask + j), to + j, left);
      }
    });
    if (Cell::has_c && again) {
      for (index s = begin > 0 ? begin - 1 : 0; s < end; ++s) {
        const Range rows = team.share(p_.B);
        for (index b = rows.begin; b < rows.end; ++b) {
          const S* const c = p_.cells + p_.time(s) * p_.cells_t + b * p_.cells_b;
          S* const to = records(s) + b * record_ + record_at_.cell();
          for (index j = 0; j < p_.H; ++j) to[j] = c[j];
        }
      }
    }
    team.meet();
    if (again) compute_again(all, team, begin, end);
  }

  // f(s, b) for the n-th rows, step after step.
  template <class F>
  static void each_entry(const Schedule& all, index begin, Range n, const F& f) {
    Schedule::Entry next = all.entry(begin, n.begin);
    for (index i = n.begin; i < n.end; ++i, all.advance(next)) {
      f(next.s, all.row(next.place));
    }
  }

  // The records of a stretch from x, h and c, which wait for nobody.
  void compute_again(const Schedule& all, const Team& team, index begin,
                     index end) const {
    const Forward<S> problem = forward_of(p_, room_.records);
    const Again forward(problem, room_.again, team);
    const index count = all.count(begin, end);
    const auto entry = [&](index n) { return all.entry(begin, n); };
    forward.sums_of(count, team.share(layout_.panels()),
                    [&](index n, const S*& x, const S*& h, S*& to) {
                      const Schedule::Entry at = entry(n);
                      const index b = all.row(at.place);
                      x = p_.x + p_.time(at.s) * p_.x_t + b * p_.x_b;
                      h = seen_before(at.s, b);
                      to = records(at.s) + b * record_;
                    });
    team.meet();
    const bool twice = resets_before<Cell>(p_.model);
    const Range own = team.share(count), whole{0, p_.H};
    const auto row = [&](index s, index b) {
      S* const record = records(s) + b * record_;
      return typename Rows::Row{record,
                                h_before(s)(b),
                                Cell::has_c ? cell_before(s)(b) : nullptr,
                                seen_before(s, b),
                                rows_.e.scratch,  // neither is of use
                                rows_.e.scratch + layout_.P,
                                nullptr,
                                nullptr};
    };
    each_entry(all, begin, own, [&](index s, index b) {
      const auto of = row(s, b);
      if (p_.model.norm) rows_.normalise_inputs(of.record);
      if (p_.model.norm) rows_.normalise_recurrent(of.record);
      if (twice) {
        rows_.open(of, da(s) + b * da_stride_ + row_.reset, whole);
      } else if (!p_.model.norm) {
        rows_.forward(of, whole);
      }
    });
    team.meet();
    if (!twice) return;
    forward.second_of(count, team.share(Dense<S>(p_.H, p_.H).panels()),
                      [&](index n, const S*& left, S*& to) {
                        const Schedule::Entry at = entry(n);
                        const index b = all.row(at.place);
                        left = da(at.s) + b * da_stride_ + row_.reset;
                        to = records(at.s) + b * record_ + record_at_.recurrent(0);
                      });
    team.meet();
    each_entry(all, begin, own, [&](index s, index b) {
      const auto of = row(s, b);
      if (p_.model.norm) {
        rows_.normalise_first(of.record);
      } else {
        rows_.close(of, whole);
      }
    });
    team.meet();
  }

  // The step from dh on.
  void take_rows(const Blocks<L>& own, const Team& team, index s) const {
    const index taken = own.rows.count(s), later = own.rows.count(s + 1);
    const bool whole = p_.model.norm, projects = p_.model.projects;
    const bool twice = resets_before<Cell>(p_.model);
    if (Cell::has_c && later > taken) {
      Range left{0, later - taken};
      if (!own.alone) left = team.share(later - taken);
      for (index i = taken + left.begin; i < taken + left.end; ++i) {
        for (index j = 0; j < p_.H; j += lanes) leave_cell(own.rows.row(i), j);
      }
    }
    if (s < 0) return;
    const index t = p_.time(s), panels = layout_.back_panels(p_.H);
    const Range of_cell = own.alone ? Range{0, panels} : team.share(panels);
    const Range columns = projects ? of_cell : own.panels;
    const index end = columns.end * L::back_columns;
    const Range cell_units{columns.begin * L::back_columns, end < p_.H ? end : p_.H};
    Range places{0, taken}, mine = cell_units;
    const StateBefore<S> h = h_before(s), c = cell_before(s);
    const bool has_record = saves_slots<Cell>(p_.options);
    const auto each_row = [&](Range some, const auto& f) {
      for (index i = some.begin; i < some.end; ++i) {
        const index b = own.rows.row(i), at = b * layout_.P;
        f(b, typename Rows::BackRow{
                 has_record ? saved(s) + b * record_ : y(s) + b * p_.y_b, h(b),
                 Cell::has_c ? c(b) : nullptr, nullptr, seen_before(s, b),
                 p_.dcells ? p_.dcells + t * p_.dcells_t + b * p_.dcells_b : nullptr,
                 room_.dh + at, room_.dc + at, room_.direct + at, da(s) + b * da_stride_,
                 p_.is_cut(s, b, p_.options.bptt)});
      }
    };
    const auto through_cell = [&](index b, const typename Rows::BackRow& row) {
      const S* const dm = projects ? room_.dm + b * layout_.P : row.dh;
      if (twice) {
        rows_.open_backward(row, row_, mine);
      } else {
        rows_.backward(row, row_, dm, mine);
      }
    };
    each_row(places, [&](index b, const typename Rows::BackRow& row) {
      rows_.e.draw(p_.options, t, b, units(own));
      rows_.before(row, units(own));
      if (!projects && !whole) return through_cell(b, row);
      for (index j = units(own).begin; j < units(own).end && projects; ++j) {
        row.da[row_.dh + j] = row.dh[j];
      }
    });
    if (projects) {
      meet(own, team);
      const index depth = round_up(p_.R, lanes);
      multiply_rows(own, s, of_cell, p_.weights + layout_.backward_size(), row_.dh, depth,
                    depth);
    }
    if (whole) {
      meet(own, team);
      mine = {0, p_.H};
      if (!own.alone) places = team.share(taken);
    }
    if (projects || whole) {
      each_row(places, [&](index b, const typename Rows::BackRow& row) {
        rows_.e.draw(p_.options, t, b, mine);
        through_cell(b, row);
      });
    }
    if (!twice) return;
    meet(own, team);
    multiply_rows(own, s, own.panels, p_.weights + layout_.back_recurrent_panels(),
                  row_.recurrent, layout_.back_depth(), layout_.P);
    if (whole) meet(own, team);
    each_row(places, [&](index b, const typename Rows::BackRow& row) {
      rows_.close_backward(row, row_, room_.dm + b * layout_.P,
                           drops(p_.options) ? room_.mask + b * layout_.P : nullptr,
                           mine);
    });
  }

  // dm of all rows: K values of their row of gradients, from `at` on, times some panels
  // of so much depth.
  void multiply_rows(const Blocks<L>& own, index s, Range panels, const S* packed,
                     index at, index depth, index K) const {
    const DenseProduct<V> product{packed, depth, K, p_.H, true, true};
    const index rows = own.rows.count(s);
    RowList<S> list;
    for (index begin = 0; begin < rows; begin += list.most) {
      const index count = rows - begin < list.most ? rows - begin : list.most;
      for (index n = 0; n < count; ++n) {
        const index b = own.rows.row(begin + n);
        list.left[n] = da(s) + b * da_stride_ + at;
        list.to[n] = room_.dm + b * layout_.P;
      }
      product.run(list, count, panels);
    }
  }

  // The gradients of peepholes and of LayerNorm's vectors, columns shared out.
  void add_vector_gradients(const Schedule& all, const Team& team, index begin,
                            index end) const {
    const auto& [weight_ch, gamma_ih, gamma_hh, gamma_c, beta_c] = p_.dvectors;
    if (!weight_ch && !gamma_ih && !gamma_hh && !gamma_c && !beta_c) return;
    const Range own = team.share(layout_.P, lanes);
    const auto sum = [&](int vector) { return room_.sums + vector * layout_.P; };
    for (int v = 0; v < vectors && end == p_.T; ++v) {
      for (index u = own.begin; u < own.end; ++u) sum(v)[u] = 0;
    }
    const auto add = [&](int vector, const S* a, const S* b) {
      for (index u = own.begin; u < own.end; u += lanes) {
        S* const to = sum(vector) + u;
        fma(V::load(a + u), V::load(b + u), V::load(to)).store(to);
      }
    };
    const bool norm = p_.model.norm, norm_c = norm && Cell::has_c;
    const bool has_peephole = peepholes > 0 && weight_ch;
    const Range entries{0, all.count(begin, end)};
    each_entry(
        all, begin, norm || has_peephole ? entries : Range{0, 0}, [&](index s, index b) {
          const S* const row = da(s) + b * da_stride_;
          const S* const record = saved(s) + b * record_;
          if constexpr (peepholes > 0) {
            for (int k = 0; k < peepholes && has_peephole; ++k) {
              const index sees = k + 1 < peepholes ? row_.c_prev : row_.c;
              add(k, row + Cell::sees[k] * layout_.P, row + sees);
            }
          }
          for (int k = 0; k < gates && norm; ++k) {
            const int slot = k + L::first_input;
            add(peepholes + k, row + slot * layout_.P, record + record_at_.input(slot));
            add(peepholes + gates + k, row + k * layout_.P,
                record + record_at_.recurrent(k));
          }
          if (!norm_c) return;
          add(vectors - 2, row + row_.seen_c, row + row_.normal_c);
          for (index u = own.begin; u < own.end; ++u) {
            sum(vectors - 1)[u] += row[row_.seen_c + u];
          }
        });
    if (begin > 0) return;
    const auto write = [&](int vector, S* to, int block) {
      if (!to) return;
      for (index u = own.begin; u < own.end && u < p_.H; ++u) {
        to[block * p_.H + u] = sum(vector)[u];
      }
    };
    for (int k = 0; k < peepholes; ++k) write(k, weight_ch, k);
    for (int k = 0; k < gates; ++k) {
      write(peepholes + k, gamma_ih, L::Cell::input_gate[k]);
      write(peepholes + gates + k, gamma_hh, L::Cell::recurrent_gate[k]);
    }
    write(vectors - 2, gamma_c, 0);
    write(vectors - 1, beta_c, 0);
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
