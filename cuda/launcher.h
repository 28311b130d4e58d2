// The launch of a kernel with the CUDA runtime, whatever its type: compiled once. A
// function is one of the device's, and its one argument is what it runs.
#pragma once

#include "runtime.h"

namespace fusedrnn::cuda {

void launch(const void* function, const void* kernel, const Launch& shape, Stream stream);

// The i-th of some kernels of one type: what `at` points to until it is asked again.
struct KernelList {
  const void* (*at)(void* list, index i);
  void* list;
};
// The first so many of them, each after the end of the one before.
void launch_in_turn(const void* function, index count, const KernelList& kernels,
                    const Launch& shape, Stream stream);

int clusters_at_once(const void* function, const Launch& shape);

}  // namespace fusedrnn::cuda
