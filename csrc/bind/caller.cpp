// Calls of layers whose arrays are known by their addresses: PyTorch's tensors, which it
// allocates and whose sizes, types and places fusedrnn.torch has checked.
#include "caller.h"

#include <pybind11/stl.h>

namespace fusedrnn {

namespace {

template <class E = const char>
E* at(std::uintptr_t address) {
  return reinterpret_cast<E*>(address);
}

}  // namespace

Caller::Caller(const std::string& cell, index element, std::array<index, 3> sizes,
               int layers, int directions, unsigned parameters)
    : cell_(cell),
      element_(element),
      I_(sizes[0]),
      H_(sizes[1]),
      R_(sizes[2]),
      layers_(layers),
      directions_(directions),
      parameters_(parameters) {}

// Layers for one call: their packings end with it.
Stack Caller::stack(const std::vector<std::uintptr_t>& addresses) const {
  const Isa& isa = active_isa();
  const Kernels& kernels = element_ == 4 ? *isa.f32 : *isa.f64;
  const CellKernels& cell = find_cell(kernels, cell_);
  Stack stack{{}, directions_, 0};
  stack.weights.reserve(layers_ * directions_);
  auto next = addresses.begin();
  for (index n = 0; n < layers_ * directions_; ++n) {
    const char* p[parameter_count] = {};
    for (int kind = 0; kind < parameter_count; ++kind) {
      if (parameters_ >> kind & 1) p[kind] = at(*next++);
    }
    const index I = n < directions_ ? I_ : directions_ * R_;
    const bool projects = parameters_ >> 4 & 1, norm = parameters_ >> 6 & 1;
    const Model model{I, H_, R_, cell.shape.variant, projects, norm};
    stack.weights.push_back(std::make_unique<const Weights>(
        kernels, cell, Parameters<char>{model, p[0], p[1], p[2], p[3], p[4]},
        Vectors<const char>{p[5], p[6], p[7], p[8], p[9]}));
  }
  return stack;
}

index Caller::saved_values(const py::object& options) const {
  const std::vector<std::uintptr_t> none(addresses());
  StackCall c{};
  CallOptions(options).put(c);
  return saved_bytes(stack(none), c) / element_;
}

// Those arguments that forward and backward share: x, T, B and the strides of x in
// elements; h0, c0, lengths and resets or 0.
void Caller::start(StackCall& c, const std::array<std::uintptr_t, 9>& a, bool reverse,
                   const py::object& options) const {
  const auto number = [&](int n) { return static_cast<index>(a[n]); };
  c.x = at(a[0]);
  c.T = number(1);
  c.B = number(2);
  c.x_t = number(3) * element_;
  c.x_b = number(4) * element_;
  c.h0 = at(a[5]);
  c.c0 = at(a[6]);
  c.lengths = at<const index>(a[7]);
  c.resets = at<const bool>(a[8]);
  c.reverse = reverse;
  CallOptions(options).put(c);
}

void Caller::forward(const std::vector<std::uintptr_t>& parameters,
                     const std::array<std::uintptr_t, 9>& given, bool reverse,
                     const py::object& options,
                     const std::array<std::uintptr_t, 6>& made) const {
  const Stack layers = stack(parameters);
  StackForward c{};
  start(c, given, reverse, options);
  c.y = at<char>(made[0]);
  c.y_b = directions_ * R_ * element_;
  c.y_t = c.B * c.y_b;
  c.h_n = at<char>(made[1]);
  c.c_n = at<char>(made[2]);
  c.cells = at<char>(made[3]);
  c.cells_b = directions_ * H_ * element_;
  c.cells_t = c.B * c.cells_b;
  c.trace = at<char>(made[4]);
  c.saved = at<char>(made[5]);
  const py::gil_scoped_release release;
  fusedrnn::forward(layers, c);
}

void Caller::backward(const std::vector<std::uintptr_t>& parameters,
                      const std::array<std::uintptr_t, 9>& given, bool reverse,
                      const py::object& options,
                      const std::array<std::uintptr_t, 3>& made,
                      const std::array<std::uintptr_t, 4>& d,
                      const std::array<std::uintptr_t, 3>& to,
                      const std::vector<std::uintptr_t>& gradients) const {
  const Stack layers = stack(parameters);
  StackBackward c{};
  start(c, given, reverse, options);
  const index y_row = directions_ * R_ * element_, c_row = directions_ * H_ * element_;
  c.y = at(made[0]);
  c.y_b = c.dy_b = y_row;
  c.y_t = c.dy_t = c.B * y_row;
  c.cells = at(made[1]);
  c.cells_b = c.dcells_b = c_row;
  c.cells_t = c.dcells_t = c.B * c_row;
  c.saved = at(made[2]);
  c.dy = at(d[0]);
  c.dh_n = at(d[1]);
  c.dc_n = at(d[2]);
  c.dcells = at(d[3]);
  c.dx = at<char>(to[0]);
  c.dx_b = I_ * element_;
  c.dx_t = c.B * c.dx_b;
  c.dh0 = at<char>(to[1]);
  c.dc0 = at<char>(to[2]);
  std::vector<char*> all;
  auto next = gradients.begin();
  for (index n = 0; n < layers_ * directions_; ++n) {
    for (int kind = 0; kind < parameter_count; ++kind) {
      const bool exists = parameters_ >> kind & 1;
      all.push_back(exists ? at<char>(*next++) : nullptr);
    }
  }
  c.gradients = all.data();
  const py::gil_scoped_release release;
  fusedrnn::backward(layers, c);
}

void bind_caller(py::module_& m) {
  py::class_<Caller>(m, "Caller")
      .def(
          py::init<const std::string&, index, std::array<index, 3>, int, int, unsigned>())
      .def("saved_values", &Caller::saved_values)
      .def("forward", &Caller::forward)
      .def("backward", &Caller::backward);
}

}  // namespace fusedrnn
