// This is the table of what one instruction set offers for one element type: products by
// the precision of their weights, pointwise functions by cell, packing, small loops.
//
// The time loop (forward.cpp, backward.cpp) is compiled once for all instruction sets,
// cells and element types. It knows steps, threads, masks and time blocks, and calls
// run() once for each product, step and thread. The table's functions know none of these.
// Numbers describe what depends on the cell or on the number of lanes. Memory is counted
// in bytes unless a comment says otherwise.
//
// The header has data and FUSEDRNN_SHARED functions only: another inline function here
// would become a weak symbol in every instruction set's object.
#pragma once

#include <span>
#include <string_view>

#include "../contract.h"
#include "../record.h"

namespace fusedrnn {

constexpr int most_tile_rows = 16, most_roles = 16, most_terms = 3;
// The most rows, of one tile, that are multiplied with weights as the user has them.
constexpr int most_unpacked_rows = 4;
// Returns whether each panel is packed where it is used, without a packing of all.
// `converts`: whether the product converts rows, and reads packed panels alone.
FUSEDRNN_SHARED constexpr bool packs_panels(index rows, int tile, bool converts) {
  return converts || rows > tile || rows > most_unpacked_rows;
}
constexpr int gradient_tiles_at_once = 32;
constexpr index gradient_depth = 256;
constexpr index most_outer_products = 4;  // rows that are added without packing
constexpr index most_partial_rows = 512;  // that share panels larger than a cache

// Rows addresses rows of a matrix by their place in a block of rows: `apart` from one to
// the next, beginning at `first`, in the order of `order` (null: 0, 1, …), or wherever
// at[place] points.
struct Rows {
  char* first;
  index apart;
  const index* order;
  char* const* at;
};

// A role is the part that a row plays in a step.
namespace role {
// clang-format off
enum Forward { x, h_dropped, record, c, h, h_prev, c_prev, cells, trace, next_h_dropped,
               mask, keep_h, keep_c, operand };
enum Backward { da_after, saved, before_h, before_c, dropped_h, dy, dcells, dh, dc,
                direct, da, mask_h, keeps_h, keeps_c, dm, dh0 };
// clang-format on
// A product whose sums are only stored has these roles.
enum Plain { left, to };
}  // namespace role

// A Tile has sums, and the rows and units that they belong to. `sums` holds elements as
// [row][panel][slot][unit of the panel]; where it is null the tile is whole rows of H
// units.
struct Tile {
  index place;  // of its first row
  int rows;
  index unit, end;  // units [unit, end), the first of a panel
  index panel_units;
  const void* sums;
  index row, panel;  // elements from one row of sums to the next, and from panel to panel
  std::uint32_t used;                 // a bit for each role in use
  char* const (*at)[most_tile_rows];  // at[role][row]
};

// Call has the arguments of pointwise functions that stay the same during a call.
struct Call {
  Model model;
  Options options;
  Vectors<const char> vectors;  // with blocks padded to P elements
  index P;                      // elements of a padded row of units
  const char* bias;             // (slots, P)
  const char* bounds;           // of clip: 5 elements
  bool saves;                   // whether the slots are kept for backward
  bool has_direct;  // whether a part of dh bypasses the product, else it is zero
  // saved_c is the element of a record where c begins, if backward with options reads
  // it, or -1 if it computes c again from the gates, which are exact then.
  index saved_c = -1;
  GradientRow gradient;
};

// Put says where sums of a tile are stored, in elements: slots [begin, end) of a unit go
// to `offset` + slot * apart in the row of a role, in whole vectors if `padded`, else up
// to unit `size`.
struct Put {
  int role, begin, end;
  index offset, apart, size;
  bool padded;
};

// Step has the arguments of a pointwise function beside its tile.
struct Step {
  const Call* call;
  Put put;
  // cut[place]: whether no gradient passes from this step to the one before;
  // cut_after[place]: from the step after to this one. Or null.
  const bool *cut, *cut_after;
  bool has_product;  // whether dh has a part that comes through R
  bool adds_direct;  // whether dh has a part that bypasses R
  char* scratch;     // of the thread: (2 + slots, P) for each row of a tile
};

using Pointwise = void (*)(const Step&, const Tile&);

// A Matrix is weights as the user has them, (blocks·H, K), with the blocks of a panel's
// slots.
struct Matrix {
  const char* weight;
  const int* blocks;  // of the slots
  int slots;
  index H, K, P;
  index item = 0;                // bytes of an element
  const float* scale = nullptr;  // (blocks·H) where weights have scales
};

// An Operand is rows that were converted for a product, by place: the first row, the
// bytes from one to the next, and the scale of each row.
struct Operand {
  char* rows;
  index apart;
  float* scale;
};

// A Term is one term of a sum: Σ_k left(row, k) · right(k, column), for k from `from` to
// K.
struct Term {
  int role;            // the rows on the left, from k = 0 on
  const char* panels;  // packed, `depth` deep; or null, and then
  const Matrix* matrix;
  index panel_bytes, k_bytes;  // of a panel, and of one k of it
  index K, depth, from;
  int column;       // the column of each panel's sums that its first column adds to
  Operand operand;  // the rows of the role, where the product does not read them in place
  index left_bytes;  // of an element of a row on the left
};

// TermAt has the addresses of a term of a tile, and of memory that is prefetched
// meanwhile.
struct TermAt {
  const char* const* left;  // of each row, at the first k
  const char* right;        // of the first panel, at the first k
  index K;
  index panel;        // bytes from one panel to the next
  const char* ahead;  // prefetched, one vector for each k and line; or null
  int column;
  const float* scale;  // of the tile's rows, where the product has scales
};

// StartAt has the addresses of the values at which the sums of a tile start.
struct StartAt {
  const char* const* rows;  // of each row, `offset` bytes before its start
  index offset;
  index slot, panel;  // elements from one vector of a panel to the next, and from panel
                      // to panel
  int height;         // rows of the tile
  int* configured;    // the rows that a matrix unit's state is for, 0 after enter()
};

// A PanelProduct multiplies panels of `width` vectors for each k, which go into `sums`
// vectors of a tile. It computes one tile: to[row][panel][sum] = start + the terms.
struct PanelProduct {
  using Multiply = void (*)(void* to, const StartAt& start, const TermAt* terms,
                            int count);
  static constexpr int most_together = 12;

  int width, sums;
  int tile;  // rows at most
  // The number of panels at once for a tile of so many rows: `near` if panels come from
  // the first-level cache, `far` if reading them takes longer.
  std::int8_t near[most_tile_rows + 1], far[most_tile_rows + 1];
  // The functions by rows and panels, both less one. For one panel there are also
  // functions that prefetch one vector, or `width` vectors, for each k.
  Multiply multiply[most_tile_rows][most_together];
  Multiply prefetch_one[most_tile_rows], prefetch_all[most_tile_rows];
};

// A Target is the gradient of a matrix, in blocks of `units` rows, which belong to the
// columns of da from `begin` on, in the order `order`. A block has `padded` columns of
// da.
struct Target {
  index begin;
  int blocks;
  const int* order;
  index units, padded;
  const char* right;  // panels
  index N;
  char* dweight;  // (blocks·units, N), or null
  index item;     // bytes of its elements: of bfloat16 only if all rows are added at once
};

// Gradients has the functions that compute the gradients of weights of a block of depth.
// Rows are da, which has the element type, x and h', whose elements have `item` bytes.
struct Gradients {
  int tile;  // columns of da
  void (*pack_right)(const char* const* rows, index item, Range own, index depth, index N,
                     char* to);
  void (*pack_left)(const char* const* rows, index depth, Range columns, char* to);
  void (*add_products)(const char* left, index depth, Range columns, const Target&,
                       bool first);
  // Adds the same from few rows, for which packing takes longer than the sums.
  void (*add_outer_products)(const char* const* da, const char* const* right, index item,
                             index depth, Range columns, const Target&, bool first);
};

// Halves has the functions of a product for calls whose x, y and saved values are
// bfloat16. Weights are bfloat16 or float32.
struct Halves {
  // Copies rows of bfloat16 to operands, as Product::put_left does rows of float32.
  void (*put_left)(const Rows& rows, Range places, index K, const Operand* to, int count);
  Gradients gradients;
  // Convert n elements to float32 and, rounded, from float32.
  void (*widen)(const char* from, index n, char* to);
  void (*narrow)(const char* from, index n, char* to);
};

// A Product belongs to one precision of weights: one packing, several kernels. A new
// precision is one more Product.
struct Product {
  Precision precision;
  std::string_view unit;  // that multiplies
  int grain;              // K is padded to a multiple of it
  int operand_bytes;      // of an element of an operand; 0 if rows are read in place
  std::span<const PanelProduct> panels;
  // Returns the bytes of one panel of `width` vectors.
  index (*panel_bytes)(int width, index K);
  // Packs panels [begin, end) of a matrix to `to`, each `unit_vectors` vectors of units
  // of every slot.
  void (*pack)(const Matrix&, int unit_vectors, Range panels, char* to);
  // Packs the transposed matrix to panels of two vectors; for the element's own precision
  // the last panel has one if that is enough. Null in a product for inference.
  void (*pack_transposed)(const Matrix&, Range panels, char* to);
  // Converts rows of K elements at some places to `count` operands, left_bytes(K) apart.
  // If null, rows are read where they lie. A product that reads whole tiles, as a matrix
  // unit does, finds `tile` rows there, the last of which are unspecified.
  index (*left_bytes)(index K);
  void (*put_left)(const Rows& rows, Range places, index K, const Operand* to, int count);
  // A thread calls these before and after its products; or null.
  void (*enter)();
  void (*leave)();
  // Does `rounds` rounds of the unit's operation on registers, and returns the number of
  // multiplications and additions; or null for the FMA of Probes.
  double (*probe)(index rounds);
  const Halves* halves;  // of bfloat16, else null
};

// A Block is one product of a step, or of a time block, for the rows and panels of a
// thread.
struct Block {
  const Product* product;
  const PanelProduct *panel_product, *narrow_product;  // narrow: for a last panel
  Term terms[most_terms];
  int count;
  int width, unit_vectors;  // of a panel
  Range places, panels;
  index size;       // units, the columns of the result
  bool transposed;  // whether weights are transposed; then a last panel may be narrow
  index row_bytes, panel_bytes;
  int pieces = 1;  // of a panel's depth, if many tiles share the panel
  bool backwards = false;
  char* partial_sums;  // if pieces > 1: memory for the sums between pieces
  char* panel_memory;  // without packed panels: memory for one panel of each term
  // The sums start at a record's slots, else at the bias, else at zero.
  int start_role = -1;
  const char* start = nullptr;
  index start_slot = 0;  // elements
  index padded;          // elements of a padded row of units
  Rows rows[most_roles];
  std::uint32_t used;  // a bit for each role
  bool has_options;    // whether pointwise functions read unused roles, which are null
  // These parts of rows are prefetched while the product runs: `parts` of them, the first
  // at `first`, each `apart` elements after the one before.
  struct PrefetchedRow {
    int role, parts;
    index first, apart;
    bool writes;
  } prefetched[5];
  int prefetched_count = 0;
  Pointwise after;
  const Step* step;
};

// ZoneoutDraw has the arguments of the draw of zoneout: which units of rows b[n] of the
// batch keep their h and c at a time, as 1 or 0. Rows are `apart` bytes apart.
struct ZoneoutDraw {
  const Options* options;
  bool has_c;
  index time;
  Range units;
  const index* b;
  index first_b, rows;  // where b is null: b = first_b + n
  char *keep_h, *keep_c;
  index apart;
};

// CellKernels has a cell's pointwise functions, forward and backward by what options
// change. Those of whole rows are for LayerNorm, and take up to `rows_at_once` rows.
struct CellKernels {
  Shape shape;
  std::string_view name;
  // These functions take tiles of R h' (+ W x), and of a second product.
  Pointwise forward[changes::all + 1], open, close;
  // Functions of whole rows.
  Pointwise normalise_inputs, normalised_forward, normalised_close, renormalise;
  // These functions take tiles of dh, and of the results of a projection or second
  // product.
  Pointwise backward[changes::all + 1], projected_backward, open_backward, close_backward;
  // Functions of whole rows.
  Pointwise normalised_backward, normalised_open_backward, normalised_close_backward;
};

struct Kernels {
  index size;  // bytes of an element
  int lanes;
  Product product;  // of the element's own precision
  Gradients gradients;
  std::span<const CellKernels> cells;

  void (*run)(const Block&);
  // Calls a pointwise function for whole rows, `rows_at_once` at a time.
  void (*walk)(const Block&, int rows_at_once);

  // These functions take tiles of any product.
  Pointwise put, finish, store_dh0, store_dh;

  void (*bounds)(const Options&, char* to);
  void (*draw_zoneout)(const ZoneoutDraw&);
  void (*draw_recurrent)(const Options&, index b, index R, char* to);
  void (*multiply_rows)(const char* a, const char* b, index n, char* to);
  void (*fill)(double value, index n, char* to);
  void (*drop_out)(const Dropout<char>&, Range rows, index first);

  void (*pack_bias)(const Shape&, const Parameters<char>&, index P, char* to);

  // These functions compute the gradients of biases of a block of depth.
  void (*add_columns)(const char* const* a, const char* const* b, index depth, Range own,
                      char* to, bool first, bool continues);
  void (*write_biases)(const Shape&, const char* sums, index P, index H, Range own,
                       char* dbias_ih, char* dbias_hh);
};

// MathEntry is an elementwise function of the cells, for the tests of their accuracy.
struct MathEntry {
  std::string_view name;
  void (*f32)(const float* x, float* y, index n);
  void (*f64)(const double* x, double* y, index n);
};

// Probes measure the limits of a core (isa/probe.h), for src/fusedrnn/floor.py.
struct Probes {
  double (*multiply_add_f32)(index rounds);
  double (*multiply_add_f64)(index rounds);
  float (*read)(const float* p, index n, index rounds);
};

// Base is all that is compiled for one kind of vectors.
struct Base {
  const Kernels *f32, *f64;
  std::span<const MathEntry> math;
  Probes probes;
};

// Narrow has the products of weights that are narrower than float32, by Precision, as far
// as they need the instructions that they were compiled for; the others are null.
struct Narrow {
  const Product* of[precisions];
};

// An Isa has a name that a user can choose: vectors, and the units beside them.
struct Isa {
  std::string_view name;
  const Base* base;
  Narrow narrow;
};

}  // namespace fusedrnn
