// Which steps a row takes and where its state starts anew, as kernels ask for it.
#pragma once

#include "device.h"

namespace fusedrnn::cuda {

struct Masks {
  const int* lengths;  // (B,), or null: all T
  const bool* resets;  // (T, B) at any strides, or null: none
  index resets_t, resets_b;

  FUSEDRNN_DEVICE bool is_active(index t, index b) const {
    return !lengths || t < lengths[b];
  }
  FUSEDRNN_DEVICE bool is_reset(index t, index b) const {
    return resets && resets[t * resets_t + b * resets_b];
  }
};

}  // namespace fusedrnn::cuda
