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
  static constexpr int most_vectors = 128;

  // The part of its panels' depth that a tile does, and what it prefetches meanwhile:
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
  index column_units_;  // of a panel
  int rows_ = 0;
  index place_ = -1;
  Tile tile_{};
  StartAt start_{};
  TermAt terms_[most_terms];
  const char* right_[most_terms];  // of panel 0
  char* at_[most_roles][most_tile_rows];
  const char* same_start_[most_tile_rows];  // for all rows
  const char* left_[most_tile_rows];
  const char* operand_[most_terms][most_tile_rows];
  float scale_[most_terms][most_tile_rows];
  alignas(64) S sums_[most_vectors * lanes];
  alignas(64) S zeros_[lanes] = {};
  alignas(64) S edge_[2 * most_tile_rows * lanes];

 public:
  explicit BlockRun(const Block& block)
      : b_(block), column_units_(block.unit_vectors * index{lanes}) {
    tile_.at = at_;
    tile_.used = b_.used;
    if (b_.has_options) __builtin_memset(at_, 0, sizeof(at_));
  }

  void run() {
    if (b_.product->enter) b_.product->enter();
    const bool narrow = b_.transposed && ends_narrow();
    prepare(*b_.panel_product);
    take_blocks(b_.places, {b_.panels.begin, b_.panels.end - narrow}, b_.backwards);
    if (narrow && b_.panels.begin < b_.panels.end) {
      prepare(*b_.narrow_product);
      for_tiles(b_.places, [&](index place, int rows) {
        take(place, rows, {b_.panels.end - 1, b_.panels.end}, 1, false);
      });
    }
    if (b_.product->leave) b_.product->leave();
  }

  // Whole rows, a few at a time.
  void walk(int at_once) {
    tile_.end = tile_.panel_units = b_.size;
    for (index place = b_.places.begin; place < b_.places.end; place += at_once) {
      const index left = b_.places.end - place;
      resolve(place, static_cast<int>(left < at_once ? left : at_once));
      b_.after(*b_.step, tile_);
    }
  }

 private:
  // Whether the last panel has one vector, and is among the block's.
  bool ends_narrow() const {
    const index rest = b_.size % column_units_;
    const index last = (b_.size + column_units_ - 1) / column_units_;
    return rest > 0 && rest <= lanes && b_.panels.end == last;
  }

  // Values that are the same for all tiles of a product.
  void prepare(const PanelProduct& product) {
    product_ = &product;
    const bool narrow = product.width < b_.width;  // of one vector
    tile_.panel_units = narrow ? index{lanes} : column_units_;
    if (b_.start_role >= 0) {
      start_.rows = at_[b_.start_role];
    } else {
      const char* const start = b_.start ? b_.start : reinterpret_cast<char*>(zeros_);
      const index height = b_.places.end - b_.places.begin;
      for (int r = 0; r < product.tile && r < height; ++r) same_start_[r] = start;
      start_.rows = same_start_;
    }
    if (b_.start_role >= 0 || b_.start) {
      start_.slot = b_.unit_vectors == 1 ? b_.start_slot : index{lanes};
      start_.panel = column_units_;
    }
    for (int n = 0; n < b_.count; ++n) {
      const Term& of = b_.terms[n];
      terms_[n] = {at_[of.role], nullptr,   of.K - of.from, of.panel_bytes,
                   nullptr,      of.column, nullptr};
      const index k_bytes = narrow ? of.k_bytes / b_.width : of.k_bytes;
      if (of.panels) right_[n] = of.panels + of.from * k_bytes;
      if (!b_.product->put_left) continue;
      const index apart = b_.product->left_bytes(of.K);
      for (int r = 0; r < product.tile; ++r) operand_[n][r] = operand_at(n) + r * apart;
      terms_[n].left = operand_[n];
      terms_[n].scale = scale_[n];
    }
  }
  // Memory for the rows of a tile as the operand of a term.
  char* operand_at(int n) const {
    char* at = b_.operands;
    for (int before = 0; before < n; ++before) {
      at += product_->tile * b_.product->left_bytes(b_.terms[before].K);
    }
    return at;
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
    constexpr index own_cache = 512 * 1024, fewest_tiles = 4;
    const index most = product_->tile, pieces = b_.pieces;
    const index count = panels.end - panels.begin, bytes = count * b_.panel_bytes;
    const index height = places.end - places.begin;
    if (height <= 0 || count <= 0) return;
    if (height <= most) return take_tile(places, panels, bytes, backwards);
    const bool rows_first = bytes <= own_cache;
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
    if (rows_first) {
      return for_tiles(places, [&](index place, int rows) {
        take_groups(place, rows, panels, 1, backwards);
        backwards = !backwards;
      });
    }
    const bool far = 2 * bytes > second_level_cache;
    for (index done = 0; done < count; ++done) {
      const auto panel_at = [&](index n) {
        return backwards ? panels.end - 1 - n : panels.begin + n;
      };
      const index panel = panel_at(done);
      for (index piece = 0; piece < pieces; ++piece) {
        Turn turn{piece, pieces};
        const bool on = piece + 1 < pieces;
        turn.next_panel = on || done + 1 == count ? panel : panel_at(done + 1);
        turn.next_piece = on ? piece + 1 : 0;
        if (far && (on || done + 1 < count)) turn.asks = Turn::next;
        for_tiles(places, [&](index place, int rows) {
          take(place, rows, {panel, panel + 1}, 1, backwards, turn);
          if (++turn.part == product_->width) turn.asks = Turn::nothing;
        });
      }
    }
  }

  // A single tile takes several panels at once, shared out evenly, so that none is left
  // alone. Of its panels a little more than the cache holds is still met there.
  void take_tile(Range places, Range panels, index bytes, bool backwards) {
    const int rows = static_cast<int>(places.end - places.begin);
    const index count = panels.end - panels.begin;
    const bool beyond = bytes > second_level_cache / 4 * 5;
    const bool reading = rows == 1 ? bytes > first_level_cache / 3 * 4 : beyond;
    const int most = (reading ? product_->far : product_->near)[rows];
    const int groups = (static_cast<int>(count) + most - 1) / most;
    const int together = (static_cast<int>(count) + groups - 1) / groups;
    if (!beyond) return take_groups(places.begin, rows, panels, together, backwards);
    Turn turn;
    turn.asks = Turn::own;
    for (index done = 0; done < count; done += together) {
      const Range some = next(panels, done, together, backwards);
      take(places.begin, rows, some, together, backwards, turn);
    }
  }

  // So many of the panels after `done`, from the front or from the back.
  static Range next(Range panels, index done, index taken, bool backwards) {
    const index left = panels.end - panels.begin - done;
    taken = taken < left ? taken : left;
    const index first = backwards ? panels.end - done - taken : panels.begin + done;
    return {first, first + taken};
  }

  // All panels for one tile of rows, as many in a group as there is room for their sums:
  // what follows a product then has more to do at once.
  void take_groups(index place, int rows, Range panels, int together, bool backwards) {
    const int count = static_cast<int>(panels.end - panels.begin);
    const int vectors = rows * product_->sums;
    const bool mixes = rows > 1 && together > 1;  // rows within a group of panels
    if (!mixes && count * vectors <= most_vectors) {
      return take(place, rows, panels, together, backwards);
    }
    const int fit = mixes ? together : most_vectors / vectors / together * together;
    const int groups = (count + fit - 1) / fit, each = (count + groups - 1) / groups;
    const int size = (each + together - 1) / together * together;
    for (index done = 0; done < count; done += size) {
      take(place, rows, next(panels, done, size, backwards), together, backwards);
    }
  }

  // Addresses of each role's rows.
  void resolve(index place, int rows) {
    if (place == place_ && rows == rows_) return;
    tile_.place = place_ = place;
    tile_.rows = rows_ = rows;
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
    for (int n = 0; n < b_.count && b_.product && b_.product->put_left; ++n) {
      const Term& of = b_.terms[n];
      b_.product->put_left(at_[of.role], rows, of.K, operand_at(n), scale_[n]);
    }
  }

  // Prefetches what the pointwise function reads and writes: while the product runs, its
  // lines come from afar.
  void touch(index unit, index end) const {
    for (int n = 0; n < b_.touch_count; ++n) {
      const auto& [role, parts, first, apart, writes] = b_.touches[n];
      for (int r = 0; r < rows_; ++r) {
        const S* const row = reinterpret_cast<const S*>(at_[role][r]) + first;
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

  // Some panels of a tile, `together` at once, and then what follows of their units.
  void take(index place, int rows, Range panels, int together, bool backwards,
            const Turn& turn = {}) {
    resolve(place, rows);
    const index sums = product_->sums * lanes, count = panels.end - panels.begin;
    const bool is_last = turn.piece + 1 == turn.pieces;
    const index last_unit = panels.begin * column_units_ + count * tile_.panel_units;
    const index padded_end = last_unit < b_.padded ? last_unit : b_.padded;
    tile_.unit = panels.begin * column_units_;
    tile_.end = padded_end < b_.size ? padded_end : b_.size;
    tile_.row = rows > 1 && together > 1 ? count * sums : sums;
    tile_.panel = rows > 1 && together == 1 ? rows * sums : sums;
    S* const to = turn.pieces > 1 ? waiting(place, tile_.row) : sums_;
    if (is_last) touch(tile_.unit, padded_end);
    for (index left = count; left > 0;) {
      const index some = left < together ? left : together;
      const index at = backwards ? left - some : count - left;
      multiply(to + at * tile_.panel, panels.begin + at, static_cast<int>(some), turn);
      left -= some;
    }
    if (!is_last) return;
    tile_.sums = to;
    b_.after(*b_.step, tile_);
  }

  void multiply(S* to, index panel, int together, const Turn& turn) {
    const auto& by_panels = product_->multiply[rows_ - 1];
    StartAt start = start_;
    const char* other_rows[most_tile_rows];
    if (turn.piece > 0) {
      for (int r = 0; r < rows_; ++r) {
        other_rows[r] = reinterpret_cast<char*>(to + r * tile_.row);
      }
      start = {other_rows, 0, lanes, 0};
    } else if (start.panel > 0) {
      const index unit = panel * column_units_;
      start.offset = unit * index{sizeof(S)};
      if (unit + together * column_units_ > b_.padded) {
        start_at_edge(start, other_rows, together, b_.padded - unit);
      }
    }
    if (b_.count > 0 && !b_.terms[0].panels) {
      by_panels[together - 1](to, start, terms_, 0);
      return multiply_unpacked(to, panel, together);
    }
    if (turn.pieces > 1 || turn.asks != Turn::nothing) {
      return multiply_piece(to, start, panel, together, turn);
    }
    for (int n = 0; n < b_.count; ++n) {
      const Term& of = b_.terms[n];
      terms_[n].right = right_[n] + panel * of.panel_bytes;
      if (of.from > 0) terms_[n].left = left_from(of, of.from);
    }
    by_panels[together - 1](to, start, terms_, b_.count);
  }

  // The same of a piece of the panel's depth, or with prefetches.
  FUSEDRNN_LONG void multiply_piece(S* to, const StartAt& start, index panel,
                                    int together, const Turn& turn) {
    int lines = 0;
    for (int n = 0; n < b_.count; ++n) {
      const Term& of = b_.terms[n];
      const auto part_of = [&](index piece) { return of.depth * piece / turn.pieces; };
      const index begin = turn.pieces == 1 ? of.from : part_of(turn.piece);
      const index end = turn.pieces == 1 ? of.K : part_of(turn.piece + 1);
      TermAt& term = terms_[n];
      term.K = begin < of.from ? 0 : end - begin;
      term.left = begin > 0 ? left_from(of, begin) : at_[of.role];
      term.right = of.panels + panel * of.panel_bytes + begin * of.k_bytes;
      if (together > 1) continue;
      if (turn.asks == Turn::own) {
        constexpr index page = 4096;
        term.ahead = term.right + page;
        lines = product_->width;
      } else if (turn.asks == Turn::next) {
        const index next = part_of(turn.next_piece), after = part_of(turn.next_piece + 1);
        term.ahead = of.panels + turn.next_panel * of.panel_bytes + next * of.k_bytes +
                     turn.part * (after - next) * of.k_bytes / product_->width;
        lines = 1;
      }
    }
    const auto with = lines == 0   ? product_->multiply[rows_ - 1][together - 1]
                      : lines == 1 ? product_->asks_one[rows_ - 1]
                                   : product_->asks_all[rows_ - 1];
    with(to, start, terms_, b_.count);
    for (int n = 0; n < b_.count; ++n) {
      terms_[n].left = at_[b_.terms[n].role];
      terms_[n].K = b_.terms[n].K - b_.terms[n].from;
    }
  }

  // The left rows of a term from some k on; of one term at a time.
  const char* const* left_from(const Term& of, index k) {
    for (int r = 0; r < rows_; ++r) {
      left_[r] = at_[of.role][r] + k * index{sizeof(S)};
      asm("" : "+r"(left_[r]));
    }
    return left_;
  }

  S* waiting(index place, index row) const {
    return reinterpret_cast<S*>(b_.waiting) + place % most_rows_waiting * row;
  }

  // The last panel of a cell of one gate may end past the padded units.
  FUSEDRNN_LONG void start_at_edge(StartAt& start, const char** rows, int together,
                                   index units) {
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
  FUSEDRNN_LONG void multiply_unpacked(S* to, index panel, int together) {
    for (int n = 0; n < b_.count; ++n) {
      const Term& of = b_.terms[n];
      const S* left[most_tile_rows];
      for (int r = 0; r < rows_; ++r) {
        left[r] = reinterpret_cast<const S*>(at_[of.role][r]);
      }
      if (b_.transposed) {
        add_transposed(*of.matrix, left, rows_, panel * column_units_,
                       together * product_->width, to);
      } else {
        add_unpacked(*of.matrix, b_.unit_vectors, left, rows_, panel, together,
                     product_->sums, of.column, to);
      }
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
