// Gated recurrent unit (Cho et al. 2014), the reset gate applied after the matmul as in
// PyTorch and cuDNN.
//
//   r = σ(W_r x + b_ir + R_r h' + b_hr)      z = σ(W_z x + b_iz + R_z h' + b_hz)
//   q = R_n h' + b_hn                        n = tanh(W_n x + b_in + r q)
//   h = (1-z) n + z h'
//
// Backward, from dh:
//
//   da_n = dh (1-z) (1-n²)   da_z = dh (h'-n) z(1-z)   da_r = da_n q r(1-r)   dq = da_n r
//   dh' = dh z  directly, the rest through R
#pragma once

#include "cell.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class V>
struct Gru {
  // Slots q r z n: the recurrent part owns the first three, the input part the last.
  static constexpr int gates = 3, slots = 4;
  static constexpr int input_gate[gates] = {0, 1, 2}, recurrent_gate[gates] = {2, 0, 1};
  static constexpr bool saves = true, has_c = false, has_direct = true;

  FUSEDRNN_DEVICE static State<V> forward(V (&a)[slots], State<V> prev) {
    auto& [q, r, z, n] = a;
    r = sigmoid(r);
    z = sigmoid(z);
    n = tanh(fma(r, q, n));
    return {fma(z, prev.h - n, n), prev.c};
  }

  FUSEDRNN_DEVICE static State<V> backward(V (&s)[slots], State<V> prev, State<V>, V dh,
                                           V dc) {
    const V one = V::broadcast(1);
    auto& [q, r, z, n] = s;
    const V dh_direct = dh * z;
    const V da_n = dh * (one - z) * (one - n * n);
    const V da_z = dh * (prev.h - n) * (z * (one - z));
    const V da_r = da_n * q * (r * (one - r));
    q = da_n * r;
    r = da_r;
    z = da_z;
    n = da_n;
    return {dh_direct, dc};
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
