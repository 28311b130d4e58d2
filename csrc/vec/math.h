// Sigmoid and tanh are written once over the vector contract.
//
//   sigmoid(x) = 1 / (1 + exp(-x))
//   tanh(x)    = (1 - exp(-2|x|)) / (1 + exp(-2|x|))  with the sign of x
//
// exp(ax) = 2^n (1 + p) with n = round(ax / ln 2), r = x - n ln 2 / a and p = expm1(ar) =
// ar + r² q(r). ln 2 is split in two parts (Cody and Waite 1980) for sigmoid; tanh, which
// is flat where -n is large, needs only one. q is a minimax polynomial on |ar| <= ln 2 /
// 2, weighted with |r|, from Remez's exchange: the relative error of p is below 2^-26 in
// float (degree 4) and 2^-68 in double (degree 11). n comes from adding a number so large
// that the sum has no fraction bits; the number is chosen so that n's biased exponent is
// in the lowest bits of the sum. a = -1 and -2 are powers of two but for the sign, so
// they are folded into the constants.
//
// A cell's time is that of its chains of dependent operations, so these are short: terms
// of q are added in pairs (Estrin 1960), 1 ± 2^n is computed beside them, and both sides
// of a quotient at once.
//
// With growing |x| the numerator of tanh grows and its denominator falls, so no rounding
// makes the quotient go back; exp(2|x|) in both would let it, by up to 3 ULP.
//
// In float σ is at most 2.45 ULP off and tanh 2.04 ULP, and neither ever goes back
// between neighbours, as tests/all_floats.py proves at every argument. In double, and for
// the others, the error is at most 3 and 4 ULP, as measured (tests/test_math.py). 0 and
// ±inf are exact, NaN is kept. Results below the smallest normal number are 0 if the
// machine flushes them, as it does during a call (dispatch.cpp).
#pragma once

#include "vec.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class S>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float lowest = -88.029692f;        // -127 ln 2, where 2^n becomes 0
  static constexpr float highest = 88.3f;             // where 2^n is still finite
  static constexpr float flat = 10.0f;                // tanh(x) = 1 from here
  static constexpr float bias = 127;                  // of the exponent
  static constexpr float shift = 12582912.0f + bias;  // 1.5 · 2^23, and the bias
  static constexpr float log2e = 1.44269504f, ln2 = 0.69314718f;
  static constexpr float ln2_high = 0.693359375f;
  static constexpr float ln2_low = -2.12194440e-4f;
  static constexpr float q[] = {0.5000000062f, 0.1666654279f, 0.04166628141f,
                                0.008366610587f, 0.001394649624f};
};

template <>
struct ExpConstants<double> {
  static constexpr double lowest = -709.08956571282405;  // -1023 ln 2
  static constexpr double highest = 709.4;
  static constexpr double flat = 20.0;
  static constexpr double bias = 1023;
  static constexpr double shift = 6755399441055744.0 + bias;
  static constexpr double log2e = 1.4426950408889634, ln2 = 0.69314718055994531;
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr double q[] = {
      0.49999999999999999989,   0.16666666666666666663,   0.041666666666666692178,
      0.0083333333333333385502, 0.0013888888888871873136, 0.00019841269841245435013,
      2.4801587350169848257e-5, 2.755731927777995925e-6,  2.7557251834157365643e-7,
      2.5052047443318706172e-8, 2.0921606765809923742e-9, 1.6093416367950338353e-10};
};

// exp(ax) = |scale| + scale p for lowest <= ax <= highest; scale has the sign of a.
template <class V, int a, bool in_two_parts>
struct Exp {
  using S = typename V::scalar;
  using C = ExpConstants<S>;
  static constexpr int terms = sizeof(C::q) / sizeof(C::q[0]);
  // The bit above the exponent is the sign.
  static constexpr S shift = C::shift + (a < 0 ? 2 * (C::bias + 1) : 0);

  V scale, p;

  explicit Exp(V x) {
    const V shifted = fma(x, V::broadcast(a * C::log2e), V::broadcast(shift));
    const V n = shifted - V::broadcast(shift);
    V r;
    if constexpr (in_two_parts) {
      r = fma(n, V::broadcast(-C::ln2_high / a), x);
      r = fma(n, V::broadcast(-C::ln2_low / a), r);
    } else {
      r = fma(n, V::broadcast(-C::ln2 / a), x);
    }
    const V r2 = r * r;
    V q = V::broadcast(0);
#pragma GCC unroll 16
    for (int d = (terms - 1) / 2 * 2; d >= 0; d -= 2) {
      const V pair =
          d + 1 < terms ? fma(r, coefficient(d + 1), coefficient(d)) : coefficient(d);
      q = d + 2 < terms ? fma(r2, q, pair) : pair;
    }
    static_assert(a == -1 || a == -2);
    p = fma(r2, q, a == -2 ? r + r : r);
    scale = exp2_of_shifted(shifted);
  }

 private:
  // p = |a| r + r² Σ |a| a^(d+1) q_d r^d
  struct Coefficients {
    S of[terms];
  };
  static constexpr Coefficients coefficients = [] {
    Coefficients c{};
    S power = a < 0 ? -a : a;
    for (int d = 0; d < terms; ++d) c.of[d] = C::q[d] * (power *= a);
    return c;
  }();
  static V coefficient(int d) { return V::broadcast(coefficients.of[d]); }
};

template <class V>
inline V sigmoid(V x) {
  using C = ExpConstants<typename V::scalar>;
  const V one = V::broadcast(1);
  const V bounded = min(V::broadcast(-C::lowest), max(V::broadcast(-C::highest), x));
  const Exp<V, -1, true> exp(bounded);
  return quotient(one, fma(exp.scale, exp.p, one - exp.scale));
}

// Computes exp(x) for x <= 0, or 0 where it would be denormal.
template <class V>
inline V exp_below_0(V x) {
  using C = ExpConstants<typename V::scalar>;
  const V zero = V::broadcast(0);
  const Exp<V, -1, true> exp(min(V::broadcast(-C::lowest), zero - x));
  return fma(exp.scale, exp.p, zero - exp.scale);
}

// Computes exp(x) - 1 for x <= 0.
template <class V>
inline V exp_minus_1(V x) {
  using C = ExpConstants<typename V::scalar>;
  const V zero = V::broadcast(0);
  const Exp<V, -1, false> exp(min(V::broadcast(-C::lowest), zero - x));
  return fma(exp.scale, exp.p, (zero - exp.scale) - V::broadcast(1));
}

// Computes log(1 + x) for 0 <= x <= 1, as s times a polynomial in s² with s = x / (2 +
// x), whose relative error is least on [0, 1/9].
template <class V>
inline V log_1_plus(V x) {
  using S = typename V::scalar;
  constexpr S near_atanh[] = {
      S(2.0000000000000000025),   S(0.66666666666666134233), S(0.40000000000190326437),
      S(0.2857142854492502758),   S(0.22222224111778241296), S(0.18181739787590417126),
      S(0.15386635456315195694),  S(0.13300102491798210381), S(0.12112249089821112226),
      S(0.083156839557900329348), S(0.17060062920105509553)};
  constexpr S near_atanh_float[] = {S(2.000000008), S(0.6666631468), S(0.4002491028),
                                    S(0.2796060275), S(0.2817833509)};
  const V s = quotient(x, V::broadcast(2) + x), s2 = s * s;
  V sum = V::broadcast(0);
  const auto add = [&](const auto& terms) {
    for (int k = sizeof(terms) / sizeof(S) - 1; k >= 0; --k) {
      sum = fma(sum, s2, V::broadcast(terms[k]));
    }
  };
  if constexpr (sizeof(S) == 4) {
    add(near_atanh_float);
  } else {
    add(near_atanh);
  }
  return s * sum;
}

template <class V>
inline V tanh(V x) {
  using C = ExpConstants<typename V::scalar>;
  const V one = V::broadcast(1);
  const Exp<V, -2, false> exp(min(V::broadcast(C::flat), abs(x)));
  const V above = fma_of_negative(exp.scale, exp.p, one + exp.scale);
  const V below = fma(exp.scale, exp.p, one - exp.scale);
  return with_sign(quotient(above, below), x);
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
