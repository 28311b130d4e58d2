// The launch of a kernel with the CUDA runtime: the part of runtime.h that is a template.
#pragma once

#include <cuda_runtime.h>

#include "runtime.h"
#include "tuning.h"

namespace fusedrnn::cuda {

void check(cudaError_t status, const char* what);

template <class Kernel>
__global__ void __launch_bounds__(most_threads, 1)
    entry(const __grid_constant__ Kernel kernel) {
  kernel();
}

namespace detail {

inline cudaLaunchConfig_t configuration(const Launch& shape, Stream stream,
                                        cudaLaunchAttribute (&attributes)[2]) {
  unsigned count = 0;
  if (shape.clustered && shape.blocks_x > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(shape.blocks_x);
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (shape.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks_x),
                        static_cast<unsigned>(shape.blocks_y), 1);
  config.blockDim = dim3(static_cast<unsigned>(shape.threads), 1, 1);
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  return config;
}

template <class Kernel>
void allow(const Launch& shape) {
  constexpr index always = 48 * 1024;
  constexpr int portable_cluster = 8;
  if (shape.shared_bytes > always) {
    check(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          "shared memory of a kernel");
  }
  if (shape.clustered && shape.blocks_x > portable_cluster) {
    check(cudaFuncSetAttribute(entry<Kernel>,
                               cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster of a kernel");
  }
}

}  // namespace detail

template <class Kernel>
void launch(const Kernel& kernel, const Launch& shape, Stream stream) {
  detail::allow<Kernel>(shape);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = detail::configuration(shape, stream, attributes);
  check(cudaLaunchKernelEx(&config, entry<Kernel>, kernel), "launch of a kernel");
}

template <class Kernel>
int clusters_at_once(const Launch& shape) {
  detail::allow<Kernel>(shape);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = detail::configuration(shape, nullptr, attributes);
  int clusters = 0;
  const cudaError_t status =
      cudaOccupancyMaxActiveClusters(&clusters, entry<Kernel>, &config);
  if (status != cudaSuccess) {
    cudaGetLastError();  // a shape that this device cannot run, not a failure
    return 0;
  }
  return clusters;
}

}  // namespace fusedrnn::cuda
