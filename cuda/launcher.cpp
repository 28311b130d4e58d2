#include "launcher.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace fusedrnn::cuda {

void check(cudaError_t status, const char* what);

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

// A Chain is a graph of launches, each after the end of the one before, which the driver
// gets all at once. Each stream keeps its graph and sets other arguments for each use,
// which do not affect launches that are already queued. Uses of a graph wait for each
// other, so streams must not share one.
struct Chain {
  static constexpr int length = 64;

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t ready = nullptr;
  cudaGraphNode_t nodes[length] = {};

  void set(int i, const void* function, const void* kernel, const Launch& shape) {
    void* argument = const_cast<void*>(kernel);
    cudaKernelNodeParams node{};
    node.func = const_cast<void*>(function);
    node.gridDim = grid_of(shape);
    node.blockDim = dim3(static_cast<unsigned>(shape.threads), 1, 1);
    node.sharedMemBytes = static_cast<unsigned>(shape.shared_bytes);
    node.kernelParams = &argument;
    if (ready) {
      check(cudaGraphExecKernelNodeSetParams(ready, nodes[i], &node),
            "arguments of a graph");
    } else {
      const cudaGraphNode_t* const before = i > 0 ? &nodes[i - 1] : nullptr;
      check(cudaGraphAddKernelNode(&nodes[i], graph, before, i > 0, &node), "graph");
    }
  }
};

// Function has what is known of a device function.
struct Function {
  std::mutex allowing, chaining;
  std::set<int> allowed, launched;  // on devices
  std::map<std::pair<int, Stream>, Chain> chains;
};
Function& known(const void* function) {
  static std::mutex mutex;
  static std::map<const void*, Function> all;
  const std::lock_guard lock(mutex);
  return all[function];
}

// Allows a kernel all of a device's shared memory and its largest clusters. This is done
// once, because the attributes belong to the kernel and not to a launch.
cudaError_t allow(Function& own, const void* function, int ordinal) {
  const std::lock_guard lock(own.allowing);
  if (own.allowed.contains(ordinal)) return cudaSuccess;
  const Device& gpu = device(ordinal);
  cudaError_t status =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(gpu.shared_bytes));
  if (status == cudaSuccess && gpu.largest_cluster > 1) {
    status =
        cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  cudaGetLastError();
  if (status == cudaSuccess) own.allowed.insert(ordinal);
  return status;
}

// Allows a kernel what a launch may need. The first launch loads the kernel, which some
// drivers cannot do while a graph is captured.
Function& prepare_launch(const void* function, Stream stream) {
  Function& own = known(function);
  const int ordinal = current_device();
  {
    const std::lock_guard lock(own.allowing);
    if (!own.launched.contains(ordinal)) {
      if (is_capturing(stream)) {
        throw Error(
            "the first call of its kind loads kernels: make it before a graph is "
            "captured");
      }
      own.launched.insert(ordinal);
    }
  }
  check(allow(own, function, ordinal), "attributes of a kernel");
  return own;
}

}  // namespace

void launch(const void* function, const void* kernel, const Launch& shape,
            Stream stream) {
  prepare_launch(function, stream);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(shape, stream, attributes);
  void* argument = const_cast<void*>(kernel);
  check(cudaLaunchKernelExC(&config, function, &argument), "launch of a kernel");
}

void launch_in_order(const void* function, index count, const KernelList& kernels,
                     const Launch& shape, Stream stream) {
  const auto at = [&](index i) { return kernels.at(kernels.list, i); };
  // While the caller captures a graph, the launches become ordinary nodes of it. Launches
  // that do not fill a chain go first, so that the device has work while the host fills
  // one.
  const index alone = is_capturing(stream) ? count : count % Chain::length;
  for (index i = 0; i < alone; ++i) launch(function, at(i), shape, stream);
  if (alone == count) return;
  Function& own = prepare_launch(function, stream);
  const std::lock_guard lock(own.chaining);
  Chain& chain = own.chains[{current_device(), stream}];
  for (index first = alone; first < count; first += Chain::length) {
    if (!chain.ready) {
      if (chain.graph) cudaGraphDestroy(chain.graph);  // of an attempt that failed
      chain.graph = nullptr;
      check(cudaGraphCreate(&chain.graph, 0), "graph");
    }
    for (int i = 0; i < Chain::length; ++i) chain.set(i, function, at(first + i), shape);
    if (!chain.ready) check(cudaGraphInstantiate(&chain.ready, chain.graph, 0), "graph");
    check(cudaGraphLaunch(chain.ready, static_cast<cudaStream_t>(stream)),
          "launch of a graph");
  }
}

int clusters_at_once(const void* function, const Launch& shape) {
  if (allow(known(function), function, current_device()) != cudaSuccess) return 0;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(shape, nullptr, attributes);
  int clusters = 0;
  const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, function, &config);
  if (status != cudaSuccess) {
    cudaGetLastError();  // a shape that this device cannot run, not a failure
    return 0;
  }
  return clusters;
}

}  // namespace fusedrnn::cuda
