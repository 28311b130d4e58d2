// This header divides the scratch memory of a call, for a thread and for all. With null
// memory it counts how large it must be.
#pragma once

#include "arena.h"
#include "recompute.h"
#include "weight_gradients.h"

namespace fusedrnn {

// Threads that own units share the conversion of more elements to operands, and convert
// fewer each by itself.
constexpr index few_operands = 16 * 1024;

// StepScratch is the scratch memory that forward and backward both have.
struct StepScratch : Arena {
  char* norm_rows;             // LayerNorm's scratch memory for some whole rows
  char* zeros;                 // (P)
  char* bounds;                // of clip, and the same rounded
  char* vectors;               // padded
  char* zoneout;               // see Zoneout
  char* panel;                 // of weights that are not packed beforehand
  char **h, **c, **h_dropped;  // the rows' states before a step, (B) each

  template <class Problem>
  StepScratch(const Layout& l, const Problem& p, bool by_rows, index panel_memory_bytes,
              char* memory, int rank, int threads)
      : Arena(memory) {
    const index row = l.padded_bytes();
    const index lists = p.masks.resets || (p.masks.lengths && p.reverse) ? p.B : 0;
    const index of_norm = rows_at_once(l) * (2 + l.shape.slots) * row;
    norm_rows = of_thread(l.model.norm ? of_norm : 0, rank, threads);
    zeros = of_thread(row, rank, threads);
    bounds = of_thread(l.bytes(2 * 5), rank, threads);
    vectors = of_thread(padded_vectors_bytes(l, p.vectors), rank, threads);
    zoneout =
        of_thread(Zoneout::bytes(l, p.options, p.has_options, p.B, threads, by_rows),
                  rank, threads);
    panel =
        panel_memory_bytes > 0 ? of_thread(panel_memory_bytes, rank, threads) : nullptr;
    h = of_thread<char*>(lists, rank, threads);
    c = of_thread<char*>(lists, rank, threads);
    h_dropped = of_thread<char*>(lists, rank, threads);
  }
};

struct ForwardScratch : StepScratch {
  index* schedule;
  char **x, **to;  // rows of a time block
  char* c0;        // (B, P)
  char* mask;      // (B, P) of recurrent dropout
  char* dropped;   // (3, B, P) h0 · mask, and h · mask of even and odd steps
  char* operand;   // (B, P) of the second product
  char* records;   // where they are not saved as they are
  char* h_now;     // in halves: (2, B, R), every h of even and odd steps, padded
  char* gates;     // in halves: (B, gates, H), those of a step, if they are returned
  // Rows that are converted for a product: x, of a time block, h' and `operand`.
  Operand x_operand[most_terms]{}, h_operand{}, second_operand{};
  bool shares_operands = false;

  static index h_row_bytes(const Layout& l) { return l.bytes(round_up(l.R, l.lanes)); }
  // Returns the steps of a time block. It is one step, with W·x fused into it, if the
  // rows of a step are enough to pay for reading W's panels each time. Else it is as many
  // as keep their records in the second-level cache, but enough rows for W·x to run at
  // the speed of a matmul.
  static index time_block(const Layout& l, const Forward& p) {
    constexpr index cache = 256 * 1024, enough_rows = 96, bytes_per_row = 16 * 1024;
    if (l.panels() * l.panel_bytes(p.I) <= bytes_per_row * p.B) return 1;
    const Record plain(l.shape, false, l.P);
    const index cached_rows = cache / l.row_bytes(plain.values());
    const index rows = cached_rows > enough_rows ? cached_rows : enough_rows;
    const index steps = rows / p.B > 1 ? rows / p.B : 1;
    const index most = p.most_steps > 0 && p.most_steps < p.T ? p.most_steps : p.T;
    return steps < most ? steps : most;
  }
  static bool fuses(const Layout& l, index steps) { return steps == 1 && !l.model.norm; }
  static bool saves(const Layout& l, const Forward& p) {
    return p.saved && saves_slots(l.shape.saves, p.options);
  }
  static index panel_memory_bytes(const Layout& l, const Forward& p) {
    const bool packs = p.unpacked && packs_panels(p.T * p.B, l.tile_rows(), l.converts());
    return packs ? l.panel_bytes(p.I) + l.panel_bytes(p.R) : 0;
  }

  ForwardScratch(const Layout& l, const Forward& p, char* memory, int rank, int threads)
      : StepScratch(l, p, Blocks::cuts_rows(l, p, l.panels(), l.tile_rows(), threads),
                    panel_memory_bytes(l, p), memory, rank, threads) {
    const index all = p.B * l.padded_bytes(), steps = time_block(l, p);
    const index time_block_rows = fuses(l, steps) ? 0 : steps * p.B;
    schedule = of_thread<index>(Schedule::size(p, p.masks), rank, threads);
    x = of_thread<char*>(time_block_rows, rank, threads);
    to = of_thread<char*>(time_block_rows, rank, threads);
    c0 = take(l.shape.has_c ? all : 0);
    mask = take(drops(p.options) ? all : 0);
    dropped = take(drops(p.options) ? 3 * all : 0);
    operand = take(l.has_second() ? all : 0);
    records = take(saves(l, p) && !l.halves ? 0 : steps * p.B * l.record_bytes());
    h_now = take(l.halves ? 2 * p.B * h_row_bytes(l) : 0);
    gates = take(l.halves && p.trace ? l.bytes(p.B * l.shape.gates * l.H) : 0);
    if (l.converts()) take_operands(l, p, steps, rank, threads);
  }

 private:
  void take_operands(const Layout& l, const Forward& p, index steps, int rank,
                     int threads) {
    const bool by_rows = Blocks::cuts_rows(l, p, l.panels(), l.tile_rows(), threads);
    shares_operands = !by_rows && threads > 1 && p.B * p.H > few_operands;
    const index rows = by_rows ? (p.B + threads - 1) / threads : p.B;
    const auto take_rows = [&](Operand& rows_of, index count, index K) {
      const auto part = [&](index bytes) {
        return shares_operands ? take(bytes) : of_thread(bytes, rank, threads);
      };
      rows_of.apart = l.product.left_bytes(K);
      rows_of.rows = part((count + most_tile_rows) * rows_of.apart);
      rows_of.scale = reinterpret_cast<float*>(part((count + most_tile_rows) * 4));
    };
    for (int n = 0; n < l.input_operands; ++n) {
      take_rows(x_operand[n], steps * rows, p.I);
    }
    take_rows(h_operand, rows, p.R);
    if (l.has_second()) take_rows(second_operand, rows, p.H);
  }
};

struct BackwardScratch : StepScratch {
  index *own_schedule, *schedule;
  bool *cut, *cut_after;  // (B)
  char **from, **to;      // rows of a time block
  char** recomputed;      // lists of recomputed rows of a time block
  char* unused_row;       // (P)
  char* partial_sums;     // sums between pieces; or columns of da
  char* da;               // (ring, B) rows of gradients
  char* dc;               // (B, P)
  char* direct;           // (B, P) the part of dh that bypasses the matmul
  char* c0;               // (B, P)
  char *dbias, *right;    // see WeightGradients
  // With options
  char* mask;     // (B, P) of recurrent dropout
  char* dropped;  // (time_block, B, P) h' · mask
  char* dh;       // (B, P)
  char* dm;       // (B, P) operand of a second product, or its result
  char* sums;     // see WeightGradients
  char* records;  // (time_block + 1, B) recomputed or, in halves, converted
  // In halves: h', y and dy of a step as float32, h0 as bfloat16, dx of a time block as
  // float32, and h' of a time block where it is recomputed.
  char *wide_h, *wide_y, *wide_dy, *h0, *wide_dx, *recomputed_h;
  // Rows that are converted for products: da of a step, `second` of a step, da of dx, and
  // x, h' and a second product's operand of recomputed rows.
  Operand da_operand{}, second_operand{}, dx_operand{}, recomputed_operand[3]{};
  bool shares_operands = false;

  // Returns the steps of a time block: as many as keep their da in the second-level
  // cache, but enough for the products of the gradients.
  static index time_block(const Layout& l, const Backward& p) {
    constexpr index cache = 512 * 1024, enough_rows = 256;
    const index cached_rows = cache / (l.shape.slots * l.padded_bytes());
    const index rows = cached_rows > enough_rows ? cached_rows : enough_rows;
    const index steps = rows / p.B > 1 ? rows / p.B : 1;
    return steps < p.T ? steps : p.T;
  }
  // Returns whether the gradients of weights are computed at once, so that they may be
  // rounded.
  static bool adds_at_once(const Layout& l, const Backward& p) {
    return time_block(l, p) == p.T && p.T * p.B <= gradient_depth;
  }
  // Returns the steps whose records are in memory, where they are not read as saved.
  static index record_steps(const Layout& l, const Backward& p) {
    if (recomputes(l, p)) return time_block(l, p) + 1;
    if (!l.halves || !saves_slots(l.shape.saves, p.options)) return 0;
    return l.model.norm ? time_block(l, p) + 1 : 1;
  }
  static bool recomputes(const Layout& l, const Backward& p) {
    return !p.saved && saves_slots(l.shape.saves, p.options);
  }
  static index panel_memory_bytes(const Layout& l, const Backward& p) {
    const bool packs = !p.weights && packs_panels(p.T * p.B, l.back_tile(), l.converts());
    return packs ? l.back_panel_bytes() : 0;
  }

  BackwardScratch(const Layout& l, const Backward& p, char* memory, int rank, int threads)
      : StepScratch(l, p,
                    Blocks::cuts_rows(l, p, l.dense_panels(p.R), l.back_tile(), threads),
                    panel_memory_bytes(l, p), memory, rank, threads) {
    const index row = l.padded_bytes(), all = p.B * row, steps = time_block(l, p);
    const index of_cuts = p.masks.resets || p.options.bptt ? p.B : 0;
    const index time_block_rows = steps * p.B, of_dx = p.dx ? time_block_rows : 0;
    const bool is_recomputed = recomputes(l, p);
    own_schedule = of_thread<index>(Schedule::size(p, p.masks), rank, threads);
    schedule = of_thread<index>(Schedule::size(p, p.masks), rank, threads);
    cut = of_thread<bool>(of_cuts, rank, threads);
    cut_after = of_thread<bool>(of_cuts, rank, threads);
    from = of_thread<char*>(of_dx, rank, threads);
    to = of_thread<char*>(of_dx, rank, threads);
    recomputed = of_thread<char*>(
        is_recomputed ? RecomputedRows::lists * time_block_rows : 0, rank, threads);
    unused_row = of_thread(is_recomputed ? row : 0, rank, threads);
    const index of_sums = l.bytes((most_partial_rows + l.back_tile()) * l.dense_units());
    const index of_left = WeightGradients::left_bytes(l);
    partial_sums = of_thread(of_sums > of_left ? of_sums : of_left, rank, threads);
    const GradientRow gradient(l.shape, p.model, p.vectors.weight_ch != nullptr, l.P,
                               round_up(p.R, l.lanes));
    da = take((steps + 1) * p.B * l.row_bytes(gradient.values));
    dc = take(all);
    direct = take(all);
    c0 = take(all);
    dbias = take(l.shape.slots * row);
    const index depth =
        time_block_rows < gradient_depth ? time_block_rows : gradient_depth;
    right = take(WeightGradients::right_bytes(l, depth));
    mask = take(drops(p.options) ? all : 0);
    dropped = take(drops(p.options) ? steps * all : 0);
    dh = take(p.has_options ? all : 0);
    dm = take(l.has_second() ? all : 0);
    sums = take(p.has_options ? WeightGradients::vectors(l) * row : 0);
    records = take(record_steps(l, p) * p.B * l.record_bytes());
    if (!l.halves) return;
    wide_h = take(p.B * l.bytes(l.P));
    wide_y = take(saves_slots(l.shape.saves, p.options) ? 0 : p.B * l.bytes(l.P));
    wide_dy = take(p.B * l.bytes(l.P));
    h0 = take(p.B * p.R * l.item);
    const bool by_rows =
        Blocks::cuts_rows(l, p, l.dense_panels(p.R), l.back_tile(), threads);
    const index rows_now = by_rows ? (p.B + threads - 1) / threads : p.B;
    shares_operands = !by_rows && threads > 1 && p.B * p.H > few_operands;
    const auto operand = [&](index rows, index K, bool shared) {
      Operand of{};
      of.apart = l.product.left_bytes(K);
      const index bytes = (rows + most_tile_rows) * of.apart;
      of.rows = shared ? take(bytes) : of_thread(bytes, rank, threads);
      return of;
    };
    da_operand = operand(rows_now, l.back_depth(), shares_operands);
    if (l.has_second()) {
      const index K = l.model.projects ? round_up(p.R, l.lanes) : l.back_depth();
      second_operand = operand(rows_now, K, shares_operands);
    }
    if (p.dx) {
      const index each = (time_block_rows + threads - 1) / threads + l.back_tile();
      const index own =
          p.weights ? each : time_block_rows;  // or the threads share panels
      dx_operand = operand(own, l.back_depth(), false);
      wide_dx = of_thread(p.x_item == l.size ? 0 : l.bytes(own * p.I), rank, threads);
    }
    if (!is_recomputed) return;
    recomputed_h = take(time_block_rows * l.padded_bytes());
    recomputed_operand[0] = operand(time_block_rows, p.I, true);
    recomputed_operand[1] = operand(time_block_rows, p.R, true);
    if (l.has_second()) recomputed_operand[2] = operand(time_block_rows, p.H, true);
  }
};

}  // namespace fusedrnn
