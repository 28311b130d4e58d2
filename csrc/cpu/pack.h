// Weights in the order in which the kernels read them: panels (gemm.h) with the columns
// of all gates of a few hidden units together, so that a tile ends with whole units.
//
//   forward   bias (slots, P): b_ih + b_hh where they meet in one sum, else each alone
//             W panels over K = I, R panels over K = R:
//               [panel][k][gate slot][vector of units][lanes]
//   backward  Wᵀ panels over N = I, Rᵀ panels over N = R:
//               [panel][slot·P + unit][2 vectors of columns, the last 1 if enough][lanes]
//
// and where a step has a second product, `Dense`, one more matrix: forward the R_n of a
// GRU that is reset before it or the projection, backward the projection transposed.
//
// Padding is zero.
#pragma once

#include "../cells/rnn.h"
#include "../rows.h"
#include "gemm.h"
#include "team.h"

namespace fusedrnn::FUSEDRNN_ARCH {

constexpr index round_up(index n, index multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// From one row of so many values to the next: not a multiple of 1 KB, which would make
// rows compete for the same few sets of a cache.
template <class S>
constexpr index row_stride(index values) {
  constexpr index line = 64 / sizeof(S);
  return values % (16 * line) == 0 ? values + line : values;
}

// Where everything stands for a cell, an element type and an ISA.
template <template <class> class CellOf, class S>
struct Layout {
  using V = Vec<S>;
  using Scalar = S;
  using Cell = CellOf<V>;
  static constexpr int gates = Cell::gates, slots = Cell::slots;
  static constexpr int first_input = slots - gates;  // the first slot with an input part

  static constexpr int unit_vectors = gates == 1 ? 2 : 1;
  static constexpr int panel_units = unit_vectors * V::lanes;
  static constexpr int width = gates * unit_vectors;  // vectors per forward panel
  static constexpr int sums = slots * unit_vectors;   // and sums beside it
  static constexpr int input_offset = first_input * unit_vectors;
  static constexpr int tile = tallest_tile<V>(sums);

  static constexpr int back_width = 2;  // vectors per backward panel
  static constexpr int back_columns = back_width * V::lanes;
  static constexpr int back_tile = tallest_tile<V>(back_width);

  static constexpr SlotBlocks<Cell> blocks{};

  index I, H, R, P;

  explicit Layout(const Model& m) : I(m.I), H(m.H), R(m.R), P(round_up(m.H, V::lanes)) {}
  // Of one matrix (H, K), for a cell of one gate.
  Layout(index K, index N) : I(K), H(N), R(N), P(round_up(N, V::lanes)) {}

  // Values per row and step: the slots and c.
  index record() const { return row_stride<S>((slots + Cell::has_c) * P); }
  index da_stride() const { return row_stride<S>(slots * P); }

  index panels() const { return (H + panel_units - 1) / panel_units; }
  index panel_size(index K) const { return K * width * V::lanes; }
  index panel_bytes(index K) const { return panel_size(K) * index{sizeof(S)}; }
  index back_panels(index N) const { return (N + back_columns - 1) / back_columns; }
  index back_depth() const { return gates * P; }
  index back_panel_bytes() const {
    return back_depth() * back_columns * index{sizeof(S)};
  }
  index back_size(index N) const { return back_depth() * round_up(N, V::lanes); }

  index bias_size() const { return slots * P; }
  index input_panels() const { return bias_size(); }
  index recurrent_panels() const { return input_panels() + panels() * panel_size(I); }
  index forward_size() const { return recurrent_panels() + panels() * panel_size(R); }
  index back_recurrent_panels() const { return back_size(I); }
  index backward_size() const { return back_recurrent_panels() + back_size(R); }
};

// One matrix by itself, packed as an RNN's weights are.
template <class S>
using Dense = Layout<Rnn, S>;

// Whether a step forward has a second product, with whose rows.
template <class L>
struct Second {
  bool exists;
  index N, K;

  explicit Second(const Model& m)
      : exists(m.projects || resets_before<typename L::Cell>(m)),
        N(m.projects ? m.R : m.H),
        K(m.H) {}
  Dense<typename L::Scalar> forward() const { return {K, N}; }
  index forward_size() const {
    return exists ? forward().panels() * forward().panel_size(K) : 0;
  }
};

// One vector of a panel for lanes of k, of which `left` are there, from the blocks of
// weight (gates·H, K) that blocks[] names: square[i] is that of k + i.
template <class L, class S, class V>
inline void load_square(const L& layout, const S* weight, index K, const int* blocks,
                        index panel, int vector, index k, index left,
                        V (&square)[V::lanes]) {
  const int slot = vector / L::unit_vectors;
  const index unit = panel * L::panel_units + vector % L::unit_vectors * V::lanes;
  const S* const rows = weight + (blocks[slot] * layout.H + unit) * K + k;
#pragma GCC unroll 16
  for (int u = 0; u < V::lanes; ++u) {
    const bool real = unit + u < layout.H;
    square[u] = real ? load_upto<V>(rows + u * K, left) : V::broadcast(0);
    // So many rows at once no machine foresees.
    __builtin_prefetch(rows + u * K + 4 * V::lanes);
  }
  transpose(square);
}

// One panel's part for k in [begin, end). Squares of lanes × lanes are transposed.
template <class L, class S>
void pack_gate_panel(const L& layout, const S* weight, index K, const int* blocks,
                     index panel, Range part, S* to) {
  using V = typename L::V;
  constexpr int lanes = V::lanes;
  for (int vector = 0; vector < L::width; ++vector) {
    S* column = to + vector * lanes;
    for (index k = part.begin; k < part.end; k += lanes) {
      V square[lanes];
      const index left = part.end - k;
      load_square(layout, weight, K, blocks, panel, vector, k, left, square);
      if (left >= lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i].store(column + i * L::width * lanes);
        column += lanes * L::width * lanes;
      } else {
        for (int i = 0; i < left; ++i) square[i].store(column + i * L::width * lanes);
      }
    }
  }
}

// A thread packs its share of the panels.
template <class L, class S>
void pack_gate_panels(const L& layout, const S* weight, index K, const int* blocks,
                      S* panels, const Team& team) {
  const Range own = team.share(layout.panels());
  for (index panel = own.begin; panel < own.end; ++panel) {
    pack_gate_panel(layout, weight, K, blocks, panel, {0, K},
                    panels + panel * layout.panel_size(K));
  }
}

// A few rows of the weight go to all panels before the next: whole rows lie side by side
// in memory, those of one panel on as many pages (LSTM, H = 1024: 2.6 instead of 4.2 ms).
template <class L, class S>
void pack_transposed_panels(const L& layout, const S* weight, index N, const int* blocks,
                            S* panels, const Team& team) {
  using V = typename L::V;
  constexpr index rows_at_once = 16;
  const Range own = team.share(layout.back_panels(N));
  const auto pack_row = [&](int slot, index unit, index panel) {
    const index first = panel * L::back_columns;
    const int width = N - first > V::lanes ? L::back_width : 1;
    const S* const row = weight + (blocks[slot] * layout.H + unit) * N;
    S* to = panels + first * layout.back_depth() +
            (slot * layout.P + unit) * width * V::lanes;
    for (int vector = 0; vector < width; ++vector, to += V::lanes) {
      const index n = first + vector * V::lanes;
      const bool real = unit < layout.H && n < N;
      (real ? load_upto<V>(row + n, N - n) : V::broadcast(0)).store(to);
    }
  };
  for (int slot = 0; slot < L::gates; ++slot) {
    for (index begin = 0; begin < layout.P; begin += rows_at_once) {
      const index end = begin + rows_at_once < layout.P ? begin + rows_at_once : layout.P;
      for (index panel = own.begin; panel < own.end; ++panel) {
        for (index unit = begin; unit < end; ++unit) pack_row(slot, unit, panel);
      }
    }
  }
}

template <class L, class S>
void pack_bias(const L& layout, const Parameters<S>& p, S* to, const Team& team) {
  for (int slot = 0; slot < L::slots && team.rank == 0; ++slot) {
    const int input = L::blocks.input[slot], recurrent = L::blocks.recurrent[slot];
    for (index unit = 0; unit < layout.P; ++unit) {
      S bias = 0;
      const bool real = unit < layout.H;
      if (real && input >= 0 && p.bias_ih) bias += p.bias_ih[input * layout.H + unit];
      if (real && recurrent >= 0 && p.bias_hh) {
        bias += p.bias_hh[recurrent * layout.H + unit];
      }
      to[slot * layout.P + unit] = bias;
    }
  }
}

template <class L, class S>
void pack_forward(const Parameters<S>& p, bool borrow, S* to, const Team& team) {
  const L layout(p.model);
  pack_bias(layout, p, to, team);
  if (borrow) return;
  pack_gate_panels(layout, p.weight_ih, layout.I, L::Cell::input_gate,
                   to + layout.input_panels(), team);
  pack_gate_panels(layout, p.weight_hh, layout.R, L::Cell::recurrent_gate,
                   to + layout.recurrent_panels(), team);
  const Second<L> second(p.model);
  if (!second.exists) return;
  constexpr int only[] = {0};
  const S* const of_new_gate = p.weight_hh + 2 * layout.H * layout.R;
  pack_gate_panels(second.forward(), p.model.projects ? p.weight_hr : of_new_gate,
                   second.K, only, to + layout.forward_size(), team);
}

template <class L, class S>
void pack_backward(const Parameters<S>& p, S* to, const Team& team) {
  const L layout(p.model);
  pack_transposed_panels(layout, p.weight_ih, layout.I, L::Cell::input_gate, to, team);
  pack_transposed_panels(layout, p.weight_hh, layout.R, L::Cell::recurrent_gate,
                         to + layout.back_recurrent_panels(), team);
  if (!p.model.projects) return;
  constexpr int only[] = {0};
  pack_transposed_panels(Dense<S>(0, layout.R), p.weight_hr, layout.H, only,
                         to + layout.backward_size(), team);
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
