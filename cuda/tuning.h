// How a recurrence is laid out on a GPU: what there is to choose, and the choice as data.
//
// The rows of the batch are taken in row groups of tiles × 8, which have nothing to do
// with each other. All blocks of one y work on one row group, each on some groups of 8
// (forward) or 16 (backward) hidden units, with `splits` warps to a group that share its
// depth. Per step they exchange the operand in one of three ways:
//
//   cluster   through each other's shared memory, meeting at the cluster's barrier
//   grid      through L2, each warp waiting for what it reads to be there
//   step      through the end of a launch: one for each step, many to a graph
#pragma once

#include <compare>
#include <cstddef>

namespace fusedrnn::cuda {

using index = std::ptrdiff_t;

// Of a block, so that a thread may have 255 registers.
constexpr int most_threads = 256;

enum class Exchange { cluster, grid, step };

struct Plan {
  Exchange exchange;
  int tiles;        // of 8 rows to a row group
  bool resident;    // weights in registers
  bool on_chip;     // weights in shared memory
  int groups;       // of units to a block
  int splits;       // warps to a group of units
  int unit_groups;  // in all
  int row_groups;   // in all
  int blocks_x, blocks_y;
  index P;             // hidden units, rounded up to whole blocks of depth
  index shared_bytes;  // of a block

  constexpr int threads() const { return groups * splits * 32; }
};

constexpr index round_up(index n, index multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
constexpr index ceil_div(index n, index by) { return (n + by - 1) / by; }
// Units that any precision's block of depth and any group divide.
constexpr index padded_units(index H) { return round_up(H, 32); }

// What a user of the private interface (tests, benchmarks) may ask for; 0 or less is
// free.
struct Wish {
  int exchange = -1, tiles = 0, resident = -1, groups = 0, splits = 0, blocks_x = 0;
  auto operator<=>(const Wish&) const = default;
};

// What a recurrence's product is, per row group and step.
struct Work {
  bool on_matrix_units;
  index operand_bytes;  // of an element
  int octets;           // of weights to a group of units
  int group_units;
  int segments;     // of the depth
  int block_depth;  // elements to a block of depth
  int held;         // blocks of depth that a warp's registers hold
};

// Estimates in cycles that the choice rests on, for a multiprocessor. From the tables of
// the CUDA programming guide and published measurements of Hopper, not yet our own.
struct Costs {
  double cluster_alone = 100;     // a cluster of one block meets
  double cluster_meets = 400;     // of several
  double grid_meets = 900;        // through L2
  double step_launch = 4000;      // a launch for each step
  double step_ends = 300;         // partial sums and cell
  double shared_bytes = 128;      // per cycle
  double l2_bytes = 24;           // per cycle and multiprocessor, all reading at once
  double matrix_products = 1000;  // multiply-adds of 16 bit per cycle, as issued here
  double plain_products = 80;     // of float32
};

// The cycles of a step of all row groups with this plan.
constexpr double estimate(const Plan& plan, const Work& work, int at_once) {
  const Costs costs;
  const double rows = 8.0 * plan.tiles;
  const double depth = static_cast<double>(work.segments * plan.P);
  const double width = static_cast<double>(work.operand_bytes);
  const double weights = 8.0 * work.octets * depth * plan.groups;
  const double operand = rows * depth * width * plan.groups;
  const double rate = work.on_matrix_units ? costs.matrix_products * 2 / width
                                           : costs.plain_products * 4 / width;
  const bool in_cluster = plan.exchange == Exchange::cluster;
  double step = costs.step_ends + weights * rows / rate;
  if (!plan.resident || plan.exchange == Exchange::step) {
    step += weights * width / (plan.on_chip ? costs.shared_bytes : costs.l2_bytes);
  }
  step += operand / (in_cluster ? costs.shared_bytes : costs.l2_bytes);
  const double waves = static_cast<double>(ceil_div(plan.row_groups, at_once));
  if (plan.exchange == Exchange::step) return step * waves + costs.step_launch;
  step += !in_cluster          ? costs.grid_meets
          : plan.blocks_x == 1 ? costs.cluster_alone
                               : costs.cluster_meets;
  return step * waves;
}

// What the next choices of this thread must meet.
inline thread_local Wish wish;

// f(plan) for each plan of this instance that is worth a look; its shared memory is still
// to be counted.
template <class Sizes, class Device, class F>
void for_each_candidate(const Sizes& p, const Work& work, const Device& gpu, int tiles,
                        bool resident, const F& f) {
  constexpr int most_warps = most_threads / 32, most_blocks_y = 65535;
  const auto meets = [](int wished, int value) { return wished <= 0 || wished == value; };
  if (!meets(wish.tiles, tiles)) return;
  if (wish.resident >= 0 && (wish.resident > 0) != resident) return;
  Plan plan{};
  plan.tiles = tiles;
  plan.resident = resident;
  plan.P = padded_units(p.H);
  plan.unit_groups = static_cast<int>(ceil_div(p.H, work.group_units));
  plan.row_groups = static_cast<int>(ceil_div(p.B, 8 * tiles));
  const int blocks_of_depth = static_cast<int>(plan.P / work.block_depth);
  for (int groups = 1; groups <= most_warps; groups *= 2) {
    if (groups / 2 >= plan.unit_groups || !meets(wish.groups, groups)) continue;
    plan.groups = groups;
    plan.blocks_x = static_cast<int>(ceil_div(plan.unit_groups, groups));
    if (!meets(wish.blocks_x, plan.blocks_x)) continue;
    for (int splits = tiles; groups * splits <= most_warps; splits *= 2) {
      // A warp without depth is of use only where it has a tile.
      if (splits > tiles && splits > blocks_of_depth) break;
      if (!meets(wish.splits, splits)) continue;
      plan.splits = splits;
      const int most = static_cast<int>(ceil_div(blocks_of_depth, splits));
      if (resident && most * work.segments > work.held) continue;
      for (const Exchange exchange :
           {Exchange::cluster, Exchange::grid, Exchange::step}) {
        if (wish.exchange >= 0 && wish.exchange != static_cast<int>(exchange)) continue;
        plan.exchange = exchange;
        plan.blocks_y = plan.row_groups < most_blocks_y ? plan.row_groups : most_blocks_y;
        if (exchange == Exchange::cluster && plan.blocks_x > gpu.largest_cluster) {
          continue;
        }
        if (exchange == Exchange::grid) {
          const int fit = gpu.multiprocessors / plan.blocks_x;
          if (fit == 0) continue;
          if (fit < plan.blocks_y) plan.blocks_y = fit;
        }
        // For one turn weights are not worth a place on chip.
        plan.on_chip = !resident && exchange != Exchange::step;
        f(plan);
        if (exchange == Exchange::grid && plan.on_chip) {
          plan.on_chip = false;
          f(plan);
        }
      }
    }
  }
}

}  // namespace fusedrnn::cuda
