// This header is what a step does after its product, forward and backward, with any
// option: to some units of a row, or to whole rows. It is written once for the CPU, where
// a thread takes the units of a tile or of whole rows in vectors, and for GPUs, where the
// threads of a block share a row or one thread has a unit of it.
//
//   forward   [LayerNorm]  the cell  zoneout of c | [projection]  zoneout of h
//   backward  zoneout of h | [projection]  zoneout of c  the cell  [LayerNorm]
//
// A cell with a second product runs in two parts, one on either side of that product. At
// a bar a thread may need what others have computed. Records and rows of gradients are as
// in record.h. E is a walk along rows (layer_norm.h).
#pragma once

#include "activations.h"
#include "layer_norm.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Computes the highest pre-activation, and the lowest and highest value of the
// activations of gates and of states, which are monotone, between the bounds.
template <class X, class V>
FUSEDRNN_DEVICE void clip_bounds(double clip, const X& x, V (&to)[5]) {
  using S = typename V::scalar;
  to[0] = V::broadcast(static_cast<S>(clip));
  const V lowest = V::broadcast(static_cast<S>(-clip));
  const V gates[] = {x.gate(lowest), x.gate(to[0])};
  const V states[] = {x.state(lowest), x.state(to[0])};
  to[1] = min(gates[0], gates[1]);
  to[2] = max(gates[0], gates[1]);
  to[3] = min(states[0], states[1]);
  to[4] = max(states[0], states[1]);
}

// Returns the activations of a step's options; cuda/units.h overloads it.
FUSEDRNN_DEVICE const Activations& activations_of(const Options& o) {
  return o.activations;
}

template <class Cell, class E>
class RowWise : public NormalisedRows<Cell, E> {
  using Base = NormalisedRows<Cell, E>;
  using Base::count, Base::first_input, Base::gates, Base::has_parts, Base::moments_of;
  using Base::read_normalised, Base::scaled_cell, Base::slots;
  using Base::vector;
  using typename Base::Moments;
  using typename Base::S;
  using typename Base::V;

 public:
  using Base::bias, Base::e, Base::H, Base::has_second, Base::model, Base::norm, Base::P,
      Base::R;
  using Base::normalise_backward, Base::record, Base::variant, Base::vectors;
  using typename Base::BackRow;
  using typename Base::Row;
  const bool any_zoneout;
  const Activations& activations;
  const Extras<V> extras;

  template <class Problem>
  FUSEDRNN_DEVICE RowWise(const Problem& p, index padded, const S* packed_bias,
                          const E& walk)
      : Base(p, padded, packed_bias, walk),
        any_zoneout(p.options.zoneout_h > 0 || p.options.zoneout_c > 0),
        activations(activations_of(p.options)),
        extras(extras_of(p, walk)) {}

  // Forward

  template <class Units>
  FUSEDRNN_DEVICE void forward(const Row* rows, int n, Units units) const {
    const bool norm_c = Cell::has_c && norm();
    for (int r = 0; r < count(n); ++r) {
      e.each(units, [&](index u) {
        const Row& row = rows[r];
        V v[slots];
        read(row, u, v);
        State<V> prev{};
        if constexpr (Cell::has_direct) prev.h = e.upto(row.h_prev, u, H);
        if constexpr (Cell::has_c) {
          prev.c = e.load(row.c_prev, u);
          const V c = Cell::forward_c(v, prev.c, extras_at(u));
          const V kept = zones_out() ? mix(e.keep_c(row.keep_c, u), prev.c, c) : c;
          e.store(kept, row.c, u);
          if (is_returned(row.cells)) e.put(kept, row.cells, u, H);
          if (norm_c) {
            e.store(c, e.scratch(r), u);
            e.store(v[Cell::hidden_gate], e.scratch(r) + P, u);
          } else {
            const V squashed = Cell::squash(c, extras_at(u));
            put_h(row, u, Cell::hidden(v[Cell::hidden_gate], squashed));
          }
        } else {
          put_h(row, u, Cell::forward(v, prev, extras_at(u)).h);
        }
        store_gates(row, u, v);
      });
    }
    if constexpr (Cell::has_c) {
      if (!norm_c) return;
      Moments of{};
      moments_of(n, [&](int r, index u) { return e.load(e.scratch(r), u); }, of);
      for (int r = 0; r < count(n); ++r) {
        e.each(units, [&](index u) {
          const V n_c = of.normal(r, e.load(e.scratch(r), u));
          const V gate = e.load(e.scratch(r) + P, u);
          const V squashed = Cell::squash(scaled_cell(n_c, u), extras_at(u));
          put_h(rows[r], u, Cell::hidden(gate, squashed));
        });
      }
    }
  }

  // Runs the part before a second product, and writes that product's operand to `to`.
  template <class Units>
  FUSEDRNN_DEVICE void open(const Row* rows, int n, S* const* to, Units units) const {
    if constexpr (has_parts) {
      for (int r = 0; r < count(n); ++r) {
        e.each(units, [&](index u) {
          const Row& row = rows[r];
          V v[slots];
          read(row, u, v);
          Cell::open(v, extras_at(u));
          const V h_dropped = e.upto(row.h_dropped, u, H);
          e.put(Cell::operand(v[variant.factor], h_dropped), to[r], u, H);
          if (norm()) return;
          FUSEDRNN_UNROLL
          for (int k = 0; k < slots; ++k) {
            const bool is_kept = k < gates || E::bias_is_in;  // else it has not changed
            if (k != variant.second && is_kept) e.store(v[k], row.record + k * P, u);
          }
        });
      }
    }
  }
  // Runs the part after a second product, whose results are row.sums.
  template <class Units>
  FUSEDRNN_DEVICE void close(const Row* rows, int n, Units units) const {
    if constexpr (has_parts) {
      for (int r = 0; r < count(n); ++r) {
        e.each(units, [&](index u) {
          const Row& row = rows[r];
          V v[slots];
          if (norm()) {
            read(row, u, v);
            Cell::open(v, extras_at(u));
          } else {  // open() has added the bias to the slots that it activated
            FUSEDRNN_UNROLL
            for (int k = 0; k < slots; ++k) {
              const bool is_second = k == variant.second;
              v[k] = is_second ? e.load(row.sums, u) : e.load(row.record + k * P, u);
              if (is_second || (!E::bias_is_in && k >= gates)) {
                v[k] = v[k] + e.load(bias + k * P, u);
              }
            }
          }
          const State<V> prev{e.upto(row.h_prev, u, H), {}};
          put_h(row, u, Cell::close(v, prev, extras_at(u)).h);
          store_gates(row, u, v);
        });
      }
    }
  }

  // Takes h of the cell or of a projection through zoneout, and stores it and what R
  // reads of it in the next step.
  FUSEDRNN_DEVICE void finish(const Row& row, index u, V h) const {
    if (zones_out()) h = mix(e.keep_h(row.keep_h, u), e.upto(row.h_prev, u, R), h);
    e.put(h, row.h, u, R);
    if (!is_returned(row.next_h_dropped)) return;
    e.put(row.mask ? h * e.load(row.mask, u) : h, row.next_h_dropped, u, R);
  }

  // Backward

  // Returns dh of h before zoneout. The rest of dh goes past the cell into `direct`, and
  // is zero if it is not stored.
  FUSEDRNN_DEVICE V zoneout_backward(const BackRow& row, index u, V dh,
                                     bool stores = true) const {
    const V zero = V::broadcast(0);
    V direct = zero;
    if (zones_out()) {
      const V keeps = e.keep_h(row.keep_h, u);
      direct = part(keeps, dh);
      dh = part(V::broadcast(1) - keeps, dh);
    }
    if (stores) e.store(row.is_cut ? zero : direct, row.direct, u);
    return dh;
  }

  // Computes da of one unit from dm, the gradient of the cell's output.
  FUSEDRNN_DEVICE void backward(const BackRow& row, const GradientRow& at, index u,
                                V dm) const {
    V v[slots];
    activated(row, u, v);
    if constexpr (Cell::has_c) {
      const V c_prev = e.load(row.c_prev, u);
      const auto x = extras_at(u);
      const V c = row.c ? e.load(row.c, u) : Cell::cell(v, c_prev, x);
      const V squashed = Cell::squash(c, x), gate = v[Cell::hidden_gate];
      V direct;
      const V dc = Cell::hidden_backward(gate, squashed, dm, dc_of(row, u, direct), x);
      backward_c(row, at, u, v, c_prev, c, squashed, dm, dc, direct, x);
    } else {
      State<V> prev{};
      if constexpr (Cell::has_direct) prev.h = e.upto(row.h_prev, u, H);
      const State<V> d = Cell::backward(v, prev, V{}, dm, V{}, extras_at(u));
      if constexpr (Cell::has_direct) add_direct(row, u, d.h);
      put_gradients(row, u, v);
    }
  }

  // Does the same for whole rows with LayerNorm.
  FUSEDRNN_DEVICE void backward_normalised(const BackRow* rows, int n,
                                           const GradientRow& at,
                                           const S* const* dm) const {
    if constexpr (Cell::has_c) {
      backward_normalised_c(rows, n, at, dm);
    } else {
      for (int r = 0; r < count(n); ++r) {
        e.each(e.all(H), [&](index u) { backward(rows[r], at, u, e.load(dm[r], u)); });
      }
    }
    normalise_backward(rows, n, at);
  }

  // open_backward computes da of the slot of a second product, of one unit, which Rᵀ
  // multiplies; close_backward takes the result, which is the gradient of `operand`.
  FUSEDRNN_DEVICE void open_backward(const BackRow& row, const GradientRow& at, index u,
                                     V dh) const {
    if constexpr (has_parts) {
      V v[slots];
      activated(row, u, v);
      const V factor = v[variant.factor];
      const State<V> prev{e.upto(row.h_prev, u, H), {}};
      add_direct(row, u, Cell::open_backward(v, prev, dh, extras_at(u)));
      put_gradients(row, u, v);
      const V operand = Cell::operand(factor, e.upto(row.h_dropped, u, H));
      e.put(operand, row.da + at.operand, u, H);
    }
  }
  FUSEDRNN_DEVICE void close_backward(const BackRow& row, index u, V d_operand) const {
    if constexpr (has_parts) {
      S* const da = row.da + variant.factor * P;
      const V factor = e.load(da, u);
      const V d_factor = d_operand * e.upto(row.h_dropped, u, H);
      e.put(Cell::factor_backward(factor, d_factor, extras_at(u)), da, u, H);
      const V direct = Cell::operand(d_operand, factor);
      add_direct(row, u, row.mask ? direct * e.load(row.mask, u) : direct);
    }
  }

 private:
  static constexpr bool has_gates = (E::parts & changes::gates) != 0;
  static constexpr bool has_activations = (E::parts & changes::activations) != 0;
  static constexpr bool has_states = (E::parts & changes::states) != 0;

  FUSEDRNN_DEVICE bool zones_out() const { return has_states && any_zoneout; }
  FUSEDRNN_DEVICE bool projects() const { return has_states && model.projects; }
  FUSEDRNN_DEVICE static bool is_returned(const S* row) { return has_states && row; }

  template <class Problem>
  FUSEDRNN_DEVICE static Extras<V> extras_of(const Problem& p, const E& e) {
    constexpr double none = __builtin_inf();
    Extras<V> x{};
    x.variant = p.model.variant;
    x.clips = p.options.clip < none;
    x.clips_cell = p.options.cell_clip < none;
    x.has_peephole = p.vectors.weight_ch;
    if (x.clips) {
      V bounds[5];
      e.bounds(p.options.clip, activations_of(p.options), bounds);
      x.clip = e.rounded(bounds[0]);
      x.gate_low = e.rounded(bounds[1]);
      x.gate_high = e.rounded(bounds[2]);
      x.state_low = e.rounded(bounds[3]);
      x.state_high = e.rounded(bounds[4]);
    } else {
      x.clip = V::broadcast(static_cast<S>(none));
    }
    x.cell_clip = V::broadcast(static_cast<S>(p.options.cell_clip));
    return x;
  }
  // UnitExtras has the options of the call and the peepholes of a unit. It refers to the
  // options: copying them for each unit took half of the time of a backward step.
  struct UnitExtras {
    const RowWise& rows;
    index u;
    int variant;

    FUSEDRNN_DEVICE const Extras<V>& of() const { return rows.extras; }
    FUSEDRNN_DEVICE bool is_variant() const { return variant == 1; }
    FUSEDRNN_DEVICE V peephole(int k) const {
      return rows.vector(rows.vectors.weight_ch, k, u);
    }
    FUSEDRNN_DEVICE V add_peephole(int k, V c, V a) const {
      return of().has_peephole ? fma(peephole(k), c, a) : a;
    }
    FUSEDRNN_DEVICE V add_from_peephole(int k, V da, V dc) const {
      return of().has_peephole ? fma(da, peephole(k), dc) : dc;
    }
    FUSEDRNN_DEVICE auto activations() const {
      if constexpr (has_activations) {
        return Replaced<V, true>{rows.activations};
      } else {
        return Plain<V>{variant};
      }
    }
    FUSEDRNN_DEVICE V gate(V a) const { return activations().gate(a); }
    FUSEDRNN_DEVICE V state(V a) const { return activations().state(a); }
    FUSEDRNN_DEVICE V gate_slope(V s) const { return activations().gate_slope(s); }
    FUSEDRNN_DEVICE V state_slope(V s) const { return activations().state_slope(s); }
    FUSEDRNN_DEVICE V bounded(V a) const { return of().bounded(a); }
    FUSEDRNN_DEVICE V bounded_cell(V c) const { return of().bounded_cell(c); }
    FUSEDRNN_DEVICE V through_gate(V s, V da) const { return of().through_gate(s, da); }
    FUSEDRNN_DEVICE V through_state(V s, V da) const { return of().through_state(s, da); }
    FUSEDRNN_DEVICE V through_bounds(V a, V da) const {
      return of().through_bounds(a, da);
    }
    FUSEDRNN_DEVICE V through_cell(V c, V dc) const { return of().through_cell(c, dc); }
  };
  // PlainReplaced has activations alone.
  struct PlainReplaced : Plain<V, true>, Replaced<V, false> {
    using Replaced<V, false>::gate, Replaced<V, false>::state;
    using Replaced<V, false>::gate_slope, Replaced<V, false>::state_slope;
  };
  FUSEDRNN_DEVICE auto extras_at(index u) const {
    if constexpr (has_gates) {
      return UnitExtras{*this, u, extras.variant};
    } else if constexpr (has_activations) {
      return PlainReplaced{{extras.variant}, {activations}};
    } else {
      return Plain<V, true>{extras.variant};
    }
  }

  // Returns keeps·d, and 0 where keeps is 0, because d may be infinite or NaN.
  FUSEDRNN_DEVICE static V part(V keeps, V d) {
    const V zero = V::broadcast(0);
    return if_less(zero, keeps, keeps * d, zero);
  }
  // Returns keeps·old + (1 - keeps)·fresh, and the one that 0 or 1 selects.
  FUSEDRNN_DEVICE static V mix(V keeps, V old, V fresh) {
    return part(keeps, old) + part(V::broadcast(1) - keeps, fresh);
  }
  FUSEDRNN_DEVICE void put_h(const Row& row, index u, V h) const {
    if (projects()) {
      e.put(h, row.h, u, H);
    } else {
      finish(row, u, h);
    }
  }
  FUSEDRNN_DEVICE void add_direct(const BackRow& row, index u, V dh) const {
    if (!row.is_cut) e.store(e.load(row.direct, u) + dh, row.direct, u);
  }
  // Writes da. Its padding stays zero.
  FUSEDRNN_DEVICE void put_gradients(const BackRow& row, index u,
                                     const V (&v)[slots]) const {
    FUSEDRNN_UNROLL
    for (int k = 0; k < slots; ++k) e.put(v[k], row.da + k * P, u, H);
  }

  // Reads the pre-activations from the product's sums or, with LayerNorm, from the
  // record.
  FUSEDRNN_DEVICE void read(const Row& row, index u, V (&v)[slots]) const {
    if (norm()) return read_normalised(row.record, u, v);
    FUSEDRNN_UNROLL
    for (int k = 0; k < slots; ++k) {
      v[k] = e.load(row.sums + k * row.sums_apart, u);
      if (!E::bias_is_in) v[k] = v[k] + e.load(bias + k * P, u);
    }
  }
  // Stores the gates in the record and in the trace.
  FUSEDRNN_DEVICE void store_gates(const Row& row, index u, const V (&v)[slots]) const {
    if (row.saved_slots && !norm()) {
      FUSEDRNN_UNROLL
      for (int k = 0; k < slots; ++k) e.store(v[k], row.saved_slots + k * P, u);
    }
    if (!is_returned(row.trace)) return;
    FUSEDRNN_UNROLL
    for (int k = first_input; k < slots; ++k) {
      e.put(v[k], row.trace + (k - first_input) * H, u, H);
    }
  }
  // Computes or reads the activated gates.
  FUSEDRNN_DEVICE void activated(const BackRow& row, index u, V (&v)[slots]) const {
    if (!norm()) {
      FUSEDRNN_UNROLL
      for (int k = 0; k < slots; ++k) {
        const S* const at = row.record + k * P;
        v[k] = Cell::saves ? e.load(at, u) : e.upto(at, u, H);
      }
      return;
    }
    read_normalised(row.record, u, v);
    if constexpr (Cell::has_c) {
      Cell::forward_c(v, e.load(row.c_prev, u), extras_at(u));
    } else {
      State<V> prev{};
      if constexpr (Cell::has_direct) prev.h = e.upto(row.h_prev, u, H);
      if constexpr (has_parts) {
        if (has_second()) {
          Cell::open(v, extras_at(u));
          Cell::close(v, prev, extras_at(u));
          return;
        }
      }
      Cell::forward(v, prev, extras_at(u));
    }
  }

  // Returns dc from the later steps; `direct` becomes the part that zoneout passes on to
  // c'.
  FUSEDRNN_DEVICE V dc_of(const BackRow& row, index u, V& direct) const {
    V dc = e.load(row.dc, u);
    direct = V::broadcast(0);
    if (is_returned(row.dcells)) dc = dc + e.upto(row.dcells, u, H);
    if (zones_out()) {
      const V keeps = e.keep_c(row.keep_c, u);
      direct = part(keeps, dc);
      dc = part(V::broadcast(1) - keeps, dc);
    }
    return dc;
  }
  template <class X>
  FUSEDRNN_DEVICE void backward_c(const BackRow& row, const GradientRow& at, index u,
                                  V (&v)[slots], V c_prev, V c, V squashed, V dm, V dc,
                                  V direct, const X& x) const {
    if (projects()) {
      e.put(Cell::hidden(v[Cell::hidden_gate], squashed), row.da + at.m, u, H);
    }
    if (has_gates && extras.has_peephole) {
      e.put(c_prev, row.da + at.c_prev, u, H);
      e.put(c, row.da + at.c, u, H);
    }
    const V dc_prev = direct + Cell::backward_c(v, c_prev, c, squashed, dm, dc, x);
    e.store(row.is_cut ? V::broadcast(0) : dc_prev, row.dc, u);
    put_gradients(row, u, v);
  }
  FUSEDRNN_DEVICE void backward_normalised_c(const BackRow* rows, int n,
                                             const GradientRow& at,
                                             const S* const* dm) const {
    // A row's scratch memory holds c (later squash(c)), the gradient of the normalised c,
    // and the gates.
    const auto c_at = [&](int r) { return e.scratch(r); };
    const auto d_normal_at = [&](int r) { return e.scratch(r) + P; };
    const auto gates_at = [&](int r) { return e.scratch(r) + 2 * P; };
    for (int r = 0; r < count(n); ++r) {
      e.each(e.all(H), [&](index u) {
        V v[slots];
        activated(rows[r], u, v);
        FUSEDRNN_UNROLL
        for (int k = 0; k < slots; ++k) e.store(v[k], gates_at(r) + k * P, u);
        const V c_prev = e.load(rows[r].c_prev, u);
        e.store(Cell::cell(v, c_prev, extras_at(u)), c_at(r), u);
      });
    }
    Moments of{};
    moments_of(n, [&](int r, index u) { return e.load(e.scratch(r), u); }, of);
    for (int r = 0; r < count(n); ++r) {
      e.each(e.all(H), [&](index u) {
        const V n_c = of.normal(r, e.load(c_at(r), u));
        const auto x = extras_at(u);
        const V squashed = Cell::squash(scaled_cell(n_c, u), x);
        const V gate = e.load(gates_at(r) + Cell::hidden_gate * P, u);
        // Adding -0 changes no value, not even the sign of a zero.
        const V d = Cell::hidden_backward(gate, squashed, e.load(dm[r], u),
                                          V::broadcast(static_cast<S>(-0.0)), x);
        e.put(n_c, rows[r].da + at.normal_c, u, H);
        e.put(d, rows[r].da + at.squashed, u, H);
        e.store(d * vector(vectors.gamma_c, 0, u), d_normal_at(r), u);
        e.store(squashed, c_at(r), u);
      });
    }
    S mean[E::most_rows], along[E::most_rows];
    const auto d = [&](int r, index u) { return e.load(d_normal_at(r), u); };
    const auto normal = [&](int r, index u) {
      return e.load(rows[r].da + at.normal_c, u);
    };
    e.sums(count(n), H, d, mean);
    e.sums(count(n), H, [&](int r, index u) { return d(r, u) * normal(r, u); }, along);
    const S values = static_cast<S>(H);
    for (int r = 0; r < count(n); ++r) {
      const V middle = V::broadcast(mean[r] / values);
      const V slope = V::broadcast(along[r] / values);
      e.each(e.all(H), [&](index u) {
        const BackRow& row = rows[r];
        V v[slots];
        FUSEDRNN_UNROLL
        for (int k = 0; k < slots; ++k) v[k] = e.load(gates_at(r) + k * P, u);
        const V c_prev = e.load(row.c_prev, u), n_c = normal(r, u);
        const auto x = extras_at(u);
        const V c = row.c ? e.load(row.c, u) : Cell::cell(v, c_prev, x);
        V direct;
        V dc = dc_of(row, u, direct);
        dc = fma(V::broadcast(of.scale[r]), d(r, u) - middle - n_c * slope, dc);
        const V squashed = e.load(c_at(r), u);
        backward_c(row, at, u, v, c_prev, c, squashed, e.load(dm[r], u), dc, direct, x);
      });
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
