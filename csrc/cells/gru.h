// Gated recurrent unit (Cho et al. 2014), the reset gate applied after the matmul as in
// PyTorch and cuDNN, or before it as in that paper.
//
//   r = σ(W_r x + b_ir + R_r h' + b_hr)      z = σ(W_z x + b_iz + R_z h' + b_hz)
//   after    q = R_n h' + b_hn               n = tanh(W_n x + b_in + r q)
//   before   q = R_n (r h') + b_hn           n = tanh(W_n x + b_in + q)
//   h = (1-z) n + z h'
//
// Backward, from dh:
//
//   da_n = dh (1-z) (1-n²)   da_z = dh (h'-n) z(1-z)   dh' = dh z  directly
//   after    dq = da_n r     da_r = da_n q r(1-r)
//   before   dq = da_n       d(r h') = R_nᵀ dq   da_r = d(r h') h' r(1-r)
//
// The rest of dh' comes through R. A reset before the matmul splits both passes in two
// parts, one on either side of the product with R_n.
#pragma once

#include "cell.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class V>
struct Gru {
  // The slots are q r z n: the first three have recurrent parts, the last three input
  // parts.
  static constexpr int gates = 3, slots = 4, peephole_count = 0;
  static constexpr int Q = 0, R = 1, Z = 2, N = 3;
  static constexpr Variant variants[] = {{"gru"}, {"gru_before", -1, Q, R}};
  static constexpr int input_gate[gates] = {0, 1, 2}, recurrent_gate[gates] = {2, 0, 1};
  // LayerNorm normalises the new gate apart from the others.
  static constexpr int input_group[gates] = {0, 0, 1}, recurrent_group[gates] = {1, 0, 0};
  static constexpr bool saves = true, has_c = false, has_direct = true;

  template <class X>
  FUSEDRNN_DEVICE static State<V> forward(V (&a)[slots], State<V> prev, const X& x) {
    open(a, x);
    return finish(a, fma(a[R], a[Q], a[N]), prev, x);
  }

  template <class X>
  FUSEDRNN_DEVICE static void open(V (&a)[slots], const X& x) {
    a[R] = x.gate(x.bounded(a[R]));
    a[Z] = x.gate(x.bounded(a[Z]));
  }
  FUSEDRNN_DEVICE static V operand(V r, V h_prev) { return r * h_prev; }
  template <class X>
  FUSEDRNN_DEVICE static State<V> close(V (&a)[slots], State<V> prev, const X& x) {
    return finish(a, a[N] + a[Q], prev, x);
  }

  template <class X>
  FUSEDRNN_DEVICE static State<V> backward(V (&s)[slots], State<V> prev, V, V dh, V dc,
                                           const X& x) {
    const V q = s[Q], r = s[R];
    const V dh_direct = open_backward(s, prev, dh, x);
    s[R] = factor_backward(r, s[Q] * q, x);
    s[Q] = s[Q] * r;
    return {dh_direct, dc};
  }

  // Computes da of all slots but r; s[Q] becomes da_n.
  template <class X>
  FUSEDRNN_DEVICE static V open_backward(V (&s)[slots], State<V> prev, V dh, const X& x) {
    const V z = s[Z], n = s[N];
    s[N] = x.through_state(n, dh * (V::broadcast(1) - z) * x.state_slope(n));
    s[Z] = x.through_gate(z, dh * (prev.h - n) * x.gate_slope(z));
    s[Q] = s[N];
    return dh * z;
  }
  template <class X>
  FUSEDRNN_DEVICE static V factor_backward(V r, V dr, const X& x) {
    return x.through_gate(r, dr * x.gate_slope(r));
  }

 private:
  // Computes n from its pre-activation, and h.
  template <class X>
  FUSEDRNN_DEVICE static State<V> finish(V (&a)[slots], V a_n, State<V> prev,
                                         const X& x) {
    const V z = a[Z], n = a[N] = x.state(x.bounded(a_n));
    return {fma(z, prev.h - n, n), prev.c};
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
