// Random numbers from a counter: Philox4x32-10 (Salmon et al. 2011). Element e of a row
// (i, j) knows its number from those alone, so nothing is stored and the same seed gives
// the same masks for any number of threads and on every backend.
//
// The elements of a row are taken in blocks of 16, which share the counters 16 n to 16 n
// + 15 of blocks n: word w of these is the number of their elements. With `words` words
// to what is drawn, the blocks b stand in the counters of b / words, in word b % words.
#pragma once

#include <cstdint>

#include "../cells/cell.h"

namespace fusedrnn {

enum class Draw : std::uint32_t { zoneout, recurrent, weights, between };

struct Generator {
  static constexpr int block = 16;

  std::uint32_t key[2];
  std::uint32_t what;  // the draw, and where

  FUSEDRNN_DEVICE Generator(std::uint64_t seed, std::uint32_t draw, std::uint32_t where)
      : key{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)},
        what(draw | where << 8) {}

  // All four words of `count` counters from `first` on.
  template <int count>
  FUSEDRNN_DEVICE void words(std::uint32_t first, std::uint32_t i, std::uint32_t j,
                             std::uint32_t (&w)[4][count]) const {
    for (int n = 0; n < count; ++n) {
      w[0][n] = first + static_cast<std::uint32_t>(n);
      w[1][n] = i;
      w[2][n] = j;
      w[3][n] = what;
    }
    std::uint32_t k0 = key[0], k1 = key[1];
#ifdef __CUDACC__
#pragma unroll 1
#endif
    for (int round = 0; round < 10; ++round) {
      for (int n = 0; n < count; ++n) {
        const std::uint64_t a = std::uint64_t{0xD2511F53} * w[0][n];
        const std::uint64_t b = std::uint64_t{0xCD9E8D57} * w[2][n];
        w[0][n] = static_cast<std::uint32_t>(b >> 32) ^ w[1][n] ^ k0;
        w[2][n] = static_cast<std::uint32_t>(a >> 32) ^ w[3][n] ^ k1;
        w[1][n] = static_cast<std::uint32_t>(b);
        w[3][n] = static_cast<std::uint32_t>(a);
      }
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
  }

  // A number below it is drawn with probability p < 1.
  FUSEDRNN_DEVICE static std::uint32_t threshold(double p) {
    const double of = p * 4294967296.0 + 0.5;
    return of < 4294967295.0 ? static_cast<std::uint32_t>(of) : 4294967295u;
  }
};

}  // namespace fusedrnn
