// The steps that a row takes and those where its state starts anew, as kernels ask for
// it.
#pragma once

#include "../csrc/contract.h"
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
  // The time of a row's step before that of time t, or -1: that is its first.
  FUSEDRNN_DEVICE index time_before(const Sizes& p, index t, int length) const {
    const index before = p.reverse ? t + 1 : t - 1;
    return before < 0 || before >= p.T || !is_within(before, length) ? -1 : before;
  }
  // Whether it begins a chunk of bptt times, but not the row; 0 for one chunk.
  FUSEDRNN_DEVICE bool begins_chunk(const Sizes& p, int bptt, int t, int length) const {
    return bptt && (t + p.reverse) % bptt == 0 && time_before(p, t, length) >= 0;
  }
  FUSEDRNN_DEVICE bool is_reset(index t, index b) const {
    return resets && resets[t * resets_t + b * resets_b];
  }
};

}  // namespace fusedrnn::cuda
