// Elman network (Elman 1990): h = φ(W x + b_ih + R h' + b_hh), da = dh φ'(a).
//
// φ' follows from h alone, so nothing is saved: 1 - h² for tanh, h > 0 for relu. With the
// identity the recurrence is linear and, on small integers, exact in any order of the
// sums.
#pragma once

#include "cell.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class V>
struct Rnn {
  static constexpr int gates = 1, slots = 1, peephole_count = 0;
  static constexpr Variant variants[] = {{"rnn_tanh"}, {"rnn_relu"}, {"rnn_identity"}};
  static constexpr int input_gate[gates] = {0}, recurrent_gate[gates] = {0};
  static constexpr int input_group[gates] = {}, recurrent_group[gates] = {};
  static constexpr bool saves = false, has_c = false, has_direct = false;
  enum Activation { hyperbolic, rectified, identity };

  template <class X>
  FUSEDRNN_DEVICE static State<V> forward(V (&a)[slots], State<V> prev, const X& x) {
    const V bounded = x.bounded(a[0]);
    a[0] = x.variant == hyperbolic  ? x.state(bounded)
           : x.variant == rectified ? max(V::broadcast(0), bounded)
                                    : bounded;
    return {a[0], prev.c};
  }

  template <class X>
  FUSEDRNN_DEVICE static State<V> backward(V (&s)[slots], State<V>, V, V dh, V dc,
                                           const X& x) {
    const V zero = V::broadcast(0), h = s[0];
    if (x.variant == hyperbolic) {
      s[0] = x.through_state(h, dh * x.state_slope(h));
    } else {
      const V da = x.variant == rectified ? if_less(zero, h, dh, zero) : dh;
      s[0] = x.through_bounds(h, da);
    }
    return {zero, dc};
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
