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
#include "masks.h"
#include "product.h"
#include "tuning.h"
#include "units.h"

namespace fusedrnn::cuda {

template <class A>
struct alignas(16) Four {
  A at[4];
};

// An Engine is the product and exchange of a plan, in one thread. A group of units has
// `octets` octets of weights and `unit_octets` × 8 units.
template <class P, int octets_, int segments_, int unit_octets, int tiles, bool resident>
class Engine {
  using E = typename P::Operand;
  using A = typename P::State;
  using Sums = Product<P, octets_, tiles>;
  using Block = DepthBlock<P>;
  static constexpr int chunk_quads = 8 * sizeof(E) / 16;  // 8 units of a row

 public:
  static constexpr int octets = octets_, segments = segments_, pairs = Sums::pairs;
  static constexpr int group_units = 8 * unit_octets;
  static constexpr int chunks = segments * unit_octets;  // of a row's operand, per group
  static constexpr int rows = 8 * tiles;
  static constexpr int own_quads = chunks * 8 * chunk_quads;  // that a warp writes
  // This is how many blocks of depth a warp can keep the weights of, in half of its
  // registers.
  static constexpr int held = 32 / octets / 8 * 8;

  // Returns the quads of packed weights, per group of units and in all.
  static constexpr index weight_quads(index padded) {
    return segments * (padded / Block::depth) * octets * Block::quads;
  }
  static constexpr index packed_quads(index H) {
    return ceil_div(H, group_units) * weight_quads(padded_units(H));
  }

  // Lays out a block's shared memory: its weights, one or two operands, two sets of
  // partial sums, staging, the arrivals of two operands. Rows of an operand are padded so
  // that the lanes' 16 bytes are in different banks. One operand is enough if all warps
  // meet after the product.
  static constexpr void lay_out(Plan& plan) {
    const bool has_one = plan.exchange != Exchange::cluster && plan.splits > 1;
    const index sums = plan.splits > 1 ? index{plan.groups} * plan.splits * pairs : 0;
    const index quads = weight_quads(plan.P);
    const index row = round_up(segments * plan.P * index{sizeof(E)}, 128) + Block::bytes;
    const index operand = plan.shares_operand() ? rows * row : 0;
    const index partial = sums * tiles * 32 * index{sizeof(Four<A>)};
    const index operands_at = plan.on_chip ? plan.groups * quads * 16 : 0;
    const index partials_at = operands_at + (has_one ? 1 : 2) * operand;
    const index staging_at = partials_at + 2 * partial;
    const index arrivals_at =
        staging_at + index{plan.groups} * tiles * chunks * 64 * index{sizeof(E)};
    plan.group_quads = static_cast<int>(quads);
    plan.row_bytes = static_cast<int>(row);
    plan.operands_at = static_cast<int>(operands_at);
    plan.operand_bytes = has_one ? 0 : static_cast<int>(operand);
    plan.partials_at = static_cast<int>(partials_at);
    plan.partial_bytes = static_cast<int>(partial);
    plan.staging_at = static_cast<int>(staging_at);
    plan.arrivals_at = static_cast<int>(arrivals_at);
    plan.shared_bytes = arrivals_at + 2 * index{sizeof(Arrivals)};
  }

  FUSEDRNN_DEVICE Engine(P precision, const Plan& plan, const Quad* weights, E* operand)
      : precision_(precision),
        plan_(plan),
        operand_(operand),
        group_(thread() / 32 / plan.splits),
        split_(thread() / 32 % plan.splits),
        unit_group_(block_x() * plan.groups + group_),
        clustered_(plan.exchange == Exchange::cluster),
        has_peers_(clustered_ && blocks_x() > 1) {
    const int blocks = plan.P / Block::depth;
    first_ = blocks * split_ / plan.splits;
    depth_blocks_ = blocks * (split_ + 1) / plan.splits - first_;
    if (!has_units()) depth_blocks_ = 0;
    weights_ = weights + index{unit_group_} * plan.group_quads;
    if constexpr (resident) {
      DepthWalk at{first_, 0};
#pragma unroll
      for (int b = 0; b < held; ++b) {
        if (b >= segments * depth_blocks_) continue;
        load_weights(weights_ + Sums::weight_quad(at.block), held_[b]);
        advance(at);
      }
    }
    if (has_peers_ && thread() == 0) {
      clear(arrivals(0));
      clear(arrivals(1));
    }
    if (plan.on_chip) {
      const int own = block_x() * plan.groups, left = plan.unit_groups - own;
      const int groups = left < plan.groups ? left : plan.groups;
      const int quads = groups * plan.group_quads;
      const Quad* const from = weights + index{own} * plan.group_quads;
      Quad* const to = reinterpret_cast<Quad*>(shared());
#pragma unroll 4
      for (int i = thread(); i < quads; i += threads()) to[i] = load_constant(from + i);
    }
  }

  FUSEDRNN_DEVICE bool has_units() const { return unit_group_ < plan_.unit_groups; }
  // Returns whether the thread has an item: two rows of a tile, of each octet's unit.
  FUSEDRNN_DEVICE bool has_item() const { return split_ < tiles && has_units(); }
  FUSEDRNN_DEVICE int unit(int unit_octet) const {
    return unit_group_ * group_units + unit_octet * 8 + lane_unit();
  }
  // Returns the first of its two rows.
  FUSEDRNN_DEVICE int row() const { return row_group_ * rows + split_ * 8 + lane_row(); }

  FUSEDRNN_DEVICE void start(int row_group, index begin, index end) {
    row_group_ = row_group;
    begin_ = begin;
    end_ = end;
    if (clustered_) {
      // After the barrier no thread reads or sends the operand of the row group before.
      // The operand of begin + 1 is overwritten later, except for its padding.
      sync_cluster();
#pragma unroll 1
      for (int row = 0; row < rows; ++row) {
#pragma unroll 1
        for (int byte = thread() * 16; byte < row_quads() * 16; byte += threads() * 16) {
          const Quad value = load_exchanged(at_byte(global_operand(begin, row), byte));
          for (const index n : {begin, begin + 1}) {
            *at_byte(shared_operand(n), row * plan_.row_bytes + byte) = value;
          }
        }
      }
      sync_cluster();
    } else {
      sync_block();
    }
  }

  // Computes the thread's item of the product of iteration n; every thread of the block
  // takes part.
  FUSEDRNN_DEVICE void multiply(index n, A (&sum)[pairs][4]) {
    Sums product;
    sync_warp();
    if (clustered_ && n > begin_) receive(n);
    if (plan_.staged) fetch(n);
    if (resident || plan_.shares_operand()) {
      add_blocks<false>(product, shared_operand(n), plan_.row_bytes);
    } else if constexpr (!resident) {
      add_blocks<true>(product, global_operand(n, 0), row_quads() * 16);
    }
    if (plan_.splits == 1) {
#pragma unroll
      for (int p = 0; p < pairs; ++p) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[p][i] = product.sum(p, 0, i);
      }
      return;
    }
    Four<A>* const partial = reinterpret_cast<Four<A>*>(shared() + plan_.partials_at +
                                                        odd(n) * plan_.partial_bytes);
    const auto at = [&](int split, int p, int tile) {
      const int of = ((group_ * plan_.splits + split) * pairs + p) * tiles + tile;
      return partial + of * 32 + lane();
    };
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
        Four<A> own;
#pragma unroll
        for (int i = 0; i < 4; ++i) own.at[i] = product.sum(p, t, i);
        *at(split_, p, t) = own;
      }
    }
    sync_block();
    if (!has_item()) return;
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      Four<A> total = *at(0, p, split_);
#pragma unroll 4
      for (int split = 1; split < plan_.splits; ++split) {
        const Four<A> other = *at(split, p, split_);
#pragma unroll
        for (int i = 0; i < 4; ++i) total.at[i] += other.at[i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[p][i] = total.at[i];
    }
  }

  // Stages an element of the next iteration's operand: row r of the item, in a segment.
  FUSEDRNN_DEVICE void stage(int segment, int unit_octet, int r, A value) {
    E* const to = staging() + (segment * unit_octets + unit_octet) * 64;
    to[(lane_row() + r) * 8 + lane_unit()] = precision_.operand(value);
  }

  // Sends what the warp staged in iteration n to the readers of the next one.
  FUSEDRNN_DEVICE void send(index n) {
    sync_warp();
    const Quad* const from = reinterpret_cast<const Quad*>(staging());
    if (clustered_ && n + 1 < end_) {
      constexpr int together = own_quads < 32 ? own_quads : 32;  // lanes of one peer
#pragma unroll 1
      for (int i = lane() % together; i < own_quads; i += together) {
        char* const row = shared_operand(n + 1) + own_row(i) * plan_.row_bytes;
        Quad* const to = at_byte(row, own_byte(i));
        const Quad value = from[i];
        if (!has_peers_) {
          *to = value;
          continue;
        }
        Arrivals* const there = arrivals(n + 1);
#pragma unroll 2
        for (int peer = lane() / together; peer < blocks_x(); peer += 32 / together) {
          store_in_peer(to, peer, value, there);
        }
      }
    } else {
      const bool clears_previous = plan_.exchange == Exchange::grid;
#pragma unroll 1
      for (int i = lane(); i < own_quads; i += 32) {
        const int row = own_row(i), byte = own_byte(i);
        store_exchanged(at_byte(global_operand(n + 1, row), byte), from[i]);
        if (clears_previous) {
          char* const before = global_operand(n - 1 + operand_buffers, row);
          store_exchanged(at_byte(before, byte),
                          {unwritten, unwritten, unwritten, unwritten});
        }
      }
    }
  }

  // Called by every thread after the send of an iteration. The fence orders what the
  // thread marked as unwritten before what it sends next, and what it received before
  // what it polls next, so that no reader finds the old content of a buffer.
  FUSEDRNN_DEVICE void end_iteration() const {
    if (plan_.exchange == Exchange::grid) fence();
  }

 private:
  FUSEDRNN_DEVICE static int odd(index n) { return static_cast<int>(n) & 1; }
  FUSEDRNN_DEVICE char* global_operand(index n, int row_in_group) const {
    static_assert(operand_buffers == 4);
    const int first_row = (static_cast<int>(n) & 3) * plan_.row_groups + row_group_;
    const index quads = index{first_row * rows + row_in_group} * row_quads();
    return reinterpret_cast<char*>(operand_) + quads * 16;
  }
  FUSEDRNN_DEVICE char* shared_operand(index n) const {
    return shared() + plan_.operands_at + odd(n) * plan_.operand_bytes;
  }
  FUSEDRNN_DEVICE static Quad* at_byte(char* p, int byte) {
    return reinterpret_cast<Quad*>(p + byte);
  }
  // These are the row in the row group, and the byte in the row, of quad i of those that
  // the warp writes.
  FUSEDRNN_DEVICE int own_row(int i) const { return split_ * 8 + i / chunk_quads % 8; }
  FUSEDRNN_DEVICE int own_byte(int i) const {
    const int chunk = i / (8 * chunk_quads);
    const int column = chunk / unit_octets * plan_.P + unit_group_ * group_units +
                       chunk % unit_octets * 8;
    return column * static_cast<int>(sizeof(E)) + i % chunk_quads * 16;
  }
  FUSEDRNN_DEVICE Arrivals* arrivals(index n) const {
    return reinterpret_cast<Arrivals*>(shared() + plan_.arrivals_at) + odd(n);
  }
  // Waits for the whole operand of iteration n, for every thread. A warp without units
  // does not wait: no warp waits for it, so it could come so late that it took one round
  // for another.
  FUSEDRNN_DEVICE void receive(index n) {
    if (!has_peers_) return sync_block();
    if (thread() == 0) expect(arrivals(n), plan_.unit_groups * tiles * own_quads * 16);
    if (!has_units()) return;
    wait_for(arrivals(n), rounds_ >> odd(n) & 1);
    rounds_ ^= 1u << odd(n);
  }
  FUSEDRNN_DEVICE E* staging() const {
    E* const all = reinterpret_cast<E*>(shared() + plan_.staging_at);
    return all + (group_ * tiles + split_) * chunks * 64;
  }

  // DepthWalk visits the warp's blocks of depth, segment by segment.
  struct DepthWalk {
    int block;       // among all of a group
    int in_segment;  // among the warp's
  };
  FUSEDRNN_DEVICE void advance(DepthWalk& at) const {
    ++at.block;
    if (segments == 1 || ++at.in_segment < depth_blocks_) return;
    at.in_segment = 0;
    at.block += plan_.P / Block::depth - depth_blocks_;
  }

  FUSEDRNN_DEVICE static void load_weights(const Quad* block, Quad (&to)[octets]) {
#pragma unroll
    for (int o = 0; o < octets; ++o) to[o] = block[o * Block::quads];
  }

  // Loads from(i), unless it is null, of an operand that others write: all at once, and
  // again what was not yet written. `to` must be zeros.
  template <int count, class F>
  FUSEDRNN_DEVICE static void load_written(Quad (&to)[count], const F& from) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (const Quad* const quad = from(i)) to[i] = load_exchanged(quad);
    }
    wait_until([&] {
      bool all = true;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        if (fullest_word<E>(to[i]) != unwritten) continue;
        to[i] = load_exchanged(from(i));
        all = false;
      }
      return all;
    });
  }

  FUSEDRNN_DEVICE int row_quads() const {
    return segments * plan_.P * static_cast<int>(sizeof(E)) / 16;
  }
  // Copies the operand of iteration n from L2 into shared memory, where all groups read
  // it. A warp copies some rows, of which each thread asks for as many quads as its
  // registers hold before it waits for the first.
  FUSEDRNN_DEVICE void fetch(index n) const {
    constexpr int at_once = fetched_at_once(resident);
    int row = thread() / 32, first = 0;
#pragma unroll 1
    while (row < rows) {
      Quad part[at_once] = {};
      int place[at_once];  // rows · quad + row, or -1
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const int quad = first + lane();
        place[i] = row < rows && quad < row_quads() ? quad * rows + row : -1;
        first += 32;
        if (first >= row_quads()) {
          first = 0;
          row += threads() / 32;
        }
      }
      load_written(part, [&](int i) -> const Quad* {
        if (place[i] < 0) return nullptr;
        return at_byte(global_operand(n, place[i] % rows), place[i] / rows * 16);
      });
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        if (place[i] < 0) continue;
        char* const to = shared_operand(n) + place[i] % rows * plan_.row_bytes;
        *at_byte(to, place[i] / rows * 16) = part[i];
      }
    }
    sync_block();
  }

  // Computes product += weights · operand over the warp's blocks of depth. As much of the
  // operand as fits in registers is loaded before the first product waits for it.
  template <bool exchanged>
  FUSEDRNN_DEVICE void add_blocks(Sums& product, char* operand, int row_size) const {
    constexpr int most_quads = exchanged ? 8 : 4;
    constexpr int fit = most_quads / (tiles * Sums::rows);
    constexpr int together = fit < 1 ? 1 : fit;
    static_assert(!resident || held % together == 0);
    [[maybe_unused]] constexpr int unrolled = resident ? held : 1;
    const Quad* const slice = plan_.on_chip ? reinterpret_cast<const Quad*>(shared()) +
                                                  group_ * plan_.group_quads
                                            : weights_;
    operand += Sums::operand_row() * row_size + Sums::operand_byte();
    const int count = segments * depth_blocks_;
    DepthWalk at{first_, 0};
#pragma unroll unrolled
    for (int first = 0; first < (resident ? held : count); first += together) {
      int block[together];  // or -1
#pragma unroll
      for (int b = 0; b < together; ++b) {
        block[b] = -1;
        if (first + b >= count) continue;
        block[b] = at.block;
        advance(at);
      }
      // Weights are loaded one block ahead.
      constexpr int quads = tiles * Sums::rows;  // of the operand, per block
      Quad weights[2][octets], h[together * quads] = {};
      const auto load_ahead = [&](int b) {
        if (!resident && b < together && block[b] >= 0) {
          load_weights(slice + Sums::weight_quad(block[b]), weights[b % 2]);
        }
      };
      load_ahead(0);
      const auto from = [&](int i) -> const Quad* {
        const int row = i % quads / Sums::rows * 8 + i % Sums::rows, b = i / quads;
        if (block[b] < 0) return nullptr;
        return at_byte(operand, row * row_size + block[b] * Block::bytes);
      };
      if constexpr (exchanged) {
        load_written(h, from);
      } else {
#pragma unroll
        for (int i = 0; i < together * quads; ++i) {
          if (const Quad* const quad = from(i)) h[i] = *quad;
        }
      }
      precision_.with_mma([&](const auto& mma) {
#pragma unroll
        for (int b = 0; b < together; ++b) {
          load_ahead(b + 1);
          if (block[b] < 0) continue;
          if constexpr (resident) {
            product.add(mma, held_[first + b], h + b * quads);
          } else {
            product.add(mma, weights[b % 2], h + b * quads);
          }
        }
      });
    }
  }

  const P precision_;
  const Plan& plan_;
  E* const operand_;
  const int group_, split_, unit_group_;
  const bool clustered_, has_peers_;
  const Quad* weights_;
  int first_, depth_blocks_;  // of a segment
  int row_group_ = 0;
  index begin_ = 0, end_ = 0;
  unsigned rounds_ = 0;  // bit n % 2: whether the arrival round of iteration n is odd
  Quad held_[resident ? held : 1][octets] = {};
};

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
          step_items_back(units, t, first_row, engine.unit(0), active[0] | active[1] << 1,
                          mask_bits, all);
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
