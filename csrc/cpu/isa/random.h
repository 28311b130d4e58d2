// This header writes random masks to memory (../../random.h).
#pragma once

#include "../../random.h"
#include "../../vec/math.h"
#include "../kernels.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// BlockOfWords is the words of a block of counters from `first` on.
struct BlockOfWords {
  static constexpr int block = Generator::block, lanes = Words::lanes;
  Words word[block / lanes][4];

  BlockOfWords(const Generator& generator, index first, index i, index j) {
    static constexpr std::uint64_t counting[block] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                      8, 9, 10, 11, 12, 13, 14, 15};
    const Words start = Words::broadcast(static_cast<std::uint32_t>(first));
    for (int n = 0; n < block / lanes; ++n) {
      word[n][0] = start + Words::load(counting + n * lanes);
      generator.run(word[n], static_cast<std::uint32_t>(i),
                    static_cast<std::uint32_t>(j));
    }
  }
  // Sets to[e] to `yes` where element e of word k is drawn, else to `no`.
  template <class S>
  void choose(int k, std::uint32_t threshold, S yes, S no, S* to) const {
    for (int n = 0; n < block / lanes; ++n) {
      word[n][k].choose(threshold, yes, no, to + n * lanes);
    }
  }
};

// Calls f(element, factors, count) for one block of row (i, j) after the other, of the n
// elements from number `from` on, a multiple of 4 blocks; f counts elements from there. A
// factor is 0 for an element that is dropped, else 1 / (1 - p).
template <class S, class F>
void draw_dropout(const Generator& generator, double p, index i, index j, index from,
                  index n, const F& f) {
  constexpr index block = Generator::block;
  const std::uint32_t threshold = Generator::threshold(p);
  for (index first = 0; first < n; first += 4 * block) {
    const BlockOfWords words(generator, (from + first) / 4, i, j);
    for (int k = 0; k < 4 && first + k * block < n; ++k) {
      const index at = first + k * block, left = n - at;
      S factors[block];
      words.choose(k, threshold, S{0}, static_cast<S>(1 / (1 - p)), factors);
      f(at, factors, left < block ? left : block);
    }
  }
}

// Applies dropout to some rows of an array, whose elements have the numbers from `first`
// on (draw_dropout).
template <class S>
void drop_out(const Dropout<char>& d, Range rows, index first) {
  const Generator generator(d.seed, d.draw, d.where);
  for (index row = rows.begin; row < rows.end; ++row) {
    const index i = row / d.B, j = row % d.B;
    const S* const from =
        reinterpret_cast<const S*>(d.from + i * d.from_t + j * d.from_b);
    S* const to = reinterpret_cast<S*>(d.to + i * d.to_t + j * d.to_b);
    draw_dropout<S>(generator, d.p, i, j, first, d.N,
                    [&](index at, const S* factors, index count) {
                      for (index e = 0; e < count; ++e)
                        to[at + e] = from[at + e] * factors[e];
                    });
  }
}

// Draws the factors of recurrent dropout for row b's h'.
template <class S>
void draw_recurrent(const Options& options, index b, index R, char* to) {
  const Generator generator(options.seed, static_cast<std::uint32_t>(Draw::recurrent),
                            options.where);
  S* const all = reinterpret_cast<S*>(to);
  draw_dropout<S>(generator, options.recurrent_dropout, 0, b, 0, R,
                  [&](index at, const S* factors, index count) {
                    for (index e = 0; e < count; ++e) all[at + e] = factors[e];
                  });
}

template <class S>
void draw_zoneout(const ZoneoutDraw& d) {
  const Options& o = *d.options;
  const int words = d.has_c ? 2 : 4;  // of each counter, for h
  const index block = Generator::block, group = words * block;
  const Generator generator(o.seed, static_cast<std::uint32_t>(Draw::zoneout), o.where);
  const std::uint32_t h = Generator::threshold(o.zoneout_h);
  const std::uint32_t c = Generator::threshold(o.zoneout_c);
  const index last = (d.units.end + group - 1) / group;
  for (index n = 0; n < d.rows; ++n) {
    const index b = d.b ? d.b[n] : d.first_b + n;
    S* const keep_h = reinterpret_cast<S*>(d.keep_h + n * d.apart);
    S* const keep_c = reinterpret_cast<S*>(d.keep_c + n * d.apart);
    for (index j = d.units.begin / group; j < last; ++j) {
      const BlockOfWords drawn(generator, j * block, d.time, b);
      for (int k = 0; k < words; ++k) {
        const index at = j * group + k * block;
        drawn.choose(k, h, S{1}, S{0}, keep_h + at);
        if (d.has_c && o.zoneout_c > 0) {
          drawn.choose(words + k, c, S{1}, S{0}, keep_c + at);
        }
      }
    }
  }
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
