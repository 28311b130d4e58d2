// Vectors of 16 bytes in standard C++, for any machine and for the sanitizers.
#pragma once

#include <bit>
#include <cstdint>

#include <type_traits>
#include "../random.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class S>
struct Vec {
  using scalar = S;
  using bits = std::conditional_t<sizeof(S) == 4, std::uint32_t, std::uint64_t>;
  static constexpr int lanes = 16 / sizeof(S);
  static constexpr int registers = 16;
  static constexpr bits sign = bits{1} << (8 * sizeof(S) - 1);

  S lane[lanes];

  template <class F>
  static Vec each(F f) {
    Vec r;
    for (int l = 0; l < lanes; ++l) r.lane[l] = f(l);
    return r;
  }

  static Vec load(const S* p) {
    return each([=](int l) { return p[l]; });
  }
  static Vec load_n(const S* p, index n) {
    return each([=](int l) { return l < n ? p[l] : S{0}; });
  }
  static Vec broadcast(S s) {
    return each([=](int) { return s; });
  }
  void store(S* p) const { store_n(p, lanes); }
  void store_n(S* p, index n) const {
    for (int l = 0; l < n; ++l) p[l] = lane[l];
  }

  friend Vec operator+(Vec a, Vec b) {
    return each([&](int l) { return a.lane[l] + b.lane[l]; });
  }
  friend Vec operator-(Vec a, Vec b) {
    return each([&](int l) { return a.lane[l] - b.lane[l]; });
  }
  friend Vec operator*(Vec a, Vec b) {
    return each([&](int l) { return a.lane[l] * b.lane[l]; });
  }
  friend Vec operator/(Vec a, Vec b) {
    return each([&](int l) { return a.lane[l] / b.lane[l]; });
  }
  friend Vec quotient(Vec a, Vec b) { return a / b; }
  friend Vec root(Vec a) {
    return each([&](int l) { return static_cast<S>(__builtin_sqrt(a.lane[l])); });
  }
  // The result is rounded twice, because std::fma is a slow library call on machines
  // without the instruction.
  friend Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  friend Vec fma_of_negative(Vec a, Vec b, Vec c) { return c - a * b; }
  friend Vec min(Vec a, Vec b) {
    return each([&](int l) { return a.lane[l] < b.lane[l] ? a.lane[l] : b.lane[l]; });
  }
  friend Vec max(Vec a, Vec b) {
    return each([&](int l) { return a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]; });
  }
  friend Vec in_register(Vec x) { return x; }
  friend Vec abs(Vec x) {
    return each(
        [&](int l) { return std::bit_cast<S>(std::bit_cast<bits>(x.lane[l]) & ~sign); });
  }
  friend Vec with_sign(Vec x, Vec s) {
    return each([&](int l) {
      return std::bit_cast<S>(std::bit_cast<bits>(x.lane[l]) |
                              (std::bit_cast<bits>(s.lane[l]) & sign));
    });
  }
  friend Vec exp2_of_shifted(Vec t) {
    constexpr int mantissa = sizeof(S) == 4 ? 23 : 52;
    return each([&](int l) {
      return std::bit_cast<S>(
          static_cast<bits>(std::bit_cast<bits>(t.lane[l]) << mantissa));
    });
  }
  friend Vec if_less(Vec a, Vec b, Vec x, Vec y) {
    return each([&](int l) { return a.lane[l] < b.lane[l] ? x.lane[l] : y.lane[l]; });
  }
  friend Vec zip_low(Vec a, Vec b) {
    return each([&](int l) { return l % 2 ? b.lane[l / 2] : a.lane[l / 2]; });
  }
  friend Vec zip_high(Vec a, Vec b) {
    return each([&](int l) {
      const int from = (lanes + l) / 2;
      return l % 2 ? b.lane[from] : a.lane[from];
    });
  }
};

struct Words : OneWord {
  static constexpr int lanes = 1;

  Words() = default;
  Words(OneWord x) : OneWord(x) {}
  static Words load(const std::uint64_t* p) { return OneWord{*p}; }
  static Words broadcast(std::uint32_t x) { return OneWord{x}; }
  template <class S>
  void choose(std::uint32_t t, S yes, S no, S* to) const {
    *to = static_cast<std::uint32_t>(v) < t ? yes : no;
  }
  friend Words operator+(Words a, Words b) { return OneWord{a.v + b.v}; }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
