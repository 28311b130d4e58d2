// This header is the vector contract: the operations that the cells and the kernels use
// of an instruction set.
//
// Each ISA header defines, inside the namespace FUSEDRNN_ARCH, `template <class S> struct
// Vec` for S = float and double with
//
//   scalar, lanes, registers      element type, elements per vector, vector registers
//   load(p), store(p)             `lanes` consecutive elements, any alignment
//   load_n(p, n), store_n(p, n)   the first n < lanes of them; loads fill with zero
//   broadcast(s)                  s in every lane
//   + - * /, root(x)              elementwise, and √x
//   fma(a, b, c)                  a·b + c, rounded once where the machine can
//   fma_of_negative(a, b, c)      c - a·b, likewise
//   quotient(a, b)                a / b within 0.7 ULP for 1 <= b, 0 <= a <= b, as in
//                                 math.h; 0 where 1/b is denormal
//   in_register(x)                x, which the compiler may not read from memory again
//   min(a, b), max(a, b)          b where either is NaN, so max(bound, x) keeps a NaN x
//   abs(x), with_sign(x, s)       |x|; x >= 0 with the sign of s
//   exp2_of_shifted(t)            2^n for t = n + shift (math.h): the exponent's bits are
//                                 the lowest of t
//   if_less(a, b, x, y)           a < b ? x : y
//   zip_low(a, b), zip_high(a, b) interleave a0 b0 a1 b1 … the lower (upper) halves of
//                                 each block of 16 bytes of a and b
//   even_blocks(a, b), odd_…      the even (odd) blocks of 16 bytes of a, then of b; for
//                                 wider vectors only
//
// For random.h it defines `Words`, 32-bit words in the lower halves of 64-bit lanes.
// Operations ignore the upper 32 bits, except high():
//
//   lanes, load(p), broadcast(x), a + b, a ^ b
//   times(a, b)                   64-bit products; high(a) their upper halves
//   choose(t, yes, no, to)        to[e] = a[e] < t ? yes : no, of float or double
//
// The namespace is named after the ISA so that two translation units compiled with
// different flags never share a function: the linker would keep one of them for every
// machine. For the same reason kernel code includes no standard header with function
// templates.
#pragma once

#include "../target.h"

#ifndef FUSEDRNN_ARCH
#error "kernel headers are compiled once per ISA: set FUSEDRNN_ARCH"
#endif

#define FUSEDRNN_STRINGIFY_(x) #x
#define FUSEDRNN_STRINGIFY(x) FUSEDRNN_STRINGIFY_(x)
// The vectors of another ISA may be compiled with more flags, in a namespace of their
// own.
#ifndef FUSEDRNN_VECTORS
#define FUSEDRNN_VECTORS FUSEDRNN_ARCH
#endif
#include FUSEDRNN_STRINGIFY(FUSEDRNN_VECTORS.h)

namespace fusedrnn::FUSEDRNN_ARCH {

// These load or store all lanes or, at the end of a row, the n that exist.
template <class V>
inline V load_upto(const typename V::scalar* p, index n) {
  return n >= V::lanes ? V::load(p) : V::load_n(p, n);
}

template <class V>
inline void store_upto(V x, typename V::scalar* p, index n) {
  if (n >= V::lanes) {
    x.store(p);
  } else {
    x.store_n(p, n);
  }
}

// Transposes a square of lanes × lanes. Zipping row i with row i + half moves one bit of
// the row's number into the lane's, so log2(block) rounds transpose squares within
// blocks; taking even and odd blocks of rows i and i + 1 moves one bit of the block's
// number into the row's.
template <class V>
inline void transpose(V (&rows)[V::lanes]) {
  constexpr int block = 16 / sizeof(typename V::scalar), blocks = V::lanes / block;
  constexpr int half = block / 2;
#pragma GCC unroll 16
  for (int first = 0; first < V::lanes; first += block) {
#pragma GCC unroll 4
    for (int round = 1; round < block; round *= 2) {
      V zipped[block];
#pragma GCC unroll 4
      for (int i = 0; i < half; ++i) {
        zipped[2 * i] = zip_low(rows[first + i], rows[first + i + half]);
        zipped[2 * i + 1] = zip_high(rows[first + i], rows[first + i + half]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < block; ++i) rows[first + i] = zipped[i];
    }
  }
  if constexpr (blocks > 1) {
#pragma GCC unroll 4
    for (int at = 0; at < block; ++at) {
#pragma GCC unroll 4
      for (int round = 1; round < blocks; round *= 2) {
        V sorted[blocks];
#pragma GCC unroll 4
        for (int i = 0; i < blocks / 2; ++i) {
          const V a = rows[at + 2 * i * block], b = rows[at + (2 * i + 1) * block];
          sorted[i] = even_blocks(a, b);
          sorted[i + blocks / 2] = odd_blocks(a, b);
        }
#pragma GCC unroll 4
        for (int i = 0; i < blocks; ++i) rows[at + i * block] = sorted[i];
      }
    }
  }
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
