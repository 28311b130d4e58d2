// This header runs one product of a step for a thread's rows and panels: the order of the
// tiles, their pointers, and for each tile the product and the pointwise function after
// it.
#pragma once

#include "../machine.h"
#include "unpacked.h"

namespace fusedrnn::FUSEDRNN_ARCH {

template <class S>
class BlockRun {
  using V = Vec<S>;
  static constexpr int lanes = V::lanes;
  static constexpr int most_vectors = 128;

  // Pass is the part of the panels' depth that a tile multiplies, and what it prefetches
  // meanwhile:
  //
  //   own    its panel, a page ahead, because the hardware prefetcher stops at the end
  //          of a page: if panels come from beyond the second-level cache for one tile
  //          (Zen 5, R of 4 MB: 128 instead of 105 GB/s)
  //   next   a part, one vector for each k, of the next panel or piece: if each is read
  //          from L3 once and used by many tiles, the first of which would stall
  struct Pass {
    enum Prefetch { nothing, own, next };

    index piece = 0, pieces = 1;
    Prefetch prefetch = nothing;
    index next_panel = 0, next_piece = 0, part = 0;
  };

  const Block& b_;
  const PanelProduct* product_ = nullptr;
  index column_units_;  // of a panel
  // Without packed panels a small tile reads the weights as the user has them. For more
  // rows each panel is packed where it is used, and stays in the second-level cache.
  const bool packs_;
  int rows_ = 0;
  index place_ = -1;
  Tile tile_{};
  StartAt start_{};
  int configured_ = 0;
  TermAt terms_[most_terms];
  const char* right_[most_terms];  // of panel 0, or of the only one in memory
  char* at_[most_roles][most_tile_rows];
  const char* same_start_[most_tile_rows];  // one start for all rows
  const char* left_[most_tile_rows];
  const char* operand_[most_terms][most_tile_rows];
  alignas(64) S sums_[most_vectors * lanes];
  alignas(64) S zeros_[lanes] = {};
  alignas(64) S edge_[2 * most_tile_rows * lanes];

 public:
  explicit BlockRun(const Block& block)
      : b_(block),
        column_units_(block.unit_vectors * index{lanes}),
        packs_(block.panel_memory && !block.terms[0].panels &&
               packs_panels(block.places.end - block.places.begin,
                            block.panel_product->tile, block.product->put_left)) {
    tile_.at = at_;
    tile_.used = b_.used;
    if (b_.has_options) __builtin_memset(at_, 0, sizeof(at_));
  }

  void run() {
    if (b_.product->enter) b_.product->enter();
    const bool narrow = b_.transposed && ends_narrow();
    const auto run_panel = [&](index panel) {
      if (packs_) pack(panel);
      for_tiles(b_.places, [&](index place, int rows) {
        run_tile(place, rows, {panel, panel + 1}, 1, false);
      });
    };
    prepare(*b_.panel_product);
    const Range wide{b_.panels.begin, b_.panels.end - narrow};
    if (packs_) {
      for (index panel = wide.begin; panel < wide.end; ++panel) run_panel(panel);
    } else {
      run_blocks(b_.places, wide, b_.backwards);
    }
    if (narrow && b_.panels.begin < b_.panels.end) {
      prepare(*b_.narrow_product);
      run_panel(b_.panels.end - 1);
    }
    if (b_.product->leave) b_.product->leave();
  }

  // Calls the pointwise function for whole rows, `at_once` at a time.
  void walk(int at_once) {
    tile_.end = tile_.panel_units = b_.size;
    for (index place = b_.places.begin; place < b_.places.end; place += at_once) {
      const index left = b_.places.end - place;
      resolve(place, static_cast<int>(left < at_once ? left : at_once));
      b_.after(*b_.step, tile_);
    }
  }

 private:
  // Returns whether the last panel has one vector, and belongs to this block.
  bool ends_narrow() const {
    const index rest = b_.size % column_units_;
    const index last = (b_.size + column_units_ - 1) / column_units_;
    return rest > 0 && rest <= lanes && b_.panels.end == last;
  }

  // Sets the values that are the same for all tiles of a product.
  void prepare(const PanelProduct& product) {
    product_ = &product;
    start_.configured = &configured_;
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
      if (of.operand.rows) terms_[n].left = operand_[n];
    }
  }

  // Packs a panel of each term.
  FUSEDRNN_LONG void pack(index panel) {
    char* to = b_.panel_memory;
    for (int n = 0; n < b_.count; ++n) {
      const Term& of = b_.terms[n];
      const Matrix& weights = *of.matrix;
      if (b_.transposed) {
        b_.product->pack_transposed(weights, {panel, panel + 1}, to);
      } else {
        b_.product->pack(weights, b_.unit_vectors, {panel, panel + 1}, to);
      }
      right_[n] = to;
      to += of.panel_bytes;
    }
  }

  // Calls f(first row, rows) for tiles of nearly equal height, at most that of the
  // product.
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

  // If all panels fit any second-level cache, the outer loop is over rows, so that a
  // row's arrays are read and written in order. Else it is over panels, so that each is
  // read from L3 once for as many rows as fit that cache beside it and the next panel.
  //
  // Panels are taken alternately forwards and backwards: if they exceed a cache, the next
  // pass begins with those that the last one left there (Zen 5, R of 1 MB in 1 MB: 0.83
  // instead of 0.92 ms). So the time loop alternates `backwards` from step to step.
  void run_blocks(Range places, Range panels, bool backwards) {
    constexpr index own_cache = 512 * 1024, fewest_tiles = 4;
    const index most = product_->tile, pieces = b_.pieces;
    const index count = panels.end - panels.begin, bytes = count * b_.panel_bytes;
    const index height = places.end - places.begin;
    if (height <= 0 || count <= 0) return;
    if (height <= most) return run_single_tile(places, panels, bytes, backwards);
    const bool rows_first = bytes <= own_cache;
    const index available = second_level_cache / 4 * 3 - 2 * b_.panel_bytes / pieces;
    const index tiles = available / (most * b_.row_bytes);
    const index fitting = most * (tiles > fewest_tiles ? tiles : fewest_tiles);
    const index block = fitting < most_partial_rows ? fitting : most_partial_rows;
    if (height > block && !rows_first) {
      const index blocks = (height + block - 1) / block;
      // An even number of passes ends at the panel where it began.
      if (blocks % 2 == 0) backwards = false;
      for (index n = 0; n < blocks; ++n, backwards = !backwards) {
        run_blocks({places.begin + height * n / blocks,
                    places.begin + height * (n + 1) / blocks},
                   panels, backwards);
      }
      return;
    }
    if (rows_first) {
      return for_tiles(places, [&](index place, int rows) {
        run_groups(place, rows, panels, 1, backwards);
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
        Pass pass{piece, pieces};
        const bool on = piece + 1 < pieces;
        pass.next_panel = on || done + 1 == count ? panel : panel_at(done + 1);
        pass.next_piece = on ? piece + 1 : 0;
        if (far && (on || done + 1 < count)) pass.prefetch = Pass::next;
        for_tiles(places, [&](index place, int rows) {
          run_tile(place, rows, {panel, panel + 1}, 1, backwards, pass);
          if (++pass.part == product_->width) pass.prefetch = Pass::nothing;
        });
      }
    }
  }

  // A single tile takes several panels at once, evenly divided, so that no panel is
  // alone. Up to a quarter more panels than the cache holds still gain from it.
  void run_single_tile(Range places, Range panels, index bytes, bool backwards) {
    const int rows = static_cast<int>(places.end - places.begin);
    const index count = panels.end - panels.begin;
    const bool beyond = bytes > second_level_cache / 4 * 5;
    const bool reading = rows == 1 ? bytes > first_level_cache / 3 * 4 : beyond;
    const int most = (reading ? product_->far : product_->near)[rows];
    const int groups = (static_cast<int>(count) + most - 1) / most;
    const int together = (static_cast<int>(count) + groups - 1) / groups;
    if (!beyond) return run_groups(places.begin, rows, panels, together, backwards);
    Pass pass;
    pass.prefetch = Pass::own;
    for (index done = 0; done < count; done += together) {
      const Range some = next(panels, done, together, backwards);
      run_tile(places.begin, rows, some, together, backwards, pass);
    }
  }

  // Returns the next `taken` panels after `done`, from the front or from the back.
  static Range next(Range panels, index done, index taken, bool backwards) {
    const index left = panels.end - panels.begin - done;
    taken = taken < left ? taken : left;
    const index first = backwards ? panels.end - done - taken : panels.begin + done;
    return {first, first + taken};
  }

  // Runs all panels for one tile of rows, as many in a group as there is memory for their
  // sums: a larger group gives the pointwise function more independent work.
  void run_groups(index place, int rows, Range panels, int together, bool backwards) {
    const int count = static_cast<int>(panels.end - panels.begin);
    const int vectors = rows * product_->sums;
    const bool mixes = rows > 1 && together > 1;  // rows within a group of panels
    if (!mixes && count * vectors <= most_vectors) {
      return run_tile(place, rows, panels, together, backwards);
    }
    const int fit = mixes ? together : most_vectors / vectors / together * together;
    const int groups = (count + fit - 1) / fit, each = (count + groups - 1) / groups;
    const int size = (each + together - 1) / together * together;
    for (index done = 0; done < count; done += size) {
      run_tile(place, rows, next(panels, done, size, backwards), together, backwards);
    }
  }

  // Finds the addresses of each role's rows.
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
          // This keeps gcc from computing the addresses as vectors, for which the product
          // would wait (LSTM, B = 8, H = 64: 5% of forward).
          asm("" : "+r"(row));
        }
      }
    }
    for (int n = 0; n < b_.count && b_.terms[0].operand.rows; ++n) {
      const Operand& of = b_.terms[n].operand;
      const char* row = of.rows + place * of.apart;
      for (int r = 0; r < rows; ++r, row += of.apart) operand_[n][r] = row;
      if (of.scale) terms_[n].scale = of.scale + place;
    }
  }

  // Prefetches what the pointwise function reads and writes, whose lines arrive while the
  // product runs.
  void prefetch_rows(index unit, index end) const {
    for (int n = 0; n < b_.prefetched_count; ++n) {
      const auto& [role, parts, first, apart, writes] = b_.prefetched[n];
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

  // Runs some panels of a tile, `together` at once, and then the pointwise function on
  // their units.
  void run_tile(index place, int rows, Range panels, int together, bool backwards,
                const Pass& pass = {}) {
    resolve(place, rows);
    const index sums = product_->sums * lanes, count = panels.end - panels.begin;
    const bool is_last = pass.piece + 1 == pass.pieces;
    const index last_unit = panels.begin * column_units_ + count * tile_.panel_units;
    const index padded_end = last_unit < b_.padded ? last_unit : b_.padded;
    tile_.unit = panels.begin * column_units_;
    tile_.end = padded_end < b_.size ? padded_end : b_.size;
    tile_.row = rows > 1 && together > 1 ? count * sums : sums;
    tile_.panel = rows > 1 && together == 1 ? rows * sums : sums;
    S* const to = pass.pieces > 1 ? partial_sums(place, tile_.row) : sums_;
    if (is_last) prefetch_rows(tile_.unit, padded_end);
    for (index left = count; left > 0;) {
      const index some = left < together ? left : together;
      const index at = backwards ? left - some : count - left;
      multiply(to + at * tile_.panel, panels.begin + at, static_cast<int>(some), pass);
      left -= some;
    }
    if (!is_last) return;
    tile_.sums = to;
    b_.after(*b_.step, tile_);
  }

  void multiply(S* to, index panel, int together, const Pass& pass) {
    const auto& by_panels = product_->multiply[rows_ - 1];
    StartAt start = start_;
    start.height = rows_;
    const char* other_rows[most_tile_rows];
    if (pass.piece > 0) {
      for (int r = 0; r < rows_; ++r) {
        other_rows[r] = reinterpret_cast<char*>(to + r * tile_.row);
      }
      start = {other_rows, 0, lanes, 0, rows_, &configured_};
    } else if (start.panel > 0) {
      const index unit = panel * column_units_;
      start.offset = unit * index{sizeof(S)};
      if (unit + together * column_units_ > b_.padded) {
        start_at_edge(start, other_rows, together, b_.padded - unit);
      }
    }
    if (b_.count > 0 && !b_.terms[0].panels && !packs_) {
      by_panels[together - 1](to, start, terms_, 0);
      return multiply_unpacked(to, panel, together);
    }
    if (pass.pieces > 1 || pass.prefetch != Pass::nothing) {
      return multiply_piece(to, start, panel, together, pass);
    }
    for (int n = 0; n < b_.count; ++n) {
      const Term& of = b_.terms[n];
      terms_[n].right = packs_ ? right_[n] : right_[n] + panel * of.panel_bytes;
      if (of.from > 0) terms_[n].left = left_from(n, of.from);
    }
    by_panels[together - 1](to, start, terms_, b_.count);
  }

  // Multiplies a piece of the panel's depth, or with prefetches.
  FUSEDRNN_LONG void multiply_piece(S* to, const StartAt& start, index panel,
                                    int together, const Pass& pass) {
    int lines = 0;
    for (int n = 0; n < b_.count; ++n) {
      const Term& of = b_.terms[n];
      const auto part_of = [&](index piece) { return of.depth * piece / pass.pieces; };
      const index begin = pass.pieces == 1 ? of.from : part_of(pass.piece);
      const index end = pass.pieces == 1 ? of.K : part_of(pass.piece + 1);
      TermAt& term = terms_[n];
      term.K = begin < of.from ? 0 : end - begin;
      term.left = begin > 0 ? left_from(n, begin) : rows_of_term(n);
      term.right = of.panels + panel * of.panel_bytes + begin * of.k_bytes;
      if (together > 1) continue;
      if (pass.prefetch == Pass::own) {
        constexpr index page = 4096;
        term.ahead = term.right + page;
        lines = product_->width;
      } else if (pass.prefetch == Pass::next) {
        const index next = part_of(pass.next_piece), after = part_of(pass.next_piece + 1);
        const index bytes =
            pass.pieces == 1 ? of.panel_bytes : (after - next) * of.k_bytes;
        term.ahead = of.panels + pass.next_panel * of.panel_bytes + next * of.k_bytes +
                     pass.part * bytes / product_->width;
        lines = 1;
      }
    }
    const auto with = lines == 0   ? product_->multiply[rows_ - 1][together - 1]
                      : lines == 1 ? product_->prefetch_one[rows_ - 1]
                                   : product_->prefetch_all[rows_ - 1];
    with(to, start, terms_, b_.count);
    for (int n = 0; n < b_.count; ++n) {
      const Term& of = b_.terms[n];
      terms_[n].left = rows_of_term(n);
      terms_[n].K = of.K - of.from;
    }
  }

  const char* const* rows_of_term(int n) const {
    return b_.terms[n].operand.rows ? operand_[n] : at_[b_.terms[n].role];
  }
  // Returns the left rows of a term from some k on, in an array that only one term can
  // use.
  const char* const* left_from(int n, index k) {
    const char* const* const rows = rows_of_term(n);
    for (int r = 0; r < rows_; ++r) {
      left_[r] = rows[r] + k * b_.terms[n].left_bytes;
      asm("" : "+r"(left_[r]));
    }
    return left_;
  }

  S* partial_sums(index place, index row) const {
    return reinterpret_cast<S*>(b_.partial_sums) + place % most_partial_rows * row;
  }

  // Copies the start of sums: the last panel of a cell of one gate may end past the
  // padded units.
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

  // Multiplies with the weights as the user has them, for a few rows.
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
