// What a step does row by row, with any option, where the plain kernels do not do: after
// its product has left the pre-activations of a row in memory, or dh of it. Written once
// for the CPU, where a thread walks along a row in vectors, and for GPUs, where the
// threads of a block share it out or one has a unit of it.
//
//   forward   [LayerNorm]  the cell  zoneout of c | [projection]  zoneout of h
//   backward  zoneout of h | [projection]  zoneout of c  the cell  [LayerNorm]
//
// and a GRU that is reset before its matmul takes the cell in two parts. A bar is where a
// thread may need what others have computed.
//
// A record holds of a row and step (slots [| c], P), as the plain kernels leave it; with
// LayerNorm instead
//
//   n_x (gates, P), n_h (gates, P)   W x and R h', normalised, in the order of slots
//   c (P)
//   1/σ of n_x's and n_h's groups    a group of slots is normalised together
//
// from which backward computes the gates again. A row of gradients holds
//
//   da (slots, P)          as the plain kernels leave it
//   da_x, da_h (gates, P)  with LayerNorm: of W x and R h'; da itself is of their sum
//   d_seen, n_c (P)        with LayerNorm of c: of what tanh sees, and c normalised
//   c_prev, c (P)          with peepholes: what the gates saw
//   seen (P)               reset before the matmul: r h'
//   dh (R), m (P)          with a projection: of h, and what is projected
//
// P is H, rounded up where rows are padded. What E is:
//
//   V, S                   the cell's vector, its scalar
//   each(units, f)         f(u) for units, several at a time if V has lanes
//   sum(H, f)              Σ f(u) over a whole row, the same to all who share it
//   load(p, u), store      of rows that are padded
//   upto(p, u, n), put     of rows that end at n
//   keep_h(u), keep_c(u)   how much of a unit's state zoneout keeps, of the row at hand
//   scratch                (2 + slots, P) for a row, each unit's values its owner's
//   once(f), all(n)        f by one of those who share the row; the units of a whole row
//   root(x)                √x
//   kept(x)                what a record makes of it
//   bias_is_in             whether sums start at the bias
#pragma once

#include "cells/cell.h"
#include "problem.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// The block of rows of weight_ih and of weight_hh behind each slot, or -1.
template <class Cell>
struct SlotBlocks {
  static constexpr int first_input = Cell::slots - Cell::gates;
  int input[Cell::slots], recurrent[Cell::slots];

  constexpr SlotBlocks() : input{}, recurrent{} {
    for (int s = 0; s < Cell::slots; ++s) {
      input[s] = s < first_input ? -1 : Cell::input_gate[s - first_input];
      recurrent[s] = s < Cell::gates ? Cell::recurrent_gate[s] : -1;
    }
  }
};

// A GRU whose reset gate is applied before the matmul.
template <class Cell>
FUSEDRNN_DEVICE constexpr bool resets_before(const Model& m) {
  return Cell::has_direct && m.variant == 1;
}
// An LSTM whose forget gate has no pre-activation.
template <class Cell>
FUSEDRNN_DEVICE constexpr bool is_coupled(const Model& m) {
  return Cell::has_c && m.variant == 1;
}

// Whether backward needs a record of the slots, h not telling them: where zoneout draws,
// a unit that keeps its h gives its slots no gradient, whatever they are.
template <class Cell>
constexpr bool saves_slots(const Options& o) {
  return Cell::saves || (!o.training && zones_out(o));
}

// Where the parts of a record are.
template <class Cell>
struct Record {
  static constexpr int gates = Cell::gates, slots = Cell::slots;
  static constexpr int first_input = slots - gates;
  static constexpr index stats = 8;
  bool norm;
  index P;

  // Of the input part of slot k, and of its recurrent part.
  FUSEDRNN_DEVICE index input(int k) const { return (norm ? k - first_input : k) * P; }
  FUSEDRNN_DEVICE index recurrent(int k) const { return (norm ? gates + k : k) * P; }
  FUSEDRNN_DEVICE index cell() const { return (norm ? 2 * gates : slots) * P; }
  FUSEDRNN_DEVICE index scale() const { return cell() + Cell::has_c * P; }
  FUSEDRNN_DEVICE index values() const { return scale() + (norm ? stats : 0); }
};

// Where the parts of a row of gradients are.
template <class Cell>
struct GradientRow {
  static constexpr int gates = Cell::gates, slots = Cell::slots;
  index input, recurrent;  // of what W and R are multiplied by
  index seen_c, normal_c, c_prev, c, reset, dh, m, values;

  GradientRow() = default;
  constexpr GradientRow(const Model& model, bool has_peephole, index P, index R)
      : values(slots * P) {
    const auto take = [&](bool exists, index size) {
      const index at = values;
      values += exists ? size : 0;
      return at;
    };
    const bool norm_c = model.norm && Cell::has_c;
    input = model.norm ? take(true, gates * P) : (slots - gates) * P;
    recurrent = model.norm ? take(true, gates * P) : 0;
    seen_c = take(norm_c, P);
    normal_c = take(norm_c, P);
    c_prev = take(has_peephole, P);
    c = take(has_peephole, P);
    reset = take(resets_before<Cell>(model), P);
    dh = take(model.projects, R);
    m = take(model.projects, P);
  }
};

template <class Cell, class E>
class RowWise {
  using V = typename E::V;
  using S = typename E::S;
  static constexpr int gates = Cell::gates, slots = Cell::slots;
  static constexpr int first_input = slots - gates;
  // A GRU's new gate is normalised apart from the others: the last slot of the input
  // part, the first of the recurrent one.
  static constexpr bool split = Cell::has_direct;
  static constexpr int end_x = split ? slots - 1 : slots, begin_h = split ? 1 : 0;

 public:
  using Walked = E;
  const Model model;
  const Vectors<const S> vectors;
  const index H, R, P;
  const Record<Cell> record;
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
        record{p.model.norm, padded},
        bias(packed_bias),
        zones_out(p.options.zoneout_h > 0 || p.options.zoneout_c > 0),
        e(walk),
        extras(extras_of(p, walk)) {}

  // Forward

  struct Row {
    S* record;
    const S *h_prev, *c_prev, *seen;  // where the cell needs them
    S* c;                             // of the record
    S* h;                             // as the cell leaves it; m where that is projected
    S *cells, *trace;                 // or null
  };

  FUSEDRNN_DEVICE void normalise_inputs(S* at) const {
    e.once([&] {
      for (int group = 0; group < record.stats; ++group) at[record.scale() + group] = 0;
    });
    normalise(at, record.input(0), first_input, end_x, 0);
    if (split) normalise(at, record.input(0), end_x, slots, 1);
  }
  // Of a GRU that is reset before the first waits for its product.
  FUSEDRNN_DEVICE void normalise_recurrent(S* at) const {
    normalise(at, record.recurrent(0), begin_h, gates, 2);
    if (split && model.variant == 0) normalise_first(at);
  }
  FUSEDRNN_DEVICE void normalise_first(S* at) const {
    normalise(at, record.recurrent(0), 0, begin_h, 3);
  }

  template <class Units>
  FUSEDRNN_DEVICE void forward(const Row& row, Units units) const {
    const bool norm_c = Cell::has_c && model.norm;
    e.each(units, [&](index u) {
      V v[slots];
      read(row.record, u, v);
      State<V> prev{};
      if constexpr (Cell::has_direct) prev.h = e.upto(row.h_prev, u, H);
      if constexpr (Cell::has_c) {
        prev.c = e.load(row.c_prev, u);
        const V c = Cell::forward_c(v, prev.c, extras_at(u));
        const V kept = zones_out ? mix(e.keep_c(u), prev.c, c) : c;
        e.store(kept, row.c, u);
        if (row.cells) e.put(kept, row.cells, u, H);
        if (norm_c) {
          e.store(c, e.scratch, u);
          e.store(v[Cell::O], e.scratch + P, u);
        } else {
          e.put(v[Cell::O] * tanh(c), row.h, u, H);
        }
      } else {
        e.put(Cell::forward(v, prev, extras_at(u)).h, row.h, u, H);
      }
      keep_gates(row, u, v);
    });
    if (!norm_c) return;
    const Moments of = moments(e.scratch, 0, 1);
    e.each(units, [&](index u) {
      const V n = of.normal(e.load(e.scratch, u));
      e.put(e.load(e.scratch + P, u) * tanh(seen_cell(n, u)), row.h, u, H);
    });
  }

  // The two parts of a GRU that is reset before: r h', and the rest.
  template <class Units>
  FUSEDRNN_DEVICE void open(const Row& row, S* reset, Units units) const {
    if constexpr (Cell::has_direct) {
      e.each(units, [&](index u) {
        V v[slots];
        read(row.record, u, v);
        Cell::open(v, extras_at(u));
        e.put(v[1] * e.upto(row.seen, u, H), reset, u, H);
        for (int k = 1; k < gates && !model.norm; ++k) {
          e.store(v[k], row.record + k * P, u);
        }
      });
    }
  }
  template <class Units>
  FUSEDRNN_DEVICE void close(const Row& row, Units units) const {
    if constexpr (Cell::has_direct) {
      e.each(units, [&](index u) {
        V v[slots];
        if (model.norm) {
          read(row.record, u, v);
          Cell::open(v, extras_at(u));
        } else {  // open did that, and what the product left lacks its bias
          for (int k = 0; k < slots; ++k) v[k] = e.load(row.record + k * P, u);
          v[0] = v[0] + e.load(bias, u);
          if (!E::bias_is_in) v[3] = v[3] + e.load(bias + 3 * P, u);
        }
        const State<V> prev{e.upto(row.h_prev, u, H), {}};
        e.put(Cell::close(v, v[3] + v[0], prev, extras_at(u)).h, row.h, u, H);
        keep_gates(row, u, v);
      });
    }
  }

  // h, as the cell left it, through zoneout, and what R will see of it.
  template <class Units>
  FUSEDRNN_DEVICE void after(S* h, const S* h_prev, const S* mask, S* seen,
                             Units units) const {
    if (!zones_out && !seen) return;
    e.each(units, [&](index u) {
      V now = e.upto(h, u, R);
      if (zones_out) {
        now = mix(e.keep_h(u), e.upto(h_prev, u, R), now);
        e.put(now, h, u, R);
      }
      if (seen) e.put(mask ? now * e.load(mask, u) : now, seen, u, R);
    });
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
  };

  // dh before zoneout; the rest goes past the cell.
  template <class Units>
  FUSEDRNN_DEVICE void before(const BackRow& row, Units units) const {
    const V zero = V::broadcast(0), one = V::broadcast(1);
    e.each(units, [&](index u) {
      V direct = zero;
      if (zones_out) {
        const V keeps = e.keep_h(u), dh = e.load(row.dh, u);
        e.store(dh * (one - keeps), row.dh, u);
        direct = dh * keeps;
      }
      e.store(row.is_cut ? zero : direct, row.direct, u);
    });
  }

  // From dm, the gradient of what the cell made, to da.
  template <class Units>
  FUSEDRNN_DEVICE void backward(const BackRow& row, const GradientRow<Cell>& at,
                                const S* dm, Units units) const {
    if constexpr (Cell::has_c) {
      backward_c(row, at, dm, units);
    } else {
      e.each(units, [&](index u) {
        V v[slots];
        activated(row, u, v);
        State<V> prev{};
        if constexpr (Cell::has_direct) prev.h = e.upto(row.h_prev, u, H);
        const State<V> d = Cell::backward(v, prev, V{}, e.load(dm, u), V{}, extras_at(u));
        if constexpr (Cell::has_direct) add_direct(row, u, d.h);
        put_gradients(row, u, v);
      });
    }
    if (model.norm) normalise_backward(row, at);
  }

  // The same in two parts for a GRU that is reset before. da of the new gate goes to
  // where R_n reads it; `d_reset` is what comes back.
  template <class Units>
  FUSEDRNN_DEVICE void open_backward(const BackRow& row, const GradientRow<Cell>& at,
                                     Units units) const {
    if constexpr (Cell::has_direct) {
      e.each(units, [&](index u) {
        V v[slots];
        activated(row, u, v);
        const V r = v[1];
        const State<V> prev{e.upto(row.h_prev, u, H), {}};
        add_direct(row, u, Cell::open_backward(v, prev, e.load(row.dh, u), extras_at(u)));
        v[1] = r;
        put_gradients(row, u, v);
        e.put(r * e.upto(row.seen, u, H), row.da + at.reset, u, H);
      });
      if (model.norm) back_to_recurrent(row, at, 0, begin_h);
    }
  }
  template <class Units>
  FUSEDRNN_DEVICE void close_backward(const BackRow& row, const GradientRow<Cell>& at,
                                      const S* d_reset, const S* mask,
                                      Units units) const {
    if constexpr (Cell::has_direct) {
      e.each(units, [&](index u) {
        const V r = e.load(row.da + P, u), d = e.load(d_reset, u);
        const V da_r = Cell::reset_gradient(r, d * e.upto(row.seen, u, H), extras_at(u));
        e.put(da_r, row.da + P, u, H);
        add_direct(row, u, mask ? d * r * e.load(mask, u) : d * r);
      });
      if (model.norm) normalise_backward(row, at);
    }
  }

 private:
  template <class Problem>
  FUSEDRNN_DEVICE static Extras<V> extras_of(const Problem& p, const E& e) {
    const auto broadcast = [](double x) { return V::broadcast(static_cast<S>(x)); };
    constexpr double none = __builtin_inf();
    Extras<V> x{};
    x.variant = p.model.variant;
    x.clips = p.options.clip < none;
    x.clips_cell = p.options.cell_clip < none;
    x.has_peephole = p.vectors.weight_ch;
    if (x.clips) {
      const V clip = broadcast(p.options.clip);
      x.clip = e.kept(clip);
      x.sigmoid_low = e.kept(sigmoid(broadcast(-p.options.clip)));
      x.sigmoid_high = e.kept(sigmoid(clip));
      x.tanh_high = e.kept(tanh(clip));
    }
    x.cell_clip = broadcast(p.options.cell_clip);
    return x;
  }
  FUSEDRNN_DEVICE Extras<V> extras_at(index u) const {
    Extras<V> x = extras;
    if constexpr (Cell::has_c) {
      for (int k = 0; k < Cell::peepholes && x.has_peephole; ++k) {
        x.peephole[k] = e.upto(vectors.weight_ch + k * H, u, H);
      }
    }
    return x;
  }

  FUSEDRNN_DEVICE static V mix(V keeps, V old, V fresh) {
    return fma(keeps, old, (V::broadcast(1) - keeps) * fresh);
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
  // Whether a slot has a pre-activation.
  FUSEDRNN_DEVICE bool exists(int k) const {
    if constexpr (Cell::has_c) return k != Cell::F || !is_coupled<Cell>(model);
    return true;
  }
  // Σ f(slot, u) over slots [begin, end) of a row.
  template <class F>
  FUSEDRNN_DEVICE S sum(int begin, int end, const F& f) const {
    return e.sum(H, [&](index u) {
      V total = V::broadcast(0);
      for (int k = begin; k < end; ++k) {
        if (exists(k)) total = total + f(k, u);
      }
      return total;
    });
  }
  FUSEDRNN_DEVICE S count(int begin, int end) const {
    int slots_in = 0;
    for (int k = begin; k < end; ++k) slots_in += exists(k);
    return static_cast<S>(slots_in * H);
  }
  FUSEDRNN_DEVICE Moments moments(const S* row, int begin, int end) const {
    const auto value = [&](int k, index u) { return e.load(row + (k - begin) * P, u); };
    const S mean = sum(begin, end, value) / count(begin, end);
    const S variance = sum(begin, end,
                           [&](int k, index u) {
                             const V centred = value(k, u) - V::broadcast(mean);
                             return centred * centred;
                           }) /
                       count(begin, end);
    constexpr S epsilon = static_cast<S>(1e-5);
    return {mean, 1 / e.root(variance + epsilon)};
  }
  // Slots [begin, end) of those that stand from `part` of a record on as if it began with
  // slot 0.
  FUSEDRNN_DEVICE void normalise(S* row, index part, int begin, int end,
                                 int group) const {
    const Moments of = moments(row + part + begin * P, begin, end);
    e.once([&] { row[record.scale() + group] = of.scale; });
    e.each(e.all(H), [&](index u) {
      for (int k = begin; k < end; ++k) {
        S* const at = row + part + k * P;
        e.store(of.normal(e.load(at, u)), at, u);
      }
    });
  }
  FUSEDRNN_DEVICE V seen_cell(V n, index u) const {
    return fma(n, e.upto(vectors.gamma_c, u, H), e.upto(vectors.beta_c, u, H));
  }
  FUSEDRNN_DEVICE V gamma_x(int k, index u) const {
    constexpr SlotBlocks<Cell> blocks{};
    return e.upto(vectors.gamma_ih + blocks.input[k] * H, u, H);
  }
  FUSEDRNN_DEVICE V gamma_h(int k, index u) const {
    constexpr SlotBlocks<Cell> blocks{};
    return e.upto(vectors.gamma_hh + blocks.recurrent[k] * H, u, H);
  }

  // Pre-activations.
  FUSEDRNN_DEVICE void read(const S* row, index u, V (&v)[slots]) const {
    for (int k = 0; k < slots; ++k) {
      if (!model.norm) {
        v[k] = e.load(row + k * P, u);
        if (!E::bias_is_in) v[k] = v[k] + e.load(bias + k * P, u);
        continue;
      }
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
    for (int k = 0; k < slots && !model.norm; ++k) {
      e.store(v[k], row.record + k * P, u);
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
    read(row.record, u, v);
    if constexpr (Cell::has_c) {
      Cell::forward_c(v, e.load(row.c_prev, u), extras_at(u));
    } else if constexpr (Cell::has_direct) {
      const State<V> prev{e.upto(row.h_prev, u, H), {}};
      if (resets_before<Cell>(model)) {
        Cell::open(v, extras_at(u));
        Cell::close(v, v[3] + v[0], prev, extras_at(u));
      } else {
        Cell::forward(v, prev, extras_at(u));
      }
    }
  }

  template <class Units>
  FUSEDRNN_DEVICE void backward_c(const BackRow& row, const GradientRow<Cell>& at,
                                  const S* dm, Units units) const {
    if constexpr (Cell::has_c) {
      const V one = V::broadcast(1);
      Moments of{};
      S mean = 0, along = 0;  // of the gradient of c normalised
      S *saw = nullptr, *d_normal = nullptr, *again = nullptr;
      if (model.norm) {
        saw = e.scratch;
        d_normal = e.scratch + P;
        again = e.scratch + 2 * P;  // the gates
        e.each(units, [&](index u) {
          V v[slots];
          activated(row, u, v);
          for (int k = 0; k < slots; ++k) e.store(v[k], again + k * P, u);
          e.store(Cell::cell(v, e.load(row.c_prev, u), extras_at(u)), saw, u);
        });
        of = moments(saw, 0, 1);
        e.each(units, [&](index u) {
          const V n = of.normal(e.load(saw, u)), tanh_c = tanh(seen_cell(n, u));
          const V o = e.load(again + Cell::O * P, u);
          const V d_seen = e.load(dm, u) * o * (one - tanh_c * tanh_c);
          e.put(n, row.da + at.normal_c, u, H);
          e.put(d_seen, row.da + at.seen_c, u, H);
          e.store(d_seen * e.upto(vectors.gamma_c, u, H), d_normal, u);
        });
        const auto d = [&](index u) { return e.load(d_normal, u); };
        const auto n = [&](index u) { return e.load(row.da + at.normal_c, u); };
        mean = e.sum(H, d) / count(0, 1);
        along = e.sum(H, [&](index u) { return d(u) * n(u); }) / count(0, 1);
      }
      e.each(units, [&](index u) {
        V v[slots];
        for (int k = 0; k < slots; ++k) {
          v[k] = e.load((model.norm ? again : row.record) + k * P, u);
        }
        const V c_prev = e.load(row.c_prev, u), dh = e.load(dm, u);
        V dc = e.load(row.dc, u), direct = V::broadcast(0);
        if (row.dcells) dc = dc + e.upto(row.dcells, u, H);
        if (zones_out) {
          const V keeps = e.keep_c(u);
          direct = dc * keeps;
          dc = dc * (one - keeps);
        }
        const Extras<V> x = extras_at(u);
        const V c = row.c ? e.load(row.c, u) : Cell::cell(v, c_prev, x);
        V tanh_c;
        if (model.norm) {
          const V n = e.load(row.da + at.normal_c, u);
          const V d = e.load(d_normal, u) - V::broadcast(mean) - n * V::broadcast(along);
          tanh_c = tanh(seen_cell(n, u));
          dc = fma(V::broadcast(of.scale), d, dc);
        } else {
          tanh_c = tanh(c);
          dc = fma(dh * v[Cell::O], one - tanh_c * tanh_c, dc);
        }
        if (model.projects) e.put(v[Cell::O] * tanh_c, row.da + at.m, u, H);
        if (x.has_peephole) {
          e.put(c_prev, row.da + at.c_prev, u, H);
          e.put(c, row.da + at.c, u, H);
        }
        const V dc_prev = direct + Cell::backward_c(v, c_prev, c, tanh_c, dh, dc, x);
        e.store(row.is_cut ? V::broadcast(0) : dc_prev, row.dc, u);
        put_gradients(row, u, v);
      });
    }
  }

  // da of the sums to da of W x and R h', over whole rows.
  FUSEDRNN_DEVICE void normalise_backward(const BackRow& row,
                                          const GradientRow<Cell>& at) const {
    const auto gamma = [&](int k, index u) { return gamma_x(k, u); };
    back(row, record.input(0), at.input - first_input * P, first_input, end_x, 0, gamma);
    if (split) {
      back(row, record.input(0), at.input - first_input * P, end_x, slots, 1, gamma);
    }
    back_to_recurrent(row, at, begin_h, gates);
    if (split && model.variant == 0) back_to_recurrent(row, at, 0, begin_h);
  }
  FUSEDRNN_DEVICE void back_to_recurrent(const BackRow& row, const GradientRow<Cell>& at,
                                         int begin, int end) const {
    back(row, record.recurrent(0), at.recurrent, begin, end, split && begin == 0 ? 3 : 2,
         [&](int k, index u) { return gamma_h(k, u); });
  }
  // Slots [begin, end) of a group, in a record and in a row of gradients from where slot
  // 0 would be.
  template <class F>
  FUSEDRNN_DEVICE void back(const BackRow& row, index normal_at, index to_at, int begin,
                            int end, int group, const F& gamma) const {
    const auto normal = [&](int k, index u) {
      return e.load(row.record + normal_at + k * P, u);
    };
    const auto d = [&](int k, index u) {
      return gamma(k, u) * e.load(row.da + k * P, u);
    };
    const S scale = row.record[record.scale() + group];
    const V mean = V::broadcast(sum(begin, end, d) / count(begin, end));
    const S along =
        sum(begin, end, [&](int k, index u) { return d(k, u) * normal(k, u); });
    const V slope = V::broadcast(along / count(begin, end));
    e.each(e.all(H), [&](index u) {
      for (int k = begin; k < end; ++k) {
        const V back = V::broadcast(scale) * (d(k, u) - mean - normal(k, u) * slope);
        e.put(exists(k) ? back : V::broadcast(0), row.da + to_at + k * P, u, H);
      }
    });
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
