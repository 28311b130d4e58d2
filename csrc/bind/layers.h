// Layers that own their weights, and a whole call of them: arrays in, arrays out.
//
// A call takes arguments as they come. Where one of them is not as the kernels read it,
// or is wrong, it does nothing and returns None: Python then converts it, or words the
// error.
#pragma once

#include "../cpu/dispatch.h"
#include "../cpu/stack.h"
#include "arrays.h"

namespace fusedrnn {

// The parameters of a layer in one direction that exist, in the order of
// reference.Parameters.
using Arrays = std::array<MaybeArray, parameter_count>;

// fusedrnn.reference.Options as read from its tuple.
struct CallOptions {
  Options values;
  double weight_dropout;
  bool return_cells, trace, recompute;

  explicit CallOptions(const py::handle& tuple);
  void put(StackCall& call) const;
};

const CellKernels& find_cell(const Kernels& kernels, std::string_view name);

class Layers {
 public:
  // `layered`: states have an axis of layers and directions. `reverse`: a single
  // direction goes from the end.
  Layers(const std::string& cell, std::vector<Arrays> parameters, int directions,
         double dropout, bool batch_first, bool layered, bool reverse);
  Layers(const Layers&) = delete;

  std::string isa() const { return std::string(isa_.name); }
  // How a forward of layer and direction `at` is laid out.
  py::dict plan(index at, index T, index B, const py::object& options) const;
  // Values that a training call leaves to backward for each row of a step, beside x and
  // results.
  index saved_values(const py::object& options) const;

  // (y, state[, cells][, trace]), or with `saves` those and a Tape; or None.
  py::object forward(const py::object& x, const py::object& state,
                     const py::object& lengths, const py::object& resets,
                     const py::object& options, const py::object& out, bool saves) const;

 private:
  friend class Tape;

  const Layout& layout() const { return stack_.layout(); }
  bool has_c() const { return layout().shape.has_c; }
  Axes state_axes(const Sequence& x, index width) const;
  Axes sequence_axes(const Sequence& x, index width) const;
  Array make(const Axes& axes) const;
  bool read_state(Reader& reader, const py::handle& state, const Sequence& x,
                  const char*& h, const char*& c) const;
  py::object state_of(const Array& h, const MaybeArray& c) const;

  const Isa& isa_;
  const std::vector<Arrays> parameters_;  // which the stack reads
  const bool batch_first_, layered_;
  const bool reverse_;
  Stack stack_;
};

// What leads back from a training call. It keeps x and the results that it reads, and
// copies of all other arguments.
class Tape {
 public:
  // (dx, d_state, gradients of the parameters that exist, in order), or None. d_state is
  // a state, or None for zeros, or for a pair with None in it.
  py::object backward(const py::object& dy, const py::object& d_state,
                      const py::object& dcells) const;

 private:
  friend class Layers;

  void keep_state();

  py::object owner_;  // of layers_
  const Layers* layers_;
  Sequence x_, y_, cells_;
  std::vector<py::object> kept_;
  Memory state_, saved_;
  std::vector<index> lengths_;
  Memory resets_;
  StackCall call_;
};

void bind_layers(py::module_& m);

}  // namespace fusedrnn
