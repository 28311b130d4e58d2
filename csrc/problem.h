// One layer in one direction, as plain sizes and pointers.
//
// Strides count elements and the last axis is always contiguous. "Step s" is the s-th
// step in the direction of travel: time s forward, time T-1-s in reverse.
//
//   x        (T, B, I)  input, strides x_t, x_b
//   y        (T, B, H)  every h, strides y_t, y_b
//   h0, c0   (B, H)     state before step 0, contiguous; c only where the cell has one
//   h_n, c_n (B, H)     state after step T-1, contiguous
//   saved    (T, B, slots [+ c], P) in order of steps, P = H rounded up to whole vectors:
//            what backward needs beside x and y (csrc/cells/cell.h). Padding is finite.
//
//   lengths  (B,)       0 to T, at least one of them T: row b takes the steps of times
//                       below lengths[b]. At the others its state stays, y and dx are 0,
//                       and x, dy and saved are not read
//   resets   (T, B)     contiguous; the state that enters the step of that time and row
//                       is 0, whatever the direction; without effect where none is taken
//
// Gradients carry the name of what they belong to with a prefix d. A null pointer among
// dy, dh_n, dc_n stands for zeros, that of a mask for none. Outputs alias nothing.
#pragma once

#include <cstddef>

namespace fusedrnn {

using index = std::ptrdiff_t;

struct Range {
  index begin, end;
};

struct Sizes {
  index T, B, I, H;
  bool reverse;

  constexpr index time(index step) const { return reverse ? T - 1 - step : step; }
};

// Which steps a row takes, and what state it takes them from.
struct Steps : Sizes {
  const index* lengths;
  const bool* resets;

  bool is_first(index s, index b) const {
    return s == (lengths && reverse ? T - lengths[b] : 0);
  }
  bool is_reset(index s, index b) const { return resets && resets[time(s) * B + b]; }
};

template <class S>
struct Forward : Steps {
  const S* x;
  index x_t, x_b;
  const S *h0, *c0;
  const S* weights;  // packed for forward (csrc/cpu/pack.h), or of that the bias alone
  const S *weight_ih, *weight_hh;  // read as they are where not null
  S* y;
  index y_t, y_b;
  S *h_n, *c_n;
  S* saved;  // null in inference
};

template <class S>
struct Backward : Steps {
  const S* x;
  index x_t, x_b;
  const S *h0, *c0;
  const S* weights;                // packed for backward, or null
  const S *weight_ih, *weight_hh;  // read as they are where weights is null
  const S* y;
  index y_t, y_b;
  const S* saved;
  const S* dy;
  index dy_t, dy_b;
  const S *dh_n, *dc_n;
  S* dx;
  index dx_t, dx_b;
  S *dweight_ih, *dweight_hh, *dbias_ih, *dbias_hh;  // contiguous, torch's shapes
  S *dh0, *dc0;
};

// Parameters as the user has them, contiguous; biases may be null.
template <class S>
struct Parameters {
  index I, H;
  const S *weight_ih, *weight_hh, *bias_ih, *bias_hh;
};

}  // namespace fusedrnn
