// One layer in one direction, as plain sizes and pointers.
//
// Strides count elements and the last axis is always contiguous. "Step s" is the s-th
// step in the direction of travel: time s forward, time T-1-s in reverse.
//
//   x        (T, B, I)  input, strides x_t, x_b
//   y        (T, B, R)  every h, strides y_t, y_b; R = H unless h is projected
//   h0, h_n  (B, R)     h before step 0 and after step T-1, contiguous
//   c0, c_n  (B, H)     the same of c, where the cell has one
//   saved    (T, B, slots [+ c], P) in order of steps, P = H rounded up to whole vectors:
//            what backward needs beside x and y (csrc/cells/cell.h). Padding is finite.
//            With LayerNorm it is as csrc/rows.h says
//   cells    (T, B, H)  every c, strides cells_t, cells_b
//   trace    (T, B, gates, H)  every gate, contiguous
//
//   lengths  (B,)       0 to T, at least one of them T: row b takes the steps of times
//                       below lengths[b]. At the others its state stays, y and dx are 0,
//                       and x, dy and saved are not read
//   resets   (T, B)     contiguous; the state that enters the step of that time and row
//                       is 0, whatever the direction; without effect where none is taken
//
// Gradients carry the name of what they belong to with a prefix d. A null pointer among
// dy, dh_n, dc_n, dcells stands for zeros, that of a mask for none, and among dx and the
// gradients of parameters for one that nobody wants and that costs nothing. Outputs alias
// nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedrnn {

using index = std::ptrdiff_t;

struct Range {
  index begin, end;
};

struct Sizes {
  index T, B, I, H, R;
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
  // Whether no gradient passes from step s to the step before: it is reset, or begins a
  // chunk of bptt times.
  bool is_cut(index s, index b, index bptt) const {
    if (is_reset(s, b)) return true;
    return bptt && (time(s) + reverse) % bptt == 0 && !is_first(s, b);
  }
};

// What decides how a layer's weights and saved values lie in memory.
struct Model {
  index I, H, R;
  int variant;    // of a cell whose kernels serve several
  bool projects;  // h = weight_hr (o tanh(c))
  bool norm;      // LayerNorm
};

// What a call is asked for beside; src/fusedrnn/reference.py says what it means.
struct Options {
  double clip, cell_clip;  // infinite for none
  double zoneout_h, zoneout_c, recurrent_dropout;
  bool training;  // draw at random, else take what is expected
  std::uint64_t seed;
  std::uint32_t where;
  index bptt;  // 0: gradients pass everywhere
};
// Whether R sees another h' than the cell, and whether zoneout changes a state.
constexpr bool drops(const Options& o) { return o.training && o.recurrent_dropout > 0; }
constexpr bool zones_out(const Options& o) { return o.zoneout_h > 0 || o.zoneout_c > 0; }

// Parameters that belong to options, contiguous as the user has them, or null.
template <class S>
struct Vectors {
  S* weight_ch;            // (peepholes, H)
  S *gamma_ih, *gamma_hh;  // (gates, H)
  S *gamma_c, *beta_c;     // (H,)
};

template <class S>
struct Forward : Steps {
  Model model;
  Options options;
  Vectors<const S> vectors;
  bool row_wise;  // whether the plain kernels do not do
  const S* x;
  index x_t, x_b;
  const S *h0, *c0;
  const S* weights;  // packed for forward (csrc/cpu/pack.h), or of that the bias alone
  const S *weight_ih, *weight_hh;  // read as they are where not null
  S* y;
  index y_t, y_b;
  S *h_n, *c_n;
  S* saved;  // null in inference
  S* cells;  // or null
  index cells_t, cells_b;
  S* trace;  // or null
};

template <class S>
struct Backward : Steps {
  Model model;
  Options options;
  Vectors<const S> vectors;
  bool row_wise;
  const S* x;
  index x_t, x_b;
  const S *h0, *c0;
  const S* weights;                // packed for backward, or null
  const S *weight_ih, *weight_hh;  // read as they are where weights is null
  const S* y;
  index y_t, y_b;
  const S* saved;            // null: computed again, from
  const S* forward_weights;  // packed for forward, and
  const S* cells;            // (T, B, H), where the cell has c
  index cells_t, cells_b;
  const S* dy;
  index dy_t, dy_b;
  const S *dh_n, *dc_n;
  const S* dcells;
  index dcells_t, dcells_b;
  S* dx;
  index dx_t, dx_b;
  S *dweight_ih, *dweight_hh, *dbias_ih, *dbias_hh;  // contiguous, torch's shapes
  S* dweight_hr;
  Vectors<S> dvectors;
  S *dh0, *dc0;
};

// Parameters as the user has them, contiguous; biases may be null.
template <class S>
struct Parameters {
  Model model;
  const S *weight_ih, *weight_hh, *bias_ih, *bias_hh, *weight_hr;
};

// Dropout of an array (T, B, N), as it says of its elements; `to` may be `from`.
template <class S>
struct Dropout {
  index T, B, N;
  const S* from;
  index from_t, from_b;
  S* to;
  index to_t, to_b;
  double p;
  std::uint64_t seed;
  std::uint32_t draw, where;  // csrc/vec/random.h
};

}  // namespace fusedrnn
