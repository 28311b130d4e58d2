// This header measures the limits of this core, the floor that bench/ compares results
// with.
#pragma once

#include "../../vec/math.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Does `rounds` FMAs on each of as many independent accumulators as hide the latency, and
// returns the number of floating-point operations.
template <class S>
double multiply_add(index rounds) {
  using V = Vec<S>;
  constexpr int sums = V::registers == 32 ? 24 : 12;
  V sum[sums];
#pragma GCC unroll 24
  for (int i = 0; i < sums; ++i) sum[i] = V::broadcast(static_cast<S>(i));
  // volatile keeps the compiler from computing the result itself.
  volatile S half = S(0.5);
  const V factor = V::broadcast(half), term = V::broadcast(half);
  for (index round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < sums; ++i) sum[i] = fma(sum[i], factor, term);
  }
  V total = V::broadcast(0);
#pragma GCC unroll 24
  for (int i = 0; i < sums; ++i) total = total + sum[i];
  volatile S keep[V::lanes];
  S out[V::lanes];
  total.store(out);
  for (int i = 0; i < V::lanes; ++i) keep[i] = out[i];
  static_cast<void>(keep);
  return 2.0 * sums * V::lanes * static_cast<double>(rounds);
}

// Reads n elements from p `rounds` times, alternately forwards and backwards in blocks of
// 64 KB like the panels (run.h), and returns the sum.
template <class S>
S read_all(const S* p, index n, index rounds) {
  using V = Vec<S>;
  constexpr int at_once = 8;
  V sum[at_once];
#pragma GCC unroll 8
  for (int i = 0; i < at_once; ++i) sum[i] = V::broadcast(0);
  constexpr index block = 64 * 1024 / sizeof(S);
  const index blocks = (n + block - 1) / block;
  for (index round = 0; round < rounds; ++round) {
    for (index done = 0; done < blocks; ++done) {
      const index first = (round % 2 == 0 ? done : blocks - 1 - done) * block;
      const index end = first + block < n ? first + block : n;
      for (index k = first; k + at_once * V::lanes <= end; k += at_once * V::lanes) {
#pragma GCC unroll 8
        for (int i = 0; i < at_once; ++i) sum[i] = sum[i] + V::load(p + k + i * V::lanes);
      }
    }
  }
  S out[V::lanes], total = 0;
#pragma GCC unroll 8
  for (int i = 1; i < at_once; ++i) sum[0] = sum[0] + sum[i];
  sum[0].store(out);
  for (const S value : out) total += value;
  return total;
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
