// This file runs calls with a mask, in which rows skip steps (StackCall::mask).
//
// The rows of x that are taken are copied together, so that each row of the batch is a
// sequence without gaps, with a length. The call is then one with lengths: it costs what
// its steps do, and its bits are those of such sequences with every option. Results are
// computed in the user's arrays and moved to their times there, from the last to the
// first. If the steps of all rows are their first ones, as with padding on the right,
// nothing is copied or moved.
#include <cstring>
#include <numeric>

#include "stack_pass.h"

namespace fusedrnn {

namespace {

// Steps addresses the rows (t, b) of an array (T, B, ·).
struct Steps {
  char* start;
  index t, b;

  char* at(index time, index row) const { return start + time * t + row * b; }
};

// TakenSteps has the times of the steps that the rows of a call take.
class TakenSteps {
  const index T_, B_;
  const bool* const mask_;
  std::vector<index> lengths_;  // (B,)
  std::vector<index> times_;    // (B, T): the time of each step of a row
  bool moves_ = false;

 public:
  explicit TakenSteps(const StackCall& call)
      : T_(call.T), B_(call.B), mask_(call.mask), lengths_(B_), times_(B_ * T_) {
    for (index b = 0; b < B_; ++b) {
      index* const times = times_.data() + b * T_;
      index& count = lengths_[b];
      for (index t = 0; t < T_; ++t) {
        times[count] = t;
        count += is_taken(t, b);
      }
      moves_ |= count > 0 && times[count - 1] != count - 1;
    }
  }

  const index* lengths() const { return lengths_.data(); }
  // Returns whether a step is not at the time of its number.
  bool moves() const { return moves_; }
  bool is_taken(index t, index b) const { return mask_[t * B_ + b]; }

  // Copies the rows of taken steps to the first times; `to` may be `from`.
  void compact(const Steps& from, index bytes, const Steps& to) const {
    each_row(bytes, [&](index b) {
      for (index k = 0; k < lengths_[b]; ++k) {
        std::memmove(to.at(k, b), from.at(time(k, b), b), bytes);
      }
    });
  }
  // Moves the rows of taken steps from the first times to their own, and clears others.
  void spread(const Steps& rows, index bytes) const {
    if (!moves_ || !rows.start) return;
    each_row(bytes, [&](index b) {
      index k = lengths_[b];
      for (index t = T_ - 1; t >= 0; --t) {
        if (!is_taken(t, b)) {
          std::memset(rows.at(t, b), 0, bytes);
        } else if (--k != t) {
          std::memcpy(rows.at(t, b), rows.at(k, b), bytes);
        }
      }
    });
  }
  // Calls f(t, from, b) for each time at which row b takes no step, in the order of
  // travel or against it; `from` is the time before in that order, -1 or T at its
  // beginning.
  template <class F>
  void each_gap(index b, bool reverse, bool backwards, const F& f) const {
    const index before = reverse ? 1 : -1;
    for (index n = 0; n < T_; ++n) {
      const index t = reverse != backwards ? T_ - 1 - n : n;
      if (!is_taken(t, b)) f(t, t + before, b);
    }
  }
  bool exists(index t) const { return t >= 0 && t < T_; }

  // Calls f(b) for each row, on several threads where rows have much memory.
  template <class F>
  void each_row(index bytes, const F& f) const {
    constexpr index bytes_per_thread = 1 << 18;
    with_team(threads_for(T_ * B_ * bytes, bytes_per_thread), true, 0,
              [&](const Team& team) {
                const Range own = team.share(B_);
                for (index b = own.begin; b < own.end; ++b) f(b);
              });
  }

 private:
  index time(index k, index b) const { return times_[b * T_ + k]; }
};

// MaskedCall turns a call with a mask into one with lengths.
class MaskedCall {
  const Stack& stack_;
  const Layout& l_;
  const StackCall& given_;
  const TakenSteps steps_;
  Memory x_, resets_;

 public:
  MaskedCall(const Stack& stack, const StackCall& given)
      : stack_(stack), l_(stack.layout()), given_(given), steps_(given) {}

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
    Memory y, cells, dy, dcells, d_starts;
    if (given.repeats && given.dy) {
      gather_repeated(call, dy, d_starts);
    } else {
      compact(given.dy, row_of_y(), dy, call.dy, call.dy_t, call.dy_b);
    }
    compact(given.y, row_of_y(), y, call.y, call.y_t, call.y_b);
    compact(given.cells, row_of_cells(), cells, call.cells, call.cells_t, call.cells_b);
    compact(given.dcells, row_of_cells(), dcells, call.dcells, call.dcells_t,
            call.dcells_b);
    backward(stack_, call);
    steps_.spread({given.dx, given.dx_t, given.dx_b}, l_.I * given.x_item);
    if (given.dh0 && d_starts.bytes())
      add_to_starts(d_starts.as<const char>(), given.dh0);
  }

 private:
  index row_of_y() const { return stack_.directions * of_direction(); }
  index of_direction() const { return l_.R * l_.item; }
  index row_of_cells() const { return stack_.directions * l_.bytes(l_.H); }
  // Returns whether direction d runs from the last step to the first.
  bool is_reverse(index d) const { return stack_.directions == 2 ? d : given_.reverse; }
  // Returns the place of row b's state of direction d of the last layer.
  index state(index d, index b) const {
    const index at = stack_.count() - stack_.directions + d;
    return (at * given_.B + b) * l_.bytes(l_.R);
  }

  void set(StackCall& call) {
    call.mask = nullptr;
    call.lengths = steps_.lengths();
    if (!steps_.moves()) return;
    compact(given_.x, l_.I * given_.x_item, x_, call.x, call.x_t, call.x_b);
    if (!given_.resets) return;
    const char* resets = nullptr;
    index t = given_.B, b = 1;
    compact(reinterpret_cast<const char*>(given_.resets), 1, resets_, resets, t, b);
    call.resets = reinterpret_cast<const bool*>(resets);
  }
  // Copies the taken rows of an array, if they move, to `memory`, and sets start and
  // strides to the copy.
  void compact(const char* from, index bytes, Memory& memory, const char*& start,
               index& t, index& b) const {
    if (!from || !steps_.moves()) return;
    memory = Memory(static_cast<std::size_t>(given_.T * given_.B * bytes + 1));
    const Steps to{memory.as<char>(), given_.B * bytes, bytes};
    steps_.compact({const_cast<char*>(from), t, b}, bytes, to);
    start = to.start, t = to.t, b = to.b;
  }

  // Sets y of the steps that are not taken to h of the state there.
  void repeat(const Steps& y) const {
    const index bytes = of_direction();
    steps_.each_row(row_of_y(), [&](index b) {
      for (index d = 0; d < stack_.directions; ++d) {
        steps_.each_gap(b, is_reverse(d), false, [&](index t, index from, index) {
          char* const to = y.at(t, b) + d * bytes;
          if (steps_.exists(from)) {
            std::memcpy(to, y.at(from, b) + d * bytes, bytes);
          } else if (!given_.h0) {
            std::memset(to, 0, bytes);
          } else if (l_.halves) {
            l_.halves->narrow(given_.h0 + state(d, b), l_.R, to);
          } else {
            std::memcpy(to, given_.h0 + state(d, b), bytes);
          }
        });
      }
    });
  }

  // Adds the gradients of repeated rows of y to that of the row they repeat. Those of the
  // initial h go to `starts` (D, B, R).
  void gather_repeated(StackBackward& call, Memory& memory, Memory& starts) const {
    const index T = given_.T, B = given_.B, row = row_of_y(), bytes = of_direction();
    memory = Memory(static_cast<std::size_t>(T * B * row + 1));
    starts = Memory(static_cast<std::size_t>(B * row + 1));
    std::memset(starts.as<char>(), 0, B * row);
    const Steps from{const_cast<char*>(call.dy), call.dy_t, call.dy_b};
    const Steps dy{memory.as<char>(), B * row, row};
    steps_.each_row(row, [&](index b) {
      for (index t = 0; t < T; ++t) std::memcpy(dy.at(t, b), from.at(t, b), row);
      for (index d = 0; d < stack_.directions; ++d) {
        steps_.each_gap(b, is_reverse(d), true, [&](index t, index to, index) {
          char* const at = steps_.exists(to) ? dy.at(to, b) + d * bytes
                                             : starts.as<char>() + (d * B + b) * bytes;
          add_values(l_, dy.at(t, b) + d * bytes, l_.item, l_.R, at, l_.item);
        });
      }
    });
    steps_.compact(dy, row, dy);
    call.dy = dy.start, call.dy_t = dy.t, call.dy_b = dy.b;
  }
  void add_to_starts(const char* starts, char* dh0) const {
    for (index d = 0; d < stack_.directions; ++d) {
      for (index b = 0; b < given_.B; ++b, starts += of_direction()) {
        add_values(l_, starts, l_.item, l_.R, dh0 + state(d, b), l_.size);
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
