#include "tensors.h"

#include <pybind11/stl.h>

#include <atomic>
#include <cstring>

#include "../cpu/workforce.h"
#include "gil.h"
#include "pytorch.h"

namespace fusedrnn {

namespace {

// Whether saved values are cleared first, so that elements the kernels do not write are
// zero; for tests.
std::atomic<bool> clears_saved{false};

// Returns the functions that convert bfloat16.
const Halves& halves_of_torch() {
  return *product_of(active_isa(), 4, Precision::bfloat16).halves;
}

// RoundedOutputs has float32 in place of tensors of bfloat16, for the kernels.
class RoundedOutputs {
  struct Output {
    Memory wide;
    index values;
    char* to;
  };
  std::vector<Output> outputs_;

 public:
  // Returns memory for the values of a tensor of elements of `item` bytes: its own,
  // unless they are rounded.
  char* add(char* to, index item, const Axes& shape) {
    if (item != half_item || !to) return to;
    index values = 1;
    for (index n = 0; n < shape.count; ++n) values *= shape.lengths[n];
    outputs_.push_back({Memory(static_cast<std::size_t>(4 * values)), values, to});
    return outputs_.back().wide.as<char>();
  }
  void round() const {
    constexpr index values_per_thread = 1 << 16;
    for (const Output& of : outputs_) {
      with_team(threads_for(of.values, values_per_thread), Length::brief, 0,
                [&](const Team& team) {
                  const Range own = team.share(of.values, 64);
                  halves_of_torch().narrow(of.wide.as<const char>() + 4 * own.begin,
                                           own.end - own.begin,
                                           of.to + half_item * own.begin);
                });
    }
  }
};

// Reads the next tensor, a state, to `own` if it is not float32.
const char* read_state(TensorReader& reader, const Axes& axes, Memory& own) {
  const auto s = reader.whole_view(axes);
  if (s.item != half_item || !s.start) return s.start;
  index values = 1;
  for (index n = 0; n < axes.count; ++n) values *= axes.lengths[n];
  own = Memory(static_cast<std::size_t>(4 * values));
  halves_of_torch().widen(s.start, values, own.as<char>());
  return own.as<char>();
}

}  // namespace

TensorLayers::TensorLayers(std::string cell, std::array<index, 3> sizes, int layers,
                           int directions, unsigned kinds, bool reverse, bool halves)
    : cell_(std::move(cell)),
      I_(sizes[0]),
      H_(sizes[1]),
      R_(sizes[2]),
      layers_(layers),
      directions_(directions),
      kinds_(kinds),
      reverse_(reverse),
      halves_(halves) {
  const Shape& shape = find_cell(*active_isa().base->f32, cell_).shape;
  const bool has_absent = shape.differs.absent >= 0;
  gates_ = shape.gates - has_absent;
  peepholes_ = shape.peephole_count - has_absent;
  has_c_ = shape.has_c;
}

py::tuple TensorLayers::arguments() const {
  return py::make_tuple(cell_, std::array{I_, H_, R_}, layers_, directions_, kinds_,
                        reverse_, halves_);
}

// Builds the layers for one call; their packed weights end with it. Without parameters
// only sizes can be asked for.
Stack TensorLayers::stack(index element, bool halves, index item,
                          const std::vector<const char*>& parameters) const {
  const Kernels& kernels = kernels_of(active_isa(), element);
  const Product& product = product_of(active_isa(), element,
                                      halves ? Precision::bfloat16 : Precision::element);
  const CellKernels& cell = find_cell(kernels, cell_);
  Stack stack{{}, directions_, 0};
  stack.weights.reserve(layers_ * directions_);
  auto next = parameters.begin();
  for (int n = 0; n < layers_ * directions_; ++n) {
    const char* p[parameter_count] = {};
    for (int kind = 0; kind < parameter_count && !parameters.empty(); ++kind) {
      if (kinds_ >> kind & 1) p[kind] = *next++;
    }
    const index I = n < directions_ ? I_ : directions_ * R_;
    const bool projects = kinds_ >> 4 & 1, norm = kinds_ >> 6 & 1;
    const Model model{I, H_, R_, cell.shape.variant, projects, norm};
    stack.weights.push_back(std::make_unique<const Weights>(
        kernels, product, cell,
        Parameters<char>{model, p[0], p[1], p[2], p[3], p[4], nullptr, nullptr, nullptr,
                         1, halves, halves ? item : 0},
        Vectors<const char>{p[5], p[6], p[7], p[8], p[9]}));
  }
  return stack;
}

index TensorLayers::saved_values(index item, const py::object& options) const {
  StackCall c{};
  CallOptions(options).put(c);
  const bool halves = item == half_item;
  return saved_bytes(stack(halves ? 4 : item, halves, item, {}), c) / item;
}

// Reads a call's arguments, which `reader` has collected, x first; returns false if
// Python must check them.
bool TensorLayers::read(TensorReader& reader, StackCall& c,
                        std::vector<const char*>& addresses, Memory (&wide)[2],
                        AxesOf axes) const {
  const auto v = reader.next();
  if (!reader.ok || !v.start) return false;
  const bool step = axes == AxesOf::step, unbatched = v.rank == 2 && !step;
  if (v.rank != (step || unbatched ? 2 : 3)) return false;
  const int time = axes == AxesOf::batch_first && !unbatched, row = !time;
  const index last = v.rank - 1;
  if (v.shape[last] != I_ || (I_ > 1 && v.strides[last] != 1)) return false;
  reader.unbatched = unbatched;
  c.x = v.start;
  c.x_item = reader.x_item;
  c.T = step ? 1 : v.shape[time];
  c.B = step ? v.shape[0] : unbatched ? 1 : v.shape[row];
  c.x_t = step ? 0 : v.strides[time] * v.item;
  c.x_b = step ? v.strides[0] * v.item : unbatched ? 0 : v.strides[row] * v.item;
  if (c.T < 1 || c.B < 1) return false;
  c.reverse = reverse_;
  const index n = layers_ * directions_;
  const auto state = [&](index width, Memory& own) {
    return read_state(reader,
                      step        ? Axes{c.B, width}
                      : unbatched ? Axes{n, width}
                                  : Axes{n, c.B, width},
                      own);
  };
  c.h0 = state(R_, wide[0]);
  c.c0 = state(H_, wide[1]);
  c.lengths = reinterpret_cast<const index*>(reader.next().start);
  c.resets = reinterpret_cast<const bool*>(reader.next().start);
  c.mask = reinterpret_cast<const bool*>(reader.next().start);
  for (index at = 0; at < n; ++at) {
    for (int kind = 0; kind < parameter_count; ++kind) {
      if (!(kinds_ >> kind & 1)) continue;
      const auto p = reader.whole_view(parameter_axes(at, kind));
      if (!p.start) return false;
      if (addresses.empty()) reader.parameter_item = p.item;
      if (p.item != reader.parameter_item) return false;
      addresses.push_back(p.start);
    }
  }
  return reader.ok;
}

Axes TensorLayers::parameter_axes(index at, int kind) const {
  const index GH = gates_ * H_;
  switch (kind) {
    case 0:
      return {GH, at < directions_ ? I_ : directions_ * R_};
    case 1:
      return {GH, R_};
    case 4:
      return {R_, H_};
    case 5:
      return {peepholes_ * H_};
    case 8:
    case 9:
      return {H_};
    default:
      return {GH};
  }
}

// Adds the arguments of a call to a reader; returns false if they are too few or too
// many.
bool TensorLayers::collect(TensorReader& reader, const py::handle& x,
                           const py::handle& h0, const py::handle& c0,
                           const py::sequence& parameters, const py::handle& lengths,
                           const py::handle& resets, const py::handle& mask) const {
  const std::size_t each = std::popcount(kinds_);
  if (parameters.size() != each * layers_ * directions_) return false;
  for (const py::handle& a : {x, h0, c0}) reader.collect(a);
  for (const py::handle& a : {lengths, resets, mask}) reader.collect(a, true);
  for (const py::handle p : parameters) {
    if (p.is_none()) return false;
    reader.collect(p);
  }
  return reader.ok;
}

py::object TensorLayers::infer(const py::handle& x, const py::handle& hx,
                               const py::list& parameters, int axes,
                               const py::object& options) const {
  if (is_observed()) return py::none();
  const auto kind = static_cast<AxesOf>(axes);
  py::object h0 = py::none(), c0 = py::none();
  if (!hx.is_none()) {
    if (!has_c_) {
      h0 = py::reinterpret_borrow<py::object>(hx);
    } else {
      if (!PyTuple_CheckExact(hx.ptr()) || PyTuple_GET_SIZE(hx.ptr()) != 2) {
        return py::none();
      }
      h0 = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(hx.ptr(), 0));
      c0 = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(hx.ptr(), 1));
      if (h0.is_none() || c0.is_none()) return py::none();
    }
  }
  TensorReader reader(true);
  StackForward c{};
  std::vector<const char*> addresses;
  Memory wide[2];
  const py::none none;
  if (!collect(reader, x, h0, c0, parameters, none, none, none)) return none;
  if (reader.requires_grad && is_true(torch().is_grad_enabled)) return py::bool_(false);
  reader.open(halves_);
  if (!read(reader, c, addresses, wide, kind)) return none;
  CallOptions(options).put(c);
  const index n = layers_ * directions_, width = directions_ * R_, size = reader.item;
  const bool step = kind == AxesOf::step;
  const bool unbatched = reader.unbatched;
  const bool batch_first = kind == AxesOf::batch_first;
  const auto state = [&](index of) {
    return step ? Axes{c.B, of} : unbatched ? Axes{n, of} : Axes{n, c.B, of};
  };
  NewTensors outputs(size);
  // The user's states have the type of x.
  RoundedOutputs rounded;
  c.h_n = rounded.add(outputs.add(state(R_)), size, state(R_));
  if (has_c_) c.c_n = rounded.add(outputs.add(state(H_)), size, state(H_));
  Memory of_step;
  if (step) {
    of_step = Memory(static_cast<std::size_t>(c.B * R_ * size));
    c.y = of_step.as<char>();
  } else {
    c.y = outputs.add(unbatched     ? Axes{c.T, width}
                      : batch_first ? Axes{c.B, c.T, width}
                                    : Axes{c.T, c.B, width});
  }
  c.y_t = (batch_first ? 1 : c.B) * width * size;
  c.y_b = (batch_first ? c.T : 1) * width * size;
  const Stack layers =
      stack(reader.element, reader.halves, reader.parameter_item, addresses);
  without_gil([&] {
    fusedrnn::forward(layers, c);
    rounded.round();
  });
  const py::list all = outputs.take();
  py::object last = all[0];
  if (has_c_) last = py::make_tuple(all[0], all[1]);
  if (step) return last;
  return py::make_tuple(all[all.size() - 1], std::move(last));
}

py::object TensorLayers::forward(const py::handle& x, const py::handle& h0,
                                 const py::handle& c0, const py::sequence& parameters,
                                 const py::handle& lengths, const py::handle& resets,
                                 const py::handle& mask, const py::object& options,
                                 bool saves, bool step) const {
  TensorReader reader(false);
  StackForward c{};
  std::vector<const char*> addresses;
  Memory wide[2];
  const AxesOf axes = step ? AxesOf::step : AxesOf::sequence;
  if (!collect(reader, x, h0, c0, parameters, lengths, resets, mask)) {
    return py::none();
  }
  reader.open(halves_);
  if (!read(reader, c, addresses, wide, axes)) return py::none();
  const CallOptions o(options);
  o.put(c);
  const Stack layers =
      stack(reader.element, reader.halves, reader.parameter_item, addresses);
  const index n = layers_ * directions_, size = reader.element, item = reader.item;
  const index y_row = directions_ * R_, c_row = directions_ * H_;
  NewTensors outputs(size);
  // The operator has six results: those that a call does not have are empty tensors. A
  // step leaves them out.
  const auto add = [&](bool exists, const Axes& shape, index of_item) -> char* {
    if (exists) return outputs.add(shape, of_item);
    if (!step) outputs.add({0}, item);
    return nullptr;
  };
  c.y = outputs.add(step ? Axes{c.B, R_} : Axes{c.T, c.B, y_row}, item);
  c.y_b = y_row * item;
  c.y_t = c.B * c.y_b;
  Memory h_of_step;
  if (step) h_of_step = Memory(static_cast<std::size_t>(c.B * R_ * size));
  c.h_n = step ? h_of_step.as<char>() : outputs.add({n, c.B, R_});
  const index state_item = step ? reader.x_item : size;
  const Axes of_c = step ? Axes{c.B, H_} : Axes{n, c.B, H_};
  RoundedOutputs rounded;
  c.c_n = rounded.add(add(has_c_, of_c, state_item), state_item, of_c);
  c.cells = add(o.return_cells, {c.T, c.B, c_row}, size);
  c.cells_b = c_row * size;
  c.cells_t = c.B * c.cells_b;
  c.trace = add(o.trace, {n, c.T, c.B, gates_, H_}, item);
  const index values = saves ? saved_bytes(layers, c) / item : 0;
  const Axes saved_axes{c.T, c.B, values};
  const auto bytes = bytes_of({saved_axes.lengths, 3}, item);
  py::object large;
  if (bytes >= std::size_t{large_array}) {
    large = new_large(saved_axes, item, c.saved);
  } else {
    c.saved = outputs.add(values > 0 ? saved_axes : Axes{0}, item);
  }
  if (values == 0) c.saved = nullptr;
  if (clears_saved && values > 0) std::memset(c.saved, 0, bytes);
  without_gil([&] {
    fusedrnn::forward(layers, c);
    rounded.round();
  });
  py::list all = outputs.take();
  if (large) all.append(large);
  return py::tuple(all);
}

py::object TensorLayers::backward(const py::sequence& wanted, const py::sequence& d,
                                  const py::handle& y, const py::handle& cells,
                                  const py::handle& saved, const py::handle& x,
                                  const py::handle& h0, const py::handle& c0,
                                  const py::sequence& parameters,
                                  const py::handle& lengths, const py::handle& resets,
                                  const py::handle& mask, const py::object& options,
                                  bool step) const {
  TensorReader reader(false);
  StackBackward c{};
  std::vector<const char*> addresses;
  Memory wide[2];
  const AxesOf axes = step ? AxesOf::step : AxesOf::sequence;
  if (d.size() != 4 || wanted.size() != 3 + parameters.size()) return py::none();
  if (!collect(reader, x, h0, c0, parameters, lengths, resets, mask)) {
    return py::none();
  }
  for (const py::handle& a : {y, cells, saved}) reader.collect(a);
  for (const py::handle g : d) reader.collect(g);
  reader.open(halves_);
  if (!read(reader, c, addresses, wide, axes)) return py::none();
  CallOptions(options).put(c);
  const Stack layers =
      stack(reader.element, reader.halves, reader.parameter_item, addresses);
  const index n = layers_ * directions_, size = reader.element, item = reader.item;
  const index y_row = directions_ * R_, c_row = directions_ * H_;
  const auto sequence = [&](index width) {
    return step ? Axes{c.B, width} : Axes{c.T, c.B, width};
  };
  const auto state = [&](index width) {
    return step ? Axes{c.B, width} : Axes{n, c.B, width};
  };
  const index values = saved_bytes(layers, c) / item;
  c.y = reader.whole(sequence(y_row), item);
  c.y_b = c.dy_b = y_row * item;
  c.y_t = c.dy_t = c.B * c.y_b;
  c.cells = reader.whole(sequence(c_row));
  c.cells_b = c.dcells_b = c_row * size;
  c.cells_t = c.dcells_t = c.B * c.cells_b;
  c.saved =
      values > 0 ? reader.whole({c.T, c.B, values}, item) : (reader.next(), nullptr);
  c.dy = reader.whole(sequence(y_row), item);
  Memory wide_d[2];
  c.dh_n = read_state(reader, state(R_), wide_d[0]);
  c.dc_n = read_state(reader, state(H_), wide_d[1]);
  c.dcells = reader.whole(sequence(c_row));
  if (!reader.ok || !c.y || (values > 0 && !c.saved)) return py::none();

  const auto is_wanted = [&](index at) {
    return PyObject_IsTrue(py::object(wanted[at]).ptr()) == 1;
  };
  NewTensors outputs(size);
  if (is_wanted(0)) c.dx = outputs.add(sequence(I_), c.x_item);
  c.dx_b = I_ * c.x_item;
  c.dx_t = c.B * c.dx_b;
  // The states of a step have the type of x.
  const index state_item = step ? reader.x_item : size;
  RoundedOutputs rounded;
  const auto add = [&](const Axes& shape, index of_item) {
    return rounded.add(outputs.add(shape, of_item), of_item, shape);
  };
  if (is_wanted(1)) c.dh0 = add(state(R_), state_item);
  if (has_c_ && is_wanted(2)) c.dc0 = add(state(H_), state_item);
  std::vector<char*> gradients;
  index at = 3;
  for (index of = 0; of < n; ++of) {
    for (int kind = 0; kind < parameter_count; ++kind) {
      gradients.push_back(nullptr);
      if (!(kinds_ >> kind & 1)) continue;
      if (!is_wanted(at++)) continue;
      gradients.back() = outputs.add(parameter_axes(of, kind), reader.parameter_item);
    }
  }
  c.gradients = gradients.data();
  c.gradient_item = reader.parameter_item;
  without_gil([&] {
    fusedrnn::backward(layers, c);
    rounded.round();
  });
  return outputs.take();
}

void bind_tensors(py::module_& m) {
  m.def("set_torch", [](const py::module_& module, const py::object& parameter,
                        const std::string& library, std::vector<py::object> observers) {
    const auto keep = [](py::object of) { return of.release().ptr(); };
    const py::object interface = module.attr("_C").attr("_aoti");
    torch() = {keep(module.attr("Tensor")),
               keep(parameter),
               interface.attr("unsafe_alloc_void_ptrs_from_tensors"),
               interface.attr("alloc_tensors_by_stealing_from_void_ptrs"),
               module.attr("from_numpy"),
               module.attr("bfloat16"),
               module.attr("is_grad_enabled"),
               module.attr("autograd").attr("forward_ad"),
               std::move(observers),
               find_shim(library)};
  });
  m.def("set_clears_saved", [](bool clears) { clears_saved = clears; });
  py::class_<TensorLayers>(m, "TensorLayers")
      .def(py::init<std::string, std::array<index, 3>, int, int, unsigned, bool, bool>())
      .def("saved_values", &TensorLayers::saved_values)
      .def("infer", &TensorLayers::infer)
      .def("forward", &TensorLayers::forward)
      .def("backward", &TensorLayers::backward)
      .def("__reduce__", [](const py::object& self) {
        return py::make_tuple(py::type::of(self),
                              self.cast<const TensorLayers&>().arguments());
      });
}

}  // namespace fusedrnn
