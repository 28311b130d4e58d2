// Random numbers come from a counter: Philox4x32-10 (Salmon et al. 2011). The number of
// element e of row (i, j) depends on those alone, so nothing is stored and the same seed
// gives the same masks for any number of threads and on every backend.
//
// The elements of a row are taken in blocks of 16. A block shares its 16 counters, from
// 16 n on, with up to three others: each takes one of the four words of every counter. If
// a draw has `words` words of each counter, block b takes word b % words of the counters
// of n = b / words.
#pragma once

#include <cstdint>

#include "target.h"

namespace fusedrnn {

enum class Draw : std::uint32_t { zoneout, recurrent, weights, between };

// OneWord is one 32-bit word in the lower half of 64 bits, the scalar form of an ISA's
// Words (vec.h).
struct OneWord {
  std::uint64_t v;

  FUSEDRNN_DEVICE static OneWord broadcast(std::uint32_t x) { return {x}; }
  FUSEDRNN_DEVICE friend OneWord operator^(OneWord a, OneWord b) { return {a.v ^ b.v}; }
  FUSEDRNN_DEVICE friend OneWord times(OneWord a, OneWord b) {
    return {std::uint64_t{static_cast<std::uint32_t>(a.v)} *
            static_cast<std::uint32_t>(b.v)};
  }
  FUSEDRNN_DEVICE friend OneWord high(OneWord a) { return {a.v >> 32}; }
};

struct Generator {
  static constexpr int block = 16;

  std::uint32_t key[2];
  std::uint32_t what;  // the draw, and its place in the layers

  FUSEDRNN_DEVICE Generator(std::uint64_t seed, std::uint32_t draw, std::uint32_t where)
      : key{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)},
        what(draw | where << 8) {}

  // Writes the words of counters (w[0], i, j) to w. Their upper halves hold no meaning;
  // products ignore them.
  template <class W>
  FUSEDRNN_DEVICE void run(W (&w)[4], std::uint32_t i, std::uint32_t j) const {
    const W m0 = W::broadcast(0xD2511F53), m1 = W::broadcast(0xCD9E8D57);
    w[1] = W::broadcast(i);
    w[2] = W::broadcast(j);
    w[3] = W::broadcast(what);
    std::uint32_t k0 = key[0], k1 = key[1];
#ifdef __CUDACC__
#pragma unroll 1
#endif
    for (int round = 0; round < 10; ++round) {
      const W a = times(m0, w[0]), b = times(m1, w[2]);
      w[0] = high(b) ^ w[1] ^ W::broadcast(k0);
      w[2] = high(a) ^ w[3] ^ W::broadcast(k1);
      w[1] = b;
      w[3] = a;
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
  }

  // Writes the words of one counter.
  FUSEDRNN_DEVICE void words(std::uint32_t counter, std::uint32_t i, std::uint32_t j,
                             std::uint32_t (&to)[4]) const {
    OneWord w[4] = {{counter}, {}, {}, {}};
    run(w, i, j);
    for (int n = 0; n < 4; ++n) to[n] = static_cast<std::uint32_t>(w[n].v);
  }

  // A 32-bit number is below the threshold with probability p < 1.
  FUSEDRNN_SHARED static constexpr std::uint32_t threshold(double p) {
    const double of = p * 4294967296.0 + 0.5;
    return of < 4294967295.0 ? static_cast<std::uint32_t>(of) : 4294967295u;
  }
};

}  // namespace fusedrnn
