#include "weights.h"

#include <pybind11/stl.h>

#include <algorithm>

namespace fusedrnn {

namespace {

const Isa& find_isa(const std::optional<std::string>& name) {
  if (!name) return active_isa();
  for (const auto& [isa, supported] : compiled_isas()) {
    if (isa->name == *name && supported) return *isa;
  }
  throw py::value_error("_cpu: no ISA " + *name);
}

const Kernels& kernels_of(const Isa& isa, index size) {
  return size == 4 ? *isa.f32 : *isa.f64;
}

const CellKernels& find_cell(const Isa& isa, index size, const std::string& name) {
  for (const CellKernels& cell : kernels_of(isa, size).cells) {
    if (cell.name == name) return cell;
  }
  throw py::value_error("_cpu: no cell " + name);
}

Model model_of(const CellKernels& cell, const Array& weight_ih, const Array& weight_hh,
               const Arrays& p) {
  if (!(weight_ih.flags() & py::array::c_style)) refuse("weight_ih");
  if (!(weight_hh.flags() & py::array::c_style)) refuse("weight_hh");
  if (weight_ih.ndim() != 2 || weight_hh.ndim() != 2) refuse("weight_ih");
  return {weight_ih.shape(1), weight_ih.shape(0) / cell.shape.gates,
          weight_hh.shape(1), cell.shape.variant,
          p[4].has_value(),   p[6].has_value()};
}

}  // namespace

Weights::Weights(const std::string& cell, const Arrays& p, bool backward,
                 const std::optional<std::string>& isa, bool borrow)
    : isa_(find_isa(isa)),
      size_(py::isinstance<py::array_t<float>>(p[0].value()) ? 4 : 8),
      cell_(find_cell(isa_, size_, cell)),
      backward_(backward),
      borrow_(borrow),
      weight_ih_(p[0].value()),
      weight_hh_(p[1].value()),
      vectors_{p[5], p[6], p[7], p[8], p[9]},
      layout_(kernels_of(isa_, size_), cell_, model_of(cell_, weight_ih_, weight_hh_, p)),
      model_(layout_.model) {
  const auto& [I, H, R, variant, projects, norm] = model_;
  const index GH = cell_.shape.gates * H;
  const Parameters<char> parameters{model_,
                                    read(weight_ih_, size_, "weight_ih", {GH, I}),
                                    read(weight_hh_, size_, "weight_hh", {GH, R}),
                                    read(p[2], size_, "bias_ih", {GH}),
                                    read(p[3], size_, "bias_hh", {GH}),
                                    read(p[4], size_, "weight_hr", {R, H})};
  if (!projects && R != H) refuse("weight_hh");
  if (R > H) refuse("weight_hr");
  const auto given = vectors();
  const bool has_c = cell_.shape.has_c;
  if (norm && (!given.gamma_hh || (has_c && !given.gamma_c))) refuse("gamma");
  if (norm && has_c && !given.beta_c) refuse("beta_c");
  const auto bytes = static_cast<std::size_t>(packed_bytes(layout_, backward_, borrow_));
  if (bytes == 0) return;
  const py::gil_scoped_release release;
  packed_ = Memory(bytes);
  pack(layout_, parameters, backward_, borrow_, packed_.as<char>());
}

index Weights::saved_size(const CallOptions& options) const {
  const bool saves = saves_slots(cell_.shape.saves, options.values);
  return saves ? layout_.record_bytes() / size_ : 0;
}

index Weights::saved_values(const CallOptions& options) const {
  const bool saves = saves_slots(cell_.shape.saves, options.values);
  return saves ? layout_.record.values() : 0;
}

Vectors<const char> Weights::vectors() const {
  const index H = model_.H, GH = cell_.shape.gates * H;
  return {read(vectors_[0], size_, "weight_ch", {cell_.shape.peephole_count * H}),
          read(vectors_[1], size_, "gamma_ih", {GH}),
          read(vectors_[2], size_, "gamma_hh", {GH}),
          read(vectors_[3], size_, "gamma_c", {H}),
          read(vectors_[4], size_, "beta_c", {H})};
}

void Weights::sizes(Sizes& p, const Array& x, bool reverse) const {
  if (x.ndim() != 3) refuse("x");
  p = {x.shape(0), x.shape(1), model_.I, model_.H, model_.R, reverse};
  if (p.T < 1 || p.B < 1 || p.I < 1 || p.H < 1) refuse("x");
}

// Sets the arguments that forward and backward share.
void Weights::start(ForwardOf<char>& p, Masks& masks, const CallOptions& options,
                    const Array& x, const Array& h0, const MaybeArray& c0,
                    const MaybeArray& lengths, const MaybeArray& resets,
                    bool reverse) const {
  sizes(p, x, reverse);
  masks = {read<index>(lengths, "lengths", {p.B}),
           read<bool>(resets, "resets", {p.T, p.B})};
  const auto is_full = [&](index length) { return length == p.T; };
  if (masks.lengths && std::all_of(masks.lengths, masks.lengths + p.B, is_full)) {
    masks.lengths = nullptr;
  }
  p.model = model_;
  p.options = options.values;
  p.vectors = vectors();
  const bool needs_rows = model_.projects || model_.norm || p.vectors.weight_ch;
  if (options.row_wise ? borrow_ : needs_rows) refuse("options");
  const index GH = cell_.shape.gates * p.H;
  p.weight_ih = read(weight_ih_, size_, "weight_ih", {GH, p.I});
  p.weight_hh = read(weight_hh_, size_, "weight_hh", {GH, p.R});
  p.x = read(x, size_, "x", {p.T, p.B, p.I});
  p.x_t = x.strides(0);
  p.x_b = x.strides(1);
  p.h0 = read(h0, size_, "h0", {p.B, p.R});
  p.c0 = read(c0, size_, "c0", {p.B, p.H});
}

void Weights::forward(const CallOptions& options, const Array& x, const Array& h0,
                      const MaybeArray& c0, const MaybeArray& lengths,
                      const MaybeArray& resets, bool reverse, MaybeArray y,
                      MaybeArray h_n, MaybeArray c_n, MaybeArray saved, MaybeArray cells,
                      MaybeArray trace) const {
  if (backward_) refuse("weights");
  Forward p{};
  start(p, p.masks, options, x, h0, c0, lengths, resets, reverse);
  p.has_options = options.row_wise;
  p.weights = packed_.as<const char>();
  p.unpacked = borrow_;
  p.y = write(y, size_, "y", {p.T, p.B, p.R});
  p.y_t = stride(y, 0);
  p.y_b = stride(y, 1);
  p.h_n = write(h_n, size_, "h_n", {p.B, p.R});
  p.c_n = write(c_n, size_, "c_n", {p.B, p.H});
  p.saved = write(saved, size_, "saved", {p.T, p.B, saved_size(options)});
  p.cells = write(cells, size_, "cells", {p.T, p.B, p.H});
  p.cells_t = stride(cells, 0);
  p.cells_b = stride(cells, 1);
  p.trace = write(trace, size_, "trace", {p.T, p.B, cell_.shape.gates, p.H});
  if (!p.y || !p.h_n) refuse("y or h_n");
  if (cell_.shape.has_c && !(p.c0 && p.c_n)) refuse("c0 or c_n");
  const py::gil_scoped_release release;
  run(layout_, p);
}

void Weights::backward(const CallOptions& options, const Weights& forward, const Array& x,
                       const Array& h0, const MaybeArray& c0, const MaybeArray& lengths,
                       const MaybeArray& resets, bool reverse, const Array& y,
                       const MaybeArray& saved, const MaybeArray& cells,
                       const MaybeArray& dy, const MaybeArray& dh_n,
                       const MaybeArray& dc_n, const MaybeArray& dcells, MaybeArray dx,
                       Arrays& d, MaybeArray dh0, MaybeArray dc0) const {
  if (&forward.cell_ != &cell_) refuse("forward");
  if (!backward_) refuse("weights");
  Backward p{};
  start(p, p.masks, options, x, h0, c0, lengths, resets, reverse);
  p.has_options = options.row_wise;
  const index GH = cell_.shape.gates * p.H, saved_values = saved_size(options);
  p.weights = packed_.as<const char>();
  p.forward_weights = forward.packed_.as<const char>();
  p.y = const_cast<char*>(read(y, size_, "y", {p.T, p.B, p.R}));
  p.y_t = stride(y, 0);
  p.y_b = stride(y, 1);
  p.saved = const_cast<char*>(read(saved, size_, "saved", {p.T, p.B, saved_values}));
  p.cells = const_cast<char*>(read(cells, size_, "cells", {p.T, p.B, p.H}));
  p.cells_t = stride(cells, 0);
  p.cells_b = stride(cells, 1);
  p.dy = read(dy, size_, "dy", {p.T, p.B, p.R});
  p.dy_t = stride(dy, 0);
  p.dy_b = stride(dy, 1);
  p.dh_n = read(dh_n, size_, "dh_n", {p.B, p.R});
  p.dc_n = read(dc_n, size_, "dc_n", {p.B, p.H});
  p.dcells = read(dcells, size_, "dcells", {p.T, p.B, p.H});
  p.dcells_t = stride(dcells, 0);
  p.dcells_b = stride(dcells, 1);
  p.dx = write(dx, size_, "dx", {p.T, p.B, p.I});
  p.dx_t = stride(dx, 0);
  p.dx_b = stride(dx, 1);
  p.dweight_ih = write(d[0], size_, "dweight_ih", {GH, p.I});
  p.dweight_hh = write(d[1], size_, "dweight_hh", {GH, p.R});
  p.dbias_ih = write(d[2], size_, "dbias_ih", {GH});
  p.dbias_hh = write(d[3], size_, "dbias_hh", {GH});
  p.dweight_hr = write(d[4], size_, "dweight_hr", {p.R, p.H});
  const index of_peepholes = cell_.shape.peephole_count * p.H;
  p.dvectors = {
      write(d[5], size_, "dweight_ch", {of_peepholes}),
      write(d[6], size_, "dgamma_ih", {GH}), write(d[7], size_, "dgamma_hh", {GH}),
      write(d[8], size_, "dgamma_c", {p.H}), write(d[9], size_, "dbeta_c", {p.H})};
  p.dh0 = write(dh0, size_, "dh0", {p.B, p.R});
  p.dc0 = write(dc0, size_, "dc0", {p.B, p.H});
  if (!p.dh0) refuse("dh0");
  if (cell_.shape.has_c && !(p.c0 && p.dc0)) refuse("c0 or dc0");
  const bool again = saved_values && !p.saved;
  if (again && (!options.row_wise || (cell_.shape.has_c && !p.cells))) refuse("saved");
  const py::gil_scoped_release release;
  run(layout_, p);
}

py::dict Weights::plan(index T, index B, const CallOptions& options) const {
  Forward p{};
  static_cast<Sizes&>(p) = {T, B, model_.I, model_.H, model_.R, false};
  p.model = model_;
  p.options = options.values;
  p.has_options = options.row_wise;
  const ForwardPlan found = fusedrnn::plan(layout_, p);
  py::dict summary;
  summary["threads"] = found.threads;
  summary["by_rows"] = found.by_rows;
  summary["fused"] = found.fused;
  summary["stretch"] = found.stretch;
  summary["tile"] = py::make_tuple(found.tile_rows, found.tile_units);
  summary["saved"] = found.saved;
  summary["workspace_bytes"] = found.workspace;
  summary["packed_bytes"] = packed_.bytes();
  return summary;
}

py::object Weights::call(const py::object& x, const py::object& state) const {
  const bool pair = cell_.shape.has_c;
  py::object h0 = state, c0 = py::none();
  if (pair && !state.is_none()) {
    if (!PyTuple_CheckExact(state.ptr()) || PyTuple_GET_SIZE(state.ptr()) != 2) {
      return py::none();
    }
    h0 = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(state.ptr(), 0));
    c0 = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(state.ptr(), 1));
    if (h0.is_none() || c0.is_none()) return py::none();
  }
  const auto outputs = plain_forward(x, h0, c0, false, false, 1);
  if (!outputs) return py::none();
  py::object last = outputs->h_n;
  if (pair) last = py::make_tuple(outputs->h_n, *outputs->c_n);
  return py::make_tuple(outputs->y, std::move(last));
}

// The start of an array that the kernels can read as it is, else null.
const char* Weights::ready(const py::handle& object, Axes shape) const {
  if (!has_elements(object, size_)) return nullptr;
  const auto a = py::reinterpret_borrow<Array>(object);
  if (a.ndim() != static_cast<index>(shape.size()) ||
      !std::equal(shape.begin(), shape.end(), a.shape())) {
    return nullptr;
  }
  return (a.flags() & whole_flags) == whole_flags ? static_cast<const char*>(a.data())
                                                  : nullptr;
}

// The start of an array whose rows are contiguous, and its strides, else null.
const char* Weights::ready_rows(const py::handle& object, Axes shape, index& stride_t,
                                index& stride_b) const {
  if (!has_elements(object, size_)) return nullptr;
  const auto a = py::reinterpret_borrow<Array>(object);
  if (a.ndim() != 3 || !std::equal(shape.begin(), shape.end(), a.shape())) return nullptr;
  const bool whole = a.strides(0) % size_ == 0 && a.strides(1) % size_ == 0;
  const bool contiguous = a.strides(2) == size_ || a.shape(2) == 1;
  const bool aligned = a.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if (!whole || !contiguous || !aligned) return nullptr;
  stride_t = a.strides(0);
  stride_b = a.strides(1);
  return static_cast<const char*>(a.data());
}

// A new array, large ones of memory that is used again.
Array Weights::make(const std::vector<index>& shape) const {
  index bytes = size_;
  for (const index n : shape) bytes *= n;
  const py::dtype dtype = size_ == 4 ? py::dtype::of<float>() : py::dtype::of<double>();
  return bytes >= large_array ? allocate(shape, dtype) : Array(dtype, shape);
}

// x, the sizes and the state of a plain call; false where something is not ready.
bool Weights::start_plain(ForwardOf<char>& p, const py::handle& x, const py::handle& h0,
                          const py::handle& c0, bool reverse, index layers,
                          std::optional<Array>& zeros) const {
  if (!py::isinstance<Array>(x) || model_.projects || model_.norm) return false;
  const auto rows = py::reinterpret_borrow<Array>(x);
  if (rows.ndim() != 3 || rows.shape(0) < 1 || rows.shape(1) < 1) return false;
  sizes(p, rows, reverse);
  p.model = model_;
  p.options = CallOptions{}.values;
  p.weight_ih = static_cast<const char*>(weight_ih_.data());
  p.weight_hh = static_cast<const char*>(weight_hh_.data());
  const auto state = [&](const py::handle& given) -> const char* {
    if (!given.is_none()) {
      return layers > 0 ? ready(given, {layers, p.B, p.H}) : ready(given, {p.B, p.H});
    }
    if (!zeros) {
      zeros.emplace(make({p.B, p.H}));
      std::fill_n(static_cast<char*>(zeros->mutable_data()), zeros->nbytes(), '\0');
    }
    return static_cast<const char*>(zeros->data());
  };
  p.x = ready_rows(x, {p.T, p.B, p.I}, p.x_t, p.x_b);
  p.h0 = state(h0);
  if (cell_.shape.has_c) p.c0 = state(c0);
  return p.x && p.h0 && (p.c0 || !cell_.shape.has_c);
}

std::optional<Weights::Outputs> Weights::plain_forward(const py::handle& x,
                                                       const py::handle& h0,
                                                       const py::handle& c0, bool reverse,
                                                       bool saves, index layers) const {
  Forward p{};
  std::optional<Array> zeros;
  if (backward_ || !start_plain(p, x, h0, c0, reverse, layers, zeros)) return {};
  const auto state = [&] {
    return layers > 0 ? make({layers, p.B, p.H}) : make({p.B, p.H});
  };
  Outputs outputs{make({p.T, p.B, p.H}), state(), {}, {}};
  if (cell_.shape.has_c) outputs.c_n = state();
  const index size = saves ? saved_size({}) : 0;
  if (size > 0) outputs.saved = make({p.T, p.B, size});
  p.weights = packed_.as<const char>();
  p.unpacked = borrow_;
  const auto start = [](MaybeArray& a) {
    return a ? static_cast<char*>(a->mutable_data()) : nullptr;
  };
  p.y = static_cast<char*>(outputs.y.mutable_data());
  p.y_t = p.B * p.H * size_;
  p.y_b = p.H * size_;
  p.h_n = static_cast<char*>(outputs.h_n.mutable_data());
  p.c_n = start(outputs.c_n);
  p.saved = start(outputs.saved);
  const py::gil_scoped_release release;
  run(layout_, p);
  return outputs;
}

py::object Weights::plain_backward(const py::handle& x, const py::handle& h0,
                                   const py::handle& c0, bool reverse,
                                   const py::handle& y, const py::handle& saved,
                                   const py::handle& dy, const py::handle& dh_n,
                                   const py::handle& dc_n, unsigned wanted) const {
  Backward p{};
  std::optional<Array> zeros;
  if (!backward_ || !start_plain(p, x, h0, c0, reverse, 0, zeros)) return py::none();
  const index GH = cell_.shape.gates * p.H, size = saved_size({});
  const Axes of_y{p.T, p.B, p.H};
  p.y = const_cast<char*>(ready_rows(y, of_y, p.y_t, p.y_b));
  if (size > 0) p.saved = const_cast<char*>(ready(saved, {p.T, p.B, size}));
  if (!dy.is_none()) p.dy = ready_rows(dy, of_y, p.dy_t, p.dy_b);
  if (!dh_n.is_none()) p.dh_n = ready(dh_n, {p.B, p.H});
  if (!dc_n.is_none()) p.dc_n = ready(dc_n, {p.B, p.H});
  const bool is_ready = p.y && (p.saved || size == 0) && (p.dy || dy.is_none()) &&
                        (p.dh_n || dh_n.is_none()) && (p.dc_n || dc_n.is_none());
  if (!is_ready) return py::none();
  p.weights = packed_.as<const char>();
  std::vector<Array> kept;
  py::list gradients;
  int bit = 0;
  // The state's gradients are made in any case.
  const auto gradient = [&](char*& to, bool there, bool needed,
                            const std::vector<index>& shape) {
    const bool is_wanted = wanted >> bit++ & 1;
    if (!there || !(is_wanted || needed)) return;
    kept.push_back(make(shape));
    to = static_cast<char*>(kept.back().mutable_data());
    if (is_wanted) gradients.append(kept.back());
  };
  gradient(p.dx, true, false, {p.T, p.B, p.I});
  gradient(p.dh0, true, true, {p.B, p.H});
  gradient(p.dc0, cell_.shape.has_c, true, {p.B, p.H});
  gradient(p.dweight_ih, true, false, {GH, p.I});
  gradient(p.dweight_hh, true, false, {GH, p.H});
  gradient(p.dbias_ih, true, false, {GH});
  gradient(p.dbias_hh, true, false, {GH});
  p.dx_t = p.B * p.I * size_;
  p.dx_b = p.I * size_;
  {
    const py::gil_scoped_release release;
    run(layout_, p);
  }
  return gradients;
}

}  // namespace fusedrnn
