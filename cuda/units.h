// A step of one unit of a row with the options that need no other unit, as csrc/rows.h
// has it, by the thread that has the unit: for the recurrences, which do a plain step by
// themselves. What is here is called, so that a plain step pays for none of it.
#pragma once

#include "vec.h"
// after FUSEDRNN_ARCH
#include "../csrc/rows.h"
#include "kernels.h"
#include "rows.h"

namespace fusedrnn::cuda {

// What is asked of each unit, as the threads of a recurrence look at it.
template <class A>
struct UnitOptions {
  struct Values {
    A clip, cell_clip, zoneout_h, zoneout_c;
  };
  Values options;
  bool any;    // whether a step is more than the plain one
  bool draws;  // zoneout at random
  std::uint32_t below_h, below_c;
  std::uint64_t seed;
  std::uint32_t where;
  RecurrentMask mask;
  A shown;             // of an h that recurrent dropout leaves
  const A* weight_ch;  // (peepholes, H), or null
  A* dweight_ch;       // (B, peepholes, H): of each row, added to
  Element saved;       // of what was saved for backward

  static UnitOptions of(const Options& o, const void* weight_ch) {
    const bool zones_out = o.zoneout_h > 0 || o.zoneout_c > 0;
    constexpr double none = __builtin_inf();
    UnitOptions u{};
    u.options = {static_cast<A>(o.clip), static_cast<A>(o.cell_clip),
                 static_cast<A>(o.zoneout_h), static_cast<A>(o.zoneout_c)};
    u.any = zones_out || o.clip < none || o.cell_clip < none || weight_ch;
    u.draws = zones_out && o.training;
    u.below_h = Generator::threshold(o.zoneout_h);
    u.below_c = Generator::threshold(o.zoneout_c);
    u.seed = o.seed;
    u.where = o.where;
    u.mask = RecurrentMask::of(o);
    u.shown = static_cast<A>(1 / (1 - u.mask.p));
    u.weight_ch = static_cast<const A*>(weight_ch);
    u.saved = sizeof(A) == 8 ? Element::float64 : Element::float32;
    return u;
  }
};

// Whether recurrent dropout hides h of a unit from R.
template <class A>
FUSEDRNN_CALLED bool is_hidden(const UnitOptions<A>& o, index b, index unit) {
  return o.mask.factor(b, unit) == 0;
}
// Whether zoneout keeps what a unit had: of h in bit 0, of c in bit 1.
template <bool has_c, class A>
FUSEDRNN_DEVICE unsigned kept_bits(const UnitOptions<A>& o, index time, index b,
                                   index unit) {
  const ZoneoutWords drawn = zoneout_words<has_c>(o.seed, o.where, time, b, unit);
  return unsigned{drawn.h < o.below_h} | unsigned{drawn.c < o.below_c} << 1;
}

// The values of a unit, and its state or the gradient of that.
template <class Cell, class V>
struct Unit {
  V v[Cell::slots];
  State<V> state;
};

// A walk along one unit.
template <class A>
struct UnitWalk {
  using S = A;
  using V = device::Vec<A>;
  static constexpr bool bias_is_in = true;

  A keeps_h, keeps_c;
  Element saved;
  A* scratch;

  FUSEDRNN_DEVICE UnitWalk(const UnitOptions<A>& o, unsigned kept_bits, Element element)
      : keeps_h(o.draws ? static_cast<A>(kept_bits & 1) : o.options.zoneout_h),
        keeps_c(o.draws ? static_cast<A>(kept_bits >> 1 & 1) : o.options.zoneout_c),
        saved(element),
        scratch(nullptr) {}

  template <class F>
  FUSEDRNN_DEVICE static void each(index, const F& f) {
    f(0);
  }
  FUSEDRNN_DEVICE static index all(index n) { return n; }
  template <class F>
  FUSEDRNN_DEVICE static void once(const F& f) {
    f();
  }
  template <class F>
  FUSEDRNN_DEVICE static A sum(index, const F& f) {
    return f(0).value;
  }
  FUSEDRNN_DEVICE static V load(const A* p, index) { return {*p}; }
  FUSEDRNN_DEVICE static void store(V x, A* p, index) { *p = x.value; }
  FUSEDRNN_DEVICE static V upto(const A* p, index, index) { return {*p}; }
  FUSEDRNN_DEVICE static void put(V x, A* p, index, index) { *p = x.value; }
  FUSEDRNN_DEVICE V keep_h(index) const { return {keeps_h}; }
  FUSEDRNN_DEVICE V keep_c(index) const { return {keeps_c}; }
  FUSEDRNN_DEVICE static A root(A x) { return root_of(x); }
  FUSEDRNN_DEVICE V kept(V x) const {
    if constexpr (sizeof(A) == 4) {
      if (saved == Element::bfloat16 || saved == Element::float16) {
        const bool bfloat = saved == Element::bfloat16;
        return {from_half(to_half(x.value, bfloat), bfloat)};
      }
    }
    return x;
  }
};

// The row of a unit: arrays of one value, but for parameters, whose blocks are H apart.
template <class Cell, class A>
FUSEDRNN_DEVICE device::RowWise<Cell, UnitWalk<A>> row_of_unit(const UnitOptions<A>& o,
                                                               int variant, index H,
                                                               index unit,
                                                               const UnitWalk<A>& walk) {
  struct {
    typename UnitOptions<A>::Values options;
    Model model;
    Vectors<const A> vectors;
  } asked{o.options, {0, H, H, variant, false, false}, {}};
  if (o.weight_ch) asked.vectors.weight_ch = o.weight_ch + unit;
  return {asked, 1, nullptr, walk};
}

// From sums and the state before to the slots and the state after.
template <class Cell, class A>
FUSEDRNN_CALLED Unit<Cell, device::Vec<A>> step_unit(const UnitOptions<A>& o, int variant,
                                                     index H, index unit, unsigned kept,
                                                     Unit<Cell, device::Vec<A>> at) {
  constexpr int slots = Cell::slots;
  const auto rows =
      row_of_unit<Cell>(o, variant, H, unit, UnitWalk<A>(o, kept, Element::float32));
  A record[slots + 1], h = 0;
  for (int k = 0; k < slots; ++k) record[k] = at.v[k].value;
  const A h_prev = at.state.h.value, c_prev = record[slots] = at.state.c.value;
  rows.forward({record, &h_prev, &c_prev, nullptr, record + slots, &h, nullptr, nullptr},
               1);
  rows.after(&h, &h_prev, nullptr, nullptr, 1);
  for (int k = 0; k < slots; ++k) at.v[k] = {record[k]};
  at.state = {{h}, {record[slots]}};
  return at;
}

// From slots and the gradient of the state after to da and what of the gradient of the
// state before passes the product by.
template <class Cell, class A>
FUSEDRNN_CALLED Unit<Cell, device::Vec<A>> step_unit_back(
    const UnitOptions<A>& o, int variant, index H, index b, index unit, unsigned kept,
    State<device::Vec<A>> prev, bool is_cut, Unit<Cell, device::Vec<A>> at) {
  constexpr int slots = Cell::slots;
  const auto rows = row_of_unit<Cell>(o, variant, H, unit, UnitWalk<A>(o, kept, o.saved));
  constexpr device::GradientRow<Cell> in(Model{}, Cell::has_c, 1, 1);
  A record[slots], da[slots + 2];
  for (int k = 0; k < slots; ++k) record[k] = at.v[k].value;
  const A h_prev = prev.h.value, c_prev = prev.c.value;
  A dh = at.state.h.value, dc = at.state.c.value, direct = 0;
  const typename decltype(rows)::BackRow row{record, &h_prev, &c_prev, nullptr, nullptr,
                                             &dh,    &dc,     &direct, da,      is_cut};
  rows.before(row, 1);
  rows.backward(row, in, &dh, 1);
  for (int k = 0; k < slots; ++k) at.v[k] = {da[k]};
  at.state = {{direct}, {dc}};
  if constexpr (Cell::has_c) {
    if (!o.weight_ch) return at;
    // Each sum is one thread's, which adds to it in order.
    A* const to = o.dweight_ch + b * Cell::peepholes * H + unit;
    add_to(to, da[Cell::I] * da[in.c_prev]);
    add_to(to + H, da[Cell::F] * da[in.c_prev]);
    add_to(to + 2 * H, da[Cell::O] * da[in.c]);
  }
  return at;
}

}  // namespace fusedrnn::cuda
