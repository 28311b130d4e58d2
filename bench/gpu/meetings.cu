// This program measures what it costs thread blocks to meet: the time of a step that is
// nothing but a meeting.
//
//   nvcc -O3 -std=c++20 -gencode arch=compute_90a,code=sm_90a -o meetings meetings.cu
//   ./meetings        a line of JSON for each: nanoseconds, median and quartiles
//
// A recurrence's blocks meet once per step, and a step takes at least as long as a
// meeting. Here blocks of 256 threads, one on each multiprocessor, do nothing else: in
// step n every block sends 128, 512 or 2048 bytes (8 rows × 8, 32 or 128 units of 16
// bits) to all others, and the step ends when it has read theirs. The ways, each with
// what its time includes:
//
//   block barrier      one block, through its own shared memory: the base, because every
//                      way below has such a barrier or a more expensive one in its step
//   cluster barrier    stores into the peers' shared memory, then barrier.cluster; also
//                      with nothing sent
//   cluster mbarrier   st.async into the peers' shared memory, which completes bytes of a
//                      transaction barrier there
//   grid flags         stores to memory, a flag released by one thread of each block;
//                      each thread acquires the flag of one block, and a block barrier
//                      follows
//   grid sentinel      no flags: the data itself is polled until none of it is the
//                      sentinel, all of it again or only what was missing. There are 4
//                      buffers, so that a fence fits between clearing a place and writing
//                      it again. It stands before the send, where it has little to wait
//                      for, or after it, where other blocks do not wait for it
//   grid.sync          that of cooperative groups
//   graph launch       one launch per step, in a CUDA graph, of a kernel that does
//                      nothing or adds one to a number in memory
//
// Every received word is compared with what its sender must have written in that step of
// that launch: `wrong` counts the threads that read another value. A launch of 2 × N
// steps minus one of N gives the time of N without the cost of a launch. A wait of
// seconds ends the program with an error; `note` says what could not be run.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int threads = 256;
constexpr int meetings = 1000, repetitions = 5, warm_ups = 1;
constexpr int most_quads = 128;  // of 16 bytes, that a block sends to the others
constexpr int largest_cluster = 16, most_blocks = 256, most_buffers = 4;
constexpr int at_once = 8;  // quads that a thread asks for before it waits
constexpr int reserved_bytes = 128 * 1024;  // so that a multiprocessor has one block
constexpr unsigned sentinel = ~0u;

// Exchange has the arguments of a launch. data: (most_buffers, most_blocks, most_quads),
// flags: (most_blocks,)
struct Exchange {
  int steps;
  unsigned salt;  // of the launch
  uint4* data;
  unsigned* flags;
  unsigned* wrong;
};

// Words are below 2³¹, so never the sentinel.
__device__ uint4 payload(const Exchange& e, int n, int block, int quad) {
  const unsigned number =
      static_cast<unsigned>((n * most_blocks + block) * most_quads + quad);
  const unsigned word = (number * 2654435761u ^ e.salt * 40503u) & 0x7ffffffcu;
  return {word, word | 1, word | 2, word | 3};
}
__device__ unsigned difference(const uint4& a, const uint4& b) {
  return (a.x ^ b.x) | (a.y ^ b.y) | (a.z ^ b.z) | (a.w ^ b.w);
}
__device__ void report(const Exchange& e, unsigned wrong) {
  if (wrong != 0) atomicAdd(e.wrong, 1u);
}
// Ends the program if a wait does not end.
__device__ void count_poll(int& polls) {
  if (++polls > 1 << 22) __trap();
}

__global__ void __launch_bounds__(threads) block_barrier(Exchange e) {
  __shared__ uint4 slots[2][threads];
  const int thread = static_cast<int>(threadIdx.x);
  unsigned wrong = 0;
  for (int n = 0; n < e.steps; ++n) {
    slots[n & 1][thread] = payload(e, n, thread, 0);
    __syncthreads();
    const int other = thread ^ 32;
    wrong |= difference(slots[n & 1][other], payload(e, n, other, 0));
  }
  report(e, wrong);
}

__device__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
__device__ unsigned in_peer(const void* p, int rank) {
  unsigned peer;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(peer)
      : "r"(shared_address(p)), "r"(rank));
  return peer;
}
__device__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Calls f(peer, quad) for all that a block sends to its cluster, and likewise receives.
template <int quads, class F>
__device__ void each_sent(const F& f) {
  for (int i = static_cast<int>(threadIdx.x); i < cluster_size() * quads; i += threads) {
    f(i / quads, i % quads);
  }
}
// Returns the cluster's places: (2 buffers, largest_cluster, quads).
template <int quads>
__device__ uint4* slot(int n, int block, int quad) {
  extern __shared__ uint4 slots[];
  return slots + ((n & 1) * largest_cluster + block) * quads + quad;
}

template <int quads, bool sends>
__global__ void __launch_bounds__(threads) cluster_barrier(Exchange e) {
  const int own = cluster_rank();
  unsigned wrong = 0;
  sync_cluster();
  for (int n = 0; n < e.steps; ++n) {
    if constexpr (sends) {
      each_sent<quads>([&](int peer, int quad) {
        const uint4 value = payload(e, n, own, quad);
        asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(
                         in_peer(slot<quads>(n, own, quad), peer)),
                     "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                     : "memory");
      });
    }
    sync_cluster();
    if constexpr (sends) {
      each_sent<quads>([&](int peer, int quad) {
        wrong |= difference(*slot<quads>(n, peer, quad), payload(e, n, peer, quad));
      });
    }
  }
  sync_cluster();
  report(e, wrong);
}

__device__ void expect(const unsigned long long* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Step n uses barrier n % 2, in its phase n / 2. A peer sends step n + 2 only after it
// got our step n + 1, which we send after all our threads have read step n and the
// barrier of step n was armed again.
template <int quads>
__global__ void __launch_bounds__(threads) cluster_mbarrier(Exchange e) {
  __shared__ unsigned long long barriers[2];
  const int own = cluster_rank(), size = cluster_size();
  const int bytes = size * quads * static_cast<int>(sizeof(uint4));
  if (threadIdx.x == 0) {
    for (const unsigned long long& barrier : barriers) {
      asm volatile(
          "mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier))
          : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (const unsigned long long& barrier : barriers) expect(&barrier, bytes);
  }
  unsigned wrong = 0;
  sync_cluster();
  for (int n = 0; n < e.steps; ++n) {
    const unsigned long long* const barrier = &barriers[n & 1];
    each_sent<quads>([&](int peer, int quad) {
      const uint4 value = payload(e, n, own, quad);
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
          "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(in_peer(slot<quads>(n, own, quad), peer)),
          "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w),
          "r"(in_peer(barrier, peer))
          : "memory");
    });
    const unsigned parity = static_cast<unsigned>(n >> 1 & 1);
    unsigned done = 0;
    for (int polls = 0; done == 0; count_poll(polls)) {
      asm volatile(
          "{\n\t"
          ".reg .pred complete;\n\t"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], "
          "%2;\n\t"
          "selp.u32 %0, 1, 0, complete;\n\t"
          "}"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    }
    if (threadIdx.x == 0) expect(barrier, bytes);
    each_sent<quads>([&](int peer, int quad) {
      wrong |= difference(*slot<quads>(n, peer, quad), payload(e, n, peer, quad));
    });
    __syncthreads();
  }
  sync_cluster();
  report(e, wrong);
}

template <int quads>
__device__ uint4* place(const Exchange& e, int buffer, int block, int quad) {
  return e.data + (buffer * most_blocks + block) * quads + quad;
}
template <int quads>
__device__ void send(const Exchange& e, int n, int own) {
  for (int quad = static_cast<int>(threadIdx.x); quad < quads; quad += threads) {
    *place<quads>(e, n & 1, own, quad) = payload(e, n, own, quad);
  }
}

// Calls read(first, all) for the first of at_once quads that a thread reads, `threads`
// apart, until all that the grid sent is read.
template <int quads, class F>
__device__ void each_read(const F& read) {
  const int all = static_cast<int>(gridDim.x) * quads;
  for (int first = static_cast<int>(threadIdx.x); first < all;
       first += at_once * threads) {
    read(first, all);
  }
}

// Reads what all blocks sent in step n, which has arrived.
template <int quads>
__device__ unsigned receive(const Exchange& e, int n) {
  unsigned wrong = 0;
  each_read<quads>([&](int first, int all) {
    uint4 got[at_once];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const int i = first + k * threads;
      if (i < all) got[k] = __ldcg(place<quads>(e, n & 1, i / quads, i % quads));
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const int i = first + k * threads;
      if (i < all) wrong |= difference(got[k], payload(e, n, i / quads, i % quads));
    }
  });
  return wrong;
}

template <int quads>
__global__ void __launch_bounds__(threads) grid_flags(Exchange e) {
  const int thread = static_cast<int>(threadIdx.x);
  const int own = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  unsigned wrong = 0;
  for (int n = 0; n < e.steps; ++n) {
    const unsigned next = static_cast<unsigned>(n + 1);
    send<quads>(e, n, own);
    __syncthreads();
    if (thread == 0) {
      asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(e.flags + own), "r"(next)
                   : "memory");
    }
    if (thread < blocks) {
      unsigned flag = 0;
      for (int polls = 0; flag < next; count_poll(polls)) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(flag)
                     : "l"(e.flags + thread)
                     : "memory");
      }
    }
    __syncthreads();
    wrong |= receive<quads>(e, n);
    __syncthreads();  // all data is read before the next flag is released
  }
  report(e, wrong);
}

__device__ void store_relaxed(uint4* p, const uint4& value) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}
__device__ uint4 load_relaxed(const uint4* p) {
  uint4 value;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(p)
               : "memory");
  return value;
}
__device__ bool has_sentinel(const uint4& value) {
  return value.x == sentinel || value.y == sentinel || value.z == sentinel ||
         value.w == sentinel;
}

// When a block has all of step n - 1, all blocks have read step n - 2, and each clears
// its own place of that step with its send of step n. A fence separates that from the
// data of step n + 1, which a reader has, and fences, before it polls the place for step
// n + 2. Buffers hold the sentinel at the start.
template <int quads, bool fence_is_after, bool asks_for_missing>
__global__ void __launch_bounds__(threads) grid_sentinel(Exchange e) {
  const int thread = static_cast<int>(threadIdx.x);
  const int own = static_cast<int>(blockIdx.x);
  const auto fence = [] { asm volatile("fence.acq_rel.gpu;" ::: "memory"); };
  unsigned wrong = 0;
  for (int n = 0; n < e.steps; ++n) {
    for (int quad = thread; quad < quads; quad += threads) {
      store_relaxed(place<quads>(e, n % most_buffers, own, quad),
                    payload(e, n, own, quad));
      if (n < 2) continue;
      store_relaxed(place<quads>(e, (n - 2) % most_buffers, own, quad),
                    {sentinel, sentinel, sentinel, sentinel});
    }
    if constexpr (fence_is_after) fence();
    each_read<quads>([&](int first, int all) {
      uint4 got[at_once];
#pragma unroll
      for (int k = 0; k < at_once; ++k) got[k].x = sentinel;
      bool waits = true;
      for (int polls = 0; waits; count_poll(polls)) {
#pragma unroll
        for (int k = 0; k < at_once; ++k) {
          const int i = first + k * threads;
          if (i >= all || (asks_for_missing && !has_sentinel(got[k]))) continue;
          got[k] = load_relaxed(place<quads>(e, n % most_buffers, i / quads, i % quads));
        }
        waits = false;
#pragma unroll
        for (int k = 0; k < at_once; ++k) {
          if (first + k * threads < all) waits = waits || has_sentinel(got[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        const int i = first + k * threads;
        if (i < all) wrong |= difference(got[k], payload(e, n, i / quads, i % quads));
      }
    });
    if constexpr (!fence_is_after) fence();
    __syncthreads();
  }
  report(e, wrong);
}

template <int quads>
__global__ void __launch_bounds__(threads) grid_sync(Exchange e) {
  const auto grid = cooperative_groups::this_grid();
  const int own = static_cast<int>(blockIdx.x);
  unsigned wrong = 0;
  for (int n = 0; n < e.steps; ++n) {
    send<quads>(e, n, own);
    grid.sync();
    wrong |= receive<quads>(e, n);
  }
  report(e, wrong);
}

__global__ void __launch_bounds__(threads) nothing(unsigned*) {}
__global__ void __launch_bounds__(threads) add_one(unsigned* number) {
  if (blockIdx.x == 0 && threadIdx.x == 0) ++*number;
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

struct Event {
  cudaEvent_t event;
  Event() { check(cudaEventCreate(&event), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
};

struct Memory {
  void* at;
  std::size_t bytes;
  explicit Memory(std::size_t size) : bytes(size) {
    check(cudaMalloc(&at, size), "cudaMalloc");
  }
  ~Memory() { cudaFree(at); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void fill(int byte) { check(cudaMemset(at, byte, bytes), "cudaMemset"); }
};

struct Bench {
  using Kernel = void (*)(Exchange);

  Event begin, end;
  Memory data{most_buffers * most_blocks * most_quads * sizeof(uint4)};
  Memory flags{most_blocks * sizeof(unsigned)};
  Memory wrong{sizeof(unsigned)};
  unsigned launches = 0;
  bool failed = false;

  unsigned read_wrong() {
    unsigned count;
    check(cudaMemcpy(&count, wrong.at, sizeof count, cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    return count;
  }

  // Measures milliseconds(steps) of launches, and adds a row.
  void measure(const std::string& meeting, int bytes, int blocks, int groups,
               const std::function<float(int)>& milliseconds) {
    std::array<float, repetitions> ns{};
    std::string note;
    unsigned wrong_count = 0;
    try {
      wrong.fill(0);
      for (int i = -warm_ups; i < repetitions; ++i) {
        const float shorter = milliseconds(meetings), longer = milliseconds(2 * meetings);
        if (i >= 0) {
          ns[static_cast<std::size_t>(i)] = (longer - shorter) / meetings * 1e6f;
        }
      }
      std::sort(ns.begin(), ns.end());
      wrong_count = read_wrong();
      failed = failed || wrong_count > 0;
    } catch (const std::runtime_error& error) {
      note = error.what();
      failed = true;
    }
    print(meeting, bytes, blocks, groups, note.empty() ? &ns : nullptr, wrong_count,
          note);
  }

  static void print(const std::string& meeting, int bytes, int blocks, int groups,
                    const std::array<float, repetitions>* ns, unsigned wrong_count,
                    const std::string& note) {
    char numbers[160] = "\"ns\": null, \"quartiles\": null";
    if (ns) {
      std::snprintf(numbers, sizeof numbers, "\"ns\": %.1f, \"quartiles\": [%.1f, %.1f]",
                    (*ns)[repetitions / 2], (*ns)[repetitions / 4],
                    (*ns)[repetitions - 1 - repetitions / 4]);
    }
    std::printf(
        "{\"stage\": \"meetings\", \"meeting\": \"%s\", \"bytes\": %d, \"blocks\": %d, "
        "\"groups\": %d, %s, \"wrong\": %u, \"note\": \"%s\"}\n",
        meeting.c_str(), bytes, blocks, groups, numbers, wrong_count, note.c_str());
    std::fflush(stdout);
  }

  float launch(Kernel kernel, cudaLaunchConfig_t config, int steps) {
    flags.fill(0);
    data.fill(0xFF);
    const Exchange exchange{steps, ++launches, static_cast<uint4*>(data.at),
                            static_cast<unsigned*>(flags.at),
                            static_cast<unsigned*>(wrong.at)};
    check(cudaEventRecord(begin.event), "cudaEventRecord");
    check(cudaLaunchKernelEx(&config, kernel, exchange), "launch");
    return finish();
  }
  float finish() {
    check(cudaGetLastError(), "launch");
    check(cudaEventRecord(end.event), "cudaEventRecord");
    check(cudaEventSynchronize(end.event), "kernel");
    float ms;
    check(cudaEventElapsedTime(&ms, begin.event, end.event), "cudaEventElapsedTime");
    return ms;
  }

  static cudaLaunchConfig_t configuration(int blocks, cudaLaunchAttribute* attribute) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = reserved_bytes;
    config.attrs = attribute;
    config.numAttrs = attribute ? 1 : 0;
    return config;
  }
  static void reserve(Kernel kernel) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               reserved_bytes),
          "shared memory");
  }

  // Measures one cluster alone, then as many as run at once.
  void measure_cluster(const std::string& meeting, int bytes, Kernel kernel, int size) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    int at_once = 0;
    try {
      reserve(kernel);
      check(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster size");
      const cudaLaunchConfig_t config = configuration(size, &attribute);
      check(cudaOccupancyMaxActiveClusters(&at_once, kernel, &config), "cluster size");
    } catch (const std::runtime_error& error) {
      cudaGetLastError();
      print(meeting, bytes, size, 0, nullptr, 0, error.what());
      return;
    }
    if (at_once == 0) {
      print(meeting, bytes, size, 0, nullptr, 0, "no cluster of this size fits");
      return;
    }
    for (const int groups : {1, at_once}) {
      const cudaLaunchConfig_t config = configuration(size * groups, &attribute);
      measure(meeting, bytes, size, groups,
              [&](int steps) { return launch(kernel, config, steps); });
      if (at_once == 1) break;
    }
  }

  void measure_grid(const std::string& meeting, int bytes, Kernel kernel, int blocks) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    const cudaLaunchConfig_t config = configuration(blocks, &attribute);
    measure(meeting, bytes, blocks, 1, [&](int steps) {
      reserve(kernel);
      return launch(kernel, config, steps);
    });
  }

  void measure_graph(const std::string& meeting, void (*kernel)(unsigned*), int blocks,
                     bool adds) {
    cudaStream_t stream{};
    cudaGraphExec_t graphs[2] = {};  // with `meetings` launches and with twice as many
    const auto capture = [&](int count) {
      cudaGraph_t graph;
      check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
      for (int i = 0; i < count; ++i) {
        kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(
            static_cast<unsigned*>(flags.at));
      }
      check(cudaStreamEndCapture(stream, &graph), "capture");
      cudaGraphExec_t ready;
      check(cudaGraphInstantiate(&ready, graph, 0), "cudaGraphInstantiate");
      check(cudaGraphDestroy(graph), "cudaGraphDestroy");
      return ready;
    };
    measure(meeting, 0, blocks, 1, [&](int steps) {
      if (!stream) check(cudaStreamCreate(&stream), "cudaStreamCreate");
      cudaGraphExec_t& graph = graphs[steps / meetings - 1];
      if (!graph) graph = capture(steps);
      flags.fill(0);
      check(cudaDeviceSynchronize(), "cudaMemset");
      check(cudaEventRecord(begin.event, stream), "cudaEventRecord");
      check(cudaGraphLaunch(graph, stream), "cudaGraphLaunch");
      check(cudaEventRecord(end.event, stream), "cudaEventRecord");
      check(cudaEventSynchronize(end.event), "graph");
      unsigned sum;
      check(cudaMemcpy(&sum, flags.at, sizeof sum, cudaMemcpyDeviceToHost), "cudaMemcpy");
      if (adds && sum != static_cast<unsigned>(steps)) {
        throw std::runtime_error(std::to_string(sum) + " launches ran of " +
                                 std::to_string(steps));
      }
      float ms;
      check(cudaEventElapsedTime(&ms, begin.event, end.event), "cudaEventElapsedTime");
      return ms;
    });
    for (const cudaGraphExec_t graph : graphs) {
      if (graph) cudaGraphExecDestroy(graph);
    }
    if (stream) cudaStreamDestroy(stream);
  }

  template <int quads>
  void measure_payload(const std::vector<int>& grids) {
    constexpr int bytes = quads * 16;
    for (const int blocks : grids) {
      measure_grid("grid sentinel, fence after, asks for missing", bytes,
                   grid_sentinel<quads, true, true>, blocks);
      measure_grid("grid sentinel, fence before, asks for missing", bytes,
                   grid_sentinel<quads, false, true>, blocks);
      measure_grid("grid sentinel, fence before, asks for all", bytes,
                   grid_sentinel<quads, false, false>, blocks);
      measure_grid("grid flags", bytes, grid_flags<quads>, blocks);
      measure_grid("grid.sync", bytes, grid_sync<quads>, blocks);
    }
    for (int size = 2; size <= largest_cluster; size *= 2) {
      measure_cluster("cluster mbarrier", bytes, cluster_mbarrier<quads>, size);
      measure_cluster("cluster barrier", bytes, cluster_barrier<quads, true>, size);
    }
  }

  void measure_all(int multiprocessors) {
    reserve(block_barrier);
    // The clock rises while this runs.
    for (int i = 0; i < 20; ++i)
      launch(block_barrier, configuration(1, nullptr), 100'000);
    measure("block barrier", 0, 1, 1, [&](int steps) {
      return launch(block_barrier, configuration(1, nullptr), steps);
    });
    for (const int blocks : {1, multiprocessors}) {
      measure_graph("graph launch, nothing", nothing, blocks, false);
      measure_graph("graph launch, adds one", add_one, blocks, true);
    }
    std::vector<int> grids;
    for (const int blocks : {16, 32, 64, 96, 128}) {
      if (blocks < multiprocessors) grids.push_back(blocks);
    }
    grids.push_back(std::min(multiprocessors, most_blocks));
    measure_payload<8>(grids);
    measure_payload<32>(grids);
    measure_payload<128>(grids);
    for (int size = 2; size <= largest_cluster; size *= 2) {
      measure_cluster("cluster barrier, nothing sent", 0, cluster_barrier<1, false>,
                      size);
    }
  }
};

}  // namespace

int main() {
  try {
    check(cudaSetDevice(0), "cudaSetDevice");
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
    Bench bench;
    bench.measure_all(device.multiProcessorCount);
    return bench.failed ? 1 : 0;
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
