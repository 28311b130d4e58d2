// This header has what layer.h and rowwise.h both do before and after the steps: x as a
// matrix, W x and R h' of some times, and from da the gradients of x, W and R.
#pragma once

#include <span>

#include "recurrence.h"
#include "rows.h"

namespace fusedrnn::cuda {

inline Element element_of(Precision precision) {
  switch (precision) {
    case Precision::float64:
      return Element::float64;
    case Precision::bfloat16:
      return Element::bfloat16;
    case Precision::float16:
      return Element::float16;
    default:
      return Element::float32;
  }
}

// Returns `count` rows of a matrix of S.
template <class S>
Matrix rows_of(Matrix m, index first, index count) {
  m.data = static_cast<const S*>(m.data) + first * m.stride;
  m.rows = count;
  return m;
}

// Entering has h' that enters some rows of T·B, in their order: those from `first` on.
struct Entering {
  index first;
  Matrix h;
};

// LayerProducts has the products of a layer's weights, for a cell whose slots from
// `first_slot` on multiply R with h'.
template <class Cell, class S>
struct LayerProducts {
  static constexpr int gates = Cell::gates, first_input = Cell::slots - Cell::gates;

  const Sizes& sizes;
  const S *weight_ih, *weight_hh;
  Element element;
  bool tf32;
  void* workspace;
  Stream stream;
  int first_slot;

  template <class Call>
  LayerProducts(const Call& call, Element stored, void* memory, int first)
      : sizes(call),
        weight_ih(static_cast<const S*>(call.weight_ih)),
        weight_hh(static_cast<const S*>(call.weight_hh)),
        element(stored),
        tf32(call.precision == Precision::tf32),
        workspace(memory),
        stream(call.stream),
        first_slot(first) {}

  void multiply(const Matrix& left, const Matrix& right, const Matrix& to,
                bool adds = false) const {
    if (to.data) matmul(left, right, to, adds, tf32, workspace, stream);
  }
  // Returns `count` blocks of H rows of W or R.
  Matrix blocks(const S* weight, index K, int first, int count, bool transposed) const {
    const S* const at = weight + first * sizes.H * K;
    return {at, element, count * sizes.H, K, K, transposed};
  }

  // Computes W x for rows of x.
  void multiply_inputs(const Matrix& x, const Matrix& to) const {
    multiply(x, blocks(weight_ih, sizes.I, 0, gates, true), to);
  }
  // Computes R h' for rows of h' into to(slot, count), added to its content if
  // adds(slot).
  template <class To, class Adds>
  void multiply_recurrent(const Matrix& h, const To& to, const Adds& adds) const {
    each_recurrent_block<Cell>(first_slot, [&](int slot, int block, int count) {
      multiply(h, blocks(weight_hh, sizes.R, block, count, true), to(slot, count),
               adds(slot));
    });
  }
  // Computes dx, dW and dR from da of the input parts and of the recurrent parts;
  // of_recurrent(slot, count) is transposed. All other rows enter with zeros.
  template <class Call, class F>
  void write_gradients(const Call& call, const Matrix& of_input, const Matrix& x,
                       std::span<const Entering> entering, const F& of_recurrent) const {
    const index I = sizes.I, R = sizes.R, H = sizes.H;
    multiply(of_input, blocks(weight_ih, I, 0, gates, false),
             {call.dx, element, of_input.rows, I, call.dx_b, false}, call.adds_dx);
    Matrix transposed = of_input;
    transposed.transposed = true;
    multiply(transposed, x, {call.dweight_ih, element, gates * H, I, I, false});
    S* const all = static_cast<S*>(call.dweight_hh);
    each_recurrent_block<Cell>(first_slot, [&](int slot, int block, int count) {
      S* const to = all ? all + block * H * R : nullptr;
      bool adds = false;
      for (const auto& [first, h] : entering) {
        multiply(rows_of<S>(of_recurrent(slot, count), first, h.rows), h,
                 {to, element, count * H, R, R, false}, adds);
        adds = true;
      }
    });
  }
};

// Returns x as a matrix of rows by time and then by batch: x itself, or a copy.
template <class P, class Call>
Matrix matrix_of_x(const Call& call, Element element, const void* copy,
                   const Masks& masks) {
  using S = typename P::Storage;
  const index rows = call.T * call.B;
  if (!copy) return {call.x, element, rows, call.I, row_stride(call), false};
  S* const to = static_cast<S*>(const_cast<void*>(copy));
  const GatherRows<P> gather{static_cast<const S*>(call.x),
                             call.x_t,
                             call.x_b,
                             to,
                             call.T,
                             call.B,
                             call.I,
                             masks};
  launch_each(gather, rows * call.I, call.device, call.stream);
  return {copy, element, rows, call.I, call.I, false};
}

// Sets the blocks of weights that feed each slot, or -1.
template <class Cell>
void blocks_of_slots(int (&input)[4], int (&recurrent)[4]) {
  constexpr Shape blocks = fusedrnn::shape_of<Cell>(0);
  static_assert(Cell::slots <= 4);
  for (int k = 0; k < Cell::slots; ++k) {
    input[k] = blocks.input[k];
    recurrent[k] = blocks.recurrent[k];
  }
}

// Packs the bias of each slot of a cell, (slots, H).
template <class Cell, class P>
void pack_bias(Precision precision, const void* bias_ih, const void* bias_hh,
               typename P::State* to, index H, int device, Stream stream) {
  using S = typename P::Storage;
  PackBias<P> bias{P::of(precision),
                   static_cast<const S*>(bias_ih),
                   static_cast<const S*>(bias_hh),
                   to,
                   H,
                   Cell::slots,
                   {},
                   {}};
  blocks_of_slots<Cell>(bias.input_block, bias.recurrent_block);
  launch_each(bias, Cell::slots * H, device, stream);
}

// Clears the gradients of parameters if no step is taken.
template <class Cell, class S, class A, class Call>
void clear_gradients(const Call& call) {
  const index H = call.H, GH = Cell::gates * H;
  const auto zero = [&](void* to, index values, index size) {
    clear(to, values * size, call.stream);
  };
  zero(call.dweight_ih, GH * call.I, sizeof(S));
  zero(call.dweight_hh, GH * call.R, sizeof(S));
  zero(call.dbias_ih, GH, sizeof(S));
  zero(call.dbias_hh, GH, sizeof(S));
  zero(call.dweight_hr, call.R * H, sizeof(S));
  const auto& v = call.dvectors;
  zero(v.weight_ch, Cell::peephole_count * H, sizeof(A));
  zero(v.gamma_ih, GH, sizeof(A));
  zero(v.gamma_hh, GH, sizeof(A));
  zero(v.gamma_c, H, sizeof(A));
  zero(v.beta_c, H, sizeof(A));
}

}  // namespace fusedrnn::cuda
