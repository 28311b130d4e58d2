// Calls of layers whose arrays are known by their addresses, 0 where there is none.
#pragma once

#include "layers.h"

namespace fusedrnn {

class Caller {
 public:
  // sizes: I, H, R. `parameters` has a bit for each kind that exists.
  Caller(const std::string& cell, index element, std::array<index, 3> sizes, int layers,
         int directions, unsigned parameters);

  // Values that a training call leaves to backward for each row of a step, beside x and
  // results.
  index saved_values(const py::object& options) const;

  // parameters: those that exist, contiguous. given: see start(). Writes made: y, h_n,
  // c_n, cells, trace and what is saved, contiguous.
  void forward(const std::vector<std::uintptr_t>& parameters,
               const std::array<std::uintptr_t, 9>& given, bool reverse,
               const py::object& options,
               const std::array<std::uintptr_t, 6>& made) const;
  // made: y, cells and what is saved. d: the gradients of y, h_n, c_n and cells. Writes
  // to: those of x, h0 and c0, and gradients: those of parameters.
  void backward(const std::vector<std::uintptr_t>& parameters,
                const std::array<std::uintptr_t, 9>& given, bool reverse,
                const py::object& options, const std::array<std::uintptr_t, 3>& made,
                const std::array<std::uintptr_t, 4>& d,
                const std::array<std::uintptr_t, 3>& to,
                const std::vector<std::uintptr_t>& gradients) const;

 private:
  std::size_t addresses() const {
    return static_cast<std::size_t>(layers_ * directions_) * std::popcount(parameters_);
  }
  Stack stack(const std::vector<std::uintptr_t>& addresses) const;
  void start(StackCall& call, const std::array<std::uintptr_t, 9>& given, bool reverse,
             const py::object& options) const;

  const std::string cell_;
  const index element_, I_, H_, R_;
  const int layers_, directions_;
  const unsigned parameters_;
};

void bind_caller(py::module_& m);

}  // namespace fusedrnn
