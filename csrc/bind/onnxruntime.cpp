// This file is a provider of onnxruntime: a session that uses it runs the LSTM, GRU and
// RNN nodes of a model on the kernels. Python decides which nodes, and makes their
// Layers; runs of a session need no Python.
//
//   X              (T, B, I)     sequence_lens  (B,)
//   W              (D, gates·H, I)              R  (D, gates·H, H)
//   B              (D, 2·gates·H)               P  (D, 3·H)
//   Y              (T, D, B, H)
//   initial_h, initial_c, Y_h, Y_c  (D, B, H)
//
// D is the number of directions. With the attribute layout = 1 the axis B comes first in
// all of X, Y and the states.
#include "onnxruntime.h"

#include <pybind11/stl.h>

#include <cstring>

#include "layers.h"

namespace fusedrnn {
namespace onnxruntime {
namespace {

constexpr const char* provider_name = "FusedRNNExecutionProvider";
constexpr const char* precision_key = "ep.fusedrnnexecutionprovider.precision";

enum Input : int { X, W, R, B, lengths, initial_h, initial_c, P, inputs };
enum Output : int { Y, Y_h, Y_c, outputs };

using Sizes = std::vector<std::int64_t>;

struct Tensor {
  char* data = nullptr;  // null if absent
  Sizes sizes;
  int type = 0;

  bool operator!=(const Sizes& expected) const { return data && sizes != expected; }
};

// Package has what fusedrnn.onnx sets: the function that makes Layers, and the version.
struct Package {
  py::object compile;
  std::string version;
};

// It is never destroyed, because Python may have ended before.
Package& package() {
  static Package& found = *new Package;
  return found;
}

index product(const Sizes& sizes) {
  index count = 1;
  for (const auto size : sizes) count *= size;
  return count;
}

std::string text_of(const Sizes& sizes) {
  std::string text;
  for (const auto size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

[[noreturn]] void refuse(const char* name, const std::string& expected,
                         const std::string& found) {
  throw std::runtime_error(std::string(name) + " must " + expected + ", got " + found);
}

Tensor read(const Api& api, const Value* value) {
  Tensor t;
  TensorInfo* info = nullptr;
  api.check(api.get_tensor_info(value, &info));
  std::size_t rank = 0;
  api.check(api.get_rank(info, &rank));
  t.sizes.resize(rank);
  api.check(api.get_sizes(info, t.sizes.data(), rank));
  api.check(api.get_type(info, &t.type));
  api.release_tensor_info(info);
  void* data = nullptr;
  api.check(api.get_data(const_cast<Value*>(value), &data));
  alignas(double) static char empty[sizeof(double)];  // onnxruntime may have no address
  t.data = data ? static_cast<char*>(data) : empty;
  return t;
}

template <class Of, class E>
std::vector<const E*> list_of(const Api& api, const Of* of,
                              Status* (*count)(const Of*, std::size_t*),
                              Status* (*get)(const Of*, const E**, std::size_t)) {
  std::size_t found = 0;
  api.check(count(of, &found));
  std::vector<const E*> list(found);
  api.check(get(of, list.data(), found));
  return list;
}

std::string name_of(const Api& api, const ValueInfo* value) {
  const char* name = "";
  if (value) api.check(api.get_value_name(value, &name));
  return name;
}

// --- What Python compiles -----------------------------------------------------------

// Returns a copy of the value of an input, or None if it is not constant or has a type
// that no input of a node has.
py::object constant(const Api& api, const ValueInfo* input) {
  bool is_constant = false;
  const Value* value = nullptr;
  api.check(api.is_constant(input, &is_constant));
  if (is_constant) api.check(api.get_initializer(input, &value));
  if (!value) return py::none();
  const Tensor t = read(api, value);
  const auto copy = [&](const py::dtype& dtype) { return Array(dtype, t.sizes, t.data); };
  if (t.type == of_float32) return copy(py::dtype::of<float>());
  if (t.type == of_float64) return copy(py::dtype::of<double>());
  if (t.type == of_int32) return copy(py::dtype::of<std::int32_t>());
  return py::none();
}

// Returns an attribute as a number, a string or a list, None for other types.
py::object value_of(const Api& api, const Attribute* attribute) {
  int type = 0;
  std::size_t bytes = 0;
  api.check(api.get_attribute_type(attribute, &type));
  // A call without memory fails, but tells the size.
  api.succeeds(api.read_attribute(attribute, type, nullptr, 0, &bytes));
  // Versions differ on whether a 0 ends a string.
  std::vector<char> memory(bytes + sizeof(std::int64_t));
  const void* const start = memory.data();
  api.check(api.read_attribute(attribute, type, memory.data(), bytes + 1, &bytes));
  if (type == of_int) return py::int_(*static_cast<const std::int64_t*>(start));
  const auto* const numbers = static_cast<const float*>(start);
  if (type == of_float) return py::float_(*numbers);
  py::list list;
  if (type == of_floats) {
    for (std::size_t n = 0; n < bytes / sizeof(float); ++n) list.append(numbers[n]);
    return list;
  }
  if (type != of_string && type != of_strings) return py::none();
  for (std::size_t at = 0; at < bytes; at += std::strlen(&memory[at]) + 1) {
    list.append(py::str(&memory[at]));
  }
  return type == of_strings ? py::object(list) : py::object(list[0]);
}

// Returns the Layers of a node and their Options, or None for a node that stays with
// onnxruntime.
py::object compile(const Api& api, const Node* node, const std::string& precision) {
  const char *op = "", *domain = "", *name = "";
  api.check(api.get_operator(node, &op));
  api.check(api.get_domain(node, &domain));
  api.check(api.get_node_name(node, &name));
  const std::string_view type = op;
  if (*domain || (type != "LSTM" && type != "GRU" && type != "RNN")) return py::none();
  if (!package().compile) throw std::runtime_error("use fusedrnn.onnx.add_provider");
  auto in = list_of(api, node, api.count_inputs, api.get_inputs);
  in.resize(inputs);
  py::dict weights, attributes;
  for (const auto& [at, weight] : {std::pair(W, "W"), {R, "R"}, {B, "B"}, {P, "P"}}) {
    if (!name_of(api, in[at]).empty()) weights[weight] = constant(api, in[at]);
  }
  for (const Attribute* a :
       list_of(api, node, api.count_attributes, api.get_attributes)) {
    const char* key = "";
    api.check(api.get_attribute_name(a, &key));
    attributes[key] = value_of(api, a);
  }
  return package().compile(name, op, weights, attributes, precision);
}

// --- Runs ---------------------------------------------------------------------------

// Copies an array (n, m, ·) to (m, n, ·).
void exchange(const char* from, index n, index m, index bytes, char* to) {
  for (index i = 0; i < n; ++i) {
    for (index j = 0; j < m; ++j, from += bytes) {
      std::memcpy(to + (j * n + i) * bytes, from, bytes);
    }
  }
}

// Returns the places of a node's values among those of the node that replaces it, -1 for
// absent and constant ones.
template <std::size_t n>
std::array<int, n> find(const Api& api, const std::vector<const ValueInfo*>& values,
                        const std::vector<const ValueInfo*>& fused) {
  std::array<int, n> at;
  at.fill(-1);
  for (std::size_t i = 0; i < std::min(n, values.size()); ++i) {
    const std::string name = name_of(api, values[i]);
    for (std::size_t j = 0; j < fused.size() && !name.empty(); ++j) {
      if (name == name_of(api, fused[j])) at[i] = static_cast<int>(j);
    }
  }
  return at;
}

// A Compiled node runs Layers.
struct Compiled : ComputeInfo {
  Api api;
  std::vector<py::object> kept;  // the Layers, and inputs that are constant
  const Layers* layers;
  CallOptions options;
  std::array<int, inputs> input_at;
  std::array<int, outputs> output_at;
  Tensor constants[inputs];

  Compiled(const Api& functions, const Node* node, const Node* fused,
           const py::tuple& made);
  void run(Context* context) const;
  Tensor input(const Context* context, Input n) const {
    if (input_at[n] < 0) return constants[n];
    const Value* value = nullptr;
    api.check(api.get_input(context, input_at[n], &value));
    return read(api, value);
  }
  // Returns the memory of an output, null for one that is not wanted.
  char* output(Context* context, Output n, const Sizes& sizes) const {
    if (output_at[n] < 0) return nullptr;
    Value* value = nullptr;
    void* data = nullptr;
    api.check(api.get_output(context, output_at[n], sizes.data(), sizes.size(), &value));
    api.check(api.get_data(value, &data));
    return static_cast<char*>(data);
  }
};

Compiled::Compiled(const Api& functions, const Node* node, const Node* fused,
                   const py::tuple& made)
    : ComputeInfo{api_version,
                  [](ComputeInfo*, void*, void** state) -> Status* {
                    *state = nullptr;
                    return nullptr;
                  },
                  [](ComputeInfo* self, void*, Context* context) {
                    const auto* const c = static_cast<const Compiled*>(self);
                    return c->api.guard([&] { c->run(context); });
                  },
                  [](ComputeInfo*, void*) {}},
      api(functions),
      kept{made[0]},
      layers(made[0].cast<const Layers*>()),
      options(made[1]) {
  const auto in = list_of(api, node, api.count_inputs, api.get_inputs);
  const auto out = list_of(api, node, api.count_outputs, api.get_outputs);
  input_at = find<inputs>(api, in, list_of(api, fused, api.count_inputs, api.get_inputs));
  output_at =
      find<outputs>(api, out, list_of(api, fused, api.count_outputs, api.get_outputs));
  for (const Input n : {X, lengths, initial_h, initial_c}) {
    const bool exists = n < std::ssize(in) && !name_of(api, in[n]).empty();
    if (!exists || input_at[n] >= 0) continue;
    const auto array = constant(api, in[n]).cast<Array>();
    char* const data = static_cast<char*>(const_cast<void*>(array.data()));
    constants[n] = {data, {array.shape(), array.shape() + array.ndim()}};
    kept.push_back(array);
  }
}

void Compiled::run(Context* context) const {
  const Stack& stack = layers->stack();
  const Layout& l = stack.layout();
  const bool batch_first = layers->batch_first();
  const index D = stack.directions, I = l.I, H = l.H, item = l.size;
  const Tensor x = input(context, X);
  if (x.sizes.size() != 3 || x.sizes[2] != I) {
    refuse("X", "have 3 axes, the last of " + std::to_string(I), text_of(x.sizes));
  }
  StackForward c{};
  options.put(c);
  c.T = x.sizes[batch_first], c.B = x.sizes[!batch_first];
  c.reverse = layers->reverse();
  c.x = x.data;
  c.x_item = item;
  c.x_t = (batch_first ? 1 : c.B) * I * item;
  c.x_b = (batch_first ? c.T : 1) * I * item;

  std::vector<index> counts;
  if (const Tensor t = input(context, lengths); t.data) {
    if (t != Sizes{c.B}) {
      refuse("sequence_lens", "have shape " + text_of({c.B}), text_of(t.sizes));
    }
    const auto* const from = reinterpret_cast<const std::int32_t*>(t.data);
    counts.assign(from, from + c.B);
    for (const index n : counts) {
      if (n >= 0 && n <= c.T) continue;
      refuse("sequence_lens", "be 0 to " + std::to_string(c.T), std::to_string(n));
    }
    c.lengths = counts.data();
  }

  // The kernels' states are (D, B, H). Those of one direction are the same in memory if
  // the batch comes first.
  const Sizes of_state = batch_first ? Sizes{c.B, D, H} : Sizes{D, c.B, H};
  const bool exchanges = batch_first && D == 2;
  const auto memory_of = [&](const Sizes& sizes) {
    return Memory(static_cast<std::size_t>(product(sizes) * item + 1));
  };
  Memory own[inputs], unwanted[outputs];
  const auto state = [&](Input n, const char* name) -> const char* {
    const Tensor t = input(context, n);
    if (t != of_state) {
      refuse(name, "have shape " + text_of(of_state), text_of(t.sizes));
    }
    if (!t.data || !exchanges) return t.data;
    own[n] = memory_of(of_state);
    exchange(t.data, c.B, D, H * item, own[n].as<char>());
    return own[n].as<char>();
  };
  c.h0 = state(initial_h, "initial_h");
  if (l.shape.has_c) c.c0 = state(initial_c, "initial_c");

  char* results[outputs] = {};
  const auto write = [&](Output n, const Sizes& sizes, bool is_kernels) {
    results[n] = output(context, n, sizes);
    if (results[n] && is_kernels) return results[n];
    unwanted[n] = memory_of(sizes);
    return unwanted[n].as<char>();
  };
  c.y = write(Y, batch_first ? Sizes{c.B, c.T, D, H} : Sizes{c.T, D, c.B, H}, true);
  c.y_t = (batch_first ? 1 : c.B) * D * H * item;
  c.y_b = (batch_first ? c.T * D : 1) * H * item;
  c.y_d = (batch_first ? 1 : c.B) * H * item;
  c.h_n = write(Y_h, of_state, !exchanges);
  if (l.shape.has_c) c.c_n = write(Y_c, of_state, !exchanges);
  forward(stack, c);
  for (const Output n : {Y_h, Y_c}) {
    if (!exchanges || !results[n]) continue;
    exchange(unwanted[n].as<char>(), D, c.B, H * item, results[n]);
  }
}

// --- The provider -------------------------------------------------------------------

struct OurProvider : Provider {
  Api api;
  std::string precision;
};

struct OurFactory : Factory {
  Api api;
};

Status* get_capability(Provider* provider, const Graph* graph, Support* support) {
  const auto& self = static_cast<const OurProvider&>(*provider);
  const Api& api = self.api;
  return api.guard([&] {
    const py::gil_scoped_acquire gil;
    const Fusion fusion{api_version, true};
    for (const Node* node : list_of(api, graph, api.count_nodes, api.get_nodes)) {
      try {
        if (compile(api, node, self.precision).is_none()) continue;
      } catch (const py::error_already_set&) {
        // Onnxruntime would log an error here and go on, but it raises that of
        // compile_nodes.
      }
      api.check(api.claim(support, &node, 1, &fusion));
    }
  });
}

Status* compile_nodes(Provider* provider, const Graph** originals, const Node** fused,
                      std::size_t count, ComputeInfo** to, Node**) {
  const auto& self = static_cast<const OurProvider&>(*provider);
  const Api& api = self.api;
  return api.guard([&] {
    const py::gil_scoped_acquire gil;
    std::vector<std::unique_ptr<Compiled>> compiled;
    for (std::size_t n = 0; n < count; ++n) {
      const Node* const node =
          list_of(api, originals[n], api.count_nodes, api.get_nodes).at(0);
      const py::tuple made = compile(api, node, self.precision);
      compiled.push_back(std::make_unique<Compiled>(api, node, fused[n], made));
    }
    for (auto& node : compiled) *to++ = node.release();
  });
}

void release_nodes(Provider*, ComputeInfo** infos, std::size_t count) {
  const py::gil_scoped_acquire gil;
  for (std::size_t n = 0; n < count; ++n) delete static_cast<Compiled*>(infos[n]);
}

Status* create_provider(Factory* factory, const Hardware* const*, const void* const*,
                        std::size_t, const SessionOptions* options, const void*,
                        Provider** to) {
  const Api& api = static_cast<const OurFactory&>(*factory).api;
  return api.guard([&] {
    char precision[32] = {};
    std::size_t room = sizeof precision;
    api.check(api.get_option(options, precision_key, precision, &room));
    const auto name = [](const Provider*) { return provider_name; };
    const Provider table{api_version,   name,          get_capability,
                         compile_nodes, release_nodes, {}};
    *to = new OurProvider{table, api, precision};
  });
}

Status* get_devices(Factory* factory, const Hardware* const* hardware, std::size_t count,
                    Device** to, std::size_t most, std::size_t* found) {
  const Api& api = static_cast<const OurFactory&>(*factory).api;
  *found = 0;
  for (std::size_t n = 0; n < count && *found < most; ++n) {
    if (api.hardware_type(hardware[n]) != is_cpu) continue;
    Device*& device = to[(*found)++];
    Status* const status =
        api.create_device(factory, hardware[n], nullptr, nullptr, &device);
    if (status) return status;
  }
  return nullptr;
}

Factory factory_table() {
  Factory f{};
  f.version = api_version;
  f.name = [](const Factory*) { return provider_name; };
  f.vendor = [](const Factory*) { return "fusedrnn"; };
  f.get_devices = get_devices;
  f.create = create_provider;
  f.release = [](Factory*, Provider* p) { delete static_cast<OurProvider*>(p); };
  f.vendor_id = [](const Factory*) { return std::uint32_t(0); };
  f.plugin_version = [](const Factory*) { return package().version.c_str(); };
  f.create_data_transfer = [](Factory*, void** to) -> Status* {
    *to = nullptr;
    return nullptr;
  };
  f.is_stream_aware = [](const Factory*) { return false; };
  return f;
}

}  // namespace
}  // namespace onnxruntime

void bind_onnxruntime(py::module_& m) {
  m.def("set_onnxruntime_compiler", [](py::object compile, std::string version) {
    onnxruntime::package() = {std::move(compile), std::move(version)};
  });
}

}  // namespace fusedrnn

// Onnxruntime looks these functions up by their names.
extern "C" {

PYBIND11_EXPORT fusedrnn::onnxruntime::Status* CreateEpFactories(
    const char*, const fusedrnn::onnxruntime::ApiBase* base, const void*,
    fusedrnn::onnxruntime::Factory** factories, std::size_t, std::size_t* count) {
  using namespace fusedrnn::onnxruntime;
  *count = 0;
  const Slot* const slots = base->get_api(api_version);
  if (!slots) {
    // An older table has the same first slot.
    Status* (*const create_status)(int, const char*) = base->get_api(1)[0];
    return create_status(failure, "fusedrnn needs onnxruntime 1.24.4 or newer");
  }
  factories[0] = new OurFactory{factory_table(), {slots}};
  *count = 1;
  return nullptr;
}

PYBIND11_EXPORT fusedrnn::onnxruntime::Status* ReleaseEpFactory(
    fusedrnn::onnxruntime::Factory* factory) {
  delete static_cast<fusedrnn::onnxruntime::OurFactory*>(factory);
  return nullptr;
}
}
