// This header has the primitives of cuda/device.h for the host, over fibers; see
// fibers.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "fibers.h"

namespace fusedrnn::cuda {

inline int thread() { return emulator::here().thread; }
inline int threads() { return emulator::here().threads; }
inline int block_x() { return emulator::here().block->x; }
inline int block_y() { return emulator::here().block->y; }
inline int blocks_x() { return emulator::here().blocks_x; }
inline int blocks_y() { return emulator::here().blocks_y; }
inline char* shared() { return emulator::here().block->shared.data(); }

inline emulator::Warp& own_warp() {
  return emulator::here().block->warps[static_cast<std::size_t>(thread() / 32)];
}
inline void sync_warp() { own_warp().barrier.meet(); }
inline void sync_block() { emulator::here().block->barrier.meet(); }
inline void sync_cluster() { emulator::here().block->cluster->barrier.meet(); }

// state[0] is twice the round, plus one once the expected bytes are known; state[1] is
// how many bytes are still to arrive, negative if they came first.
inline void count(Arrivals* a, bool is_expected, int bytes) {
  a->state[0] += is_expected;
  a->state[1] += static_cast<std::uint32_t>(bytes);
  a->state[0] += a->state[0] % 2 == 1 && a->state[1] == 0;
}
inline void clear(Arrivals* a) { *a = {}; }
inline void expect(Arrivals* a, int bytes) { count(a, true, bytes); }
inline void wait_for(const Arrivals* a, bool odd) {
  while (a->state[0] / 2 % 2 == odd) emulator::yield_waiting();
  sync_warp();
}
inline void store_in_peer(Quad* p, int rank, const Quad& value, Arrivals* arrivals) {
  const auto peer = static_cast<std::size_t>(rank);
  char* const there = emulator::here().block->cluster->blocks[peer]->shared.data();
  const auto in_peer = [&](auto* own) {
    return reinterpret_cast<decltype(own)>(there +
                                           (reinterpret_cast<char*>(own) - shared()));
  };
  Quad* const to = in_peer(p);
  emulator::delay_store(to, [=, a = in_peer(arrivals)] {
    *to = value;
    count(a, false, -static_cast<int>(sizeof(value)));
  });
}

inline Quad load_constant(const Quad* p) { return *p; }
inline Quad load_exchanged(const Quad* p) { return *p; }
inline void store_exchanged(Quad* p, const Quad& value) {
  for (int half = 0; half < 4; half += 2) {
    std::uint32_t* const to = p->word + half;
    const std::uint64_t both =
        value.word[half] | static_cast<std::uint64_t>(value.word[half + 1]) << 32;
    emulator::delay_store(to, [=] { std::memcpy(to, &both, sizeof(both)); });
  }
}
inline void fence() { emulator::flush_stores(); }
template <class A>
void add_to(A* p, A x) {
  *p += x;
}
template <class F>
void wait_until(const F& ready) {
  while (!ready()) emulator::yield_waiting();
  sync_warp();
}

// Halves are converted by hand, because not every host has them.
inline float from_half(Half x, bool bfloat) {
  if (bfloat) return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float size =
      exponent == 31 ? (mantissa ? NAN : INFINITY)
      : exponent     ? std::ldexp(1024.f + static_cast<float>(mantissa), exponent - 25)
                     : std::ldexp(static_cast<float>(mantissa), -24);
  return x.bits & 0x8000 ? -size : size;
}
inline Half to_half(float x, bool bfloat) {
  if (std::isnan(x)) return {0x7fff};
  if (bfloat) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size < 0x1p-26f) return {static_cast<std::uint16_t>(sign)};
  if (size >= 65520) return {static_cast<std::uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(size, &exponent);
  const int last = std::max(exponent - 11, -24);  // exponent of the last bit
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, -last)));
  // A carry out of the mantissa goes into the exponent.
  const int bits = last == -24 ? steps : ((last + 25) << 10) + steps - 1024;
  return {static_cast<std::uint16_t>(sign | bits)};
}
inline TensorFloat32 to_tensor_float32(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if (std::isnan(x)) return {x};
  return {std::bit_cast<float>((bits + 0x1000) & ~0x1fffu)};
}

// Multiplies the warp's fragments, laid out as in PTX, each lane for its own sums;
// element(word, e) is the e-th of the in_word values of a fragment's word.
template <int in_word, class Element>
void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
         const Element& element) {
  emulator::Here& here = emulator::here();
  auto& fragments = own_warp().fragments[here.products++ % 2];
  const int lane = here.thread % 32;
  std::memcpy(fragments[lane].a, a, sizeof(a));
  std::memcpy(fragments[lane].b, b, sizeof(b));
  own_warp().barrier.meet();
  const int row = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const int r = row + (i >= 2 ? 8 : 0), c = column + i % 2;
    for (int quarter = 0; quarter < 4; ++quarter) {
      for (int half = 0; half < 2; ++half) {
        const auto left = fragments[r % 8 * 4 + quarter].a[r / 8 + 2 * half];
        const auto right = fragments[c * 4 + quarter].b[half];
        for (int e = 0; e < in_word; ++e) d[i] += element(left, e) * element(right, e);
      }
    }
  }
}
struct MmaTensorFloat32 {
  void operator()(float (&d)[4], const std::uint32_t (&a)[4],
                  const std::uint32_t (&b)[2]) const {
    mma<1>(d, a, b, [](std::uint32_t word, int) { return std::bit_cast<float>(word); });
  }
};
template <bool bfloat>
struct MmaHalf {
  void operator()(float (&d)[4], const std::uint32_t (&a)[4],
                  const std::uint32_t (&b)[2]) const {
    mma<2>(d, a, b, [](std::uint32_t word, int e) {
      return from_half({static_cast<std::uint16_t>(word >> 16 * e)}, bfloat);
    });
  }
};
using MmaBFloat16 = MmaHalf<true>;
using MmaFloat16 = MmaHalf<false>;

inline float multiply_add(float a, float b, float c) {
  return static_cast<float>(double{a} * b + c);
}
inline double multiply_add(double a, double b, double c) { return a * b + c; }
// The approximations have the errors that those of the chip may have, of either sign.
inline float off_by(float exact, std::uint32_t ulps) {
  if (!std::isnormal(exact)) return std::isnan(exact) || exact > 1 ? exact : 0;
  const auto bits = std::bit_cast<std::uint32_t>(exact);
  return std::bit_cast<float>(bits * 0x9e3779b9u >> 31 ? bits + ulps : bits - ulps);
}
inline float exp2_of(float x) { return off_by(std::exp2(x), 2); }
inline float bounded(float x, float least, float most) {
  return std::fmax(std::fmin(x, most), least);
}
inline double exp_of(double x) { return std::exp(x); }
inline float tanh_of(float x) { return std::tanh(x); }
inline double tanh_of(double x) { return std::tanh(x); }
inline float expm1_of(float x) { return std::expm1(x); }
inline double expm1_of(double x) { return std::expm1(x); }
inline float log1p_of(float x) { return std::log1p(x); }
inline double log1p_of(double x) { return std::log1p(x); }
inline float root_of(float x) { return std::sqrt(x); }
inline double root_of(double x) { return std::sqrt(x); }
inline float reciprocal(float x) { return off_by(1 / x, 1); }
inline double reciprocal(double x) { return 1 / x; }

}  // namespace fusedrnn::cuda
