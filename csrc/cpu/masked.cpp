// This file runs calls with a mask, in which rows skip steps (StackCall::mask).
//
// The rows of x that are taken are copied together, so that each row of the batch is a
// sequence without gaps, with a length. The call is then one with lengths: it costs what
// its steps do, and its bits are those of such sequences with every option. Results are
// computed in the user's arrays and moved to their times there, from the last to the
// first. If the steps of all rows are their first ones, as with padding on the right,
// nothing is copied or moved.
#include <cstring>

#include "stack_pass.h"

namespace fusedrnn {

namespace {

// Steps addresses the rows (t, b) of an array (T, B, ·).
struct Steps {
  char* start;
  index t, b;

  char* at(index time, index row) const { return start + time * t + row * b; }
};

// TakenSteps has the steps that the rows of a call take. Loops go through times outside
// and rows of the batch inside, which is the order of memory.
class TakenSteps {
  const index T_, B_;
  std::vector<index> lengths_;  // (B,)
  std::vector<int> times_;      // (T, B): the time of each step of a row
  std::vector<int> steps_;      // (T, B): the step at each time, or -1
  bool moves_ = false;

 public:
  explicit TakenSteps(const StackCall& call)
      : T_(checked(call.T)), B_(call.B), lengths_(B_), times_(T_ * B_), steps_(T_ * B_) {
    for (index t = 0, n = 0; t < T_; ++t) {
      for (index b = 0; b < B_; ++b, ++n) {
        const bool taken = call.mask[n];
        const index step = lengths_[b];
        steps_[n] = taken ? static_cast<int>(step) : -1;
        if (taken) times_[step * B_ + b] = static_cast<int>(t);
        moves_ |= taken && step != t;
        lengths_[b] += taken;
      }
    }
  }

  const index* lengths() const { return lengths_.data(); }
  // Returns whether a step is not at the time of its number.
  bool moves() const { return moves_; }
  bool is_taken(index t, index b) const { return steps_[t * B_ + b] >= 0; }
  bool exists(index t) const { return t >= 0 && t < T_; }

  static index checked(index T) {
    if (T <= std::numeric_limits<int>::max()) return T;
    throw std::length_error("mask must have fewer than 2^31 steps, got " +
                            std::to_string(T));
  }

  // Copies the rows of taken steps to the first times; `to` may be `from`.
  void compact(const Steps& from, index bytes, const Steps& to) const {
    share_rows(bytes, [&](Range rows) {
      for (index k = 0; k < T_; ++k) {
        for (index b = rows.begin; b < rows.end; ++b) {
          if (k >= lengths_[b]) continue;
          std::memmove(to.at(k, b), from.at(times_[k * B_ + b], b), bytes);
        }
      }
    });
  }
  // Moves the rows of taken steps from the first times to their own, and clears others.
  void spread(const Steps& steps, index bytes) const {
    if (!moves_ || !steps.start) return;
    share_rows(bytes, [&](Range rows) {
      for (index t = T_ - 1; t >= 0; --t) {
        for (index b = rows.begin; b < rows.end; ++b) {
          const index step = steps_[t * B_ + b];
          if (step < 0) {
            std::memset(steps.at(t, b), 0, bytes);
          } else if (step != t) {
            std::memcpy(steps.at(t, b), steps.at(step, b), bytes);
          }
        }
      }
    });
  }
  // Calls f(t, row, whether the row takes a step) for each time, from the last one
  // backwards or from the first one on.
  template <class F>
  void each(Range rows, bool from_last, const F& f) const {
    for (index n = 0; n < T_; ++n) {
      const index t = from_last ? T_ - 1 - n : n;
      for (index b = rows.begin; b < rows.end; ++b) f(t, b, is_taken(t, b));
    }
  }
  // Calls f(rows of the batch), on several threads where rows have much memory: copying
  // 1 MB takes about as long as waking a thread.
  template <class F>
  void share_rows(index bytes, const F& f) const {
    constexpr index bytes_per_thread = 1 << 20;
    with_team(threads_for(T_ * B_ * bytes, bytes_per_thread), Length::brief, 0,
              [&](const Team& team) { f(team.share(B_)); });
  }
};

// MaskedCall turns a call with a mask into one with lengths.
class MaskedCall {
  const Stack& stack_;
  const Layout& l_;
  const StackCall& call_;
  const TakenSteps steps_;
  Memory x_, resets_;

 public:
  MaskedCall(const Stack& stack, const StackCall& given)
      : stack_(stack), l_(stack.layout()), call_(given), steps_(given) {}

  void run(const StackForward& given) {
    StackForward call = given;
    set(call);
    forward(stack_, call);
    const Steps y{given.y, given.y_t, given.y_b};
    steps_.spread(y, row_of_y());
    steps_.spread({given.cells, given.cells_t, given.cells_b}, row_of_cells());
    const index gates = stack_.weights[0]->blocks() * l_.H * l_.item;
    for (index at = 0; given.trace && at < stack_.count(); ++at) {
      char* const trace = given.trace + at * given.T * given.B * gates;
      steps_.spread({trace, given.B * gates, gates}, gates);
    }
    if (given.repeats) repeat(y);
  }

  void run(const StackBackward& given) {
    StackBackward call = given;
    set(call);
    Memory y, cells, dy, dcells, sums;
    if (given.repeats && given.dy) {
      gather_repeated(call, dy, sums);
    } else {
      compact(given.dy, row_of_y(), dy, call.dy, call.dy_t, call.dy_b);
    }
    compact(given.y, row_of_y(), y, call.y, call.y_t, call.y_b);
    compact(given.cells, row_of_cells(), cells, call.cells, call.cells_t, call.cells_b);
    compact(given.dcells, row_of_cells(), dcells, call.dcells, call.dcells_t,
            call.dcells_b);
    backward(stack_, call);
    steps_.spread({given.dx, given.dx_t, given.dx_b}, l_.I * given.x_item);
    if (given.dh0 && sums.bytes()) add_to_starts(sums.as<const char>(), given.dh0);
  }

 private:
  index row_of_y() const { return stack_.directions * of_direction(); }
  index of_direction() const { return l_.R * l_.item; }
  index row_of_cells() const { return stack_.directions * l_.bytes(l_.H); }
  // Returns whether direction d runs from the last step to the first.
  bool is_reverse(index d) const { return stack_.directions == 2 ? d : call_.reverse; }
  // Returns the place of row b's state of direction d of the last layer.
  index state(index d, index b) const {
    const index at = stack_.count() - stack_.directions + d;
    return (at * call_.B + b) * l_.bytes(l_.R);
  }

  void set(StackCall& call) {
    call.mask = nullptr;
    call.lengths = steps_.lengths();
    if (!steps_.moves()) return;
    compact(call_.x, l_.I * call_.x_item, x_, call.x, call.x_t, call.x_b);
    if (!call_.resets) return;
    const char* resets = nullptr;
    index t = call_.B, b = 1;
    compact(reinterpret_cast<const char*>(call_.resets), 1, resets_, resets, t, b);
    call.resets = reinterpret_cast<const bool*>(resets);
  }
  // Copies the taken rows of an array, if they move, to `memory`, and sets start and
  // strides to the copy.
  void compact(const char* from, index bytes, Memory& memory, const char*& start,
               index& t, index& b) const {
    if (!from || !steps_.moves()) return;
    memory = Memory(static_cast<std::size_t>(call_.T * call_.B * bytes + 1));
    const Steps to{memory.as<char>(), call_.B * bytes, bytes};
    steps_.compact({const_cast<char*>(from), t, b}, bytes, to);
    start = to.start, t = to.t, b = to.b;
  }

  // Sets y of the steps that are not taken to h of the state there.
  void repeat(const Steps& y) const {
    const index bytes = of_direction();
    steps_.share_rows(row_of_y(), [&](Range rows) {
      for (index d = 0; d < stack_.directions; ++d) {
        steps_.each(rows, is_reverse(d), [&](index t, index b, bool is_taken) {
          if (is_taken) return;
          const index from = is_reverse(d) ? t + 1 : t - 1;
          char* const to = y.at(t, b) + d * bytes;
          if (steps_.exists(from)) {
            std::memcpy(to, y.at(from, b) + d * bytes, bytes);
          } else if (!call_.h0) {
            std::memset(to, 0, bytes);
          } else if (l_.halves) {
            l_.halves->narrow(call_.h0 + state(d, b), l_.R, to);
          } else {
            std::memcpy(to, call_.h0 + state(d, b), bytes);
          }
        });
      }
    });
  }

  // Copies dy, with the gradients of repeated rows added to that of the row they repeat,
  // and compacts it. Those of the initial h go to `sums` (D, B, R), of the layout's type,
  // which holds the gradients of a row's gap meanwhile.
  void gather_repeated(StackBackward& call, Memory& memory, Memory& sums) const {
    const index T = call_.T, B = call_.B, row = row_of_y(), bytes = of_direction();
    const index sum = l_.bytes(l_.R);
    memory = Memory(static_cast<std::size_t>(T * B * row + 1));
    sums = Memory(static_cast<std::size_t>(stack_.directions * B * sum + 1));
    std::memset(sums.as<char>(), 0, stack_.directions * B * sum);
    const Steps from{const_cast<char*>(call.dy), call.dy_t, call.dy_b};
    const Steps dy{memory.as<char>(), B * row, row};
    steps_.share_rows(row, [&](Range rows) {
      for (index d = 0; d < stack_.directions; ++d) {
        steps_.each(rows, !is_reverse(d), [&](index t, index b, bool is_taken) {
          const char* const own = from.at(t, b) + d * bytes;
          char* const of_gap = sums.as<char>() + (d * B + b) * sum;
          if (!is_taken) return add_values(l_, own, l_.item, l_.R, of_gap, l_.size);
          char* const to = dy.at(t, b) + d * bytes;
          std::memcpy(to, own, bytes);
          const index before = is_reverse(d) ? t - 1 : t + 1;
          if (!steps_.exists(before) || steps_.is_taken(before, b)) return;
          add_values(l_, of_gap, l_.size, l_.R, to, l_.item);
          std::memset(of_gap, 0, sum);
        });
      }
    });
    steps_.compact(dy, row, dy);
    call.dy = dy.start, call.dy_t = dy.t, call.dy_b = dy.b;
  }
  void add_to_starts(const char* sums, char* dh0) const {
    for (index d = 0; d < stack_.directions; ++d) {
      for (index b = 0; b < call_.B; ++b, sums += l_.bytes(l_.R)) {
        add_values(l_, sums, l_.size, l_.R, dh0 + state(d, b), l_.size);
      }
    }
  }
};

}  // namespace

void forward_masked(const Stack& stack, const StackForward& call) {
  MaskedCall(stack, call).run(call);
}
void backward_masked(const Stack& stack, const StackBackward& call) {
  MaskedCall(stack, call).run(call);
}

}  // namespace fusedrnn
