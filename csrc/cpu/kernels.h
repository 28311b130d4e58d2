// The table that each ISA's translation unit exports: one entry per cell and element
// type.
#pragma once

#include <span>
#include <string_view>

#include "team.h"

namespace fusedrnn {

// How a forward is laid out, to be told to users.
struct ForwardPlan {
  int threads;
  bool by_rows;                 // a thread owns rows of the batch, else hidden units
  bool fused;                   // W x within the step
  index stretch;                // steps whose W x is one product
  index tile_rows, tile_units;  // of a register tile, with all gates of its units
  index saved;                  // values per step and row for backward
  index workspace;              // bytes
};

// Workspaces and packed weights are counted in elements and aligned by the caller.
template <class S>
struct Kernels {
  // `borrow`: only what the kernels need beside the parameters as they are.
  index (*packed_size)(const Model&, bool backward, bool borrow);
  void (*pack)(const Parameters<S>&, bool backward, bool borrow, S* to, const Team&);
  index (*saved_size)(const Model&, const Options&);  // per step and row
  index (*saved_values)(const Model&,
                        const Options&);  // those at its start that are written
  ForwardPlan (*plan)(const Forward<S>&, int threads);
  index (*forward_workspace)(const Forward<S>&, int threads);
  void (*forward)(const Forward<S>&, S* workspace, const Team&);
  index (*backward_workspace)(const Backward<S>&, int threads);
  void (*backward)(const Backward<S>&, S* workspace, const Team&);
};

// The cell's facts that callers outside the kernels need.
struct CellEntry {
  std::string_view name;
  int gates;
  bool has_c;
  int peepholes;  // gates that may see c
  int variant;    // of a cell whose kernels serve several
  Kernels<float> f32;
  Kernels<double> f64;

  template <class S>
  const Kernels<S>& kernels() const {
    if constexpr (sizeof(S) == 4) {
      return f32;
    } else {
      return f64;
    }
  }
};

// Elementwise functions of the cells, for the tests of their accuracy.
struct MathEntry {
  std::string_view name;
  void (*f32)(const float* x, float* y, index n);
  void (*f64)(const double* x, double* y, index n);
};

// What a core can do at most (probe.h), for the floor (src/fusedrnn/floor.py).
struct Probes {
  double (*multiply_add_f32)(index rounds);
  double (*multiply_add_f64)(index rounds);
  float (*read)(const float* p, index n, index rounds);
};

struct Dropouts {
  void (*f32)(const Dropout<float>&, const Team&);
  void (*f64)(const Dropout<double>&, const Team&);
};

struct Isa {
  std::string_view name;
  std::span<const CellEntry> cells;
  Dropouts dropout;
  std::span<const MathEntry> math;
  Probes probes;
};

}  // namespace fusedrnn
