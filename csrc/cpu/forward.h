// A layer forward: each step a fused matmul W·x + R·h' + cell or, where W is large for
// the rows of a step, W·x for a stretch of steps as one matmul before them. A thread owns
// a block of rows × hidden units throughout, so W·x and the cell state stay in its own
// caches; where it owns units it meets the others once per step, where it owns whole rows
// it meets nobody.
//
// Pre-activations live in a ring of row records [slots | c][P]. In training the ring is
// `saved` itself and holds every step.
//
// A row's state before a step is found by pointers, so masks cost no copies: a row that
// is reset reads zeros instead, and one whose sequence starts late reads h0 then.
//
// With options the tile leaves its sums in the record, and the rest of the step goes row
// by row (rows.h): B×H values beside a matmul of B×H×4H. Where a thread then needs what
// others own, all meet once more.
#pragma once

#include "dense.h"
#include "kernels.h"
#include "rows.h"
#include "schedule.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Hands out parts of one piece of memory, in whole cache lines; of none, to learn how
// large it must be.
template <class S>
class Carver {
  S* memory_;
  index used_ = 0;

 public:
  explicit Carver(S* memory) : memory_(memory) {}
  S* take(index count) {
    S* const part = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(count, 64 / sizeof(S));
    return part;
  }
  // A part like those of all others.
  S* of_thread(index count, int rank, int threads) {
    const index each = round_up(count, 64 / sizeof(S));
    S* const all = take(threads * each);
    return all ? all + rank * each : nullptr;
  }
  index used() const { return used_; }
};

// Each thread's block. Rows are cut only if that leaves every thread full tiles and the
// recurrent weights fit a core's own cache beside the rest.
template <class L>
struct Blocks {
  bool by_rows;
  bool alone;  // no other thread computes what this one reads
  Schedule rows;
  Range panels;

  Blocks(const L& layout, const Steps& p, index panels_total, const Team& team,
         index* memory)
      : by_rows(cuts_rows(layout, p, panels_total, team.count)),
        alone(by_rows || team.count == 1),
        rows(p, by_rows ? team : Team::single(), memory),
        panels(by_rows ? Range{0, panels_total} : team.share(panels_total)) {}

  static bool cuts_rows(const L& layout, const Steps& p, index panels_total,
                        int threads) {
    const bool fits = layout.panels() * layout.panel_bytes(layout.R) <= own_cache;
    return p.B >= L::tile * threads && (fits || panels_total < threads);
  }

 private:
  static constexpr index own_cache = 512 * 1024;
};

// Where the sums of a tile of panels start: at the bias (slots, P), or at what a record
// (slots, P) of each row holds of W x + bias. What is alike for cells is one type for
// all, and so is the matmul that starts there.
template <class V, int slots, int unit_vectors>
struct Bias {
  const typename V::scalar* bias;
  index P, first_unit;

  static int slot(int c) { return c % (slots * unit_vectors) / unit_vectors; }
  index unit(int c) const {
    const int vector = c / (slots * unit_vectors) * unit_vectors + c % unit_vectors;
    return first_unit + vector * V::lanes;
  }
  bool is_real(int c) const { return unit_vectors == 1 || unit(c) < P; }
  template <class>
  V start(int, int c) const {
    return is_real(c) ? V::load(bias + slot(c) * P + unit(c)) : V::broadcast(0);
  }
};
template <class V, int slots, int unit_vectors, int first_input, int rows>
struct Recorded : Bias<V, slots, unit_vectors> {
  typename V::scalar* const (&record)[rows];

  template <class>
  V start(int r, int c) const {
    if (!this->is_real(c) || this->slot(c) < first_input) {
      return Bias<V, slots, unit_vectors>::template start<V>(r, c);
    }
    return V::load(record[r] + this->slot(c) * this->P + this->unit(c));
  }
};

template <template <class> class CellOf, class S>
class ForwardPass {
  using L = Layout<CellOf, S>;
  using V = typename L::V;
  using Cell = typename L::Cell;
  static constexpr int lanes = V::lanes;
  static constexpr int gates = L::gates, slots = L::slots;

  using Rows = RowWise<Cell, Walk<S, Cell::has_c>>;

  // Scratch memory, of a thread and of all.
  struct Room : Carver<S> {
    index* schedule;
    S* rows;     // of this thread
    S* zeros;    // (P), or (slots, P) row by row, of this thread
    S* c0;       // (B, P)
    S* mask;     // (B, P) of the h' that R sees
    S* seen;     // (3, B, P) h0, and h of even and odd steps, as R sees them
    S* operand;  // (B, P) of the second product
    S* records;  // where they are not saved

    Room(const Forward<S>& p, S* memory, int rank, int threads) : Carver<S>(memory) {
      const L layout(p.model);
      const index rows_of_P = p.B * layout.P;
      schedule = reinterpret_cast<index*>(
          this->of_thread(Schedule::elements<S>(p, 1), rank, threads));
      rows = this->of_thread(p.row_wise ? Rows::Walked::memory(layout.P, slots) : 0, rank,
                             threads);
      zeros = this->of_thread((p.row_wise ? slots : 1) * layout.P, rank, threads);
      c0 = this->take(rows_of_P);
      mask = this->take(drops(p.options) ? rows_of_P : 0);
      seen = this->take(drops(p.options) ? 3 * rows_of_P : 0);
      operand = this->take(Second<L>(p.model).exists ? rows_of_P : 0);
      const index record = record_stride<L>(p.model);
      records = this->take(records_are_saved(p) ? 0 : stretch(p, layout) * p.B * record);
    }
  };

  const Forward<S>& p_;
  const L layout_;
  const Record<Cell> record_at_;
  const Second<L> second_;
  const bool save_;
  const index stretch_;
  const bool fused_;    // W·x within the step
  const index record_;  // values per row in the ring
  const index ring_;    // steps in the ring
  const Room room_;
  S* const records_;
  const Rows rows_;

 public:
  // Steps per stretch: one, with W·x fused into the step, if its panels are read anew for
  // rows enough to pay for it; else as many as have their records in the second-level
  // cache, but so many rows that W·x runs at the speed of a matmul.
  static index stretch(const Forward<S>& p, const L& layout) {
    constexpr index cache = 256 * 1024, enough_rows = 96, bytes_per_row = 16 * 1024;
    if (layout.panels() * layout.panel_bytes(p.I) <= bytes_per_row * p.B) return 1;
    const index cached_rows = cache / (layout.record() * index{sizeof(S)});
    const index rows = cached_rows > enough_rows ? cached_rows : enough_rows;
    const index steps = rows / p.B > 1 ? rows / p.B : 1;
    return steps < p.T ? steps : p.T;
  }
  static bool records_are_saved(const Forward<S>& p) {
    return p.saved && saves_slots<Cell>(p.options);
  }
  static index workspace(const Forward<S>& p, int threads) {
    return Room(p, nullptr, 0, threads).used();
  }

  static ForwardPlan plan(const Forward<S>& p, int threads) {
    const L layout(p.model);
    const index steps = stretch(p, layout);
    return {threads,
            Blocks<L>::cuts_rows(layout, p, layout.panels(), threads),
            steps == 1 && !p.model.norm,
            steps,
            L::tile,
            L::panel_units,
            saves_slots<Cell>(p.options) ? record_stride<L>(p.model) : 0,
            workspace(p, threads) * index{sizeof(S)}};
  }

  ForwardPass(const Forward<S>& p, S* workspace, const Team& team)
      : p_(p),
        layout_(p.model),
        record_at_{p.model.norm, layout_.P},
        second_(p.model),
        save_(records_are_saved(p)),
        stretch_(stretch(p, layout_)),
        fused_(stretch_ == 1 && !p.model.norm),
        record_(record_stride<L>(p.model)),
        ring_(save_ ? p.T : stretch_),
        room_(p, workspace, team.rank, team.count),
        records_(save_ ? p.saved : room_.records),
        rows_(p, layout_.P, p.weights, {room_.rows, layout_.P}) {}

  void run(const Team& team) const {
    const Blocks<L> own(layout_, p_, layout_.panels(), team, room_.schedule);
    start(own);
    if (p_.row_wise) start_rows(own, team);
    for (index begin = 0; begin < p_.T; begin += stretch_) {
      const index end = begin + stretch_ < p_.T ? begin + stretch_ : p_.T;
      if (!fused_) multiply_inputs(own, begin, end);
      if (p_.model.norm) normalise_inputs(own, team, begin, end);
      for (index s = begin; s < end; ++s) {
        step(own, s, (team.step + s) % 2 != 0);
        const bool met = p_.row_wise && take_rows(own, team, s);
        finish_rows(own, s);
        if (!own.alone && !met) team.meet();
      }
    }
  }

 private:
  S* records(index s) const { return records_ + (s % ring_) * p_.B * record_; }
  S* y(index s) const { return p_.y + p_.time(s) * p_.y_t; }
  index units_left(index unit) const { return p_.H - unit; }

  Blocking blocking(index depth) const {
    return {depth * index{sizeof(S)}, layout_.panel_bytes(depth)};
  }

  Range units(const Blocks<L>& own) const {
    const index end = own.panels.end * L::panel_units;
    return {own.panels.begin * L::panel_units, end < p_.H ? end : p_.H};
  }

  // c0 into padded rows. The rows of length 0 leave the state as it was.
  void start(const Blocks<L>& own) const {
    const index zeros = p_.row_wise ? slots * layout_.P : p_.resets ? layout_.P : 0;
    for (index j = 0; j < zeros; ++j) room_.zeros[j] = 0;
    const Range own_units = units(own);
    for (index i = 0; i < own.rows.rows() && Cell::has_c; ++i) {
      const index b = own.rows.row(i);
      for (index j = own_units.begin; j < own_units.end; j += lanes) {
        load_upto<V>(p_.c0 + b * p_.H + j, units_left(j))
            .store(room_.c0 + b * layout_.P + j);
      }
    }
    for (index i = own.rows.working(); i < own.rows.rows(); ++i) {
      const index b = own.rows.row(i);
      leave(b, p_.h0 + b * p_.R, room_.c0 + b * layout_.P, own_units);
    }
  }

  // The state of row b after its last step.
  void leave(index b, const S* h, const S* c, Range own_units) const {
    for (index j = own_units.begin; j < own_units.end; ++j) {
      if (j < p_.R) p_.h_n[b * p_.R + j] = h[j];
      if constexpr (Cell::has_c) p_.c_n[b * p_.H + j] = c[j];
    }
  }

  // Rows for which s was the last step leave their state; those that do not take it have
  // no h.
  void finish_rows(const Blocks<L>& own, index s) const {
    const Range own_units = units(own);
    for (index i = own.rows.count(s + 1); i < own.rows.count(s); ++i) {
      const index b = own.rows.row(i);
      leave(b, y(s) + b * p_.y_b, records(s) + b * record_ + record_at_.cell(),
            own_units);
    }
    for (index i = own.rows.count(s); i < own.rows.rows(); ++i) {
      S* const h = y(s) + own.rows.row(i) * p_.y_b;
      for (index j = own_units.begin; j < own_units.end && j < p_.R; ++j) h[j] = 0;
    }
  }

  // a = bias + W x for own rows and units of steps [begin, end), into the records.
  void multiply_inputs(const Blocks<L>& own, index begin, index end) const {
    for_blocks<V, L::width, L::tile>(
        {0, own.rows.count(begin, end)}, own.panels, blocking(p_.I), false,
        [&]<int rows, int together>(index row, index panel, const Turn& turn) {
          RowsAt<S, rows> x;
          S* to[rows];
          Schedule::Entry next = own.rows.entry(begin, row);
          for (int r = 0; r < rows; ++r, own.rows.advance(next)) {
            const index b = own.rows.row(next.place);
            x.p[r] = p_.x + p_.time(next.s) * p_.x_t + b * p_.x_b;
            to[r] = records(next.s) + b * record_;
          }
          V a[rows][together * L::sums];
          sum<together, true, false>(a, bias(panel), panel, turn, x, {});
          keep_inputs<together>(a, to, panel);
        });
  }
  template <int together, int rows, int columns>
  void keep_inputs(const V (&a)[rows][columns], S* const (&to)[rows], index panel) const {
    each_unit_vector<together>(panel, [&](int column, index unit) {
      for (int slot = L::first_input; slot < slots; ++slot) {
        const int at = column + slot * L::unit_vectors;
        for (int r = 0; r < rows; ++r) {
          a[r][at].store(to[r] + record_at_.input(slot) + unit);
        }
      }
    });
  }

  void step(const Blocks<L>& own, index s, bool backwards) const {
    const StateBefore<S> h_before = operand_before(s), c_before = cell_before(s);
    const S* const x = p_.x + p_.time(s) * p_.x_t;
    S *const record = records(s), *const y_now = y(s);
    for_blocks<V, L::width, L::tile>(
        {0, own.rows.count(s)}, own.panels, blocking(fused_ ? p_.I + p_.R : p_.R),
        backwards, [&]<int rows, int together>(index row, index panel, const Turn& turn) {
          const auto tile = own.rows.template tile<rows>(row);
          S *at[rows], *y_row[rows];
          const bool norm = p_.model.norm;  // the sums start at zero
          tile.find(norm ? room_.zeros : record, norm ? 0 : record_, at);
          tile.find(y_now, p_.y_b, y_row);
          RowsAt<S, rows> x_rows, h;
          tile.find(x, p_.x_b, x_rows.p);
          h_before.find(tile, h.p);
          const S* c[rows];
          if constexpr (Cell::has_c) c_before.find(tile, c);
          ask_for<together>(at, y_row, panel);
          V a[rows][together * L::sums];
          if (fused_) {
            sum<together, true, true>(a, bias(panel), panel, turn, x_rows, h);
          } else {
            const Recorded<V, slots, L::unit_vectors, L::first_input, rows> start{
                bias(panel), at};
            sum<together, false, true>(a, start, panel, turn, {}, h);
          }
          if (p_.row_wise) {
            tile.find(record, record_, at);
            return keep_sums<together>(a, at, panel);
          }
          each_unit_vector<together>(panel, [&](int first_column, index unit) {
            const index left = units_left(unit);
            for (int r = 0; r < rows; ++r) {
              V v[slots];
              for (int slot = 0; slot < slots; ++slot) {
                v[slot] = a[r][first_column + slot * L::unit_vectors];
              }
              State<V> prev{};
              if constexpr (Cell::has_direct) prev.h = load_upto<V>(h.p[r] + unit, left);
              if constexpr (Cell::has_c) {
                prev.c = V::load(c[r] + unit);
              }
              const State<V> now = Cell::forward(v, prev, Plain<V>{p_.model.variant});
              store_upto(now.h, y_row[r] + unit, left);
              if constexpr (Cell::has_c) now.c.store(at[r] + slots * layout_.P + unit);
              if (save_) {
                for (int slot = 0; slot < slots; ++slot) {
                  v[slot].store(at[r] + slot * layout_.P + unit);
                }
              }
            }
          });
        });
  }

  StateBefore<S> h_before(index s) const {
    return {p_, s, room_.zeros, p_.h0, y(s > 0 ? s - 1 : 0), p_.R, p_.y_b};
  }
  StateBefore<S> cell_before(index s) const {
    S* const left = records(s > 0 ? s - 1 : 0) + record_at_.cell();
    return {p_, s, room_.zeros, room_.c0, left, layout_.P, record_};
  }
  // What R is multiplied by.
  StateBefore<S> operand_before(index s) const {
    if (!drops(p_.options)) return h_before(s);
    return {p_, s, room_.zeros, room_.seen, seen(s - 1), layout_.P, layout_.P};
  }
  S* seen(index s) const { return room_.seen + (1 + (s & 1)) * p_.B * layout_.P; }

  // Prefetches what the cell will write, which in training no step before has touched:
  // while the matmul runs, its lines come from afar.
  template <int together, int rows>
  void ask_for(S* const (&record)[rows], S* const (&y)[rows], index panel) const {
    each_unit_vector<together>(panel, [&](int, index unit) {
      for (int r = 0; r < rows; ++r) {
        __builtin_prefetch(y[r] + unit, 1);
        if (!save_) continue;
        for (int slot = 0; slot < slots + Cell::has_c; ++slot) {
          __builtin_prefetch(record[r] + slot * layout_.P + unit, 1);
        }
      }
    });
  }

  // With LayerNorm biases come after it.
  Bias<V, slots, L::unit_vectors> bias(index panel) const {
    return {p_.model.norm ? room_.zeros : p_.weights, layout_.P, panel * L::panel_units};
  }

  // a = start + W x + R h for `together` panels, with_x and with_h telling which of them.
  template <int together, bool with_x, bool with_h, int rows, int columns, class Start>
  [[gnu::noinline]] void sum(V (&a)[rows][columns], const Start& start, index panel,
                             const Turn& turn, const RowsAt<S, rows>& x,
                             const RowsAt<S, rows>& h) const {
    if (p_.weight_ih) {
      multiply<together>(a, start);
      if (with_x) {
        add_unpacked<together>(a, L::input_offset, x, p_.weight_ih, p_.I,
                               L::Cell::input_gate, panel);
      }
      if (with_h) {
        add_unpacked<together>(a, 0, h, p_.weight_hh, p_.R, L::Cell::recurrent_gate,
                               panel);
      }
      return;
    }
    with_panels<V, L::width, together>(turn, [&]<class Right>() {
      const Right W(p_.weights + layout_.input_panels(), panel, p_.I, turn);
      const Right R(p_.weights + layout_.recurrent_panels(), panel, p_.R, turn);
      const Product<RowsAt<S, rows>, Right, L::input_offset> Wx{x, W, p_.I};
      const Product<RowsAt<S, rows>, Right> Rh{h, R, p_.R};
      if constexpr (with_x && with_h) {
        multiply<together>(a, start, Wx, Rh);
      } else if constexpr (with_x) {
        multiply<together>(a, start, Wx);
      } else {
        multiply<together>(a, start, Rh);
      }
    });
  }

  // a += left · weightᵀ for weight (gates·H, K) as it is, from column `offset` of each
  // panel on: squares of it are transposed on the way and summed in the same order.
  template <int together, int rows, int columns>
  [[gnu::noinline]] void add_unpacked(V (&a)[rows][columns], int offset,
                                      const RowsAt<S, rows>& left, const S* weight,
                                      index K, const int* blocks, index panel) const {
    constexpr index at_once = 8 * lanes;  // cache lines of a row before the next
    for (index begin = 0; begin < K; begin += at_once) {
      const index end = K - begin < at_once ? K : begin + at_once;
      for (int p = 0; p < together; ++p) {
        for (int vector = 0; vector < L::width; ++vector) {
          for (index k = begin; k < end; k += lanes) {
            const index depth = K - k < lanes ? K - k : lanes;
            V square[lanes];
            load_square(layout_, weight, K, blocks, panel + p, vector, k, depth, square);
            for (int r = 0; r < rows; ++r) {
              V& to = a[r][p * L::sums + offset + vector];
              V sum = to;
              if (depth == lanes) {
#pragma GCC unroll 16
                for (int i = 0; i < lanes; ++i) {
                  sum = fma(V::broadcast(left.p[r][k + i]), square[i], sum);
                }
              } else {
                for (int i = 0; i < depth; ++i) {
                  sum = fma(V::broadcast(left.p[r][k + i]), square[i], sum);
                }
              }
              to = sum;
            }
          }
        }
      }
    }
  }

  // f(column of its first slot, first unit) for each vector of units; a panel of several
  // may end past the last.
  template <int together, class F>
  void each_unit_vector(index panel, const F& f) const {
    for (int n = 0; n < together * L::unit_vectors; ++n) {
      const int panel_of = n / L::unit_vectors, vector = n % L::unit_vectors;
      const index unit = (panel + panel_of) * L::panel_units + vector * lanes;
      if (L::unit_vectors == 1 || unit < layout_.P) f(panel_of * L::sums + vector, unit);
    }
  }

  // Row by row

  template <int together, int rows, int columns>
  void keep_sums(const V (&a)[rows][columns], S* const (&to)[rows], index panel) const {
    each_unit_vector<together>(panel, [&](int column, index unit) {
      for (int slot = 0; slot < slots; ++slot) {
        if (p_.model.norm && slot >= gates) break;
        for (int r = 0; r < rows; ++r) {
          a[r][column + slot * L::unit_vectors].store(to[r] + record_at_.recurrent(slot) +
                                                      unit);
        }
      }
    });
  }

  // Rows, by their place, and units.
  struct Part {
    Range places, units;
  };
  // What a thread does of `count` rows: its units of all of them or, where all know the
  // whole row, some rows.
  Part part(const Blocks<L>& own, const Team& team, index count, Range own_units) const {
    if (own.alone || !p_.model.norm) return {{0, count}, own_units};
    return {team.share(count), {0, p_.H}};
  }
  void meet(const Blocks<L>& own, const Team& team) const {
    if (!own.alone) team.meet();
  }

  void start_rows(const Blocks<L>& own, const Team& team) const {
    rows_.e.start(p_.options, layout_.P);
    if (!drops(p_.options)) return;
    const index all = own.rows.rows();
    const Range places = own.alone ? Range{0, all} : team.share(all);
    for (index i = places.begin; i < places.end; ++i) {
      const index b = own.rows.row(i);
      S *const mask = room_.mask + b * layout_.P, *const to = room_.seen + b * layout_.P;
      draw_seen(p_.options, b, p_.R, mask);
      for (index j = 0; j < p_.R; ++j) to[j] = p_.h0[b * p_.R + j] * mask[j];
    }
    meet(own, team);
  }

  void normalise_inputs(const Blocks<L>& own, const Team& team, index begin,
                        index end) const {
    meet(own, team);
    const Range places = part(own, team, own.rows.count(begin, end), {}).places;
    Schedule::Entry next = own.rows.entry(begin, places.begin);
    for (index n = places.begin; n < places.end; ++n, own.rows.advance(next)) {
      rows_.normalise_inputs(records(next.s) + own.rows.row(next.place) * record_);
    }
  }

  // f(row b) for each row of a part.
  template <class F>
  void each_row(const Blocks<L>& own, index s, Range places, const F& f) const {
    const StateBefore<S> h = h_before(s), c = cell_before(s), seen_h = operand_before(s);
    const index t = p_.time(s);
    for (index i = places.begin; i < places.end; ++i) {
      const index b = own.rows.row(i);
      S* const record = records(s) + b * record_;
      const typename Rows::Row row{
          record,
          h(b),
          Cell::has_c ? c(b) : nullptr,
          seen_h(b),
          record + record_at_.cell(),
          p_.model.projects ? room_.operand + b * layout_.P : y(s) + b * p_.y_b,
          p_.cells ? p_.cells + t * p_.cells_t + b * p_.cells_b : nullptr,
          p_.trace ? p_.trace + (t * p_.B + b) * gates * p_.H : nullptr};
      f(b, row);
    }
  }

  // The step from the sums on. Returns whether all met after it: rows that end here are
  // then left while others go on, which leaves c and y of this step alone.
  bool take_rows(const Blocks<L>& own, const Team& team, index s) const {
    const index count = own.rows.count(s), t = p_.time(s);
    const bool whole = p_.model.norm;
    const bool twice = resets_before<Cell>(p_.model);
    const Part mine = part(own, team, count, units(own));
    const auto finish = [&](index b, const typename Rows::Row& row, Range of) {
      rows_.after(y(s) + b * p_.y_b, row.h_prev, room_.mask + b * layout_.P,
                  drops(p_.options) ? seen(s) + b * layout_.P : nullptr, of);
    };
    if (whole) meet(own, team);
    each_row(own, s, mine.places, [&](index b, const typename Rows::Row& row) {
      if (p_.model.norm) rows_.normalise_recurrent(row.record);
      if (twice) return rows_.open(row, room_.operand + b * layout_.P, mine.units);
      rows_.e.draw(p_.options, t, b, mine.units);
      rows_.forward(row, mine.units);
      if (!p_.model.projects) finish(b, row, mine.units);
    });
    if (second_.exists) {
      meet(own, team);
      const index panels = second_.forward().panels();
      const Range columns = own.alone ? Range{0, panels} : team.share(panels);
      multiply_again(own, s, columns);
      if (whole && twice) meet(own, team);
      constexpr index panel_units = Dense<S>::panel_units;
      const index end = columns.end * panel_units;
      const Range own_units{columns.begin * panel_units,
                            end < second_.N ? end : second_.N};
      Part rest = part(own, team, count, own_units);
      if (p_.model.projects) rest = {{0, count}, own_units};
      each_row(own, s, rest.places, [&](index b, const typename Rows::Row& row) {
        rows_.e.draw(p_.options, t, b, rest.units);
        if (twice && p_.model.norm) rows_.normalise_first(row.record);
        if (twice) rows_.close(row, rest.units);
        finish(b, row, rest.units);
      });
    }
    // What others computed of a row that ends here is copied next.
    const bool meets = whole || second_.exists;
    if (meets) meet(own, team);
    return meets;
  }

  // The second product, of the operands of all rows: to y, or to the first slot.
  void multiply_again(const Blocks<L>& own, index s, Range panels) const {
    const bool to_y = p_.model.projects;
    S* const first = to_y ? y(s) : records(s) + record_at_.recurrent(0);
    second_of(own.rows.count(s), panels, [&](index n, const S*& left, S*& to) {
      const index b = own.rows.row(n);
      left = room_.operand + b * layout_.P;
      to = first + b * (to_y ? p_.y_b : record_);
    });
  }

 public:
  // The second product of rows whose operands and results find(n, left, to) tells.
  template <class F>
  void second_of(index rows, Range panels, const F& find) const {
    const DenseProduct<V> product{p_.weights + layout_.forward_size(),
                                  second_.K,
                                  second_.K,
                                  second_.N,
                                  false,
                                  false};
    RowList<S> list;
    for (index begin = 0; begin < rows; begin += list.most) {
      const index count = rows - begin < list.most ? rows - begin : list.most;
      for (index n = 0; n < count; ++n) find(begin + n, list.left[n], list.to[n]);
      product.run(list, count, panels);
    }
  }

  // W x and R h' of rows whose x, h' and records find(n, x, h, to) tells.
  template <class F>
  void sums_of(index rows, Range panels, const F& find) const {
    for (index j = 0; j < slots * layout_.P; ++j) room_.zeros[j] = 0;
    for (index panel = panels.begin; panel < panels.end; ++panel) {
      for_tiles<L::tile>(0, rows, [&]<int height>(index row) {
        RowsAt<S, height> x, h;
        S *to[height], *zeros[height];
        for (int r = 0; r < height; ++r) {
          find(row + r, x.p[r], h.p[r], to[r]);
          zeros[r] = room_.zeros;
        }
        V a[height][L::sums];
        if (!p_.model.norm) {
          sum<1, true, true>(a, bias(panel), panel, Turn{}, x, h);
        } else {
          sum<1, true, false>(a, bias(panel), panel, Turn{}, x, {});
          keep_inputs<1>(a, to, panel);
          const Recorded<V, slots, L::unit_vectors, L::first_input, height> start{
              bias(panel), zeros};
          sum<1, false, true>(a, start, panel, Turn{}, {}, h);
        }
        keep_sums<1>(a, to, panel);
      });
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
