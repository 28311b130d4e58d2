// The records of some steps again, from x, h and c, which wait for nobody.
#pragma once

#include "layout.h"

namespace fusedrnn {

struct RecomputedRows {
  static constexpr int lists = 6;

  index count;
  char **x, **record, **seen, **h_prev, **c_prev, **operand;
  char* nowhere;  // (P), of this thread: h and c are known
  char* of_rows;  // what LayerNorm keeps of some whole rows
  char* operands;
};

void compute_again(const Layout& layout, const char* forward_weights, Call call,
                   const RecomputedRows& rows, const Team& team);

}  // namespace fusedrnn
