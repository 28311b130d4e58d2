// This header describes a call of one layer in one direction, as plain sizes and
// pointers, for both backends.
//
// The element type is S. Strides count elements, or bytes where S is char (the CPU's time
// loop, which is compiled once for all types). The last axis is always contiguous. "Step
// s" is the s-th step in the direction of travel: time s forward, time T-1-s in reverse.
//
//   x        (T, B, I)  input, strides x_t, x_b
//   y        (T, B, R)  every h, strides y_t, y_b; R = H unless h is projected
//   h0, h_n  (B, R)     h before step 0 and after step T-1, contiguous
//   c0, c_n  (B, H)     the same of c, where the cell has one
//   saved    what backward needs beside x and y (record.h): on the CPU (T, B, values) in
//            order of steps, padding is finite
//   cells    (T, B, H)  every c, strides cells_t, cells_b
//   trace    (T, B, gates, H)  every gate, contiguous
//
//   lengths  (B,)       0 to T: row b takes the steps of times below lengths[b]. At the
//                       others its state stays, y and dx are 0, and x, dy and saved are
//                       not read
//   resets   (T, B)     true: the state that enters the step of that time and row is 0,
//                       in either direction; ignored where the row takes no step
//
// A gradient has the name of its array with the prefix d. A null pointer stands for zeros
// among dy, dh_n, dc_n and dcells, and for no mask among the masks. A null dx or
// parameter gradient, and on the CPU a null dh0 or dc0, is not wanted and costs nothing.
// Outputs alias nothing.
#pragma once

#include <cstdint>

#include "target.h"

namespace fusedrnn {

struct Sizes {
  index T, B, I, H, R;
  bool reverse;

  FUSEDRNN_SHARED constexpr index time(index step) const {
    return reverse ? T - 1 - step : step;
  }
};

// These properties of a layer decide how its weights and saved values lie in memory.
struct Model {
  index I, H, R;
  int variant;    // of the cell
  bool projects;  // h = weight_hr (o tanh(c))
  bool norm;      // LayerNorm
};

// An Activation is a function that replaces σ or tanh in a cell (activations.h).
struct Activation {
  enum Kind : int { own, tanh, sigmoid, line, elu, softsign, softplus, leaky, threshold };

  int kind = own;  // own: the cell's
  double alpha = 1, beta = 1, low = 0, high = 0;
};
// `state` replaces the cell's tanh, `gate` its σ.
struct Activations {
  Activation state, gate;
};
FUSEDRNN_SHARED constexpr bool replaces(const Activations& a) {
  return a.state.kind != Activation::own || a.gate.kind != Activation::own;
}

// The options of a call; src/fusedrnn/reference/types.py defines their meaning.
struct Options {
  double clip, cell_clip;  // infinite for none
  double zoneout_h, zoneout_c, recurrent_dropout;
  bool training;  // draw random masks; else use their expectation
  std::uint64_t seed;
  std::uint32_t where;
  index bptt;  // 0: gradients pass everywhere
  Activations activations{};
};
// drops() says whether R multiplies another h' than the cell reads, zones_out() whether
// zoneout changes a state.
FUSEDRNN_SHARED constexpr bool drops(const Options& o) {
  return o.training && o.recurrent_dropout > 0;
}
FUSEDRNN_SHARED constexpr bool zones_out(const Options& o) {
  return o.zoneout_h > 0 || o.zoneout_c > 0;
}

// These bits name the parts of a cell that options change. Functions are compiled for
// some of them: the gates (clips, peepholes), the states (zoneout, recurrent dropout, a
// projection, cells and gates that are returned), the activations.
namespace changes {
enum : int { nothing = 0, gates = 1, states = 2, activations = 4, all = 7 };
}

// The parameters of options are contiguous as the user has them, or null.
template <class S>
struct Vectors {
  S* weight_ch;            // (peepholes, H)
  S *gamma_ih, *gamma_hh;  // (gates, H)
  S *gamma_c, *beta_c;     // (H,)
};

// Precision is what the weights of products are stored as: the element type or, on the
// CPU in inference, something narrower (src/fusedrnn/reference/narrow.py).
enum class Precision : int { element, int8, bfloat16, float16 };
constexpr int precisions = 4;

// The parameters are as the user has them, contiguous; biases and weight_hr may be null.
// Scales belong to the rows of int8 weights.
//
// If calls have `halves`, their x (or float32), y and saved values but for c are
// bfloat16. The parameters have `item` bytes then, those of bfloat16 or float32.
template <class S>
struct Parameters {
  Model model;
  const S *weight_ih, *weight_hh, *bias_ih, *bias_hh, *weight_hr;
  const float *scale_ih = nullptr, *scale_hh = nullptr, *scale_hr = nullptr;
  int input_operands = 1;  // that add up to a row of x, for int8
  bool halves = false;
  index item = 0;
};

template <class S>
struct ForwardOf : Sizes {
  Model model;
  Options options;
  Vectors<const S> vectors;
  const S *weight_ih, *weight_hh;
  const S* x;
  index x_t, x_b;
  const S *h0, *c0;
  S* y;
  index y_t, y_b;
  S *h_n, *c_n;
  S* saved;  // null in inference, and where backward recomputes it
  S* cells;  // or null
  index cells_t, cells_b;
  S* trace;  // or null
};

template <class S>
struct GradientsOf {
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

// A backward call has the arguments and results of its forward call, and the gradients.
// Where `saved` is null backward recomputes it, from `cells` where the cell has c.
template <class S>
struct BackwardOf : ForwardOf<S>, GradientsOf<S> {};

// Dropout copies an array (T, B, N) with elements set to 0 with probability p and the
// others divided by 1 - p. `to` may be `from`.
template <class S>
struct Dropout {
  index T, B, N;
  const S* from;
  index from_t, from_b;
  S* to;
  index to_t, to_b;
  double p;
  std::uint64_t seed;
  std::uint32_t draw, where;  // random.h
};

}  // namespace fusedrnn
