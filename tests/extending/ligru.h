// Light gated recurrent unit (Ravanelli et al. 2018): a GRU without a reset gate, whose
// candidate is rectified. LayerNorm takes the place of their batch normalisation.
//
//   a = W x + b_ih + R h' + b_hh
//   z = σ(a_z)     n = max(0, a_n)     h = z h' + (1-z) n
//
// Backward, from dh:
//
//   da_z = dh (h'-n) z(1-z)     da_n = dh (1-z) where n > 0     dh' = dh z  directly
#pragma once

#include "cell.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class V>
struct LiGru {
  static constexpr int gates = 2, slots = 2, peephole_count = 0;
  static constexpr int Z = 0, N = 1;
  static constexpr Variant variants[] = {{"rnn_ligru"}};
  static constexpr int input_gate[gates] = {Z, N}, recurrent_gate[gates] = {Z, N};
  static constexpr int input_group[gates] = {}, recurrent_group[gates] = {};
  static constexpr bool saves = true, has_c = false, has_direct = true;

  template <class X>
  FUSEDRNN_DEVICE static State<V> forward(V (&a)[slots], State<V> prev, const X& x) {
    a[Z] = x.gate(x.bounded(a[Z]));
    a[N] = max(V::broadcast(0), x.bounded(a[N]));
    return {fma(a[Z], prev.h, (V::broadcast(1) - a[Z]) * a[N]), prev.c};
  }

  template <class X>
  FUSEDRNN_DEVICE static State<V> backward(V (&s)[slots], State<V> prev, V, V dh, V dc,
                                           const X& x) {
    const V zero = V::broadcast(0), one = V::broadcast(1);
    const V z = s[Z], n = s[N];
    s[Z] = x.through_gate(z, dh * (prev.h - n) * x.gate_slope(z));
    s[N] = x.through_bounds(n, if_less(zero, n, dh * (one - z), zero));
    return {dh * z, dc};
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
