// This header converts rows of float32 to the operands of products with narrow weights.
// src/fusedrnn/reference/narrow.py defines what they become.
#pragma once

#include "narrow_formats.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Loads the elements of a row from k on, zeros from K on.
inline Vec<float> elements(const float* row, index k, index K) {
  return k < K ? load_upto<Vec<float>>(row + k, K - k) : Vec<float>::broadcast(0);
}

// Returns the bytes of a row of K elements of `size` bytes, padded to a multiple of
// `grain` elements and of whole vectors. Rows 1 KB apart would compete for the same few
// sets of a cache.
inline index operand_bytes(index K, index grain, index size) {
  const index padded = round_up(round_up(K, grain), Vec<float>::lanes);
  const index bytes = round_up(padded * size, 64);
  return bytes % 1024 == 0 ? bytes + 64 : bytes;
}

// Calls f(row, its place) for each row.
template <class F>
inline void each_row(const Rows& rows, Range places, const F& f) {
  for (index place = places.begin; place < places.end; ++place) {
    const index at = rows.order ? rows.order[place] : place;
    f(reinterpret_cast<const float*>(rows.at ? rows.at[place]
                                             : rows.first + at * rows.apart),
      place);
  }
}

// Writes each row rounded to bfloat16, as float32 if `widened`.
template <bool widened, int grain>
void put_bfloat16(const Rows& rows, Range places, index K, const Operand* to, int) {
  constexpr int lanes = Vec<float>::lanes;
  each_row(rows, places, [&](const float* row, index place) {
    char* at = to->rows + place * to->apart;
    for (index k = 0; k < round_up(K, grain); k += lanes) {
      const Vec<float> x = elements(row, k, K);
      if (widened) {
        rounded_to_bfloat16(x).store(reinterpret_cast<float*>(at) + k);
      } else {
        put_rounded(x, at + 2 * k);
      }
    }
  });
}

// Returns the greatest bits of |x| of a row: those of a NaN are greater than all others.
inline int greatest_bits(const float* row, index K) {
  constexpr int lanes = Vec<float>::lanes;
  Ints most = Ints::broadcast(0);
  for (index k = 0; k < K; k += lanes) most = max(most, bits(abs(elements(row, k, K))));
  float lane[lanes];
  floats(most).store(lane);
  std::int32_t of[lanes], greatest = 0;
  __builtin_memcpy(of, lane, sizeof(of));
  for (const std::int32_t n : of) greatest = n > greatest ? n : greatest;
  return greatest;
}

// Writes each row as bytes, times a scale. With a second operand, that is what the bytes
// leave of the row, with a scale of its own.
template <int grain>
void put_int8(const Rows& rows, Range places, index K, const Operand* to, int count) {
  using V = Vec<float>;
  constexpr float least = 0x1p-100f, most_byte = 127, parts_of_byte = 254;
  const Ints offset = Ints::broadcast(Int8::offset);
  each_row(rows, places, [&](const float* row, index place) {
    float greatest;
    const int found = greatest_bits(row, K);
    __builtin_memcpy(&greatest, &found, sizeof(greatest));
    const bool finite = greatest < __builtin_inff(), zero = greatest < least;
    const float inverse = finite && !zero ? most_byte / greatest : 0;
    const float scale = !finite ? __builtin_nanf("") : zero ? 0 : greatest / most_byte;
    to[0].scale[place] = scale;
    if (count > 1) to[1].scale[place] = scale / parts_of_byte;
    char* const first = to[0].rows + place * to[0].apart;
    char* const second = count > 1 ? to[1].rows + place * to[1].apart : nullptr;
    const V factor = V::broadcast(inverse);
    for (index k = 0; k < round_up(K, grain); k += V::lanes) {
      const V x = elements(row, k, K) * factor;
      const Ints whole = nearest(x);
      put_bytes(whole + offset, first + k);
      if (!second) continue;
      const V rest = (x - converted(whole)) * V::broadcast(parts_of_byte);
      put_bytes(nearest(rest) + offset, second + k);
    }
  });
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
