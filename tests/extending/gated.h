// This cell is an Elman network with a gate on its output.
//
//   i = σ(a_i)     g = tanh(a_g)     h = i g          a = W x + b_ih + R h' + b_hh
//
// Backward, from dh:  da_i = dh g i(1-i)    da_g = dh i (1-g²)
#pragma once

#include "cell.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class V>
struct Gated {
  static constexpr int gates = 2, slots = 2, peephole_count = 0;
  static constexpr int I = 0, G = 1;
  static constexpr Variant variants[] = {{"rnn_gated"}};
  static constexpr int input_gate[gates] = {I, G}, recurrent_gate[gates] = {I, G};
  static constexpr int input_group[gates] = {}, recurrent_group[gates] = {};
  static constexpr bool saves = true, has_c = false, has_direct = false;

  template <class X>
  FUSEDRNN_DEVICE static State<V> forward(V (&a)[slots], State<V> prev, const X& x) {
    a[I] = x.gate(x.bounded(a[I]));
    a[G] = x.state(x.bounded(a[G]));
    return {a[I] * a[G], prev.c};
  }

  template <class X>
  FUSEDRNN_DEVICE static State<V> backward(V (&s)[slots], State<V>, V, V dh, V dc,
                                           const X& x) {
    const V i = s[I], g = s[G];
    s[I] = x.through_gate(i, dh * g * x.gate_slope(i));
    s[G] = x.through_state(g, dh * i * x.state_slope(g));
    return {V::broadcast(0), dc};
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
