// Sigmoid and tanh, written once over the vector contract.
//
//   sigmoid(x) = 1 / (1 + exp(-x))
//   tanh(x)    = t / (t + 2)        t = expm1(2|x|), with the sign of x
//
// exp(x) = 2^n (1 + p) with n = round(x / ln 2), r = x - n ln 2 (ln 2 in two parts, Cody
// and Waite 1980) and p = expm1(r) = r + r² q(r). q is a minimax polynomial on
// |r| <= ln 2 / 2, weighted with |r|, found with Remez's exchange: relative error of p
// below 2^-26 in float (degree 4) and 2^-68 in double (degree 11). n comes from adding a
// number so large that nothing below 1 is left of the sum, and so chosen that n's biased
// exponent stands in its lowest bits.
//
// Measured at most 2.5 ULP off in both types (tests/test_math.py), 0 and ±inf exact, NaN
// kept. Results below the smallest normal number may be 0.
#pragma once

#include "vec.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class S>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float lowest = -88.029692f;       // -127 ln 2, where 2^n becomes 0
  static constexpr float highest = 89.0f;            // where it becomes inf
  static constexpr float flat = 10.0f;               // tanh(x) = 1 from here on
  static constexpr float shift = 12582912.0f + 127;  // 1.5 · 2^23 + bias
  static constexpr float log2e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f;
  static constexpr float ln2_low = -2.12194440e-4f;
  static constexpr float q[] = {0.5000000062f, 0.1666654279f, 0.04166628141f,
                                0.008366610587f, 0.001394649624f};
};

template <>
struct ExpConstants<double> {
  static constexpr double lowest = -709.08956571282405;  // -1023 ln 2
  static constexpr double highest = 710.0;
  static constexpr double flat = 20.0;
  static constexpr double shift = 6755399441055744.0 + 1023;
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr double q[] = {
      0.49999999999999999989,   0.16666666666666666663,   0.041666666666666692178,
      0.0083333333333333385502, 0.0013888888888871873136, 0.00019841269841245435013,
      2.4801587350169848257e-5, 2.755731927777995925e-6,  2.7557251834157365643e-7,
      2.5052047443318706172e-8, 2.0921606765809923742e-9, 1.6093416367950338353e-10};
};

// exp(x) = scale·(1 + p) for lowest <= x <= highest.
template <class V>
struct Exp {
  V scale, p;

  explicit Exp(V x) {
    using C = ExpConstants<typename V::scalar>;
    constexpr int degree = sizeof(C::q) / sizeof(C::q[0]) - 1;
    const V shifted = fma(x, V::broadcast(C::log2e), V::broadcast(C::shift));
    const V n = shifted - V::broadcast(C::shift);
    V r = fma(n, V::broadcast(-C::ln2_high), x);
    r = fma(n, V::broadcast(-C::ln2_low), r);
    V q = V::broadcast(C::q[degree]);
#pragma GCC unroll 16
    for (int d = degree - 1; d >= 0; --d) q = fma(q, r, V::broadcast(C::q[d]));
    p = fma(r * r, q, r);
    scale = exp2_of_shifted(shifted);
  }
};

template <class V>
inline V sigmoid(V x) {
  using C = ExpConstants<typename V::scalar>;
  const V one = V::broadcast(1);
  const V bounded =
      min(V::broadcast(C::highest), max(V::broadcast(C::lowest), V::broadcast(0) - x));
  const Exp<V> exp(bounded);
  return one / (one + exp.scale * (one + exp.p));
}

template <class V>
inline V tanh(V x) {
  using C = ExpConstants<typename V::scalar>;
  const V bounded = min(V::broadcast(C::flat), abs(x));
  const Exp<V> exp(bounded + bounded);
  const V t = fma(exp.scale, exp.p, exp.scale - V::broadcast(1));
  return with_sign(t / (t + V::broadcast(2)), x);
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
