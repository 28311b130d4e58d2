// A cell is a set of pure functions on a vector type V, which is a register of any ISA, a
// scalar, or a CUDA thread's value. A cell knows no pointer, index or element type.
//
// The `slots` of a cell are its values per hidden unit. Before the cell they hold
// pre-activations, after a training forward what backward needs, and in backward the
// gradients of the pre-activations:
//
//   slots [0, gates)              have a recurrent part  R h'
//   slots [slots-gates, slots)    have an input part     W x
//
// LSTM and RNN have gates = slots, so both parts meet in one sum. GRU's new gate keeps
// its two parts apart, r being in between, so it has one slot for each.
//
// A cell declares
//
//   variants[]             the names of its kernels and how they differ; x.variant says
//                          which one runs
//   gates                  blocks of H rows in weight_ih and weight_hh
//   input_gate[k]          the block of weight_ih that feeds slot slots-gates+k
//   recurrent_gate[k]      the block of weight_hh that feeds slot k
//   input_group[k], recurrent_group[k]
//                          the LayerNorm group of the input part of slot slots-gates+k,
//                          and of the recurrent part of slot k; the slots of a group are
//                          neighbours
//   saves                  whether the slots are kept for backward; else backward has h
//                          alone, in slot 0
//   has_c                  whether there is a cell state c beside h
//   has_direct             whether h' reaches h past the matmul, so that backward returns
//                          dh_direct
//   peepholes              the gates that may read c: Peephole{slot, whether it reads the
//                          new c}
//
// and the functions
//
//   forward(a, prev, x)                    -> h, c;  a becomes what is saved
//   backward(s, prev, c, dh, dc, x)        -> dh_direct, dc';  s becomes da
//
// With has_c, LayerNorm of c and zoneout come between c and h, so the cell also has
//
//   forward_c(a, c', x)                    -> c;     a becomes what is saved
//   cell(s, c', x)                         -> c from what is saved
//   squash(c, x), hidden(gate, squash)     -> h, from c and the slot `hidden_gate`
//   hidden_backward(gate, squash, dh, dc, x)  -> dc + the gradient of c through h
//   backward_c(s, c', c, squash(c), dh, dc, x)  -> dc' from dc with what h adds to it
//
// A variant with a second product multiplies the block of `second` of weight_hh with
// operand(a, h') instead of h', so its step has two parts, one on either side of that
// product:
//
//   open(a, x)                             activates slot `factor`, and all others
//                                          that do not need the second product
//   operand(factor, h')                    the operand of the second product
//   close(a, prev, x)                      -> h, once slot `second` is known
//   open_backward(s, prev, dh, x)          -> dh_direct; s becomes da but for `factor`
//   factor_backward(factor, d_factor, x)   -> da of that slot
//
// x has the options of a step: `Plain` has none, `Extras` has any of them at run time. A
// cell calls its activations through x, which may replace them: x.gate for σ, x.state for
// tanh, and their slopes as functions of the value.
#pragma once

#include "../target.h"

namespace fusedrnn {

template <class V>
struct State {
  V h, c;
};

struct Variant {
  const char* name;
  int absent = -1;               // the slot without weights, or -1
  int second = -1, factor = -1;  // the slots of a second product, or -1; second is 0
};

struct Peephole {
  int slot;
  bool reads_new_c;
};

// Shape has a cell's declarations as numbers, for code that is compiled once for all
// cells.
struct Shape {
  static constexpr int most_slots = 6, most_groups = 4, most_peepholes = 3;

  int gates, slots, peephole_count;
  bool saves, has_c, has_direct;
  int input[most_slots], recurrent[most_slots];  // a slot's block of weights, or -1
  Peephole peepholes[most_peepholes];
  int variant;
  Variant differs;

  FUSEDRNN_SHARED constexpr int first_input() const { return slots - gates; }
  FUSEDRNN_SHARED constexpr bool has_second() const { return differs.second >= 0; }
  // Returns how many vectors of units each gate has in a panel of packed weights, on the
  // CPU.
  FUSEDRNN_SHARED constexpr int unit_vectors() const { return gates == 1 ? 2 : 1; }
};

template <class Cell>
FUSEDRNN_CONSTANT constexpr Shape shape_of(int variant) {
  Shape s{};
  s.gates = Cell::gates;
  s.slots = Cell::slots;
  s.peephole_count = Cell::peephole_count;
  s.saves = Cell::saves;
  s.has_c = Cell::has_c;
  s.has_direct = Cell::has_direct;
  for (int k = 0; k < s.slots; ++k) {
    s.input[k] = k < s.first_input() ? -1 : Cell::input_gate[k - s.first_input()];
    s.recurrent[k] = k < s.gates ? Cell::recurrent_gate[k] : -1;
  }
  if constexpr (Cell::peephole_count > 0) {
    for (int k = 0; k < s.peephole_count; ++k) s.peepholes[k] = Cell::peepholes[k];
  }
  s.variant = variant;
  s.differs = Cell::variants[variant];
  return s;
}

// Groups lists the slots of each group that LayerNorm normalises together. group[k] is
// the group of slot first + k.
struct Groups {
  int count = 0;
  Range slots[Shape::most_groups]{};

  template <int gates>
  FUSEDRNN_CONSTANT constexpr Groups(const int (&group)[gates], int first) {
    for (int k = 0; k < gates; ++k) {
      Range& of = slots[group[k]];
      if (of.end == 0) of.begin = first + k;
      of.end = first + k + 1;
      count = group[k] >= count ? group[k] + 1 : count;
    }
  }
};

// `variant` distinguishes cells that share their kernels: the activations of an RNN, and
// an LSTM with coupled gates if `may_vary`. The CPU's plain kernels do not have the
// latter.
template <class V, bool may_vary = false>
struct Plain {
  int variant;

  FUSEDRNN_DEVICE bool is_variant() const { return may_vary && variant == 1; }
  FUSEDRNN_DEVICE V gate(V a) const { return sigmoid(a); }
  FUSEDRNN_DEVICE V state(V a) const { return tanh(a); }
  FUSEDRNN_DEVICE V gate_slope(V s) const { return s * (V::broadcast(1) - s); }
  FUSEDRNN_DEVICE V state_slope(V s) const { return V::broadcast(1) - s * s; }
  FUSEDRNN_DEVICE V bounded(V a) const { return a; }
  FUSEDRNN_DEVICE V bounded_cell(V c) const { return c; }
  FUSEDRNN_DEVICE V add_peephole(int, V, V a) const { return a; }
  FUSEDRNN_DEVICE V add_from_peephole(int, V, V dc) const { return dc; }
  FUSEDRNN_DEVICE V through_gate(V, V da) const { return da; }
  FUSEDRNN_DEVICE V through_state(V, V da) const { return da; }
  FUSEDRNN_DEVICE V through_bounds(V, V da) const { return da; }
  FUSEDRNN_DEVICE V through_cell(V, V dc) const { return dc; }
};

// Extras is the arithmetic of options on a unit. Bounds are infinite where nothing is
// clipped. No gradient passes a clipped pre-activation, which backward recognises by its
// activation: it has the value at a bound. An activation that rounds to that value counts
// as clipped.
template <class V>
struct Extras {
  int variant;
  bool clips, clips_cell, has_peephole;
  V clip, gate_low, gate_high, state_low, state_high, cell_clip;

  FUSEDRNN_DEVICE bool is_variant() const { return variant == 1; }
  FUSEDRNN_DEVICE V bounded(V a) const { return within(clip, a); }
  FUSEDRNN_DEVICE V bounded_cell(V c) const { return within(cell_clip, c); }
  FUSEDRNN_DEVICE V through_gate(V s, V da) const {
    return clips ? inside(gate_low, s, gate_high, da) : da;
  }
  FUSEDRNN_DEVICE V through_state(V s, V da) const {
    return clips ? inside(state_low, s, state_high, da) : da;
  }
  FUSEDRNN_DEVICE V through_bounds(V a, V da) const {
    return clips ? inside(negative(clip), a, clip, da) : da;
  }
  FUSEDRNN_DEVICE V through_cell(V c, V dc) const {
    return clips_cell ? inside(negative(cell_clip), c, cell_clip, dc) : dc;
  }

 private:
  FUSEDRNN_DEVICE static V negative(V x) { return V::broadcast(0) - x; }
  FUSEDRNN_DEVICE static V within(V bound, V x) {
    return min(bound, max(negative(bound), x));
  }
  FUSEDRNN_DEVICE static V inside(V low, V x, V high, V dx) {
    const V zero = V::broadcast(0);
    return if_less(low, x, if_less(x, high, dx, zero), zero);
  }
};

}  // namespace fusedrnn
