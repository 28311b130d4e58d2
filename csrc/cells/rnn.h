// Elman network (Elman 1990): h = φ(W x + b_ih + R h' + b_hh), da = dh φ'(a).
//
// φ' is known from h alone, so nothing is saved: 1 - h² for tanh, h > 0 for relu.
#pragma once

#include "cell.h"

namespace fusedrnn::FUSEDRNN_ARCH {

struct Tanh {
  template <class V>
  FUSEDRNN_DEVICE static V value(V a) {
    return tanh(a);
  }
  template <class V>
  FUSEDRNN_DEVICE static V gradient(V h, V dh) {
    return dh * (V::broadcast(1) - h * h);
  }
};

struct Relu {
  template <class V>
  FUSEDRNN_DEVICE static V value(V a) {
    return max(V::broadcast(0), a);
  }
  template <class V>
  FUSEDRNN_DEVICE static V gradient(V h, V dh) {
    return if_less(V::broadcast(0), h, dh, V::broadcast(0));
  }
};

// A linear recurrence. On small integers it is exact, whatever the order of the sums.
struct Identity {
  template <class V>
  FUSEDRNN_DEVICE static V value(V a) {
    return a;
  }
  template <class V>
  FUSEDRNN_DEVICE static V gradient(V, V dh) {
    return dh;
  }
};

template <class V, class Nonlinearity>
struct Rnn {
  static constexpr int gates = 1, slots = 1;
  static constexpr int input_gate[gates] = {0}, recurrent_gate[gates] = {0};
  static constexpr bool saves = false, has_c = false, has_direct = false;

  FUSEDRNN_DEVICE static State<V> forward(V (&a)[slots], State<V> prev) {
    return {Nonlinearity::value(a[0]), prev.c};
  }

  FUSEDRNN_DEVICE static State<V> backward(V (&s)[slots], State<V>, State<V> now, V dh,
                                           V dc) {
    s[0] = Nonlinearity::gradient(now.h, dh);
    return {V::broadcast(0), dc};
  }
};

template <class V>
using RnnTanh = Rnn<V, Tanh>;
template <class V>
using RnnRelu = Rnn<V, Relu>;
template <class V>
using RnnIdentity = Rnn<V, Identity>;

}  // namespace fusedrnn::FUSEDRNN_ARCH
