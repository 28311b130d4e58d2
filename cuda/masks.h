// Which steps a row takes and where its state starts anew, as kernels ask for it.
#pragma once

#include "device.h"

namespace fusedrnn::cuda {

struct Masks {
  const int* lengths;  // (B,), or null: all T
  const bool* resets;  // (T, B) at any strides, or null: none
  index resets_t, resets_b;

  // The length of a row, to be read once, and whether it takes a step then.
  FUSEDRNN_DEVICE int length(index b) const { return lengths ? lengths[b] : 0; }
  FUSEDRNN_DEVICE bool is_within(index t, int length) const {
    return !lengths || t < length;
  }
  FUSEDRNN_DEVICE bool is_active(index t, index b) const {
    return is_within(t, length(b));
  }
  FUSEDRNN_DEVICE bool is_reset(index t, index b) const {
    return resets && resets[t * resets_t + b * resets_b];
  }
};

}  // namespace fusedrnn::cuda
