// One product of a step for a thread's rows and panels: the order of the tiles, their
// pointers, and for each tile the product and what follows it.
#pragma once

#include "../machine.h"
#include "unpacked.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class S>
class BlockRun {
  using V = Vec<S>;
  static constexpr int lanes = V::lanes;
  static constexpr int most_vectors = 64;

  // What a tile does of the depth of its panels, and what it asks memory for meanwhile:
  //
  //   own    its panel a page ahead, as the machine itself looks no further than a page:
  //          where panels come from beyond the second-level cache for one tile (Zen 5, R
  //          of 4 MB: 128 instead of 105 GB/s)
  //   next   a part, one vector for each k, of the panel or piece that comes after: where
  //          each is read from L3 once for many tiles, the first of which would wait
  struct Turn {
    enum Asks { nothing, own, next };

    index piece = 0, pieces = 1;
    Asks asks = nothing;
    index next_panel = 0, next_piece = 0, part = 0;
  };

  const Block& b_;
  const PanelProduct* product_ = nullptr;
  const index column_units_;  // of a panel
  int rows_ = 0;
  index place_ = -1;
  char* at_[most_roles][most_tile_rows];
  const char* start_[most_tile_rows];  // the same for all rows
  alignas(64) S sums_[most_vectors * lanes];
  alignas(64) S zeros_[lanes] = {};
  alignas(64) S edge_[most_vectors * lanes];

 public:
  explicit BlockRun(const Block& block)
      : b_(block),
        column_units_(block.unit_vectors * index{lanes}) {}

  void run() {
    product_ = find(b_.width, b_.sums);
    const char* const start = b_.start ? b_.start : reinterpret_cast<char*>(zeros_);
    for (const char*& row : start_) row = start;
    if (b_.product->enter) b_.product->enter();
    const index rest = b_.size % column_units_;
    const index last = (b_.size + column_units_ - 1) / column_units_;
    const bool narrow =
        b_.transposed && rest > 0 && rest <= lanes && b_.panels.end == last;
    take_blocks(b_.places, {b_.panels.begin, b_.panels.end - narrow}, b_.backwards);
    if (narrow && b_.panels.begin < b_.panels.end) {
      product_ = find(1, 1);
      for_tiles(b_.places, [&](index place, int rows) {
        take(place, rows, b_.panels.end - 1, 1, Turn{});
      });
    }
    if (b_.product->leave) b_.product->leave();
  }

  // Whole rows, a few at a time.
  void walk(int at_once) {
    for (index place = b_.places.begin; place < b_.places.end; place += at_once) {
      const index left = b_.places.end - place;
      resolve(place, static_cast<int>(left < at_once ? left : at_once));
      b_.after(*b_.step, {place, rows_, 0, b_.size, b_.size, nullptr, 0, 0,
                         b_.used, at_});
    }
  }

 private:
  const PanelProduct* find(int width, int sums) const {
    for (const PanelProduct& panels : b_.product->panels) {
      if (panels.width == width && panels.sums == sums) return &panels;
    }
    return nullptr;
  }

  // f(first row, rows) for tiles of nearly equal height, at most that of the product.
  template <class F>
  void for_tiles(Range places, const F& f) const {
    const index n = places.end - places.begin, most = product_->tile;
    const index tiles = (n + most - 1) / most;
    for (index tile = 0; tile < tiles; ++tile) {
      const index first = places.begin + n * tile / tiles;
      const index end = places.begin + n * (tile + 1) / tiles;
      f(first, static_cast<int>(end - first));
    }
  }

  // Where all panels stay in any second-level cache, rows are the outer loop, so that
  // what belongs to a row is read and written in order; else panels, so that each is read
  // from L3 once for as many rows as stay in that cache beside it and the next.
  //
  // Panels are taken to and fro: of more than a cache holds, what the last pass left
  // there is met first (Zen 5, R of 1 MB in 1 MB: 0.83 instead of 0.92 ms). So the time
  // loop, which comes again and again, alternates `backwards`.
  void take_blocks(Range places, Range panels, bool backwards) {
    constexpr index near_cache = 64 * 1024, own_cache = 512 * 1024, fewest_tiles = 4;
    const index most = product_->tile, pieces = b_.pieces;
    const index count = panels.end - panels.begin, bytes = count * b_.panel_bytes;
    const index height = places.end - places.begin;
    if (height <= 0 || count <= 0) return;
    const bool rows_first = height > most && bytes <= own_cache;
    const index room = second_level_cache / 4 * 3 - 2 * b_.panel_bytes / pieces;
    const index tiles = room / (most * b_.row_bytes);
    const index fitting = most * (tiles > fewest_tiles ? tiles : fewest_tiles);
    const index block = fitting < most_rows_waiting ? fitting : most_rows_waiting;
    if (height > block && !rows_first) {
      const index blocks = (height + block - 1) / block;
      // An even number of passes ends where it began.
      if (blocks % 2 == 0) backwards = false;
      for (index n = 0; n < blocks; ++n, backwards = !backwards) {
        take_blocks({places.begin + height * n / blocks,
                     places.begin + height * (n + 1) / blocks},
                    panels, backwards);
      }
      return;
    }
    // The first of `taken` panels after `done`.
    const auto next = [&](index done, index taken) {
      return backwards ? panels.end - done - taken : panels.begin + done;
    };
    if (rows_first) {
      return for_tiles(places, [&](index place, int rows) {
        for (index done = 0; done < count; ++done) {
          take(place, rows, next(done, 1), 1, Turn{});
        }
        backwards = !backwards;
      });
    }
    if (height > most) {
      const bool far = 2 * bytes > second_level_cache;
      for (index done = 0; done < count; ++done) {
        const index panel = next(done, 1);
        for (index piece = 0; piece < pieces; ++piece) {
          Turn turn{piece, pieces};
          const bool on = piece + 1 < pieces;
          turn.next_panel = on || done + 1 == count ? panel : next(done + 1, 1);
          turn.next_piece = on ? piece + 1 : 0;
          if (far && (on || done + 1 < count)) turn.asks = Turn::next;
          for_tiles(places, [&](index place, int rows) {
            take(place, rows, panel, 1, turn);
            if (++turn.part == product_->width) turn.asks = Turn::nothing;
          });
        }
      }
      return;
    }
    // A single tile takes several panels at once, shared out evenly, so that none is left
    // alone. Of its panels a little more than the cache holds is still met there.
    const bool beyond = bytes > second_level_cache / 4 * 5;
    Turn turn;
    if (beyond) turn.asks = Turn::own;
    const bool reading = height == 1 ? bytes > near_cache : beyond;
    const index most_now = (reading ? product_->far : product_->near)[height];
    for (index done = 0; done < count;) {
      const index left = count - done, groups = (left + most_now - 1) / most_now;
      const index taken = (left + groups - 1) / groups;
      take(places.begin, static_cast<int>(height), next(done, taken),
           static_cast<int>(taken), turn);
      done += taken;
    }
  }

  // Where each role's rows are.
  void resolve(index place, int rows) {
    if (place == place_ && rows == rows_) return;
    place_ = place;
    rows_ = rows;
    for (std::uint32_t left = b_.used; left; left &= left - 1) {
      const int role = __builtin_ctz(left);
      const Rows& of = b_.rows[role];
      char** const at = at_[role];
      if (of.at) {
        for (int r = 0; r < rows; ++r) at[r] = of.at[place + r];
      } else if (of.order) {
        for (int r = 0; r < rows; ++r) at[r] = of.first + of.order[place + r] * of.apart;
      } else {
        char* row = of.first + place * of.apart;
        for (int r = 0; r < rows; ++r) {
          at[r] = row;
          row += of.apart;
          // Not as vectors: the product waits for them (LSTM, B = 8, H = 64: 5% of
          // forward).
          asm("" : "+r"(row));
        }
      }
    }
  }

  // Prefetches what the pointwise function reads and writes: while the product runs, its
  // lines come from afar.
  void touch(index unit, index end) const {
    for (int n = 0; n < b_.touch_count; ++n) {
      const auto& [role, parts, apart, writes] = b_.touches[n];
      for (int r = 0; r < rows_; ++r) {
        const S* const row = reinterpret_cast<const S*>(at_[role][r]);
        for (int part = 0; part < parts; ++part) {
          for (index u = unit; u < end; u += lanes) {
            if (writes) {
              __builtin_prefetch(row + part * apart + u, 1);
            } else {
              __builtin_prefetch(row + part * apart + u);
            }
          }
        }
      }
    }
  }

  void take(index place, int rows, index panel, int together, const Turn& turn) {
    resolve(place, rows);
    const int width = product_->width, sums = product_->sums;
    const bool narrow = width < b_.width;
    const index units = narrow ? index{lanes} : column_units_;
    const index unit = panel * column_units_, padded_end = unit + together * units;
    const index end = padded_end < b_.padded ? padded_end : b_.padded;
    const bool is_last = turn.piece + 1 == turn.pieces;
    if (is_last) touch(unit, end);

    char* to = reinterpret_cast<char*>(sums_);
    const index row = index{together} * sums * lanes;
    if (turn.pieces > 1) to = waiting(place, row);
    StartAt start{start_, 0, 0, 0};
    const char* rows_of_start[most_tile_rows];
    if (turn.piece > 0) {
      for (int r = 0; r < rows; ++r) rows_of_start[r] = to + r * row * index{sizeof(S)};
      start = {rows_of_start, 0, lanes, 0};
    } else if (b_.start_role >= 0 || b_.start) {
      if (b_.start_role >= 0) start.rows = at_[b_.start_role];
      start.offset = unit * index{sizeof(S)};
      start.slot = b_.unit_vectors == 1 ? b_.start_slot : lanes;
      start.panel = column_units_;
      if (padded_end > end) start_at_edge(start, rows_of_start, together, end - unit);
    }

    TermAt terms[most_terms] = {};
    const char* left[most_tile_rows];
    int lines = 0;
    if (!b_.terms[0].panels && b_.count > 0) {
      product_->multiply[rows - 1][together - 1](to, start, terms, 0);
      multiply_unpacked(rows, panel, together, narrow);
    } else {
      for (int n = 0; n < b_.count; ++n) {
        const Term& of = b_.terms[n];
        const index begin = turn.pieces == 1 ? of.from : part_of(of.depth, turn, turn.piece);
        const index stop =
            turn.pieces == 1 ? of.K : part_of(of.depth, turn, turn.piece + 1);
        const index k_bytes = of.k_bytes * width / b_.width;
        const char* const first = of.panels + panel * of.panel_bytes;
        TermAt& term = terms[n];
        term.K = begin < of.from ? 0 : stop - begin;
        term.left = at_[of.role];
        if (begin > 0) {  // of one term alone
          for (int r = 0; r < rows; ++r) {
            left[r] = at_[of.role][r] + begin * index{sizeof(S)};
            asm("" : "+r"(left[r]));
          }
          term.left = left;
        }
        term.right = first + begin * k_bytes;
        term.panel = of.panel_bytes;
        term.column = of.column;
        term.scale = of.scale ? of.scale + place : nullptr;
        term.ahead = nullptr;
        if (together > 1 || narrow) continue;
        if (turn.asks == Turn::own) {
          term.ahead = term.right + 4096;
          lines = width;
        } else if (turn.asks == Turn::next) {
          const index next = part_of(of.depth, turn, turn.next_piece);
          const index next_end = part_of(of.depth, turn, turn.next_piece + 1);
          term.ahead = of.panels + turn.next_panel * of.panel_bytes + next * k_bytes +
                       turn.part * (next_end - next) * k_bytes / width;
          lines = 1;
        }
      }
      const auto multiply = lines == 0   ? product_->multiply[rows - 1][together - 1]
                            : lines == 1 ? product_->asks_one[rows - 1]
                                         : product_->asks_all[rows - 1];
      multiply(to, start, terms, b_.count);
    }
    if (!is_last) return;
    b_.after(*b_.step,
             {place, rows, unit, end < b_.size ? end : b_.size, units, to, row,
              index{sums} * lanes, b_.used, at_});
  }

  static index part_of(index depth, const Turn& turn, index piece) {
    return depth * piece / turn.pieces;
  }

  char* waiting(index place, index row) const {
    return b_.waiting + place % most_rows_waiting * row * index{sizeof(S)};
  }

  // The last panel of a cell of one gate may end past the padded units.
  void start_at_edge(StartAt& start, const char** rows, int together, index units) {
    const index row = together * column_units_;
    for (int r = 0; r < rows_; ++r) {
      S* const at = edge_ + r * row;
      const S* const from = reinterpret_cast<const S*>(start.rows[r] + start.offset);
      for (index u = 0; u < row; ++u) at[u] = u < units ? from[u] : 0;
      rows[r] = reinterpret_cast<const char*>(at);
    }
    start.rows = rows;
    start.offset = 0;
  }

  // Weights as the user has them, for a few rows.
  void multiply_unpacked(int rows, index panel, int together, bool narrow) {
    for (int n = 0; n < b_.count; ++n) {
      const Term& of = b_.terms[n];
      const S* left[most_tile_rows];
      for (int r = 0; r < rows; ++r) {
        left[r] = reinterpret_cast<const S*>(at_[of.role][r]);
      }
      if (b_.transposed) {
        add_transposed(*of.matrix, left, rows, panel * column_units_,
                       narrow ? 1 : together * b_.width, sums_);
      } else {
        add_unpacked(*of.matrix, b_.unit_vectors, left, rows, panel, together,
                     product_->sums, of.column, sums_);
      }
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
