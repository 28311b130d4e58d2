#include "tensors.h"

#include <pybind11/stl.h>

namespace fusedrnn {

namespace {

// Never destroyed: Python may be gone before.
Torch& torch() {
  static Torch& found = *new Torch;
  return found;
}

PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }

py::object attribute(const py::handle& object, PyObject* name) {
  PyObject* const found = PyObject_GetAttr(object.ptr(), name);
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

py::object call_method(const py::handle& object, PyObject* name) {
  PyObject* const self[] = {object.ptr()};
  PyObject* const found = PyObject_VectorcallMethod(
      name, self, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

bool is_true(const py::object& function) {
  PyObject* const found = PyObject_CallNoArgs(function.ptr());
  if (!found) throw py::error_already_set();
  const auto result = py::reinterpret_steal<py::object>(found);
  if (result.is_none()) return false;
  return PyObject_IsTrue(result.ptr()) == 1;
}

// A new tensor of float32 or float64 on the CPU.
py::object empty(const Axes& axes, index element) {
  static PyObject* const keywords = PyTuple_Pack(1, intern("dtype"));
  py::tuple shape(axes.count);
  for (index n = 0; n < axes.count; ++n) shape[n] = axes.lengths[n];
  PyObject* const dtype = (element == 4 ? torch().float32 : torch().float64).ptr();
  PyObject* const arguments[] = {shape.ptr(), dtype};
  PyObject* const made =
      PyObject_Vectorcall(torch().empty.ptr(), arguments, 1, keywords);
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// The same of used memory where fresh pages would be costly; its storage is not PyTorch's.
py::object empty_of_ours(const Axes& axes, index element) {
  index bytes = element;
  for (index n = 0; n < axes.count; ++n) bytes *= axes.lengths[n];
  if (bytes < large_array) return empty(axes, element);
  const py::dtype dtype = element == 4 ? py::dtype::of<float>() : py::dtype::of<double>();
  return torch().from_numpy(
      allocate({axes.lengths, axes.lengths + axes.count}, dtype));
}

char* address(const py::handle& tensor) {
  static PyObject* const data_ptr = intern("data_ptr");
  if (tensor.is_none()) return nullptr;
  return static_cast<char*>(PyLong_AsVoidPtr(call_method(tensor, data_ptr).ptr()));
}

}  // namespace

// Reads tensors on the CPU of one element type, that of the first. A wrong one makes `ok`
// false.
class TensorReader {
 public:
  // `exact`: subclasses of tensors are wrong.
  explicit TensorReader(bool exact) : exact_(exact) {}

  bool ok = true, requires_grad = false, unbatched = false;
  index element = 0;

  struct View {
    const char* start = nullptr;
    index rank = 0, shape[5] = {}, strides[5] = {};  // strides in elements
  };

  // A tensor, or nothing for None.
  View view(const py::handle& tensor) {
    static PyObject *const dtype = intern("dtype"), *const is_cpu = intern("is_cpu"),
                           *const shape = intern("shape"), *const stride = intern("stride"),
                           *const is_neg = intern("is_neg"),
                           *const grad = intern("requires_grad");
    View v;
    if (tensor.is_none()) return v;
    if (!is_tensor(tensor) || attribute(tensor, is_cpu).ptr() != Py_True) return failed();
    const py::object kind = attribute(tensor, dtype);
    const index size = kind.is(torch().float32) ? 4 : kind.is(torch().float64) ? 8 : 0;
    if (element == 0) element = size;
    if (size == 0 || size != element) return failed();
    if (call_method(tensor, is_neg).ptr() == Py_True) return failed();
    if (exact_) requires_grad |= attribute(tensor, grad).ptr() == Py_True;
    read(attribute(tensor, shape), call_method(tensor, stride), v);
    v.start = address(tensor);
    return v;
  }
  // A contiguous tensor of a shape.
  const char* whole(const py::handle& tensor, const Axes& axes) {
    const View v = view(tensor);
    if (tensor.is_none() || !ok) return nullptr;
    return check(v, axes) ? v.start : failed().start;
  }
  // A contiguous tensor of another type, whose elements have been checked.
  const char* other(const py::handle& tensor) const { return address(tensor); }

 private:
  bool is_tensor(const py::handle& object) const {
    if (!exact_) return PyObject_IsInstance(object.ptr(), torch().tensor.ptr()) == 1;
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    return type == torch().tensor.ptr() || type == torch().parameter.ptr();
  }
  View failed() {
    ok = false;
    return {};
  }
  void read(const py::object& shape, const py::object& strides, View& v) {
    v.rank = PyTuple_Check(shape.ptr()) ? PyTuple_GET_SIZE(shape.ptr()) : 6;
    if (v.rank > 5) {
      ok = false;
      return;
    }
    for (index n = 0; n < v.rank; ++n) {
      v.shape[n] = PyLong_AsSsize_t(PyTuple_GET_ITEM(shape.ptr(), n));
      v.strides[n] = PyLong_AsSsize_t(PyTuple_GET_ITEM(strides.ptr(), n));
    }
  }
  static bool check(const View& v, const Axes& axes) {
    if (v.rank != axes.count) return false;
    index apart = 1;
    for (index n = v.rank - 1; n >= 0; --n) {
      if (v.shape[n] != axes.lengths[n]) return false;
      if (v.shape[n] > 1 && v.strides[n] != apart) return false;
      apart *= v.shape[n] > 0 ? v.shape[n] : 1;
    }
    return true;
  }

  const bool exact_;
};

TensorLayers::TensorLayers(std::string cell, std::array<index, 3> sizes, int layers,
                           int directions, unsigned kinds, bool reverse)
    : cell_(std::move(cell)),
      I_(sizes[0]),
      H_(sizes[1]),
      R_(sizes[2]),
      layers_(layers),
      directions_(directions),
      kinds_(kinds),
      reverse_(reverse) {
  const Shape& shape = find_cell(*active_isa().f32, cell_).shape;
  const bool has_absent = shape.differs.absent >= 0;
  gates_ = shape.gates - has_absent;
  peepholes_ = shape.peephole_count - has_absent;
  has_c_ = shape.has_c;
}

py::tuple TensorLayers::arguments() const {
  return py::make_tuple(cell_, std::array{I_, H_, R_}, layers_, directions_, kinds_,
                        reverse_);
}

// Layers for one call: their packings end with it. Without parameters only sizes are
// known.
Stack TensorLayers::stack(index element,
                          const std::vector<const char*>& parameters) const {
  const Isa& isa = active_isa();
  const Kernels& kernels = element == 4 ? *isa.f32 : *isa.f64;
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
        kernels, cell, Parameters<char>{model, p[0], p[1], p[2], p[3], p[4]},
        Vectors<const char>{p[5], p[6], p[7], p[8], p[9]}));
  }
  return stack;
}

index TensorLayers::saved_values(bool is_double, const py::object& options) const {
  const index element = is_double ? 8 : 4;
  StackCall c{};
  CallOptions(options).put(c);
  return saved_bytes(stack(element, {}), c) / element;
}

// Reads a call's arguments; false where one of them needs a look.
bool TensorLayers::read(TensorReader& reader, StackCall& c,
                        std::vector<const char*>& addresses, const py::handle& x,
                        const py::handle& h0, const py::handle& c0,
                        const py::sequence& parameters, const py::handle& lengths,
                        const py::handle& resets, AxesOf axes) const {
  const auto v = reader.view(x);
  if (!reader.ok || !v.start) return false;
  const bool step = axes == AxesOf::step, unbatched = v.rank == 2 && !step;
  if (v.rank != (step || unbatched ? 2 : 3)) return false;
  const int time = axes == AxesOf::batch_first && !unbatched, row = !time;
  const index last = v.rank - 1;
  if (v.shape[last] != I_ || (I_ > 1 && v.strides[last] != 1)) return false;
  reader.unbatched = unbatched;
  c.x = v.start;
  c.T = step ? 1 : v.shape[time];
  c.B = step ? v.shape[0] : unbatched ? 1 : v.shape[row];
  c.x_t = step ? 0 : v.strides[time] * reader.element;
  c.x_b = step ? v.strides[0] * reader.element
          : unbatched ? 0
                      : v.strides[row] * reader.element;
  if (c.T < 1 || c.B < 1) return false;
  c.reverse = reverse_;
  const index n = layers_ * directions_;
  const auto state = [&](const py::handle& given, index width) {
    if (step) return reader.whole(given, {c.B, width});
    return unbatched ? reader.whole(given, {n, width})
                     : reader.whole(given, {n, c.B, width});
  };
  c.h0 = state(h0, R_);
  c.c0 = state(c0, H_);
  c.lengths = reinterpret_cast<const index*>(reader.other(lengths));
  c.resets = reinterpret_cast<const bool*>(reader.other(resets));
  auto next = parameters.begin();
  const auto end = parameters.end();
  for (index at = 0; at < n; ++at) {
    const index I = at < directions_ ? I_ : directions_ * R_, GH = gates_ * H_;
    const Axes shapes[parameter_count] = {
        {GH, I}, {GH, R_},         {GH}, {GH}, {R_, H_},
        {peepholes_ * H_}, {GH},   {GH}, {H_}, {H_}};
    for (int kind = 0; kind < parameter_count; ++kind) {
      if (!(kinds_ >> kind & 1)) continue;
      if (next == end) return false;
      const char* const start = reader.whole(*next, shapes[kind]);
      if (!start) return false;
      addresses.push_back(start);
      ++next;
    }
  }
  return reader.ok && next == end;
}

py::object TensorLayers::infer(const py::handle& x, const py::handle& hx,
                               const py::list& parameters, int axes,
                               const py::object& options) const {
  for (const py::object& observer : torch().observers) {
    if (is_true(observer)) return py::none();
  }
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
  if (!read(reader, c, addresses, x, h0, c0, parameters, py::none(), py::none(), kind)) {
    return py::none();
  }
  if (reader.requires_grad && is_true(torch().is_grad_enabled)) return py::bool_(false);
  CallOptions(options).put(c);
  const index n = layers_ * directions_, width = directions_ * R_, size = reader.element;
  const bool step = kind == AxesOf::step;
  const bool unbatched = reader.unbatched;
  const bool batch_first = kind == AxesOf::batch_first;
  const auto state = [&](index of) {
    if (step) return empty({c.B, of}, size);
    return unbatched ? empty({n, of}, size) : empty({n, c.B, of}, size);
  };
  const py::object h_n = state(R_), c_n = has_c_ ? state(H_) : py::none();
  py::object y = py::none();
  Memory of_step;
  if (step) {
    of_step = Memory(static_cast<std::size_t>(c.B * R_ * size));
    c.y = of_step.as<char>();
  } else {
    y = unbatched     ? empty({c.T, width}, size)
        : batch_first ? empty({c.B, c.T, width}, size)
                      : empty({c.T, c.B, width}, size);
    c.y = address(y);
  }
  c.y_t = (batch_first ? 1 : c.B) * width * size;
  c.y_b = (batch_first ? c.T : 1) * width * size;
  c.h_n = address(h_n);
  c.c_n = address(c_n);
  const Stack layers = stack(size, addresses);
  {
    const py::gil_scoped_release release;
    fusedrnn::forward(layers, c);
  }
  py::object last = h_n;
  if (has_c_) last = py::make_tuple(h_n, c_n);
  if (step) return last;
  return py::make_tuple(y, std::move(last));
}

py::object TensorLayers::forward(const py::handle& x, const py::handle& h0,
                                 const py::handle& c0, const py::sequence& parameters,
                                 const py::handle& lengths, const py::handle& resets,
                                 const py::object& options, bool saves,
                                 bool step) const {
  TensorReader reader(false);
  StackForward c{};
  std::vector<const char*> addresses;
  const AxesOf axes = step ? AxesOf::step : AxesOf::sequence;
  if (!read(reader, c, addresses, x, h0, c0, parameters, lengths, resets, axes)) {
    return py::none();
  }
  const CallOptions o(options);
  o.put(c);
  const Stack layers = stack(reader.element, addresses);
  const index n = layers_ * directions_, size = reader.element;
  const index y_row = directions_ * R_, c_row = directions_ * H_;
  const py::object y = step ? empty({c.B, R_}, size) : empty({c.T, c.B, y_row}, size);
  py::object h_n = py::none(), c_n = py::none(), cells = py::none(), trace = py::none();
  py::object saved = py::none();
  Memory of_step;
  c.y = address(y);
  c.y_b = y_row * size;
  c.y_t = c.B * c.y_b;
  if (step) {
    of_step = Memory(static_cast<std::size_t>(c.B * R_ * size));
    c.h_n = of_step.as<char>();
    if (has_c_) c_n = empty({c.B, H_}, size);
  } else {
    h_n = empty({n, c.B, R_}, size);
    c.h_n = address(h_n);
    if (has_c_) c_n = empty({n, c.B, H_}, size);
  }
  c.c_n = address(c_n);
  if (o.return_cells) cells = empty({c.T, c.B, c_row}, size);
  c.cells = address(cells);
  c.cells_b = c_row * size;
  c.cells_t = c.B * c.cells_b;
  if (o.trace) trace = empty({n, c.T, c.B, gates_, H_}, size);
  c.trace = address(trace);
  if (saves) {
    const index values = saved_bytes(layers, c) / size;
    if (values > 0) saved = empty_of_ours({c.T, c.B, values}, size);
  }
  c.saved = address(saved);
  {
    const py::gil_scoped_release release;
    fusedrnn::forward(layers, c);
  }
  return py::make_tuple(y, h_n, c_n, cells, trace, saved);
}

py::object TensorLayers::backward(
    const py::sequence& wanted, const py::sequence& d, const py::handle& y,
    const py::handle& cells, const py::handle& saved, const py::handle& x,
    const py::handle& h0, const py::handle& c0, const py::sequence& parameters,
    const py::handle& lengths, const py::handle& resets, const py::object& options,
    bool step) const {
  TensorReader reader(false);
  StackBackward c{};
  std::vector<const char*> addresses;
  const AxesOf axes = step ? AxesOf::step : AxesOf::sequence;
  if (!read(reader, c, addresses, x, h0, c0, parameters, lengths, resets, axes)) {
    return py::none();
  }
  CallOptions(options).put(c);
  const Stack layers = stack(reader.element, addresses);
  const index n = layers_ * directions_, size = reader.element;
  const index y_row = directions_ * R_, c_row = directions_ * H_;
  const auto sequence = [&](const py::handle& given, index width) {
    return step ? reader.whole(given, {c.B, width})
                : reader.whole(given, {c.T, c.B, width});
  };
  const auto state = [&](const py::handle& given, index width) {
    return step ? reader.whole(given, {c.B, width})
                : reader.whole(given, {n, c.B, width});
  };
  c.y = sequence(y, y_row);
  c.y_b = c.dy_b = y_row * size;
  c.y_t = c.dy_t = c.B * c.y_b;
  c.cells = sequence(cells, c_row);
  c.cells_b = c.dcells_b = c_row * size;
  c.cells_t = c.dcells_t = c.B * c.cells_b;
  const index values = saved_bytes(layers, c) / size;
  c.saved = values > 0 ? reader.whole(saved, {c.T, c.B, values}) : nullptr;
  c.dy = sequence(d[0], y_row);
  c.dh_n = state(d[1], R_);
  c.dc_n = state(d[2], H_);
  c.dcells = sequence(d[3], c_row);
  if (!reader.ok || !c.y || (values > 0 && !c.saved)) return py::none();

  py::list found;
  const auto is_wanted = [&](index at) { return py::cast<bool>(wanted[at]); };
  const auto make = [&](index at, const Axes& shape) {
    const py::object made = empty(shape, size);
    if (is_wanted(at)) found.append(made);
    return made;
  };
  // Gradients of a state are made in any case.
  py::object dx, dh0, dc0;
  if (is_wanted(0)) {
    dx = make(0, step ? Axes{c.B, I_} : Axes{c.T, c.B, I_});
    c.dx = address(dx);
    c.dx_b = I_ * size;
    c.dx_t = c.B * c.dx_b;
  }
  dh0 = make(1, step ? Axes{c.B, R_} : Axes{n, c.B, R_});
  c.dh0 = address(dh0);
  if (has_c_) {
    dc0 = make(2, step ? Axes{c.B, H_} : Axes{n, c.B, H_});
    c.dc0 = address(dc0);
  }
  std::vector<char*> gradients;
  index at = 3;
  for (index of = 0; of < n; ++of) {
    const index I = of < directions_ ? I_ : directions_ * R_, GH = gates_ * H_;
    const Axes shapes[parameter_count] = {
        {GH, I}, {GH, R_},         {GH}, {GH}, {R_, H_},
        {peepholes_ * H_}, {GH},   {GH}, {H_}, {H_}};
    for (int kind = 0; kind < parameter_count; ++kind) {
      gradients.push_back(nullptr);
      if (!(kinds_ >> kind & 1)) continue;
      if (is_wanted(at)) gradients.back() = address(make(at, shapes[kind]));
      ++at;
    }
  }
  c.gradients = gradients.data();
  {
    const py::gil_scoped_release release;
    fusedrnn::backward(layers, c);
  }
  return found;
}

void bind_tensors(py::module_& m) {
  m.def("set_torch", [](const py::module_& torch_module, const py::object& parameter,
                        std::vector<py::object> observers) {
    const auto get = [&](const char* name) {
      return py::object(torch_module.attr(name));
    };
    torch() = {get("Tensor"),  parameter,      get("empty"),
               get("from_numpy"), get("float32"), get("float64"),
               get("is_grad_enabled"), std::move(observers)};
  });
  py::class_<TensorLayers>(m, "TensorLayers")
      .def(py::init<std::string, std::array<index, 3>, int, int, unsigned, bool>())
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
