// NEON, which every aarch64 machine has: 4 floats or 2 doubles, 32 registers.
#pragma once

#include <cstdint>

#include <arm_neon.h>

namespace fusedrnn::FUSEDRNN_ARCH {

template <class S>
struct Vec;

template <>
struct Vec<float> {
  using scalar = float;
  static constexpr int lanes = 4;
  static constexpr int registers = 32;

  float32x4_t v;

  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load_n(const float* p, index n) {
    float some[lanes] = {};
    for (index l = 0; l < n; ++l) some[l] = p[l];
    return load(some);
  }
  static Vec broadcast(float s) { return {vdupq_n_f32(s)}; }
  void store(float* p) const { vst1q_f32(p, v); }
  void store_n(float* p, index n) const {
    float all[lanes];
    store(all);
    for (index l = 0; l < n; ++l) p[l] = all[l];
  }

  friend Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
  friend Vec quotient(Vec a, Vec b) { return a / b; }
  friend Vec root(Vec a) { return {vsqrtq_f32(a.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  friend Vec fma_of_negative(Vec a, Vec b, Vec c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {vminq_f32(a.v, b.v)}; }
  friend Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
  friend Vec in_register(Vec x) {
    asm("" : "+w"(x.v));
    return x;
  }
  friend Vec abs(Vec x) { return {vabsq_f32(x.v)}; }
  friend Vec with_sign(Vec x, Vec s) {
    return {vbslq_f32(vdupq_n_u32(0x80000000u), s.v, x.v)};
  }
  friend Vec exp2_of_shifted(Vec t) {
    return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(t.v), 23))};
  }
  friend Vec if_less(Vec a, Vec b, Vec x, Vec y) {
    return {vbslq_f32(vcltq_f32(a.v, b.v), x.v, y.v)};
  }
  friend Vec zip_low(Vec a, Vec b) { return {vzip1q_f32(a.v, b.v)}; }
  friend Vec zip_high(Vec a, Vec b) { return {vzip2q_f32(a.v, b.v)}; }
};

template <>
struct Vec<double> {
  using scalar = double;
  static constexpr int lanes = 2;
  static constexpr int registers = 32;

  float64x2_t v;

  static Vec load(const double* p) { return {vld1q_f64(p)}; }
  static Vec load_n(const double* p, index n) {
    return {vcombine_f64(n > 0 ? vld1_f64(p) : vdup_n_f64(0), vdup_n_f64(0))};
  }
  static Vec broadcast(double s) { return {vdupq_n_f64(s)}; }
  void store(double* p) const { vst1q_f64(p, v); }
  void store_n(double* p, index n) const {
    if (n > 0) vst1_f64(p, vget_low_f64(v));
  }

  friend Vec operator+(Vec a, Vec b) { return {vaddq_f64(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {vsubq_f64(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {vmulq_f64(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {vdivq_f64(a.v, b.v)}; }
  friend Vec quotient(Vec a, Vec b) { return a / b; }
  friend Vec root(Vec a) { return {vsqrtq_f64(a.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
  friend Vec fma_of_negative(Vec a, Vec b, Vec c) { return {vfmsq_f64(c.v, a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {vminq_f64(a.v, b.v)}; }
  friend Vec max(Vec a, Vec b) { return {vmaxq_f64(a.v, b.v)}; }
  friend Vec in_register(Vec x) {
    asm("" : "+w"(x.v));
    return x;
  }
  friend Vec abs(Vec x) { return {vabsq_f64(x.v)}; }
  friend Vec with_sign(Vec x, Vec s) {
    return {vbslq_f64(vdupq_n_u64(0x8000000000000000u), s.v, x.v)};
  }
  friend Vec exp2_of_shifted(Vec t) {
    return {vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(t.v), 52))};
  }
  friend Vec if_less(Vec a, Vec b, Vec x, Vec y) {
    return {vbslq_f64(vcltq_f64(a.v, b.v), x.v, y.v)};
  }
  friend Vec zip_low(Vec a, Vec b) { return {vzip1q_f64(a.v, b.v)}; }
  friend Vec zip_high(Vec a, Vec b) { return {vzip2q_f64(a.v, b.v)}; }
};

struct Words {
  static constexpr int lanes = 2;

  uint64x2_t v;

  static Words load(const std::uint64_t* p) { return {vld1q_u64(p)}; }
  static Words broadcast(std::uint32_t x) { return {vdupq_n_u64(x)}; }
  void choose(std::uint32_t t, float yes, float no, float* to) const {
    vst1_f32(to, vbsl_f32(below(t), vdup_n_f32(yes), vdup_n_f32(no)));
  }
  void choose(std::uint32_t t, double yes, double no, double* to) const {
    const int64x2_t mask = vmovl_s32(vreinterpret_s32_u32(below(t)));
    vst1q_f64(to,
              vbslq_f64(vreinterpretq_u64_s64(mask), vdupq_n_f64(yes), vdupq_n_f64(no)));
  }
  friend Words operator+(Words a, Words b) { return {vaddq_u64(a.v, b.v)}; }
  friend Words operator^(Words a, Words b) { return {veorq_u64(a.v, b.v)}; }
  friend Words times(Words a, Words b) {
    return {vmull_u32(vmovn_u64(a.v), vmovn_u64(b.v))};
  }
  friend Words high(Words a) { return {vshrq_n_u64(a.v, 32)}; }

 private:
  uint32x2_t below(std::uint32_t t) const {
    return vclt_u32(vmovn_u64(v), vdup_n_u32(t));
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
