// AVX-512 with BW: bytes by VNNI where there is one, and pairs of bfloat16.
#pragma once

namespace fusedrnn::FUSEDRNN_ARCH {

struct Ints {
  __m512i v;

  static Ints load(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
  static Ints broadcast(int n) { return {_mm512_set1_epi32(n)}; }
  friend Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
  friend Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
  friend Ints max(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
};
template <int n>
inline Ints shifted_right(Ints a) {
  return {_mm512_srli_epi32(a.v, n)};
}
inline Ints bits(Vec<float> x) { return {_mm512_castps_si512(x.v)}; }
inline Vec<float> floats(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
inline Ints nearest(Vec<float> x) { return {_mm512_cvtps_epi32(x.v)}; }
inline Vec<float> converted(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline void put_bytes(Ints a, char* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline void put_halves(Ints a, char* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(a.v, 16)));
}
inline Vec<float> from_halves(const char* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
inline Vec<float> float16(const char* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec<float> even_of(const char* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
inline Vec<float> odd_of(const char* p) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), upper))};
}

inline __m512i four_at(const char* p) {
  std::int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return _mm512_set1_epi32(four);
}

#ifdef __AVX512VNNI__
// VPDPBUSD multiplies unsigned bytes on the left with signed ones.
struct Int8 {
  static constexpr const char* unit = "AVX-512 VNNI";
  static constexpr int offset = 128, most_sums = 24;
  using Left = __m512i;

  static Left left(const char* p) { return four_at(p); }
  static __m512i right(const char* p) { return _mm512_loadu_si512(p); }
  static Ints add(Left left, __m512i right, Ints sum) {
    return {_mm512_dpbusd_epi32(sum.v, left, right)};
  }
};
#else
// VPMADDUBSW saturates pairs at 16 bits, which |left| · ±right never reaches.
struct Int8 {
  static constexpr const char* unit = "AVX-512 maddubs";
  static constexpr int offset = 0, most_sums = 12;
  struct Left {
    __m512i size;
    __mmask64 negative;
  };

  static Left left(const char* p) {
    const __m512i of = four_at(p);
    return {_mm512_abs_epi8(of), _mm512_movepi8_mask(of)};
  }
  static __m512i right(const char* p) { return _mm512_loadu_si512(p); }
  static Ints add(Left left, __m512i right, Ints sum) {
    const __m512i zero = _mm512_setzero_si512(), ones = _mm512_set1_epi16(1);
    const __m512i with_sign = _mm512_mask_sub_epi8(right, left.negative, zero, right);
    const __m512i pairs = _mm512_maddubs_epi16(left.size, with_sign);
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, ones))};
  }
};
#endif

#ifdef __AVX512BF16__
#define FUSEDRNN_HAS_PAIRS 1
// VDPBF16PS adds the product of the odd elements of a pair, and then that of the even
// ones.
struct Pairs {
  static constexpr const char* unit = "AVX-512 BF16";
  static constexpr int most_sums = 24;
  using Left = __m512i;

  static Left left(const char* p) { return four_at(p); }
  static __m512i right(const char* p) { return _mm512_loadu_si512(p); }
  static Vec<float> add(Left left, __m512i right, Vec<float> sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(left),
                             reinterpret_cast<__m512bh>(right))};
  }
};
#endif

}  // namespace fusedrnn::FUSEDRNN_ARCH
