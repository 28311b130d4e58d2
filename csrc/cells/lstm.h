// Long short-term memory (Hochreiter & Schmidhuber 1997, forget gate: Gers et al. 2000).
//
//   i = σ(a_i)  f = σ(a_f)  g = tanh(a_g)  o = σ(a_o)      a = W x + b_ih + R h' + b_hh
//   c = f c' + i g          h = o tanh(c)
//
// Backward, from dh and dc, the gradients of h and of c through the later steps:
//
//   dc += dh o (1 - tanh²c)
//   da_o = dh tanh(c) o(1-o)   da_i = dc g i(1-i)   da_f = dc c' f(1-f)
//   da_g = dc i (1-g²)         dc' = dc f
#pragma once

#include "cell.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class V>
struct Lstm {
  static constexpr int gates = 4, slots = 4;
  static constexpr int input_gate[gates] = {0, 1, 2, 3},
                       recurrent_gate[gates] = {0, 1, 2, 3};
  static constexpr bool saves = true, has_c = true, has_direct = false;

  FUSEDRNN_DEVICE static State<V> forward(V (&a)[slots], State<V> prev) {
    auto& [i, f, g, o] = a;
    i = sigmoid(i);
    f = sigmoid(f);
    g = tanh(g);
    o = sigmoid(o);
    const V c = fma(f, prev.c, i * g);
    return {o * tanh(c), c};
  }

  FUSEDRNN_DEVICE static State<V> backward(V (&s)[slots], State<V> prev, State<V> now,
                                           V dh, V dc) {
    const V one = V::broadcast(1);
    auto& [i, f, g, o] = s;
    const V tanh_c = tanh(now.c);
    dc = fma(dh * o, one - tanh_c * tanh_c, dc);
    const V dc_prev = dc * f;
    const V da_i = dc * g * (i * (one - i));
    const V da_f = dc * prev.c * (f * (one - f));
    const V da_g = dc * i * (one - g * g);
    const V da_o = dh * tanh_c * (o * (one - o));
    i = da_i;
    f = da_f;
    g = da_g;
    o = da_o;
    return {V::broadcast(0), dc_prev};
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
