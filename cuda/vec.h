// This header is a vector of one lane, for the cells (csrc/cells/) in a GPU's thread.
#pragma once

#define FUSEDRNN_ARCH device

#include "../csrc/cells/all.h"
#include "device.h"

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
  // exp(-x) may overflow to inf, whose reciprocal, 0, is the right σ(x).
  FUSEDRNN_DEVICE friend Vec sigmoid(Vec x) {
    return {cuda::reciprocal(1 + cuda::exp_of(-x.value))};
  }
  FUSEDRNN_DEVICE friend Vec tanh(Vec x) { return {cuda::tanh_of(x.value)}; }
};

}  // namespace fusedrnn::device
