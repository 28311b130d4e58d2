// What a step does after its product, forward and backward, with any option: of some
// units of a row, or of whole rows. Written once for the CPU, where a thread takes the
// units of a tile or of whole rows in vectors, and for GPUs, where the threads of a block
// share a row or one thread has a unit of it.
//
//   forward   [LayerNorm]  the cell  zoneout of c | [projection]  zoneout of h
//   backward  zoneout of h | [projection]  zoneout of c  the cell  [LayerNorm]
//
// and a cell with a second product is taken in two parts, on either side of it. A bar is
// where a thread may need what others have computed. Records and rows of gradients are as
// record.h says. E, the walk, is:
//
//   V, S                   the cell's vector, its scalar
//   most_rows              how many rows at most are taken together
//   each(units, f)         f(u) for units, several at a time if V has lanes
//   sums(n, H, f, to)      to[r] = Σ f(r, u) over whole rows, the same to all who share
//   one load(p, u), store      of rows that are padded upto(p, u, n), put     of rows
//   that end at n keep_h(row, u), keep_c how much of a unit's state zoneout keeps
//   scratch(r)             (2 + slots, P) for a row, each unit's values its owner's
//   once(f), all(n)        f by one of those who share a row; the units of a whole row
//   root(x)                √x
//   kept(x)                x as a record rounds it
//   bounds(clip, to)       to[4]: ±clip and the activations there (clip_bounds)
//   bias_is_in             whether sums start at the bias
//   vectors_are_padded     whether the blocks of `vectors` have P elements, or H
#pragma once

#include "record.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// The highest pre-activation, σ of the lowest and of the highest, tanh of the highest.
template <class V>
FUSEDRNN_DEVICE void clip_bounds(double clip, V (&to)[4]) {
  using S = typename V::scalar;
  to[0] = V::broadcast(static_cast<S>(clip));
  to[1] = sigmoid(V::broadcast(static_cast<S>(-clip)));
  to[2] = sigmoid(to[0]);
  to[3] = tanh(to[0]);
}

template <class Cell, class E>
class RowWise {
  using V = typename E::V;
  using S = typename E::S;
  static constexpr int gates = Cell::gates, slots = Cell::slots;
  static constexpr int first_input = slots - gates;
  static constexpr Shape shape = shape_of<Cell>(0);
  static constexpr int input_groups = Groups(Cell::input_group, first_input).count;
  static constexpr int recurrent_groups = Groups(Cell::recurrent_group, 0).count;

 public:
  const Model model;
  const Vectors<const S> vectors;
  const index H, R, P;
  const Variant variant;
  const Record record;
  const S* const bias;  // (slots, P)
  const bool zones_out;
  const E e;
  const Extras<V> extras;

  template <class Problem>
  FUSEDRNN_DEVICE RowWise(const Problem& p, index padded, const S* packed_bias,
                          const E& walk)
      : model(p.model),
        vectors(p.vectors),
        H(p.model.H),
        R(p.model.R),
        P(padded),
        variant(variant_of(p.model.variant)),
        record(shape, p.model.norm, padded),
        bias(packed_bias),
        zones_out(p.options.zoneout_h > 0 || p.options.zoneout_c > 0),
        e(walk),
        extras(extras_of(p, walk)) {}

  FUSEDRNN_DEVICE static bool has_second(const Model& m) {
    return variant_of(m.variant).second >= 0;
  }
  FUSEDRNN_DEVICE bool has_second() const { return variant.second >= 0; }

  // Forward

  struct Row {
    S* record;
    const S* sums;  // pre-activations, those of slot k from k * sums_apart on
    index sums_apart;
    const S *h_prev, *c_prev, *seen;  // where the cell needs them; seen is h' for R
    S* c;
    S* h;                      // or, where h is projected, what the projection multiplies
    S *cells, *trace;          // or null
    S* next_seen;              // or null: h for R in the next step, which is h times
    const S* mask;             // this, or null
    const S *keep_h, *keep_c;  // what zoneout keeps, where the walk does not know
    S* kept;                   // the record, where the slots are kept; or null
  };

  // The groups of W x, and those of R h' that wait for no second product.
  FUSEDRNN_DEVICE void normalise_inputs(const Row* rows, int n) const {
    e.once([&] {
      for (int r = 0; r < count(n); ++r) {
        for (int group = 0; group < record.stats; ++group) {
          rows[r].record[record.scale() + group] = 0;
        }
      }
    });
    for (int group = 0; group < input_groups; ++group) {
      const Range of = input_slots(group);
      normalise(rows, n, record.input(0), of, group);
    }
  }
  FUSEDRNN_DEVICE void normalise_recurrent(const Row* rows, int n) const {
    for (int group = 0; group < recurrent_groups; ++group) {
      if (!is_second(group)) normalise_group(rows, n, group);
    }
  }
  FUSEDRNN_DEVICE void normalise_second(const Row* rows, int n) const {
    for (int group = 0; group < recurrent_groups; ++group) {
      if (is_second(group)) normalise_group(rows, n, group);
    }
  }

  template <class Units>
  FUSEDRNN_DEVICE void forward(const Row* rows, int n, Units units) const {
    const bool norm_c = Cell::has_c && model.norm;
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
          const V kept = zones_out ? mix(e.keep_c(row.keep_c, u), prev.c, c) : c;
          e.store(kept, row.c, u);
          if (row.cells) e.put(kept, row.cells, u, H);
          if (norm_c) {
            e.store(c, e.scratch(r), u);
            e.store(v[Cell::hidden_gate], e.scratch(r) + P, u);
          } else {
            put_h(row, u, Cell::hidden(v[Cell::hidden_gate], Cell::squash(c)));
          }
        } else {
          put_h(row, u, Cell::forward(v, prev, extras_at(u)).h);
        }
        keep_gates(row, u, v);
      });
    }
    if constexpr (Cell::has_c) {
      if (!norm_c) return;
      Moments of[E::most_rows];
      moments_of_scratch(n, of);
      for (int r = 0; r < count(n); ++r) {
        e.each(units, [&](index u) {
          const V n_c = of[r].normal(e.load(e.scratch(r), u));
          const V gate = e.load(e.scratch(r) + P, u);
          put_h(rows[r], u, Cell::hidden(gate, Cell::squash(scaled_cell(n_c, u))));
        });
      }
    }
  }

  // The part before a second product, whose operand goes to `to`.
  template <class Units>
  FUSEDRNN_DEVICE void open(const Row* rows, int n, S* const* to, Units units) const {
    if constexpr (has_parts) {
      for (int r = 0; r < count(n); ++r) {
        e.each(units, [&](index u) {
          const Row& row = rows[r];
          V v[slots];
          read(row, u, v);
          Cell::open(v, extras_at(u));
          const V seen = e.upto(row.seen, u, H);
          e.put(Cell::operand(v[variant.factor], seen), to[r], u, H);
          for (int k = 0; k < slots && !model.norm; ++k) {
            const bool is_kept = k < gates || E::bias_is_in;  // else it stays as it is
            if (k != variant.second && is_kept) e.store(v[k], row.record + k * P, u);
          }
        });
      }
    }
  }
  // The part after it; row.sums are its results.
  template <class Units>
  FUSEDRNN_DEVICE void close(const Row* rows, int n, Units units) const {
    if constexpr (has_parts) {
      for (int r = 0; r < count(n); ++r) {
        e.each(units, [&](index u) {
          const Row& row = rows[r];
          V v[slots];
          if (model.norm) {
            read(row, u, v);
            Cell::open(v, extras_at(u));
          } else {  // open has added the bias to the slots that it activated
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
          keep_gates(row, u, v);
        });
      }
    }
  }

  // h, as a projection leaves it, through zoneout, and what R sees of it next.
  FUSEDRNN_DEVICE void finish(const Row& row, index u, V h) const {
    if (zones_out) h = mix(e.keep_h(row.keep_h, u), e.upto(row.h_prev, u, R), h);
    e.put(h, row.h, u, R);
    if (!row.next_seen) return;
    e.put(row.mask ? h * e.load(row.mask, u) : h, row.next_seen, u, R);
  }

  // Backward

  struct BackRow {
    const S* record;  // or h, for a cell whose h tells its slot
    const S *h_prev, *c_prev;
    const S* c;  // before zoneout, or null: from the gates
    const S* seen;
    const S* dcells;      // or null
    S *dh, *dc, *direct;  // padded; dh becomes that of h before zoneout
    S* da;                // a row of gradients
    bool is_cut;
    const S* mask;             // of `seen`, or null
    const S *keep_h, *keep_c;  // what zoneout keeps, where the walk does not know
  };

  // dh before zoneout; the rest goes past the cell, and is zero where it is not stored.
  FUSEDRNN_DEVICE V before(const BackRow& row, index u, V dh, bool stores = true) const {
    const V zero = V::broadcast(0), one = V::broadcast(1);
    V direct = zero;
    if (zones_out) {
      const V keeps = e.keep_h(row.keep_h, u);
      direct = dh * keeps;
      dh = dh * (one - keeps);
    }
    if (stores) e.store(row.is_cut ? zero : direct, row.direct, u);
    return dh;
  }

  // From dm, the gradient of what the cell made, to da, of one unit.
  FUSEDRNN_DEVICE void backward(const BackRow& row, const GradientRow& at, index u,
                                V dm) const {
    V v[slots];
    activated(row, u, v);
    if constexpr (Cell::has_c) {
      const V c_prev = e.load(row.c_prev, u);
      const UnitExtras x = extras_at(u);
      const V c = row.c ? e.load(row.c, u) : Cell::cell(v, c_prev, x);
      const V squashed = Cell::squash(c), gate = v[Cell::hidden_gate];
      V direct;
      const V dc = Cell::hidden_backward(gate, squashed, dm, dc_of(row, u, direct));
      backward_c(row, at, u, v, c_prev, c, squashed, dm, dc, direct, x);
    } else {
      State<V> prev{};
      if constexpr (Cell::has_direct) prev.h = e.upto(row.h_prev, u, H);
      const State<V> d = Cell::backward(v, prev, V{}, dm, V{}, extras_at(u));
      if constexpr (Cell::has_direct) add_direct(row, u, d.h);
      put_gradients(row, u, v);
    }
  }

  // The same of whole rows with LayerNorm.
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

  // A second product's part before it, of one unit. da of its slot goes to where R reads
  // it, and what comes back is the gradient of `operand`.
  FUSEDRNN_DEVICE void open_backward(const BackRow& row, const GradientRow& at, index u,
                                     V dh) const {
    if constexpr (has_parts) {
      V v[slots];
      activated(row, u, v);
      const V factor = v[variant.factor];
      const State<V> prev{e.upto(row.h_prev, u, H), {}};
      add_direct(row, u, Cell::open_backward(v, prev, dh, extras_at(u)));
      put_gradients(row, u, v);
      const V operand = Cell::operand(factor, e.upto(row.seen, u, H));
      e.put(operand, row.da + at.operand, u, H);
    }
  }
  FUSEDRNN_DEVICE void close_backward(const BackRow& row, index u, V d_operand) const {
    if constexpr (has_parts) {
      S* const da = row.da + variant.factor * P;
      const V factor = e.load(da, u);
      const V d_factor = d_operand * e.upto(row.seen, u, H);
      e.put(Cell::factor_backward(factor, d_factor, extras_at(u)), da, u, H);
      const V direct = Cell::operand(d_operand, factor);
      add_direct(row, u, row.mask ? direct * e.load(row.mask, u) : direct);
    }
  }

  // LayerNorm: da of the sums to da of W x and R h', over whole rows; of a second
  // product's slot before that product, of all others at last.
  FUSEDRNN_DEVICE void normalise_second_backward(const BackRow* rows, int n,
                                                 const GradientRow& at) const {
    for (int group = 0; group < recurrent_groups; ++group) {
      if (is_second(group)) back_to_recurrent(rows, n, at, group);
    }
  }
  FUSEDRNN_DEVICE void normalise_backward(const BackRow* rows, int n,
                                          const GradientRow& at) const {
    for (int group = 0; group < input_groups; ++group) {
      back(rows, n, record.input(0), at.input - first_input * P, input_slots(group),
           group, true);
    }
    for (int group = 0; group < recurrent_groups; ++group) {
      if (!is_second(group)) back_to_recurrent(rows, n, at, group);
    }
  }

 private:
  static constexpr bool has_parts = [] {
    for (const Variant& v : Cell::variants) {
      if (v.second >= 0) return true;
    }
    return false;
  }();
  static constexpr bool may_lack_slots = [] {
    for (const Variant& v : Cell::variants) {
      if (v.absent >= 0) return true;
    }
    return false;
  }();

  // A GPU cannot index an array of the host.
  template <int at = 0>
  FUSEDRNN_DEVICE static constexpr Variant variant_of(int which) {
    constexpr Variant here = Cell::variants[at];
    if constexpr (at + 1 < sizeof(Cell::variants) / sizeof(Variant)) {
      return which == at ? here : variant_of<at + 1>(which);
    } else {
      return here;
    }
  }
  // Of n rows; a walk of one row need not loop.
  FUSEDRNN_DEVICE static constexpr int count(int n) { return E::most_rows == 1 ? 1 : n; }

  template <class Problem>
  FUSEDRNN_DEVICE static Extras<V> extras_of(const Problem& p, const E& e) {
    constexpr double none = __builtin_inf();
    Extras<V> x{};
    x.variant = p.model.variant;
    x.clips = p.options.clip < none;
    x.clips_cell = p.options.cell_clip < none;
    x.has_peephole = p.vectors.weight_ch;
    if (x.clips) {
      V bounds[4];
      e.bounds(p.options.clip, bounds);
      x.clip = e.kept(bounds[0]);
      x.sigmoid_low = e.kept(bounds[1]);
      x.sigmoid_high = e.kept(bounds[2]);
      x.tanh_high = e.kept(bounds[3]);
    }
    x.cell_clip = V::broadcast(static_cast<S>(p.options.cell_clip));
    return x;
  }
  // The extras of a unit: those of the call, and the unit's peepholes. By reference:
  // copied for each unit they took half of the time of a step backward.
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
    FUSEDRNN_DEVICE V bounded(V a) const { return of().bounded(a); }
    FUSEDRNN_DEVICE V bounded_cell(V c) const { return of().bounded_cell(c); }
    FUSEDRNN_DEVICE V through_sigmoid(V s, V da) const {
      return of().through_sigmoid(s, da);
    }
    FUSEDRNN_DEVICE V through_tanh(V s, V da) const { return of().through_tanh(s, da); }
    FUSEDRNN_DEVICE V through_bounds(V a, V da) const {
      return of().through_bounds(a, da);
    }
    FUSEDRNN_DEVICE V through_cell(V c, V dc) const { return of().through_cell(c, dc); }
  };
  FUSEDRNN_DEVICE UnitExtras extras_at(index u) const {
    return {*this, u, extras.variant};
  }

  // Of a block of one of `vectors`.
  FUSEDRNN_DEVICE V vector(const S* of, int block, index u) const {
    return e.load(of + block * (E::vectors_are_padded ? P : H), u);
  }
  FUSEDRNN_DEVICE static V mix(V keeps, V old, V fresh) {
    return fma(keeps, old, (V::broadcast(1) - keeps) * fresh);
  }
  FUSEDRNN_DEVICE void put_h(const Row& row, index u, V h) const {
    if (model.projects) {
      e.put(h, row.h, u, H);
    } else {
      finish(row, u, h);
    }
  }
  FUSEDRNN_DEVICE void add_direct(const BackRow& row, index u, V dh) const {
    if (!row.is_cut) e.store(e.load(row.direct, u) + dh, row.direct, u);
  }
  // Padding of da stays zero.
  FUSEDRNN_DEVICE void put_gradients(const BackRow& row, index u,
                                     const V (&v)[slots]) const {
    for (int k = 0; k < slots; ++k) e.put(v[k], row.da + k * P, u, H);
  }

  // LayerNorm

  struct Moments {
    S mean, scale;

    FUSEDRNN_DEVICE V normal(V x) const {
      return (x - V::broadcast(mean)) * V::broadcast(scale);
    }
  };
  FUSEDRNN_DEVICE static Range input_slots(int group) {
    constexpr Groups all(Cell::input_group, first_input);
    return all.slots[group];
  }
  FUSEDRNN_DEVICE static Range recurrent_slots(int group) {
    constexpr Groups all(Cell::recurrent_group, 0);
    return all.slots[group];
  }
  // Whether a group is the slot of a second product.
  FUSEDRNN_DEVICE bool is_second(int group) const {
    return has_parts && has_second() && recurrent_slots(group).begin == variant.second;
  }
  // Whether a slot has a pre-activation.
  FUSEDRNN_DEVICE bool exists(int k) const {
    return !may_lack_slots || k != variant.absent;
  }
  // to[r] = Σ f(r, slot, u) over some slots of n rows.
  template <class F>
  FUSEDRNN_DEVICE void sums(int n, Range of, const F& f, S* to) const {
    e.sums(
        count(n), H,
        [&](int r, index u) {
          V total = V::broadcast(0);
          for (index k = of.begin; k < of.end; ++k) {
            if (exists(static_cast<int>(k))) {
              total = total + f(r, static_cast<int>(k), u);
            }
          }
          return total;
        },
        to);
  }
  FUSEDRNN_DEVICE S size(Range of) const {
    index slots_in = 0;
    for (index k = of.begin; k < of.end; ++k) slots_in += exists(static_cast<int>(k));
    return static_cast<S>(slots_in * H);
  }
  // Of n rows of values value(r, k, u).
  template <class F>
  FUSEDRNN_DEVICE void moments(int n, Range slots_in, S values, const F& value,
                               Moments* of) const {
    S mean[E::most_rows], variance[E::most_rows];
    sums(n, slots_in, value, mean);
    for (int r = 0; r < count(n); ++r) mean[r] = mean[r] / values;
    sums(
        n, slots_in,
        [&](int r, int k, index u) {
          const V centred = value(r, k, u) - V::broadcast(mean[r]);
          return centred * centred;
        },
        variance);
    constexpr S epsilon = static_cast<S>(1e-5);
    for (int r = 0; r < count(n); ++r) {
      of[r] = {mean[r], 1 / e.root(variance[r] / values + epsilon)};
    }
  }
  // Of what stands first in scratch. One "slot" of a cell that lacks none.
  FUSEDRNN_DEVICE void moments_of_scratch(int n, Moments* of) const {
    const int one = variant.absent == 0 ? 1 : 0;
    moments(
        n, {one, one + 1}, static_cast<S>(H),
        [&](int r, int, index u) { return e.load(e.scratch(r), u); }, of);
  }
  FUSEDRNN_DEVICE void normalise_group(const Row* rows, int n, int group) const {
    normalise(rows, n, record.recurrent(0), recurrent_slots(group),
              Shape::most_groups + group);
  }
  // Slots of those that stand from `part` of a record on as if it began with slot 0.
  FUSEDRNN_LONG void normalise(const Row* rows, int n, index part, Range of_slots,
                               int group) const {
    Moments of[E::most_rows];
    moments(
        n, of_slots, size(of_slots),
        [&](int r, int k, index u) { return e.load(rows[r].record + part + k * P, u); },
        of);
    e.once([&] {
      for (int r = 0; r < count(n); ++r) {
        rows[r].record[record.scale() + group] = of[r].scale;
      }
    });
    for (int r = 0; r < count(n); ++r) {
      e.each(e.all(H), [&](index u) {
        for (index k = of_slots.begin; k < of_slots.end; ++k) {
          S* const at = rows[r].record + part + k * P;
          e.store(of[r].normal(e.load(at, u)), at, u);
        }
      });
    }
  }
  FUSEDRNN_DEVICE V scaled_cell(V n, index u) const {
    return fma(n, vector(vectors.gamma_c, 0, u), vector(vectors.beta_c, 0, u));
  }
  FUSEDRNN_DEVICE V gamma_x(int k, index u) const {
    constexpr Shape blocks = shape;
    return vector(vectors.gamma_ih, blocks.input[k], u);
  }
  FUSEDRNN_DEVICE V gamma_h(int k, index u) const {
    constexpr Shape blocks = shape;
    return vector(vectors.gamma_hh, blocks.recurrent[k], u);
  }

  // Pre-activations: sums or, with LayerNorm, from a record.
  FUSEDRNN_DEVICE void read(const Row& row, index u, V (&v)[slots]) const {
    if (model.norm) return read_normalised(row.record, u, v);
    for (int k = 0; k < slots; ++k) {
      v[k] = e.load(row.sums + k * row.sums_apart, u);
      if (!E::bias_is_in) v[k] = v[k] + e.load(bias + k * P, u);
    }
  }
  FUSEDRNN_DEVICE void read_normalised(const S* row, index u, V (&v)[slots]) const {
    for (int k = 0; k < slots; ++k) {
      v[k] = e.load(bias + k * P, u);
      if (k >= first_input) {
        v[k] = fma(gamma_x(k, u), e.load(row + record.input(k), u), v[k]);
      }
      if (k < gates) {
        v[k] = fma(gamma_h(k, u), e.load(row + record.recurrent(k), u), v[k]);
      }
    }
  }
  // What a record and a trace keep of them after the cell.
  FUSEDRNN_DEVICE void keep_gates(const Row& row, index u, const V (&v)[slots]) const {
    for (int k = 0; k < slots && row.kept && !model.norm; ++k) {
      e.store(v[k], row.kept + k * P, u);
    }
    for (int k = first_input; k < slots && row.trace; ++k) {
      e.put(v[k], row.trace + (k - first_input) * H, u, H);
    }
  }
  // The gates again.
  FUSEDRNN_DEVICE void activated(const BackRow& row, index u, V (&v)[slots]) const {
    if (!model.norm) {
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

  // dc through the later steps, past which `direct` goes.
  FUSEDRNN_DEVICE V dc_of(const BackRow& row, index u, V& direct) const {
    V dc = e.load(row.dc, u);
    direct = V::broadcast(0);
    if (row.dcells) dc = dc + e.upto(row.dcells, u, H);
    if (zones_out) {
      const V keeps = e.keep_c(row.keep_c, u);
      direct = dc * keeps;
      dc = dc * (V::broadcast(1) - keeps);
    }
    return dc;
  }
  FUSEDRNN_DEVICE void backward_c(const BackRow& row, const GradientRow& at, index u,
                                  V (&v)[slots], V c_prev, V c, V squashed, V dm, V dc,
                                  V direct, const UnitExtras& x) const {
    if (model.projects) {
      e.put(Cell::hidden(v[Cell::hidden_gate], squashed), row.da + at.m, u, H);
    }
    if (extras.has_peephole) {
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
    // Of a row: c, the gradient of c normalised, the gates.
    const auto c_at = [&](int r) { return e.scratch(r); };
    const auto d_normal_at = [&](int r) { return e.scratch(r) + P; };
    const auto gates_at = [&](int r) { return e.scratch(r) + 2 * P; };
    for (int r = 0; r < count(n); ++r) {
      e.each(e.all(H), [&](index u) {
        V v[slots];
        activated(rows[r], u, v);
        for (int k = 0; k < slots; ++k) e.store(v[k], gates_at(r) + k * P, u);
        const V c_prev = e.load(rows[r].c_prev, u);
        e.store(Cell::cell(v, c_prev, extras_at(u)), c_at(r), u);
      });
    }
    Moments of[E::most_rows];
    moments_of_scratch(n, of);
    for (int r = 0; r < count(n); ++r) {
      e.each(e.all(H), [&](index u) {
        const V n_c = of[r].normal(e.load(c_at(r), u));
        const V squashed = Cell::squash(scaled_cell(n_c, u));
        const V gate = e.load(gates_at(r) + Cell::hidden_gate * P, u);
        // -0 is what changes nothing that is added to it.
        const V d = Cell::hidden_backward(gate, squashed, e.load(dm[r], u),
                                          V::broadcast(static_cast<S>(-0.0)));
        e.put(n_c, rows[r].da + at.normal_c, u, H);
        e.put(d, rows[r].da + at.squashed, u, H);
        e.store(d * vector(vectors.gamma_c, 0, u), d_normal_at(r), u);
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
        for (int k = 0; k < slots; ++k) v[k] = e.load(gates_at(r) + k * P, u);
        const V c_prev = e.load(row.c_prev, u), n_c = normal(r, u);
        const UnitExtras x = extras_at(u);
        const V c = row.c ? e.load(row.c, u) : Cell::cell(v, c_prev, x);
        V direct;
        V dc = dc_of(row, u, direct);
        dc = fma(V::broadcast(of[r].scale), d(r, u) - middle - n_c * slope, dc);
        const V squashed = Cell::squash(scaled_cell(n_c, u));
        backward_c(row, at, u, v, c_prev, c, squashed, e.load(dm[r], u), dc, direct, x);
      });
    }
  }

  FUSEDRNN_DEVICE void back_to_recurrent(const BackRow* rows, int n,
                                         const GradientRow& at, int group) const {
    back(rows, n, record.recurrent(0), at.recurrent, recurrent_slots(group),
         Shape::most_groups + group, false);
  }
  // Slots of a group, in a record and in a row of gradients from where slot 0 would be.
  FUSEDRNN_LONG void back(const BackRow* rows, int n, index normal_at, index to_at,
                          Range of, int group, bool of_input) const {
    const auto normal = [&](int r, int k, index u) {
      return e.load(rows[r].record + normal_at + k * P, u);
    };
    const auto d = [&](int r, int k, index u) {
      const V gamma = of_input ? gamma_x(k, u) : gamma_h(k, u);
      return gamma * e.load(rows[r].da + k * P, u);
    };
    S mean[E::most_rows], along[E::most_rows];
    sums(n, of, d, mean);
    sums(
        n, of, [&](int r, int k, index u) { return d(r, k, u) * normal(r, k, u); },
        along);
    const S values = size(of);
    for (int r = 0; r < count(n); ++r) {
      const V middle = V::broadcast(mean[r] / values);
      const V slope = V::broadcast(along[r] / values);
      const V scale = V::broadcast(rows[r].record[record.scale() + group]);
      e.each(e.all(H), [&](index u) {
        for (index at = of.begin; at < of.end; ++at) {
          const int k = static_cast<int>(at);
          const V back = scale * (d(r, k, u) - middle - normal(r, k, u) * slope);
          e.put(exists(k) ? back : V::broadcast(0), rows[r].da + to_at + k * P, u, H);
        }
      });
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
