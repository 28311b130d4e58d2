// AVX2 with FMA: 8 floats or 4 doubles, 16 registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fusedrnn::FUSEDRNN_ARCH {

template <class S>
struct Vec;

template <>
struct Vec<float> {
  using scalar = float;
  static constexpr int lanes = 8;
  static constexpr int registers = 16;

  __m256 v;

  static __m256i first(index n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
  }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load_n(const float* p, index n) { return {_mm256_maskload_ps(p, first(n))}; }
  static Vec broadcast(float s) { return {_mm256_set1_ps(s)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_n(float* p, index n) const { _mm256_maskstore_ps(p, first(n), v); }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Vec quotient(Vec a, Vec b) { return a / b; }
  friend Vec root(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec fma_of_negative(Vec a, Vec b, Vec c) {
    return {_mm256_fnmadd_ps(a.v, b.v, c.v)};
  }
  friend Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Vec in_register(Vec x) {
    asm("" : "+x"(x.v));
    return x;
  }
  friend Vec abs(Vec x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
  friend Vec with_sign(Vec x, Vec s) {
    return {_mm256_or_ps(x.v, _mm256_and_ps(_mm256_set1_ps(-0.0f), s.v))};
  }
  friend Vec exp2_of_shifted(Vec t) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t.v), 23))};
  }
  friend Vec if_less(Vec a, Vec b, Vec x, Vec y) {
    return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
  }
  friend Vec zip_low(Vec a, Vec b) { return {_mm256_unpacklo_ps(a.v, b.v)}; }
  friend Vec zip_high(Vec a, Vec b) { return {_mm256_unpackhi_ps(a.v, b.v)}; }
  friend Vec even_blocks(Vec a, Vec b) {
    return {_mm256_permute2f128_ps(a.v, b.v, 0x20)};
  }
  friend Vec odd_blocks(Vec a, Vec b) { return {_mm256_permute2f128_ps(a.v, b.v, 0x31)}; }
};

template <>
struct Vec<double> {
  using scalar = double;
  static constexpr int lanes = 4;
  static constexpr int registers = 16;

  __m256d v;

  static __m256i first(index n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec load_n(const double* p, index n) {
    return {_mm256_maskload_pd(p, first(n))};
  }
  static Vec broadcast(double s) { return {_mm256_set1_pd(s)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store_n(double* p, index n) const { _mm256_maskstore_pd(p, first(n), v); }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_pd(a.v, b.v)}; }
  friend Vec quotient(Vec a, Vec b) { return a / b; }
  friend Vec root(Vec a) { return {_mm256_sqrt_pd(a.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  friend Vec fma_of_negative(Vec a, Vec b, Vec c) {
    return {_mm256_fnmadd_pd(a.v, b.v, c.v)};
  }
  friend Vec min(Vec a, Vec b) { return {_mm256_min_pd(a.v, b.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm256_max_pd(a.v, b.v)}; }
  friend Vec in_register(Vec x) {
    asm("" : "+x"(x.v));
    return x;
  }
  friend Vec abs(Vec x) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), x.v)}; }
  friend Vec with_sign(Vec x, Vec s) {
    return {_mm256_or_pd(x.v, _mm256_and_pd(_mm256_set1_pd(-0.0), s.v))};
  }
  friend Vec exp2_of_shifted(Vec t) {
    return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(t.v), 52))};
  }
  friend Vec if_less(Vec a, Vec b, Vec x, Vec y) {
    return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ))};
  }
  friend Vec zip_low(Vec a, Vec b) { return {_mm256_unpacklo_pd(a.v, b.v)}; }
  friend Vec zip_high(Vec a, Vec b) { return {_mm256_unpackhi_pd(a.v, b.v)}; }
  friend Vec even_blocks(Vec a, Vec b) {
    return {_mm256_permute2f128_pd(a.v, b.v, 0x20)};
  }
  friend Vec odd_blocks(Vec a, Vec b) { return {_mm256_permute2f128_pd(a.v, b.v, 0x31)}; }
};

struct Words {
  static constexpr int lanes = 4;

  __m256i v;

  static Words load(const std::uint64_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static Words broadcast(std::uint32_t x) {
    return {_mm256_set1_epi64x(static_cast<long long>(x))};
  }
  void choose(std::uint32_t t, float yes, float no, float* to) const {
    const __m256i evens = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    const __m256i chosen = _mm256_permutevar8x32_epi32(below(t), evens);
    const __m128 mask = _mm_castsi128_ps(_mm256_castsi256_si128(chosen));
    _mm_storeu_ps(to, _mm_blendv_ps(_mm_set1_ps(no), _mm_set1_ps(yes), mask));
  }
  void choose(std::uint32_t t, double yes, double no, double* to) const {
    const __m256d mask = _mm256_castsi256_pd(_mm256_shuffle_epi32(below(t), 0xA0));
    _mm256_storeu_pd(to, _mm256_blendv_pd(_mm256_set1_pd(no), _mm256_set1_pd(yes), mask));
  }
  friend Words operator+(Words a, Words b) { return {_mm256_add_epi64(a.v, b.v)}; }
  friend Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
  friend Words times(Words a, Words b) { return {_mm256_mul_epu32(a.v, b.v)}; }
  friend Words high(Words a) { return {_mm256_srli_epi64(a.v, 32)}; }

 private:
  // AVX2 compares signed integers, so the sign bits are flipped first.
  __m256i below(std::uint32_t t) const {
    const __m256i half = _mm256_set1_epi32(INT32_MIN);
    const __m256i bound = _mm256_set1_epi32(static_cast<int>(t));
    return _mm256_cmpgt_epi32(_mm256_xor_si256(bound, half), _mm256_xor_si256(v, half));
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
