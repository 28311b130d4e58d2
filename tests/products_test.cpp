// This file has products of other precisions than the element's own, which users cannot
// choose. They prove that a precision of weights is one more Product
// (csrc/cpu/kernels.h), which the same time loop runs with masks, options and threads.
//
//   int8     weights with a scale for each column, rows with a scale each, sums in int32
//   matrix   the demands of a matrix unit: a dense operand of 16 rows, K in blocks of 32,
//            weights in pairs of k, a thread state that is entered and left
//
// Both are written for the portable kernels' vectors of four floats.
#include "products_test.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace fusedrnn::test {

namespace {

constexpr int lanes = 4;

template <int W, int C, int tile, class Multiply>
constexpr PanelProduct panel_product(const Multiply& of) {
  PanelProduct p{};
  p.width = W;
  p.sums = C;
  p.tile = tile;
  for (int rows = 1; rows <= tile; ++rows) p.near[rows] = p.far[rows] = 1;
  of(p);
  return p;
}

// Returns the weight of column c of a panel at k, 0 if there is none.
float weight_at(const Matrix& of, int unit_vectors, index panel, int column, index k) {
  const int vector = column / lanes, slot = vector / unit_vectors;
  const index unit =
      (panel * unit_vectors + vector % unit_vectors) * lanes + column % lanes;
  if (unit >= of.H || k >= of.K) return 0;
  const float* const weight = reinterpret_cast<const float*>(of.weight);
  return weight[(of.blocks[slot] * of.H + unit) * of.K + k];
}

std::int8_t quantised(float x, float scale) {
  return static_cast<std::int8_t>(std::lrint(x / scale));
}

// An int8 panel is [k][columns] of int8, then a scale for each column.

index panel_bytes_s8(int width, index K) {
  return round_up(K * width * lanes, 4) + width * lanes * index{sizeof(float)};
}

void pack_s8(const Matrix& of, int unit_vectors, Range panels, char* to) {
  const int width = of.slots * unit_vectors, columns = width * lanes;
  for (index panel = panels.begin; panel < panels.end; ++panel) {
    char* const start = to + (panel - panels.begin) * panel_bytes_s8(width, of.K);
    float* const scales = reinterpret_cast<float*>(start + round_up(of.K * columns, 4));
    for (int c = 0; c < columns; ++c) {
      float most = 1e-30f;
      for (index k = 0; k < of.K; ++k) {
        most = std::fmax(most, std::fabs(weight_at(of, unit_vectors, panel, c, k)));
      }
      scales[c] = most / 127;
      for (index k = 0; k < of.K; ++k) {
        const float weight = weight_at(of, unit_vectors, panel, c, k);
        start[k * columns + c] = quantised(weight, scales[c]);
      }
    }
  }
}

index left_bytes_s8(index K) { return K; }

const float* row_at(const Rows& rows, index place) {
  const index at = rows.order ? rows.order[place] : place;
  return reinterpret_cast<const float*>(rows.at ? rows.at[place]
                                                : rows.first + at * rows.apart);
}

void put_left_s8(const Rows& rows, Range places, index K, const Operand* to, int) {
  for (index r = places.begin; r < places.end; ++r) {
    const float* const row = row_at(rows, r);
    float most = 1;
    for (index k = 0; k < K; ++k) most = std::fmax(most, std::fabs(row[k]));
    to->scale[r] = most / 127;
    for (index k = 0; k < K; ++k) {
      to->rows[r * to->apart + k] = quantised(row[k], to->scale[r]);
    }
  }
}

// Computes start + the products of a tile, where product(term, row, column) is one of
// them.
template <int rows, int W, int C, class Product>
void add(void* to, const StartAt& start, const TermAt* terms, int count,
         const Product& product) {
  float* const out = static_cast<float*>(to);
  for (int r = 0; r < rows; ++r) {
    const float* const from =
        reinterpret_cast<const float*>(start.rows[r] + start.offset);
    for (int c = 0; c < C * lanes; ++c) {
      out[r * C * lanes + c] = from[c / lanes * start.slot + c % lanes];
    }
  }
  for (int n = 0; n < count; ++n) {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < W * lanes; ++c) {
        out[r * C * lanes + terms[n].column * lanes + c] += product(terms[n], r, c);
      }
    }
  }
}

template <int rows, int W, int C>
void multiply_s8(void* to, const StartAt& start, const TermAt* terms, int count) {
  add<rows, W, C>(to, start, terms, count, [](const TermAt& of, int r, int c) {
    constexpr int columns = W * lanes;
    std::int32_t sum = 0;
    for (index k = 0; k < of.K; ++k) {
      sum += std::int32_t{static_cast<std::int8_t>(of.left[r][k])} *
             static_cast<std::int8_t>(of.right[k * columns + c]);
    }
    const float* const scales =
        reinterpret_cast<const float*>(of.right + round_up(of.K * columns, 4));
    return static_cast<float>(sum) * of.scale[r] * scales[c];
  });
}

// A panel of `matrix` is [K / 2][columns][2] of float, K padded to 32.

constexpr index block = 32;
thread_local bool is_entered = false;

index panel_bytes_matrix(int width, index K) {
  return round_up(K, block) * width * lanes * index{sizeof(float)};
}

void pack_matrix(const Matrix& of, int unit_vectors, Range panels, char* to) {
  const int width = of.slots * unit_vectors, columns = width * lanes;
  for (index panel = panels.begin; panel < panels.end; ++panel) {
    float* const start = reinterpret_cast<float*>(
        to + (panel - panels.begin) * panel_bytes_matrix(width, of.K));
    for (index k = 0; k < round_up(of.K, block); ++k) {
      for (int c = 0; c < columns; ++c) {
        start[(k / 2 * columns + c) * 2 + k % 2] =
            weight_at(of, unit_vectors, panel, c, k);
      }
    }
  }
}

index left_bytes_matrix(index K) { return round_up(K, block) * index{sizeof(float)}; }

void put_left_matrix(const Rows& rows, Range places, index K, const Operand* to, int) {
  const index used = K * index{sizeof(float)};
  for (index r = places.begin; r < places.end; ++r) {
    char* const at = to->rows + r * to->apart;
    std::memcpy(at, row_at(rows, r), used);
    std::memset(at + used, 0, to->apart - used);
  }
}

template <int rows, int W, int C>
void multiply_matrix(void* to, const StartAt& start, const TermAt* terms, int count) {
  if (!is_entered) std::abort();
  add<rows, W, C>(to, start, terms, count, [](const TermAt& of, int r, int c) {
    // The rows are addressed by base and stride, because a matrix unit takes no row
    // pointers.
    const float* const left =
        reinterpret_cast<const float*>(of.left[0] + r * left_bytes_matrix(of.K));
    const float* const right = reinterpret_cast<const float*>(of.right);
    constexpr int columns = W * lanes;
    float sum = 0;
    for (index first = 0; first < round_up(of.K, block); first += block) {
      float even = 0, odd = 0;
      for (index k = first; k < first + block; k += 2) {
        even += left[k] * right[(k / 2 * columns + c) * 2];
        odd += left[k + 1] * right[(k / 2 * columns + c) * 2 + 1];
      }
      sum += even + odd;
    }
    return sum;
  });
}

template <int W, int C, int rows = 1>
constexpr void fill_s8(PanelProduct& p) {
  p.multiply[rows - 1][0] = p.prefetch_one[rows - 1] = p.prefetch_all[rows - 1] =
      multiply_s8<rows, W, C>;
  if constexpr (rows < 4) fill_s8<W, C, rows + 1>(p);
}
template <int W, int C, int rows = 1>
constexpr void fill_matrix(PanelProduct& p) {
  p.multiply[rows - 1][0] = p.prefetch_one[rows - 1] = p.prefetch_all[rows - 1] =
      multiply_matrix<rows, W, C>;
  if constexpr (rows < 16) fill_matrix<W, C, rows + 1>(p);
}

constexpr PanelProduct panels_s8[] = {
    panel_product<4, 4, 4>(fill_s8<4, 4>), panel_product<3, 4, 4>(fill_s8<3, 4>),
    panel_product<2, 2, 4>(fill_s8<2, 2>), panel_product<1, 1, 4>(fill_s8<1, 1>)};
constexpr PanelProduct panels_matrix[] = {panel_product<4, 4, 16>(fill_matrix<4, 4>),
                                          panel_product<3, 4, 16>(fill_matrix<3, 4>),
                                          panel_product<2, 2, 16>(fill_matrix<2, 2>),
                                          panel_product<1, 1, 16>(fill_matrix<1, 1>)};

}  // namespace

const Product int8_product{Precision::element,
                           "bytes",
                           1,
                           1,
                           panels_s8,
                           panel_bytes_s8,
                           pack_s8,
                           nullptr,
                           left_bytes_s8,
                           put_left_s8,
                           nullptr,
                           nullptr,
                           nullptr,
                           nullptr};
const Product matrix_product{Precision::element,
                             "matrix",
                             block,
                             sizeof(float),
                             panels_matrix,
                             panel_bytes_matrix,
                             pack_matrix,
                             nullptr,
                             left_bytes_matrix,
                             put_left_matrix,
                             [] { is_entered = true; },
                             [] { is_entered = false; },
                             nullptr,
                             nullptr};

}  // namespace fusedrnn::test
