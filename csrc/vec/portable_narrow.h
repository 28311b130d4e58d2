// Narrow weights in standard C++.
#pragma once

namespace fusedrnn::FUSEDRNN_ARCH {

struct Ints {
  static constexpr int lanes = Vec<float>::lanes;

  std::int32_t lane[lanes];

  template <class F>
  static Ints each(F f) {
    Ints r;
    for (int l = 0; l < lanes; ++l) r.lane[l] = f(l);
    return r;
  }
  static Ints load(const std::int32_t* p) {
    return each([=](int l) { return p[l]; });
  }
  static Ints broadcast(int n) {
    return each([=](int) { return n; });
  }
  // Sums wrap around as in registers.
  friend Ints operator+(Ints a, Ints b) {
    return each([&](int l) {
      return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.lane[l]) +
                                       static_cast<std::uint32_t>(b.lane[l]));
    });
  }
  friend Ints operator&(Ints a, Ints b) {
    return each([&](int l) { return a.lane[l] & b.lane[l]; });
  }
  friend Ints max(Ints a, Ints b) {
    return each([&](int l) { return a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]; });
  }
};
template <int n>
inline Ints shifted_right(Ints a) {
  return Ints::each([&](int l) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.lane[l]) >> n);
  });
}
inline Ints bits(Vec<float> x) { return std::bit_cast<Ints>(x); }
inline Vec<float> floats(Ints a) { return std::bit_cast<Vec<float>>(a); }
// Adding 1.5 · 2²³ rounds to an integer, which is then in the lowest bits. A NaN or a
// number beyond ±2²² becomes any integer.
inline Ints nearest(Vec<float> x) {
  constexpr float shift = 12582912;
  return Ints::each([&](int l) {
    const float shifted = x.lane[l] + shift;
    return static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(shifted) -
                                     std::bit_cast<std::uint32_t>(shift));
  });
}
inline Vec<float> converted(Ints a) {
  return Vec<float>::each([&](int l) { return static_cast<float>(a.lane[l]); });
}
inline void put_bytes(Ints a, char* p) {
  for (int l = 0; l < Ints::lanes; ++l) p[l] = static_cast<char>(a.lane[l]);
}
inline void put_halves(Ints a, char* p) {
  for (int l = 0; l < Ints::lanes; ++l) {
    const auto half =
        static_cast<std::uint16_t>(static_cast<std::uint32_t>(a.lane[l]) >> 16);
    __builtin_memcpy(p + 2 * l, &half, 2);
  }
}
inline Vec<float> from_halves(const char* p) {
  return Vec<float>::each([=](int l) {
    std::uint16_t half;
    __builtin_memcpy(&half, p + 2 * l, 2);
    return std::bit_cast<float>(static_cast<std::uint32_t>(half) << 16);
  });
}
// Weights are finite, so the exponent is never that of an infinity.
inline Vec<float> float16(const char* p) {
  return Vec<float>::each([=](int l) {
    std::uint16_t half;
    __builtin_memcpy(&half, p + 2 * l, 2);
    const std::uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
    constexpr std::uint32_t bias = (127 - 15) << 23;
    const float size = rest < 0x400u ? static_cast<float>(rest) * 0x1p-24f
                                     : std::bit_cast<float>((rest << 13) + bias);
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(size) | sign);
  });
}
inline Vec<float> even_of(const char* p) {
  return Vec<float>::each([=](int l) {
    std::uint32_t pair;
    __builtin_memcpy(&pair, p + 4 * l, 4);
    return std::bit_cast<float>(pair << 16);
  });
}
inline Vec<float> odd_of(const char* p) {
  return Vec<float>::each([=](int l) {
    std::uint32_t pair;
    __builtin_memcpy(&pair, p + 4 * l, 4);
    return std::bit_cast<float>(pair & 0xffff0000u);
  });
}

struct Int8 {
  static constexpr const char* unit = "integers";
  static constexpr int offset = 0, most_sums = 4;
  using Left = const signed char*;

  static Left left(const char* p) { return reinterpret_cast<const signed char*>(p); }
  static Left right(const char* p) { return left(p); }
  static Ints add(Left left, Left right, Ints sum) {
    return Ints::each([&](int l) {
      std::int32_t of = sum.lane[l];
      for (int k = 0; k < 4; ++k) of += left[k] * right[4 * l + k];
      return of;
    });
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
