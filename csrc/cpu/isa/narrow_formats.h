// These are the formats (formats.h) of weights that are narrower than float32.
#pragma once

#include "../../vec/narrow.h"
#include "formats.h"
#ifdef FUSEDRNN_WITH_TILES
#include "../../vec/amx.h"
#endif

namespace fusedrnn::FUSEDRNN_ARCH {

// Only a Vec is worth being kept in a register.
template <class Right>
inline Right in_register(Right x) {
  return x;
}

constexpr int most_widened_sums = is_small ? 4 : Own<Vec<float>>::most_sums;

// NoScales says that a panel has weights alone.
struct NoScales {
  static constexpr bool has_scales = false;
  static constexpr int offset = 0;
};

// Float16 widens weights of float16 on the way, and reads rows as they are.
struct Float16 : Own<Vec<float>>, NoScales {
  static constexpr int bytes = sizeof(V) / 2, most_sums = most_widened_sums;

  template <int part>
  static V right(const char* p) {
    return float16(p);
  }
};

// WidenedPairs widens pairs of bfloat16 on the way; rows are rounded to bfloat16.
struct WidenedPairs : NoScales {
  using V = Vec<float>;
  using Left = V;
  using Right = V;
  using Sum = V;
  static constexpr int bytes = sizeof(V), per = 2, grain = 2, parts = 2;
  // Of 16 registers one more is for the mask of the odd elements.
  static constexpr int most_sums =
      V::registers == 16 && !is_small ? 8 : most_widened_sums;
  static constexpr bool continues = true;

  static index vectors(index K) { return (K + 1) / 2; }
  template <int part>
  static V left(const char* row, index n) {
    return V::broadcast(reinterpret_cast<const float*>(row)[2 * n + part]);
  }
  template <int part>
  static V right(const char* p) {
    return part == 0 ? even_of(p) : odd_of(p);
  }
  template <int part>
  static V add(V left, V right, V sum) {
    return fma(left, right, sum);
  }
};

// OfUnit is the part of a format whose unit multiplies four bytes of a row with four of
// each column.
template <class Unit>
struct OfUnit {
  using V = Vec<float>;
  using Left = decltype(Unit::left(nullptr));
  using Right = decltype(Unit::right(nullptr));
  static constexpr int bytes = sizeof(V), parts = 1, most_sums = Unit::most_sums;

  template <int part>
  static Left left(const char* row, index n) {
    return Unit::left(row + 4 * n);
  }
  template <int part>
  static Right right(const char* p) {
    return Unit::right(p);
  }
  template <int part, class Sum>
  static Sum add(Left left, Right right, Sum sum) {
    return Unit::add(left, right, sum);
  }
};

// NativePairs multiplies pairs of bfloat16 by the instruction of a unit.
template <class Unit>
struct NativePairs : OfUnit<Unit>, NoScales {
  using Sum = Vec<float>;
  static constexpr int per = 2, grain = 2;
  static constexpr bool continues = true;

  static index vectors(index K) { return (K + 1) / 2; }
};

#ifdef FUSEDRNN_WITH_TILES
// TilePairs multiplies pairs of bfloat16 in the order of sums of a matrix unit, by
// vectors for a few rows: each block of 32 k has a sum of the even products and one of
// the odd ones.
struct TilePairs : NoScales {
  using V = Vec<float>;
  using Left = V;
  using Right = V;
  struct Sum {
    V even, odd;
    static Sum broadcast(int) { return {V::broadcast(0), V::broadcast(0)}; }
  };
  static constexpr int bytes = sizeof(V), per = 2, grain = 32, parts = 2;
  static constexpr int most_sums = 12;  // each has two registers
  static constexpr bool continues = false, tiles_continue = true;
  static constexpr index vectors_at_once = 16;
  static constexpr int most_rows_of_two = 0;

  static index vectors(index K) { return round_up(K, grain) / per; }
  template <int part>
  static V left(const char* row, index n) {
    std::uint32_t pair;
    __builtin_memcpy(&pair, row + 4 * n, sizeof(pair));
    const std::uint32_t half = part == 0 ? pair << 16 : pair & 0xffff0000u;
    return V::broadcast(__builtin_bit_cast(float, half));
  }
  template <int part>
  static V right(const char* p) {
    return part == 0 ? even_of(p) : odd_of(p);
  }
  template <int part>
  static Sum add(V left, V right, Sum sum) {
    if (part == 0) return {fma(left, right, sum.even), sum.odd};
    return {sum.even, fma(left, right, sum.odd)};
  }
  template <int panels, int W, int C>
  static void finish(const TermAt& term, const Sum (*sums)[panels * W], int rows,
                     float* to) {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < panels * W; ++c) {
        float* const at =
            to + (r * panels * C + c / W * C + term.column + c % W) * V::lanes;
        (V::load(at) + (sums[r][c].even + sums[r][c].odd)).store(at);
      }
    }
  }
  template <int sum, int left_tile, int right_tile>
  static void multiply_tiles() {
    Tiles::multiply_pairs<sum, left_tile, right_tile>();
  }
};
#endif

// Bytes has a scale for each row and column; sums are 32-bit integers. After the
// weights, a panel has the scale of each column and, if rows have an offset, the sum with
// which it starts. `grain_`: the k that a panel is padded to.
template <int grain_>
struct Bytes : OfUnit<Int8> {
  using Sum = Ints;
  static constexpr int per = 4, grain = grain_, offset = Int8::offset;
  static constexpr bool continues = false, has_scales = true;
  static constexpr index vectors_at_once = index{1} << 40;
  static constexpr int most_rows_of_two = is_small ? 0 : 1;

  static index vectors(index K) { return round_up(K, grain) / per; }
#ifdef FUSEDRNN_WITH_TILES
  static constexpr bool tiles_continue = false;
  template <int sum, int left_tile, int right_tile>
  static void multiply_tiles() {
    Tiles::multiply_bytes<sum, left_tile, right_tile>();
  }
#endif
#ifdef FUSEDRNN_WITH_ROW_PAIRS
  using Pair = Int8::Pair;
  static Left left_pair(const char* a, const char* b) { return Int8::left_pair(a, b); }
  static Int8::Columns right_pair(const char* p, const char* next) {
    return Int8::right_pair(p, next);
  }
  static Pair add_pair(Left left, Int8::Columns right, Pair sum) {
    return Int8::add_pair(left, right, sum);
  }
#endif
  // Adds the sums, times their scales, to those of a tile.
  template <int panels, int W, int C>
  static void finish(const TermAt& term, const Ints (*sums)[panels * W], int rows,
                     float* to) {
    const index weights = vectors(term.K) * W * bytes;
    for (int panel = 0; panel < panels; ++panel) {
      const float* const scales =
          reinterpret_cast<const float*>(term.right + panel * term.panel + weights);
      const std::int32_t* const starts =
          reinterpret_cast<const std::int32_t*>(scales + W * V::lanes);
      for (int c = 0; c < W; ++c) {
        const V scale = V::load(scales + c * V::lanes);
        const Ints start =
            offset ? Ints::load(starts + c * V::lanes) : Ints::broadcast(0);
        float* at = to + (panel * C + term.column + c) * V::lanes;
        for (int r = 0; r < rows; ++r, at += panels * C * V::lanes) {
          const V sum = converted(sums[r][panel * W + c] + start);
          fma(sum * V::broadcast(term.scale[r]), scale, V::load(at)).store(at);
        }
      }
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
