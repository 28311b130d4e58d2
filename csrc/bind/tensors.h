// Calls of layers with PyTorch's tensors, which are read and made by the C functions that
// PyTorch keeps for others, found at run time: nothing of it is compiled in or linked.
//
// As in layers.h a call takes its arguments as they come, and returns None where one of
// them needs a look.
#pragma once

#include "layers.h"

namespace fusedrnn {

// Where the axes of x are, and of what belongs to it.
enum class AxesOf : int { sequence, batch_first, step };

class TensorLayers {
 public:
  // sizes: I, H, R. `kinds` has a bit for each parameter that a direction has.
  TensorLayers(std::string cell, std::array<index, 3> sizes, int layers, int directions,
               unsigned kinds, bool reverse);

  // Values that a training call leaves to backward for each row of a step.
  index saved_values(bool is_double, const py::object& options) const;

  // x and hx as a module's user gives them: what the user gets. None also where anything
  // but autograd looks at the call, False, with no look at the arguments, where autograd
  // does.
  py::object infer(const py::handle& x, const py::handle& hx, const py::list& parameters,
                   int axes, const py::object& options) const;

  // (y, h_n, c_n, cells, trace, saved), empty tensors for what the call does not have;
  // x is (T, B, I). With `step` x is (B, I) and the result is (h, saved) or (h, c,
  // saved), states without an axis of layers.
  py::object forward(const py::handle& x, const py::handle& h0, const py::handle& c0,
                     const py::sequence& parameters, const py::handle& lengths,
                     const py::handle& resets, const py::object& options, bool saves,
                     bool step) const;
  // The gradients that are wanted of x, h0, c0 and the parameters, in a list.
  py::object backward(const py::sequence& wanted, const py::sequence& d,
                      const py::handle& y, const py::handle& cells,
                      const py::handle& saved, const py::handle& x, const py::handle& h0,
                      const py::handle& c0, const py::sequence& parameters,
                      const py::handle& lengths, const py::handle& resets,
                      const py::object& options, bool step) const;
  py::tuple arguments() const;

 private:
  Stack stack(index element, const std::vector<const char*>& parameters) const;
  bool collect(class TensorReader& reader, const py::handle& x, const py::handle& h0,
               const py::handle& c0, const py::sequence& parameters,
               const py::handle& lengths, const py::handle& resets) const;
  bool read(TensorReader& reader, StackCall& call, std::vector<const char*>& addresses,
            AxesOf axes) const;
  Axes parameter_axes(index at, int kind) const;

  const std::string cell_;
  const index I_, H_, R_;
  const int layers_, directions_;
  const unsigned kinds_;
  const bool reverse_;
  int gates_, peepholes_;  // blocks of the user's parameters
  bool has_c_;
};

void bind_tensors(py::module_& m);

}  // namespace fusedrnn
