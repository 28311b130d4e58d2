// This header has the pointwise functions that follow a product, by cell: on tiles of
// sums, which are still in the first-level cache, and on whole rows. The plain ones are
// written for speed without options; all others are csrc/pointwise.h.
#pragma once

#include "../../cells/all.h"
#include "../../pointwise.h"
#include "../kernels.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// Walk is a thread's walk along rows in vectors: along tiles, or along whole rows for
// LayerNorm.
template <class S_, bool whole_rows, int parts_ = changes::all>
struct Walk {
  using S = S_;
  using V = Vec<S>;
  static constexpr int parts = parts_, lanes = V::lanes, most_rows = most_tile_rows;
  static constexpr bool bias_is_in = true, vectors_are_padded = true;
  static constexpr bool norm(const Model& model) {
    return is_small ? model.norm : whole_rows;
  }

  const S* clip;
  S* from;
  index scratch_row;

  template <class F>
  static void each(Range units, const F& f) {
    for (index u = units.begin; u < units.end; u += lanes) f(u);
  }
  static Range all(index n) { return {0, n}; }
  template <class F>
  static void once(const F& f) {
    f();
  }
  // Sums each row lane by lane, and then its lanes in order, for several rows at once.
  template <class F>
  static void sums(int n, index H, const F& f, S* to) {
    for (int first = 0; first < n; first += lanes) {
      const int rows = n - first < lanes ? n - first : lanes;
      V part[lanes];
      for (int r = 0; r < rows; ++r) {
        V sum = V::broadcast(0);
        index u = 0;
        for (; u + lanes <= H; u += lanes) sum = sum + f(first + r, u);
        if (u < H) {
          S rest[lanes];
          f(first + r, u).store(rest);
          sum = sum + V::load_n(rest, H - u);
        }
        part[r] = sum;
      }
      add_lanes(part, rows, to + first);
    }
  }
  // Adds the lanes of part[r] in order to to[r].
  FUSEDRNN_LONG static void add_lanes(V (&part)[lanes], int rows, S* to) {
    if (rows == 1) {
      S values[lanes];
      part[0].store(values);
      *to = 0;
      for (const S value : values) *to += value;
      return;
    }
    for (int r = rows; r < lanes; ++r) part[r] = V::broadcast(0);
    transpose(part);
    V total = V::broadcast(0);
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) total = total + part[l];
    store_upto(total, to, rows);
  }
  static V load(const S* p, index u) { return V::load(p + u); }
  static void store(V x, S* p, index u) { x.store(p + u); }
  static V upto(const S* p, index u, index n) { return load_upto<V>(p + u, n - u); }
  static void put(V x, S* p, index u, index n) { store_upto(x, p + u, n - u); }
  static V keep_h(const S* p, index u) { return V::load(p + u); }
  static V keep_c(const S* p, index u) { return V::load(p + u); }
  S* scratch(int r) const { return from + r * scratch_row; }
  static V rounded(V x) { return x; }
  void bounds(double, const Activations&, V (&to)[5]) const {
    for (int n = 0; n < 5; ++n) to[n] = V::broadcast(clip[n]);
  }
};

// Returns the elements of a row of a role, null if the role is unused and the block has
// options.
template <class S>
inline S* row_at(const Tile& t, int role, int r) {
  return reinterpret_cast<S*>(t.at[role][r]);
}

// Calls f(sums of row 0 of the panel, units of the panel) for each panel of a tile.
template <class S, class F>
inline void each_panel(const Tile& t, const F& f) {
  const S* sums = static_cast<const S*>(t.sums);
  for (index unit = t.unit; unit < t.end; unit += t.panel_units, sums += t.panel) {
    const index last = unit + t.panel_units;
    f(sums, Range{unit, last < t.end ? last : t.end});
  }
}

// Returns dh of a row's units: the part through R, unless no gradient passes from the
// step after, plus dy, plus the part that bypasses R.
template <class S>
inline Vec<S> complete_dh(const Step& s, const Tile& t, int r, Vec<S> dh, index u) {
  using V = Vec<S>;
  if (s.has_product) {
    const S* const mask = row_at<S>(t, role::mask_h, r);
    if (t.used >> role::mask_h & 1) dh = dh * V::load(mask + u);
    if (s.cut_after && s.cut_after[t.place + r]) dh = V::broadcast(0);
  }
  const S* const dy = row_at<S>(t, role::dy, r);
  if (t.used >> role::dy & 1) dh = dh + load_upto<V>(dy + u, s.call->model.R - u);
  if (s.adds_direct) {
    const bool is_zero = s.has_product && !s.call->has_direct;
    dh = dh + (is_zero ? V::broadcast(0) : V::load(row_at<S>(t, role::direct, r) + u));
  }
  return dh;
}

template <class Cell, class S>
struct Steps {
  using V = Vec<S>;
  template <int parts>
  using TileRows = RowWise<Cell, Walk<S, is_small, parts>>;
  using WholeRows = RowWise<Cell, Walk<S, true>>;
  using Row = ForwardRow<S>;
  using BackRow = BackwardRow<S>;
  static constexpr int lanes = V::lanes, slots = Cell::slots;

  // Arguments has the options as pointwise.h reads them.
  struct Arguments {
    const Model& model;
    const Options& options;
    Vectors<const S> vectors;
  };
  template <class Rows>
  static Rows rows(const Step& s) {
    const Call& call = *s.call;
    const auto of = [](const char* p) { return reinterpret_cast<const S*>(p); };
    const auto& v = call.vectors;
    const Arguments arguments{
        call.model,
        call.options,
        {of(v.weight_ch), of(v.gamma_ih), of(v.gamma_hh), of(v.gamma_c), of(v.beta_c)}};
    S* const scratch = reinterpret_cast<S*>(s.scratch);
    return Rows(arguments, call.P, of(call.bias),
                {of(call.bounds), scratch, (2 + slots) * call.P});
  }
  static Row row(const Tile& t, int r, bool saves = false, const S* sums = nullptr,
                 index apart = 0) {
    return {row_at<S>(t, role::record, r),
            sums,
            apart,
            row_at<S>(t, role::h_prev, r),
            row_at<S>(t, role::c_prev, r),
            row_at<S>(t, role::h_dropped, r),
            row_at<S>(t, role::c, r),
            row_at<S>(t, role::h, r),
            row_at<S>(t, role::cells, r),
            row_at<S>(t, role::trace, r),
            row_at<S>(t, role::next_h_dropped, r),
            row_at<S>(t, role::mask, r),
            row_at<S>(t, role::keep_h, r),
            row_at<S>(t, role::keep_c, r),
            saves ? row_at<S>(t, role::record, r) : nullptr};
  }
  static BackRow back_row(const Step& s, const Tile& t, int r) {
    S* const saved = row_at<S>(t, role::saved, r);
    const index c = s.call->saved_c;
    return {saved,
            row_at<S>(t, role::before_h, r),
            row_at<S>(t, role::before_c, r),
            c < 0 ? nullptr : saved + c,
            row_at<S>(t, role::dropped_h, r),
            row_at<S>(t, role::dcells, r),
            row_at<S>(t, role::dh, r),
            row_at<S>(t, role::dc, r),
            row_at<S>(t, role::direct, r),
            row_at<S>(t, role::da, r),
            s.cut && s.cut[t.place + r],
            row_at<S>(t, role::mask_h, r),
            row_at<S>(t, role::keeps_h, r),
            row_at<S>(t, role::keeps_c, r)};
  }

  static void plain_forward(const Step& s, const Tile& t) {
    const Call& call = *s.call;
    const index P = call.P, H = call.model.H;
    const Plain<V> plain{call.model.variant};
    const bool saves = call.saves;
    each_panel<S>(t, [&](const S* sums, Range units) {
      for (index u = units.begin; u < units.end; u += lanes) {
        const S* a = sums + (u - units.begin);
        const index left = H - u;
        for (int r = 0; r < t.rows; ++r, a += t.row) {
          V v[slots];
          FUSEDRNN_UNROLL
          for (int slot = 0; slot < slots; ++slot)
            v[slot] = V::load(a + slot * t.panel_units);
          State<V> prev{};
          if constexpr (Cell::has_direct) {
            prev.h = load_upto<V>(row_at<S>(t, role::h_dropped, r) + u, left);
          }
          if constexpr (Cell::has_c) prev.c = V::load(row_at<S>(t, role::c_prev, r) + u);
          const State<V> now = Cell::forward(v, prev, plain);
          store_upto(now.h, row_at<S>(t, role::h, r) + u, left);
          if constexpr (Cell::has_c) now.c.store(row_at<S>(t, role::c, r) + u);
          if (saves) {
            S* const record = row_at<S>(t, role::record, r) + u;
            FUSEDRNN_UNROLL
            for (int slot = 0; slot < slots; ++slot) v[slot].store(record + slot * P);
          }
        }
      }
    });
  }

  // Calls f(rows, row, its place in the tile, unit) for each vector and row of a tile.
  template <int parts = changes::all, class F>
  static void each_row(const Step& s, const Tile& t, const F& f) {
    const TileRows<parts> of = rows<TileRows<parts>>(s);
    each_panel<S>(t, [&](const S* sums, Range units) {
      for (index u = units.begin; u < units.end; u += lanes) {
        const S* a = sums - units.begin;
        for (int r = 0; r < t.rows; ++r, a += t.row) {
          f(of, row(t, r, s.call->saves, a, t.panel_units), r, u);
        }
      }
    });
  }
  template <int parts>
  static void forward(const Step& s, const Tile& t) {
    each_row<parts>(s, t, [](const auto& of, const Row& at, int, index u) {
      of.forward(&at, 1, Range{u, u + lanes});
    });
  }
  static void open(const Step& s, const Tile& t) {
    each_row(s, t, [&](const auto& of, const Row& at, int r, index u) {
      S* const operand = row_at<S>(t, role::operand, r);
      of.open(&at, 1, &operand, Range{u, u + lanes});
    });
  }
  static void close(const Step& s, const Tile& t) {
    each_row(s, t, [](const auto& of, const Row& at, int, index u) {
      of.close(&at, 1, Range{u, u + lanes});
    });
  }

  // Calls f for whole rows, with LayerNorm.
  template <class F>
  static void whole(const Step& s, const Tile& t, const F& f) {
    Row all[most_tile_rows];
    for (int r = 0; r < t.rows; ++r) all[r] = row(t, r);
    f(rows<WholeRows>(s), all, t.rows, Range{0, s.call->model.H});
  }
  static void normalise_inputs(const Step& s, const Tile& t) {
    whole(s, t, [](const auto& of, const Row* all, int n, Range) {
      of.normalise_inputs(all, n);
    });
  }
  static void normalised_forward(const Step& s, const Tile& t) {
    whole(s, t, [&](const auto& of, const Row* all, int n, Range units) {
      of.normalise_recurrent(all, n);
      if (!of.has_second()) return of.forward(all, n, units);
      S* operand[most_tile_rows];
      for (int r = 0; r < n; ++r) operand[r] = row_at<S>(t, role::operand, r);
      of.open(all, n, operand, units);
    });
  }
  static void normalised_close(const Step& s, const Tile& t) {
    whole(s, t, [](const auto& of, const Row* all, int n, Range units) {
      of.normalise_second(all, n);
      of.close(all, n, units);
    });
  }
  // Normalises a recomputed record: both products and a second product's operand or,
  // without an operand, the result of the second product.
  static void renormalise(const Step& s, const Tile& t) {
    whole(s, t, [&](const auto& of, const Row* all, int n, Range units) {
      if (!(t.used >> role::operand & 1)) return of.normalise_second(all, n);
      of.normalise_inputs(all, n);
      of.normalise_recurrent(all, n);
      if (!of.has_second()) return;
      S* operand[most_tile_rows];
      for (int r = 0; r < n; ++r) operand[r] = row_at<S>(t, role::operand, r);
      of.open(all, n, operand, units);
    });
  }

  static void plain_backward(const Step& s, const Tile& t) {
    const Call& call = *s.call;
    const index P = call.P, H = call.model.H;
    const Plain<V> plain{call.model.variant};
    each_panel<S>(t, [&](const S* sums, Range units) {
      for (index u = units.begin; u < units.end; u += lanes) {
        const S* a = sums + (u - units.begin);
        const index left = H - u;
        for (int r = 0; r < t.rows; ++r, a += t.row) {
          const V dh = complete_dh<S>(s, t, r, V::load(a), u);
          const S* const saved = row_at<S>(t, role::saved, r) + u;
          V v[slots];
          State<V> prev{};
          V c{}, dc = V::broadcast(0);
          if constexpr (Cell::saves) {
            FUSEDRNN_UNROLL
            for (int slot = 0; slot < slots; ++slot) v[slot] = V::load(saved + slot * P);
          } else {
            v[0] = load_upto<V>(saved, left);
          }
          if constexpr (Cell::has_direct) {
            prev.h = load_upto<V>(row_at<S>(t, role::before_h, r) + u, left);
          }
          if constexpr (Cell::has_c) {
            prev.c = V::load(row_at<S>(t, role::before_c, r) + u);
            c = V::load(saved + slots * P);
            dc = V::load(row_at<S>(t, role::dc, r) + u);
          }
          State<V> d = Cell::backward(v, prev, c, dh, dc, plain);
          S* const da = row_at<S>(t, role::da, r) + u;
          FUSEDRNN_UNROLL
          for (int slot = 0; slot < slots; ++slot)
            store_upto(v[slot], da + slot * P, left);
          if (s.cut && s.cut[t.place + r]) d = {V::broadcast(0), V::broadcast(0)};
          if constexpr (Cell::has_direct) d.h.store(row_at<S>(t, role::direct, r) + u);
          if constexpr (Cell::has_c) d.c.store(row_at<S>(t, role::dc, r) + u);
        }
      }
    });
  }

  // Calls f(rows, row of gradients, its place in the tile, unit, dh) for each vector and
  // row of a tile.
  template <int parts = changes::all, class F>
  static void each_unit(const Step& s, const Tile& t, const F& f) {
    const TileRows<parts> of = rows<TileRows<parts>>(s);
    each_panel<S>(t, [&](const S* sums, Range units) {
      for (index u = units.begin; u < units.end; u += lanes) {
        const S* a = sums + (u - units.begin);
        for (int r = 0; r < t.rows; ++r, a += t.row) {
          f(of, back_row(s, t, r), r, u, V::load(a));
        }
      }
    });
  }
  template <int parts>
  static void backward(const Step& s, const Tile& t) {
    each_unit<parts>(s, t, [&](const auto& of, const BackRow& at, int r, index u, V dh) {
      dh = of.zoneout_backward(at, u, complete_dh<S>(s, t, r, dh, u), s.call->has_direct);
      of.backward(at, s.call->gradient, u, dh);
    });
  }
  static void projected_backward(const Step& s, const Tile& t) {
    each_unit(s, t, [&](const auto& of, const BackRow& at, int, index u, V dm) {
      of.backward(at, s.call->gradient, u, dm);
    });
  }
  static void open_backward(const Step& s, const Tile& t) {
    each_unit(s, t, [&](const auto& of, const BackRow& at, int r, index u, V dh) {
      dh = of.zoneout_backward(at, u, complete_dh<S>(s, t, r, dh, u), s.call->has_direct);
      of.open_backward(at, s.call->gradient, u, dh);
    });
  }
  static void close_backward(const Step& s, const Tile& t) {
    each_unit(s, t, [&](const auto& of, const BackRow& at, int, index u, V d) {
      of.close_backward(at, u, d);
    });
  }

  template <class F>
  static void whole_back(const Step& s, const Tile& t, const F& f) {
    BackRow all[most_tile_rows];
    const S* dm[most_tile_rows];
    for (int r = 0; r < t.rows; ++r) {
      all[r] = back_row(s, t, r);
      dm[r] = row_at<S>(t, role::dm, r);
    }
    f(rows<WholeRows>(s), all, t.rows, dm);
  }
  static void normalised_backward(const Step& s, const Tile& t) {
    whole_back(s, t, [&](const auto& of, const BackRow* all, int n, const S* const* dm) {
      of.backward_normalised(all, n, s.call->gradient, dm);
    });
  }
  static void normalised_open_backward(const Step& s, const Tile& t) {
    whole_back(s, t, [&](const auto& of, const BackRow* all, int n, const S* const* dm) {
      for (int r = 0; r < n; ++r) {
        for (index u = 0; u < of.H; u += lanes) {
          of.open_backward(all[r], s.call->gradient, u, V::load(dm[r] + u));
        }
      }
      of.normalise_second_backward(all, n, s.call->gradient);
    });
  }
  static void normalised_close_backward(const Step& s, const Tile& t) {
    whole_back(s, t, [&](const auto& of, const BackRow* all, int n, const S* const* dm) {
      for (int r = 0; r < n; ++r) {
        for (index u = 0; u < of.H; u += lanes) {
          of.close_backward(all[r], u, V::load(dm[r] + u));
        }
      }
      of.normalise_backward(all, n, s.call->gradient);
    });
  }

  // The functions below are the same for every cell.

  static void put(const Step& s, const Tile& t) {
    const Put& p = s.put;
    each_panel<S>(t, [&](const S* sums, Range units) {
      for (int r = 0; r < t.rows; ++r) {
        S* const row = row_at<S>(t, p.role, r) + p.offset;
        for (int slot = p.begin; slot < p.end; ++slot) {
          const S* const from = sums + r * t.row + slot * t.panel_units - units.begin;
          for (index u = units.begin; u < units.end; u += lanes) {
            const index left = p.padded ? index{lanes} : p.size - u;
            store_upto(V::load(from + u), row + slot * p.apart + u, left);
          }
        }
      }
    });
  }
  static void finish(const Step& s, const Tile& t) {
    each_row(s, t, [](const auto& of, const Row& at, int, index u) {
      of.finish(at, u, V::load(at.sums + u));
    });
  }
  // Stores dh0, the gradient of rows that take no step before this one.
  static void store_dh0(const Step& s, const Tile& t) {
    each_panel<S>(t, [&](const S* sums, Range units) {
      for (int r = 0; r < t.rows; ++r) {
        const S* const a = sums + r * t.row - units.begin;
        for (index u = units.begin; u < units.end; u += lanes) {
          const V dh = complete_dh<S>(s, t, r, V::load(a + u), u);
          store_upto(dh, row_at<S>(t, role::dh0, r) + u, s.call->model.R - u);
        }
      }
    });
  }
  // Stores dh where the cell needs a projection or whole rows first.
  static void store_dh(const Step& s, const Tile& t) {
    each_unit(s, t, [&](const auto& of, const BackRow& at, int r, index u, V dh) {
      dh = of.zoneout_backward(at, u, complete_dh<S>(s, t, r, dh, u), s.call->has_direct);
      dh.store(at.dh + u);
      if (!s.call->model.projects) return;
      store_upto(dh, at.da + s.call->gradient.dh + u, s.call->model.R - u);
    });
  }
};

template <class Cell, class S, int variant>
constexpr CellKernels cell_kernels() {
  using Of = Steps<Cell, S>;
  CellKernels k{};
  k.shape = shape_of<Cell>(variant);
  k.name = Cell::variants[variant].name;
  constexpr int gates = is_small ? changes::all : changes::gates;
  constexpr int states = is_small ? changes::all : changes::states;
  k.forward[changes::nothing] = Of::plain_forward;
  k.forward[changes::gates] = Of::template forward<gates>;
  k.forward[changes::states] = Of::template forward<states>;
  constexpr int activations = is_small ? changes::all : changes::activations;
  k.forward[changes::activations] = Of::template forward<activations>;
  k.forward[changes::all] = Of::template forward<changes::all>;
  k.backward[changes::nothing] = Of::plain_backward;
  k.backward[changes::gates] = Of::template backward<gates>;
  k.backward[changes::states] = Of::template backward<states>;
  k.backward[changes::activations] = Of::template backward<activations>;
  k.backward[changes::all] = Of::template backward<changes::all>;
  if constexpr (Cell::has_c) k.projected_backward = Of::projected_backward;
  if constexpr (Cell::gates > 1) {
    k.normalise_inputs = Of::normalise_inputs;
    k.normalised_forward = Of::normalised_forward;
    k.renormalise = Of::renormalise;
    k.normalised_backward = Of::normalised_backward;
  }
  if constexpr (Cell::variants[variant].second >= 0) {
    k.open = Of::open;
    k.close = Of::close;
    k.normalised_close = Of::normalised_close;
    k.open_backward = Of::open_backward;
    k.close_backward = Of::close_backward;
    k.normalised_open_backward = Of::normalised_open_backward;
    k.normalised_close_backward = Of::normalised_close_backward;
  }
  return k;
}

}  // namespace fusedrnn::FUSEDRNN_ARCH
