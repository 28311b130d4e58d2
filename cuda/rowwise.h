// This header runs a layer whose units need each other within a step (LayerNorm, a
// projection, a GRU that is reset before its matmul), which recurrence.h cannot do, in
// one direction on a GPU. Each step is its products by cuBLASLt and, between them,
// csrc/pointwise.h with a block for each row. It runs in float32 and float64; arrays of
// 16 bits are converted before and after.
//
//   records    (T, B, values)  by time: csrc/record.h; saved for backward
//   gradients  (T, B, values)  by time, of a backward
//   h_dropped  (B, R)          h' as R reads it: masked, and 0 if the row is reset next
//
// Products read and write records and gradients in place. So W x is computed for all
// times at once, R h' is added to it step by step, and dx, dW and dR are one product
// each.
#pragma once

#include "vec.h"
// after FUSEDRNN_ARCH
#include "../csrc/pointwise.h"
#include "../csrc/random.h"
#include "kernels.h"
#include "launches.h"
#include "products.h"

namespace fusedrnn::cuda {

using device::RowWise;

// BlockWalk is the walk of a block's threads along a row.
template <class A>
struct BlockWalk {
  using S = A;
  using V = device::Vec<A>;
  static constexpr int parts = changes::all, most_rows = 1, lanes = 1;
  static constexpr bool vectors_are_padded = false;
  static constexpr bool bias_is_in = false;
  FUSEDRNN_DEVICE static constexpr bool norm(const Model& model) { return model.norm; }

  const std::uint8_t* zoneout_bits;  // of the row, if zoneout draws (rows.h); or null,
  A keeps_h, keeps_c;                // and these are the expectation
  A* own_scratch;

  template <class F>
  FUSEDRNN_DEVICE static void each(index n, const F& f) {
#pragma unroll 1
    for (index u = thread(); u < n; u += threads()) f(u);
  }
  FUSEDRNN_DEVICE static index all(index n) { return n; }
  template <class F>
  FUSEDRNN_DEVICE static void once(const F& f) {
    if (thread() == 0) f();
  }
  // The order of the sum depends on the number of threads only.
  template <class F>
  FUSEDRNN_DEVICE static void sums(int, index n, const F& f, A* to) {
    A own = 0;
    each(n, [&](index u) { own += f(0, u).value; });
    *to = total(own);
  }
  FUSEDRNN_DEVICE static V load(const A* p, index u) { return {p[u]}; }
  FUSEDRNN_DEVICE static void store(V x, A* p, index u) { p[u] = x.value; }
  FUSEDRNN_DEVICE static V upto(const A* p, index u, index) { return {p[u]}; }
  FUSEDRNN_DEVICE static void put(V x, A* p, index u, index) { p[u] = x.value; }
  FUSEDRNN_DEVICE V keep_h(const A*, index u) const {
    return {zoneout_bits ? static_cast<A>(zoneout_bits[u] & 1) : keeps_h};
  }
  FUSEDRNN_DEVICE V keep_c(const A*, index u) const {
    return {zoneout_bits ? static_cast<A>(zoneout_bits[u] >> 1 & 1) : keeps_c};
  }
  FUSEDRNN_DEVICE static V rounded(V x) { return x; }
  FUSEDRNN_DEVICE A* scratch(int) const { return own_scratch; }
  FUSEDRNN_DEVICE static void bounds(double clip, const Activations& of, V (&to)[5]) {
    device::clip_bounds(clip, device::Replaced<V, true>{of}, to);
  }

 private:
  FUSEDRNN_CALLED static A total(A own) {
    A* const parts = reinterpret_cast<A*>(shared());
    sync_block();
    parts[thread()] = own;
    sync_block();
    if (thread() < 32) {
      for (int i = thread() + 32; i < threads(); i += 32) own += parts[i];
      parts[thread()] = own;
    }
    sync_block();
    A total = 0;
    for (int i = 0; i < 32; ++i) total += parts[i];
    return total;
  }
};

// RowKernel has what all kernels of a layer know, by value.
template <template <class> class CellOf, class A>
struct RowKernel : Sizes {
  using V = device::Vec<A>;
  using Cell = CellOf<V>;
  using Walk = BlockWalk<A>;
  using Rows = RowWise<Cell, Walk>;
  static constexpr int gates = Cell::gates, slots = Cell::slots;

  Model model;
  Options options;
  Vectors<const A> vectors;
  Masks masks;
  index record_values;
  const A *h0, *c0;
  const A* bias;                     // (slots, H)
  const A* zeros;                    // (max(R, H),)
  const A* mask;                     // (B, R) of recurrent dropout, or null
  const std::uint8_t* zoneout_bits;  // (T, B, H) where zoneout draws, or null
  A* norm_rows;                      // (B, 2 + slots, H)

  FUSEDRNN_DEVICE Rows rows(index t, index b) const {
    const Walk walk{zoneout_bits ? zoneout_bits + (t * B + b) * H : nullptr,
                    static_cast<A>(options.zoneout_h), static_cast<A>(options.zoneout_c),
                    norm_rows + b * (2 + slots) * H};
    return Rows(*this, H, bias, walk);
  }
  FUSEDRNN_DEVICE bool is_active(index t, index b) const { return masks.is_active(t, b); }
  FUSEDRNN_DEVICE bool is_cut(index t, index b) const {
    const int bptt = options.bptt < T ? static_cast<int>(options.bptt) : 0;
    return masks.is_reset(t, b) ||
           masks.begins_chunk(*this, bptt, static_cast<int>(t), masks.length(b));
  }
  // Returns the state before the step of time t; `previous` has the states after the
  // steps.
  FUSEDRNN_DEVICE const A* state_before(index t, index b, const A* initial,
                                        const A* previous, index time_apart,
                                        index row_apart, index width) const {
    if (masks.is_reset(t, b)) return zeros;
    const index time = masks.time_before(*this, t, masks.length(b));
    if (time >= 0) return previous + time * time_apart + b * row_apart;
    return initial ? initial + b * width : zeros;
  }
  // Clears the record of a row that takes no step, because sums run over all rows.
  FUSEDRNN_DEVICE void clear_record(A* at) const {
    Walk::each(record_values, [&](index i) { at[i] = 0; });
  }
  template <class F>
  FUSEDRNN_DEVICE static void for_rows(index count, const F& f) {
#pragma unroll 1
    for (index row = block_x(); row < count; row += blocks_x()) f(row);
  }
};

// Sets the state before the first step, and what R reads of it.
template <template <class> class CellOf, class A>
struct RowStart : RowKernel<CellOf, A> {
  using Base = RowKernel<CellOf, A>;
  using Base::B, Base::H, Base::R, Base::T, Base::mask, Base::masks, Base::model;
  A* zeros_to;
  A *h, *c, *h_dropped;  // null in backward

  FUSEDRNN_DEVICE void operator()() const {
    for_each(H > R ? H : R, [&](index i) { zeros_to[i] = 0; });
    for_each(B * R, [&](index i) {
      const index b = i / R;
      if (!h) return;
      h[i] = this->h0 ? this->h0[i] : A{0};
      const bool is_reset = T > 0 && masks.is_reset(this->time(0), b);
      h_dropped[i] = is_reset ? A{0} : mask ? h[i] * mask[i] : h[i];
    });
    for_each(B * H, [&](index i) {
      if (c) c[i] = this->c0 ? this->c0[i] : A{0};
    });
  }
};

// Runs a step after its product. With a second product it has two parts: the first writes
// the operand to `operand`, the second reads the result in h_new or in a record's first
// slot.
template <template <class> class CellOf, class A>
struct RowForward : RowKernel<CellOf, A> {
  using Base = RowKernel<CellOf, A>;
  using Base::B, Base::H, Base::R, Base::T, Base::mask, Base::masks, Base::model;
  using Base::gates, Base::slots;
  using typename Base::Cell;
  using typename Base::Walk;
  index step;
  int part;
  A *records, *h, *c, *h_dropped, *h_new, *operand;
  A* y;
  index y_b;
  A *cells, *trace;
  index cells_t, cells_b;

  FUSEDRNN_DEVICE void operator()() const {
    this->for_rows(B, [&](index b) {
      const index t = this->time(step);
      const bool cell_has_second = Base::Rows::has_second(model);
      const bool is_last_part = part == 1 || !(cell_has_second || model.projects);
      if (this->is_active(t, b)) {
        const auto rows = this->rows(t, b);
        const bool is_reset = masks.is_reset(t, b);
        A* const record = records + (t * B + b) * this->record_values;
        typename Base::Rows::Row row{record,
                                     record,
                                     H,
                                     is_reset ? this->zeros : h + b * R,
                                     is_reset || !Cell::has_c ? this->zeros : c + b * H,
                                     h_dropped + b * R,
                                     record + rows.record.cell(),
                                     model.projects ? operand + b * H : h_new + b * R,
                                     cells ? cells + t * cells_t + b * cells_b : nullptr,
                                     trace ? trace + (t * B + b) * gates * H : nullptr,
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     record};
        if (part == 0) {
          if (model.norm) rows.normalise_inputs(&row, 1);
          if (model.norm) rows.normalise_recurrent(&row, 1);
          if (cell_has_second) {
            A* const to = operand + b * H;
            rows.open(&row, 1, &to, H);
          } else {
            rows.forward(&row, 1, H);
          }
        } else if (cell_has_second) {
          if (model.norm) rows.normalise_second(&row, 1);
          rows.close(&row, 1, H);
        } else {
          row.h = h_new + b * R;
          Walk::each(R, [&](index u) { rows.finish(row, u, Walk::load(row.h, u)); });
        }
        if (is_last_part) {
          Walk::each(R, [&](index u) {
            h[b * R + u] = h_new[b * R + u];
            y[(t * B + b) * y_b + u] = h_new[b * R + u];
          });
          if constexpr (Cell::has_c) {
            Walk::each(H, [&](index u) { c[b * H + u] = row.c[u]; });
          }
        }
      } else if (part == 0) {
        Walk::each(R, [&](index u) { y[(t * B + b) * y_b + u] = 0; });
        this->clear_record(records + (t * B + b) * this->record_values);
        Walk::each(H, [&](index u) { operand[b * H + u] = 0; });
        Walk::each(H, [&](index u) {
          if (cells) cells[t * cells_t + b * cells_b + u] = 0;
          for (int k = 0; k < gates && trace; ++k) {
            trace[((t * B + b) * gates + k) * H + u] = 0;
          }
        });
      }
      if (!is_last_part || step + 1 == T) return;
      const bool resets_next = masks.is_reset(this->time(step + 1), b);
      Walk::each(R, [&](index u) {
        const A factor = mask ? mask[b * R + u] : A{1};
        h_dropped[b * R + u] = resets_next ? A{0} : h[b * R + u] * factor;
      });
    });
  }
};

// Recomputes the records of all times from their sums, in two parts as RowForward. Rows
// of all times run at once and share norm_rows of their b, so nothing here may use it:
// with LayerNorm of c the gates are recomputed in the backward step.
template <template <class> class CellOf, class A>
struct RowRecompute : RowKernel<CellOf, A> {
  using Base = RowKernel<CellOf, A>;
  using Base::B, Base::H, Base::R, Base::T, Base::mask, Base::masks, Base::model;
  using typename Base::Cell;
  using typename Base::Walk;
  int part;
  A* records;
  const A *y, *h_dropped, *cells;  // h_dropped (T, B, R)
  index y_b, cells_t, cells_b;
  A *operand, *h_new;  // (T, B, H)

  FUSEDRNN_DEVICE void operator()() const {
    this->for_rows(T * B, [&](index i) {
      const index t = i / B, b = i % B;
      if (!this->is_active(t, b)) {
        this->clear_record(records + i * this->record_values);
        Walk::each(H, [&](index u) {
          if (operand) operand[i * H + u] = 0;
        });
        return;
      }
      const auto rows = this->rows(t, b);
      A* const record = records + i * this->record_values;
      const typename Base::Rows::Row row{
          record,
          record,
          H,
          this->state_before(t, b, this->h0, y, B * y_b, y_b, R),
          Cell::has_c ? this->state_before(t, b, this->c0, cells, cells_t, cells_b, H)
                      : nullptr,
          h_dropped + i * R,
          h_new + i * H,
          h_new + i * H,
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          record};
      const bool cell_has_second = Base::Rows::has_second(model), norm = model.norm;
      if (part == 0) {
        if (norm) rows.normalise_inputs(&row, 1);
        if (norm) rows.normalise_recurrent(&row, 1);
        if (cell_has_second) {
          A* const to = operand + i * H;
          rows.open(&row, 1, &to, H);
        } else if (!norm) {
          rows.forward(&row, 1, H);
        }
        if constexpr (Cell::has_c) {
          Walk::each(H, [&](index u) {
            record[rows.record.cell() + u] = cells[t * cells_t + b * cells_b + u];
          });
        }
      } else if (norm) {
        rows.normalise_second(&row, 1);
      } else {
        rows.close(&row, 1, H);
      }
    });
  }
};

// Runs a step backward in parts: 0 is dh and, without a projection, the cell; 1 is the
// cell, after the projection; 2 is the rest of a GRU that is reset before its matmul.
// Step -1 is the initial state.
template <template <class> class CellOf, class A>
struct RowBackward : RowKernel<CellOf, A> {
  using Base = RowKernel<CellOf, A>;
  using Base::B, Base::H, Base::R, Base::T, Base::mask, Base::masks, Base::model;
  using Base::slots;
  using typename Base::Cell;
  using typename Base::V;
  using typename Base::Walk;
  index step;
  int part;
  GradientRow at;
  const A *records, *y, *h_dropped;  // h_dropped (T, B, R)
  index y_b;
  A* gradients;
  const A* from_product;     // (B, R) Rᵀ da of the step after
  A *dh, *dc, *direct, *dm;  // (B, R) and (B, H)
  const A* dy;
  index dy_t, dy_b;
  const A* dcells;
  index dcells_t, dcells_b;
  A* dh0;

  FUSEDRNN_DEVICE void operator()() const {
    this->for_rows(B, [&](index b) {
      if (part == 0) find_dh(b);
      if (step < 0) return;
      const index t = this->time(step), row_at = t * B + b;
      A* const da = gradients + row_at * at.values;
      if (!this->is_active(t, b)) {
        if (part == 0) Walk::each(at.values, [&](index u) { da[u] = 0; });
        return;
      }
      const auto rows = this->rows(t, b);
      const index cell_at = rows.record.cell();
      const bool cell_has_second = Base::Rows::has_second(model);
      const typename Base::Rows::BackRow row{
          records + row_at * this->record_values,
          this->state_before(t, b, this->h0, y, B * y_b, y_b, R),
          Cell::has_c
              ? this->state_before(t, b, this->c0, records + cell_at,
                                   B * this->record_values, this->record_values, H)
              : nullptr,
          nullptr,
          h_dropped + row_at * R,
          dcells ? dcells + t * dcells_t + b * dcells_b : nullptr,
          dh + b * R,
          dc + b * H,
          direct + b * R,
          da,
          this->is_cut(t, b),
          mask ? mask + b * R : nullptr,
          nullptr,
          nullptr};
      if (part == 0) {
        Walk::each(R, [&](index u) {
          row.dh[u] = rows.zoneout_backward(row, u, Walk::load(row.dh, u)).value;
        });
        if (model.projects) {
          Walk::each(R, [&](index u) { da[at.dh + u] = row.dh[u]; });
          return;
        }
      }
      const A* const from = part > 0 ? dm + b * H : row.dh;
      const auto each_unit = [&](const auto& f) {
        Walk::each(H, [&](index u) { f(u, Walk::load(from, u)); });
      };
      if (part == 2) {
        each_unit([&](index u, V d) { rows.close_backward(row, u, d); });
        if (model.norm) rows.normalise_backward(&row, 1, at);
      } else if (cell_has_second) {
        each_unit([&](index u, V d) { rows.open_backward(row, at, u, d); });
        if (model.norm) rows.normalise_second_backward(&row, 1, at);
      } else if (model.norm) {
        rows.backward_normalised(&row, 1, at, &from);
      } else {
        each_unit([&](index u, V d) { rows.backward(row, at, u, d); });
      }
    });
  }

 private:
  // Sums the gradient of a row's state after this step, and with dy dh.
  FUSEDRNN_DEVICE void find_dh(index b) const {
    bool has_product = false;
    if (step + 1 < T) {
      const index later = this->time(step + 1);
      has_product = this->is_active(later, b) && !this->is_cut(later, b);
    }
    const bool is_active = step >= 0 && this->is_active(this->time(step), b);
    const A* const dy_row =
        dy && is_active ? dy + this->time(step) * dy_t + b * dy_b : nullptr;
    Walk::each(R, [&](index u) {
      const index i = b * R + u;
      A total = direct[i];
      if (has_product) total += from_product[i] * (mask ? mask[i] : A{1});
      if (step < 0) dh0[i] = total;
      if (is_active) {
        dh[i] = dy_row ? total + dy_row[u] : total;
      } else {
        direct[i] = total;
      }
    });
  }
};

template <template <class> class CellOf, class A>
class RowLayer {
  using Kernel = RowKernel<CellOf, A>;
  using Cell = typename Kernel::Cell;
  static constexpr int gates = Cell::gates, slots = Cell::slots;
  static constexpr int first_input = slots - gates;
  static constexpr int row_threads = 256;
  static constexpr Element element = state_element<A>;

  // Scratch is the scratch memory of both directions.
  struct Scratch {
    MaskArrays<A> mask_arrays;
    A *bias, *zeros, *norm_rows;
    void* matmul;
    A* x;  // a copy, or null
    Scratch(const ForwardOf<A>& call, bool masked, Arena& arena)
        : mask_arrays(call, arena),
          bias(arena.take<A>(slots * call.H)),
          zeros(arena.take<A>(call.H > call.R ? call.H : call.R)),
          norm_rows(arena.take<A>(call.B * (2 + slots) * call.H)),
          matmul(arena.take<char>(matmul_workspace)),
          x(masked || !row_stride(call) ? arena.take<A>(call.T * call.B * call.I)
                                        : nullptr) {}
  };
  struct ForwardScratch : Scratch {
    A *h_dropped, *h_new, *operand, *records;
    ForwardScratch(const ForwardOf<A>& call, Arena& arena)
        : Scratch(call, false, arena),
          h_dropped(arena.take<A>(call.B * call.R)),
          h_new(arena.take<A>(call.B * call.H)),
          operand(arena.take<A>(call.B * call.H)),
          records(call.saved ? call.saved
                             : arena.take<A>(call.T * call.B * record(call.model))) {}
  };
  struct BackwardScratch : Scratch {
    A *gradients, *h_dropped, *from_product, *dh, *dc, *direct, *dm;
    A *records, *operand, *h_new;
    BackwardScratch(const BackwardOf<A>& call, Arena& arena)
        : Scratch(call, call.lengths, arena),
          gradients(arena.take<A>(call.T * call.B * row_of(call).values)),
          h_dropped(arena.take<A>(call.T * call.B * call.R)),
          from_product(arena.take<A>(call.B * call.R)),
          dh(arena.take<A>(call.B * call.H)),
          dc(arena.take<A>(call.B * call.H)),
          direct(arena.take<A>(call.B * call.R)),
          dm(arena.take<A>(call.B * call.H)),
          records(call.saved ? call.saved
                             : arena.take<A>(call.T * call.B * record(call.model))),
          operand(!call.saved && has_second(call.model)
                      ? arena.take<A>(call.T * call.B * call.H)
                      : nullptr),
          h_new(call.saved ? nullptr : arena.take<A>(call.T * call.B * call.H)) {}
  };

 public:
  static index record(const Model& m) { return round_up(record_of(m).values(), 4); }
  static index saved_bytes(const ForwardOf<A>& call) {
    return round_up(call.T * call.B * record(call.model) * index{sizeof(A)}, 256);
  }
  static index forward_workspace(const ForwardOf<A>& call) {
    Arena arena(nullptr);
    ForwardScratch(call, arena);
    return arena.used();
  }
  static index backward_workspace(const BackwardOf<A>& call) {
    Arena arena(nullptr);
    BackwardScratch(call, arena);
    return arena.used();
  }

  static void forward(const ForwardOf<A>& call) {
    if (call.B == 0) return;
    const OnDevice current(call.device);
    Arena arena(call.workspace);
    const ForwardScratch scratch(call, arena);
    start(call, scratch, call.h_n, Cell::has_c ? call.c_n : nullptr, scratch.h_dropped);
    multiply_inputs(call, scratch, gather_x(call, scratch), scratch.records);
    const index B = call.B, H = call.H, R = call.R;
    const bool cell_has_second = has_second(call.model);
    RowForward<CellOf, A> kernel{};
    fill(kernel, call, scratch);
    kernel.records = scratch.records;
    kernel.h = call.h_n;
    kernel.c = call.c_n;
    kernel.h_dropped = scratch.h_dropped;
    kernel.h_new = scratch.h_new;
    kernel.operand = scratch.operand;
    kernel.y = call.y;
    kernel.y_b = call.y_b;
    kernel.cells = call.cells;
    kernel.cells_t = call.cells_t;
    kernel.cells_b = call.cells_b;
    kernel.trace = call.trace;
    for (index s = 0; s < call.T; ++s) {
      A* const records = scratch.records + call.time(s) * B * record(call.model);
      multiply_recurrent(call, scratch, scratch.h_dropped, B, records);
      kernel.step = s;
      kernel.part = 0;
      launch_rows(kernel, B, call);
      if (!cell_has_second && !call.model.projects) continue;
      if (cell_has_second) {
        multiply_new(call, scratch, scratch.operand, H, B, records);
      } else {
        multiply(call, scratch, {scratch.operand, element, B, H, H, false},
                 {call.weight_hr, element, R, H, H, true},
                 {scratch.h_new, element, B, R, R, false});
      }
      kernel.part = 1;
      launch_rows(kernel, B, call);
    }
  }

  static void backward(const BackwardOf<A>& call) {
    const OnDevice current(call.device);
    const index T = call.T, B = call.B, H = call.H, R = call.R, all = T * B;
    if (all == 0) {
      clear_gradients<Cell, A, A>(call);
    }
    if (B == 0) return;
    if (T == 0) {
      copy_or_clear(call.dh_n, call.dh0, B * R, call);
      if (Cell::has_c) copy_or_clear(call.dc_n, call.dc0, B * H, call);
      return;
    }
    Arena arena(call.workspace);
    const BackwardScratch scratch(call, arena);
    start(call, scratch, nullptr, nullptr, nullptr);
    A* const dc = Cell::has_c ? call.dc0 : scratch.dc;
    copy_or_clear(call.dh_n, scratch.direct, B * R, call);
    if (Cell::has_c) copy_or_clear(call.dc_n, dc, B * H, call);
    const bool cell_has_second = has_second(call.model);
    const GradientRow at = row_of(call);
    const index gradient = at.values;

    Sizes of_h = call;
    of_h.H = R;
    const Previous<Exact<A>> h_dropped{of_h,
                                       {},
                                       call.y,
                                       B * call.y_b,
                                       call.y_b,
                                       call.h0,
                                       scratch.h_dropped,
                                       scratch.mask_arrays.masks(call),
                                       scratch.mask_arrays.mask};
    cuda::launch_each(h_dropped, all * R, call.device, call.stream);
    const Matrix x = gather_x(call, scratch);
    if (!call.saved) recompute(call, scratch, x);

    RowBackward<CellOf, A> kernel{};
    fill(kernel, call, scratch);
    kernel.at = at;
    kernel.records = scratch.records;
    kernel.y = call.y;
    kernel.y_b = call.y_b;
    kernel.h_dropped = scratch.h_dropped;
    kernel.gradients = scratch.gradients;
    kernel.from_product = scratch.from_product;
    kernel.dh = scratch.dh;
    kernel.dc = dc;
    kernel.direct = scratch.direct;
    kernel.dm = scratch.dm;
    kernel.dy = call.dy;
    kernel.dy_t = call.dy_t;
    kernel.dy_b = call.dy_b;
    kernel.dcells = call.dcells;
    kernel.dcells_t = call.dcells_t;
    kernel.dcells_b = call.dcells_b;
    kernel.dh0 = call.dh0;
    const auto of_time = [&](index t) { return scratch.gradients + t * B * gradient; };
    for (index s = T - 1; s >= -1; --s) {
      if (s + 1 < T) {
        from_recurrent(call, scratch, of_time(call.time(s + 1)) + at.recurrent, gradient,
                       scratch.from_product);
      }
      kernel.step = s;
      kernel.part = 0;
      launch_rows(kernel, B, call);
      if (s < 0) break;
      A* const now = of_time(call.time(s));
      if (call.model.projects) {
        multiply(call, scratch, {now + at.dh, element, B, R, gradient, false},
                 {call.weight_hr, element, R, H, H, false},
                 {scratch.dm, element, B, H, H, false});
        kernel.part = 1;
        launch_rows(kernel, B, call);
      }
      if (cell_has_second) {
        multiply(call, scratch, {now + at.recurrent, element, B, H, gradient, false},
                 {call.weight_hh + second_block * H * R, element, H, R, R, false},
                 {scratch.dm, element, B, R, R, false});
        kernel.part = 2;
        launch_rows(kernel, B, call);
      }
    }
    write_gradients(call, scratch, x, at);
  }

 private:
  static constexpr int peepholes = Cell::peephole_count;
  static constexpr int second_block = Cell::recurrent_gate[0];  // of weight_hh

  static bool has_second(const Model& m) {
    return fusedrnn::shape_of<Cell>(m.variant).has_second();
  }
  static Record record_of(const Model& m) {
    return {fusedrnn::shape_of<Cell>(0), m.norm, m.H};
  }
  static GradientRow row_of(const ForwardOf<A>& call) {
    GradientRow row(fusedrnn::shape_of<Cell>(call.model.variant), call.model,
                    call.vectors.weight_ch != nullptr, call.H, call.R);
    row.values = round_up(row.values, 4);
    return row;
  }
  static void copy_or_clear(const A* from, A* to, index count, const ForwardOf<A>& call) {
    const index bytes = count * index{sizeof(A)};
    if (from) {
      copy(to, from, bytes, call.stream);
    } else {
      cuda::clear(to, bytes, call.stream);
    }
  }
  static void fill(Kernel& kernel, const ForwardOf<A>& call, const Scratch& scratch) {
    static_cast<Sizes&>(kernel) = call;
    kernel.model = call.model;
    kernel.options = call.options;
    kernel.vectors = call.vectors;
    kernel.masks = scratch.mask_arrays.masks(call);
    kernel.record_values = record(call.model);
    kernel.h0 = call.h0;
    kernel.c0 = call.c0;
    kernel.bias = scratch.bias;
    kernel.zeros = scratch.zeros;
    kernel.mask = scratch.mask_arrays.mask;
    kernel.zoneout_bits = scratch.mask_arrays.zoneout_bits;
    kernel.norm_rows = scratch.norm_rows;
  }
  static void start(const ForwardOf<A>& call, const Scratch& scratch, A* h, A* c,
                    A* h_dropped) {
    scratch.mask_arrays.draw(call, Cell::has_c);
    pack_bias<Cell, Exact<A>>(call.precision, call.bias_ih, call.bias_hh, scratch.bias,
                              call.H, call.device, call.stream);
    RowStart<CellOf, A> kernel{};
    fill(kernel, call, scratch);
    kernel.zeros_to = scratch.zeros;
    kernel.h = h;
    kernel.c = c;
    kernel.h_dropped = h_dropped;
    launch_each(kernel, call.B * (call.H > call.R ? call.H : call.R), call);
  }

  template <class K>
  static void launch_rows(const K& kernel, index rows, const ForwardOf<A>& call) {
    constexpr index most = 1 << 16;
    const index units = call.H > call.R ? call.H : call.R;
    const int wanted = static_cast<int>(round_up(units < 32 ? 32 : units, 32));
    const int threads = wanted < row_threads ? wanted : row_threads;
    launch(kernel,
           {static_cast<int>(rows < most ? rows : most), 1, threads,
            threads * index{sizeof(A)}, false, false},
           call.stream);
  }
  template <class K>
  static void launch_each(const K& kernel, index count, const ForwardOf<A>& call) {
    launch(kernel, shape_of_each(count, call.device), call.stream);
  }

  static void multiply(const ForwardOf<A>& call, const Scratch& scratch,
                       const Matrix& left, const Matrix& right, const Matrix& to,
                       bool adds = false) {
    const bool tf32 = call.precision == Precision::tf32;
    matmul(left, right, to, adds, tf32, scratch.matmul, call.stream);
  }
  static Matrix blocks_of(const A* weight, int first, int count, index H, index K,
                          bool transposed) {
    return {weight + first * H * K, element, count * H, K, K, transposed};
  }
  // Does the same as each_recurrent_block, without the slot of a second product.
  template <class F>
  static void each_recurrent(const ForwardOf<A>& call, const F& f) {
    each_recurrent_block<Cell>(has_second(call.model), f);
  }

  static LayerProducts<Cell, A> products_of(const ForwardOf<A>& call,
                                            const Scratch& scratch) {
    return {call, element, scratch.matmul, has_second(call.model)};
  }
  static Matrix gather_x(const ForwardOf<A>& call, const Scratch& scratch) {
    return matrix_of_x<Exact<A>>(call, element, scratch.x,
                                 scratch.mask_arrays.masks(call));
  }
  // Computes W x of all times.
  static void multiply_inputs(const ForwardOf<A>& call, const Scratch& scratch,
                              const Matrix& x, A* records) {
    products_of(call, scratch)
        .multiply_inputs(x, {records + record_of(call.model).input(first_input), element,
                             x.rows, gates * call.H, record(call.model), false});
  }
  // Computes R h' of some rows, added to W x where both are one sum.
  static void multiply_recurrent(const ForwardOf<A>& call, const Scratch& scratch,
                                 const A* h_dropped, index rows, A* records) {
    const Record at = record_of(call.model);
    products_of(call, scratch)
        .multiply_recurrent(
            {h_dropped, element, rows, call.R, call.R, false},
            [&](int slot, int count) {
              return Matrix{records + at.recurrent(slot), element, rows, count * call.H,
                            record(call.model),           false};
            },
            [&](int slot) { return !call.model.norm && slot >= first_input; });
  }
  // Computes R_n (r h') into the first slot.
  static void multiply_new(const ForwardOf<A>& call, const Scratch& scratch,
                           const A* operand, index stride, index rows, A* records) {
    const Record at = record_of(call.model);
    multiply(
        call, scratch, {operand, element, rows, call.H, stride, false},
        blocks_of(call.weight_hh, second_block, 1, call.H, call.R, true),
        {records + at.recurrent(0), element, rows, call.H, record(call.model), false});
  }
  // Computes Rᵀ da of one step.
  static void from_recurrent(const ForwardOf<A>& call, const Scratch& scratch,
                             const A* da, index gradient, A* to) {
    bool adds = false;
    each_recurrent(call, [&](int slot, int block, int count) {
      multiply(call, scratch,
               {da + slot * call.H, element, call.B, count * call.H, gradient, false},
               blocks_of(call.weight_hh, block, count, call.H, call.R, false),
               {to, element, call.B, call.R, call.R, false}, adds);
      adds = true;
    });
  }

  static void recompute(const BackwardOf<A>& call, const BackwardScratch& scratch,
                        const Matrix& x) {
    const index all = call.T * call.B;
    multiply_inputs(call, scratch, x, scratch.records);
    multiply_recurrent(call, scratch, scratch.h_dropped, all, scratch.records);
    RowRecompute<CellOf, A> kernel{};
    fill(kernel, call, scratch);
    kernel.records = scratch.records;
    kernel.y = call.y;
    kernel.y_b = call.y_b;
    kernel.h_dropped = scratch.h_dropped;
    kernel.cells = call.cells;
    kernel.cells_t = call.cells_t;
    kernel.cells_b = call.cells_b;
    kernel.operand = scratch.operand;
    kernel.h_new = scratch.h_new;
    launch_rows(kernel, all, call);
    if (!has_second(call.model)) return;
    multiply_new(call, scratch, scratch.operand, call.H, all, scratch.records);
    kernel.part = 1;
    launch_rows(kernel, all, call);
  }

  static void write_gradients(const BackwardOf<A>& call, const BackwardScratch& scratch,
                              const Matrix& x, const GradientRow& at) {
    const index gradient = at.values, stride = record(call.model);
    const index T = call.T, B = call.B, H = call.H, R = call.R, all = T * B;
    const auto of = [&](index from, index columns, bool transposed) {
      return Matrix{
          scratch.gradients + from, element, all, columns, gradient, transposed};
    };
    const Entering entering[] = {{0, {scratch.h_dropped, element, all, R, R, false}}};
    products_of(call, scratch)
        .write_gradients(call, of(at.input, gates * H, false), x, entering,
                         [&](int slot, int count) {
                           return of(at.recurrent + slot * H, count * H, true);
                         });
    if (has_second(call.model) && call.dweight_hh) {
      multiply(call, scratch, of(at.recurrent, H, true), of(at.operand, H, false),
               {call.dweight_hh + second_block * H * R, element, H, R, R, false});
    }
    if (call.dweight_hr) {
      multiply(call, scratch, of(at.dh, R, true), of(at.m, H, false),
               {call.dweight_hr, element, R, H, H, false});
    }
    RowSums<A> sums{};
    sums.rows = all;
    sums.H = H;
    const auto add = [&](A* to, int block, index a, const A* b = nullptr,
                         index b_row = 0) {
      if (!to) return;
      sums.jobs[sums.count++] = {scratch.gradients + a, b, gradient, b_row,
                                 to + block * H};
    };
    constexpr Shape blocks = fusedrnn::shape_of<Cell>(0);
    const Record in = record_of(call.model);
    const auto& v = call.dvectors;
    for (int k = 0; k < slots; ++k) {
      const int input = blocks.input[k], recurrent = blocks.recurrent[k];
      if (input >= 0) {
        add(call.dbias_ih, input, k * H);
        add(v.gamma_ih, input, k * H, scratch.records + in.input(k), stride);
      }
      if (recurrent >= 0) {
        add(call.dbias_hh, recurrent, k * H);
        add(v.gamma_hh, recurrent, k * H, scratch.records + in.recurrent(k), stride);
      }
    }
    if constexpr (Cell::has_c) {
      for (int k = 0; k < peepholes; ++k) {
        const auto [slot, reads_new_c] = blocks.peepholes[k];
        const index c_at = reads_new_c ? at.c : at.c_prev;
        add(v.weight_ch, k, slot * H, scratch.gradients + c_at, gradient);
      }
      add(v.gamma_c, 0, at.squashed, scratch.gradients + at.normal_c, gradient);
      add(v.beta_c, 0, at.squashed);
    }
    if (sums.count > 0) launch_sums(sums, call.stream);
  }
};

}  // namespace fusedrnn::cuda
