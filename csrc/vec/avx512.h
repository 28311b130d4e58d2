// AVX-512 F, DQ, VL: 16 floats or 8 doubles, 32 registers, masks for tails.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fusedrnn::FUSEDRNN_ARCH {

template <class S>
struct Vec;

template <>
struct Vec<float> {
  using scalar = float;
  static constexpr int lanes = 16;
  static constexpr int registers = 32;

  __m512 v;

  static __mmask16 first(index n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load_n(const float* p, index n) {
    return {_mm512_maskz_loadu_ps(first(n), p)};
  }
  static Vec broadcast(float s) { return {_mm512_set1_ps(s)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_n(float* p, index n) const { _mm512_mask_storeu_ps(p, first(n), v); }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Vec root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
  // Refines a 14-bit approximation of 1/b by one Newton step on the quotient (in double
  // first one on 1/b) instead of dividing (Emerald Rapids, 16 units of an LSTM: 67
  // instead of 70 cycles).
  friend Vec quotient(Vec a, Vec b) {
    const Vec inverse{_mm512_rcp14_ps(b.v)}, first = a * inverse;
    return fma({_mm512_fnmadd_ps(b.v, first.v, a.v)}, inverse, first);
  }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec fma_of_negative(Vec a, Vec b, Vec c) {
    return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
  }
  friend Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Vec in_register(Vec x) {
    asm("" : "+v"(x.v));
    return x;
  }
  friend Vec abs(Vec x) { return {_mm512_abs_ps(x.v)}; }
  friend Vec with_sign(Vec x, Vec s) {
    return {_mm512_or_ps(x.v, _mm512_and_ps(_mm512_set1_ps(-0.0f), s.v))};
  }
  friend Vec exp2_of_shifted(Vec t) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t.v), 23))};
  }
  friend Vec if_less(Vec a, Vec b, Vec x, Vec y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
  }
  friend Vec zip_low(Vec a, Vec b) { return {_mm512_unpacklo_ps(a.v, b.v)}; }
  friend Vec zip_high(Vec a, Vec b) { return {_mm512_unpackhi_ps(a.v, b.v)}; }
  friend Vec even_blocks(Vec a, Vec b) { return {_mm512_shuffle_f32x4(a.v, b.v, 0x88)}; }
  friend Vec odd_blocks(Vec a, Vec b) { return {_mm512_shuffle_f32x4(a.v, b.v, 0xdd)}; }
};

template <>
struct Vec<double> {
  using scalar = double;
  static constexpr int lanes = 8;
  static constexpr int registers = 32;

  __m512d v;

  static __mmask8 first(index n) { return static_cast<__mmask8>((1u << n) - 1); }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec load_n(const double* p, index n) {
    return {_mm512_maskz_loadu_pd(first(n), p)};
  }
  static Vec broadcast(double s) { return {_mm512_set1_pd(s)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store_n(double* p, index n) const { _mm512_mask_storeu_pd(p, first(n), v); }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_pd(a.v, b.v)}; }
  friend Vec root(Vec a) { return {_mm512_sqrt_pd(a.v)}; }
  friend Vec quotient(Vec a, Vec b) {
    const Vec rough{_mm512_rcp14_pd(b.v)};
    const Vec left{_mm512_fnmadd_pd(b.v, rough.v, _mm512_set1_pd(1))};
    const Vec inverse = fma(left, rough, rough), first = a * inverse;
    return fma({_mm512_fnmadd_pd(b.v, first.v, a.v)}, inverse, first);
  }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  friend Vec fma_of_negative(Vec a, Vec b, Vec c) {
    return {_mm512_fnmadd_pd(a.v, b.v, c.v)};
  }
  friend Vec min(Vec a, Vec b) { return {_mm512_min_pd(a.v, b.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm512_max_pd(a.v, b.v)}; }
  friend Vec in_register(Vec x) {
    asm("" : "+v"(x.v));
    return x;
  }
  friend Vec abs(Vec x) { return {_mm512_abs_pd(x.v)}; }
  friend Vec with_sign(Vec x, Vec s) {
    return {_mm512_or_pd(x.v, _mm512_and_pd(_mm512_set1_pd(-0.0), s.v))};
  }
  friend Vec exp2_of_shifted(Vec t) {
    return {_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(t.v), 52))};
  }
  friend Vec if_less(Vec a, Vec b, Vec x, Vec y) {
    return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
  }
  friend Vec zip_low(Vec a, Vec b) { return {_mm512_unpacklo_pd(a.v, b.v)}; }
  friend Vec zip_high(Vec a, Vec b) { return {_mm512_unpackhi_pd(a.v, b.v)}; }
  friend Vec even_blocks(Vec a, Vec b) { return {_mm512_shuffle_f64x2(a.v, b.v, 0x88)}; }
  friend Vec odd_blocks(Vec a, Vec b) { return {_mm512_shuffle_f64x2(a.v, b.v, 0xdd)}; }
};

struct Words {
  static constexpr int lanes = 8;

  __m512i v;

  static Words load(const std::uint64_t* p) { return {_mm512_loadu_si512(p)}; }
  static Words broadcast(std::uint32_t x) {
    return {_mm512_set1_epi64(static_cast<long long>(x))};
  }
  void choose(std::uint32_t t, float yes, float no, float* to) const {
    const __m256 chosen =
        _mm256_mask_blend_ps(below(t), _mm256_set1_ps(no), _mm256_set1_ps(yes));
    _mm256_storeu_ps(to, chosen);
  }
  void choose(std::uint32_t t, double yes, double no, double* to) const {
    const __m512d chosen =
        _mm512_mask_blend_pd(below(t), _mm512_set1_pd(no), _mm512_set1_pd(yes));
    _mm512_storeu_pd(to, chosen);
  }
  friend Words operator+(Words a, Words b) { return {_mm512_add_epi64(a.v, b.v)}; }
  friend Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
  friend Words times(Words a, Words b) { return {_mm512_mul_epu32(a.v, b.v)}; }
  friend Words high(Words a) { return {_mm512_srli_epi64(a.v, 32)}; }

 private:
  __mmask8 below(std::uint32_t t) const {
    return _mm256_cmplt_epu32_mask(_mm512_cvtepi64_epi32(v),
                                   _mm256_set1_epi32(static_cast<int>(t)));
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
