#include "stack_pass.h"

namespace fusedrnn {

namespace {

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
      p.trace = c_.trace;  // the scratch memory depends on whether it is null
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
          const Layout& l = stack_.layout();
          drop_rows(l, drops[layer], l.item, team.share(steps_ * call_.B));
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
    const index apart = c_.y_d ? D_ : 1;
    for (index d = 0; d < apart; ++d) {
      clear_rows(c_.y + d * c_.y_d, c_.y_t, c_.y_b, {steps_, call_.T}, call_.B,
                 row_of_y() / apart);
    }
    if (!call_.lengths) return;
    if (c_.cells) {
      clear_rows(c_.cells, c_.cells_t, c_.cells_b, {0, call_.T}, call_.B,
                 D_ * l.bytes(l.H));
    }
    if (c_.trace) {
      const index row = stack_.weights[0]->blocks() * l.H * l.item;
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
    return stack_.count() * steps_ * call_.B * l.shape.gates * l.H * l.item;
  }
  void copy_traces(const char* from) const {
    const Layout& l = stack_.layout();
    const int gates = l.shape.gates;
    const index row = l.H * l.item, rows = steps_ * call_.B;
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
                      row / l.item,
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
    p.y += d * (is_last && c_.y_d ? c_.y_d : l.R * l.item);
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
    const index of_trace = B * l.shape.gates * l.H * l.item;
    p.trace =
        traces ? traces + at * steps_ * of_trace : c_.trace + at * call_.T * of_trace;
  }
};

}  // namespace

index saved_bytes(const Stack& stack, const StackCall& call) {
  return Saved(stack, call, nullptr).bytes;
}

void forward(const Stack& stack, const StackForward& call) {
  if (call.mask && call.B > 0) return forward_masked(stack, call);
  StackForwardPass(stack, call).run();
}

ForwardPlan plan(const Stack& stack, index at, const StackCall& call) {
  StackForward forward{};
  static_cast<StackCall&>(forward) = call;
  return StackForwardPass(stack, forward).plan_of(at);
}

}  // namespace fusedrnn
