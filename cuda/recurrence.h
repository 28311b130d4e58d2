// This header is the recurrence of one layer in one direction, forward and backward, for
// iterations [begin, end) of T: in one launch, in one for each time block, or in one for
// each iteration. Iteration n is step n forward and step T-1-n backward.
//
// A step is a pipeline: before (rows whose state is reset, units that dropout hides), the
// product, the cell (with options, that of units.h), after (rows past their length, whose
// state stays). The thread that computes a part of the next step's operand also applies
// its before, so the product knows nothing of masks.
//
//   operand   (4, rows, segments, P), rows padded to whole row groups: iteration n reads
//             buffer n % 4 and writes the next. Forward has one segment, h'; backward one
//             for each gate, da of the recurrent part. Padding is finite. In a grid a
//             warp polls what it reads until it is written (product.h). In iteration n
//             writers mark their part of n - 1 as unwritten again: all of the operand of
//             n has arrived, so no thread reads that of n - 1 any more.
//   state     h and c forward, the gradients that bypass the product backward, (B, H),
//             updated in place from launch to launch
//   a_x       (times, B, gates, H) W x for the times of these iterations, by time
//   bias      (slots, H)
//   saved     (T, B, slots, H), cells (T, B, H) and da (T, B, slots, H), by time, as x
//             and dx are
//
// Sums run in an order that a plan fixes, and atomics never add values of two threads.
#pragma once

#include "../csrc/contract.h"
#include "engine.h"
#include "masks.h"
#include "tuning.h"
#include "units.h"

namespace fusedrnn::cuda {

// Recurrence has what both directions know of a layer.
template <class P>
struct Recurrence : Sizes {
  using S = typename P::Storage;
  using E = typename P::Operand;
  using A = typename P::State;

  P precision;
  Plan plan;
  index begin, end;
  const Quad* weights;
  E* operand;
  Masks masks;
  UnitOptions<A> units;

  template <class Engine, class F>
  FUSEDRNN_DEVICE void for_each_row_group(const F& f) const {
    Engine engine(precision, plan, weights, operand);
    for (int group = block_y(); group < plan.row_groups; group += blocks_y()) {
      engine.start(group, begin, end);
      f(engine);
    }
  }
};

// Returns whether the blocks of weight_ih have the order of the slots they feed, so that
// a product can write W x and read the input part of da directly.
template <class Cell>
constexpr bool feeds_in_order() {
  for (int k = 0; k < Cell::gates; ++k) {
    if (Cell::input_gate[k] != k) return false;
  }
  return true;
}

// Calls f(first slot, first block of weight_hh, count) for each run of slots from `first`
// on whose blocks are contiguous.
template <class Cell, class F>
void each_recurrent_block(int first, const F& f) {
  for (int k = first; k < Cell::gates;) {
    int end = k + 1;
    while (end < Cell::gates &&
           Cell::recurrent_gate[end] == Cell::recurrent_gate[end - 1] + 1) {
      ++end;
    }
    f(k, Cell::recurrent_gate[k], end - k);
    k = end;
  }
}

// States has a state after every step, as stored, and the initial state.
template <class P>
struct States {
  using S = typename P::Storage;
  using A = typename P::State;

  P precision;
  const A* initial;  // or null: zeros
  const S* all;      // (T, B, H), unspecified at times without a step
  index all_t, all_b;

  FUSEDRNN_DEVICE A at(index t, index b, index unit) const {
    return precision.state(all[t * all_t + b * all_b + unit]);
  }
  // Returns the state from which a row takes the step of a time, if it is not reset.
  FUSEDRNN_DEVICE A before(const Sizes& p, const Masks& masks, index t, int length,
                           index b, index unit) const {
    const index time = masks.time_before(p, t, length);
    if (time >= 0) return at(time, b, unit);
    return initial ? initial[b * p.H + unit] : A{0};
  }
};

template <template <class> class CellOf, class P, int tiles, bool resident>
struct ForwardRecurrence : Recurrence<P> {
  using Base = Recurrence<P>;
  using Base::B, Base::H, Base::T, Base::begin, Base::end, Base::masks, Base::precision,
      Base::units;
  using typename Base::A;
  using typename Base::S;
  using V = device::Vec<A>;
  using Cell = CellOf<V>;
  static constexpr int gates = Cell::gates, slots = Cell::slots;
  static constexpr int first_input = slots - gates;
  using Engine = cuda::Engine<P, gates, 1, 1, tiles, resident>;
  static_assert(feeds_in_order<Cell>());

  const A* a_x;
  const A* bias;
  A *h, *c;
  S* y;
  index y_t, y_b;
  S* saved;  // null in inference, or for cells that save nothing
  A* cells;  // or null
  index cells_t, cells_b;

  FUSEDRNN_DEVICE void operator()() const {
    this->template for_each_row_group<Engine>([&](Engine& engine) { run(engine); });
  }

 private:
  FUSEDRNN_DEVICE void run(Engine& engine) const {
    const index unit = engine.unit(0), first_row = engine.row();
    const bool has_unit = engine.has_item() && unit < H;
    const bool real[2] = {has_unit && first_row < B, has_unit && first_row + 1 < B};
    // A step's masks are loaded one step before they are used, so that no thread waits
    // for them.
    int length[2] = {0, 0};
    bool resets[2] = {false, false};
    A of_bias[slots], h_now[2] = {0, 0}, c_now[2] = {0, 0};
    unsigned dropped = 0, zoneout_bits = 0;  // bits of items (units.h)
#pragma unroll
    for (int k = 0; k < slots; ++k) of_bias[k] = has_unit ? bias[k * H + unit] : 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!real[r]) continue;
      length[r] = masks.length(first_row + r);
      resets[r] = masks.is_reset(this->time(begin), first_row + r);
      h_now[r] = h[(first_row + r) * H + unit];
      if constexpr (Cell::has_c) c_now[r] = c[(first_row + r) * H + unit];
    }
    if (units.mask && has_unit) dropped = dropped_items<2>(units, first_row, unit);
    const index earliest = this->reverse ? T - end : begin;
    // W x of an iteration is loaded before its product, which waits for other blocks.
    A ahead[2][gates] = {};
    const auto load_ahead = [&](index n) {
      if (units.zoneout_bits && has_unit) {
        zoneout_bits = zoneout_items<2>(units, this->time(n), first_row, unit);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const index row = (this->time(n) - earliest) * B + first_row + r;
#pragma unroll
        for (int k = 0; k < gates; ++k) {
          if (real[r]) ahead[r][k] = a_x[(row * gates + k) * H + unit];
        }
      }
    };
    for (index n = begin; n < end; ++n) {
      load_ahead(n);
      const index t = this->time(n);
      Items<Cell, V, 2> own;
      bool active[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        active[r] = real[r] && masks.is_within(t, length[r]);
        if (active[r] && resets[r]) h_now[r] = c_now[r] = 0;
        if (real[r] && n + 1 < T) {
          resets[r] = masks.is_reset(this->time(n + 1), first_row + r);
        }
      }
      A sum[Engine::pairs][4];
      engine.multiply(n, sum);
      if (engine.has_item()) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int k = 0; k < slots; ++k) {
            own.at[r].v[k] = {of_bias[k]};
            if (k >= first_input) own.at[r].v[k].value += ahead[r][k - first_input];
            if (k < gates) own.at[r].v[k].value += sum[k / 2][k % 2 * 2 + r];
          }
          own.at[r].state = {{h_now[r]}, {c_now[r]}};
        }
        if (units.any) {
          auto all = own;  // in memory, for the function call
          step_items(units, t, first_row, unit, active[0] | active[1] << 1, zoneout_bits,
                     all);
          own = all;
        } else {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            own.at[r].state = Cell::forward(own.at[r].v, own.at[r].state,
                                            Plain<V, true>{units.variant});
          }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (active[r]) {
            h_now[r] = own.at[r].state.h.value;
            c_now[r] = own.at[r].state.c.value;
          }
          const bool is_visible = !resets[r] && !(dropped >> r & 1);
          engine.stage(0, 0, r, is_visible ? h_now[r] * units.dropout_scale : A{0});
        }
        if (n + 1 < T) engine.send(n);
      }
      engine.end_iteration();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (!real[r]) continue;
        store(t, first_row + r, unit, active[r], own.at[r].v, h_now[r], c_now[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!real[r]) continue;
      h[(first_row + r) * H + unit] = h_now[r];
      if constexpr (Cell::has_c) c[(first_row + r) * H + unit] = c_now[r];
    }
  }

  FUSEDRNN_DEVICE void store(index t, index b, index unit, bool active,
                             const V (&v)[slots], A h_now, A c_now) const {
    y[t * y_t + b * y_b + unit] = precision.storage(active ? h_now : A{0});
    if (saved && active) {
      S* const to = saved + (t * B + b) * slots * H + unit;
#pragma unroll
      for (int k = 0; k < slots; ++k) to[k * H] = precision.storage(v[k].value);
    }
    if (Cell::has_c && cells)
      cells[t * cells_t + b * cells_b + unit] = active ? c_now : 0;
  }
};

template <template <class> class CellOf, class P, int tiles, bool resident>
struct BackwardRecurrence : Recurrence<P> {
  using Base = Recurrence<P>;
  using Base::B, Base::H, Base::T, Base::begin, Base::end, Base::masks, Base::precision,
      Base::units;
  using typename Base::A;
  using typename Base::S;
  using V = device::Vec<A>;
  using Cell = CellOf<V>;
  static constexpr int gates = Cell::gates, slots = Cell::slots, octets = 2;
  using Engine = cuda::Engine<P, octets, gates, octets, tiles, resident>;

  States<typename P::Stored> h;  // y
  const S* saved;                // null for cells that save nothing
  States<Exact<A>> cells;        // where the cell has c
  const S* dy;                   // or null
  index dy_t, dy_b;
  A *dh, *dc;  // gradients that bypass the product; at the end dh0, dc0
  S* da;
  A* dbias;  // (rows of row groups / 2, slots, H), sums over iterations; or null
  int bptt;  // 0: gradients pass everywhere

  FUSEDRNN_DEVICE void operator()() const {
    this->template for_each_row_group<Engine>([&](Engine& engine) { run(engine); });
  }

 private:
  // Inputs has the values of a row and unit that a step reads.
  struct Inputs {
    A slots_[slots], prev_h, prev_c, c, dy;
  };

  FUSEDRNN_DEVICE static bool bit(unsigned bits, int i) { return bits >> i & 1; }

  FUSEDRNN_DEVICE void run(Engine& engine) const {
    const int first_row = engine.row();
    const bool has_unit = engine.has_item();
    int length[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      length[r] = has_unit && first_row + r < B ? masks.length(first_row + r) : 0;
    }
    A dh_now[octets][2], dc_now[octets][2], dbias_now[octets][slots];
    // The low bits are what zoneout keeps of items, two bits each; from bit dropped_shift
    // on they are what dropout hides (units.h).
    constexpr int dropped_shift = 4 * octets;
    unsigned mask_bits = 0;
    // These have a bit for each item, and for each row.
    unsigned real = 0, resets = 0, cuts = 0;
#pragma unroll
    for (int o = 0; o < octets; ++o) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const index unit = engine.unit(o), b = first_row + r;
        const bool exists = has_unit && unit < H && b < B;
        real |= unsigned{exists} << (o * 2 + r);
        dh_now[o][r] = exists ? dh[b * H + unit] : 0;
        dc_now[o][r] = Cell::has_c && exists ? dc[b * H + unit] : 0;
      }
      const A* const sums = dbias_of(engine, o);
#pragma unroll
      for (int k = 0; k < slots; ++k) {
        dbias_now[o][k] = sums && begin > 0 ? sums[k * H] : A{0};
      }
    }
    if (units.mask && has_unit) {
      mask_bits = dropped_items<2 * octets>(units, first_row, engine.unit(0))
                  << dropped_shift;
    }
    // The values that an iteration reads are loaded before its product. Iteration T is
    // that of the initial state, to which the product of step 0 is added.
    Inputs ahead[octets][2] = {};
    const auto load_ahead = [&](index n) {
      if (n == T) return;
      resets = cuts = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int t = static_cast<int>(this->time(T - 1 - n));
        const bool is_reset = bit(real, r) && masks.is_reset(t, first_row + r);
        const bool is_cut = is_reset || masks.begins_chunk(*this, bptt, t, length[r]);
        resets |= unsigned{is_reset} << r;
        cuts |= unsigned{is_cut} << r;
      }
      if (units.zoneout_bits && has_unit) {
        const index t = this->time(T - 1 - n);
        mask_bits = mask_bits >> dropped_shift << dropped_shift |
                    zoneout_items<2 * octets>(units, t, first_row, engine.unit(0));
      }
#pragma unroll
      for (int o = 0; o < octets; ++o) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (!bit(real, o * 2 + r)) continue;
          const index t = this->time(T - 1 - n);
          read(ahead[o][r], t, length[r], first_row + r, engine.unit(o));
        }
      }
    };
    for (index n = begin; n < end; ++n) {
      load_ahead(n);
      const bool is_step = n < T;
      const index t = is_step ? this->time(T - 1 - n) : 0;
      A sum[Engine::pairs][4] = {};
      if (n > 0) engine.multiply(n, sum);
      Items<Cell, V, 2 * octets> own{};
      if (engine.has_item()) {
#pragma unroll
        for (int i = 0; i < own.count; ++i) {
          dh_now[i / 2][i % 2] +=
              bit(mask_bits, dropped_shift + i) ? A{0} : sum[0][i] * units.dropout_scale;
        }
        const bool active[2] = {is_step && masks.is_within(t, length[0]),
                                is_step && masks.is_within(t, length[1])};
        if (units.any) {
          Items<Cell, V, 2 * octets> all;  // in memory, for the function call
#pragma unroll
          for (int i = 0; i < own.count; ++i) {
            load_item(ahead[i / 2][i % 2], bit(resets, i % 2), dh_now[i / 2][i % 2],
                      dc_now[i / 2][i % 2], all, i);
          }
          step_items_back<!resident>(units, t, first_row, engine.unit(0),
                                     active[0] | active[1] << 1, mask_bits, all);
          own = all;
        }
#pragma unroll
        for (int o = 0; o < octets; ++o) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            Unit<Cell, V>& at = own.at[o * 2 + r];
            bool passes = true;
            if (bit(real, o * 2 + r) && active[r]) {
              passes = !bit(cuts, r);
              if (!units.any) {
                load_item(ahead[o][r], bit(resets, r), dh_now[o][r], dc_now[o][r], own,
                          o * 2 + r);
                at.state =
                    Cell::backward(at.v, own.prev[o * 2 + r], own.c[o * 2 + r],
                                   at.state.h, at.state.c, Plain<V, true>{units.variant});
              }
              dh_now[o][r] = passes ? at.state.h.value : A{0};
              dc_now[o][r] = passes ? at.state.c.value : A{0};
            }
#pragma unroll
            for (int k = 0; k < gates; ++k) {
              engine.stage(k, o, r, passes ? at.v[k].value : A{0});
            }
          }
        }
        if (is_step) engine.send(n);
      }
      engine.end_iteration();
#pragma unroll
      for (int o = 0; o < octets; ++o) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (!bit(real, o * 2 + r) || !is_step) continue;
          S* const to = da + (t * B + first_row + r) * slots * H + engine.unit(o);
#pragma unroll
          for (int k = 0; k < slots; ++k) {
            to[k * H] = precision.storage(own.at[o * 2 + r].v[k].value);
            dbias_now[o][k] += own.at[o * 2 + r].v[k].value;
          }
        }
      }
    }
#pragma unroll
    for (int o = 0; o < octets; ++o) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (!bit(real, o * 2 + r)) continue;
        const index at = (first_row + r) * H + engine.unit(o);
        dh[at] = dh_now[o][r];
        if constexpr (Cell::has_c) dc[at] = dc_now[o][r];
      }
      A* const sums = dbias_of(engine, o);
      if (!sums) continue;
#pragma unroll
      for (int k = 0; k < slots; ++k) sums[k * H] = dbias_now[o][k];
    }
  }

  // Returns where the thread's sums of a unit are, or null.
  FUSEDRNN_DEVICE A* dbias_of(const Engine& engine, int unit_octet) const {
    const index unit = engine.unit(unit_octet);
    if (!dbias || !engine.has_item() || unit >= H) return nullptr;
    return dbias + engine.row() / 2 * slots * H + unit;
  }

  FUSEDRNN_DEVICE void read(Inputs& in, index t, int length, index b, index unit) const {
    if (Cell::saves || saved) {
      const S* const from = saved + (t * B + b) * slots * H + unit;
#pragma unroll
      for (int k = 0; k < slots; ++k) in.slots_[k] = precision.state(from[k * H]);
    } else {
      in.slots_[0] = h.at(t, b, unit);
    }
    if constexpr (Cell::has_direct) {
      in.prev_h = h.before(*this, masks, t, length, b, unit);
    }
    if constexpr (Cell::has_c) {
      in.c = cells.at(t, b, unit);
      in.prev_c = cells.before(*this, masks, t, length, b, unit);
    }
    in.dy = dy ? precision.state(dy[t * dy_t + b * dy_b + unit]) : 0;
  }

  // Loads the start of a step: the item's values, and the gradient of the state after it.
  FUSEDRNN_DEVICE static void load_item(const Inputs& in, bool is_reset, A dh_in, A dc_in,
                                        Items<Cell, V, 2 * octets>& own, int item) {
#pragma unroll
    for (int k = 0; k < slots; ++k) own.at[item].v[k] = {in.slots_[k]};
    own.at[item].state = {{dh_in + in.dy}, {dc_in}};
    if constexpr (Cell::has_direct) own.prev[item].h = {is_reset ? A{0} : in.prev_h};
    if constexpr (Cell::has_c) {
      own.prev[item].c = {is_reset ? A{0} : in.prev_c};
      own.c[item] = {in.c};
    }
  }
};

// Recomputes the slots of all times from their sums without bias.
template <template <class> class CellOf, class A>
struct RecomputeSlots : Sizes {
  using V = device::Vec<A>;
  using Cell = CellOf<V>;
  static constexpr int slots = Cell::slots;

  UnitOptions<A> units;
  Masks masks;
  const A* bias;  // (slots, H)
  States<Exact<A>> cells;
  A* slots_;  // (T, B, slots, H)

  FUSEDRNN_DEVICE void operator()() const {
    for_each(T, B, H, [&](index t, index b, index unit, index) {
      const int length = masks.length(b);
      if (!masks.is_within(t, length)) return;
      A* const own = slots_ + (t * B + b) * slots * H + unit;
      Unit<Cell, V> at{};
      for (int k = 0; k < slots; ++k) at.v[k] = {own[k * H] + bias[k * H + unit]};
      if (Cell::has_c && !masks.is_reset(t, b)) {
        at.state.c = {cells.before(*this, masks, t, length, b, unit)};
      }
      step_unit(units, unit, 0, at);
      for (int k = 0; k < slots; ++k) own[k * H] = at.v[k].value;
    });
  }
};

}  // namespace fusedrnn::cuda
