// TensorLayers calls layers with PyTorch's tensors. It reads and creates them by
// PyTorch's stable C functions, which it looks up at run time: no part of PyTorch is
// compiled in or linked.
//
// As in layers.h a call takes unchecked arguments, and returns None if it cannot read one
// of them.
#pragma once

#include "layers.h"

namespace fusedrnn {

// AxesOf is the order of axes of x and of the arrays that belong to it.
enum class AxesOf : int { sequence, batch_first, step };

class TensorLayers {
 public:
  // sizes: I, H, R. `kinds` has a bit for each parameter that a direction has. `halves`:
  // calls compute as with x of bfloat16, whatever its type.
  TensorLayers(std::string cell, std::array<index, 3> sizes, int layers, int directions,
               unsigned kinds, bool reverse, bool halves);

  // Returns how many values of `item` bytes a training call saves for each row of a step.
  index saved_values(index item, const py::object& options) const;

  // Takes x and hx as a module's user passes them and returns the module's results.
  // Returns None also where something other than autograd observes calls, and False,
  // before it reads any argument, where autograd records the call.
  py::object infer(const py::handle& x, const py::handle& hx, const py::list& parameters,
                   int axes, const py::object& options) const;

  // Returns (y, h_n, c_n, cells, trace, saved), with empty tensors for results that the
  // call does not have. x is (T, B, I). With `step`, x is (B, I), and the result is (h,
  // saved) or (h, c, saved), where states have no axis of layers.
  py::object forward(const py::handle& x, const py::handle& h0, const py::handle& c0,
                     const py::sequence& parameters, const py::handle& lengths,
                     const py::handle& resets, const py::handle& mask,
                     const py::object& options, bool saves, bool step) const;
  // Returns the wanted gradients of x, h0, c0 and the parameters, in a list.
  py::object backward(const py::sequence& wanted, const py::sequence& d,
                      const py::handle& y, const py::handle& cells,
                      const py::handle& saved, const py::handle& x, const py::handle& h0,
                      const py::handle& c0, const py::sequence& parameters,
                      const py::handle& lengths, const py::handle& resets,
                      const py::handle& mask, const py::object& options, bool step) const;
  py::tuple arguments() const;

 private:
  // `item`: bytes of an element of the parameters, in halves.
  Stack stack(index element, bool halves, index item,
              const std::vector<const char*>& parameters) const;
  bool collect(class TensorReader& reader, const py::handle& x, const py::handle& h0,
               const py::handle& c0, const py::sequence& parameters,
               const py::handle& lengths, const py::handle& resets,
               const py::handle& mask) const;
  // `wide` gets states that are not float32.
  bool read(TensorReader& reader, StackCall& call, std::vector<const char*>& addresses,
            Memory (&wide)[2], AxesOf axes) const;
  Axes parameter_axes(index at, int kind) const;

  const std::string cell_;
  const index I_, H_, R_;
  const int layers_, directions_;
  const unsigned kinds_;
  const bool reverse_, halves_;
  int gates_, peepholes_;  // blocks of the user's parameters
  bool has_c_;
};

void bind_tensors(py::module_& m);

}  // namespace fusedrnn
