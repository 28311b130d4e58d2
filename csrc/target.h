// This header defines what differs between host code, CPU kernels and GPU kernels.
#pragma once

#include <cstddef>

// FUSEDRNN_DEVICE marks a function that a GPU may run, too. FUSEDRNN_CALLED marks one
// that is not worth inlining, FUSEDRNN_LONG one that is not worth inlining on a CPU.
#ifdef __CUDACC__
#define FUSEDRNN_DEVICE __device__ __forceinline__
#define FUSEDRNN_CALLED __device__ __noinline__ inline
#define FUSEDRNN_LONG FUSEDRNN_DEVICE
#else
#define FUSEDRNN_DEVICE inline
#define FUSEDRNN_CALLED [[gnu::noinline]] inline
#define FUSEDRNN_LONG [[gnu::noinline]] inline
#endif

// FUSEDRNN_SHARED marks a small function outside an instruction set's namespace that
// kernel code may call. It is always inlined: a copy in each instruction set's object
// would be a weak symbol, of which the linker keeps one for every machine.
// FUSEDRNN_CONSTANT marks a function that reads a cell's arrays, which a GPU lacks, so a
// GPU has only the values that the compiler computes.
#ifdef __CUDACC__
#define FUSEDRNN_SHARED __host__ __device__ __forceinline__
#define FUSEDRNN_CONSTANT
#else
#define FUSEDRNN_SHARED [[gnu::always_inline]] inline
#define FUSEDRNN_CONSTANT FUSEDRNN_SHARED
#endif

// FUSEDRNN_SMALL is 1 in CPU code that is compiled for size: then one function serves
// many cases.
#if defined(__OPTIMIZE_SIZE__) && !defined(__CUDACC__)
#define FUSEDRNN_SMALL 1
#else
#define FUSEDRNN_SMALL 0
#endif

// FUSEDRNN_UNROLL stands before a loop over the slots of a cell, which stay in registers
// only if the loop is unrolled.
#ifdef __CUDACC__
#define FUSEDRNN_UNROLL _Pragma("unroll")
#elif FUSEDRNN_SMALL
#define FUSEDRNN_UNROLL
#else
#define FUSEDRNN_UNROLL _Pragma("GCC unroll 8")
#endif

namespace fusedrnn {

constexpr bool is_small = FUSEDRNN_SMALL != 0;

using index = std::ptrdiff_t;

struct Range {
  index begin, end;
};

FUSEDRNN_SHARED constexpr index round_up(index n, index multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace fusedrnn
