// This header has what the forward and the backward call of a stack share: which layers
// and directions run at the same time, on how many threads, and the memory that they use.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>

#include "../random.h"
#include "scratch.h"
#include "stack.h"
#include "workforce.h"

namespace fusedrnn {

// These are the floating-point operations per thread, in all and per step, that are worth
// waking a thread for, and meeting it once per step.
constexpr double work_per_thread = 2.5e5;
constexpr double step_work_per_thread = 3e4;
// One thread does less than this in 0.1 to 0.2 ms; waking a thread takes about 50 µs.
constexpr double brief_work = 2e7;
// Two threads take at least 20 ms for this.
constexpr double lasting_work = 4e9;
// A thread does this in some 10 µs; reading the clock takes 0.02 µs.
constexpr double work_between_looks = 1e6;
// Above this many operations per step, splitting each step between all threads costs less
// than a layer that waits for the first steps of the layer below.
constexpr double most_overlap_step_work = 1e5;
constexpr index overlap_parts = 16;  // a layer is T / 16 steps ahead of the next one

// A Pass is one layer in one direction.
template <class Problem>
struct Pass {
  const Layout* layout;
  Problem problem;
  double work, step_work;  // floating-point operations, in all and in a step
};

// A Group has passes that run one after the other or, if there are threads for both, side
// by side.
struct Group {
  index first;
  int count;
  int threads;  // how many are useful for one of them
};

inline bool asks_for_options(const StackCall& c) {
  constexpr double none = std::numeric_limits<double>::infinity();
  const Options& o = c.options;
  return o.clip < none || o.cell_clip < none || zones_out(o) || drops(o) ||
         replaces(o.activations) || c.returns_gates || c.recompute;
}

inline bool drops_weights(const StackCall& c) {
  return c.options.training && c.weight_dropout > 0;
}

inline bool drops_between(const Stack& stack, const StackCall& c) {
  return c.options.training && stack.dropout > 0;
}

inline Options options_at(const StackCall& c, index at) {
  Options options = c.options;
  options.where += static_cast<std::uint32_t>(at);
  return options;
}

inline DroppedWeights dropped_at(const StackCall& c, index at) {
  const Options options = options_at(c, at);
  return {c.weight_dropout, options.seed, options.where};
}

// Sets rows of `bytes` bytes to zero, at times [times.begin, times.end).
inline void clear_rows(char* start, index t, index b, Range times, index B, index bytes) {
  if (B == 0) return;  // times may be many
  for (index time = times.begin; time < times.end; ++time) {
    for (index row = 0; row < B; ++row) std::memset(start + time * t + row * b, 0, bytes);
  }
}

// Copies a state or its gradient; null stands for zeros.
inline void copy_state(const char* from, index bytes, char* to) {
  if (!to) return;
  if (from) {
    std::memcpy(to, from, bytes);
  } else {
    std::memset(to, 0, bytes);
  }
}

template <class E>
void add_elements(const char* from, index n, char* to) {
  for (index i = 0; i < n; ++i) {
    reinterpret_cast<E*>(to)[i] += reinterpret_cast<const E*>(from)[i];
  }
}
// Adds n values to others. Elements have `item` and `to_item` bytes; where one type is
// bfloat16, the other may be float32, and a sum is rounded once.
inline void add_values(const Layout& l, const char* from, index item, index n, char* to,
                       index to_item) {
  if (item == 8) return add_elements<double>(from, n, to);
  if (item == 4 && to_item == 4) return add_elements<float>(from, n, to);
  constexpr index at_once = 256;
  for (index k = 0; k < n;
       k += at_once, from += item * at_once, to += to_item * at_once) {
    const index count = std::min(n - k, at_once);
    char sums[4 * at_once], widened[4 * at_once];
    if (item == 2) l.halves->widen(from, count, widened);
    const char* const terms = item == 2 ? widened : from;
    if (to_item == 4) {
      add_elements<float>(terms, count, to);
      continue;
    }
    l.halves->widen(to, count, sums);
    add_elements<float>(terms, count, sums);
    l.halves->narrow(sums, count, to);
  }
}

// Saved has the parts of a forward's saved values, each (T, B, ·). The records come
// first, so that they begin on whole vectors.
struct Saved {
  std::vector<char*> records, cells, y, x;  // records per pass, the others per layer
  index cells_row, y_row, bytes = 0;        // of a row of one step

  Saved(const Stack& stack, const StackCall& c, char* memory) {
    const Layout& l = stack.layout();
    const bool saves = saves_slots(l.shape.saves, c.options) && !c.recompute;
    const index layers = stack.count() / stack.directions;
    cells_row = stack.directions * l.bytes(l.H);
    y_row = stack.directions * l.R * l.item;
    const auto take = [&](bool exists, index row) {
      char* const part = exists && memory ? memory + c.T * c.B * bytes : nullptr;
      bytes += exists ? row : 0;
      return part;
    };
    for (const auto& weights : stack.weights) {
      records.push_back(take(saves, weights->layout().saved_record_bytes()));
    }
    for (index layer = 0; layer < layers; ++layer) {
      cells.push_back(take(c.recompute && l.shape.has_c, cells_row));
      y.push_back(take(layer < layers - 1, y_row));
      x.push_back(take(layer > 0 && drops_between(stack, c), y_row));
    }
  }
};

// StackPass has what forward and backward share.
template <class Problem>
class StackPass {
 protected:
  const Stack& stack_;
  const StackCall& call_;
  const index D_, layers_;
  index steps_;  // up to the end of the longest row
  Masks masks_{};
  bool has_options_;
  std::vector<std::unique_ptr<const Weights>> dropped_;
  std::vector<Pass<Problem>> passes_;  // in order of execution
  std::vector<Group> groups_;
  int threads_ = 1;
  std::vector<Progress> progress_;

  StackPass(const Stack& stack, const StackCall& call)
      : stack_(stack),
        call_(call),
        D_(stack.directions),
        layers_(stack.count() / stack.directions),
        steps_(call.T) {
    if (call.lengths) {
      steps_ = call.B ? *std::max_element(call.lengths, call.lengths + call.B) : 0;
      const index* const end = call.lengths + call.B;
      const auto is_shorter = [&](index length) { return length < steps_; };
      masks_.lengths =
          std::any_of(call.lengths, end, is_shorter) ? call.lengths : nullptr;
    }
    masks_.resets = call.resets;
    has_options_ = asks_for_options(call) || stack.weights[0]->has_options();
    if (!drops_weights(call)) return;
    for (index at = 0; at < stack.count(); ++at) {
      dropped_.push_back(
          std::make_unique<const Weights>(*stack.weights[at], dropped_at(call, at)));
    }
  }

  bool is_empty() const { return steps_ == 0 || call_.B == 0; }
  const Weights& weights(index at) const {
    return dropped_.empty() ? *stack_.weights[at] : *dropped_[at];
  }
  index element() const { return stack_.layout().size; }
  index row_of_y() const { return D_ * stack_.layout().R * stack_.layout().item; }
  index bytes_of_h() const {
    return stack_.count() * call_.B * stack_.layout().bytes(stack_.layout().R);
  }
  index bytes_of_c() const {
    return stack_.count() * call_.B * stack_.layout().bytes(stack_.layout().H);
  }
  bool reads_zeros() const {
    return !call_.h0 || (stack_.layout().shape.has_c && !call_.c0);
  }

  // Adds a pass without its arrays. `passes`: how many products a step takes.
  Pass<Problem>& add(index at, double passes) {
    const Layout& l = weights(at).layout();
    passes_.push_back({&l, {}, 0, 0});
    Pass<Problem>& pass = passes_.back();
    Problem& p = pass.problem;
    static_cast<Sizes&>(p) = {steps_, call_.B, l.I,
                              l.H,    l.R,     D_ == 2 ? at % 2 == 1 : call_.reverse};
    p.model = l.model;
    p.options = options_at(call_, at);
    p.vectors = weights(at).vectors();
    p.weight_ih = weights(at).parameters().weight_ih;
    p.weight_hh = weights(at).parameters().weight_hh;
    p.weight_item = weights(at).weight_bytes();
    p.masks = masks_;
    p.x_item = at < D_ ? call_.x_item : l.item;
    p.has_options = has_options_;
    const index rows =
        masks_.lengths
            ? std::accumulate(masks_.lengths, masks_.lengths + call_.B, index{0})
            : steps_ * call_.B;
    const double of_step = 2.0 * l.shape.gates * static_cast<double>(l.H * rows) / steps_;
    pass.step_work = of_step * static_cast<double>(l.R);
    const double of_input = of_step * static_cast<double>(l.I);
    pass.work = passes * static_cast<double>(steps_) * (pass.step_work + of_input);
    if (steps_ == 1) pass.step_work += of_input;
    return pass;
  }

  // Returns the initial state of one pass, or zeros.
  const char* state(const char* given, index at, index width, const char* zeros) const {
    return given ? given + at * call_.B * width * element() : zeros;
  }

  // Decides how many threads are useful, and which passes run side by side.
  void plan() {
    const auto useful_threads = [&](const Pass<Problem>& pass, double count) {
      const double most =
          std::min(count * pass.work / work_per_thread,
                   count * std::max(pass.step_work / step_work_per_thread, 1.0));
      if (most < 2) return 1;
      const int limit = get_num_threads();
      return most >= limit ? limit : static_cast<int>(most);
    };
    for (index first = 0; first < std::ssize(passes_);) {
      const Pass<Problem>& pass = passes_[first];
      const bool may_pair = D_ == 2 || can_overlap(first);
      const int threads_each = may_pair ? useful_threads(pass, 2) / 2 : 0;
      // Layers that overlap wait for each other, so each needs a thread.
      const bool overlaps = D_ == 1 && threads_each > 0, is_pair = D_ == 2 || overlaps;
      const Group group{first, is_pair ? 2 : 1,
                        std::max(threads_each, useful_threads(pass, 1))};
      threads_ =
          std::max(threads_, std::max(2 * threads_each, is_pair ? 1 : group.threads));
      groups_.push_back(group);
      if (overlaps) overlap(first);
      first += group.count;
    }
  }

  // Returns whether a layer of one direction and the next run at the same time, the
  // second following the steps of the first.
  bool can_overlap(index first) const {
    if (first + 1 >= std::ssize(passes_)) return false;
    const Pass<Problem>& pass = passes_[first];
    return pass.step_work < most_overlap_step_work && steps_ >= overlap_parts &&
           !drops_between(stack_, call_) && can_follow(passes_[first + 1]);
  }
  static bool can_follow(const Pass<Forward>& pass) {
    return pass.problem.B < pass.layout->tile_rows();
  }
  static bool can_follow(const Pass<Backward>& pass) {
    return pass.problem.B < pass.layout->back_tile() &&
           BackwardScratch::time_block(*pass.layout, pass.problem) * 4 <= pass.problem.T;
  }
  void limit_time_block(Forward& p) const {
    p.most_steps = (steps_ + overlap_parts - 1) / overlap_parts;
  }
  void limit_time_block(Backward&) const {}  // the order of its sums depends on it
  void overlap(index first) {
    if (progress_.empty()) progress_ = std::vector<Progress>(passes_.size());
    for (index n = first; n < first + 2; ++n) limit_time_block(passes_[n].problem);
    passes_[first].problem.progress = &progress_[first];
    passes_[first + 1].problem.input = &progress_[first];
  }

  static index scratch_bytes(const Pass<Forward>& pass, int threads) {
    return forward_workspace(*pass.layout, pass.problem, threads);
  }
  static index scratch_bytes(const Pass<Backward>& pass, int threads) {
    return backward_workspace(*pass.layout, pass.problem, threads);
  }
  // Returns the bytes of scratch memory of the passes on either side. Passes may run on
  // any number of threads up to threads_, and need most memory on any of these.
  std::pair<index, index> scratch() const {
    index sides[2] = {};
    for (const Group& group : groups_) {
      for (int n = 0; n < group.count; ++n) {
        const Pass<Problem>& pass = passes_[group.first + n];
        index bytes = 0;
        for (int threads = 1; threads <= threads_; ++threads) {
          bytes = std::max(bytes, scratch_bytes(pass, threads));
        }
        sides[0] = std::max(sides[0], bytes);
        if (n == 1 && threads_ > 1) sides[1] = std::max(sides[1], bytes);
      }
    }
    return {round_up(sides[0], Arena::line), round_up(sides[1], Arena::line)};
  }

  static void run_pass(const Pass<Forward>& pass, char* scratch, const Team& team) {
    fusedrnn::forward(*pass.layout, pass.problem, scratch, team);
  }
  static void run_pass(const Pass<Backward>& pass, char* scratch, const Team& team) {
    fusedrnn::backward(*pass.layout, pass.problem, scratch, team);
  }

  // Runs all groups. All threads meet after before(group, team) and after(group, team) if
  // these return true.
  template <class Before, class After>
  void run(char* const (&scratch)[2], const Before& before, const After& after) {
    double work = 0;
    for (const Pass<Problem>& pass : passes_) work += pass.work;
    std::optional<Watch> watch;
    if (asks_to_end && work > brief_work) {
      const double steps = static_cast<double>(steps_ * std::ssize(passes_));
      watch.emplace(static_cast<index>(1 + work_between_looks * steps / work));
    }
    Barrier sides[2];
    const auto run_groups = [&](const Team& team) {
      for (const Group& group : groups_) {
        if (before(group, team)) team.meet();
        if (group.count == 2 && team.count > 1) {
          const int half = team.count / 2, side = team.rank / half;
          const int rank = team.rank % half, count = std::min(half, group.threads);
          if (side < 2 && rank < count) {
            run_pass(passes_[group.first + side], scratch[side],
                     team.part(rank, count, &sides[side]));
          }
        } else {
          for (int n = 0; n < group.count; ++n) {
            const int count = std::min(team.count, group.threads);
            if (n > 0) team.meet();
            if (team.rank >= count) continue;
            Barrier* const barrier = count == team.count ? team.barrier : &sides[0];
            run_pass(passes_[group.first + n], scratch[0],
                     team.part(team.rank, count, barrier));
          }
        }
        const bool is_last = group.first + group.count == std::ssize(passes_);
        if (!is_last) team.meet();
        if (after(group, team)) team.meet();
      }
    };
    const Length length = work < brief_work     ? Length::brief
                          : work < lasting_work ? Length::usual
                                                : Length::lasting;
    with_team(threads_, length, steps_, run_groups, watch ? &*watch : nullptr);
  }
};

}  // namespace fusedrnn
