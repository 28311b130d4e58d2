// What a cell is: pure functions on a vector type V, which is a register of any ISA, a
// scalar, or a CUDA thread's value. A cell sees no pointer, index or element type.
//
// A cell's values per hidden unit stand in `slots`. Before the cell they hold its
// pre-activations, after a training forward what backward needs, and in backward the
// gradients of the pre-activations:
//
//   slots [0, gates)              have a recurrent part  R h'
//   slots [slots-gates, slots)    have an input part     W x
//
// LSTM and RNN have gates = slots, so both parts meet in one sum. GRU's new gate keeps
// its two parts apart, r being in between, so it has one slot for each.
//
//   gates                  blocks of H rows in weight_ih and weight_hh
//   input_gate[k]          the block of weight_ih that feeds slot slots-gates+k
//   recurrent_gate[k]      the block of weight_hh that feeds slot k
//   saves                  keep the slots for backward
//   has_c                  there is a cell state c beside h
//   has_direct             h' reaches h past the matmul, so backward returns dh_direct
//
//   forward(a, prev)                             -> h, c;  a becomes what is saved
//   backward(s, prev, now, dh, dc)               -> dh_direct, dc';  s becomes da
#pragma once

// Before a function that a GPU may run, too.
#ifdef __CUDACC__
#define FUSEDRNN_DEVICE __device__ __forceinline__
#else
#define FUSEDRNN_DEVICE inline
#endif

namespace fusedrnn {

template <class V>
struct State {
  V h, c;
};

}  // namespace fusedrnn
