// How a thread walks along rows (../rows.h), and random numbers in memory.
#pragma once

#include "../rows.h"
#include "../vec/random.h"
#include "pack.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// The words of a block of counters from `first` on.
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
  // to[e] = yes where element e of word k is drawn, else no.
  template <class S>
  void choose(int k, std::uint32_t threshold, S yes, S no, S* to) const {
    for (int n = 0; n < block / lanes; ++n) {
      word[n][k].choose(threshold, yes, no, to + n * lanes);
    }
  }
};

// 0 for the elements of row (i, j) that are dropped, else 1 / (1 - p), a block at a time:
// f(first element, factors, how many).
template <class S, class F>
void draw_dropout(const Generator& generator, double p, index i, index j, index n,
                  const F& f) {
  constexpr index block = Generator::block;
  const std::uint32_t threshold = Generator::threshold(p);
  for (index first = 0; first < n; first += 4 * block) {
    const BlockOfWords words(generator, first / 4, i, j);
    for (int k = 0; k < 4 && first + k * block < n; ++k) {
      const index at = first + k * block, left = n - at;
      S factors[block];
      words.choose(k, threshold, S{0}, static_cast<S>(1 / (1 - p)), factors);
      f(at, factors, left < block ? left : block);
    }
  }
}

// A member of the team's rows of an array.
template <class S>
void drop_out(const Dropout<S>& d, const Team& team) {
  const Generator generator(d.seed, d.draw, d.where);
  const Range own = team.share(d.T * d.B);
  for (index row = own.begin; row < own.end; ++row) {
    const index i = row / d.B, j = row % d.B;
    const S* const from = d.from + i * d.from_t + j * d.from_b;
    S* const to = d.to + i * d.to_t + j * d.to_b;
    draw_dropout<S>(generator, d.p, i, j, d.N,
                    [&](index at, const S* factors, index count) {
                      for (index e = 0; e < count; ++e)
                        to[at + e] = from[at + e] * factors[e];
                    });
  }
}

template <class L>
index record_stride(const Model& m) {
  return m.norm ? row_stride<typename L::Scalar>(
                      Record<typename L::Cell>{true, L(m).P}.values())
                : L(m).record();
}

// One thread in vectors. `memory` of it holds how much of h and c zoneout keeps of the
// row at hand, and scratch.
template <class S_, bool has_c>
struct Walk {
  using S = S_;
  using V = Vec<S>;
  static constexpr int lanes = V::lanes, block = Generator::block;
  static constexpr bool bias_is_in = true;
  static constexpr int words = has_c ? 2 : 4;  // of a counter for h

  S *keeps_h, *keeps_c, *scratch;

  // Of a row of h or c, in whole blocks of random numbers.
  static index width(index P) { return round_up(P, words * block); }
  static index memory(index P, int slots) { return 2 * width(P) + (2 + slots) * P; }
  Walk(S* from, index P)
      : keeps_h(from), keeps_c(from + width(P)), scratch(from + 2 * width(P)) {}

  template <class F>
  static void each(Range units, const F& f) {
    for (index u = units.begin; u < units.end; u += lanes) f(u);
  }
  static Range all(index n) { return {0, n}; }
  template <class F>
  static void once(const F& f) {
    f();
  }
  template <class F>
  static S sum(index n, const F& f) {
    V sums = V::broadcast(0);
    index u = 0;
    for (; u + lanes <= n; u += lanes) sums = sums + f(u);
    S part[lanes];
    if (u < n) {
      f(u).store(part);
      sums = sums + V::load_n(part, n - u);
    }
    sums.store(part);
    S total = 0;
    for (const S value : part) total += value;
    return total;
  }
  static V load(const S* p, index u) { return V::load(p + u); }
  static void store(V x, S* p, index u) { x.store(p + u); }
  static V upto(const S* p, index u, index n) { return load_upto<V>(p + u, n - u); }
  static void put(V x, S* p, index u, index n) { store_upto(x, p + u, n - u); }
  V keep_h(index u) const { return V::load(keeps_h + u); }
  V keep_c(index u) const { return V::load(keeps_c + u); }
  static float root(float x) { return __builtin_sqrtf(x); }
  static double root(double x) { return __builtin_sqrt(x); }
  static V kept(V x) { return x; }

  // What is expected stands in both for good; what is drawn is drawn for each row.
  void start(const Options& o, index P) const {
    for (index j = 0; j < width(P); ++j) {
      keeps_h[j] = o.training ? 0 : static_cast<S>(o.zoneout_h);
      keeps_c[j] = o.training ? 0 : static_cast<S>(o.zoneout_c);
    }
  }
  // 1 for the units of row b that keep their h and c at a time, else 0.
  void draw(const Options& o, index time, index b, Range units) const {
    if (!o.training || !zones_out(o)) return;
    const Generator generator(o.seed, static_cast<std::uint32_t>(Draw::zoneout), o.where);
    const std::uint32_t h = Generator::threshold(o.zoneout_h);
    const std::uint32_t c = Generator::threshold(o.zoneout_c);
    const index last = (units.end + words * block - 1) / (words * block);
    for (index j = units.begin / (words * block); j < last; ++j) {
      const BlockOfWords drawn(generator, j * block, time, b);
      for (int k = 0; k < words; ++k) {
        const index at = (words * j + k) * block;
        drawn.choose(k, h, S{1}, S{0}, keeps_h + at);
        if (has_c && o.zoneout_c > 0) {
          drawn.choose(words + k, c, S{1}, S{0}, keeps_c + at);
        }
      }
    }
  }
};

// What R sees of row b's h' is that times this.
template <class S>
void draw_seen(const Options& options, index b, index R, S* to) {
  const Generator generator(options.seed, static_cast<std::uint32_t>(Draw::recurrent),
                            options.where);
  draw_dropout<S>(generator, options.recurrent_dropout, 0, b, R,
                  [&](index at, const S* factors, index count) {
                    for (index e = 0; e < count; ++e) to[at + e] = factors[e];
                  });
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
