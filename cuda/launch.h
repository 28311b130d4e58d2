// This header launches kernels with the CUDA runtime. It is the part of runtime.h that is
// a template, and small, because it is compiled for each kernel.
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
const void* function_of() {
  return reinterpret_cast<const void*>(entry<Kernel>);
}

template <class Kernel>
void launch(const Kernel& kernel, const Launch& shape, Stream stream) {
  launch(function_of<Kernel>(), &kernel, shape, stream);
}

template <class F>
void launch_in_order(index count, const F& of, const Launch& shape, Stream stream) {
  using Kernel = decltype(of(0));
  struct List {
    const F& of;
    Kernel kernel;
  } list{of, {}};
  const auto at = [](void* p, index i) -> const void* {
    List& list = *static_cast<List*>(p);
    list.kernel = list.of(i);
    return &list.kernel;
  };
  launch_in_order(function_of<Kernel>(), count, {at, &list}, shape, stream);
}

template <class Kernel>
int clusters_at_once(const Launch& shape) {
  return clusters_at_once(function_of<Kernel>(), shape);
}

}  // namespace fusedrnn::cuda
