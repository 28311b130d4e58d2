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
#pragma once

#include "pack.h"
#include "schedule.h"

namespace fusedrnn::FUSEDRNN_ARCH {

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
      : by_rows(p.B >= L::tile * team.count &&
                (layout.panels() * layout.panel_bytes(layout.H) <= own_cache ||
                 panels_total < team.count)),
        alone(by_rows || team.count == 1),
        rows(p, by_rows ? team : Team::single(), memory),
        panels(by_rows ? Range{0, panels_total} : team.share(panels_total)) {}

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

  const Forward<S>& p_;
  const L layout_;
  const bool save_;
  const index stretch_;
  const bool fused_;    // W·x within the step
  const index record_;  // values per row in the ring
  const index ring_;    // steps in the ring
  index* const schedule_;
  S* const zeros_;  // (P) of each thread
  S* const c0_;     // (B, P)
  S* const records_;
  const S* const bias_;

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
  static bool records_are_saved(const Forward<S>& p) { return p.saved && Cell::saves; }
  static index workspace(const Forward<S>& p, int threads) {
    const L layout(p.I, p.H);
    const index ring = records_are_saved(p) ? 0 : stretch(p, layout);
    return Schedule::elements<S>(p, threads) + (threads + p.B) * layout.P +
           ring * p.B * layout.record();
  }

  ForwardPass(const Forward<S>& p, S* workspace, const Team& team)
      : p_(p),
        layout_(p.I, p.H),
        save_(records_are_saved(p)),
        stretch_(stretch(p, layout_)),
        fused_(stretch_ == 1),
        record_(layout_.record()),
        ring_(save_ ? p.T : stretch_),
        schedule_(reinterpret_cast<index*>(workspace) + team.rank * Schedule::size(p)),
        zeros_(workspace + Schedule::elements<S>(p, team.count) + team.rank * layout_.P),
        c0_(zeros_ + (team.count - team.rank) * layout_.P),
        records_(save_ ? p.saved : c0_ + p.B * layout_.P),
        bias_(p.weights) {}

  void run(const Team& team) const {
    const Blocks<L> own(layout_, p_, layout_.panels(), team, schedule_);
    start(own);
    for (index begin = 0; begin < p_.T; begin += stretch_) {
      const index end = begin + stretch_ < p_.T ? begin + stretch_ : p_.T;
      if (!fused_) multiply_inputs(own, begin, end);
      for (index s = begin; s < end; ++s) {
        step(own, s, (team.step + s) % 2 != 0);
        finish_rows(own, s);
        if (!own.alone) team.meet();
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
    for (index j = 0; j < layout_.P && p_.resets; ++j) zeros_[j] = 0;
    const Range own_units = units(own);
    for (index i = 0; i < own.rows.rows() && Cell::has_c; ++i) {
      const index b = own.rows.row(i);
      for (index j = own_units.begin; j < own_units.end; j += lanes) {
        load_upto<V>(p_.c0 + b * p_.H + j, units_left(j)).store(c0_ + b * layout_.P + j);
      }
    }
    for (index i = own.rows.working(); i < own.rows.rows(); ++i) {
      const index b = own.rows.row(i);
      leave(b, p_.h0 + b * p_.H, c0_ + b * layout_.P, own_units);
    }
  }

  // The state of row b after its last step.
  void leave(index b, const S* h, const S* c, Range own_units) const {
    for (index j = own_units.begin; j < own_units.end; ++j) {
      p_.h_n[b * p_.H + j] = h[j];
      if constexpr (Cell::has_c) p_.c_n[b * p_.H + j] = c[j];
    }
  }

  // Rows for which s was the last step leave their state; those that do not take it have
  // no h.
  void finish_rows(const Blocks<L>& own, index s) const {
    const Range own_units = units(own);
    for (index i = own.rows.count(s + 1); i < own.rows.count(s); ++i) {
      const index b = own.rows.row(i);
      leave(b, y(s) + b * p_.y_b, records(s) + b * record_ + slots * layout_.P,
            own_units);
    }
    for (index i = own.rows.count(s); i < own.rows.rows(); ++i) {
      S* const h = y(s) + own.rows.row(i) * p_.y_b;
      for (index j = own_units.begin; j < own_units.end; ++j) h[j] = 0;
    }
  }

  // a = bias + W x for own rows and units of steps [begin, end), into the records.
  void multiply_inputs(const Blocks<L>& own, index begin, index end) const {
    for_blocks<V, L::width, L::tile>(
        {0, own.rows.count(begin, end)}, own.panels, blocking(p_.I), false,
        [&]<int rows, int together>(index row, index panel, const Turn& turn) {
          Rows<S, rows> x;
          S* to[rows];
          Schedule::Entry next = own.rows.entry(begin, row);
          for (int r = 0; r < rows; ++r, own.rows.advance(next)) {
            const index b = own.rows.row(next.place);
            x.p[r] = p_.x + p_.time(next.s) * p_.x_t + b * p_.x_b;
            to[r] = records(next.s) + b * record_;
          }
          V a[rows][together * L::sums];
          sum<together, true, false>(a, bias(panel), panel, turn, x, {});
          each_unit_vector<together>(panel, [&](int column, index unit) {
            for (int slot = L::first_input; slot < slots; ++slot) {
              const int at = column + slot * L::unit_vectors;
              for (int r = 0; r < rows; ++r) {
                a[r][at].store(to[r] + slot * layout_.P + unit);
              }
            }
          });
        });
  }

  void step(const Blocks<L>& own, index s, bool backwards) const {
    const index before = s > 0 ? s - 1 : 0;
    const StateBefore<S> h_before{p_, s, zeros_, p_.h0, y(before), p_.H, p_.y_b};
    const StateBefore<S> c_before{
        p_, s, zeros_, c0_, records(before) + slots * layout_.P, layout_.P, record_};
    const S* const x = p_.x + p_.time(s) * p_.x_t;
    S *const record = records(s), *const y_now = y(s);
    for_blocks<V, L::width, L::tile>(
        {0, own.rows.count(s)}, own.panels, blocking(fused_ ? p_.I + p_.H : p_.H),
        backwards, [&]<int rows, int together>(index row, index panel, const Turn& turn) {
          const auto tile = own.rows.template tile<rows>(row);
          S *at[rows], *y_row[rows];
          tile.find(record, record_, at);
          tile.find(y_now, p_.y_b, y_row);
          Rows<S, rows> x_rows, h;
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
              const State<V> now = Cell::forward(v, prev);
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

  Bias<V, slots, L::unit_vectors> bias(index panel) const {
    return {bias_, layout_.P, panel * L::panel_units};
  }

  // a = start + W x + R h for `together` panels, with_x and with_h telling which of them.
  template <int together, bool with_x, bool with_h, int rows, int columns, class Start>
  void sum(V (&a)[rows][columns], const Start& start, index panel, const Turn& turn,
           const Rows<S, rows>& x, const Rows<S, rows>& h) const {
    if (p_.weight_ih) {
      multiply<together>(a, start);
      if (with_x) {
        add_unpacked<together, L::input_offset>(a, x, p_.weight_ih, p_.I,
                                                L::Cell::input_gate, panel);
      }
      if (with_h) {
        add_unpacked<together, 0>(a, h, p_.weight_hh, p_.H, L::Cell::recurrent_gate,
                                  panel);
      }
      return;
    }
    with_panels<V, L::width, together>(turn, [&]<class Right>() {
      const Right W(p_.weights + layout_.input_panels(), panel, p_.I, turn);
      const Right R(p_.weights + layout_.recurrent_panels(), panel, p_.H, turn);
      const Product<Rows<S, rows>, Right, L::input_offset> Wx{x, W, p_.I};
      const Product<Rows<S, rows>, Right> Rh{h, R, p_.H};
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
  // panel on: parts of the panels are packed on the way, in the same order.
  template <int together, int offset, int rows, int columns>
  void add_unpacked(V (&a)[rows][columns], Rows<S, rows> left, const S* weight, index K,
                    const int* blocks, index panel) const {
    constexpr index depth = lanes * (together < 4 ? 4 / together : 1);
    S packed[together * depth * L::width * lanes];
    for (index k = 0; k < K; k += depth) {
      const index part = K - k < depth ? K - k : depth;
      for (int p = 0; p < together; ++p) {
        pack_gate_panel(layout_, weight, K, blocks, panel + p, {k, k + part},
                        packed + p * layout_.panel_size(part));
      }
      multiply<together>(a, Sums<V, rows, columns>{a},
                         Product<Rows<S, rows>, Panels<V, L::width>, offset>{
                             left, {packed, 0, part}, part});
      for (int r = 0; r < rows; ++r) left.p[r] += depth;
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
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
