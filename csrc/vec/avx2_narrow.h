// AVX2 with F16C: bytes by AVX-VNNI where there is one.
#pragma once

namespace fusedrnn::FUSEDRNN_ARCH {

struct Ints {
  __m256i v;

  static Ints load(const std::int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static Ints broadcast(int n) { return {_mm256_set1_epi32(n)}; }
  friend Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
  friend Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.v, b.v)}; }
  friend Ints max(Ints a, Ints b) { return {_mm256_max_epi32(a.v, b.v)}; }
};
template <int n>
inline Ints shifted_right(Ints a) {
  return {_mm256_srli_epi32(a.v, n)};
}
inline Ints bits(Vec<float> x) { return {_mm256_castps_si256(x.v)}; }
inline Vec<float> floats(Ints a) { return {_mm256_castsi256_ps(a.v)}; }
inline Ints nearest(Vec<float> x) { return {_mm256_cvtps_epi32(x.v)}; }
inline Vec<float> converted(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline void put_bytes(Ints a, char* p) {
  const __m256i lowest =
      _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4,
                       8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i found = _mm256_shuffle_epi8(a.v, lowest);
  const __m128i all = _mm_unpacklo_epi32(_mm256_castsi256_si128(found),
                                         _mm256_extracti128_si256(found, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), all);
}
inline void put_halves(Ints a, char* p) {
  const __m256i upper = _mm256_srli_epi32(a.v, 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(upper),
                                    _mm256_extracti128_si256(upper, 1)));
}
inline Vec<float> from_halves(const char* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
}
inline Vec<float> float16(const char* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline __m256i pairs_at(const char* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Vec<float> even_of(const char* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs_at(p), 16))};
}
inline Vec<float> odd_of(const char* p) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(pairs_at(p), upper))};
}

inline __m256i four_at(const char* p) {
  std::int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return _mm256_set1_epi32(four);
}

#ifdef __AVXVNNI__
// VPDPBUSD multiplies unsigned bytes on the left with signed ones.
struct Int8 {
  static constexpr const char* unit = "AVX-VNNI";
  static constexpr int offset = 128, most_sums = 12;
  using Left = __m256i;

  static Left left(const char* p) { return four_at(p); }
  static __m256i right(const char* p) { return pairs_at(p); }
  static Ints add(Left left, __m256i right, Ints sum) {
    return {_mm256_dpbusd_avx_epi32(sum.v, left, right)};
  }
};
#else
// VPMADDUBSW saturates pairs at 16 bits, which |right| · ±left never reaches.
struct Int8 {
  static constexpr const char* unit = "AVX2 maddubs";
  static constexpr int offset = 0, most_sums = 8;
  using Left = __m256i;
  struct Right {
    __m256i of, size;
  };

  static Left left(const char* p) { return four_at(p); }
  static Right right(const char* p) {
    const __m256i of = pairs_at(p);
    return {of, _mm256_abs_epi8(of)};
  }
  static Ints add(Left left, Right right, Ints sum) {
    const __m256i pairs =
        _mm256_maddubs_epi16(right.size, _mm256_sign_epi8(left, right.of));
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
  }
};
#endif

}  // namespace fusedrnn::FUSEDRNN_ARCH
