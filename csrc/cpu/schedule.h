// Which rows take which step. Without lengths every row takes every step. With them a
// block keeps its rows by length, longest first, so that the rows that take a step are
// always its first: tiles hold no others, and a short row costs what its length does.
#pragma once

#include "team.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// The rows of a tile.
template <int rows>
struct TileRows {
  index b[rows];
  bool in_a_row;  // b[r] = b[0] + r

  // to[r] = row b[r] of those that begin at `first`, so many values apart.
  template <class P>
  void find(P first, index apart, P (&to)[rows]) const {
    if (!in_a_row) {
      for (int r = 0; r < rows; ++r) to[r] = first + b[r] * apart;
      return;
    }
    P row = first + b[0] * apart;
    for (int r = 0; r < rows; ++r) {
      to[r] = row;
      row += apart;
      // Not as vectors: the matmul waits for them (LSTM, B = 8, H = 64: 5% of forward).
      asm("" : "+r"(row));
    }
  }
};

// A block of rows of the batch, each known by its place in the block.
class Schedule {
  index T_, first_, rows_;
  index* order_ = nullptr;   // (rows) the row at each place; null: first, first + 1, …
  index* starts_ = nullptr;  // (T + 1) how many rows take the steps before each

 public:
  // A member of the team's rows. Of rows of unlike length each member is dealt every n-th
  // longest, so that all have as much to do. `memory` has size() indices.
  Schedule(const Steps& p, const Team& team, index* memory) : T_(p.T) {
    const Range own = team.share(p.B);
    first_ = own.begin;
    rows_ = own.end - own.begin;
    if (!p.lengths) return;
    order_ = memory;
    starts_ = memory + p.B;
    sort_rows(p);
    rows_ = (p.B - team.rank + team.count - 1) / team.count;
    for (index i = 0; i < rows_; ++i) order_[i] = order_[team.rank + i * team.count];
    count_rows(p);
  }
  static index size(const Steps& p) { return p.lengths ? p.B + p.T + 1 : 0; }
  // How many S hold the memory of so many schedules, in whole cache lines.
  template <class S>
  static index elements(const Steps& p, index schedules) {
    constexpr index line = 64;
    const index bytes = schedules * size(p) * index{sizeof(index)};
    return (bytes + line - 1) / line * (line / index{sizeof(S)});
  }

  index rows() const { return rows_; }
  index row(index place) const { return order_ ? order_[place] : first_ + place; }
  template <int rows>
  TileRows<rows> tile(index place) const {
    TileRows<rows> tile;
    tile.in_a_row = !order_;
    for (int r = 0; r < rows; ++r) tile.b[r] = row(place + r);
    return tile;
  }

  // How many rows take step s, and steps [begin, end) together. None takes -1 or T.
  index count(index s) const {
    if (s < 0 || s == T_) return 0;
    return count(s, s + 1);
  }
  index count(index begin, index end) const {
    return order_ ? starts_[end] - starts_[begin] : (end - begin) * rows_;
  }

  // How many rows take a step at all.
  index working() const {
    const index first = count(0), last = count(T_ - 1);
    return first > last ? first : last;
  }

  // What is n-th when rows come step after step, from step `begin` on.
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
  // A stable counting sort, starts_ counting the rows that are longer.
  void sort_rows(const Steps& p) {
    for (index length = 0; length <= p.T; ++length) starts_[length] = 0;
    for (index b = 0; b < p.B; ++b) ++starts_[p.lengths[b]];
    index longer = 0;
    for (index length = p.T; length >= 0; --length) {
      const index equal = starts_[length];
      starts_[length] = longer;
      longer += equal;
    }
    for (index b = 0; b < p.B; ++b) order_[starts_[p.lengths[b]]++] = b;
  }

  void count_rows(const Steps& p) {
    const auto length = [&](index place) { return p.lengths[order_[place]]; };
    index n = 0;
    starts_[0] = 0;
    for (index s = 0; s < p.T; ++s) {
      while (n < rows_ && length(n) > p.time(s)) ++n;
      while (n > 0 && length(n - 1) <= p.time(s)) --n;
      starts_[s + 1] = starts_[s] + n;
    }
  }
};

// Where the state is that rows start step s from: what the call was given, what the step
// before left (at step 0 not looked at), or zeros where a row is reset.
template <class S>
struct StateBefore {
  const Steps& p;
  index s;
  const S *zeros, *given, *left;
  index given_apart, left_apart;

  const S* operator()(index b) const {
    if (p.is_reset(s, b)) return zeros;
    return p.is_first(s, b) ? given + b * given_apart : left + b * left_apart;
  }
  template <int rows>
  void find(const TileRows<rows>& tile, const S* (&to)[rows]) const {
    if (p.resets || (p.lengths && p.reverse)) {
      for (int r = 0; r < rows; ++r) to[r] = (*this)(tile.b[r]);
    } else {
      tile.find(s == 0 ? given : left, s == 0 ? given_apart : left_apart, to);
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
