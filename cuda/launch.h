// The launch of a kernel with the CUDA runtime: the part of runtime.h that is a template.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

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

inline dim3 grid_of(const Launch& shape) {
  return dim3(static_cast<unsigned>(shape.blocks_x),
              static_cast<unsigned>(shape.blocks_y), 1);
}

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
  config.gridDim = grid_of(shape);
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

// Launches of one kernel, each after the end of the one before, as a graph: the driver is
// handed all of them at once. A stream keeps its graph and gives it other arguments for
// each use, which what is queued already does not see. (Uses of a graph wait for each
// other, so streams must not share one.)
template <class Kernel>
class Chain {
 public:
  static constexpr int length = 64;

  template <class F>
  void launch(const F& of, const Launch& shape, Stream stream) {
    if (!ready_) {
      if (graph_) cudaGraphDestroy(graph_);  // of a try that failed
      graph_ = nullptr;
      check(cudaGraphCreate(&graph_, 0), "graph");
    }
    for (int i = 0; i < length; ++i) set(i, of(i), shape);
    if (!ready_) check(cudaGraphInstantiate(&ready_, graph_, 0), "graph");
    check(cudaGraphLaunch(ready_, static_cast<cudaStream_t>(stream)),
          "launch of a graph");
  }

 private:
  void set(int i, Kernel kernel, const Launch& shape) {
    void* argument = &kernel;
    cudaKernelNodeParams node{};
    node.func = reinterpret_cast<void*>(entry<Kernel>);
    node.gridDim = grid_of(shape);
    node.blockDim = dim3(static_cast<unsigned>(shape.threads), 1, 1);
    node.sharedMemBytes = static_cast<unsigned>(shape.shared_bytes);
    node.kernelParams = &argument;
    if (ready_) {
      check(cudaGraphExecKernelNodeSetParams(ready_, nodes_[i], &node),
            "arguments of a graph");
    } else {
      check(cudaGraphAddKernelNode(&nodes_[i], graph_, i > 0 ? &nodes_[i - 1] : nullptr,
                                   i > 0 ? 1 : 0, &node),
            "graph");
    }
  }

  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t ready_ = nullptr;
  cudaGraphNode_t nodes_[length] = {};
};

}  // namespace detail

template <class Kernel>
void launch(const Kernel& kernel, const Launch& shape, Stream stream) {
  check(detail::allow<Kernel>(current_device()), "attributes of a kernel");
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = detail::configuration(shape, stream, attributes);
  check(cudaLaunchKernelEx(&config, entry<Kernel>, kernel), "launch of a kernel");
}

template <class F>
void launch_in_turn(index count, const F& of, const Launch& shape, Stream stream) {
  using Kernel = decltype(of(0));
  using Chain = detail::Chain<Kernel>;
  // In a graph of the caller's they are nodes like all others. What does not fill a chain
  // goes first, so that the device has work while the host fills one.
  const index alone = is_capturing(stream) ? count : count % Chain::length;
  for (index i = 0; i < alone; ++i) launch(of(i), shape, stream);
  if (alone == count) return;
  static std::mutex mutex;
  static std::map<std::pair<int, Stream>, Chain> chains;
  const std::lock_guard lock(mutex);
  const int ordinal = current_device();
  check(detail::allow<Kernel>(ordinal), "attributes of a kernel");
  Chain& chain = chains[{ordinal, stream}];
  for (index first = alone; first < count; first += Chain::length) {
    chain.launch([&](int i) { return of(first + i); }, shape, stream);
  }
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
