// The tiles of AMX: eight registers of up to 16 rows of 64 bytes. They are state of the
// thread: configure() before use, release() after.
//
//   load<t>(p, stride), store<t>(p, stride), clear<t>()
//   multiply_bytes<sum, left, right>()   left (rows, 64) of unsigned bytes times right
//                                        (16, 16·4) of signed ones, into 32-bit integers
//   multiply_pairs<sum, left, right>()   left (rows, 32) of bfloat16 times right
//                                        (16, 16·2)
//
// For a block of 32 k TDPBF16PS adds the even products in one sum and the odd ones in
// another, and then both to the tile's. With FUSEDRNN_EMULATES_AMX the same is computed
// without the unit, to test the code that uses it on any machine with AVX-512.
// Sanitizers, which check loads and stores, leave products out, because these stay inside
// of tiles.
#pragma once

#include "vec.h"

namespace fusedrnn::FUSEDRNN_ARCH {

#ifdef FUSEDRNN_EMULATES_AMX

#define FUSEDRNN_INSIDE_TILES __attribute__((no_sanitize("address", "undefined")))

struct Tiles {
  static constexpr int columns = 16;
  inline static thread_local std::int32_t tile[8][16][columns];
  inline static thread_local int rows = 0;

  static void configure(int count) { rows = count; }
  static void release() { rows = 0; }
  template <int t>
  static void load(const void* p, index stride) {
    for (int r = 0; r < height<t>(); ++r) {
      __builtin_memcpy(tile[t][r], static_cast<const char*>(p) + r * stride, 64);
    }
  }
  template <int t>
  static void store(void* p, index stride) {
    for (int r = 0; r < height<t>(); ++r) {
      __builtin_memcpy(static_cast<char*>(p) + r * stride, tile[t][r], 64);
    }
  }
  template <int t>
  static void clear() {
    __builtin_memset(tile[t], 0, sizeof(tile[t]));
  }
  template <int sum, int left, int right>
  FUSEDRNN_INSIDE_TILES static void multiply_bytes() {
    for (int r = 0; r < rows; ++r) {
      const auto* const a = reinterpret_cast<const unsigned char*>(tile[left][r]);
      for (int k = 0; k < 64; ++k) {
        const auto* const b = reinterpret_cast<const signed char*>(tile[right][k / 4]);
        for (int c = 0; c < columns; ++c) tile[sum][r][c] += a[k] * b[4 * c + k % 4];
      }
    }
  }
  template <int sum, int left, int right>
  FUSEDRNN_INSIDE_TILES static void multiply_pairs() {
    const auto at = [](int t, int r, int n, bool odd) FUSEDRNN_INSIDE_TILES {
      const auto pair = static_cast<std::uint32_t>(tile[t][r][n]);
      return __builtin_bit_cast(float, odd ? pair & 0xffff0000u : pair << 16);
    };
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) {
        float part[2] = {};
        for (int n = 0; n < 16; ++n) {
          for (int odd = 0; odd < 2; ++odd) {
            part[odd] =
                __builtin_fmaf(at(left, r, n, odd), at(right, n, c, odd), part[odd]);
          }
        }
        const float before = __builtin_bit_cast(float, tile[sum][r][c]);
        tile[sum][r][c] = __builtin_bit_cast(std::int32_t, before + (part[0] + part[1]));
      }
    }
  }

 private:
  template <int t>
  static int height() {
    return t < 5 ? rows : 16;
  }
};

#else

// Tiles 0 to 3 are for sums and 4 for the left operand, of as many rows as are asked for;
// 5 to 7 are for the right operand.
struct Tiles {
  static void configure(int rows) {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } to;
    for (int t = 0; t < 5; ++t) to.rows[t] = static_cast<std::uint8_t>(rows);
    asm volatile("ldtilecfg %0" : : "m"(to));
  }
  static void release() { asm volatile("tilerelease"); }
  template <int t>
  static void load(const void* p, index stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
                 :
                 : "r"(p), "r"(stride), "i"(t)
                 : "memory");
  }
  template <int t>
  static void store(void* p, index stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
                 :
                 : "r"(p), "r"(stride), "i"(t)
                 : "memory");
  }
  template <int t>
  static void clear() {
    asm volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  template <int sum, int left, int right>
  static void multiply_bytes() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0"
                 :
                 : "i"(sum), "i"(left), "i"(right));
  }
  template <int sum, int left, int right>
  static void multiply_pairs() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                 :
                 : "i"(sum), "i"(left), "i"(right));
  }
};

#endif

}  // namespace fusedrnn::FUSEDRNN_ARCH
