// The launch of a kernel with the CUDA runtime: the part of runtime.h that is a template.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>

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

// Lets a kernel have all of a device's shared memory and its largest clusters; once,
// since the attributes are the kernel's and not a launch's.
template <class Kernel>
cudaError_t allow(int ordinal) {
  static std::mutex mutex;
  static std::map<int, cudaError_t> allowed;
  const std::lock_guard lock(mutex);
  const auto known = allowed.find(ordinal);
  if (known != allowed.end()) return known->second;
  const Device& gpu = device(ordinal);
  cudaError_t status =
      cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(gpu.shared_bytes));
  if (status == cudaSuccess && gpu.largest_cluster > 1) {
    status = cudaFuncSetAttribute(entry<Kernel>,
                                  cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  cudaGetLastError();
  return allowed[ordinal] = status;
}

}  // namespace detail

template <class Kernel>
void launch(const Kernel& kernel, const Launch& shape, Stream stream) {
  check(detail::allow<Kernel>(current_device()), "attributes of a kernel");
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = detail::configuration(shape, stream, attributes);
  check(cudaLaunchKernelEx(&config, entry<Kernel>, kernel), "launch of a kernel");
}

template <class Kernel>
int clusters_at_once(const Launch& shape) {
  if (detail::allow<Kernel>(current_device()) != cudaSuccess) return 0;
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
