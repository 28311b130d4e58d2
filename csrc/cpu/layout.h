// This header has the offsets and sizes of everything for a cell, an element type and an
// instruction set, in bytes unless a name says otherwise. It also builds the products of
// a step, complete but for their rows.
//
//   packed forward    bias (slots, P) | W panels | R panels | panels of a second product
//   packed backward   Wᵀ panels | Rᵀ panels | panels of a projection
//
// A second product is a projection, or the one that a cell declares.
#pragma once

#include <limits>

#include "schedule.h"

namespace fusedrnn {

// Forward is a call as the time loop takes it: strides are in bytes, arrays are the
// user's.
struct Forward : ForwardOf<char> {
  Masks masks;
  index x_item, weight_item;  // bytes of an element of x and of a weight
  bool has_options;           // whether the plain kernels are not enough
  const char* weights;  // packed for forward; the bias alone where weights are unpacked
  bool unpacked;
  // If layers run side by side: how many steps of x and of y are done, and the most steps
  // of a time block, or 0.
  const Progress* input;
  Progress* progress;
  index most_steps;
};
struct Backward : BackwardOf<char> {
  Masks masks;
  index x_item, weight_item;  // bytes of an element of x and dx, and of a weight
  index gradient_item;        // of dweight_ih and dweight_hh
  bool has_options;
  const char* weights;          // packed for backward, or null: unpacked
  const char* forward_weights;  // packed for forward, where there are options
  const Progress* input;        // of dy; progress: of dx; counted from the last step
  Progress* progress;
};

// Returns the parts of a cell that a call's options change. `returns_gates`: the call
// returns cells or gates.
template <class Problem>
int changed_by(const Problem& p, bool returns_gates) {
  if (!p.has_options) return changes::nothing;
  constexpr double none = std::numeric_limits<double>::infinity();
  const Options& o = p.options;
  const bool gates = o.clip < none || o.cell_clip < none || p.vectors.weight_ch;
  const bool states = zones_out(o) || drops(o) || p.model.projects || returns_gates;
  const int found = gates * changes::gates + states * changes::states +
                    replaces(o.activations) * changes::activations;
  // A call with changes of several kinds has the function for all of them.
  if (found & (found - 1)) return changes::all;
  return found ? found : changes::states;
}

constexpr unsigned bit(int role) { return 1u << role; }  // of Block::used

struct Layout {
  const Kernels& k;
  const Product& product;
  int input_operands;  // that add up to a row of a layer's input
  const CellKernels& cell;
  const Shape& shape;
  Model model;
  const Halves* halves;  // where x, y and saved values are bfloat16, else null
  index size, lanes, I, H, R, P;
  index item;                     // bytes of an element of y
  int unit_vectors, width, sums;  // of a forward panel
  index panel_units;              // units of one
  Record record, saved;           // saved: in halves, padded to whole vectors alone
  Matrix of_input, of_recurrent, of_second;  // their weights are null

  // `operands`: of a layer's input, where the product converts rows.
  Layout(const Kernels& kernels, const Product& of_weights, int operands,
         const CellKernels& of_cell, const Model& m, bool in_halves = false)
      : k(kernels),
        product(of_weights),
        input_operands(operands),
        cell(of_cell),
        shape(of_cell.shape),
        model(m),
        halves(in_halves ? of_weights.halves : nullptr),
        size(kernels.size),
        lanes(kernels.lanes),
        I(m.I),
        H(m.H),
        R(m.R),
        P(round_up(m.H,
                   in_halves && of_weights.grain > lanes ? of_weights.grain : lanes)),
        item(in_halves ? 2 : kernels.size),
        unit_vectors(shape.unit_vectors()),
        width(shape.gates * unit_vectors),
        sums(shape.slots * unit_vectors),
        panel_units(unit_vectors * lanes),
        record(shape, m.norm, P),
        saved(shape, m.norm, round_up(m.H, lanes)),
        of_input{nullptr, shape.input + shape.first_input(), shape.gates, H, I, P},
        of_recurrent{nullptr, shape.recurrent, shape.gates, H, R, P},
        of_second{nullptr, &first_block,
                  1,       m.projects ? R : H,
                  H,       round_up(m.projects ? R : H, lanes)} {
    if (!m.projects && shape.has_second()) {
      of_second.blocks = shape.recurrent + shape.differs.second;
    }
  }

  index bytes(index values) const { return values * size; }
  // Returns the bytes from one row of so many values to the next. They are no multiple of
  // 1 KB, which would make rows compete for the same few sets of a cache.
  index row_bytes(index values) const { return apart(bytes(values)); }
  static index apart(index of) { return of % 1024 == 0 ? of + 64 : of; }
  index record_bytes() const { return row_bytes(record.values()); }
  // A record is saved as it is or, in halves, as c and LayerNorm's statistics, which stay
  // float32, followed by everything else.
  index saved_record_bytes() const {
    return halves ? apart(saved_halves() + saved.cell() * item) : record_bytes();
  }
  index saved_halves() const { return bytes(saved.values() - saved.cell()); }
  index saved_cell() const { return halves ? 0 : bytes(record.cell()); }
  index padded_bytes() const { return bytes(P); }

  // Forward
  index panels() const { return (H + panel_units - 1) / panel_units; }
  index panel_bytes(index K) const { return product.panel_bytes(width, K); }
  index bias_bytes() const { return bytes(shape.slots * P); }
  index input_panels() const { return bias_bytes(); }
  index recurrent_panels() const { return input_panels() + panels() * panel_bytes(I); }
  index second_panels() const { return recurrent_panels() + panels() * panel_bytes(R); }
  bool has_second() const { return model.projects || shape.has_second(); }
  index dense_units() const { return 2 * lanes; }  // of a panel of a second product
  index dense_panels(index N) const { return (N + dense_units() - 1) / dense_units(); }
  index second_panel_bytes() const { return product.panel_bytes(2, H); }
  index forward_bytes() const {
    const index of_second_product = dense_panels(of_second.H) * second_panel_bytes();
    return second_panels() + (has_second() ? of_second_product : 0);
  }
  // Returns the bytes of a weight as the user has it.
  index weight_item(const Parameters<char>& p) const {
    constexpr index narrow[precisions] = {0, 1, 2, 2};
    const index of = narrow[static_cast<int>(product.precision)];
    return p.item ? p.item : of ? of : size;
  }
  int tile_rows() const { return find(width, sums).tile; }
  // Returns whether rows are converted for the products.
  bool converts() const { return product.put_left != nullptr; }

  // Backward
  index back_depth() const { return shape.gates * P; }
  index back_panel_bytes() const { return product.panel_bytes(2, back_depth()); }
  index back_bytes(index N) const {
    if (halves) return dense_panels(N) * back_panel_bytes();
    return bytes(back_depth() * round_up(N, lanes));
  }
  index back_recurrent() const { return back_bytes(I); }
  index back_projection() const { return back_recurrent() + back_bytes(R); }
  index backward_bytes() const {
    const index of_projection =
        halves ? dense_panels(H) * product.panel_bytes(2, round_up(R, lanes))
               : bytes(round_up(R, lanes) * round_up(H, lanes));
    return back_projection() + (model.projects ? of_projection : 0);
  }
  int back_tile() const { return find(2, 2).tile; }
  const Gradients& gradients() const { return halves ? halves->gradients : k.gradients; }

  const PanelProduct& find(int of_width, int of_sums) const {
    const PanelProduct* found = product.panels.data();
    while (found->width != of_width || found->sums != of_sums) ++found;
    return *found;
  }

  // Returns the block of W x, R h' or both, whose sums start at the bias, at a record or,
  // with LayerNorm, at zero.
  Block forward_block(const char* weights, const Matrix* unpacked, bool with_x,
                      bool with_h) const;
  // Returns the second product of a step: operand · weight.
  Block second_block(const char* weights) const;
  // Returns da · weights for N columns, of the slots from `first_slot` on.
  Block backward_block(const char* panels, const Matrix* unpacked, index N,
                       int first_slot) const;
  // Returns the product of rows of a gradient, `depth` values of which K count, with one
  // matrix of H columns.
  Block dense_backward_block(const char* panels, index depth, index K) const;

 private:
  static constexpr int first_block = 0;

  // Returns a product of one term with a matrix of N columns, in panels of two vectors.
  Block dense_block(int role, const char* panels, index depth, index N) const;
};

inline Matrix with_weight(Matrix of, const char* weight, index item = 0,
                          const float* scale = nullptr) {
  of.weight = weight;
  of.item = item;
  of.scale = scale;
  return of;
}

// In halves, save_record copies some units of a record to a saved row, where c is
// already, and load_record copies both back. LayerNorm's statistics go with any units.
void save_record(const Layout& layout, const char* record, Range units, char* saved);
void load_record(const Layout& layout, const char* saved, Range units, char* record);

// Applies dropout to rows whose elements have `item` bytes.
void drop_rows(const Layout& layout, const Dropout<char>& problem, index item,
               Range rows);

// Returns how many rows LayerNorm takes together: enough for their sums to run side by
// side, few enough to stay in the first-level cache.
inline int rows_at_once(const Layout& l) {
  constexpr index values = 2048;
  const index fit = values / l.P > 2 ? values / l.P : 2;
  const index most = l.lanes < most_tile_rows ? l.lanes : most_tile_rows;
  return static_cast<int>(fit < most ? fit : most);
}

// pad_vectors copies vectors with their blocks padded by zeros to padded_vectors_bytes()
// of memory.
index padded_vectors_bytes(const Layout& layout, const Vectors<const char>& vectors);
Vectors<const char> pad_vectors(const Layout& layout, const Vectors<const char>& vectors,
                                char* to);

// Returns the arguments of a call that pointwise functions read.
Call call_of(const Layout& layout, const ForwardOf<char>& p, const char* bias,
             const char* bounds);

// Blocks has the rows and panels of each thread. The rows are split only if every thread
// gets full tiles and the recurrent weights fit a core's own cache.
struct Blocks {
  bool by_rows;
  bool alone;  // no other thread computes what this one reads
  Schedule rows;
  Range panels;

  Blocks(const Layout& layout, const Sizes& p, const Masks& masks, index panels_total,
         int tile, const Team& team, index* memory)
      : by_rows(cuts_rows(layout, p, panels_total, tile, team.count)),
        alone(by_rows || team.count == 1),
        rows(p, masks, by_rows ? team : Team::single(), memory),
        panels(by_rows ? Range{0, panels_total} : team.share(panels_total)) {}

  static bool cuts_rows(const Layout& layout, const Sizes& p, index panels_total,
                        int tile, int threads) {
    constexpr index own_cache = 512 * 1024;
    const bool fits = layout.panels() * layout.panel_bytes(layout.R) <= own_cache;
    return p.B >= tile * threads && (fits || panels_total < threads);
  }
  void meet(const Team& team) const {
    if (!alone) team.meet();
  }
  // Returns this thread's part of n items that all threads of a block share.
  Range share(const Team& team, index n) const {
    return alone ? Range{0, n} : team.share(n);
  }
};

// Zoneout has the fraction of its old state that each unit of a thread's rows keeps: the
// expectation, in one row for all, or a new draw before each use.
class Zoneout {
  const Layout& layout_;
  const Options& options_;
  char *expected_, *drawn_;

  index group() const { return (layout_.shape.has_c ? 2 : 4) * 16; }
  bool draws() const { return options_.training && zones_out(options_); }

 public:
  Zoneout(const Layout& layout, const Options& options, char* memory)
      : layout_(layout),
        options_(options),
        expected_(memory),
        drawn_(memory + 2 * layout.padded_bytes()) {}
  // Returns the bytes for one thread: two rows of expectations and, if it draws, h and c
  // of all the units that it can own.
  static index bytes(const Layout& layout, const Options& options, bool has_options,
                     index B, int threads, bool by_rows);
  void start() const;
  // Draws for places of rows, and points the block's rows at the result.
  void find(Block& block, int role_h, int role_c, const Schedule& rows, Range places,
            index time, Range units) const;
};

// Packing is what is packed: the weights for forward, those for backward, or the biases
// alone, which a forward with unpacked weights needs.
enum class Packing { forward, backward, bias };
index packed_bytes(const Layout& layout, Packing packing);
void pack(const Layout& layout, const Parameters<char>& parameters, Packing packing,
          char* to, const Team& team);

// ForwardPlan is the layout of a forward, for `explain`.
struct ForwardPlan {
  int threads;
  bool by_rows;                 // whether a thread owns rows of the batch, else units
  bool fused;                   // whether W x is part of the step
  index time_block;             // steps whose W x is one product
  index tile_rows, tile_units;  // of a register tile, with all gates of its units
  index saved;                  // bytes per step and row for backward
  index workspace;              // bytes
};

ForwardPlan plan(const Layout& layout, const Forward& p, int threads);
index forward_workspace(const Layout& layout, const Forward& p, int threads);
void forward(const Layout& layout, const Forward& p, char* workspace, const Team& team);
index backward_workspace(const Layout& layout, const Backward& p, int threads);
void backward(const Layout& layout, const Backward& p, char* workspace, const Team& team);

}  // namespace fusedrnn
