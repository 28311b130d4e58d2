// fusedrnn._cpu: arrays in and out. src/fusedrnn/functional.py checks what users pass and
// allocates what they get; here a wrong array is a programming error and only refused.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/memory.h"
#include "../cpu/team.h"
#include "../vec/random.h"
#include "dlpack.h"

namespace py = pybind11;

namespace fusedrnn {
namespace {

using Array = py::array;
using MaybeArray = std::optional<py::array>;

[[noreturn]] void refuse(const char* name) {
  throw py::value_error(std::string("_cpu: ") + name + " has a wrong dtype or shape");
}

// The pointer to an array of this type and shape whose last axis is contiguous.
template <class S>
const S* read(const Array& a, const char* name, std::initializer_list<index> shape) {
  if (!py::isinstance<py::array_t<S>>(a)) refuse(name);
  if (a.ndim() != static_cast<index>(shape.size())) refuse(name);
  index axis = 0, size = 1;
  for (const index n : shape) {
    if (a.shape(axis++) != n) refuse(name);
    size *= n;
  }
  const bool contiguous = a.strides(axis - 1) == a.itemsize() || a.shape(axis - 1) == 1;
  if (size > 0 && !contiguous) refuse(name);
  return static_cast<const S*>(a.data());
}

template <class S>
const S* read(const MaybeArray& a, const char* name, std::initializer_list<index> shape) {
  return a ? read<S>(*a, name, shape) : nullptr;
}

template <class S>
S* write(Array& a, const char* name, std::initializer_list<index> shape) {
  if (!a.writeable()) refuse(name);
  return const_cast<S*>(read<S>(a, name, shape));
}

template <class S>
S* write(MaybeArray& a, const char* name, std::initializer_list<index> shape) {
  return a ? write<S>(*a, name, shape) : nullptr;
}

index stride(const Array& a, int axis) { return a.strides(axis) / a.itemsize(); }

// Of an array that kernels can read as it is.
constexpr int whole_flags =
    int{py::array::c_style} | int{py::detail::npy_api::NPY_ARRAY_ALIGNED_};

// From so many bytes on it pays to keep an array's memory when it is freed.
constexpr index large_array = 1 << 17;

// An uninitialised array in memory of ours.
Array allocate(const std::vector<index>& shape, const py::dtype& dtype) {
  std::size_t bytes = static_cast<std::size_t>(dtype.itemsize());
  for (const index n : shape) bytes *= static_cast<std::size_t>(n);
  auto memory = std::make_unique<Memory>(bytes);
  void* const start = memory->as<void>();
  const py::capsule owner(memory.release(),
                          [](void* p) { delete static_cast<Memory*>(p); });
  return Array(dtype, shape, start, owner);
}

// What a call is asked for beside its arrays. Nothing, as it is made.
struct CallOptions {
  bool row_wise = false;  // the plain kernels do not do
  Options values{std::numeric_limits<double>::infinity(),
                 std::numeric_limits<double>::infinity(),
                 0,
                 0,
                 0,
                 false,
                 0,
                 0,
                 0};
};

// Of parameters, or their gradients, in their order (reference.Parameters), those that
// there are.
using Arrays = std::array<MaybeArray, 10>;

// A layer's parameters in one direction, packed for the forward or the backward kernels
// of one ISA, or only borrowed: packing for a few rows costs more than
// it gains. Never changes, so threads share it.
class Weights {
 public:
  Weights(const std::string& cell, const Arrays& p, bool backward,
          const std::optional<std::string>& isa, bool borrow)
      : isa_(isa ? find_isa(*isa) : active_isa()),
        cell_(find_cell(isa_, cell)),
        backward_(backward),
        single_(py::isinstance<py::array_t<float>>(p[0].value())),
        borrow_(borrow),
        weight_ih_(p[0].value()),
        weight_hh_(p[1].value()),
        vectors_{p[5], p[6], p[7], p[8], p[9]} {
    if (!(weight_ih_.flags() & py::array::c_style)) refuse("weight_ih");
    if (!(weight_hh_.flags() & py::array::c_style)) refuse("weight_hh");
    if (weight_ih_.ndim() != 2 || weight_hh_.ndim() != 2) refuse("weight_ih");
    model_.I = weight_ih_.shape(1);
    model_.H = weight_ih_.shape(0) / cell_.gates;
    model_.R = weight_hh_.shape(1);
    model_.variant = cell_.variant;
    model_.projects = p[4].has_value();
    model_.norm = p[6].has_value();
    if (single_) {
      pack<float>(p[2], p[3], p[4]);
    } else {
      pack<double>(p[2], p[3], p[4]);
    }
  }

  std::string cell() const { return std::string(cell_.name); }
  std::string isa() const { return std::string(isa_.name); }
  index saved_size(const CallOptions& options) const {
    return single_ ? cell_.f32.saved_size(model_, options.values)
                   : cell_.f64.saved_size(model_, options.values);
  }

  index saved_values(const CallOptions& options) const {
    return single_ ? cell_.f32.saved_values(model_, options.values)
                   : cell_.f64.saved_values(model_, options.values);
  }

  void forward(const CallOptions& options, const Array& x, const Array& h0,
               const MaybeArray& c0, const MaybeArray& lengths, const MaybeArray& resets,
               bool reverse, Array y, Array h_n, MaybeArray c_n, MaybeArray saved,
               MaybeArray cells, MaybeArray trace) const {
    visit(false, [&]<class S>(const S* packed) {
      Forward<S> p{};
      start(p, options, x, h0, c0, lengths, resets, reverse);
      p.weights = packed;
      if (borrow_) {
        p.weight_ih = read<S>(weight_ih_, "weight_ih", {cell_.gates * p.H, p.I});
        p.weight_hh = read<S>(weight_hh_, "weight_hh", {cell_.gates * p.H, p.R});
      }
      p.y = write<S>(y, "y", {p.T, p.B, p.R});
      p.y_t = stride(y, 0);
      p.y_b = stride(y, 1);
      p.h_n = write<S>(h_n, "h_n", {p.B, p.R});
      p.c_n = write<S>(c_n, "c_n", {p.B, p.H});
      const auto& kernels = cell_.kernels<S>();
      p.saved = write<S>(saved, "saved",
                         {p.T, p.B, kernels.saved_size(model_, options.values)});
      p.cells = write<S>(cells, "cells", {p.T, p.B, p.H});
      p.cells_t = cells ? stride(*cells, 0) : 0;
      p.cells_b = cells ? stride(*cells, 1) : 0;
      p.trace = write<S>(trace, "trace", {p.T, p.B, cell_.gates, p.H});
      if (cell_.has_c && !(p.c0 && p.c_n)) refuse("c0 or c_n");
      const py::gil_scoped_release release;
      run(kernels, cell_.gates, p);
    });
  }

  py::dict plan(index T, index B, const CallOptions& options) const {
    return single_ ? plan_as<float>(T, B, options) : plan_as<double>(T, B, options);
  }

  // A layer's whole call, for speed where one step takes a microsecond: x (T, B, I), the
  // state (1, B, H) each or None for zeros. Returns (y, state) or, where an argument
  // needs preparing or is wrong, None: the caller then takes the long way, which words
  // errors.
  py::object call(const py::object& x, const py::object& state) const {
    const bool pair = cell_.has_c;
    py::object h0 = state, c0 = py::none();
    if (pair && !state.is_none()) {
      if (!PyTuple_CheckExact(state.ptr()) || PyTuple_GET_SIZE(state.ptr()) != 2) {
        return py::none();
      }
      h0 = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(state.ptr(), 0));
      c0 = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(state.ptr(), 1));
      if (h0.is_none() || c0.is_none()) return py::none();
    }
    const auto made = plain_forward(x, h0, c0, false, false, 1);
    if (!made) return py::none();
    py::object last = made->h_n;
    if (pair) last = py::make_tuple(made->h_n, *made->c_n);
    return py::make_tuple(made->y, std::move(last));
  }

  // What a plain call makes.
  struct Made {
    Array y, h_n;
    MaybeArray c_n, saved;
  };
  // A plain call as it comes, or nothing where an argument needs preparing or is wrong:
  // x (T, B, I) of contiguous rows, h0 and c0 (B, H), or (layers, B, H) where that is
  // not 0, or None for zeros.
  std::optional<Made> plain_forward(const py::handle& x, const py::handle& h0,
                                    const py::handle& c0, bool reverse, bool saves,
                                    index layers) const {
    return single_ ? plain_forward_as<float>(x, h0, c0, reverse, saves, layers)
                   : plain_forward_as<double>(x, h0, c0, reverse, saves, layers);
  }
  // And back: the gradients of x, h0, c0 and the parameters whose bits are in `wanted`.
  py::object plain_backward(const py::handle& x, const py::handle& h0,
                            const py::handle& c0, bool reverse, const py::handle& y,
                            const py::handle& saved, const py::handle& dy,
                            const py::handle& dh_n, const py::handle& dc_n,
                            unsigned wanted) const {
    return single_ ? plain_backward_as<float>(x, h0, c0, reverse, y, saved, dy, dh_n,
                                              dc_n, wanted)
                   : plain_backward_as<double>(x, h0, c0, reverse, y, saved, dy, dh_n,
                                               dc_n, wanted);
  }

  // `forward`: the weights of the forward, where backward needs them, which is row by
  // row.
  void backward(const CallOptions& options, const Weights& forward, const Array& x,
                const Array& h0, const MaybeArray& c0, const MaybeArray& lengths,
                const MaybeArray& resets, bool reverse, const Array& y,
                const MaybeArray& saved, const MaybeArray& cells, const MaybeArray& dy,
                const MaybeArray& dh_n, const MaybeArray& dc_n, const MaybeArray& dcells,
                MaybeArray dx, Arrays& d, Array dh0, MaybeArray dc0) const {
    if (&forward.cell_ != &cell_ || forward.single_ != single_) refuse("forward");
    visit(true, [&]<class S>(const S* packed) {
      Backward<S> p{};
      start(p, options, x, h0, c0, lengths, resets, reverse);
      const auto& kernels = cell_.kernels<S>();
      const index GH = cell_.gates * p.H;
      p.weights = packed;
      p.weight_ih = read<S>(weight_ih_, "weight_ih", {GH, p.I});
      p.weight_hh = read<S>(weight_hh_, "weight_hh", {GH, p.R});
      p.forward_weights = forward.packed_.template as<const S>();
      p.y = read<S>(y, "y", {p.T, p.B, p.R});
      p.y_t = stride(y, 0);
      p.y_b = stride(y, 1);
      const index saved_size = kernels.saved_size(model_, options.values);
      p.saved = read<S>(saved, "saved", {p.T, p.B, saved_size});
      p.cells = read<S>(cells, "cells", {p.T, p.B, p.H});
      p.cells_t = cells ? stride(*cells, 0) : 0;
      p.cells_b = cells ? stride(*cells, 1) : 0;
      p.dy = read<S>(dy, "dy", {p.T, p.B, p.R});
      p.dy_t = dy ? stride(*dy, 0) : 0;
      p.dy_b = dy ? stride(*dy, 1) : 0;
      p.dh_n = read<S>(dh_n, "dh_n", {p.B, p.R});
      p.dc_n = read<S>(dc_n, "dc_n", {p.B, p.H});
      p.dcells = read<S>(dcells, "dcells", {p.T, p.B, p.H});
      p.dcells_t = dcells ? stride(*dcells, 0) : 0;
      p.dcells_b = dcells ? stride(*dcells, 1) : 0;
      p.dx = write<S>(dx, "dx", {p.T, p.B, p.I});
      p.dx_t = dx ? stride(*dx, 0) : 0;
      p.dx_b = dx ? stride(*dx, 1) : 0;
      p.dweight_ih = write<S>(d[0], "dweight_ih", {GH, p.I});
      p.dweight_hh = write<S>(d[1], "dweight_hh", {GH, p.R});
      p.dbias_ih = write<S>(d[2], "dbias_ih", {GH});
      p.dbias_hh = write<S>(d[3], "dbias_hh", {GH});
      p.dweight_hr = write<S>(d[4], "dweight_hr", {p.R, p.H});
      p.dvectors = {write<S>(d[5], "dweight_ch", {cell_.peepholes * p.H}),
                    write<S>(d[6], "dgamma_ih", {GH}), write<S>(d[7], "dgamma_hh", {GH}),
                    write<S>(d[8], "dgamma_c", {p.H}), write<S>(d[9], "dbeta_c", {p.H})};
      p.dh0 = write<S>(dh0, "dh0", {p.B, p.R});
      p.dc0 = write<S>(dc0, "dc0", {p.B, p.H});
      if (cell_.has_c && !(p.c0 && p.dc0)) refuse("c0 or dc0");
      const bool again = saved_size && !p.saved;
      if (again && (!options.row_wise || (cell_.has_c && !p.cells))) refuse("saved");
      const py::gil_scoped_release release;
      run(kernels, cell_.gates, p);
    });
  }

 private:
  // The values of an array that the kernels can read as it is, else null.
  template <class S>
  static const S* ready(const py::handle& object, std::initializer_list<index> shape) {
    if (!py::isinstance<py::array_t<S>>(object)) return nullptr;
    const auto a = py::reinterpret_borrow<Array>(object);
    if (a.ndim() != static_cast<index>(shape.size())) return nullptr;
    index axis = 0;
    for (const index n : shape) {
      if (a.shape(axis++) != n) return nullptr;
    }
    return (a.flags() & whole_flags) == whole_flags ? static_cast<const S*>(a.data())
                                                    : nullptr;
  }

  template <class S>
  py::dict plan_as(index T, index B, const CallOptions& options) const {
    Forward<S> p{};
    static_cast<Sizes&>(p) = {T, B, model_.I, model_.H, model_.R, false};
    p.model = model_;
    p.options = options.values;
    p.row_wise = options.row_wise;
    const ForwardPlan found = fusedrnn::plan(cell_.kernels<S>(), cell_.gates, p);
    py::dict told;
    told["threads"] = found.threads;
    told["by_rows"] = found.by_rows;
    told["fused"] = found.fused;
    told["stretch"] = found.stretch;
    told["tile"] = py::make_tuple(found.tile_rows, found.tile_units);
    told["saved"] = found.saved;
    told["workspace_bytes"] = found.workspace;
    told["packed_bytes"] = packed_.bytes();
    return told;
  }

  // The values of an array whose rows are contiguous, and their strides, else null.
  template <class S>
  static const S* ready_rows(const py::handle& object, const std::array<index, 3>& shape,
                             index& stride_t, index& stride_b) {
    if (!py::isinstance<py::array_t<S>>(object)) return nullptr;
    const auto a = py::reinterpret_borrow<Array>(object);
    if (a.ndim() != 3 || !std::equal(shape.begin(), shape.end(), a.shape()))
      return nullptr;
    const index size = sizeof(S);
    const bool whole = a.strides(0) % size == 0 && a.strides(1) % size == 0;
    const bool contiguous = a.strides(2) == size || shape[2] == 1;
    const bool aligned = a.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if (!whole || !contiguous || !aligned) return nullptr;
    stride_t = stride(a, 0);
    stride_b = stride(a, 1);
    return static_cast<const S*>(a.data());
  }

  // A new array, large ones of memory that is used again.
  template <class S>
  static Array make(const std::vector<index>& shape) {
    index size = sizeof(S);
    for (const index n : shape) size *= n;
    return size >= large_array ? allocate(shape, py::dtype::of<S>())
                               : Array(py::dtype::of<S>(), shape);
  }

  // A state before the first step, zeros for None, null where it is not ready.
  template <class S>
  static const S* start_at(const py::handle& given, index B, index H, index layers,
                           std::optional<Array>& zeros) {
    if (!given.is_none() && layers > 0) return ready<S>(given, {layers, B, H});
    if (!given.is_none()) return ready<S>(given, {B, H});
    if (!zeros) {
      zeros.emplace(make<S>({B, H}));
      std::fill_n(static_cast<S*>(zeros->mutable_data()), B * H, S(0));
    }
    return static_cast<const S*>(zeros->data());
  }

  // x, the sizes and the state of a plain call; false where something is not ready.
  template <template <class> class Problem, class S>
  bool start_plain(Problem<S>& p, const py::handle& x, const py::handle& h0,
                   const py::handle& c0, bool reverse, index layers,
                   std::optional<Array>& zeros) const {
    if (!py::isinstance<Array>(x) || model_.projects || model_.norm) return false;
    const auto rows = py::reinterpret_borrow<Array>(x);
    if (rows.ndim() != 3 || rows.shape(0) < 1 || rows.shape(1) < 1) return false;
    sizes(p, rows, reverse);
    p.model = model_;
    p.options = CallOptions{}.values;
    p.x = ready_rows<S>(x, {p.T, p.B, p.I}, p.x_t, p.x_b);
    p.h0 = start_at<S>(h0, p.B, p.H, layers, zeros);
    if (cell_.has_c) p.c0 = start_at<S>(c0, p.B, p.H, layers, zeros);
    return p.x && p.h0 && (p.c0 || !cell_.has_c);
  }

  template <class S>
  std::optional<Made> plain_forward_as(const py::handle& x, const py::handle& h0,
                                       const py::handle& c0, bool reverse, bool saves,
                                       index layers) const {
    Forward<S> p{};
    std::optional<Array> zeros;
    if (backward_ || !start_plain(p, x, h0, c0, reverse, layers, zeros)) return {};
    const auto& kernels = cell_.kernels<S>();
    const auto state = [&] {
      return layers > 0 ? make<S>({layers, p.B, p.H}) : make<S>({p.B, p.H});
    };
    Made made{make<S>({p.T, p.B, p.H}), state(), {}, {}};
    if (cell_.has_c) made.c_n = state();
    const index size = saves ? kernels.saved_size(model_, p.options) : 0;
    if (size > 0) made.saved = make<S>({p.T, p.B, size});
    p.weights = packed_.as<const S>();
    if (borrow_) {
      p.weight_ih = static_cast<const S*>(weight_ih_.data());
      p.weight_hh = static_cast<const S*>(weight_hh_.data());
    }
    const auto values = [](MaybeArray& a) {
      return a ? static_cast<S*>(a->mutable_data()) : nullptr;
    };
    p.y = static_cast<S*>(made.y.mutable_data());
    p.y_t = p.B * p.H;
    p.y_b = p.H;
    p.h_n = static_cast<S*>(made.h_n.mutable_data());
    p.c_n = values(made.c_n);
    p.saved = values(made.saved);
    const py::gil_scoped_release release;
    run(kernels, cell_.gates, p);
    return made;
  }

  template <class S>
  py::object plain_backward_as(const py::handle& x, const py::handle& h0,
                               const py::handle& c0, bool reverse, const py::handle& y,
                               const py::handle& saved, const py::handle& dy,
                               const py::handle& dh_n, const py::handle& dc_n,
                               unsigned wanted) const {
    Backward<S> p{};
    std::optional<Array> zeros;
    if (!backward_ || !start_plain(p, x, h0, c0, reverse, 0, zeros)) return py::none();
    const auto& kernels = cell_.kernels<S>();
    const index GH = cell_.gates * p.H, size = kernels.saved_size(model_, p.options);
    const std::array<index, 3> of_y{p.T, p.B, p.H};
    p.y = ready_rows<S>(y, of_y, p.y_t, p.y_b);
    p.saved = size > 0 ? ready<S>(saved, {p.T, p.B, size}) : nullptr;
    p.dy = dy.is_none() ? nullptr : ready_rows<S>(dy, of_y, p.dy_t, p.dy_b);
    p.dh_n = dh_n.is_none() ? nullptr : ready<S>(dh_n, {p.B, p.H});
    p.dc_n = dc_n.is_none() ? nullptr : ready<S>(dc_n, {p.B, p.H});
    const bool is_ready = p.y && (p.saved || size == 0) && (p.dy || dy.is_none()) &&
                          (p.dh_n || dh_n.is_none()) && (p.dc_n || dc_n.is_none());
    if (!is_ready) return py::none();
    p.weights = packed_.as<const S>();
    p.weight_ih = static_cast<const S*>(weight_ih_.data());
    p.weight_hh = static_cast<const S*>(weight_hh_.data());
    std::vector<Array> kept;
    py::list made;
    int bit = 0;
    // The state's gradients are made in any case.
    const auto gradient = [&](S*& to, bool there, bool needed,
                              const std::vector<index>& shape) {
      const bool is_wanted = wanted >> bit++ & 1;
      if (!there || !(is_wanted || needed)) return;
      kept.push_back(make<S>(shape));
      to = static_cast<S*>(kept.back().mutable_data());
      if (is_wanted) made.append(kept.back());
    };
    gradient(p.dx, true, false, {p.T, p.B, p.I});
    gradient(p.dh0, true, true, {p.B, p.H});
    gradient(p.dc0, cell_.has_c, true, {p.B, p.H});
    gradient(p.dweight_ih, true, false, {GH, p.I});
    gradient(p.dweight_hh, true, false, {GH, p.H});
    gradient(p.dbias_ih, true, false, {GH});
    gradient(p.dbias_hh, true, false, {GH});
    p.dx_t = p.B * p.I;
    p.dx_b = p.I;
    {
      const py::gil_scoped_release release;
      run(kernels, cell_.gates, p);
    }
    return made;
  }

  static const Isa& find_isa(const std::string& name) {
    for (const auto& [isa, supported] : compiled_isas()) {
      if (isa->name == name && supported) return *isa;
    }
    throw py::value_error("_cpu: no ISA " + name);
  }

  static const CellEntry& find_cell(const Isa& isa, const std::string& name) {
    for (const CellEntry& cell : isa.cells) {
      if (cell.name == name) return cell;
    }
    throw py::value_error("_cpu: no cell " + name);
  }

  template <class S>
  void pack(const MaybeArray& bias_ih, const MaybeArray& bias_hh,
            const MaybeArray& weight_hr) {
    const auto [I, H, R, variant, projects, norm] = model_;
    const index GH = cell_.gates * H;
    const Parameters<S> p{model_,
                          read<S>(weight_ih_, "weight_ih", {GH, I}),
                          read<S>(weight_hh_, "weight_hh", {GH, R}),
                          read<S>(bias_ih, "bias_ih", {GH}),
                          read<S>(bias_hh, "bias_hh", {GH}),
                          read<S>(weight_hr, "weight_hr", {R, H})};
    if (!projects && R != H) refuse("weight_hh");
    if (R > H) refuse("weight_hr");
    const auto vectors = vectors_of<S>();
    if (norm && (!vectors.gamma_hh || (cell_.has_c && !vectors.gamma_c))) refuse("gamma");
    if (norm && cell_.has_c && !vectors.beta_c) refuse("beta_c");
    const auto& kernels = cell_.kernels<S>();
    const auto size =
        static_cast<std::size_t>(kernels.packed_size(model_, backward_, borrow_));
    if (size == 0) return;
    const py::gil_scoped_release release;
    packed_ = Memory(size * sizeof(S));
    fusedrnn::pack(kernels, p, backward_, borrow_, packed_.as<S>());
  }
  template <class S>
  Vectors<const S> vectors_of() const {
    const index H = model_.H, GH = cell_.gates * H;
    return {read<S>(vectors_[0], "weight_ch", {cell_.peepholes * H}),
            read<S>(vectors_[1], "gamma_ih", {GH}),
            read<S>(vectors_[2], "gamma_hh", {GH}), read<S>(vectors_[3], "gamma_c", {H}),
            read<S>(vectors_[4], "beta_c", {H})};
  }

  template <class F>
  void visit(bool backward, const F& f) const {
    if (backward != backward_) refuse("weights");
    if (single_) {
      f(packed_.as<const float>());
    } else {
      f(packed_.as<const double>());
    }
  }

  void sizes(Sizes& p, const Array& x, bool reverse) const {
    if (x.ndim() != 3) refuse("x");
    p.T = x.shape(0);
    p.B = x.shape(1);
    p.I = model_.I;
    p.H = model_.H;
    p.R = model_.R;
    p.reverse = reverse;
    if (p.T < 1 || p.B < 1 || p.I < 1 || p.H < 1) refuse("x");
  }

  // What both directions read.
  template <template <class> class Problem, class S>
  void start(Problem<S>& p, const CallOptions& options, const Array& x, const Array& h0,
             const MaybeArray& c0, const MaybeArray& lengths, const MaybeArray& resets,
             bool reverse) const {
    sizes(p, x, reverse);
    p.lengths = read<index>(lengths, "lengths", {p.B});
    p.resets = read<bool>(resets, "resets", {p.T, p.B});
    p.model = model_;
    p.options = options.values;
    p.row_wise = options.row_wise;
    p.vectors = vectors_of<S>();
    const bool needs_rows = model_.projects || model_.norm || p.vectors.weight_ch;
    if (p.row_wise ? borrow_ : needs_rows) refuse("options");
    p.x = read<S>(x, "x", {p.T, p.B, p.I});
    p.x_t = stride(x, 0);
    p.x_b = stride(x, 1);
    p.h0 = read<S>(h0, "h0", {p.B, p.R});
    p.c0 = read<S>(c0, "c0", {p.B, p.H});
  }

  const Isa& isa_;
  const CellEntry& cell_;
  const bool backward_;
  Model model_{};
  const bool single_;  // float32
  const bool borrow_;
  const Array weight_ih_, weight_hh_;
  const std::array<MaybeArray, 5> vectors_;
  Memory packed_;
};

// The array that a capsule of DLPack is about, which it keeps. PyTorch's own way to NumPy
// would forbid a tensor's storage to be given back and taken anew, as FSDP does.
Array from_dlpack(const py::capsule& capsule) {
  const auto& tensor = capsule.get_pointer<DLManagedTensor>()->dl_tensor;
  if (tensor.device.device_type != kDLCPU) throw py::type_error("must be on the CPU");
  const DLDataType type = tensor.dtype;
  const char* kind = nullptr;
  if (type.code == kDLFloat && type.bits == 32) kind = "f4";
  if (type.code == kDLFloat && type.bits == 64) kind = "f8";
  if (type.code == kDLInt && type.bits == 32) kind = "i4";
  if (type.code == kDLInt && type.bits == 64) kind = "i8";
  if (type.code == kDLBool) kind = "?";
  if (!kind || type.lanes != 1) throw py::type_error("has a dtype that the CPU has not");
  const index itemsize = type.bits / 8;
  std::vector<index> strides(static_cast<std::size_t>(tensor.ndim));
  for (std::size_t axis = 0; axis < strides.size(); ++axis) {
    strides[axis] = tensor.strides[axis] * itemsize;
  }
  char* const at = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return Array(py::dtype(kind),
               std::vector<index>(tensor.shape, tensor.shape + tensor.ndim), strides, at,
               capsule);
}

// Whether parameters can be read as they are: of one type that the kernels have.
bool are_ready(const Arrays& p) {
  const auto all = [&](const auto& is_ready) {
    return std::all_of(p.begin(), p.end(), [&](const MaybeArray& a) {
      return !a || (is_ready(*a) && (a->flags() & whole_flags) == whole_flags);
    });
  };
  return all([](const Array& a) { return py::isinstance<py::array_t<float>>(a); }) ||
         all([](const Array& a) { return py::isinstance<py::array_t<double>>(a); });
}

// Of an op that does not keep its weights: packed, unless there are few rows.
py::object plain_forward(const std::string& cell, const Arrays& parameters,
                         const py::array& x, const py::object& h0, const py::object& c0,
                         bool reverse, bool saves, index few_rows, index layers) {
  if (x.ndim() != 3 || !are_ready(parameters)) return py::none();
  const bool borrow = x.shape(0) * x.shape(1) <= few_rows;
  const Weights weights(cell, parameters, false, {}, borrow);
  auto made = weights.plain_forward(x, h0, c0, reverse, saves, layers);
  if (!made) return py::none();
  return py::make_tuple(made->y, made->h_n, made->c_n, made->saved);
}

py::object plain_backward(const std::string& cell, const Arrays& parameters,
                          const py::array& x, const py::object& h0, const py::object& c0,
                          bool reverse, const py::object& y, const py::object& saved,
                          const py::object& dy, const py::object& dh_n,
                          const py::object& dc_n, unsigned wanted, index few_rows) {
  if (x.ndim() != 3 || !are_ready(parameters)) return py::none();
  const bool borrow = x.shape(0) * x.shape(1) <= few_rows;
  const Weights weights(cell, parameters, true, {}, borrow);
  return weights.plain_backward(x, h0, c0, reverse, y, saved, dy, dh_n, dc_n, wanted);
}

template <class S>
void drop_as(const Array& from, double p, std::uint64_t seed, std::uint32_t draw,
             std::uint32_t where, Array& to) {
  const index T = to.shape(0), B = to.shape(1), N = to.shape(2);
  const Dropout<S> problem{T,
                           B,
                           N,
                           read<S>(from, "from", {T, B, N}),
                           stride(from, 0),
                           stride(from, 1),
                           write<S>(to, "to", {T, B, N}),
                           stride(to, 0),
                           stride(to, 1),
                           p,
                           seed,
                           draw,
                           where};
  const py::gil_scoped_release release;
  run(problem);
}

// Dropout of (T, B, n), of what is "weights" or lies "between" layers.
void drop(const Array& from, double p, std::uint64_t seed, const std::string& what,
          std::uint32_t where, Array to) {
  if (to.ndim() != 3) refuse("to");
  const auto draw =
      static_cast<std::uint32_t>(what == "weights" ? Draw::weights : Draw::between);
  if (py::isinstance<py::array_t<float>>(from)) {
    drop_as<float>(from, p, seed, draw, where, to);
  } else {
    drop_as<double>(from, p, seed, draw, where, to);
  }
}

// A cell's elementwise function on the active ISA; for tests of its accuracy.
Array elementwise(const std::string& name, const Array& x) {
  for (const MathEntry& function : active_isa().math) {
    if (function.name != name) continue;
    if (py::isinstance<py::array_t<float>>(x)) {
      py::array_t<float> y(x.size());
      run(function.f32, read<float>(x, "x", {x.size()}), y.mutable_data(), x.size());
      return y;
    }
    py::array_t<double> y(x.size());
    run(function.f64, read<double>(x, "x", {x.size()}), y.mutable_data(), x.size());
    return y;
  }
  throw py::value_error("_cpu: no function " + name);
}

// Floating-point operations that `rounds` of a probe did, on the active ISA.
double probe_multiply_add(index rounds, bool single) {
  const py::gil_scoped_release release;
  const Probes& probes = active_isa().probes;
  return (single ? probes.multiply_add_f32 : probes.multiply_add_f64)(rounds);
}

// Lets that many threads meet `rounds` times.
void probe_meetings(index rounds, int threads) {
  const py::gil_scoped_release release;
  run_on_team(threads, false, [&](const Team& team) {
    for (index round = 0; round < rounds; ++round) team.meet();
  });
}

float probe_read(const Array& a, index rounds) {
  const float* const p = read<float>(a, "a", {a.size()});
  const py::gil_scoped_release release;
  return active_isa().probes.read(p, a.size(), rounds);
}

}  // namespace
}  // namespace fusedrnn

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  using namespace fusedrnn;
  m.doc() = "Kernels of fusedrnn for the CPU. Private: use fusedrnn's own functions.";

  py::class_<CallOptions>(m, "Options")
      .def(py::init([](bool row_wise, double clip, double cell_clip, double zoneout_h,
                       double zoneout_c, double recurrent_dropout, bool training,
                       std::uint64_t seed, std::uint32_t where, fusedrnn::index bptt) {
             return CallOptions{row_wise,
                                {clip, cell_clip, zoneout_h, zoneout_c, recurrent_dropout,
                                 training, seed, where, bptt}};
           }),
           py::arg("row_wise"), py::arg("clip"), py::arg("cell_clip"),
           py::arg("zoneout_h"), py::arg("zoneout_c"), py::arg("recurrent_dropout"),
           py::arg("training"), py::arg("seed"), py::arg("where"), py::arg("bptt"));
  py::class_<Weights>(m, "Weights")
      .def(py::init<const std::string&, const Arrays&, bool,
                    const std::optional<std::string>&, bool>(),
           py::arg("cell"), py::arg("parameters"), py::arg("backward") = false,
           py::arg("isa") = py::none(), py::arg("borrow") = false)
      .def_property_readonly("cell", &Weights::cell)
      .def_property_readonly("isa", &Weights::isa)
      .def("saved_size", &Weights::saved_size)
      .def("saved_values", &Weights::saved_values)
      .def("plan", &Weights::plan)
      .def("call", &Weights::call)
      .def("forward", &Weights::forward)
      .def("backward", &Weights::backward);

  m.def("isas", [] {
    py::dict supported;
    for (const auto& entry : compiled_isas()) {
      supported[py::str(std::string(entry.isa->name))] = entry.supported;
    }
    return supported;
  });
  m.def("cells", [] {
    py::list names;
    for (const CellEntry& cell : active_isa().cells) names.append(std::string(cell.name));
    return names;
  });
  m.def("get_isa", [] { return std::string(active_isa().name); });
  m.def("set_isa", &set_isa);
  m.def("get_num_threads", &get_num_threads);
  m.def("set_num_threads", &set_num_threads);
  m.def("follow_threads", &follow_threads);
  m.def("share_team", &share_team);
  m.def("from_dlpack", &from_dlpack);
  m.def("plain_forward", &plain_forward);
  m.def("plain_backward", &plain_backward);
  m.def("allocate", &allocate);
  m.attr("LARGE_ARRAY") = large_array;
  m.def("drop", &drop);
  m.def("elementwise", &elementwise);
  m.def("probe_multiply_add", &probe_multiply_add);
  m.def("probe_read", &probe_read);
  m.def("probe_meetings", &probe_meetings);
  m.attr("compiler") = FUSEDRNN_COMPILER;
}
