#include "launcher.h"

namespace fusedrnn::cuda {
namespace {

dim3 grid_of(const Launch& shape) {
  return dim3(static_cast<unsigned>(shape.blocks_x),
              static_cast<unsigned>(shape.blocks_y), 1);
}

cudaLaunchConfig_t configuration(const Launch& shape, Stream stream,
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

}  // namespace

// Lets a kernel have all of a device's shared memory and its largest clusters; once,
// since the attributes are the kernel's and not a launch's.
cudaError_t Launcher::allow(int ordinal) {
  const std::lock_guard lock(allowing_);
  const auto known = allowed_.find(ordinal);
  if (known != allowed_.end()) return known->second;
  const Device& gpu = device(ordinal);
  cudaError_t status =
      cudaFuncSetAttribute(function_, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(gpu.shared_bytes));
  if (status == cudaSuccess && gpu.largest_cluster > 1) {
    status = cudaFuncSetAttribute(function_,
                                  cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  cudaGetLastError();
  return allowed_[ordinal] = status;
}

void Launcher::launch(const void* kernel, const Launch& shape, Stream stream) {
  check(allow(current_device()), "attributes of a kernel");
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(shape, stream, attributes);
  void* argument = const_cast<void*>(kernel);
  check(cudaLaunchKernelExC(&config, function_, &argument), "launch of a kernel");
}

void Launcher::set(Chain& chain, int i, const void* kernel, const Launch& shape) const {
  void* argument = const_cast<void*>(kernel);
  cudaKernelNodeParams node{};
  node.func = const_cast<void*>(function_);
  node.gridDim = grid_of(shape);
  node.blockDim = dim3(static_cast<unsigned>(shape.threads), 1, 1);
  node.sharedMemBytes = static_cast<unsigned>(shape.shared_bytes);
  node.kernelParams = &argument;
  if (chain.ready) {
    check(cudaGraphExecKernelNodeSetParams(chain.ready, chain.nodes[i], &node),
          "arguments of a graph");
  } else {
    const cudaGraphNode_t* const before = i > 0 ? &chain.nodes[i - 1] : nullptr;
    check(cudaGraphAddKernelNode(&chain.nodes[i], chain.graph, before, i > 0, &node),
          "graph");
  }
}

void Launcher::launch_in_turn(index count,
                              const std::function<const void*(index)>& kernel,
                              const Launch& shape, Stream stream) {
  // In a graph of the caller's they are nodes like all others. What does not fill a chain
  // goes first, so that the device has work while the host fills one.
  const index alone = is_capturing(stream) ? count : count % Chain::length;
  for (index i = 0; i < alone; ++i) launch(kernel(i), shape, stream);
  if (alone == count) return;
  const std::lock_guard lock(chaining_);
  const int ordinal = current_device();
  check(allow(ordinal), "attributes of a kernel");
  Chain& chain = chains_[{ordinal, stream}];
  for (index first = alone; first < count; first += Chain::length) {
    if (!chain.ready) {
      if (chain.graph) cudaGraphDestroy(chain.graph);  // of a try that failed
      chain.graph = nullptr;
      check(cudaGraphCreate(&chain.graph, 0), "graph");
    }
    for (int i = 0; i < Chain::length; ++i) set(chain, i, kernel(first + i), shape);
    if (!chain.ready) check(cudaGraphInstantiate(&chain.ready, chain.graph, 0), "graph");
    check(cudaGraphLaunch(chain.ready, static_cast<cudaStream_t>(stream)),
          "launch of a graph");
  }
}

int Launcher::clusters_at_once(const Launch& shape) {
  if (allow(current_device()) != cudaSuccess) return 0;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(shape, nullptr, attributes);
  int clusters = 0;
  const cudaError_t status =
      cudaOccupancyMaxActiveClusters(&clusters, function_, &config);
  if (status != cudaSuccess) {
    cudaGetLastError();  // a shape that this device cannot run, not a failure
    return 0;
  }
  return clusters;
}

}  // namespace fusedrnn::cuda
