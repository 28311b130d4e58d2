// The layout of a recurrence on a GPU: what there is to choose, and the choice as data.
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
#include <span>

#include "../csrc/contract.h"
#include "runtime.h"

namespace fusedrnn::cuda {

// The threads of a block, so that a thread may have 255 registers.
constexpr int most_threads = 256;

enum class Exchange { cluster, grid, step };

struct Plan {
  Exchange exchange;
  int tiles;        // of 8 rows to a row group
  bool resident;    // weights in registers
  bool on_chip;     // weights in shared memory
  bool staged;      // the operand from L2 by way of shared memory
  int groups;       // of units to a block
  int splits;       // warps to a group of units
  int unit_groups;  // in all
  int row_groups;   // in all
  int blocks_x, blocks_y;
  int P;            // hidden units, rounded up to whole blocks of depth
  int group_quads;  // 16 bytes each: the packed weights of a group of units
  // The parts of a block's shared memory, after the weights, in bytes. Kernels
  // read this instead of working it out, which would cost registers and much code
  // (recurrence.h).
  int row_bytes;  // from one row of an operand to the next
  int operands_at;
  int operand_bytes;  // from one operand to the other; 0 where there is but one
  int partials_at;
  int partial_bytes;  // from one set of partial sums to the other
  int staging_at;
  int arrivals_at;
  index shared_bytes;  // of a block

  constexpr int threads() const { return groups * splits * 32; }
  // Whether warps read the operand from shared memory.
  constexpr bool shares_operand() const {
    return exchange == Exchange::cluster || staged;
  }
};

constexpr index round_up(index n, index multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
constexpr index ceil_div(index n, index by) { return (n + by - 1) / by; }
// Units that any precision's block of depth and any group divide.
constexpr index padded_units(index H) { return round_up(H, 32); }

// The wishes that a user of the private interface (tests, benchmarks) may have; 0 or less
// is free.
struct Wish {
  int exchange = -1, tiles = 0, resident = -1, staged = -1;
  int groups = 0, splits = 0, blocks_x = 0;
  auto operator<=>(const Wish&) const = default;
};

// The product of a recurrence, per row group and step.
struct Work {
  bool on_matrix_units;
  index operand_bytes;  // of an element
  int octets;           // of weights to a group of units
  int group_units;
  int segments;     // of the depth
  int block_depth;  // elements to a block of depth
  int held;         // blocks of depth that a warp's registers hold
};

// The wishes that the next choices of this thread must meet.
inline thread_local Wish wish;

// A recurrence that is compiled, for both directions its own.
struct Instance {
  int tiles;
  bool resident;
  void (*lay_out)(Plan&);
  int (*clusters_at_once)(const Launch&);
};

Launch shape_of(const Plan&);

// The plan that is estimated to be fastest among those of the instances that a device can
// run; looked for once. The instances stay where they are.
Plan choose_plan(const Sizes&, int device, const Work&, std::span<const Instance>);

}  // namespace fusedrnn::cuda
