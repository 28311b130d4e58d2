// The launch of a kernel with the CUDA runtime: the part of runtime.h that is a template,
// and small, because it is compiled for each kernel.
#pragma once

#include "launcher.h"
#include "tuning.h"

namespace fusedrnn::cuda {

template <class Kernel>
__global__ void __launch_bounds__(most_threads, 1)
    entry(const __grid_constant__ Kernel kernel) {
  kernel();
}

template <class Kernel>
Launcher& launcher() {
  static Launcher own(reinterpret_cast<const void*>(entry<Kernel>));
  return own;
}

template <class Kernel>
void launch(const Kernel& kernel, const Launch& shape, Stream stream) {
  launcher<Kernel>().launch(&kernel, shape, stream);
}

template <class F>
void launch_in_turn(index count, const F& of, const Launch& shape, Stream stream) {
  using Kernel = decltype(of(0));
  Kernel kernel{};
  const auto next = [&](index i) {
    kernel = of(i);
    return &kernel;
  };
  launcher<Kernel>().launch_in_turn(count, next, shape, stream);
}

template <class Kernel>
int clusters_at_once(const Launch& shape) {
  return launcher<Kernel>().clusters_at_once(shape);
}

}  // namespace fusedrnn::cuda
