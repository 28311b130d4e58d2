#include "tuning.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

namespace fusedrnn::cuda {
namespace {

// Calls f(plan) for each plausible plan of an instance, without the layout of its shared
// memory.
template <class F>
void for_each_candidate(const Sizes& p, const Work& work, const Device& gpu, int tiles,
                        bool resident, const F& f) {
  constexpr int most_warps = most_threads / 32, most_blocks_y = 65535;
  const auto meets = [](int required, int value) {
    return required <= 0 || required == value;
  };
  if (!meets(plan_override.tiles, tiles)) return;
  if (plan_override.resident >= 0 && (plan_override.resident > 0) != resident) return;
  Plan plan{};
  plan.tiles = tiles;
  plan.resident = resident;
  plan.P = static_cast<int>(padded_units(p.H));
  plan.unit_groups = static_cast<int>(ceil_div(p.H, work.group_units));
  plan.row_groups = static_cast<int>(ceil_div(p.B, 8 * tiles));
  const int blocks_of_depth = plan.P / work.block_depth;
  for (int groups = 1; groups <= most_warps; groups *= 2) {
    if (groups / 2 >= plan.unit_groups || !meets(plan_override.groups, groups)) continue;
    plan.groups = groups;
    plan.blocks_x = static_cast<int>(ceil_div(plan.unit_groups, groups));
    if (!meets(plan_override.blocks_x, plan.blocks_x)) continue;
    for (int splits = tiles; groups * splits <= most_warps; splits *= 2) {
      // A warp without depth is useful only if it has a tile.
      if (splits > tiles && splits > blocks_of_depth) break;
      if (!meets(plan_override.splits, splits)) continue;
      plan.splits = splits;
      const int most = static_cast<int>(ceil_div(blocks_of_depth, splits));
      if (resident && most * work.segments > work.held) continue;
      for (const Exchange exchange :
           {Exchange::cluster, Exchange::grid, Exchange::step}) {
        if (plan_override.exchange >= 0 &&
            plan_override.exchange != static_cast<int>(exchange))
          continue;
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
        const bool in_cluster = exchange == Exchange::cluster;
        // For one iteration it does not pay to copy weights to shared memory.
        const bool steps = exchange == Exchange::step;
        if (resident && steps) continue;
        for (const bool on_chip : {false, true}) {
          if (on_chip && (resident || steps)) continue;
          if (!on_chip && !resident && in_cluster) continue;
          if (plan_override.on_chip >= 0 && (plan_override.on_chip > 0) != on_chip)
            continue;
          for (const bool staged : {false, true}) {
            // Weights in registers require the operand in shared memory.
            if (staged ? in_cluster : resident && !in_cluster) continue;
            if (plan_override.staged >= 0 && (plan_override.staged > 0) != staged)
              continue;
            plan.on_chip = on_chip;
            plan.staged = staged;
            f(plan);
          }
        }
      }
    }
  }
}

}  // namespace

double estimate(const Candidate& candidate, const Costs& costs) {
  const auto& [plan, work, at_once] = candidate;
  const auto most = [](double a, double b) { return a > b ? a : b; };
  const bool in_cluster = plan.exchange == Exchange::cluster;
  const bool steps = plan.exchange == Exchange::step;
  const bool weights_from_l2 = !plan.resident && !plan.on_chip;
  const int warps = plan.groups * plan.splits, lane_rows = work.on_matrix_units ? 1 : 2;
  const double issue_rounds = static_cast<double>(ceil_div(warps, 4));  // of a scheduler
  const double block_bytes =
      8.0 * static_cast<double>(work.block_depth * work.operand_bytes);

  // One block of depth in all warps takes as long as the slowest resource.
  double block = 0;
  if (work.on_matrix_units) {
    const int sums = (work.octets + 1) / 2 * plan.tiles;
    block = most(2 * sums * costs.matrix_issue * issue_rounds,
                 (sums == 1 ? 1 : 2) * costs.matrix_latency);
  } else {
    block = 2.0 * work.octets * plan.tiles * work.block_depth * issue_rounds *
            static_cast<double>(work.operand_bytes) / 4;
  }
  const int quads = (plan.on_chip ? work.octets : 0) +
                    (plan.shares_operand() ? plan.tiles * lane_rows : 0);
  block = most(block, quads * costs.shared_quad * warps);
  const int octets =
      (weights_from_l2 ? work.octets : 0) + (plan.shares_operand() ? 0 : plan.tiles);
  block = most(block, octets * block_bytes * warps / costs.l2_bytes);
  if (weights_from_l2) block = most(block, costs.l2_latency / 2);

  const index blocks = work.segments * ceil_div(plan.P / work.block_depth, plan.splits);
  double step = costs.step_ends + static_cast<double>(blocks) * block;
  if (plan.splits > 1) step += costs.joins + costs.join * plan.splits;
  const index bytes = 8 * plan.tiles * work.segments * plan.P * work.operand_bytes;
  if (in_cluster && plan.blocks_x > 1) {
    step += static_cast<double>(bytes) / costs.cluster_bytes;
  } else if (!in_cluster) {  // the operand comes in parts; grid_meets has the first
    const int fit = 8 / (plan.tiles * lane_rows);
    index parts = ceil_div(blocks, fit < 1 ? 1 : fit);
    if (plan.staged) {
      step += costs.staging + static_cast<double>(bytes) / costs.l2_bytes;
      const index row_quads = bytes / (128 * plan.tiles),
                  own_rows = ceil_div(8 * plan.tiles, warps);
      parts =
          ceil_div(own_rows * ceil_div(row_quads, 32), fetched_at_once(plan.resident));
    }
    step += static_cast<double>(parts - 1) * costs.l2_latency;
  }
  if (steps) {
    const index blocks_in_all = index{plan.blocks_x} * plan.row_groups;
    return costs.step_launch +
           step * static_cast<double>(ceil_div(blocks_in_all, at_once));
  }
  step += !in_cluster          ? costs.grid_meets
          : plan.blocks_x == 1 ? costs.cluster_alone
                               : costs.cluster_meets;
  return step * static_cast<double>(ceil_div(plan.row_groups, at_once));
}

Launch shape_of(const Plan& plan) {
  return {plan.blocks_x,
          plan.blocks_y,
          plan.threads(),
          plan.shared_bytes,
          plan.exchange == Exchange::cluster,
          plan.exchange == Exchange::grid};
}

std::vector<Candidate> candidates(const Sizes& p, int ordinal, const Work& work,
                                  std::span<const Instance> instances) {
  const OnDevice current(ordinal);
  const Device& gpu = device(ordinal);
  std::vector<Candidate> all;
  for (const Instance& instance : instances) {
    const auto add = [&](Plan& plan) {
      instance.lay_out(plan);
      if (plan.shared_bytes > gpu.shared_bytes) return;
      int at_once = gpu.multiprocessors;
      if (plan.exchange == Exchange::grid) at_once /= plan.blocks_x;
      if (plan.exchange == Exchange::cluster && plan.blocks_x > 1) {
        at_once = instance.clusters_at_once(shape_of(plan));
        if (at_once == 0) return;
      }
      all.push_back({plan, work, at_once});
    };
    for_each_candidate(p, work, gpu, instance.tiles, instance.resident, add);
  }
  return all;
}

Plan choose_plan(const Sizes& p, int device, const Work& work,
                 std::span<const Instance> instances) {
  static std::mutex mutex;
  static std::map<std::tuple<const Instance*, int, index, index, PlanOverride>, Plan>
      chosen;
  const std::lock_guard lock(mutex);
  const auto key = std::tuple(instances.data(), device, p.B, p.H, plan_override);
  const auto known = chosen.find(key);
  if (known != chosen.end()) return known->second;
  const std::vector<Candidate> all = candidates(p, device, work, instances);
  if (all.empty()) throw Error("no plan for this layer meets the plan override");
  const auto best =
      std::ranges::min_element(all, {}, [](const auto& c) { return estimate(c, {}); });
  return chosen[key] = best->plan;
}

}  // namespace fusedrnn::cuda
