// This header says where the parts of a saved row and of a row of gradients lie, for both
// backends.
//
// The record of a row and step holds
//
//   slots (slots, P), then c (P) where the cell has c
//
// and with LayerNorm instead
//
//   n_x (gates, P), n_h (gates, P)   W x and R h', normalised, in the order of slots
//   c (P)
//   1/sigma of each group that is normalised together, of n_x and then of n_h
//
// from which backward computes the gates again. A row of gradients holds
//
//   da (slots, P)
//   da_x, da_h (gates, P)  with LayerNorm: of W x and R h'; da itself is of their sum
//   d_squashed, n_c (P)    with LayerNorm of c: of what is squashed, and c normalised
//   c_prev, c (P)          with peepholes: the c that the gates read
//   operand (P)            with a second product: its operand
//   dh (R), m (P)          with a projection: dh, and the operand of the projection
//
// P is H, rounded up where rows are padded.
#pragma once

#include "cells/cell.h"
#include "contract.h"

namespace fusedrnn {

// Returns whether backward needs the slots because h does not determine them. That is so
// for a cell that saves, and where zoneout takes its expectation, which mixes h. Where
// zoneout draws, a unit that keeps its h gives its slots no gradient, whatever their
// values.
FUSEDRNN_SHARED constexpr bool saves_slots(bool cell_saves, const Options& o) {
  return cell_saves || (!o.training && zones_out(o));
}

struct Record {
  static constexpr index stats = 2 * Shape::most_groups;
  int gates, slots;
  bool has_c, norm;
  index P;

  FUSEDRNN_SHARED constexpr Record(const Shape& s, bool has_norm, index padded)
      : gates(s.gates), slots(s.slots), has_c(s.has_c), norm(has_norm), P(padded) {}

  // The input part of slot k begins at input(k), its recurrent part at recurrent(k).
  FUSEDRNN_SHARED constexpr index input(int k) const {
    return (norm ? k - (slots - gates) : k) * P;
  }
  FUSEDRNN_SHARED constexpr index recurrent(int k) const {
    return (norm ? gates + k : k) * P;
  }
  FUSEDRNN_SHARED constexpr index cell() const { return (norm ? 2 * gates : slots) * P; }
  FUSEDRNN_SHARED constexpr index scale() const { return cell() + has_c * P; }
  FUSEDRNN_SHARED constexpr index values() const { return scale() + (norm ? stats : 0); }
};

struct GradientRow {
  index input, recurrent;  // the operands of Wᵀ and Rᵀ
  index squashed, normal_c, c_prev, c, operand, dh, m, values;

  GradientRow() = default;
  FUSEDRNN_SHARED constexpr GradientRow(const Shape& s, const Model& model,
                                        bool has_peephole, index P, index R)
      : values(s.slots * P) {
    const bool norm_c = model.norm && s.has_c;
    input = (s.slots - s.gates) * P;
    recurrent = 0;
    if (model.norm) {
      input = values;
      recurrent = values + s.gates * P;
      values += 2 * s.gates * P;
    }
    squashed = values;
    normal_c = squashed + (norm_c ? P : 0);
    c_prev = normal_c + (norm_c ? P : 0);
    c = c_prev + (has_peephole ? P : 0);
    operand = c + (has_peephole ? P : 0);
    dh = operand + (s.has_second() ? P : 0);
    m = dh + (model.projects ? R : 0);
    values = m + (model.projects ? P : 0);
  }
};

}  // namespace fusedrnn
