// fusedrnn._cpu: arrays in and out. src/fusedrnn/functional.py checks what users pass and
// allocates what they get; here a wrong array is a programming error and only refused.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/memory.h"

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

// A layer's parameters in one direction, packed for the forward or the backward kernels
// of one ISA, or only borrowed: packing for a few rows costs more than
// it gains. Never changes, so threads share it.
class Weights {
 public:
  Weights(const std::string& cell, const Array& weight_ih, const Array& weight_hh,
          const MaybeArray& bias_ih, const MaybeArray& bias_hh, bool backward,
          const std::optional<std::string>& isa, bool borrow)
      : isa_(isa ? find_isa(*isa) : active_isa()),
        cell_(find_cell(isa_, cell)),
        backward_(backward),
        I_(weight_ih.ndim() == 2 ? weight_ih.shape(1) : 0),
        H_(weight_hh.ndim() == 2 ? weight_hh.shape(1) : 0),
        single_(py::isinstance<py::array_t<float>>(weight_ih)),
        borrow_(borrow),
        weight_ih_(weight_ih),
        weight_hh_(weight_hh) {
    if (!(weight_ih.flags() & py::array::c_style)) refuse("weight_ih");
    if (!(weight_hh.flags() & py::array::c_style)) refuse("weight_hh");
    if (single_) {
      pack<float>(weight_ih, weight_hh, bias_ih, bias_hh);
    } else {
      pack<double>(weight_ih, weight_hh, bias_ih, bias_hh);
    }
  }

  std::string cell() const { return std::string(cell_.name); }
  std::string isa() const { return std::string(isa_.name); }
  index saved_size() const {
    return single_ ? cell_.f32.saved_size(I_, H_) : cell_.f64.saved_size(I_, H_);
  }

  void forward(const Array& x, const Array& h0, const MaybeArray& c0,
               const MaybeArray& lengths, const MaybeArray& resets, bool reverse, Array y,
               Array h_n, MaybeArray c_n, MaybeArray saved) const {
    visit(false, [&]<class S>(const S* packed) {
      Forward<S> p{};
      sizes(p, x, reverse);
      masks(p, lengths, resets);
      p.x = read<S>(x, "x", {p.T, p.B, p.I});
      p.x_t = stride(x, 0);
      p.x_b = stride(x, 1);
      p.h0 = read<S>(h0, "h0", {p.B, p.H});
      p.c0 = read<S>(c0, "c0", {p.B, p.H});
      p.weights = packed;
      if (borrow_) {
        p.weight_ih = read<S>(weight_ih_, "weight_ih", {cell_.gates * p.H, p.I});
        p.weight_hh = read<S>(weight_hh_, "weight_hh", {cell_.gates * p.H, p.H});
      }
      p.y = write<S>(y, "y", {p.T, p.B, p.H});
      p.y_t = stride(y, 0);
      p.y_b = stride(y, 1);
      p.h_n = write<S>(h_n, "h_n", {p.B, p.H});
      p.c_n = write<S>(c_n, "c_n", {p.B, p.H});
      const auto& kernels = cell_.kernels<S>();
      p.saved = write<S>(saved, "saved", {p.T, p.B, kernels.saved_size(p.I, p.H)});
      if (cell_.has_c && !(p.c0 && p.c_n)) refuse("c0 or c_n");
      const py::gil_scoped_release release;
      run(kernels, cell_.gates, p);
    });
  }

  // A layer's whole call, for speed where one step takes a microsecond: x (T, B, I), the
  // state (1, B, H) each or None for zeros. Returns (y, state) or, where an argument
  // needs preparing or is wrong, None: the caller then takes the long way, which words
  // errors.
  py::object call(const py::object& x, const py::object& state) const {
    return single_ ? call_as<float>(x, state) : call_as<double>(x, state);
  }

  void backward(const Array& x, const Array& h0, const MaybeArray& c0,
                const MaybeArray& lengths, const MaybeArray& resets, bool reverse,
                const Array& y, const MaybeArray& saved, const MaybeArray& dy,
                const MaybeArray& dh_n, const MaybeArray& dc_n, Array dx,
                Array dweight_ih, Array dweight_hh, Array dbias_ih, Array dbias_hh,
                Array dh0, MaybeArray dc0) const {
    visit(true, [&]<class S>(const S* packed) {
      Backward<S> p{};
      sizes(p, x, reverse);
      masks(p, lengths, resets);
      const auto& kernels = cell_.kernels<S>();
      const index GH = cell_.gates * p.H;
      p.x = read<S>(x, "x", {p.T, p.B, p.I});
      p.x_t = stride(x, 0);
      p.x_b = stride(x, 1);
      p.h0 = read<S>(h0, "h0", {p.B, p.H});
      p.c0 = read<S>(c0, "c0", {p.B, p.H});
      p.weights = packed;
      p.weight_ih = read<S>(weight_ih_, "weight_ih", {GH, p.I});
      p.weight_hh = read<S>(weight_hh_, "weight_hh", {GH, p.H});
      p.y = read<S>(y, "y", {p.T, p.B, p.H});
      p.y_t = stride(y, 0);
      p.y_b = stride(y, 1);
      p.saved = read<S>(saved, "saved", {p.T, p.B, kernels.saved_size(p.I, p.H)});
      p.dy = read<S>(dy, "dy", {p.T, p.B, p.H});
      p.dy_t = dy ? stride(*dy, 0) : 0;
      p.dy_b = dy ? stride(*dy, 1) : 0;
      p.dh_n = read<S>(dh_n, "dh_n", {p.B, p.H});
      p.dc_n = read<S>(dc_n, "dc_n", {p.B, p.H});
      p.dx = write<S>(dx, "dx", {p.T, p.B, p.I});
      p.dx_t = stride(dx, 0);
      p.dx_b = stride(dx, 1);
      p.dweight_ih = write<S>(dweight_ih, "dweight_ih", {GH, p.I});
      p.dweight_hh = write<S>(dweight_hh, "dweight_hh", {GH, p.H});
      p.dbias_ih = write<S>(dbias_ih, "dbias_ih", {GH});
      p.dbias_hh = write<S>(dbias_hh, "dbias_hh", {GH});
      p.dh0 = write<S>(dh0, "dh0", {p.B, p.H});
      p.dc0 = write<S>(dc0, "dc0", {p.B, p.H});
      if (cell_.has_c && !(p.c0 && p.dc0)) refuse("c0 or dc0");
      if (kernels.saved_size(p.I, p.H) && !p.saved) refuse("saved");
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
    constexpr int needed =
        int{py::array::c_style} | int{py::detail::npy_api::NPY_ARRAY_ALIGNED_};
    return (a.flags() & needed) == needed ? static_cast<const S*>(a.data()) : nullptr;
  }

  template <class S>
  py::object call_as(const py::object& x, const py::object& state) const {
    if (backward_ || !py::isinstance<Array>(x)) return py::none();
    const auto rows = py::reinterpret_borrow<Array>(x);
    if (rows.ndim() != 3 || rows.shape(0) < 1 || rows.shape(1) < 1) return py::none();
    Forward<S> p{};
    sizes(p, rows, false);
    const bool pair = cell_.has_c;
    p.x = ready<S>(x, {p.T, p.B, p.I});
    p.x_t = p.B * p.I;
    p.x_b = p.I;
    std::optional<py::array_t<S>> zeros;
    if (state.is_none()) {
      zeros.emplace(p.B * p.H);
      std::fill_n(zeros->mutable_data(), p.B * p.H, S(0));
      p.h0 = zeros->data();
      p.c0 = pair ? p.h0 : nullptr;
    } else if (!pair) {
      p.h0 = ready<S>(state, {1, p.B, p.H});
    } else if (PyTuple_CheckExact(state.ptr()) && PyTuple_GET_SIZE(state.ptr()) == 2) {
      p.h0 = ready<S>(PyTuple_GET_ITEM(state.ptr(), 0), {1, p.B, p.H});
      p.c0 = ready<S>(PyTuple_GET_ITEM(state.ptr(), 1), {1, p.B, p.H});
    }
    if (!p.x || !p.h0 || (pair && !p.c0)) return py::none();

    const py::dtype dtype = rows.dtype();
    const auto empty = [&](index T) {
      const bool large = T * p.B * p.H * index{sizeof(S)} >= large_array;
      return large ? allocate({T, p.B, p.H}, dtype)
                   : Array(dtype, std::array<index, 3>{T, p.B, p.H});
    };
    Array y = empty(p.T), h_n = empty(1), c_n = pair ? empty(1) : Array();
    p.weights = packed_.as<const S>();
    if (borrow_) {
      p.weight_ih = static_cast<const S*>(weight_ih_.data());
      p.weight_hh = static_cast<const S*>(weight_hh_.data());
    }
    p.y = static_cast<S*>(y.mutable_data());
    p.y_t = p.B * p.H;
    p.y_b = p.H;
    p.h_n = static_cast<S*>(h_n.mutable_data());
    if (pair) p.c_n = static_cast<S*>(c_n.mutable_data());
    {
      const py::gil_scoped_release release;
      run(cell_.kernels<S>(), cell_.gates, p);
    }
    py::object last = std::move(h_n);
    if (pair) last = py::make_tuple(std::move(last), std::move(c_n));
    return py::make_tuple(std::move(y), std::move(last));
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
  void pack(const Array& weight_ih, const Array& weight_hh, const MaybeArray& bias_ih,
            const MaybeArray& bias_hh) {
    const index GH = cell_.gates * H_;
    const Parameters<S> p{I_,
                          H_,
                          read<S>(weight_ih, "weight_ih", {GH, I_}),
                          read<S>(weight_hh, "weight_hh", {GH, H_}),
                          read<S>(bias_ih, "bias_ih", {GH}),
                          read<S>(bias_hh, "bias_hh", {GH})};
    const auto& kernels = cell_.kernels<S>();
    const auto size =
        static_cast<std::size_t>(kernels.packed_size(I_, H_, backward_, borrow_));
    if (size == 0) return;
    const py::gil_scoped_release release;
    packed_ = Memory(size * sizeof(S));
    fusedrnn::pack(kernels, p, backward_, borrow_, packed_.as<S>());
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
    p.I = I_;
    p.H = H_;
    p.reverse = reverse;
    if (p.T < 1 || p.B < 1 || p.I < 1 || p.H < 1) refuse("x");
  }

  static void masks(Steps& p, const MaybeArray& lengths, const MaybeArray& resets) {
    p.lengths = read<index>(lengths, "lengths", {p.B});
    p.resets = read<bool>(resets, "resets", {p.T, p.B});
  }

  const Isa& isa_;
  const CellEntry& cell_;
  const bool backward_;
  const index I_, H_;
  const bool single_;  // float32
  const bool borrow_;
  const Array weight_ih_, weight_hh_;
  Memory packed_;
};

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

PYBIND11_MODULE(_cpu, m) {
  using namespace fusedrnn;
  m.doc() = "Kernels of fusedrnn for the CPU. Private: use fusedrnn's own functions.";

  py::class_<Weights>(m, "Weights")
      .def(py::init<const std::string&, const Array&, const Array&, const MaybeArray&,
                    const MaybeArray&, bool, const std::optional<std::string>&, bool>(),
           py::arg("cell"), py::arg("weight_ih"), py::arg("weight_hh"),
           py::arg("bias_ih"), py::arg("bias_hh"), py::arg("backward") = false,
           py::arg("isa") = py::none(), py::arg("borrow") = false)
      .def_property_readonly("cell", &Weights::cell)
      .def_property_readonly("isa", &Weights::isa)
      .def_property_readonly("saved_size", &Weights::saved_size)
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
  m.def("allocate", &allocate);
  m.attr("LARGE_ARRAY") = large_array;
  m.def("elementwise", &elementwise);
  m.def("probe_multiply_add", &probe_multiply_add);
  m.def("probe_read", &probe_read);
  m.def("probe_meetings", &probe_meetings);
  m.attr("compiler") = FUSEDRNN_COMPILER;
}
