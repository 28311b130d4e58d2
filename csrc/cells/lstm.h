// Long short-term memory (Hochreiter & Schmidhuber 1997, forget gate: Gers et al. 2000).
//
//   i = σ(a_i)  f = σ(a_f)  g = tanh(a_g)  o = σ(a_o)      a = W x + b_ih + R h' + b_hh
//   c = f c' + i g          h = o tanh(c)
//
// With peepholes (Gers & Schmidhuber 2000) a_i += p_i c', a_f += p_f c' and a_o += p_o c.
// With coupled gates (Greff et al. 2015) f = 1 - i, which has no pre-activation of its
// own.
//
// Backward, from dh and dc, the gradients of h and of c through the later steps:
//
//   da_o = dh tanh(c) o(1-o)   dc += dh o (1 - tanh²c) + da_o p_o
//   da_i = dc g i(1-i)         da_f = dc c' f(1-f)      da_g = dc i (1-g²)
//   dc' = dc f + da_i p_i + da_f p_f
//
// and da_i = dc (g - c') i(1-i) where the gates are coupled.
#pragma once

#include "cell.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class V>
struct Lstm {
  static constexpr int gates = 4, slots = 4;
  static constexpr int I = 0, F = 1, G = 2, O = 3;
  // With coupled gates the weights of f are 0 and not read.
  static constexpr Variant variants[] = {{"lstm"}, {"lstm_coupled", F}};
  static constexpr int input_gate[gates] = {I, F, G, O},
                       recurrent_gate[gates] = {I, F, G, O};
  static constexpr int input_group[gates] = {}, recurrent_group[gates] = {};
  static constexpr bool saves = true, has_c = true, has_direct = false;
  static constexpr int hidden_gate = O, peephole_count = 3;
  static constexpr Peephole peepholes[] = {{I, false}, {F, false}, {O, true}};

  // Computes the gates and c, before h.
  template <class X>
  FUSEDRNN_DEVICE static V forward_c(V (&a)[slots], V c_prev, const X& x) {
    const V f = x.bounded(x.add_peephole(1, c_prev, a[F]));
    a[I] = x.gate(x.bounded(x.add_peephole(0, c_prev, a[I])));
    a[G] = x.state(x.bounded(a[G]));
    a[F] = x.is_variant() ? V::broadcast(1) - a[I] : x.gate(f);
    const V c = cell(a, c_prev, x);
    a[O] = x.gate(x.bounded(x.add_peephole(2, c, a[O])));
    return c;
  }

  template <class X>
  FUSEDRNN_DEVICE static State<V> forward(V (&a)[slots], State<V> prev, const X& x) {
    const V c = forward_c(a, prev.c, x);
    return {hidden(a[hidden_gate], squash(c, x)), c};
  }

  // Computes c from the gates.
  template <class X>
  FUSEDRNN_DEVICE static V cell(const V (&s)[slots], V c_prev, const X& x) {
    return x.bounded_cell(fma(s[F], c_prev, s[I] * s[G]));
  }

  template <class X>
  FUSEDRNN_DEVICE static V squash(V c, const X& x) {
    return x.state(c);
  }
  FUSEDRNN_DEVICE static V hidden(V o, V tanh_c) { return o * tanh_c; }
  template <class X>
  FUSEDRNN_DEVICE static V hidden_backward(V o, V tanh_c, V dh, V dc, const X& x) {
    return fma(dh * o, x.state_slope(tanh_c), dc);
  }

  // Takes the whole dc, including what comes through h.
  template <class X>
  FUSEDRNN_DEVICE static V backward_c(V (&s)[slots], V c_prev, V c, V tanh_c, V dh, V dc,
                                      const X& x) {
    const V i = s[I], f = s[F], g = s[G], o = s[O];
    s[O] = x.through_gate(o, dh * tanh_c * x.gate_slope(o));
    dc = x.through_cell(c, x.add_from_peephole(2, s[O], dc));
    V di = dc * g, df = dc * c_prev;
    if (x.is_variant()) {
      di = di - df;
      df = V::broadcast(0);
    }
    s[I] = x.through_gate(i, di * x.gate_slope(i));
    s[F] = x.through_gate(f, df * x.gate_slope(f));
    s[G] = x.through_state(g, dc * i * x.state_slope(g));
    return x.add_from_peephole(1, s[F], x.add_from_peephole(0, s[I], dc * f));
  }

  template <class X>
  FUSEDRNN_DEVICE static State<V> backward(V (&s)[slots], State<V> prev, V c, V dh, V dc,
                                           const X& x) {
    const V tanh_c = squash(c, x);
    dc = hidden_backward(s[hidden_gate], tanh_c, dh, dc, x);
    return {V::broadcast(0), backward_c(s, prev.c, c, tanh_c, dh, dc, x)};
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
