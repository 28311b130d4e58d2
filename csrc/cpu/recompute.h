// This header recomputes the records of some steps from x, h and c. These are known, so
// no step waits for another.
#pragma once

#include "layout.h"

namespace fusedrnn {

struct RecomputedRows {
  static constexpr int lists = 6;

  index count;
  char **x, **record, **h_dropped, **h_prev, **c_prev, **operand;
  char* unused_row;  // (P), of this thread: receives h and c, which are known
  char* norm_rows;   // LayerNorm's scratch memory for some whole rows
  index x_item;
  const Operand* operands;  // of x, h' and a second product's operand, if there are any
};

void recompute(const Layout& layout, const char* forward_weights, Call call,
               const RecomputedRows& rows, const Team& team);

}  // namespace fusedrnn
