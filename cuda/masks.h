// Masks says which steps a row takes and which of them reset its state, for kernels.
#pragma once

#include "../csrc/contract.h"
#include "device.h"

namespace fusedrnn::cuda {

struct Masks {
  const int* lengths;  // (B,), or null: all T
  const bool* resets;  // (T, B) at any strides, or null: none
  index resets_t, resets_b;

  // Returns the length of a row, to be read once; is_within says whether the row takes a
  // step at t.
  FUSEDRNN_DEVICE int length(index b) const { return lengths ? lengths[b] : 0; }
  FUSEDRNN_DEVICE bool is_within(index t, int length) const {
    return !lengths || t < length;
  }
  FUSEDRNN_DEVICE bool is_active(index t, index b) const {
    return is_within(t, length(b));
  }
  // Returns the time of the row's step before the one at t, or -1 if that is its first.
  FUSEDRNN_DEVICE index time_before(const Sizes& p, index t, int length) const {
    const index before = p.reverse ? t + 1 : t - 1;
    return before < 0 || before >= p.T || !is_within(before, length) ? -1 : before;
  }
  // Returns whether the step begins a chunk of bptt times, but not the row; bptt = 0
  // means one chunk.
  FUSEDRNN_DEVICE bool begins_chunk(const Sizes& p, int bptt, int t, int length) const {
    return bptt && (t + p.reverse) % bptt == 0 && time_before(p, t, length) >= 0;
  }
  FUSEDRNN_DEVICE bool is_reset(index t, index b) const {
    return resets && resets[t * resets_t + b * resets_b];
  }
};

}  // namespace fusedrnn::cuda
