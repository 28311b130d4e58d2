// This header packs weights of one or two bytes, which is the same for all instruction
// sets.
#pragma once

#include "kernels.h"

namespace fusedrnn {

// NarrowPanel describes the panels of a product: [K / per][vector][lane][per] weights of
// `bytes` bytes, K padded with zeros to a multiple of `grain`. int8 weights are followed
// by the scale of each column and, if rows are stored with an offset, by minus the offset
// times the sum of the column's weights.
struct NarrowPanel {
  int lanes, bytes, per, grain;
  bool has_scales;
  int offset;
};

index narrow_panel_bytes(const NarrowPanel& panel, int width, index K);
// Packs panels [begin, end) of a matrix to `to`.
void pack_narrow(const NarrowPanel& panel, const Matrix& of, int unit_vectors,
                 Range panels, char* to);

}  // namespace fusedrnn
