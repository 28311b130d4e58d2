// This header says which rows take which step, and from which state. Without lengths
// every row takes every step. With lengths a block of rows is sorted, longest first, so
// that the rows that take a step are always its first: tiles hold no others, and a short
// row costs what its length does.
#pragma once

#include "kernels.h"
#include "team.h"

namespace fusedrnn {

struct Masks {
  const index* lengths;  // (B,), at least one of them T; or null
  const bool* resets;    // (T, B), contiguous; or null

  bool is_first(const Sizes& p, index s, index b) const {
    return s == (lengths && p.reverse ? p.T - lengths[b] : 0);
  }
  bool is_reset(const Sizes& p, index s, index b) const {
    return resets && resets[p.time(s) * p.B + b];
  }
  // Returns whether no gradient passes from step s to the step before: step s is reset,
  // or begins a chunk of bptt times.
  bool is_cut(const Sizes& p, index s, index b, index bptt) const {
    if (is_reset(p, s, b)) return true;
    return bptt && (p.time(s) + p.reverse) % bptt == 0 && !is_first(p, s, b);
  }
};

// A Schedule is a block of rows of the batch, each addressed by its place in the block.
class Schedule {
  index T_, first_, rows_;
  index* order_ = nullptr;   // (rows) the row at each place; null: first_, first_ + 1, …
  index* starts_ = nullptr;  // (T + 1) row-steps before each step

 public:
  // Takes the rows of one thread of the team. If the rows have lengths, each thread gets
  // every n-th longest, so that all have the same work. `memory` has size() indices.
  Schedule(const Sizes& p, const Masks& masks, const Team& team, index* memory)
      : T_(p.T) {
    const Range own = team.share(p.B);
    first_ = own.begin;
    rows_ = own.end - own.begin;
    if (!masks.lengths) return;
    order_ = memory;
    starts_ = memory + p.B;
    sort_rows(p, masks.lengths);
    rows_ = (p.B - team.rank + team.count - 1) / team.count;
    for (index i = 0; i < rows_; ++i) order_[i] = order_[team.rank + i * team.count];
    count_rows(p, masks.lengths);
  }
  // Returns the number of indices in `memory`.
  static index size(const Sizes& p, const Masks& masks) {
    return masks.lengths ? p.B + p.T + 1 : 0;
  }

  index rows() const { return rows_; }
  index row(index place) const { return order_ ? order_[place] : first_ + place; }
  const index* order() const { return order_; }
  // Returns the rows of an array by place.
  Rows rows_of(const char* array, index apart) const {
    char* const first = const_cast<char*>(array);
    return {order_ ? first : first + first_ * apart, apart, order_, nullptr};
  }

  // Returns how many rows take step s, 0 for s = -1 and T, or the sum over steps [begin,
  // end).
  index count(index s) const {
    if (s < 0 || s == T_) return 0;
    return count(s, s + 1);
  }
  index count(index begin, index end) const {
    return order_ ? starts_[end] - starts_[begin] : (end - begin) * rows_;
  }

  // Returns the number of rows that take any step.
  index working() const {
    const index first = count(0), last = count(T_ - 1);
    return first > last ? first : last;
  }

  // Returns the n-th pair of step and place when rows are listed step by step from step
  // `begin` on.
  struct Entry {
    index s, place;
  };
  Entry entry(index begin, index n) const {
    if (!order_) return {begin + n / rows_, n % rows_};
    n += starts_[begin];
    index s = begin, end = T_;
    while (end - s > 1) {
      const index middle = (s + end) / 2;
      (starts_[middle] <= n ? s : end) = middle;
    }
    return {s, n - starts_[s]};
  }
  void advance(Entry& at) const {
    ++at.place;
    while (at.s < T_ && at.place == count(at.s, at.s + 1)) at = {at.s + 1, 0};
  }

 private:
  // This is a stable counting sort; starts_ counts the rows that are longer.
  void sort_rows(const Sizes& p, const index* lengths) {
    for (index length = 0; length <= p.T; ++length) starts_[length] = 0;
    for (index b = 0; b < p.B; ++b) ++starts_[lengths[b]];
    index longer = 0;
    for (index length = p.T; length >= 0; --length) {
      const index equal = starts_[length];
      starts_[length] = longer;
      longer += equal;
    }
    for (index b = 0; b < p.B; ++b) order_[starts_[lengths[b]]++] = b;
  }

  void count_rows(const Sizes& p, const index* lengths) {
    const auto length = [&](index place) { return lengths[order_[place]]; };
    index n = 0;
    starts_[0] = 0;
    for (index s = 0; s < p.T; ++s) {
      while (n < rows_ && length(n) > p.time(s)) ++n;
      while (n > 0 && length(n - 1) <= p.time(s)) --n;
      starts_[s + 1] = starts_[s] + n;
    }
  }
};

// StateBefore finds the state from which a row takes step s: the call's initial state,
// what the step before left (not read at step 0), or zeros where the row is reset.
struct StateBefore {
  const Sizes& p;
  const Masks& masks;
  index s;
  const char *zeros, *initial, *previous;
  index initial_apart, previous_apart;

  const char* operator()(index b) const {
    if (masks.is_reset(p, s, b)) return zeros;
    return masks.is_first(p, s, b) ? initial + b * initial_apart
                                   : previous + b * previous_apart;
  }
  // Returns the states of a schedule's first `count` rows; `list` has space for a pointer
  // each.
  Rows find(const Schedule& rows, index count, char** list) const {
    if (!masks.resets && !(masks.lengths && p.reverse)) {
      return rows.rows_of(s == 0 ? initial : previous,
                          s == 0 ? initial_apart : previous_apart);
    }
    for (index i = 0; i < count; ++i) list[i] = const_cast<char*>((*this)(rows.row(i)));
    return {nullptr, 0, nullptr, list};
  }
};

}  // namespace fusedrnn
