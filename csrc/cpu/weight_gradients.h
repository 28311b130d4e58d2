// This header computes the gradients of parameters from the rows of a time block: dW =
// daᵀ x, dR = daᵀ h' and the like, in blocks of depth. The threads share the columns of
// da.
#pragma once

#include "layout.h"

namespace fusedrnn {

// GradientRows finds the rows of a backward pass that go into the gradients of weights.
struct GradientRows {
  struct Pointers {
    const char *da, *x, *h_dropped, *saved;
  };
  Pointers (*find)(const void* pass, const Schedule::Entry& at);
  const void* pass;
};

class WeightGradients {
 public:
  struct Scratch {
    char* left;   // of this thread: columns of da for a block of depth
    char* right;  // panels of x, h' and a second product's operand for a block of depth
    char* dbias;  // (slots, P)
    char* sums;   // (vectors, P) gradients of peepholes and LayerNorm's vectors
  };
  static index left_bytes(const Layout& l) {
    const index of_column =
        l.halves ? l.product.left_bytes(gradient_depth) : l.bytes(gradient_depth);
    return gradient_tiles_at_once * l.gradients().tile * of_column;
  }
  static index right_bytes(const Layout& l, index depth) {
    const index second = l.has_second() ? panel_bytes(l, depth, l.H) : 0;
    return panel_bytes(l, depth, l.I) + panel_bytes(l, depth, l.R) + second;
  }
  static index vectors(const Layout& l) {
    return l.shape.peephole_count + 2 * l.shape.gates + 2;
  }

  WeightGradients(const Layout& l, const Backward& p, const GradientRow& row,
                  const Scratch& memory, const GradientRows& rows)
      : l_(l), p_(p), row_(row), memory_(memory), rows_(rows) {}

  // Adds the rows of steps [begin, end). The last time block comes first.
  void add(const Schedule& all, const Team& team, index begin, index end) const;
  // Adds the gradients of peepholes and LayerNorm's vectors.
  void add_vectors(const Schedule& all, const Team& team, index begin, index end) const;

 private:
  // Returns the bytes of the panels of `depth` rows of N elements.
  static index panel_bytes(const Layout& l, index depth, index N) {
    if (l.halves) return l.dense_panels(N) * l.product.panel_bytes(2, depth);
    return l.bytes(depth * round_up(N, l.lanes));
  }

  // Depth is the rows that are added at once.
  struct Depth {
    index count;
    bool first;  // whether the sums start with these rows
    const char *da[gradient_depth], *x[gradient_depth], *h_dropped[gradient_depth],
        *saved[gradient_depth];
  };
  void find(const Schedule& all, index begin, index end, index done, Depth& rows) const;
  void add_outer_products(const Depth& rows, Range of_da) const;
  void add_products(const Depth& rows, const Team& team, Range of_da) const;
  Target of_W(const char* panels) const {
    return {row_.input, l_.shape.gates, l_.of_input.blocks, p_.H, l_.P, panels,
            p_.I,       p_.dweight_ih,  p_.gradient_item};
  }
  Target of_R(const char* panels) const {
    return {row_.recurrent, l_.shape.gates, l_.of_recurrent.blocks, p_.H, l_.P, panels,
            p_.R,           p_.dweight_hh,  p_.gradient_item};
  }
  bool wants_biases() const { return p_.dbias_ih || p_.dbias_hh; }

  const Layout& l_;
  const Backward& p_;
  const GradientRow& row_;
  const Scratch memory_;
  const GradientRows rows_;
};

}  // namespace fusedrnn
