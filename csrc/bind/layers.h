// Layers own their weights and run a whole call of all layers: arrays in, arrays out.
//
// A call takes the user's arguments unchecked. If the kernels cannot read one of them as
// it lies, or it is wrong, the call does nothing and returns None; Python then converts
// the argument or raises the error.
#pragma once

#include "../cpu/dispatch.h"
#include "../cpu/stack.h"
#include "arrays.h"

namespace fusedrnn {

// The parameters of a layer in one direction that exist, in the order of
// reference.Parameters.
using Arrays = std::array<MaybeArray, parameter_count>;

// The scales of int8 weights, of weight_ih, weight_hh and weight_hr, and the number of
// operands that add up to a row of x.
using Scales = std::pair<std::array<MaybeArray, 3>, int>;

// CallOptions reads the tuple fusedrnn.reference.Options.
struct CallOptions {
  Options values;
  double weight_dropout;
  bool return_cells, trace, recompute, repeats;

  explicit CallOptions(const py::handle& tuple);
  void put(StackCall& call) const;
};

const CellKernels& find_cell(const Kernels& kernels, std::string_view name);

class Layers {
 public:
  // `layered`: states have an axis of layers and directions. `reverse`: a single
  // direction runs from the end.
  Layers(const std::string& cell, std::vector<Arrays> parameters, int directions,
         double dropout, bool batch_first, bool layered, bool reverse,
         std::vector<Scales> scales);
  Layers(const Layers&) = delete;

  const Stack& stack() const { return stack_; }
  bool batch_first() const { return batch_first_; }
  bool reverse() const { return reverse_; }
  std::string isa() const { return std::string(isa_.name); }
  // Returns how a forward of layer and direction `at` is laid out.
  py::dict plan(index at, index T, index B, const py::object& options) const;
  // Returns how many bytes a training call saves for each row of a step, beside x and
  // results.
  index saved_bytes(const py::object& options) const;

  // Returns (y, state[, cells][, trace]), with `saves` that tuple and a Tape, or None.
  py::object forward(const py::object& x, const py::object& state,
                     const py::object& lengths, const py::object& resets,
                     const py::object& mask, const py::object& options,
                     const py::object& out, bool saves) const;

 private:
  friend class Tape;

  const Layout& layout() const { return stack_.layout(); }
  bool has_c() const { return layout().shape.has_c; }
  Axes state_axes(const Sequence& x, index width) const;
  Axes sequence_axes(const Sequence& x, index width) const;
  // Returns an array of elements of `item` bytes; 0: of the element type.
  Array make(const Axes& axes, index item = 0) const;
  bool read_state(Reader& reader, const py::handle& state, const Sequence& x,
                  const char*& h, const char*& c) const;
  py::object state_of(const Array& h, const MaybeArray& c) const;

  const Isa& isa_;
  const std::vector<Arrays> parameters_;  // read by the stack
  std::vector<Scales> scales_;            // these too
  const bool batch_first_, layered_;
  const bool reverse_;
  Stack stack_;
};

// A Tape runs the backward of a training call. It keeps x and the results that it reads,
// and copies of all other arguments.
class Tape {
 public:
  // Returns (dx, d_state, gradients of the parameters that exist, in order), or None.
  // d_state is a state, None for zeros, or a pair that may have None in it.
  py::object backward(const py::object& dy, const py::object& d_state,
                      const py::object& dcells) const;

 private:
  friend class Layers;

  void keep_state();

  py::object owner_;  // keeps *layers_ alive
  const Layers* layers_;
  Sequence x_, y_, cells_;
  std::vector<py::object> kept_;
  Memory state_, saved_;
  std::vector<index> lengths_;
  Memory resets_, mask_;
  StackCall call_;
};

void bind_layers(py::module_& m);
void bind_onnxruntime(py::module_& m);  // onnxruntime.cpp

}  // namespace fusedrnn
