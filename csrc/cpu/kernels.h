// The table of what one instruction set offers for one element type: products by the
// precision of their weights, pointwise functions by cell, packing, small loops.
//
// The time loop (forward.cpp, backward.cpp) is compiled once for all instruction sets,
// cells and element types. It knows steps, threads, masks and time blocks, and makes one
// call of run() for each product, step and thread. What an instruction set offers knows
// none of these. What depends on the cell or on the number of lanes is a number here, and
// memory is counted in bytes unless a comment says otherwise.
//
// Data only: an inline function here would become a weak symbol in every instruction
// set's object.
#pragma once

#include <span>
#include <string_view>

#include "../contract.h"
#include "../record.h"

namespace fusedrnn {

constexpr int most_tile_rows = 16, most_roles = 16, most_terms = 2;
constexpr int gradient_tiles_at_once = 32;
constexpr index gradient_depth = 256;
constexpr index most_rows_waiting = 512;  // that share panels of more than a cache holds

// Rows of a matrix by their place in a block of rows: those that begin at `first`, so far
// apart, in the order of `order` (null: 0, 1, …), or wherever at[place] points.
struct Rows {
  char* first;
  index apart;
  const index* order;
  char* const* at;
};

// The rows that a step reads and writes, by the part that they play.
namespace role {
// clang-format off
enum Forward { x, seen, record, c, h, h_prev, c_prev, cells, trace, next_seen, mask,
               keep_h, keep_c, operand };
enum Backward { da_after, saved, before_h, before_c, seen_h, dy, dcells, dh, dc, direct,
                da, mask_h, keeps_h, keeps_c, dm, dh0 };
// clang-format on
// Roles of a product that is only stored.
enum Plain { left, to };
}  // namespace role

// A tile of sums, and what a pointwise function needs to know of its rows and units.
// `sums` holds elements as [row][panel][slot][unit of the panel]; where it is null the
// tile is whole rows of H units.
struct Tile {
  index place;  // of its first row
  int rows;
  index unit, end;  // units [unit, end), the first of a panel
  index panel_units;
  const void* sums;
  index row, panel;  // elements from one row of sums to the next, and from panel to panel
  std::uint32_t used;                 // a bit for each role that there is
  char* const (*at)[most_tile_rows];  // at[role][row]
};

// Arguments of pointwise functions that stay the same during a call.
struct Call {
  Model model;
  Options options;
  Vectors<const char> vectors;  // their blocks padded to P elements
  index P;                      // elements of a padded row of units
  const char* bias;             // (slots, P)
  const char* bounds;           // of clip: 4 elements
  bool saves;                   // keep the slots for backward
  bool has_direct;  // whether anything of dh passes the product by: else it is zero
  GradientRow gradient;
};

// The place where sums of a tile are stored: slots [begin, end) of a unit to `offset` +
// slot * apart of the row of a role; whole vectors, or up to unit `size`. In elements.
struct Put {
  int role, begin, end;
  index offset, apart, size;
  bool padded;
};

// Arguments of a pointwise function, beside its tile.
struct Step {
  const Call* call;
  Put put;
  // By place: whether no gradient passes from this step to the one before, and from the
  // one after to this; or null.
  const bool *cut, *cut_after;
  bool has_product;  // whether dh has a part that comes through R
  bool adds_direct;  // and one that passes it
  char* scratch;     // of the thread: (2 + slots, P) for each row of a tile
};

using Pointwise = void (*)(const Step&, const Tile&);

// Weights as the user has them: (blocks·H, K), seen from a panel's slots.
struct Matrix {
  const char* weight;
  const int* blocks;  // of the slots
  int slots;
  index H, K, P;
};

// One term of a sum: Σ_k left(row, k) · right(k, column), for k from `from` to K.
struct Term {
  int role;            // the rows on the left, from k = 0 on
  const char* panels;  // packed, `depth` deep; or null, and then
  const Matrix* matrix;
  index panel_bytes, k_bytes;  // of a panel, and of one k of it
  index K, depth, from;
  int column;  // the column of each panel's sums that its first column adds to
};

// Addresses of a term of a tile, and of the memory that is prefetched meanwhile.
struct TermAt {
  const char* const* left;  // of each row, at the first k
  const char* right;        // of the first panel, at the first k
  index K;
  index panel;        // bytes from one panel to the next
  const char* ahead;  // what is prefetched, a vector for each k and line; or null
  int column;
  const float* scale;  // of the tile's rows
};

// Addresses of the values at which the sums of a tile start.
struct StartAt {
  const char* const* rows;  // of each row, `offset` bytes before its start
  index offset;
  index slot, panel;  // elements from one vector of a panel to the next, and from panel
                      // to panel
};

// A product over panels of `width` vectors for each k that go into `sums` vectors of a
// tile. One tile: to[row][panel][sum] = start + the terms.
struct PanelProduct {
  using Multiply = void (*)(void* to, const StartAt& start, const TermAt* terms,
                            int count);
  static constexpr int most_together = 12;

  int width, sums;
  int tile;  // rows at most
  // Panels at once for a tile of so many rows: where panels come from the first-level
  // cache, and where reading them takes longer.
  std::int8_t near[most_tile_rows + 1], far[most_tile_rows + 1];
  // By rows and panels, both less one; for one panel also with a prefetch of one vector
  // or of `width` vectors for each k.
  Multiply multiply[most_tile_rows][most_together];
  Multiply asks_one[most_tile_rows], asks_all[most_tile_rows];
};

// A product by the precision of its weights: one packing, several kernels. To add a
// precision is to add one of these.
struct Product {
  std::string_view name;
  std::span<const PanelProduct> panels;
  // Bytes of one panel of `width` vectors.
  index (*panel_bytes)(int width, index K);
  // Packs panels [begin, end) of a matrix to `to`, each `unit_vectors` vectors of units
  // of every slot.
  void (*pack)(const Matrix&, int unit_vectors, Range panels, char* to);
  // The rows of a tile as an operand: `count` rows of K elements, put left_bytes(K)
  // apart, with a scale each. Null: rows are read where they lie. A product that reads
  // whole tiles, as a matrix unit does, finds `tile` rows there, the last of them
  // unspecified.
  index (*left_bytes)(index K);
  void (*put_left)(const char* const* rows, index count, index K, char* to, float* scale);
  // Called in a thread before and after its products; or null.
  void (*enter)();
  void (*leave)();
};

// One product of a step, or of a stretch of steps, for the rows and panels of a thread.
struct Block {
  const Product* product;
  const PanelProduct *panel_product, *narrow_product;  // of panels, and of a last one
  Term terms[most_terms];
  int count;
  int width, unit_vectors;  // of a panel
  Range places, panels;
  index size;       // units there are: columns of the result
  bool transposed;  // weights, whose last panel has one vector if that is enough
  index row_bytes, panel_bytes;
  int pieces = 1;  // that a panel's depth is cut into, where many tiles share it
  bool backwards = false;
  char* waiting;   // where pieces > 1: memory for sums that wait for the next piece
  char* operands;  // where the product has put_left: memory for a tile of each term
  // The start of sums: a record's slots, else the bias, else zero.
  int start_role = -1;
  const char* start = nullptr;
  index start_slot = 0;  // elements
  index padded;          // elements of a padded row of units
  Rows rows[most_roles];
  std::uint32_t used;  // a bit for each role
  bool has_options;    // whether pointwise functions look at other roles, which are null
  // Prefetched while the product runs: parts of a row from `first` on, so many elements
  // apart.
  struct Touch {
    int role, parts;
    index first, apart;
    bool writes;
  } touches[5];
  int touch_count = 0;
  Pointwise after;
  const Step* step;
};

// The gradient of a matrix, in blocks of `units` rows that belong to the columns of da
// from `begin` on, in this order.
struct Target {
  index begin;
  int blocks;
  const int* order;
  index units;
  const char* right;  // panels
  index N;
  char* dweight;  // (blocks·units, N), or null
};

// Arguments of the draw of zoneout: the units that keep their h and c at a time, 1 or 0,
// of rows b[n] of the batch, so many bytes apart.
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

// A cell's pointwise functions, forward and backward by what options change. Those of
// whole rows are for LayerNorm, and take up to `rows_at_once` rows.
struct CellKernels {
  Shape shape;
  std::string_view name;
  // Functions of tiles of R h' (+ W x), and of a second product.
  Pointwise forward[changes::all + 1], open, close;
  // Functions of whole rows.
  Pointwise normalise_inputs, normalised_forward, normalised_close, normalise_again;
  // Functions of tiles of dh, and of the results of a projection or second product.
  Pointwise backward[changes::all + 1], projected_backward, open_backward, close_backward;
  // Functions of whole rows.
  Pointwise normalised_backward, normalised_open_backward, normalised_close_backward;
};

struct Kernels {
  index size;  // bytes of an element
  int lanes;
  int gradient_tile;  // columns of da in a tile of the gradients of weights
  Product product;    // of the element's own precision
  std::span<const CellKernels> cells;

  void (*run)(const Block&);
  // Calls a pointwise function for whole rows, so many at a time.
  void (*walk)(const Block&, int rows_at_once);

  // For tiles of any product.
  Pointwise put, finish, leave, before;

  void (*bounds)(double clip, char* to);
  void (*draw_zoneout)(const ZoneoutDraw&);
  void (*draw_recurrent)(const Options&, index b, index R, char* to);
  void (*multiply_rows)(const char* a, const char* b, index n, char* to);
  void (*fill)(double value, index n, char* to);
  void (*drop_out)(const Dropout<char>&, Range rows);

  void (*pack_bias)(const Shape&, const Parameters<char>&, index P, char* to);
  // To panels of two vectors, the last of one if that is enough.
  void (*pack_transposed)(const Matrix&, Range panels, char* to);

  // The gradients of weights, of a block of depth: rows are da, x and h'.
  void (*pack_right)(const char* const* rows, Range own, index depth, index N, char* to);
  void (*pack_left)(const char* const* rows, index depth, Range columns, char* to);
  void (*add_products)(const char* left, index depth, Range columns, const Target&,
                       bool first);
  void (*add_outer_products)(const char* const* da, const char* const* right, index depth,
                             Range columns, index P, const Target&, bool first);
  void (*add_columns)(const char* const* a, const char* const* b, index depth, Range own,
                      char* to, bool first, bool continues);
  void (*write_biases)(const Shape&, const char* sums, index P, index H, Range own,
                       char* dbias_ih, char* dbias_hh);
};

// Elementwise functions of the cells, for the tests of their accuracy.
struct MathEntry {
  std::string_view name;
  void (*f32)(const float* x, float* y, index n);
  void (*f64)(const double* x, double* y, index n);
};

// The limits of a core (isa/probe.h), for the floor (src/fusedrnn/floor.py).
struct Probes {
  double (*multiply_add_f32)(index rounds);
  double (*multiply_add_f64)(index rounds);
  float (*read)(const float* p, index n, index rounds);
};

struct Isa {
  std::string_view name;
  const Kernels *f32, *f64;
  std::span<const MathEntry> math;
  Probes probes;
};

}  // namespace fusedrnn
