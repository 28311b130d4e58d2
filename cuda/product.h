// This is the product of a step: a block's slice of the recurrent weights times the
// operand, which is h' forward and da backward. An octet is eight rows of the weights
// that belong to eight hidden units: one gate of the units forward, Rᵀ for the units
// backward. A warp sums some octets of a group of units for `tiles` × 8 rows of the
// batch.
//
// The depth is divided into blocks of 64 bytes for the matrix units, of 16 bytes without
// them. Weights are packed (PackWeights in rows.h) as
//
//   [group][block of depth][octet][unit of 8][bytes of the block]
//
// so that each lane reads 16 consecutive bytes of a row. With the matrix units lane 4u+q
// reads quarter q of unit u, whose words are its fragments of two mma; the order of depth
// within a block is free as long as both factors agree. Operand rows are plain. Two
// octets that share their mma are interleaved, so that a lane's quad is its fragment: the
// first octet's quad has words 0, 1 of both octets, the second's words 2, 3
// (packed_source).
//
// A lane's sums are those of mma's fragments, also without matrix units: unit lane/4,
// rows 2(lane%4) and the next, in [0], [1] for the even octet and [2], [3] for the odd
// one.
#pragma once

#include "precision.h"

namespace fusedrnn::cuda {

template <class P>
struct DepthBlock {
  using E = typename P::Operand;
  static constexpr int bytes = P::on_matrix_units ? 64 : 16;
  static constexpr int depth = bytes / sizeof(E);
  static constexpr int quads = 8 * bytes / 16;  // per octet
};

FUSEDRNN_DEVICE int lane() { return thread() % 32; }
// These are a lane's unit of an octet, and the first of its two rows of a tile.
FUSEDRNN_DEVICE int lane_unit() { return lane() / 4; }
FUSEDRNN_DEVICE int lane_row() { return lane() % 4 * 2; }

template <class E>
struct alignas(16) Elements {
  E at[16 / sizeof(E)];
};
template <class E>
FUSEDRNN_DEVICE Elements<E> elements(const Quad& quad) {
  static_assert(sizeof(Elements<E>) == sizeof(Quad));
  Elements<E> e;
  __builtin_memcpy(&e, &quad, sizeof(e));
  return e;
}

// Blocks exchange operands through this many buffers in rotation. An element that is not
// yet written has all bits set, a NaN that no precision produces; a double has both words
// set.
constexpr int operand_buffers = 4;
constexpr std::uint32_t unwritten = 0xffffffff;
// Returns `unwritten` if any element is not written, else less.
template <class E>
FUSEDRNN_DEVICE std::uint32_t fullest_word(const Quad& quad) {
  const auto larger = [](std::uint32_t a, std::uint32_t b) { return a > b ? a : b; };
  const auto [a, b, c, d] = quad.word;
  if constexpr (sizeof(E) == 8) return larger(a & b, c & d);
  return larger(larger(a, b), larger(c, d));
}

// Returns the octet and the element within a lane's 16 bytes that are packed at element e
// of octet o, of `octets` octets.
struct Source {
  int octet, element;
};
template <class P>
FUSEDRNN_DEVICE Source packed_source(int o, int e, [[maybe_unused]] int octets) {
  if constexpr (P::on_matrix_units) {
    const bool has_other = (o | 1) < octets;
    constexpr int in_word = 4 / static_cast<int>(sizeof(typename P::Operand));
    const int word = e / in_word, source = o % 2 * 2 + word / 2;
    if (has_other) return {(o & ~1) + word % 2, source * in_word + e % in_word};
  }
  return {o, e};
}

template <class P, int octets, int tiles>
struct Product {
  using E = typename P::Operand;
  using A = typename P::State;
  using Block = DepthBlock<P>;
  static constexpr int pairs = (octets + 1) / 2;
  static constexpr int rows = P::on_matrix_units ? 1 : 2;  // operand rows a lane reads

  // A warp with only one sum splits it in two, because the matrix units take long to add
  // to a sum.
  static constexpr int chains = P::on_matrix_units && pairs * tiles == 1 ? 2 : 1;

  A sums[chains][pairs][tiles][4] = {};

  FUSEDRNN_DEVICE A sum(int pair, int tile, int i) const {
    A sum = sums[0][pair][tile][i];
#pragma unroll
    for (int chain = 1; chain < chains; ++chain) sum += sums[chain][pair][tile][i];
    return sum;
  }

  // Returns the lane's quad of a block's first octet in packed weights of one group.
  FUSEDRNN_DEVICE static int weight_quad(int block) {
    return block * octets * Block::quads + (P::on_matrix_units ? lane() : lane_unit());
  }
  // Returns the lane's first row of a tile, and operand_byte() its bytes of the block
  // there.
  FUSEDRNN_DEVICE static int operand_row() {
    return P::on_matrix_units ? lane_unit() : lane_row();
  }
  FUSEDRNN_DEVICE static int operand_byte() {
    return P::on_matrix_units ? lane() % 4 * 16 : 0;
  }

  // Adds one block of depth: tiles × rows quads of the operand.
  template <class Mma>
  FUSEDRNN_DEVICE void add([[maybe_unused]] const Mma& mma, const Quad (&weights)[octets],
                           const Quad* operand) {
    if constexpr (P::on_matrix_units) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int p = 0; p < pairs; ++p) {
          const bool is_pair = 2 * p + 1 < octets;
          const Quad& own = weights[is_pair ? 2 * p + half : 2 * p];
          const Quad alone{own.word[2 * half], 0, own.word[2 * half + 1], 0};
#pragma unroll
          for (int t = 0; t < tiles; ++t) {
            const Quad& of = operand[t];
            const std::uint32_t b[2] = {of.word[2 * half], of.word[2 * half + 1]};
            mma(sums[half % chains][p][t], is_pair ? own.word : alone.word, b);
          }
        }
      }
    } else {
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          const auto h = elements<E>(operand[t * rows + r]);
#pragma unroll
          for (int o = 0; o < octets; ++o) {
            const auto w = elements<E>(weights[o]);
            A& to = sums[0][o / 2][t][o % 2 * 2 + r];
#pragma unroll
            for (int k = 0; k < Block::depth; ++k) {
              to = multiply_add(w.at[k], h.at[k], to);
            }
          }
        }
      }
    }
  }
};

}  // namespace fusedrnn::cuda
