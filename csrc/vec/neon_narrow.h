// NEON: bytes by DOTPROD and I8MM where there are such units, and pairs of bfloat16.
#pragma once

namespace fusedrnn::FUSEDRNN_ARCH {

struct Ints {
  int32x4_t v;

  static Ints load(const std::int32_t* p) { return {vld1q_s32(p)}; }
  static Ints broadcast(int n) { return {vdupq_n_s32(n)}; }
  friend Ints operator+(Ints a, Ints b) { return {vaddq_s32(a.v, b.v)}; }
  friend Ints operator&(Ints a, Ints b) { return {vandq_s32(a.v, b.v)}; }
  friend Ints max(Ints a, Ints b) { return {vmaxq_s32(a.v, b.v)}; }
};
template <int n>
inline Ints shifted_right(Ints a) {
  return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v), n))};
}
inline Ints bits(Vec<float> x) { return {vreinterpretq_s32_f32(x.v)}; }
inline Vec<float> floats(Ints a) { return {vreinterpretq_f32_s32(a.v)}; }
inline Ints nearest(Vec<float> x) { return {vcvtnq_s32_f32(x.v)}; }
inline Vec<float> converted(Ints a) { return {vcvtq_f32_s32(a.v)}; }
inline void put_bytes(Ints a, char* p) {
  const int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(a.v), vdup_n_s16(0)));
  const std::int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
  __builtin_memcpy(p, &four, sizeof(four));
}
inline void put_halves(Ints a, char* p) {
  const uint16x4_t upper = vshrn_n_u32(vreinterpretq_u32_s32(a.v), 16);
  __builtin_memcpy(p, &upper, sizeof(upper));
}
inline Vec<float> from_halves(const char* p) {
  uint16x4_t halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  return {vreinterpretq_f32_u32(vshll_n_u16(halves, 16))};
}
inline Vec<float> float16(const char* p) {
  float16x4_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return {vcvt_f32_f16(four)};
}
inline uint32x4_t pairs_at(const char* p) {
  return vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const std::uint8_t*>(p)));
}
inline Vec<float> even_of(const char* p) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(pairs_at(p), 16))};
}
inline Vec<float> odd_of(const char* p) {
  return {vreinterpretq_f32_u32(vandq_u32(pairs_at(p), vdupq_n_u32(0xffff0000u)))};
}

struct Int8 {
  static constexpr int offset = 0, most_sums = 24;
  using Left = int8x16_t;

  static Left left(const char* p) {
    std::int32_t four;
    __builtin_memcpy(&four, p, sizeof(four));
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static Left right(const char* p) {
    return vld1q_s8(reinterpret_cast<const std::int8_t*>(p));
  }
#ifdef __ARM_FEATURE_DOTPROD
  static constexpr const char* unit = "NEON DOTPROD";
  static Ints add(Left left, Left right, Ints sum) {
    return {vdotq_s32(sum.v, left, right)};
  }
#else
  static constexpr const char* unit = "NEON";
  static Ints add(Left left, Left right, Ints sum) {
    const int16x8_t low = vmull_s8(vget_low_s8(left), vget_low_s8(right));
    const int16x8_t high = vmull_high_s8(left, right);
    return {vaddq_s32(sum.v, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)))};
  }
#endif
#ifdef FUSEDRNN_WITH_ROW_PAIRS
  // SMMLA multiplies eight elements of two rows with those of two columns. Two vectors of
  // weights have four columns.
  struct Columns {
    int8x16_t first, second;
  };
  struct Pair {
    int32x4_t first, second;  // each has two columns of a row, and of the other

    static Pair zeros() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
    Ints first_row() const {
      return {vcombine_s32(vget_low_s32(first), vget_low_s32(second))};
    }
    Ints second_row() const {
      return {vcombine_s32(vget_high_s32(first), vget_high_s32(second))};
    }
  };
  static Left left_pair(const char* a, const char* b) {
    return vcombine_s8(vld1_s8(reinterpret_cast<const std::int8_t*>(a)),
                       vld1_s8(reinterpret_cast<const std::int8_t*>(b)));
  }
  static Columns right_pair(const char* p, const char* next) {
    const int32x4_t a = vreinterpretq_s32_s8(right(p));
    const int32x4_t b = vreinterpretq_s32_s8(right(next));
    return {vreinterpretq_s8_s32(vzip1q_s32(a, b)),
            vreinterpretq_s8_s32(vzip2q_s32(a, b))};
  }
  static Pair add_pair(Left left, Columns right, Pair sum) {
    return {vmmlaq_s32(sum.first, left, right.first),
            vmmlaq_s32(sum.second, left, right.second)};
  }
#endif
};

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define FUSEDRNN_HAS_PAIRS 1
// BFDOT adds the products of a pair, and then their sum.
struct Pairs {
  static constexpr const char* unit = "NEON BF16";
  static constexpr int most_sums = 24;
  using Left = bfloat16x8_t;

  static Left left(const char* p) {
    std::uint32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  }
  static Left right(const char* p) { return vreinterpretq_bf16_u32(pairs_at(p)); }
  static Vec<float> add(Left left, Left right, Vec<float> sum) {
    return {vbfdotq_f32(sum.v, left, right)};
  }
};
#endif

}  // namespace fusedrnn::FUSEDRNN_ARCH
