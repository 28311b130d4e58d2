// This header has the activations that an option may select instead of σ and tanh, on a
// vector type V, for both backends.
//
//   tanh       α tanh(β x)                softsign   x / (1 + |x|)
//   sigmoid    σ(x)                       softplus   log(1 + exp(x))
//   line       α x + β in [low, high]     leaky      x if x > 0, else α x
//   elu        β x if x > 0, else α (exp(x) - 1)
//   threshold  x if x > α, else 0
//
// A relu, hard sigmoid and identity are lines. The slope of each follows from its value
// alone, because the value is what is saved: α >= 0 for elu, leaky and threshold.
// src/fusedrnn/reference/activations.py has the names and their numbers.
#pragma once

#include "cells/cell.h"
#include "contract.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class V>
FUSEDRNN_DEVICE V activate(const Activation& f, V x) {
  using S = typename V::scalar;
  const V zero = V::broadcast(0), one = V::broadcast(1);
  const V alpha = V::broadcast(static_cast<S>(f.alpha));
  const V beta = V::broadcast(static_cast<S>(f.beta));
  switch (f.kind) {
    case Activation::tanh:
      return alpha * tanh(beta * x);
    case Activation::sigmoid:
      return sigmoid(x);
    case Activation::line:
      return min(V::broadcast(static_cast<S>(f.high)),
                 max(V::broadcast(static_cast<S>(f.low)), fma(alpha, x, beta)));
    case Activation::elu:
      return if_less(zero, x, beta * x, alpha * exp_minus_1(min(zero, x)));
    case Activation::softsign:
      return x / (one + max(x, zero - x));
    case Activation::softplus:
      return max(zero, x) + log_1_plus(exp_below_0(min(x, zero - x)));
    case Activation::leaky:
      return if_less(zero, x, x, alpha * x);
    default:
      return if_less(alpha, x, x, min(zero, max(zero, x)));  // NaN stays
  }
}

// Returns the slope of an activation whose value is y.
template <class V>
FUSEDRNN_DEVICE V slope_of(const Activation& f, V y) {
  using S = typename V::scalar;
  const V zero = V::broadcast(0), one = V::broadcast(1);
  const V alpha = V::broadcast(static_cast<S>(f.alpha));
  const V beta = V::broadcast(static_cast<S>(f.beta));
  switch (f.kind) {
    case Activation::tanh:
      return beta * (alpha - y * y / alpha);
    case Activation::sigmoid:
      return y * (one - y);
    case Activation::line:
      return if_less(V::broadcast(static_cast<S>(f.low)), y,
                     if_less(y, V::broadcast(static_cast<S>(f.high)), alpha, zero), zero);
    case Activation::elu:
      return if_less(zero, y, beta, y + alpha);
    case Activation::softsign: {
      const V rest = one - max(y, zero - y);
      return rest * rest;
    }
    case Activation::softplus:
      return zero - exp_minus_1(min(zero, zero - y));
    case Activation::leaky:
      return if_less(zero, y, one, alpha);
    default:
      return if_less(y, zero, one, if_less(zero, y, one, zero));
  }
}

template <class V>
FUSEDRNN_CALLED V called_activate(const Activation& f, V x) {
  return activate(f, x);
}
template <class V>
FUSEDRNN_CALLED V called_slope_of(const Activation& f, V y) {
  return slope_of(f, y);
}

// Replaced has the activations of a step: those of a call, or the cell's own. With
// `calls`, the former are called and not inlined, because they take much code and many
// registers.
template <class V, bool calls>
struct Replaced {
  const Activations& of;

  FUSEDRNN_DEVICE V gate(V a) const {
    return of.gate.kind == Activation::own ? Own{}.gate(a) : value(of.gate, a);
  }
  FUSEDRNN_DEVICE V state(V a) const {
    return of.state.kind == Activation::own ? Own{}.state(a) : value(of.state, a);
  }
  FUSEDRNN_DEVICE V gate_slope(V s) const {
    return of.gate.kind == Activation::own ? Own{}.gate_slope(s) : slope(of.gate, s);
  }
  FUSEDRNN_DEVICE V state_slope(V s) const {
    return of.state.kind == Activation::own ? Own{}.state_slope(s) : slope(of.state, s);
  }

 private:
  using Own = Plain<V>;
  FUSEDRNN_DEVICE static V value(const Activation& f, V a) {
    return calls ? called_activate(f, a) : activate(f, a);
  }
  FUSEDRNN_DEVICE static V slope(const Activation& f, V s) {
    return calls ? called_slope_of(f, s) : slope_of(f, s);
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
