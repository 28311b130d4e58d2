// This header is a vector of one lane, for the cells (csrc/cells/) in a GPU's thread.
#pragma once

#define FUSEDRNN_ARCH device

#include "../csrc/cells/all.h"
#include "device.h"

namespace fusedrnn::cuda {

// Returns e^x with an error of 3 ULP. The product x log2(e) is rounded by up to 2^-18,
// which would be a relative error of e^x, so what the rounding took is a factor of its
// own. That is NaN or infinite where the product is infinite, and then any positive
// factor is right.
FUSEDRNN_DEVICE float exp_of(float x) {
  constexpr float log2_e = 0x1.715476p+0f, log2_e_rest = 0x1.4ae0cp-26f;
  constexpr float ln_2 = 0x1.62e43p-1f;
  const float product = x * log2_e;
  const float rest = multiply_add(x, log2_e_rest, multiply_add(x, log2_e, -product));
  return exp2_of(product) * (1 + bounded(rest * ln_2, -0.5f, 1));
}

}  // namespace fusedrnn::cuda

namespace fusedrnn::device {

template <class S>
struct Vec {
  using scalar = S;

  S value;

  FUSEDRNN_DEVICE static Vec broadcast(S s) { return {s}; }

  FUSEDRNN_DEVICE friend Vec operator+(Vec a, Vec b) { return {a.value + b.value}; }
  FUSEDRNN_DEVICE friend Vec operator-(Vec a, Vec b) { return {a.value - b.value}; }
  FUSEDRNN_DEVICE friend Vec operator*(Vec a, Vec b) { return {a.value * b.value}; }
  FUSEDRNN_DEVICE friend Vec operator/(Vec a, Vec b) { return {a.value / b.value}; }
  FUSEDRNN_DEVICE friend Vec root(Vec a) { return {cuda::root_of(a.value)}; }
  FUSEDRNN_DEVICE friend Vec fma(Vec a, Vec b, Vec c) {
    return {cuda::multiply_add(a.value, b.value, c.value)};
  }
  FUSEDRNN_DEVICE friend Vec min(Vec a, Vec b) {
    return {a.value < b.value ? a.value : b.value};
  }
  FUSEDRNN_DEVICE friend Vec max(Vec a, Vec b) {
    return {a.value > b.value ? a.value : b.value};
  }
  FUSEDRNN_DEVICE friend Vec if_less(Vec a, Vec b, Vec x, Vec y) {
    return a.value < b.value ? x : y;
  }
  // For floats the error is 8 ULP at most, and σ(x) is 0 where it would be subnormal.
  // exp(-x) may overflow to inf, whose reciprocal is that 0.
  FUSEDRNN_DEVICE friend Vec sigmoid(Vec x) {
    return {cuda::reciprocal(1 + cuda::exp_of(-x.value))};
  }
  // These are for the activations that an option selects, and need not be fast.
  FUSEDRNN_DEVICE friend Vec exp_below_0(Vec x) { return {cuda::exp_of(x.value)}; }
  FUSEDRNN_DEVICE friend Vec exp_minus_1(Vec x) { return {cuda::expm1_of(x.value)}; }
  FUSEDRNN_DEVICE friend Vec log_1_plus(Vec x) { return {cuda::log1p_of(x.value)}; }
  FUSEDRNN_DEVICE friend Vec tanh(Vec x) { return {cuda::tanh_of(x.value)}; }
};

}  // namespace fusedrnn::device
