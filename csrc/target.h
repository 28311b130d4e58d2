// What host code, CPU kernels and GPU kernels share of the language.
#pragma once

#include <cstddef>

// Marks a function that a GPU may run, too. FUSEDRNN_CALLED is for functions that are not
// worth a copy at each place, FUSEDRNN_LONG for those of which that is true on a CPU.
#ifdef __CUDACC__
#define FUSEDRNN_DEVICE __device__ __forceinline__
#define FUSEDRNN_CALLED __device__ __noinline__ inline
#define FUSEDRNN_LONG FUSEDRNN_DEVICE
#else
#define FUSEDRNN_DEVICE inline
#define FUSEDRNN_CALLED inline
#define FUSEDRNN_LONG [[gnu::noinline]] inline
#endif

// Marks a small function outside of an instruction set's namespace that its code may
// call: a copy of its own in each instruction set's object would be a weak symbol, of
// which the linker keeps one for every machine. FUSEDRNN_CONSTANT is for functions of
// which a GPU knows only what the compiler computes: they read a cell's arrays, which it
// lacks.
#ifdef __CUDACC__
#define FUSEDRNN_SHARED __host__ __device__ __forceinline__
#define FUSEDRNN_CONSTANT
#else
#define FUSEDRNN_SHARED [[gnu::always_inline]] inline
#define FUSEDRNN_CONSTANT FUSEDRNN_SHARED
#endif

// Whether a CPU's code is compiled to be small: then one function serves many cases.
#if defined(__OPTIMIZE_SIZE__) && !defined(__CUDACC__)
#define FUSEDRNN_SMALL 1
#else
#define FUSEDRNN_SMALL 0
#endif

// Stands before a loop over the slots of a cell, which it must unroll for them to stay in
// registers.
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
