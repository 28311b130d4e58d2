// How a kernel is launched with the CUDA runtime, for all types of kernels: compiled
// once.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <map>
#include <mutex>
#include <utility>

#include "runtime.h"

namespace fusedrnn::cuda {

void check(cudaError_t status, const char* what);

// Launches one function, whose argument is a kernel.
class Launcher {
 public:
  explicit Launcher(const void* function) : function_(function) {}
  void launch(const void* kernel, const Launch& shape, Stream stream);
  void launch_in_turn(index count, const std::function<const void*(index)>& kernel,
                      const Launch& shape, Stream stream);
  int clusters_at_once(const Launch& shape);

 private:
  // Launches, each after the end of the one before, as a graph: the driver is handed all
  // of them at once. A stream keeps its graph and gives it other arguments for each use,
  // which what is queued already does not see. (Uses of a graph wait for each other, so
  // streams must not share one.)
  struct Chain {
    static constexpr int length = 64;

    cudaGraph_t graph = nullptr;
    cudaGraphExec_t ready = nullptr;
    cudaGraphNode_t nodes[length] = {};
  };

  cudaError_t allow(int ordinal);
  void set(Chain& chain, int i, const void* kernel, const Launch& shape) const;

  const void* const function_;
  std::mutex allowing_, chaining_;
  std::map<int, cudaError_t> allowed_;
  std::map<std::pair<int, Stream>, Chain> chains_;
};

}  // namespace fusedrnn::cuda
