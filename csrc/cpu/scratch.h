// The scratch memory of a call, of a thread and of all: of none (null), to learn how
// large it must be.
#pragma once

#include "arena.h"
#include "recompute.h"
#include "weight_gradients.h"

namespace fusedrnn {

// Scratch memory that forward and backward both have.
struct StepScratch : Arena {
  char* of_rows;          // what LayerNorm keeps of some whole rows
  char* zeros;            // (P)
  char* bounds;           // of clip
  char* vectors;          // padded
  char* zoneout;          // see Zoneout
  char* operands;         // of a product that does not read rows where they lie
  char **h, **c, **seen;  // the rows' states before a step, (B) each

  template <class Problem>
  StepScratch(const Layout& l, const Problem& p, bool by_rows, bool has_operands,
              char* memory, int rank, int threads)
      : Arena(memory) {
    const index row = l.padded_bytes(), widest = p.I > p.H ? p.I : p.H;
    const index lists = p.masks.resets || (p.masks.lengths && p.reverse) ? p.B : 0;
    const index of_norm = rows_at_once(l) * (2 + l.shape.slots) * row;
    of_rows = of_thread(l.model.norm ? of_norm : 0, rank, threads);
    zeros = of_thread(row, rank, threads);
    bounds = of_thread(l.bytes(4), rank, threads);
    vectors = of_thread(padded_vectors_bytes(l, p.vectors), rank, threads);
    zoneout =
        of_thread(Zoneout::bytes(l, p.options, p.has_options, p.B, threads, by_rows),
                  rank, threads);
    operands = of_thread(has_operands ? l.operand_bytes(widest, p.R) : 0, rank, threads);
    h = of_thread<char*>(lists, rank, threads);
    c = of_thread<char*>(lists, rank, threads);
    seen = of_thread<char*>(lists, rank, threads);
  }
};

struct ForwardScratch : StepScratch {
  index* schedule;
  char **x, **to;  // rows of a stretch
  char* c0;        // (B, P)
  char* mask;      // (B, P) of the h' that R sees
  char* shown;     // (3, B, P) h0, and h of even and odd steps, as R sees them
  char* operand;   // (B, P) of the second product
  char* records;   // where they are not saved

  // Steps per stretch: one, with W·x fused into the step, if its panels are read anew for
  // rows enough to pay for it; else as many as have their records in the second-level
  // cache, but so many rows that W·x runs at the speed of a matmul.
  static index stretch(const Layout& l, const Forward& p) {
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

  ForwardScratch(const Layout& l, const Forward& p, char* memory, int rank, int threads)
      : StepScratch(l, p, Blocks::cuts_rows(l, p, l.panels(), l.tile_rows(), threads),
                    true, memory, rank, threads) {
    const index all = p.B * l.padded_bytes(), steps = stretch(l, p);
    const index in_stretch = fuses(l, steps) ? 0 : steps * p.B;
    schedule = of_thread<index>(Schedule::size(p, p.masks), rank, threads);
    x = of_thread<char*>(in_stretch, rank, threads);
    to = of_thread<char*>(in_stretch, rank, threads);
    c0 = take(l.shape.has_c ? all : 0);
    mask = take(drops(p.options) ? all : 0);
    shown = take(drops(p.options) ? 3 * all : 0);
    operand = take(l.has_second() ? all : 0);
    records = take(saves(l, p) ? 0 : steps * p.B * l.record_bytes());
  }
};

struct BackwardScratch : StepScratch {
  index *own_schedule, *schedule;
  bool *cut, *cut_after;  // (B)
  char **from, **to;      // rows of a stretch
  char** again;           // lists of rows of a stretch that are computed again
  char* nowhere;          // (P)
  char* waiting;          // sums that wait for the next piece; or columns of da
  char* da;               // (ring, B) rows of gradients
  char* dc;               // (B, P)
  char* direct;           // (B, P) dh that reaches the step before past the matmul
  char* c0;               // (B, P)
  char *dbias, *right;    // see WeightGradients
  // With options
  char* mask;     // (B, P) of the h' that R sees
  char* shown;    // (stretch, B, P) h' as R sees it
  char* dh;       // (B, P)
  char* dm;       // (B, P) what a second product is of, or comes to
  char* sums;     // see WeightGradients
  char* records;  // (stretch + 1, B) computed again

  // Steps whose da stays in the second-level cache, but enough for the products of the
  // gradients.
  static index stretch(const Layout& l, const Backward& p) {
    constexpr index cache = 512 * 1024, enough_rows = 256;
    const index cached_rows = cache / (l.shape.slots * l.padded_bytes());
    const index rows = cached_rows > enough_rows ? cached_rows : enough_rows;
    const index steps = rows / p.B > 1 ? rows / p.B : 1;
    return steps < p.T ? steps : p.T;
  }
  static bool computes_again(const Layout& l, const Backward& p) {
    return !p.saved && saves_slots(l.shape.saves, p.options);
  }

  BackwardScratch(const Layout& l, const Backward& p, char* memory, int rank, int threads)
      : StepScratch(l, p,
                    Blocks::cuts_rows(l, p, l.dense_panels(p.R), l.back_tile(), threads),
                    computes_again(l, p), memory, rank, threads) {
    const index row = l.padded_bytes(), all = p.B * row, steps = stretch(l, p);
    const index of_cuts = p.masks.resets || p.options.bptt ? p.B : 0;
    const index in_stretch = steps * p.B, of_dx = p.dx ? in_stretch : 0;
    const bool is_again = computes_again(l, p);
    own_schedule = of_thread<index>(Schedule::size(p, p.masks), rank, threads);
    schedule = of_thread<index>(Schedule::size(p, p.masks), rank, threads);
    cut = of_thread<bool>(of_cuts, rank, threads);
    cut_after = of_thread<bool>(of_cuts, rank, threads);
    from = of_thread<char*>(of_dx, rank, threads);
    to = of_thread<char*>(of_dx, rank, threads);
    again = of_thread<char*>(is_again ? RecomputedRows::lists * in_stretch : 0, rank,
                             threads);
    nowhere = of_thread(is_again ? row : 0, rank, threads);
    const index of_sums = l.bytes((most_rows_waiting + l.back_tile()) * l.dense_units());
    const index of_left = WeightGradients::left_bytes(l);
    waiting = of_thread(of_sums > of_left ? of_sums : of_left, rank, threads);
    const GradientRow gradient(l.shape, p.model, p.vectors.weight_ch != nullptr, l.P,
                               round_up(p.R, l.lanes));
    da = take((steps + 1) * p.B * l.row_bytes(gradient.values));
    dc = take(all);
    direct = take(all);
    c0 = take(all);
    dbias = take(l.shape.slots * row);
    const index depth = in_stretch < gradient_depth ? in_stretch : gradient_depth;
    right = take(WeightGradients::right_bytes(l, depth));
    mask = take(drops(p.options) ? all : 0);
    shown = take(drops(p.options) ? steps * all : 0);
    dh = take(p.has_options ? all : 0);
    dm = take(l.has_second() ? all : 0);
    sums = take(p.has_options ? WeightGradients::vectors(l) * row : 0);
    records = take(is_again ? (steps + 1) * p.B * l.record_bytes() : 0);
  }
};

}  // namespace fusedrnn
