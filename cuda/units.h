// This header is a step of one unit of a row, with the options that need no other unit,
// by csrc/pointwise.h in the thread that has the unit. The recurrences compute a plain
// step themselves and call these functions otherwise, so that the options take no
// registers from the plain step.
#pragma once

#include "vec.h"
// after FUSEDRNN_ARCH
#include "../csrc/pointwise.h"
#include "kernels.h"
#include "rows.h"

namespace fusedrnn::cuda {

// UnitOptions has the options as the threads of a recurrence read them.
template <class A>
struct UnitOptions {
  struct Values {
    A clip, cell_clip, zoneout_h, zoneout_c;
    const Activations* activations;

    FUSEDRNN_DEVICE friend const Activations& activations_of(const Values& v) {
      return *v.activations;
    }
  };
  Values options;  // its activations are set by row_of_unit
  Activations activations;
  int variant;  // of cells that share their kernels
  index B, H;
  bool any;     // whether a step has options
  bool rounds;  // whether saved values are rounded to 16 bits
  bool bfloat;
  A dropout_scale;                   // factor of an h that recurrent dropout keeps
  const A* mask;                     // (B, H), 0 where it is dropped; or null
  const std::uint8_t* zoneout_bits;  // (T, B, H) where zoneout draws (rows.h), or null
  const A* weight_ch;                // (peepholes, H), or null
  A* dweight_ch;                     // (B, peepholes, H), added to, for each row
  void* trace;                       // (T, B, gates, H), in the storage type; or null
  const A* dcells;                   // or null
  index dcells_t, dcells_b;

  static UnitOptions of(const ForwardCall& call) {
    const Options& o = call.options;
    constexpr double none = __builtin_inf();
    UnitOptions u{};
    u.options = {static_cast<A>(o.clip), static_cast<A>(o.cell_clip),
                 static_cast<A>(o.zoneout_h), static_cast<A>(o.zoneout_c), nullptr};
    u.activations = o.activations;
    u.variant = call.model.variant;
    u.B = call.B;
    u.H = call.H;
    u.weight_ch = static_cast<const A*>(call.vectors.weight_ch);
    u.trace = call.trace;
    u.any = replaces(o.activations) || zones_out(o) || o.clip < none ||
            o.cell_clip < none || u.weight_ch || u.trace;
    u.bfloat = call.precision == Precision::bfloat16;
    u.rounds = u.bfloat || call.precision == Precision::float16;
    u.dropout_scale = static_cast<A>(drops(o) ? 1 / (1 - o.recurrent_dropout) : 1);
    return u;
  }
};

// A Unit has the values of a unit in a row, and its state or the gradient of the state.
template <class Cell, class V>
struct Unit {
  V v[Cell::slots];
  State<V> state;
};
// Items has a thread's items of a step: units 8 apart, two rows each; item 2 unit + row.
template <class Cell, class V, int count_>
struct Items {
  static constexpr int count = count_;
  Unit<Cell, V> at[count];
  State<V> prev[count];  // backward
  V c[count];
};

// UnitWalk is a walk along one unit. `replaces` says whether activations may be replaced.
template <class A, bool replaces>
struct UnitWalk {
  using S = A;
  using V = device::Vec<A>;
  static constexpr int parts = replaces ? changes::all : changes::gates | changes::states;
  static constexpr int most_rows = 1, lanes = 1;
  static constexpr bool vectors_are_padded = false;
  static constexpr bool bias_is_in = true;
  FUSEDRNN_DEVICE static constexpr bool norm(const Model&) { return false; }

  A keeps_h, keeps_c;
  bool rounds, bfloat;

  FUSEDRNN_DEVICE UnitWalk(const UnitOptions<A>& o, unsigned zoneout_bits, bool of_saved)
      : keeps_h(o.zoneout_bits ? static_cast<A>(zoneout_bits & 1) : o.options.zoneout_h),
        keeps_c(o.zoneout_bits ? static_cast<A>(zoneout_bits >> 1 & 1)
                               : o.options.zoneout_c),
        rounds(of_saved && o.rounds),
        bfloat(o.bfloat) {}

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
  FUSEDRNN_DEVICE static void sums(int, index, const F& f, A* to) {
    *to = f(0, 0).value;
  }
  FUSEDRNN_DEVICE static V load(const A* p, index) { return {*p}; }
  FUSEDRNN_DEVICE static void store(V x, A* p, index) { *p = x.value; }
  FUSEDRNN_DEVICE static V upto(const A* p, index, index) { return {*p}; }
  FUSEDRNN_DEVICE static void put(V x, A* p, index, index) { *p = x.value; }
  FUSEDRNN_DEVICE V keep_h(const A*, index) const { return {keeps_h}; }
  FUSEDRNN_DEVICE V keep_c(const A*, index) const { return {keeps_c}; }
  FUSEDRNN_DEVICE static A* scratch(int) { return nullptr; }
  FUSEDRNN_DEVICE static void bounds(double clip, const Activations& of, V (&to)[5]) {
    if constexpr (replaces) {
      device::clip_bounds(clip, device::Replaced<V, true>{of}, to);
    } else {
      device::clip_bounds(clip, Plain<V>{}, to);
    }
  }
  FUSEDRNN_DEVICE V rounded(V x) const {
    if constexpr (sizeof(A) == 4) {
      if (rounds) return {from_half(to_half(x.value, bfloat), bfloat)};
    }
    return x;
  }
};

// Returns the row of a unit. Its arrays have one value, except parameters, whose blocks
// are H apart.
template <class Cell, class A, bool replaces>
FUSEDRNN_DEVICE device::RowWise<Cell, UnitWalk<A, replaces>> row_of_unit(
    const UnitOptions<A>& o, index unit, const UnitWalk<A, replaces>& walk) {
  struct {
    typename UnitOptions<A>::Values options;
    Model model;
    Vectors<const A> vectors;
  } arguments{o.options, {0, o.H, o.H, o.variant, false, false}, {}};
  arguments.options.activations = &o.activations;
  if (o.weight_ch) arguments.vectors.weight_ch = o.weight_ch + unit;
  return {arguments, 1, nullptr, walk};
}

// Computes the slots and the next state from the sums and the state before.
template <class Cell, class A>
FUSEDRNN_DEVICE void step_unit(const UnitOptions<A>& o, index unit, unsigned zoneout_bits,
                               Unit<Cell, device::Vec<A>>& at) {
  constexpr int slots = Cell::slots;
  const auto rows = row_of_unit<Cell>(o, unit, UnitWalk<A, true>(o, zoneout_bits, false));
  A record[slots + 1], h = 0;
  for (int k = 0; k < slots; ++k) record[k] = at.v[k].value;
  const A h_prev = at.state.h.value, c_prev = record[slots] = at.state.c.value;
  const typename decltype(rows)::Row row{
      record,  record,  1,       &h_prev, &c_prev, nullptr, record + slots, &h,
      nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, record};
  rows.forward(&row, 1, 1);
  for (int k = 0; k < slots; ++k) at.v[k] = {record[k]};
  at.state = {{h}, {record[slots]}};
}

// Computes da, and the part of the gradient of the state before that bypasses the
// product, without cuts, from slots and the gradient of the next state.
template <bool replaces, class Cell, class A>
FUSEDRNN_DEVICE void step_unit_back(const UnitOptions<A>& o, index b, index unit,
                                    unsigned zoneout_bits,
                                    const State<device::Vec<A>>& prev, device::Vec<A> c,
                                    Unit<Cell, device::Vec<A>>& at) {
  constexpr int slots = Cell::slots;
  const auto rows =
      row_of_unit<Cell>(o, unit, UnitWalk<A, replaces>(o, zoneout_bits, true));
  constexpr GradientRow in(fusedrnn::shape_of<Cell>(0), Model{}, Cell::has_c, 1, 1);
  A record[slots], da[slots + 2];
  for (int k = 0; k < slots; ++k) record[k] = at.v[k].value;
  const A h_prev = prev.h.value, c_prev = prev.c.value;
  A dh = at.state.h.value, dc = at.state.c.value, direct = 0;
  const typename decltype(rows)::BackRow row{
      record,  &h_prev, &c_prev, o.options.zoneout_c > 0 ? nullptr : &c.value,
      nullptr, nullptr, &dh,     &dc,
      &direct, da,      false,   nullptr,
      nullptr, nullptr};
  rows.backward(row, in, 0, rows.zoneout_backward(row, 0, {dh}));
  for (int k = 0; k < slots; ++k) at.v[k] = {da[k]};
  at.state = {{direct}, {dc}};
  if constexpr (Cell::has_c) {
    if (!o.weight_ch) return;
    // Each sum belongs to one thread, which adds to it in order.
    constexpr Shape shape = fusedrnn::shape_of<Cell>(0);
    A* const to = o.dweight_ch + b * Cell::peephole_count * o.H + unit;
    for (int k = 0; k < Cell::peephole_count; ++k) {
      const auto [slot, reads_new_c] = shape.peepholes[k];
      add_to(to + k * o.H, da[slot] * da[reads_new_c ? in.c : in.c_prev]);
    }
  }
}

// The functions below take a thread's items; `row` and `unit` are those of its first
// item.
template <class A>
FUSEDRNN_DEVICE bool exists(const UnitOptions<A>& o, index row, index unit, int item) {
  return row + item % 2 < o.B && unit + item / 2 * 8 < o.H;
}

// Returns a bit for each item whose h recurrent dropout hides from R.
template <int count, class A>
FUSEDRNN_CALLED unsigned dropped_items(const UnitOptions<A>& o, index row, index unit) {
  unsigned bits = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (!exists(o, row, unit, i)) continue;
    bits |= unsigned{o.mask[(row + i % 2) * o.H + unit + i / 2 * 8] == 0} << i;
  }
  return bits;
}
// Returns two bits for each item: whether zoneout keeps h and c at a time.
template <int count, class A>
FUSEDRNN_CALLED unsigned zoneout_items(const UnitOptions<A>& o, index t, index row,
                                       index unit) {
  unsigned bits = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (!exists(o, row, unit, i)) continue;
    const index at = (t * o.B + row + i % 2) * o.H + unit + i / 2 * 8;
    bits |= unsigned{o.zoneout_bits[at]} << 2 * i;
  }
  return bits;
}

// Runs the step of the items whose row is active; `active` has a bit for each row.
template <class Cell, int count, class A>
FUSEDRNN_CALLED void step_items(const UnitOptions<A>& o, index t, index row, index unit,
                                unsigned active, unsigned zoneout_bits,
                                Items<Cell, device::Vec<A>, count>& own) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (!(active >> i % 2 & 1) || !exists(o, row, unit, i)) continue;
    step_unit(o, unit + i / 2 * 8, zoneout_bits >> 2 * i, own.at[i]);
    if (!o.trace) continue;
    index to = (t * o.B + row + i % 2) * Cell::gates * o.H + unit + i / 2 * 8;
    for (int k = Cell::slots - Cell::gates; k < Cell::slots; ++k, to += o.H) {
      const A value = own.at[i].v[k].value;
      if constexpr (sizeof(A) == 4) {
        if (o.rounds) {
          static_cast<Half*>(o.trace)[to] = to_half(value, o.bfloat);
          continue;
        }
      }
      static_cast<A*>(o.trace)[to] = value;
    }
  }
}
template <bool replaces, class Cell, int count, class A>
FUSEDRNN_CALLED void step_items_back(const UnitOptions<A>& o, index t, index row,
                                     index unit, unsigned active, unsigned zoneout_bits,
                                     Items<Cell, device::Vec<A>, count>& own) {
  A dcells[count] = {};  // all loads are issued together
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (!o.dcells || !(active >> i % 2 & 1) || !exists(o, row, unit, i)) continue;
    const index of_row = t * o.dcells_t + (row + i % 2) * o.dcells_b;
    dcells[i] = o.dcells[of_row + unit + i / 2 * 8];
  }
#pragma unroll
  for (int i = 0; i < count; ++i) own.at[i].state.c.value += dcells[i];
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (!(active >> i % 2 & 1) || !exists(o, row, unit, i)) {
      own.at[i] = {};
      continue;
    }
    step_unit_back<replaces>(o, row + i % 2, unit + i / 2 * 8, zoneout_bits >> 2 * i,
                             own.prev[i], own.c[i], own.at[i]);
  }
}

}  // namespace fusedrnn::cuda
