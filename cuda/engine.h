// This header is the product of a step and how blocks exchange its operand, in one
// thread, by a plan.
#pragma once

#include "../csrc/contract.h"
#include "product.h"
#include "tuning.h"

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

}  // namespace fusedrnn::cuda
