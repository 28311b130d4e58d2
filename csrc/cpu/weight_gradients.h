// The gradients of parameters, of the rows of a stretch of steps: dW = daᵀ x, dR = daᵀ h'
// and the like in blocks of depth, whose columns of da the threads share.
#pragma once

#include "layout.h"

namespace fusedrnn {

// Where the rows are that go into them, by their number within the stretch, and memory.
struct GradientRows {
  // Room for so many rows of a block of depth; f(n, pointers) finds those of row n.
  struct Pointers {
    const char *da, *x, *seen, *saved;
  };
  Pointers (*find)(const void* pass, const Schedule::Entry& at);
  const void* pass;
};

class WeightGradients {
 public:
  struct Scratch {
    char* left;   // of this thread: columns of da for a block of depth
    char* right;  // panels of x, of h' and of a second product's for a block of depth
    char* dbias;  // (slots, P)
    char* sums;   // (vectors, P) gradients of the vectors
  };
  static index left_bytes(const Layout& l) {
    return l.bytes(gradient_depth * gradient_tiles_at_once * l.k.gradient_tile);
  }
  static index right_bytes(const Layout& l, index depth) {
    const index second = l.has_second() ? round_up(l.H, l.lanes) : 0;
    return l.bytes(depth * (round_up(l.I, l.lanes) + round_up(l.R, l.lanes) + second));
  }
  static index vectors(const Layout& l) {
    return l.shape.peephole_count + 2 * l.shape.gates + 2;
  }

  WeightGradients(const Layout& l, const Backward& p, const GradientRow& row,
                  const Scratch& memory, const GradientRows& rows)
      : l_(l), p_(p), row_(row), memory_(memory), rows_(rows) {}

  // Of steps [begin, end).
  void add(const Schedule& all, const Team& team, index begin, index end) const;
  // The gradients of peepholes and of LayerNorm's vectors.
  void add_vectors(const Schedule& all, const Team& team, index begin, index end) const;

 private:
  bool wants_biases() const { return p_.dbias_ih || p_.dbias_hh; }

  const Layout& l_;
  const Backward& p_;
  const GradientRow& row_;
  const Scratch memory_;
  const GradientRows rows_;
};

}  // namespace fusedrnn
