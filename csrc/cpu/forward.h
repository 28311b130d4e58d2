// A layer forward: each step a fused matmul W·x + R·h' + cell or, where W is large for
// the rows of a step, W·x for a stretch of steps as one matmul before them. A thread owns
// a block of rows × hidden units throughout, so W·x and the cell state stay in its own
// caches; where it owns units it meets the others once per step, where it owns whole rows
// it meets nobody.
//
// Pre-activations live in a ring of row records [slots | c][P]. In training the ring is
// `saved` itself and holds every step.
#pragma once

#include "pack.h"
#include "team.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Each thread's block. Rows are cut only if that leaves every thread full tiles and the
// recurrent weights fit a core's own cache beside the rest.
template <class L>
struct Blocks {
  Range rows, panels;
  bool alone;  // no other thread computes what this one reads

  Blocks(const L& layout, index B, index panels_total, const Team& team) {
    constexpr index own_cache = 512 * 1024;
    const index recurrent_bytes =
        layout.panels() * layout.panel_size(layout.H) * sizeof(typename L::V::scalar);
    const bool by_rows = B >= L::tile * team.count &&
                         (recurrent_bytes <= own_cache || panels_total < team.count);
    alone = by_rows || team.count == 1;
    rows = by_rows ? team.share(B) : Range{0, B};
    panels = by_rows ? Range{0, panels_total} : team.share(panels_total);
  }
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
  S* const records_;
  S* const c0_;  // (B, P)
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
  static index workspace(const Forward<S>& p) {
    const L layout(p.I, p.H);
    const index ring = records_are_saved(p) ? 0 : stretch(p, layout);
    return p.B * layout.P + ring * p.B * layout.record();
  }

  ForwardPass(const Forward<S>& p, S* workspace)
      : p_(p),
        layout_(p.I, p.H),
        save_(records_are_saved(p)),
        stretch_(stretch(p, layout_)),
        fused_(stretch_ == 1),
        record_(layout_.record()),
        ring_(save_ ? p.T : stretch_),
        records_(save_ ? p.saved : workspace + p.B * layout_.P),
        c0_(workspace),
        bias_(p.weights) {}

  void run(const Team& team) const {
    const Blocks<L> own(layout_, p_.B, layout_.panels(), team);
    if constexpr (Cell::has_c) read_c0(own);
    for (index begin = 0; begin < p_.T; begin += stretch_) {
      const index end = begin + stretch_ < p_.T ? begin + stretch_ : p_.T;
      if (!fused_) multiply_inputs(own, begin, end);
      for (index s = begin; s < end; ++s) {
        step(own, s, (team.step + s) % 2 != 0);
        if (!own.alone) team.meet();
      }
    }
    write_state(own);
  }

 private:
  S* records(index s) const { return records_ + (s % ring_) * p_.B * record_; }
  index units_left(index unit) const { return p_.H - unit; }

  Blocking blocking(index depth) const {
    return {depth * index{sizeof(S)}, layout_.panel_bytes(depth)};
  }

  Range units(const Blocks<L>& own) const {
    const index end = own.panels.end * L::panel_units;
    return {own.panels.begin * L::panel_units, end < p_.H ? end : p_.H};
  }

  void read_c0(const Blocks<L>& own) const {
    for (index b = own.rows.begin; b < own.rows.end; ++b) {
      for (index j = units(own).begin; j < units(own).end; j += lanes) {
        load_upto<V>(p_.c0 + b * p_.H + j, units_left(j)).store(c0_ + b * layout_.P + j);
      }
    }
  }

  void write_state(const Blocks<L>& own) const {
    const S* y = p_.y + p_.time(p_.T - 1) * p_.y_t;
    const S* c = records(p_.T - 1) + slots * layout_.P;
    for (index b = own.rows.begin; b < own.rows.end; ++b) {
      for (index j = units(own).begin; j < units(own).end; ++j) {
        p_.h_n[b * p_.H + j] = y[b * p_.y_b + j];
        if constexpr (Cell::has_c) p_.c_n[b * p_.H + j] = c[b * record_ + j];
      }
    }
  }

  // a = bias + W x for own rows and units of steps [begin, end), into the records.
  void multiply_inputs(const Blocks<L>& own, index begin, index end) const {
    const index height = own.rows.end - own.rows.begin;
    for_blocks<V, L::width, L::tile>(
        {0, (end - begin) * height}, own.panels, blocking(p_.I), false,
        [&]<int rows, int together>(index row, index panel, const Turn& turn) {
          Rows<S, rows> x;
          S* to[rows];
          index s = begin + row / height, b = own.rows.begin + row % height;
          for (int r = 0; r < rows; ++r) {
            x.p[r] = p_.x + p_.time(s) * p_.x_t + b * p_.x_b;
            to[r] = records(s) + b * record_;
            if (++b == own.rows.end) {
              b = own.rows.begin;
              ++s;
            }
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
    const S* const x = p_.x + p_.time(s) * p_.x_t;
    const S* h_prev = s == 0 ? p_.h0 : p_.y + p_.time(s - 1) * p_.y_t;
    const index h_prev_b = s == 0 ? p_.H : p_.y_b;
    S* const record = records(s);
    const S* c_prev = s == 0 ? c0_ : records(s - 1) + slots * layout_.P;
    const index c_prev_b = s == 0 ? layout_.P : record_;
    S* const y = p_.y + p_.time(s) * p_.y_t;

    for_blocks<V, L::width, L::tile>(
        own.rows, own.panels, blocking(fused_ ? p_.I + p_.H : p_.H), backwards,
        [&]<int rows, int together>(index row, index panel, const Turn& turn) {
          S* at[rows];
          for (int r = 0; r < rows; ++r) at[r] = record + (row + r) * record_;

          Rows<S, rows> x_rows, h;
          for (int r = 0; r < rows; ++r) {
            x_rows.p[r] = x + (row + r) * p_.x_b;
            h.p[r] = h_prev + (row + r) * h_prev_b;
          }
          ask_for<together>(at, y + row * p_.y_b, panel);
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
                prev.c = V::load(c_prev + (row + r) * c_prev_b + unit);
              }
              const State<V> now = Cell::forward(v, prev);
              store_upto(now.h, y + (row + r) * p_.y_b + unit, left);
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
  void ask_for(S* const (&record)[rows], S* y, index panel) const {
    each_unit_vector<together>(panel, [&](int, index unit) {
      for (int r = 0; r < rows; ++r) {
        __builtin_prefetch(y + r * p_.y_b + unit, 1);
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
