// This header launches a kernel as fibers: the part of cuda/runtime.h that is a template.
#pragma once

#include "../runtime.h"
#include "../tuning.h"
#include "fibers.h"

namespace fusedrnn::cuda {

void run(const Launch& shape, const std::function<void()>& kernel);

template <class Kernel>
void launch(const Kernel& kernel, const Launch& shape, Stream) {
  run(shape, [&] { kernel(); });
}

template <class F>
void launch_in_order(index count, const F& of, const Launch& shape, Stream stream) {
  for (index i = 0; i < count; ++i) launch(of(i), shape, stream);
}

template <class Kernel>
int clusters_at_once(const Launch& shape) {
  return device(0).multiprocessors / shape.blocks_x;
}

}  // namespace fusedrnn::cuda
