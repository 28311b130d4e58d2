// fusedrnn._cpu: the functions and classes that Python sees.
#include <pybind11/stl.h>

#include <algorithm>

#include "../cpu/team.h"
#include "../random.h"
#include "dlpack.h"
#include "weights.h"

namespace fusedrnn {

Array allocate(const std::vector<index>& shape, const py::dtype& dtype) {
  std::size_t bytes = static_cast<std::size_t>(dtype.itemsize());
  for (const index n : shape) bytes *= static_cast<std::size_t>(n);
  auto memory = std::make_unique<Memory>(bytes);
  void* const start = memory->as<void>();
  const py::capsule owner(memory.release(),
                          [](void* p) { delete static_cast<Memory*>(p); });
  return Array(dtype, shape, start, owner);
}

namespace {

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

// Weights of an op that does not keep them: packed, unless there are few rows.
py::object plain_forward(const std::string& cell, const Arrays& parameters,
                         const py::array& x, const py::object& h0, const py::object& c0,
                         bool reverse, bool saves, index few_rows, index layers) {
  if (x.ndim() != 3 || !are_ready(parameters)) return py::none();
  const bool borrow = x.shape(0) * x.shape(1) <= few_rows;
  const Weights weights(cell, parameters, false, {}, borrow);
  auto outputs = weights.plain_forward(x, h0, c0, reverse, saves, layers);
  if (!outputs) return py::none();
  return py::make_tuple(outputs->y, outputs->h_n, outputs->c_n, outputs->saved);
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

// Dropout of (T, B, n), of what is "weights" or lies "between" layers.
void drop(const Array& from, double p, std::uint64_t seed, const std::string& what,
          std::uint32_t where, MaybeArray to) {
  if (!to || to->ndim() != 3) refuse("to");
  const auto draw =
      static_cast<std::uint32_t>(what == "weights" ? Draw::weights : Draw::between);
  const index size = py::isinstance<py::array_t<float>>(from) ? 4 : 8;
  const index T = to->shape(0), B = to->shape(1), N = to->shape(2);
  const Dropout<char> problem{T,
                              B,
                              N,
                              read(from, size, "from", {T, B, N}),
                              from.strides(0),
                              from.strides(1),
                              write(to, size, "to", {T, B, N}),
                              to->strides(0),
                              to->strides(1),
                              p,
                              seed,
                              draw,
                              where};
  const py::gil_scoped_release release;
  run(problem, size);
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

namespace py = pybind11;

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
    for (const CellKernels& cell : active_isa().f32->cells)
      names.append(std::string(cell.name));
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
  m.def("release_memory", &release_memory);
  m.attr("LARGE_ARRAY") = large_array;
  m.def("drop", &drop);
  m.def("elementwise", &elementwise);
  m.def("probe_multiply_add", &probe_multiply_add);
  m.def("probe_read", &probe_read);
  m.def("probe_meetings", &probe_meetings);
  m.attr("compiler") = FUSEDRNN_COMPILER;
}
