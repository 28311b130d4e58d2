// This header has the choices in the layout of a recurrence on a GPU, and the chosen plan
// as data.
//
// The rows of the batch are divided into independent row groups of tiles × 8. All blocks
// of one y work on one row group, each on some groups of 8 (forward) or 16 (backward)
// hidden units, with `splits` warps to a group that share its depth. In each step they
// exchange the operand in one of three ways:
//
//   cluster   through each other's shared memory, where the bytes that arrive are counted
//   grid      through L2, where each warp polls what it reads until it is written
//   step      through the end of a launch: one for each step, many to a graph
#pragma once

#include <compare>
#include <cstddef>
#include <span>
#include <vector>

#include "../csrc/contract.h"
#include "runtime.h"

namespace fusedrnn::cuda {

// With this many threads in a block, a thread may have 255 registers.
constexpr int most_threads = 256;

enum class Exchange { cluster, grid, step };

// This is how many times 16 bytes a thread asks for at once where warps copy an operand
// to shared memory. Weights in registers leave room for fewer, and more would be longer
// code: at H = 768 in 16 bits forward needs 3 and backward 12.
constexpr int fetched_at_once(bool resident) { return resident ? 4 : 8; }

struct Plan {
  Exchange exchange;
  int tiles;        // of 8 rows, per row group
  bool resident;    // weights in registers
  bool on_chip;     // weights in shared memory
  bool staged;      // the operand goes from L2 through shared memory
  int groups;       // of units, per block
  int splits;       // warps per group of units
  int unit_groups;  // in all
  int row_groups;   // in all
  int blocks_x, blocks_y;
  int P;            // hidden units, rounded up to whole blocks of depth
  int group_quads;  // 16 bytes each: the packed weights of a group of units
  // The parts of a block's shared memory after the weights, in bytes. Kernels read these
  // numbers, because computing them would cost registers and much code (engine.h).
  int row_bytes;  // from one row of an operand to the next
  int operands_at;
  int operand_bytes;  // from one operand to the other; 0 if there is only one
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
// Rounds units up so that any precision's block of depth and any group divide them.
constexpr index padded_units(index H) { return round_up(H, 32); }

// A PlanOverride fixes parts of a plan, for tests and benchmarks; 0 or less leaves a part
// free.
struct PlanOverride {
  int exchange = -1, tiles = 0, resident = -1, on_chip = -1, staged = -1;
  int groups = 0, splits = 0, blocks_x = 0;
  auto operator<=>(const PlanOverride&) const = default;
};

// Work is the product of a recurrence, per row group and step.
struct Work {
  bool on_matrix_units;
  index operand_bytes;  // of an element
  int octets;           // of weights, per group of units
  int group_units;
  int segments;     // of the depth
  int block_depth;  // elements to a block of depth
  int held;         // blocks of depth that a warp's registers hold
};

// The next choices of this thread must meet this override.
inline thread_local PlanOverride plan_override;

// An Instance is a recurrence that is compiled, one for each direction.
struct Instance {
  int tiles;
  bool resident;
  void (*lay_out)(Plan&);
  int (*clusters_at_once)(const Launch&);
};

Launch shape_of(const Plan&);

struct Costs {
#define COST(name, value) double name = value;
#include "costs.inc"
#undef COST
};

// A Candidate is a plan that a device can run, and what else its time depends on.
struct Candidate {
  Plan plan;
  Work work;
  int at_once;  // row groups, or single blocks of a step
};
// Estimates the cycles of a step of all row groups.
double estimate(const Candidate&, const Costs&);
// Returns all plans that a device can run and that meet the override.
std::vector<Candidate> candidates(const Sizes&, int device, const Work&,
                                  std::span<const Instance>);
// Returns that with the lowest estimate, cached after the first search. The instances
// must stay where they are.
Plan choose_plan(const Sizes&, int device, const Work&, std::span<const Instance>);

}  // namespace fusedrnn::cuda
