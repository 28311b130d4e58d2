// A Stack has layers in one or both directions; this header runs a whole call of it.
//
// Sizes and arrays are those of ../contract.h, for all layers and directions together.
// With L layers and D directions, layer l in direction d has the number l·D + d:
//
//   y, cells      (T, B, D·R), (T, B, D·H)  of the last layer, directions side by side
//   h0, h_n, …    (L·D, B, R), c0, c_n, … (L·D, B, H)
//   trace         (L·D, T, B, blocks, H)
//   gradients     ten arrays for each, in the order of reference.Parameters
//
// Strides are in bytes. In halves y, trace and dy are bfloat16, and x, dx and
// gradients may be; states and cells are float32. Layer l + 1 reads the y of layer l.
#pragma once

#include <memory>
#include <vector>

#include "weights.h"

namespace fusedrnn {

struct Stack {
  std::vector<std::unique_ptr<const Weights>> weights;  // of each layer and direction
  int directions;
  double dropout;  // of y between two layers, in training

  index count() const { return static_cast<index>(weights.size()); }
  const Layout& layout() const { return weights[0]->layout(); }
};

// StackCall has the arguments that forward and backward share.
struct StackCall {
  index T, B;
  index x_item;  // bytes of an element of x and dx
  bool reverse;  // of a single direction
  Options options;
  double weight_dropout;
  bool recompute, returns_gates;  // returns_gates: every c or gate is returned
  const index* lengths;           // (B,) 0 to T, or null
  const bool* resets;             // (T, B), contiguous; or null
  const bool* mask;               // (T, B), the steps that rows take; or null
  bool repeats;                   // y at other steps is h of the state, not 0
  const char* x;
  index x_t, x_b;
  const char *h0, *c0;  // null for zeros
};

struct StackForward : StackCall {
  char* y;
  index y_t, y_b;
  index y_d;  // between directions; 0: side by side, which a call with a mask needs
  char *h_n, *c_n;
  char* cells;  // or null
  index cells_t, cells_b;
  char* trace;  // or null
  char* saved;  // (T, B, saved_bytes()), or null in inference
};

constexpr int parameter_count = 10;

struct StackBackward : StackCall {
  const char* y;
  index y_t, y_b;
  const char* cells;  // where they were returned
  index cells_t, cells_b;
  const char* saved;
  const char* dy;  // dy, dh_n, dc_n and dcells may be null for zeros
  index dy_t, dy_b;
  const char *dh_n, *dc_n;
  const char* dcells;
  index dcells_t, dcells_b;
  char* dx;  // or null
  index dx_t, dx_b;
  char *dh0, *dc0;         // each may be null
  index gradient_item;     // bytes of an element of gradients
  char* const* gradients;  // null for each that is not wanted
};

// Returns how many bytes a training forward saves for each row of a step, beside its
// arguments and results.
index saved_bytes(const Stack& stack, const StackCall& call);
void forward(const Stack& stack, const StackForward& call);
void backward(const Stack& stack, const StackBackward& call);
// forward and backward call these for a call with a mask (masked.cpp).
void forward_masked(const Stack& stack, const StackForward& call);
void backward_masked(const Stack& stack, const StackBackward& call);
// Returns how a forward of one layer and direction is laid out.
ForwardPlan plan(const Stack& stack, index at, const StackCall& call);

}  // namespace fusedrnn
