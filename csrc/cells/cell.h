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
//   saves                  keep the slots for backward; else h alone is known, in slot 0
//   has_c                  there is a cell state c beside h
//   has_direct             h' reaches h past the matmul, so backward returns dh_direct
//
//   forward(a, prev, x)                    -> h, c;  a becomes what is saved
//   backward(s, prev, c, dh, dc, x)        -> dh_direct, dc';  s becomes da
//
// x says what else a step is asked for: `Plain` nothing, `Extras` any of it at run time.
#pragma once

// Before a function that a GPU may run, too.
// FUSEDRNN_CALLED is for what is not worth a copy at each place.
#ifdef __CUDACC__
#define FUSEDRNN_DEVICE __device__ __forceinline__
#define FUSEDRNN_CALLED __device__ __noinline__ inline
#else
#define FUSEDRNN_DEVICE inline
#define FUSEDRNN_CALLED inline
#endif

namespace fusedrnn {

template <class V>
struct State {
  V h, c;
};

// `variant` tells cells apart that share their kernels: an RNN's activation, an LSTM with
// coupled gates. The latter only where `may_vary`, which the plain kernels of the CPU do
// without.
template <class V, bool may_vary = false>
struct Plain {
  int variant;

  FUSEDRNN_DEVICE bool is_variant() const { return may_vary && variant == 1; }
  FUSEDRNN_DEVICE V bounded(V a) const { return a; }
  FUSEDRNN_DEVICE V bounded_cell(V c) const { return c; }
  FUSEDRNN_DEVICE V add_peephole(int, V, V a) const { return a; }
  FUSEDRNN_DEVICE V add_from_peephole(int, V, V dc) const { return dc; }
  FUSEDRNN_DEVICE V through_sigmoid(V, V da) const { return da; }
  FUSEDRNN_DEVICE V through_tanh(V, V da) const { return da; }
  FUSEDRNN_DEVICE V through_bounds(V, V da) const { return da; }
  FUSEDRNN_DEVICE V through_cell(V, V dc) const { return dc; }
};

// Where a pre-activation is clipped no gradient passes. It shows in the activation, which
// then has its value at a bound; one that rounds to that value counts as clipped.
template <class V>
struct Extras {
  int variant;
  bool clips, clips_cell, has_peephole;
  V clip, sigmoid_low, sigmoid_high, tanh_high, cell_clip;
  V peephole[3];  // of the gates that see c, in their order

  FUSEDRNN_DEVICE bool is_variant() const { return variant == 1; }
  FUSEDRNN_DEVICE V bounded(V a) const { return clips ? within(clip, a) : a; }
  FUSEDRNN_DEVICE V bounded_cell(V c) const {
    return clips_cell ? within(cell_clip, c) : c;
  }
  FUSEDRNN_DEVICE V add_peephole(int k, V c, V a) const {
    return has_peephole ? fma(peephole[k], c, a) : a;
  }
  FUSEDRNN_DEVICE V add_from_peephole(int k, V da, V dc) const {
    return has_peephole ? fma(da, peephole[k], dc) : dc;
  }
  FUSEDRNN_DEVICE V through_sigmoid(V s, V da) const {
    return clips ? inside(sigmoid_low, s, sigmoid_high, da) : da;
  }
  FUSEDRNN_DEVICE V through_tanh(V s, V da) const {
    return clips ? inside(negative(tanh_high), s, tanh_high, da) : da;
  }
  FUSEDRNN_DEVICE V through_bounds(V a, V da) const {
    return clips ? inside(negative(clip), a, clip, da) : da;
  }
  FUSEDRNN_DEVICE V through_cell(V c, V dc) const {
    return clips_cell ? inside(negative(cell_clip), c, cell_clip, dc) : dc;
  }

 private:
  FUSEDRNN_DEVICE static V negative(V x) { return V::broadcast(0) - x; }
  FUSEDRNN_DEVICE static V within(V bound, V x) {
    return min(bound, max(negative(bound), x));
  }
  FUSEDRNN_DEVICE static V inside(V low, V x, V high, V dx) {
    const V zero = V::broadcast(0);
    return if_less(low, x, if_less(x, high, dx, zero), zero);
  }
};

}  // namespace fusedrnn
