// This header has the rows of a step, the walk along them, and LayerNorm over whole rows;
// pointwise.h builds the steps of the cells on it. It is written once for the CPU, where
// a thread walks along rows in vectors, and for GPUs, where the threads of a block share
// a row or one thread has a unit of it. The walk, E, provides:
//
//   V, S, lanes            the cell's vector, its scalar, elements of a vector
//   parts                  the bits of `changes` that options may have
//   norm(model)            whether there is LayerNorm, a constant where the walk knows it
//   most_rows              the most rows that are taken together
//   each(units, f)         calls f(u) for units, several at a time if V has lanes
//   sums(n, H, f, to)      to[r] = Σ f(r, u) over whole rows, for all threads of a row
//   load(p, u), store      access rows that are padded
//   upto(p, u, n), put     access rows that end at n
//   keep_h(row, u), keep_c return how much of a unit's state zoneout keeps
//   scratch(r)             (2 + slots, P) for a row; each thread uses its own units only
//   once(f), all(n)        calls f in one of a row's threads; the units of a whole row
//   rounded(x)             x as a record rounds it
//   bounds(clip, activations, to)  to[5]: clip and the activations there (clip_bounds)
//   bias_is_in             whether the product's sums start at the bias
//   vectors_are_padded     whether the blocks of `vectors` have P elements, or H
#pragma once

#include "record.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// A forward step reads and writes these arrays of a row.
template <class S>
struct ForwardRow {
  S* record;
  const S* sums;  // pre-activations; slot k begins at k * sums_apart
  index sums_apart;
  const S *h_prev, *c_prev, *h_dropped;  // where the cell needs them; R reads h_dropped
  S* c;
  S* h;                      // or the operand of the projection
  S *cells, *trace;          // or null
  S* next_h_dropped;         // h · mask, which R reads in the next step; or null
  const S* mask;             // or null
  const S *keep_h, *keep_c;  // what zoneout keeps, unless the walk has it
  S* saved_slots;            // the record, where backward needs the slots; or null
};

// A backward step reads and writes these arrays of a row.
template <class S>
struct BackwardRow {
  const S* record;  // or h, for a cell whose slot follows from h
  const S *h_prev, *c_prev;
  const S* c;  // before zoneout, or null: computed from the gates
  const S* h_dropped;
  const S* dcells;      // or null
  S *dh, *dc, *direct;  // padded; dh becomes the gradient of h before zoneout
  S* da;                // a row of gradients
  bool is_cut;
  const S* mask;             // of h_dropped, or null
  const S *keep_h, *keep_c;  // what zoneout keeps, unless the walk has it
};

// NormalisedRows has the arguments of a call and applies LayerNorm (Ba et al. 2016) to
// its rows.
template <class Cell, class E>
class NormalisedRows {
 protected:
  using V = typename E::V;
  using S = typename E::S;
  static constexpr int gates = Cell::gates, slots = Cell::slots;
  static constexpr int first_input = slots - gates;
  FUSEDRNN_DEVICE static constexpr Shape shape() {
    constexpr Shape of_cell = shape_of<Cell>(0);
    return of_cell;
  }

 public:
  using Row = ForwardRow<S>;
  using BackRow = BackwardRow<S>;

  const Model model;
  const Vectors<const S> vectors;
  const index H, R, P;
  const Variant variant;
  const Record record;
  const S* const bias;  // (slots, P)
  const E e;

  template <class Problem>
  FUSEDRNN_DEVICE NormalisedRows(const Problem& p, index padded, const S* packed_bias,
                                 const E& walk)
      : model(p.model),
        vectors(p.vectors),
        H(p.model.H),
        R(p.model.R),
        P(padded),
        variant(variant_of(p.model.variant)),
        record(shape(), p.model.norm, padded),
        bias(packed_bias),
        e(walk) {}

  FUSEDRNN_DEVICE static bool has_second(const Model& m) {
    return variant_of(m.variant).second >= 0;
  }
  FUSEDRNN_DEVICE bool has_second() const { return variant.second >= 0; }
  FUSEDRNN_DEVICE bool norm() const { return E::norm(model); }

  // normalise_inputs takes the groups of W x, normalise_recurrent those of R h' in the
  // first product, normalise_second those in a second product.
  FUSEDRNN_DEVICE void normalise_inputs(const Row* rows, int n) const {
    e.once([&] {
      for (int r = 0; r < count(n); ++r) {
        for (int group = 0; group < record.stats; ++group) {
          rows[r].record[record.scale() + group] = 0;
        }
      }
    });
    each_group<true>([&]<index size>(Range of, int group) {
      normalise<size>(rows, n, record.input(0), of, group);
    });
  }
  FUSEDRNN_DEVICE void normalise_recurrent(const Row* rows, int n) const {
    normalise_groups(rows, n, false);
  }
  FUSEDRNN_DEVICE void normalise_second(const Row* rows, int n) const {
    normalise_groups(rows, n, true);
  }

  // The backward functions turn da of the sums into da of W x and R h', over whole rows:
  // the first one for the slot of a second product, before that product, the other for
  // all other slots, last.
  FUSEDRNN_DEVICE void normalise_second_backward(const BackRow* rows, int n,
                                                 const GradientRow& at) const {
    recurrent_backward(rows, n, at, true);
  }
  FUSEDRNN_DEVICE void normalise_backward(const BackRow* rows, int n,
                                          const GradientRow& at) const {
    each_group<true>([&]<index size>(Range of, int group) {
      group_backward<size>(rows, n, record.input(0), at.input - first_input * P, of,
                           group, true);
    });
    recurrent_backward(rows, n, at, false);
  }

 protected:
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

  // The recursion replaces an index: a GPU cannot index an array of the host.
  template <int at = 0>
  FUSEDRNN_DEVICE static constexpr Variant variant_of(int which) {
    constexpr Variant here = Cell::variants[at];
    if constexpr (at + 1 < sizeof(Cell::variants) / sizeof(Variant)) {
      return which == at ? here : variant_of<at + 1>(which);
    } else {
      return here;
    }
  }
  // Returns the number of rows to loop over, a constant for a walk of one row.
  FUSEDRNN_DEVICE static constexpr int count(int n) { return E::most_rows == 1 ? 1 : n; }

  // Loads the values of the units from u on of one block of a parameter vector.
  FUSEDRNN_DEVICE V vector(const S* of, int block, index u) const {
    return e.load(of + block * (E::vectors_are_padded ? P : H), u);
  }
  // Moments holds the mean and 1/σ of some rows.
  struct Moments {
    S mean[E::most_rows], scale[E::most_rows];

    FUSEDRNN_DEVICE V normal(int r, V x) const {
      return (x - V::broadcast(mean[r])) * V::broadcast(scale[r]);
    }
  };
  // Calls f<size>(slots, group) for each group of W x, or of R h'. Code compiled for size
  // has <0>, one function for all sizes.
  template <bool of_input, int group = 0, class F>
  FUSEDRNN_DEVICE static void each_group(const F& f) {
    constexpr Groups all = of_input ? Groups(Cell::input_group, first_input)
                                    : Groups(Cell::recurrent_group, 0);
    if constexpr (group < all.count) {
      constexpr Range of = all.slots[group];
      f.template operator()<is_small ? 0 : of.end - of.begin>(of, group);
      each_group<of_input, group + 1>(f);
    }
  }
  // Returns whether a group is the slot of a second product.
  FUSEDRNN_DEVICE bool is_second(Range of) const {
    return has_parts && has_second() && of.begin == variant.second;
  }
  // Returns whether a slot has a pre-activation.
  FUSEDRNN_DEVICE bool exists(int k) const {
    return !may_lack_slots || k != variant.absent;
  }
  // Calls f(slot) for each slot of a group of `size` slots, or of any size if `size` is
  // 0.
  template <index size, class F>
  FUSEDRNN_DEVICE static void each_slot(Range of, const F& f) {
    const int first = static_cast<int>(of.begin);
    const int slots_in = size > 0 ? size : static_cast<int>(of.end) - first;
    FUSEDRNN_UNROLL
    for (int i = 0; i < slots_in; ++i) f(first + i);
  }
  // Sums some slots of n rows: to[r] = Σ f(r, slot, u).
  template <index size, class F>
  FUSEDRNN_DEVICE void sums(int n, Range of, const F& f, S* to) const {
    e.sums(
        count(n), H,
        [&](int r, index u) {
          V total = V::broadcast(0);
          each_slot<size>(of, [&](int k) {
            if (exists(k)) total = total + f(r, k, u);
          });
          return total;
        },
        to);
  }
  FUSEDRNN_DEVICE S values_in(Range of) const {
    index slots_in = 0;
    for (index k = of.begin; k < of.end; ++k) slots_in += exists(static_cast<int>(k));
    return static_cast<S>(slots_in * H);
  }
  // Computes the moments of n rows of `values` values each; sum(f, to) adds f(r, …) up.
  template <class Sum, class F>
  FUSEDRNN_DEVICE void moments(int n, S values, const Sum& sum, const F& value,
                               Moments& of) const {
    const V one = V::broadcast(1), epsilon = V::broadcast(static_cast<S>(1e-5));
    sum(value, of.mean);
    for_rows(n, of.mean, [&](V total) { return total / V::broadcast(values); });
    sum(
        [&](int r, auto... at) {
          const V centred = value(r, at...) - V::broadcast(of.mean[r]);
          return centred * centred;
        },
        of.scale);
    for_rows(n, of.scale,
             [&](V total) { return one / root(total / V::broadcast(values) + epsilon); });
  }
  // Applies f to one value of each of n rows, in vectors.
  template <class F>
  FUSEDRNN_DEVICE static void for_rows(int n, S* of, const F& f) {
    for (int r = 0; r < count(n); r += E::lanes) E::store(f(E::load(of, r)), of, r);
  }
  // Computes the moments of n rows with one value for each unit.
  template <class F>
  FUSEDRNN_DEVICE void moments_of(int n, const F& value, Moments& of) const {
    const auto sum = [&](const auto& f, S* to) { e.sums(count(n), H, f, to); };
    moments(n, static_cast<S>(H), sum, value, of);
  }
  // Normalises the recurrent groups of the first product, or of the second.
  FUSEDRNN_DEVICE void normalise_groups(const Row* rows, int n, bool of_second) const {
    each_group<false>([&]<index size>(Range of, int group) {
      if (is_second(of) != of_second) return;
      normalise<size>(rows, n, record.recurrent(0), of, Shape::most_groups + group);
    });
  }
  // Normalises a group of slots. Slot 0 would begin at `part` of a record.
  template <index size>
  FUSEDRNN_LONG void normalise(const Row* rows, int n, index part, Range of_slots,
                               int group) const {
    Moments of{};
    moments(
        n, values_in(of_slots),
        [&](const auto& f, S* to) { sums<size>(n, of_slots, f, to); },
        [&](int r, int k, index u) { return e.load(rows[r].record + part + k * P, u); },
        of);
    e.once([&] {
      for (int r = 0; r < count(n); ++r) {
        rows[r].record[record.scale() + group] = of.scale[r];
      }
    });
    for (int r = 0; r < count(n); ++r) {
      e.each(e.all(H), [&](index u) {
        each_slot<size>(of_slots, [&](int k) {
          S* const at = rows[r].record + part + k * P;
          e.store(of.normal(r, e.load(at, u)), at, u);
        });
      });
    }
  }
  FUSEDRNN_DEVICE V scaled_cell(V n, index u) const {
    return fma(n, vector(vectors.gamma_c, 0, u), vector(vectors.beta_c, 0, u));
  }
  FUSEDRNN_DEVICE V gamma_x(int k, index u) const {
    constexpr Shape blocks = shape_of<Cell>(0);
    return vector(vectors.gamma_ih, blocks.input[k], u);
  }
  FUSEDRNN_DEVICE V gamma_h(int k, index u) const {
    constexpr Shape blocks = shape_of<Cell>(0);
    return vector(vectors.gamma_hh, blocks.recurrent[k], u);
  }

  FUSEDRNN_DEVICE void read_normalised(const S* row, index u, V (&v)[slots]) const {
    FUSEDRNN_UNROLL
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
  FUSEDRNN_DEVICE void recurrent_backward(const BackRow* rows, int n,
                                          const GradientRow& at, bool of_second) const {
    each_group<false>([&]<index size>(Range of, int group) {
      if (is_second(of) != of_second) return;
      group_backward<size>(rows, n, record.recurrent(0), at.recurrent, of,
                           Shape::most_groups + group, false);
    });
  }
  // Takes the slots of a group backward. Slot 0 would begin at `normal_at` of a record
  // and at `to_at` of a row of gradients.
  template <index size>
  FUSEDRNN_LONG void group_backward(const BackRow* rows, int n, index normal_at,
                                    index to_at, Range of, int group,
                                    bool of_input) const {
    const auto normal = [&](int r, int k, index u) {
      return e.load(rows[r].record + normal_at + k * P, u);
    };
    constexpr Shape blocks = shape_of<Cell>(0);
    const S* const gamma = of_input ? vectors.gamma_ih : vectors.gamma_hh;
    const auto d = [&](int r, int k, index u) {
      const int block = of_input ? blocks.input[k] : blocks.recurrent[k];
      return vector(gamma, block, u) * e.load(rows[r].da + k * P, u);
    };
    S mean[E::most_rows], along[E::most_rows];
    sums<size>(n, of, d, mean);
    sums<size>(
        n, of, [&](int r, int k, index u) { return d(r, k, u) * normal(r, k, u); },
        along);
    const S values = values_in(of);
    for (int r = 0; r < count(n); ++r) {
      const V middle = V::broadcast(mean[r] / values);
      const V slope = V::broadcast(along[r] / values);
      const V scale = V::broadcast(rows[r].record[record.scale() + group]);
      e.each(e.all(H), [&](index u) {
        each_slot<size>(of, [&](int k) {
          const V d_a = scale * (d(r, k, u) - middle - normal(r, k, u) * slope);
          e.put(exists(k) ? d_a : V::broadcast(0), rows[r].da + to_at + k * P, u, H);
        });
      });
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
