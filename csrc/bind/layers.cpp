#include "layers.h"

#include <pybind11/stl.h>

#include <cstring>

#include "gil.h"

namespace fusedrnn {

namespace {

// The NumPy types of weights, by Precision.
constexpr int weight_types[precisions] = {-1, py::detail::npy_api::NPY_BYTE_,
                                          py::detail::npy_api::NPY_USHORT_,
                                          23 /* NPY_HALF */};

Precision precision_of(const Array& weight) {
  if (has_elements(weight, bfloat16().type)) return Precision::bfloat16;
  for (int n = 1; n < precisions; ++n) {
    if (has_elements(weight, weight_types[n])) return static_cast<Precision>(n);
  }
  return Precision::element;
}

// Python has checked the parameters and reported the user's errors, so a wrong parameter
// here is a bug.
std::unique_ptr<const Weights> make_weights(const Kernels& kernels,
                                            const Product& product,
                                            const CellKernels& cell, const Arrays& p,
                                            const Scales& scales, bool halves) {
  const bool has_absent = cell.shape.differs.absent >= 0;
  if (!p[0] || !p[1] || p[0]->ndim() != 2 || p[1]->ndim() != 2) refuse("weight_ih");
  const index blocks = cell.shape.gates - has_absent;
  const index GH = p[0]->shape(0), H = GH / blocks;
  const index I = p[0]->shape(1), R = p[1]->shape(1);
  const Model model{I, H, R, cell.shape.variant, p[4].has_value(), p[6].has_value()};
  if (H < 1 || I < 1 || GH % blocks || R > H || (!model.projects && R != H))
    refuse("weight_hh");
  const index item = halves ? half_item : kernels.size;
  Reader reader(item);
  const int element = element_type(item);
  const bool is_narrow = product.precision != Precision::element && !halves;
  const int of_weights =
      is_narrow ? weight_types[static_cast<int>(product.precision)] : element;
  const auto read = [&](const MaybeArray& from, const char* name, const Axes& axes,
                        int type) {
    const char* const start = from ? reader.whole(*from, axes, type) : nullptr;
    if (!reader.ok) refuse(name);
    return start;
  };
  const auto weight = [&](int n, const char* name, const Axes& axes) {
    return read(p[n], name, axes, of_weights);
  };
  const auto vector = [&](int n, const char* name, const Axes& axes) {
    return read(p[n], name, axes, element);
  };
  const auto scale = [&](int n, const char* name, index rows, bool exists) {
    const bool wanted = product.precision == Precision::int8 && exists;
    const MaybeArray& found = scales.first[n];
    if (wanted != found.has_value()) refuse(name);
    return reinterpret_cast<const float*>(read(found, name, {rows}, element));
  };
  const Parameters<char> parameters{model,
                                    weight(0, "weight_ih", {GH, I}),
                                    weight(1, "weight_hh", {GH, R}),
                                    vector(2, "bias_ih", {GH}),
                                    vector(3, "bias_hh", {GH}),
                                    weight(4, "weight_hr", {R, H}),
                                    scale(0, "scale_ih", GH, true),
                                    scale(1, "scale_hh", GH, true),
                                    scale(2, "scale_hr", R, model.projects),
                                    scales.second,
                                    halves,
                                    halves ? item : 0};
  const index peepholes = (cell.shape.peephole_count - has_absent) * H;
  const Vectors<const char> vectors{
      vector(5, "weight_ch", {peepholes}), vector(6, "gamma_ih", {GH}),
      vector(7, "gamma_hh", {GH}), vector(8, "gamma_c", {H}), vector(9, "beta_c", {H})};
  const bool norms_c = model.norm && cell.shape.has_c;
  if (model.norm && !vectors.gamma_hh) refuse("gamma_hh");
  if (norms_c && !(vectors.gamma_c && vectors.beta_c)) refuse("gamma_c");
  return std::make_unique<const Weights>(kernels, product, cell, parameters, vectors);
}

double as_double(PyObject* number) { return PyFloat_AsDouble(number); }

// Reads reference.Activation, or None for the cell's own.
Activation activation_of(PyObject* tuple) {
  if (tuple == Py_None) return {};
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 5) refuse("activation");
  const auto at = [&](int n) { return as_double(PyTuple_GET_ITEM(tuple, n)); };
  return {static_cast<int>(at(0)), at(1), at(2), at(3), at(4)};
}

void freeze(const Array& a) {
  py::detail::array_proxy(a.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
}

Sequence sequence_of(const Array& a, const Sequence& like, bool batch_first) {
  const int time = batch_first && !like.unbatched, row = !time;
  return {static_cast<const char*>(a.data()),
          like.T,
          like.B,
          a.shape(a.ndim() - 1),
          a.strides(time),
          like.unbatched ? 0 : a.strides(row),
          like.unbatched};
}

char* write_to(const MaybeArray& a) {
  return a ? static_cast<char*>(py::detail::array_proxy(a->ptr())->data) : nullptr;
}

// Copies lengths (B,), or () without a batch; returns false if they are wrong.
bool copy_lengths(const py::handle& object, const Sequence& x, std::vector<index>& to) {
  if (object.is_none()) return true;
  if (!has_elements(object, py::dtype::num_of<index>())) return false;
  const auto a = py::reinterpret_borrow<Array>(object);
  const bool fits = x.unbatched ? a.ndim() == 0 : a.ndim() == 1 && a.shape(0) == x.B;
  if (!fits || !(a.flags() & is_aligned)) return false;
  to.resize(x.B);
  const char* from = static_cast<const char*>(a.data());
  for (index& length : to) {
    length = *reinterpret_cast<const index*>(from);
    from += x.unbatched ? 0 : a.strides(0);
  }
  return std::all_of(to.begin(), to.end(), [&](index n) { return n >= 0 && n <= x.T; });
}

// Copies resets or a mask (T, B), (B, T) or (T,) to (T, B). Bytes other than 0 count as
// true.
bool copy_flags(const py::handle& object, const Sequence& x, bool batch_first,
                Memory& to) {
  if (object.is_none()) return true;
  if (!has_elements(object, py::detail::npy_api::NPY_BOOL_)) return false;
  const auto a = py::reinterpret_borrow<Array>(object);
  const int time = batch_first && !x.unbatched, row = !time;
  const bool fits = x.unbatched
                        ? a.ndim() == 1 && a.shape(0) == x.T
                        : a.ndim() == 2 && a.shape(time) == x.T && a.shape(row) == x.B;
  if (!fits) return false;
  to = Memory(static_cast<std::size_t>(x.T * x.B + 1));
  if (x.B == 0) return true;
  const char* const start = static_cast<const char*>(a.data());
  const index t = a.strides(time), b = x.unbatched ? 0 : a.strides(row);
  bool* flag = to.as<bool>();
  for (index n = 0; n < x.T; ++n) {
    for (index m = 0; m < x.B; ++m) *flag++ = start[n * t + m * b] != 0;
  }
  return true;
}

// Returns whether no mask is true where lengths say that a row takes no step.
bool fits_lengths(const StackCall& c) {
  if (!c.mask || !c.lengths || c.B == 0) return true;
  for (index t = 0, n = 0; t < c.T; ++t) {
    for (index b = 0; b < c.B; ++b, ++n) {
      if (c.mask[n] && t >= c.lengths[b]) return false;
    }
  }
  return true;
}

}  // namespace

const CellKernels& find_cell(const Kernels& kernels, std::string_view name) {
  for (const CellKernels& cell : kernels.cells) {
    if (cell.name == name) return cell;
  }
  throw py::value_error("_cpu: no cell " + std::string(name));
}

CallOptions::CallOptions(const py::handle& tuple) {
  if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) != 15) {
    refuse("options");
  }
  PyObject* const o = tuple.ptr();
  const auto at = [&](int n) { return PyTuple_GET_ITEM(o, n); };
  const auto is_true = [&](int n) { return at(n) == Py_True; };
  PyObject* const zoneout = at(2);
  values = {as_double(at(0)),
            as_double(at(1)),
            as_double(PyTuple_GET_ITEM(zoneout, 0)),
            as_double(PyTuple_GET_ITEM(zoneout, 1)),
            as_double(at(3)),
            is_true(5),
            PyLong_AsUnsignedLongLong(at(6)),
            static_cast<std::uint32_t>(PyLong_AsUnsignedLong(at(7))),
            PyLong_AsSsize_t(at(8)),
            {}};
  weight_dropout = as_double(at(4));
  return_cells = is_true(9);
  trace = is_true(10);
  recompute = is_true(11);
  repeats = is_true(12);
  values.activations = {activation_of(at(13)), activation_of(at(14))};
  if (PyErr_Occurred()) throw py::error_already_set();
}

void CallOptions::put(StackCall& call) const {
  call.options = values;
  call.weight_dropout = weight_dropout;
  call.recompute = recompute;
  call.returns_gates = return_cells || trace;
  call.repeats = repeats;
}

Layers::Layers(const std::string& cell, std::vector<Arrays> parameters, int directions,
               double dropout, bool batch_first, bool layered, bool reverse,
               std::vector<Scales> scales)
    : isa_(active_isa()),
      parameters_(std::move(parameters)),
      scales_(std::move(scales)),
      batch_first_(batch_first),
      layered_(layered),
      reverse_(reverse),
      stack_{{}, directions, dropout} {
  if (parameters_.empty() || !parameters_[0][0]) refuse("parameters");
  const Precision precision = precision_of(*parameters_[0][0]);
  const bool halves = has_elements(*parameters_[0][0], bfloat16().type);
  // Without scales, not even absent ones, the weights are the user's own.
  if (precision != Precision::element && scales_.empty() && !halves) refuse("weight_ih");
  const bool is_double = has_elements(*parameters_[0][0], element_type(8));
  const index element = is_double ? 8 : 4;
  const Kernels& kernels = kernels_of(isa_, element);
  const Product& product = product_of(isa_, element, precision);
  const CellKernels& found = find_cell(kernels, cell);
  scales_.resize(parameters_.size(), Scales{{}, 1});
  for (std::size_t n = 0; n < parameters_.size(); ++n) {
    stack_.weights.push_back(
        make_weights(kernels, product, found, parameters_[n], scales_[n], halves));
  }
}

index Layers::saved_bytes(const py::object& options) const {
  StackCall c{};
  CallOptions(options).put(c);
  return fusedrnn::saved_bytes(stack_, c);
}

py::dict Layers::plan(index at, index T, index B, const py::object& options) const {
  StackCall c{};
  c.T = T;
  c.B = B;
  c.reverse = reverse_;
  CallOptions(options).put(c);
  const ForwardPlan found = fusedrnn::plan(stack_, at, c);
  py::dict summary;
  summary["threads"] = found.threads;
  summary["by_rows"] = found.by_rows;
  summary["fused"] = found.fused;
  summary["time_block"] = found.time_block;
  summary["tile"] = py::make_tuple(found.tile_rows, found.tile_units);
  summary["saved"] = found.saved;
  summary["workspace_bytes"] = found.workspace;
  summary["packed_bytes"] = stack_.weights[at]->packed_bytes();
  summary["unit"] = std::string(layout().product.unit);
  return summary;
}

Axes Layers::state_axes(const Sequence& x, index width) const {
  const index n = stack_.count();
  if (layered_) return x.unbatched ? Axes{n, width} : Axes{n, x.B, width};
  return x.unbatched ? Axes{width} : Axes{x.B, width};
}

Axes Layers::sequence_axes(const Sequence& x, index width) const {
  if (x.unbatched) return {x.T, width};
  return batch_first_ ? Axes{x.B, x.T, width} : Axes{x.T, x.B, width};
}

Array Layers::make(const Axes& axes, index item) const {
  if (item == 0) item = layout().size;
  const py::dtype dtype = element_dtype(item);
  const std::vector<index> shape(axes.lengths, axes.lengths + axes.count);
  const bool is_large = bytes_of(shape, item) >= std::size_t{large_array};
  return is_large ? allocate(shape, dtype) : Array(dtype, shape);
}

// Reads a state, None for zeros, or a pair that may have None in it.
bool Layers::read_state(Reader& reader, const py::handle& state, const Sequence& x,
                        const char*& h, const char*& c) const {
  if (state.is_none()) return true;
  if (!has_c()) {
    h = reader.whole(state, state_axes(x, layout().R));
    return reader.ok;
  }
  if (!PyTuple_CheckExact(state.ptr()) || PyTuple_GET_SIZE(state.ptr()) != 2)
    return false;
  h = reader.whole(PyTuple_GET_ITEM(state.ptr(), 0), state_axes(x, layout().R));
  c = reader.whole(PyTuple_GET_ITEM(state.ptr(), 1), state_axes(x, layout().H));
  return reader.ok;
}

py::object Layers::state_of(const Array& h, const MaybeArray& c) const {
  if (!c) return h;
  return py::make_tuple(h, *c);
}

py::object Layers::forward(const py::object& x, const py::object& state,
                           const py::object& lengths, const py::object& resets,
                           const py::object& mask, const py::object& options,
                           const py::object& out, bool saves) const {
  const Layout& l = layout();
  const CallOptions o(options);
  Reader reader(l.size), of_x(l.item);
  const Sequence input = of_x.sequence(x, batch_first_);
  if (!of_x.ok || input.n != l.I) return py::none();
  StackForward c{};
  c.T = input.T;
  c.B = input.B;
  c.reverse = reverse_;
  o.put(c);
  c.x_item = l.item;
  c.x = input.start;
  c.x_t = input.t;
  c.x_b = input.b;
  std::vector<index> lengths_copy;
  Memory resets_copy, mask_copy;
  if (!read_state(reader, state, input, c.h0, c.c0)) return py::none();
  if (!copy_lengths(lengths, input, lengths_copy)) return py::none();
  if (!copy_flags(resets, input, batch_first_, resets_copy)) return py::none();
  if (!copy_flags(mask, input, batch_first_, mask_copy)) return py::none();
  if (!lengths.is_none()) c.lengths = lengths_copy.data();
  c.resets = resets_copy.as<const bool>();
  c.mask = mask_copy.as<const bool>();
  if (c.repeats && !c.mask) return py::none();
  if (!fits_lengths(c)) return py::none();

  const index D = stack_.directions;
  const Array y = out.is_none() ? make(sequence_axes(input, D * l.R), l.item)
                                : py::reinterpret_borrow<Array>(out);
  const Array h_n = make(state_axes(input, l.R));
  MaybeArray c_n, cells, trace;
  if (has_c()) c_n = make(state_axes(input, l.H));
  if (o.return_cells) cells = make(sequence_axes(input, D * l.H));
  if (o.trace) {
    const int blocks = stack_.weights[0]->blocks();
    trace = make({stack_.count(), input.T, input.B, blocks, l.H}, l.item);
  }
  const Sequence of_y = sequence_of(y, input, batch_first_);
  c.y = write_to(y);
  c.y_t = of_y.t;
  c.y_b = of_y.b;
  c.h_n = write_to(h_n);
  c.c_n = write_to(c_n);
  Sequence of_cells{};
  if (cells) of_cells = sequence_of(*cells, input, batch_first_);
  c.cells = write_to(cells);
  c.cells_t = of_cells.t;
  c.cells_b = of_cells.b;
  c.trace = write_to(trace);
  const bool trains = saves || o.values.training;
  if (trains && stack_.weights[0]->is_narrow() && !l.halves) refuse("options");
  // What Python keeps is made before anything is computed, so that nothing after it
  // fails.
  py::tuple results(2 + o.return_cells + o.trace);
  results[0] = y;
  results[1] = state_of(h_n, c_n);
  if (cells) results[2] = *cells;
  if (trace) results[2 + o.return_cells] = *trace;
  if (!saves) {
    without_gil([&] { fusedrnn::forward(stack_, c); });
    return results;
  }

  // pybind11 does not destroy an object that it cannot register: it is empty at first.
  const py::tuple pair = py::make_tuple(results, Tape());
  Tape& tape = pair[1].cast<Tape&>();
  tape.owner_ = py::cast(this);
  tape.layers_ = this;
  tape.x_ = input;
  tape.y_ = of_y;
  tape.cells_ = of_cells;
  tape.kept_ = {x, y};
  if (cells) tape.kept_.push_back(*cells);
  tape.lengths_ = std::move(lengths_copy);
  tape.resets_ = std::move(resets_copy);
  tape.mask_ = std::move(mask_copy);
  tape.call_ = c;
  tape.keep_state();
  without_gil([&] {
    const index rows[] = {input.T, input.B};
    tape.saved_ = Memory(bytes_of(rows, fusedrnn::saved_bytes(stack_, c)));
    c.saved = tape.saved_.as<char>();
    fusedrnn::forward(stack_, c);
  });
  freeze(y);
  if (cells) freeze(*cells);
  return pair;
}

void Tape::keep_state() {
  const Layout& l = layers_->layout();
  const index rows = layers_->stack_.count() * x_.B;
  const index of_h = call_.h0 ? rows * l.bytes(l.R) : 0;
  const index of_c = call_.c0 ? rows * l.bytes(l.H) : 0;
  if (of_h + of_c == 0) return;
  state_ = Memory(static_cast<std::size_t>(of_h + of_c));
  char* const to = state_.as<char>();
  if (of_h) std::memcpy(to, call_.h0, of_h);
  if (of_c) std::memcpy(to + of_h, call_.c0, of_c);
  if (call_.h0) call_.h0 = to;
  if (call_.c0) call_.c0 = to + of_h;
}

py::object Tape::backward(const py::object& dy, const py::object& d_state,
                          const py::object& dcells) const {
  const Layers& of = *layers_;
  const Stack& stack = of.stack_;
  const Layout& l = of.layout();
  const index D = stack.directions;
  StackBackward c{};
  static_cast<StackCall&>(c) = call_;
  Reader reader(l.size), of_y(l.item);
  const Sequence of_dy = of_y.sequence(dy, of.batch_first_, x_, D * l.R);
  const Sequence of_dcells = reader.sequence(dcells, of.batch_first_, x_, D * l.H);
  const bool reads = of.read_state(reader, d_state, x_, c.dh_n, c.dc_n) && reader.ok;
  if (!reads || !of_y.ok || (!dcells.is_none() && !cells_.start)) return py::none();
  c.y = y_.start, c.y_t = y_.t, c.y_b = y_.b;
  c.cells = cells_.start, c.cells_t = cells_.t, c.cells_b = cells_.b;
  c.saved = saved_.as<const char>();
  c.dy = of_dy.start, c.dy_t = of_dy.t, c.dy_b = of_dy.b;
  c.dcells = of_dcells.start, c.dcells_t = of_dcells.t, c.dcells_b = of_dcells.b;

  const Array dx = of.make(of.sequence_axes(x_, l.I), l.item);
  const Array dh0 = of.make(of.state_axes(x_, l.R));
  MaybeArray dc0;
  if (of.has_c()) dc0 = of.make(of.state_axes(x_, l.H));
  const Sequence of_dx = sequence_of(dx, x_, of.batch_first_);
  c.dx = write_to(dx), c.dx_t = of_dx.t, c.dx_b = of_dx.b;
  c.dh0 = write_to(dh0);
  c.dc0 = write_to(dc0);
  py::list gradients;
  std::vector<char*> addresses;
  for (const Arrays& parameters : of.parameters_) {
    for (const MaybeArray& p : parameters) {
      addresses.push_back(nullptr);
      if (!p) continue;
      const Array gradient =
          p->ndim() == 2 ? of.make({p->shape(0), p->shape(1)}) : of.make({p->shape(0)});
      addresses.back() = write_to(gradient);
      gradients.append(gradient);
    }
  }
  c.gradients = addresses.data();
  c.gradient_item = l.size;
  without_gil([&] { fusedrnn::backward(stack, c); });
  return py::make_tuple(dx, of.state_of(dh0, dc0), gradients);
}

void bind_layers(py::module_& m) {
  m.def("set_bfloat16", [](const py::dtype& dtype) {
    if (bfloat16().type >= 0) return;
    bfloat16().dtype = dtype;
    bfloat16().type = dtype.num();  // last, because other threads may read
  });
  py::class_<Layers>(m, "Layers")
      .def(py::init<const std::string&, std::vector<Arrays>, int, double, bool, bool,
                    bool, std::vector<Scales>>(),
           py::arg("cell"), py::arg("parameters"), py::arg("directions") = 1,
           py::arg("dropout") = 0.0, py::arg("batch_first") = false,
           py::arg("layered") = true, py::arg("reverse") = false,
           py::arg("scales") = std::vector<Scales>())
      .def_property_readonly("isa", &Layers::isa)
      .def("plan", &Layers::plan)
      .def("saved_bytes", &Layers::saved_bytes)
      .def("forward", &Layers::forward);
  py::class_<Tape>(m, "Tape").def("backward", &Tape::backward);
}

}  // namespace fusedrnn
