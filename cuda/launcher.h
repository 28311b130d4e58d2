// This header launches a kernel of any type with the CUDA runtime; it is compiled once. A
// `function` is a device function, and `kernel` its one argument.
#pragma once

#include "runtime.h"

namespace fusedrnn::cuda {

void launch(const void* function, const void* kernel, const Launch& shape, Stream stream);

// KernelList has kernels of one type: at(list, i) returns the i-th, which is valid until
// the next call.
struct KernelList {
  const void* (*at)(void* list, index i);
  void* list;
};
// Launches the first `count` of them, each after the end of the one before.
void launch_in_order(const void* function, index count, const KernelList& kernels,
                     const Launch& shape, Stream stream);

int clusters_at_once(const void* function, const Launch& shape);

}  // namespace fusedrnn::cuda
