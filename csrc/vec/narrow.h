// This header is the vector contract of weights that are narrower than float32.
//
// Each ISA's header …_narrow.h defines, beside its Vec<float>,
//
//   Ints                          as many 32-bit integers as a Vec<float> has lanes
//   load(p), broadcast(n), a + b, a & b, max(a, b)
//   shifted_right<n>(a)           filled with zeros
//   bits(x), floats(a)            the same bits as the other type
//   nearest(x), converted(a)      x rounded to integers, ties to even; a as floats
//   put_bytes(a, p)               the lowest byte of each integer
//   put_halves(a, p)              the upper half of each integer
//   from_halves(p)                `lanes` bfloat16 as a Vec<float>
//   float16(p)                    `lanes` float16 as a Vec<float>
//   even_of(p), odd_of(p)         the first (second) of each pair of bfloat16, as a
//                                 Vec<float>
//
// and the formats Int8 and, where the machine multiplies pairs of bfloat16, Pairs
// (cpu/isa/formats.h).
#pragma once

#include "vec.h"

#define FUSEDRNN_PASTE_(a, b) a##b
#define FUSEDRNN_PASTE(a, b) FUSEDRNN_PASTE_(a, b)
#include FUSEDRNN_STRINGIFY(FUSEDRNN_PASTE(FUSEDRNN_VECTORS, _narrow.h))

namespace fusedrnn::FUSEDRNN_ARCH {

// Rounds to bfloat16, ties to even. The result is a float32 whose lower half is zero,
// except that a NaN keeps its payload.
inline Vec<float> rounded_to_bfloat16(Vec<float> x) {
  using V = Vec<float>;
  const Ints of = bits(x), odd = shifted_right<16>(of) & Ints::broadcast(1);
  const Ints up = of + Ints::broadcast(0x7fff) + odd;
  const Ints upper = up & Ints::broadcast(static_cast<int>(0xffff0000u));
  return if_less(abs(x), V::broadcast(__builtin_inff()), floats(upper), x + x);
}

// Writes x rounded to bfloat16.
inline void put_rounded(Vec<float> x, char* p) {
#ifdef __AVX512BF16__
  const __m256bh halves = _mm512_cvtneps_pbh(x.v);
  __builtin_memcpy(p, &halves, sizeof(halves));
#else
  put_halves(bits(rounded_to_bfloat16(x)), p);
#endif
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
