#include "stack_pass.h"

namespace fusedrnn {

namespace {

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
                 first.I * call_.x_item);
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
    const index widest = std::max(row_of_y(), first.I * call_.x_item);
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
    const index row = l.I * call_.x_item;
    if (c_.dx) clear_rows(c_.dx, c_.dx_t, c_.dx_b, {0, call_.T}, call_.B, row);
    copy_state(c_.dh_n, bytes_of_h(), c_.dh0);
    copy_state(c_.dc_n, bytes_of_c(), c_.dc0);
    for (index n = 0; n < stack_.count(); ++n) {
      for (int kind = 0; kind < parameter_count; ++kind) {
        char* const to = c_.gradients[n * parameter_count + kind];
        const auto [blocks, values] = blocks_of(n, kind);
        if (to) std::memset(to, 0, blocks * values * c_.gradient_item);
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

  // Returns whether the kernels' gradient has a place for an absent gate.
  bool has_place(index n, int kind) const {
    return stack_.weights[n]->has_absent() && blocks_of(n, kind).first > 1;
  }
  // Returns whether the kernels write a gradient to the user's array.
  bool writes_user(index n, int kind) const {
    if (has_place(n, kind)) return false;
    if (c_.gradient_item == element()) return true;
    const Pass<Backward>& pass = passes_[stack_.count() - 1 - n];
    const bool is_product = kind < 2 && dropped_.empty();
    return is_product && BackwardScratch::adds_at_once(*pass.layout, pass.problem);
  }
  // Sets where the kernels write gradients: the user's arrays, or memory that has a place
  // for an absent gate, or elements that are rounded afterwards.
  void expand(Arena& memory) {
    for (index n = 0; n < stack_.count(); ++n) {
      for (int kind = 0; kind < parameter_count; ++kind) {
        char* const user = c_.gradients[n * parameter_count + kind];
        const auto [blocks, values] = blocks_of(n, kind);
        const index all = blocks + has_place(n, kind);
        const bool is_own = user && !writes_user(n, kind);
        gradients_[n][kind] = is_own ? memory.take(all * values * element()) : user;
      }
    }
  }

  void set(index k, const char* zeros, char* const (&buffers)[2], char* own) {
    const index n = at(k), layer = n / D_, d = n % D_, B = call_.B;
    Backward& p = passes_[k].problem;
    const Layout& l = weights(n).layout();
    const bool is_last = layer == layers_ - 1;
    const index row = row_of_y(), R = l.bytes(l.R), H = l.bytes(l.H);
    const index of_y = l.R * l.item;
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
    p.y += d * of_y;
    if (is_last && c_.cells) {
      p.cells = const_cast<char*>(c_.cells) + d * H;
      p.cells_t = c_.cells_t, p.cells_b = c_.cells_b;
    } else if (saved_.cells[layer]) {
      p.cells = saved_.cells[layer] + d * H;
      p.cells_t = B * saved_.cells_row, p.cells_b = saved_.cells_row;
    }
    if (!is_last) {
      p.dy = buffers[(layer + 1) % 2] + d * of_y, p.dy_t = B * row, p.dy_b = row;
    } else if (c_.dy) {
      p.dy = c_.dy + d * of_y, p.dy_t = c_.dy_t, p.dy_b = c_.dy_b;
    }
    if (is_last && c_.dcells) {
      p.dcells = c_.dcells + d * H, p.dcells_t = c_.dcells_t, p.dcells_b = c_.dcells_b;
    }
    p.dh_n = c_.dh_n ? c_.dh_n + n * B * R : nullptr;
    p.dc_n = c_.dc_n ? c_.dc_n + n * B * H : nullptr;
    const index of_x = layer > 0 ? row : l.I * call_.x_item;
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
    p.gradient_item = writes_user(n, 0) ? c_.gradient_item : element();
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
        add_values(stack_.layout(), from, p.x_item, p.I, to, p.x_item);
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
      drop_rows(stack_.layout(), drop, of.x_item, team.share(steps_ * call_.B));
      worked = true;
    }
    return worked && layer > 0;
  }

  // Copies the kernels' gradients to the user's.
  void finish() const {
    const bool rounds = c_.gradient_item != element();
    for (index n = 0; n < stack_.count(); ++n) {
      const Shape& shape = weights(n).layout().shape;
      for (int kind = 0; kind < parameter_count; ++kind) {
        char* const to = c_.gradients[n * parameter_count + kind];
        char* const from = gradients_[n][kind];
        if (!to) continue;
        const auto [blocks, values] = blocks_of(n, kind);
        char* const wide = rounds ? from : to;
        if (has_place(n, kind)) {
          const int absent =
              kind == 5 ? peephole_of(shape, shape.differs.absent) : shape.differs.absent;
          remove_block(from, values * element(), static_cast<int>(blocks) + 1, absent,
                       wide);
        }
        if (kind == 1 && !dropped_.empty()) {
          drop_weights(weights(n), dropped_at(call_, n), element(), wide, wide);
        }
        if (rounds && from != to) round(wide, blocks * values, to);
      }
    }
  }
  void round(const char* from, index values, char* to) const {
    constexpr index values_per_thread = 1 << 16, line = 64;
    const Layout& l = stack_.layout();
    with_team(threads_for(values, values_per_thread), Length::brief, 0,
              [&](const Team& team) {
                const Range own = team.share(values, line);
                l.halves->narrow(from + l.bytes(own.begin), own.end - own.begin,
                                 to + own.begin * l.item);
              });
  }
};

}  // namespace

void backward(const Stack& stack, const StackBackward& call) {
  if (call.mask && call.B > 0) return backward_masked(stack, call);
  StackBackwardPass(stack, call).run();
}

}  // namespace fusedrnn
