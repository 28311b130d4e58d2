// This header multiplies pairs of rows of bytes by an instruction that multiplies two
// rows with two columns (SMMLA). A single row is multiplied by product.h.
#pragma once

#include "product.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Computes a tile of `start.height` rows and one panel, as multiply() in product.h does.
// The last pair of an odd number of rows has its row twice.
template <class F, int pairs, int W, int C>
void multiply_row_pairs(void* to, const StartAt& start, const TermAt* terms, int count) {
  using V = typename F::V;
  float* const out = static_cast<float*>(to);
  const int rows = start.height;
  for (int r = 0; r < rows; ++r) {
    const float* const from =
        reinterpret_cast<const float*>(start.rows[r] + start.offset);
    for (int c = 0; c < C; ++c) {
      V::load(from + c * start.slot).store(out + (r * C + c) * V::lanes);
    }
  }
  for (int n = 0; n < count; ++n) {
    const TermAt& term = terms[n];
    const char* left[2 * pairs];
    for (int r = 0; r < 2 * pairs; ++r) left[r] = term.left[r < rows ? r : rows - 1];
    typename F::Pair sum[pairs][W];
#pragma GCC unroll 8
    for (int p = 0; p < pairs; ++p) {
#pragma GCC unroll 8
      for (int c = 0; c < W; ++c) sum[p][c] = F::Pair::zeros();
    }
    const char* right = term.right;
    const index vectors = F::vectors(term.K);
    for (index k = 0; k < vectors; k += 2, right += 2 * W * F::bytes) {
      typename F::Left both[pairs];
#pragma GCC unroll 8
      for (int p = 0; p < pairs; ++p) {
        both[p] = F::left_pair(left[2 * p] + 4 * k, left[2 * p + 1] + 4 * k);
      }
#pragma GCC unroll 8
      for (int c = 0; c < W; ++c) {
        const char* const first = right + c * F::bytes;
        const auto columns = F::right_pair(first, first + W * F::bytes);
#pragma GCC unroll 8
        for (int p = 0; p < pairs; ++p) {
          sum[p][c] = F::add_pair(both[p], columns, sum[p][c]);
        }
      }
    }
    typename F::Sum part[2 * pairs][W];
#pragma GCC unroll 8
    for (int p = 0; p < pairs; ++p) {
#pragma GCC unroll 8
      for (int c = 0; c < W; ++c) {
        part[2 * p][c] = sum[p][c].first_row();
        part[2 * p + 1][c] = sum[p][c].second_row();
      }
    }
    F::template finish<1, W, C>(term, part, rows, out);
  }
}

// Sets the functions of tiles of 2 * pairs - 1 and 2 * pairs rows.
template <class F, int W, int C, int pairs>
constexpr void fill_pairs(PanelProduct& p) {
  constexpr int registers = 24, each = 2;  // of sums
  for (int rows = 2 * pairs - 1; rows <= 2 * pairs; ++rows) {
    if (rows == 1) continue;
    p.near[rows] = p.far[rows] = 1;
    p.tile = rows;
    p.multiply[rows - 1][0] = p.prefetch_one[rows - 1] = p.prefetch_all[rows - 1] =
        multiply_row_pairs<F, pairs, W, C>;
  }
  if constexpr ((pairs + 1) * W * each <= registers && pairs < 4) {
    fill_pairs<F, W, C, pairs + 1>(p);
  }
}

template <class F, int W, int C>
constexpr PanelProduct row_pair_product() {
  PanelProduct p = panel_product<F, W, C>();
  fill_pairs<F, W, C, 1>(p);
  return p;
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
