// This is the module fusedrnn._cpu.
#include <omp.h>
#include <pybind11/stl.h>

#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "../cpu/machine.h"
#include "../cpu/workforce.h"
#include "gil.h"
#include "tensors.h"

namespace fusedrnn {

Array allocate(const std::vector<index>& shape, const py::dtype& dtype) {
  auto memory = std::make_unique<Memory>(bytes_of(shape, dtype.itemsize()));
  void* const start = memory->as<void>();
  const py::capsule owner(memory.get(), [](void* p) { delete static_cast<Memory*>(p); });
  static_cast<void>(memory.release());
  return Array(dtype, shape, start, owner);
}

namespace {

// A forked child has one thread, which becomes the main one.
std::atomic<unsigned long> main_thread{0};

void find_main_thread() {
  const py::object thread = py::module_::import("threading").attr("main_thread")();
  main_thread = py::cast<unsigned long>(thread.attr("ident"));
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { main_thread = PyThread_get_thread_ident(); });
#endif
}

}  // namespace

bool handle_signals() {
  if (PyThread_get_thread_ident() != main_thread) return false;
  const py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

namespace {

// Runs an elementwise function of the cells on the active ISA, for tests of its accuracy.
Array elementwise(const std::string& name, const Array& x) {
  for (const MathEntry& function : active_isa().base->math) {
    if (function.name != name) continue;
    if (py::isinstance<py::array_t<float>>(x)) {
      py::array_t<float> y(x.size());
      run(function.f32, static_cast<const float*>(x.data()), y.mutable_data(), x.size());
      return y;
    }
    py::array_t<double> y(x.size());
    run(function.f64, static_cast<const double*>(x.data()), y.mutable_data(), x.size());
    return y;
  }
  throw py::value_error("_cpu: no function " + name);
}

// Returns how many floating-point operations `rounds` rounds of the probe did, on the
// active ISA.
double probe_multiply_add(index rounds, bool single) {
  const Unlocked unlocked;
  const Probes& probes = active_isa().base->probes;
  return (single ? probes.multiply_add_f32 : probes.multiply_add_f64)(rounds);
}

// Does the same for the product of weights of a precision, a value of Precision.
double probe_product(index rounds, int precision) {
  const Unlocked unlocked;
  const Isa& isa = active_isa();
  const auto probe = product_of(isa, 4, static_cast<Precision>(precision)).probe;
  return (probe ? probe : isa.base->probes.multiply_add_f32)(rounds);
}

// Makes threads meet `rounds` times and returns how many there are: `threads`, or as many
// of these as a call takes.
int probe_meetings(index rounds, int threads, bool as_call) {
  const Unlocked unlocked;
  int count = 0;
  const auto meet = [&](const Team& team) {
    for (index round = 0; round < rounds; ++round) team.meet();
    if (team.is_caller) count = team.count;
  };
  if (as_call) {
    with_team(threads, Length::usual, 0, meet);
  } else {
    run_on_team(threads, false, meet);
  }
  return count;
}

float probe_read(const Array& a, index rounds) {
  const float* const p = static_cast<const float*>(a.data());
  const Unlocked unlocked;
  return active_isa().base->probes.read(p, a.size(), rounds);
}

}  // namespace
}  // namespace fusedrnn

namespace py = pybind11;

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  using namespace fusedrnn;
  m.doc() = "Kernels of fusedrnn for the CPU. Private: use fusedrnn's own functions.";

  find_main_thread();
  bind_layers(m);
  bind_tensors(m);
  bind_onnxruntime(m);
  m.def("isas", [] {
    py::dict supported;
    for (const auto& entry : compiled_isas()) {
      supported[py::str(std::string(entry.isa.name))] = entry.supported;
    }
    return supported;
  });
  m.def("cells", [] {
    py::list names;
    for (const CellKernels& cell : active_isa().base->f32->cells)
      names.append(std::string(cell.name));
    return names;
  });
  m.def("get_isa", [] { return std::string(active_isa().name); });
  m.def("set_isa", &set_isa);
  m.def("get_num_threads", &get_num_threads);
  m.def("set_num_threads", &set_num_threads);
  m.def("follow_threads", &follow_threads);
  m.def("get_threads_asked_for", &get_threads_asked_for);
  m.def("get_thread_limit", &omp_get_thread_limit);
  m.def("set_quota", &set_quota);
  m.def("usable_cores", &usable_cores);
  m.def("set_few_rows", [](fusedrnn::index rows) { few_rows = rows; });
  m.def("share_team", &share_team);
  m.def("allocate", &allocate);
  m.def("release_memory", &release_memory);
  m.attr("LARGE_ARRAY") = large_array;
  m.def("elementwise", &elementwise);
  m.def("probe_multiply_add", &probe_multiply_add);
  m.def("probe_product", &probe_product);
  m.def("probe_read", &probe_read);
  m.def("probe_meetings", &probe_meetings);
  m.attr("compiler") = FUSEDRNN_COMPILER;
}
