// This header launches a kernel as fibers: the part of cuda/runtime.h that is a template.
#pragma once

#include "../runtime.h"
#include "../tuning.h"
#include "fibers.h"

namespace fusedrnn::cuda {

unsigned next_seed();
void check_launch(const Launch& shape);

template <class Kernel>
void launch(const Kernel& kernel, const Launch& shape, Stream) {
  check_launch(shape);
  emulator::run({shape.blocks_x, shape.blocks_y, shape.threads,
                 static_cast<std::size_t>(shape.shared_bytes),
                 shape.clustered || shape.cooperative, next_seed()},
                [&] { kernel(); });
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
