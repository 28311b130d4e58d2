#include "stack.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <numeric>

#include "../random.h"
#include "scratch.h"
#include "workforce.h"

namespace fusedrnn {

namespace {

// These are the floating-point operations per thread, in all and per step, that are worth
// waking a thread for, and meeting it once per step.
constexpr double work_per_thread = 2.5e5;
constexpr double step_work_per_thread = 3e4;
// One thread does less than this in 0.1 to 0.2 ms; waking a thread takes about 50 µs.
constexpr double brief_work = 2e7;
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

bool asks_for_options(const StackCall& c) {
  constexpr double none = std::numeric_limits<double>::infinity();
  const Options& o = c.options;
  return o.clip < none || o.cell_clip < none || zones_out(o) || drops(o) ||
         c.returns_gates || c.recompute;
}

bool drops_weights(const StackCall& c) {
  return c.options.training && c.weight_dropout > 0;
}

bool drops_between(const Stack& stack, const StackCall& c) {
  return c.options.training && stack.dropout > 0;
}

Options options_at(const StackCall& c, index at) {
  Options options = c.options;
  options.where += static_cast<std::uint32_t>(at);
  return options;
}

DroppedWeights dropped_at(const StackCall& c, index at) {
  const Options options = options_at(c, at);
  return {c.weight_dropout, options.seed, options.where};
}

// Sets rows of `bytes` bytes to zero, at times [times.begin, times.end).
void clear_rows(char* start, index t, index b, Range times, index B, index bytes) {
  for (index time = times.begin; time < times.end; ++time) {
    for (index row = 0; row < B; ++row) std::memset(start + time * t + row * b, 0, bytes);
  }
}

// Copies a state or its gradient; null stands for zeros.
void copy_state(const char* from, index bytes, char* to) {
  if (!to) return;
  if (from) {
    std::memcpy(to, from, bytes);
  } else {
    std::memset(to, 0, bytes);
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
    y_row = stack.directions * l.bytes(l.R);
    const auto take = [&](bool exists, index row) {
      char* const part = exists && memory ? memory + c.T * c.B * bytes : nullptr;
      bytes += exists ? row : 0;
      return part;
    };
    for (const auto& weights : stack.weights) {
      records.push_back(take(saves, weights->layout().record_bytes()));
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
  index row_of_y() const { return D_ * stack_.layout().bytes(stack_.layout().R); }
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
    p.masks = masks_;
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
    const int limit = get_num_threads();
    const auto useful_threads = [&](const Pass<Problem>& pass, double count) {
      const double most =
          std::min(count * pass.work / work_per_thread,
                   count * std::max(pass.step_work / step_work_per_thread, 1.0));
      return most >= limit ? limit : most > 1 ? static_cast<int>(most) : 1;
    };
    for (index first = 0; first < std::ssize(passes_);) {
      const Pass<Problem>& pass = passes_[first];
      const bool may_pair = D_ == 2 || can_overlap(first, limit);
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
  bool can_overlap(index first, int limit) const {
    if (first + 1 >= std::ssize(passes_) || limit < 2) return false;
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
    Barrier sides[2];
    with_team(threads_, work < brief_work, steps_, [&](const Team& team) {
      for (const Group& group : groups_) {
        if (before(group, team)) team.meet();
        if (group.count == 2 && team.count > 1) {
          const int half = team.count / 2, side = team.rank / half;
          const int rank = team.rank % half, count = std::min(half, group.threads);
          if (side < 2 && rank < count) {
            run_pass(passes_[group.first + side], scratch[side],
                     {rank, count, &sides[side], team.step});
          }
        } else {
          for (int n = 0; n < group.count; ++n) {
            const int count = std::min(team.count, group.threads);
            if (n > 0) team.meet();
            if (team.rank >= count) continue;
            run_pass(passes_[group.first + n], scratch[0],
                     {team.rank, count, count == team.count ? team.barrier : &sides[0],
                      team.step});
          }
        }
        const bool is_last = group.first + group.count == std::ssize(passes_);
        if (!is_last) team.meet();
        if (after(group, team)) team.meet();
      }
    });
  }
};

class StackForwardPass : StackPass<Forward> {
  const StackForward& c_;

 public:
  StackForwardPass(const Stack& stack, const StackForward& call)
      : StackPass(stack, call), c_(call) {}

  void run() {
    clear();
    if (is_empty()) return keep_state();
    const index n = stack_.count();
    for (index at = 0; at < n; ++at) {
      Forward& p = add(at, 1).problem;
      const auto packed = weights(at).forward(steps_, steps_ * call_.B, has_options_);
      p.weights = packed.start;
      p.unpacked = packed.unpacked;
    }
    plan();
    const auto [one, other] = scratch();
    const index zeros = reads_zeros() ? call_.B * element() * stack_.layout().H : 0;
    const index y = layers_ > 1 && !c_.saved ? steps_ * call_.B * row_of_y() : 0;
    const index traces = trace_bytes();
    Arena sizes(nullptr);
    const auto lay_out = [&](Arena& memory) {
      return std::array{memory.take(zeros),  memory.take(y),   memory.take(y),
                        memory.take(traces), memory.take(one), memory.take(other)};
    };
    lay_out(sizes);
    const Workspace workspace(static_cast<std::size_t>(sizes.used()));
    Arena memory(workspace.start());
    const auto parts = lay_out(memory);
    if (zeros) std::memset(parts[0], 0, zeros);
    if (traces) std::memset(parts[3], 0, traces);  // rows that take no step stay zero
    Saved saved(stack_, call_, c_.saved);
    char* const buffers[2] = {parts[1], parts[2]};
    std::vector<Dropout<char>> drops(layers_);
    char* const own_traces = traces ? parts[3] : nullptr;
    for (index at = 0; at < n; ++at) {
      set(at, parts[0], buffers, saved, drops, own_traces);
    }
    StackPass::run(
        {parts[4], parts[5]},
        [&](const Group& group, const Team& team) {
          const index layer = group.first / D_;
          if (layer == 0 || !drops_between(stack_, call_)) return false;
          stack_.layout().k.drop_out(drops[layer], team.share(steps_ * call_.B));
          return true;
        },
        [](const Group&, const Team&) { return false; });
    if (traces) copy_traces(own_traces);
  }

  ForwardPlan plan_of(index at) {
    for (index n = 0; n < stack_.count(); ++n) add(n, 1);
    plan();
    const Pass<Forward>& pass = passes_[at];
    for (const Group& group : groups_) {
      if (at >= group.first + group.count) continue;
      const int sides = threads_ > 1 ? group.count : 1;
      const int threads = std::min(threads_ / sides, group.threads);
      return fusedrnn::plan(*pass.layout, pass.problem, threads);
    }
    return {};
  }

 private:
  // Sets the rows that no step reaches to zero.
  void clear() const {
    const Layout& l = stack_.layout();
    clear_rows(c_.y, c_.y_t, c_.y_b, {steps_, call_.T}, call_.B, row_of_y());
    if (!call_.lengths) return;
    if (c_.cells) {
      clear_rows(c_.cells, c_.cells_t, c_.cells_b, {0, call_.T}, call_.B,
                 D_ * l.bytes(l.H));
    }
    if (c_.trace) {
      const index row = stack_.weights[0]->blocks() * l.bytes(l.H);
      std::memset(c_.trace, 0, stack_.count() * call_.T * call_.B * row);
    }
  }
  void keep_state() const {
    copy_state(call_.h0, bytes_of_h(), c_.h_n);
    copy_state(call_.c0, bytes_of_c(), c_.c_n);
  }

  // With an absent gate the kernels write traces that have a place for it; copy_traces
  // copies the user's from these.
  index trace_bytes() const {
    const Layout& l = stack_.layout();
    if (!c_.trace || !stack_.weights[0]->has_absent()) return 0;
    return stack_.count() * steps_ * call_.B * l.shape.gates * l.bytes(l.H);
  }
  void copy_traces(const char* from) const {
    const Layout& l = stack_.layout();
    const int gates = l.shape.gates;
    const index row = l.bytes(l.H), rows = steps_ * call_.B;
    for (index at = 0; at < stack_.count(); ++at) {
      char* to = c_.trace + at * call_.T * call_.B * (gates - 1) * row;
      for (index n = 0; n < rows; ++n, from += gates * row, to += (gates - 1) * row) {
        remove_block(from, row, gates, l.shape.differs.absent, to);
      }
    }
  }

  void set(index at, const char* zeros, char* const (&buffers)[2], const Saved& saved,
           std::vector<Dropout<char>>& drops, char* traces) {
    Forward& p = passes_[at].problem;
    const Layout& l = weights(at).layout();
    const index layer = at / D_, d = at % D_, B = call_.B;
    const bool is_last = layer == layers_ - 1;
    const index row = row_of_y(), R = l.bytes(l.R), H = l.bytes(l.H);
    const auto y_of = [&](index of) { return c_.saved ? saved.y[of] : buffers[of % 2]; };
    if (layer == 0) {
      p.x = call_.x, p.x_t = call_.x_t, p.x_b = call_.x_b;
    } else {
      char* const below = y_of(layer - 1);
      char* const dropped = c_.saved && saved.x[layer] ? saved.x[layer] : below;
      p.x = dropped, p.x_t = B * row, p.x_b = row;
      drops[layer] = {steps_,
                      B,
                      row / element(),
                      below,
                      B * row,
                      row,
                      dropped,
                      B * row,
                      row,
                      stack_.dropout,
                      call_.options.seed,
                      static_cast<std::uint32_t>(Draw::between),
                      static_cast<std::uint32_t>(layer - 1)};
    }
    p.h0 = state(call_.h0, at, l.R, zeros);
    p.c0 = l.shape.has_c ? state(call_.c0, at, l.H, zeros) : nullptr;
    p.y = is_last ? c_.y : y_of(layer);
    p.y_t = is_last ? c_.y_t : B * row;
    p.y_b = is_last ? c_.y_b : row;
    p.y += d * R;
    p.h_n = c_.h_n + at * B * R;
    p.c_n = l.shape.has_c ? c_.c_n + at * B * H : nullptr;
    p.saved = c_.saved ? saved.records[at] : nullptr;
    if (is_last && c_.cells) {
      p.cells = c_.cells + d * H, p.cells_t = c_.cells_t, p.cells_b = c_.cells_b;
    } else if (c_.saved && saved.cells[layer]) {
      p.cells = saved.cells[layer] + d * H;
      p.cells_t = B * saved.cells_row, p.cells_b = saved.cells_row;
    }
    if (!c_.trace) return;
    const index of_trace = B * l.shape.gates * H;
    p.trace =
        traces ? traces + at * steps_ * of_trace : c_.trace + at * call_.T * of_trace;
  }
};

class StackBackwardPass : StackPass<Backward> {
  const StackBackward& c_;
  const Saved saved_;
  std::vector<std::array<char*, parameter_count>> gradients_;  // of the kernels' gates

 public:
  StackBackwardPass(const Stack& stack, const StackBackward& call)
      : StackPass(stack, call),
        c_(call),
        saved_(stack, call, const_cast<char*>(call.saved)),
        gradients_(stack.count()) {}

  void run() {
    if (is_empty()) return clear();
    const Layout& first = stack_.layout();
    if (c_.dx) {
      clear_rows(c_.dx, c_.dx_t, c_.dx_b, {steps_, call_.T}, call_.B,
                 first.bytes(first.I));
    }
    const index n = stack_.count(), rows = steps_ * call_.B;
    for (index k = 0; k < n; ++k) {
      Backward& p = add(at(k), 2).problem;
      p.weights = weights(at(k)).backward(steps_, rows, has_options_);
      p.dx =
          const_cast<char*>(call_.x);  // the scratch memory depends on whether it is null
      if (at(k) < D_ && !c_.dx) p.dx = nullptr;
      p.saved = saved_.records[at(k)];
    }
    plan();
    const auto [one, other] = scratch();
    const index widest = std::max(row_of_y(), first.bytes(first.I));
    const index zeros = reads_zeros() ? call_.B * element() * first.H : 0;
    const index between = layers_ > 1 ? rows * row_of_y() : 0;
    const index own = D_ == 2 ? rows * widest : 0;
    Arena sizes(nullptr);
    const auto lay_out = [&](Arena& memory) {
      std::array parts{memory.take(zeros), memory.take(between), memory.take(between),
                       memory.take(own),   memory.take(one),     memory.take(other)};
      expand(memory);
      return parts;
    };
    lay_out(sizes);
    const Workspace workspace(static_cast<std::size_t>(sizes.used()));
    Arena memory(workspace.start());
    const auto parts = lay_out(memory);
    if (zeros) std::memset(parts[0], 0, zeros);
    char* const buffers[2] = {parts[1], parts[2]};
    for (index k = 0; k < n; ++k) set(k, parts[0], buffers, parts[3]);
    StackPass::run(
        {parts[4], parts[5]}, [](const Group&, const Team&) { return false; },
        [&](const Group& group, const Team& team) { return join(group, team); });
    finish();
  }

 private:
  index at(index k) const { return stack_.count() - 1 - k; }

  void clear() const {
    const Layout& l = stack_.layout();
    if (c_.dx) clear_rows(c_.dx, c_.dx_t, c_.dx_b, {0, call_.T}, call_.B, l.bytes(l.I));
    copy_state(c_.dh_n, bytes_of_h(), c_.dh0);
    copy_state(c_.dc_n, bytes_of_c(), c_.dc0);
    for (index n = 0; n < stack_.count(); ++n) {
      for (int kind = 0; kind < parameter_count; ++kind) {
        char* const to = c_.gradients[n * parameter_count + kind];
        const auto [blocks, values] = blocks_of(n, kind);
        if (to) std::memset(to, 0, blocks * values * element());
      }
    }
  }

  // Returns the number of blocks of a parameter in the user's arrays, and the values of a
  // block.
  std::pair<index, index> blocks_of(index n, int kind) const {
    const Weights& of = *stack_.weights[n];
    const Layout& l = of.layout();
    const index gates = of.blocks(), H = l.H;
    const index peepholes = l.shape.peephole_count - of.has_absent();
    const std::pair<index, index> blocks[parameter_count] = {
        {gates, H * l.I}, {gates, H * l.R}, {gates, H}, {gates, H}, {1, l.R * H},
        {peepholes, H},   {gates, H},       {gates, H}, {1, H},     {1, H}};
    return blocks[kind];
  }

  // Sets where the kernels write gradients: the user's arrays or, if a gate is absent,
  // memory that has a place for it.
  void expand(Arena& memory) {
    for (index n = 0; n < stack_.count(); ++n) {
      for (int kind = 0; kind < parameter_count; ++kind) {
        char* const user = c_.gradients[n * parameter_count + kind];
        const auto [blocks, values] = blocks_of(n, kind);
        const bool grows = stack_.weights[n]->has_absent() && blocks > 1;
        gradients_[n][kind] =
            user && grows ? memory.take((blocks + 1) * values * element()) : user;
      }
    }
  }

  void set(index k, const char* zeros, char* const (&buffers)[2], char* own) {
    const index n = at(k), layer = n / D_, d = n % D_, B = call_.B;
    Backward& p = passes_[k].problem;
    const Layout& l = weights(n).layout();
    const bool is_last = layer == layers_ - 1;
    const index row = row_of_y(), R = l.bytes(l.R), H = l.bytes(l.H);
    if (has_options_) {
      const bool is_recomputed = BackwardScratch::recomputes(l, p);
      p.forward_weights = is_recomputed
                              ? weights(n).forward(steps_, steps_ * B, true).start
                              : weights(n).bias();
    }
    if (layer == 0) {
      p.x = call_.x, p.x_t = call_.x_t, p.x_b = call_.x_b;
    } else {
      p.x = saved_.x[layer] ? saved_.x[layer] : saved_.y[layer - 1];
      p.x_t = B * row, p.x_b = row;
    }
    p.h0 = state(call_.h0, n, l.R, zeros);
    p.c0 = l.shape.has_c ? state(call_.c0, n, l.H, zeros) : nullptr;
    p.y = is_last ? const_cast<char*>(c_.y) : saved_.y[layer];
    p.y_t = is_last ? c_.y_t : B * row;
    p.y_b = is_last ? c_.y_b : row;
    p.y += d * R;
    if (is_last && c_.cells) {
      p.cells = const_cast<char*>(c_.cells) + d * H;
      p.cells_t = c_.cells_t, p.cells_b = c_.cells_b;
    } else if (saved_.cells[layer]) {
      p.cells = saved_.cells[layer] + d * H;
      p.cells_t = B * saved_.cells_row, p.cells_b = saved_.cells_row;
    }
    if (!is_last) {
      p.dy = buffers[(layer + 1) % 2] + d * R, p.dy_t = B * row, p.dy_b = row;
    } else if (c_.dy) {
      p.dy = c_.dy + d * R, p.dy_t = c_.dy_t, p.dy_b = c_.dy_b;
    }
    if (is_last && c_.dcells) {
      p.dcells = c_.dcells + d * H, p.dcells_t = c_.dcells_t, p.dcells_b = c_.dcells_b;
    }
    p.dh_n = c_.dh_n ? c_.dh_n + n * B * R : nullptr;
    p.dc_n = c_.dc_n ? c_.dc_n + n * B * H : nullptr;
    const index of_x = layer > 0 ? row : l.bytes(l.I);
    if (layer == 0 && !c_.dx) {
      p.dx = nullptr;
    } else if (D_ == 2 && d == 0) {
      p.dx = own, p.dx_t = B * of_x, p.dx_b = of_x;
    } else if (layer == 0) {
      p.dx = c_.dx, p.dx_t = c_.dx_t, p.dx_b = c_.dx_b;
    } else {
      p.dx = buffers[layer % 2], p.dx_t = B * of_x, p.dx_b = of_x;
    }
    p.dh0 = c_.dh0 ? c_.dh0 + n * B * R : nullptr;
    p.dc0 = c_.dc0 ? c_.dc0 + n * B * H : nullptr;
    const auto& d_of = gradients_[n];
    p.dweight_ih = d_of[0], p.dweight_hh = d_of[1], p.dbias_ih = d_of[2];
    p.dbias_hh = d_of[3], p.dweight_hr = d_of[4];
    p.dvectors = {d_of[5], d_of[6], d_of[7], d_of[8], d_of[9]};
  }

  // Adds the dx of both directions, and takes the sum through the dropout between layers.
  bool join(const Group& group, const Team& team) const {
    const index last = group.first + group.count - 1;
    const index layer = at(last) / D_;
    const Backward& p = passes_[group.first].problem;  // direction 1, if there are two
    bool worked = false;
    if (D_ == 2 && p.dx) {
      if (last + 1 == std::ssize(passes_)) team.meet();
      const Backward& own = passes_[last].problem;
      const Range rows = team.share(steps_ * call_.B);
      for (index n = rows.begin; n < rows.end; ++n) {
        const index t = n / call_.B, b = n % call_.B;
        char* const to = p.dx + t * p.dx_t + b * p.dx_b;
        const char* const from = own.dx + t * own.dx_t + b * own.dx_b;
        if (element() == 4)
          add_values<float>(from, p.I, to);
        else
          add_values<double>(from, p.I, to);
      }
      worked = true;
    }
    if (layer > 0 && drops_between(stack_, call_)) {
      if (worked) team.meet();
      const Backward& of = D_ == 2 ? p : passes_[last].problem;
      const Dropout<char> drop{steps_,
                               call_.B,
                               of.I,
                               of.dx,
                               of.dx_t,
                               of.dx_b,
                               of.dx,
                               of.dx_t,
                               of.dx_b,
                               stack_.dropout,
                               call_.options.seed,
                               static_cast<std::uint32_t>(Draw::between),
                               static_cast<std::uint32_t>(layer - 1)};
      stack_.layout().k.drop_out(drop, team.share(steps_ * call_.B));
      worked = true;
    }
    return worked && layer > 0;
  }
  template <class E>
  static void add_values(const char* from, index n, char* to) {
    for (index i = 0; i < n; ++i) {
      reinterpret_cast<E*>(to)[i] += reinterpret_cast<const E*>(from)[i];
    }
  }

  // Copies the kernels' gradients to the user's.
  void finish() const {
    for (index n = 0; n < stack_.count(); ++n) {
      const Layout& l = weights(n).layout();
      for (int kind = 0; kind < parameter_count; ++kind) {
        char* const to = c_.gradients[n * parameter_count + kind];
        if (!to || gradients_[n][kind] == to) continue;
        const auto [blocks, values] = blocks_of(n, kind);
        int absent = l.shape.differs.absent;
        if (kind == 5) absent = peephole_of(l.shape, absent);
        remove_block(gradients_[n][kind], values * element(),
                     static_cast<int>(blocks) + 1, absent, to);
      }
      char* const dweight_hh = c_.gradients[n * parameter_count + 1];
      if (dropped_.empty() || !dweight_hh) continue;
      drop_weights(weights(n), dropped_at(call_, n), dweight_hh, dweight_hh);
    }
  }
};

}  // namespace

index saved_bytes(const Stack& stack, const StackCall& call) {
  return Saved(stack, call, nullptr).bytes;
}

void forward(const Stack& stack, const StackForward& call) {
  StackForwardPass(stack, call).run();
}

void backward(const Stack& stack, const StackBackward& call) {
  StackBackwardPass(stack, call).run();
}

ForwardPlan plan(const Stack& stack, index at, const StackCall& call) {
  StackForward forward{};
  static_cast<StackCall&>(forward) = call;
  return StackForwardPass(stack, forward).plan_of(at);
}

}  // namespace fusedrnn
