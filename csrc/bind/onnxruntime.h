// This header declares the part of onnxruntime's C interface that its plugins use.
// Onnxruntime hands its tables of functions to a plugin, so building and linking need
// nothing of it. A table only grows: a slot keeps its number and its type in all
// versions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fusedrnn::onnxruntime {

struct Status;  // of a call; null for success
struct Value;
struct TensorInfo;  // a tensor's shape and element type
struct Context;     // the inputs and outputs of a node in a run
struct Graph;
struct Node;
struct ValueInfo;
struct Attribute;
struct Support;  // collects the nodes that a provider claims
struct SessionOptions;
struct Hardware;
struct Device;
struct Factory;
struct Fusion;

struct Slot {
  void (*address)();
  template <class F>
  operator F*() const {
    return reinterpret_cast<F*>(address);
  }
};

struct ApiBase {
  const Slot* (*get_api)(std::uint32_t version);  // null if onnxruntime is older
  const char* (*version)();
};

// The version of the interface is the minor version of onnxruntime.
constexpr std::uint32_t api_version = 23;

enum ElementType : int { of_float32 = 1, of_int32 = 6, of_float64 = 11 };
enum AttributeType : int {
  of_int = 1,
  of_float = 3,
  of_floats = 4,
  of_string = 5,
  of_strings = 6
};
constexpr int is_cpu = 0, failure = 1;

// Api has the functions that are used, from a table of onnxruntime. Those that return a
// Status write their result to the last pointer.
struct Api {
  const Slot* s;

  Status* (*create_status)(int code, const char*) = s[0];
  const char* (*get_error_message)(const Status*) = s[2];
  Status* (*get_data)(Value*, void**) = s[51];
  Status* (*get_type)(const TensorInfo*, int*) = s[60];
  Status* (*get_rank)(const TensorInfo*, std::size_t*) = s[61];
  Status* (*get_sizes)(const TensorInfo*, std::int64_t*, std::size_t) = s[62];
  Status* (*get_tensor_info)(const Value*, TensorInfo**) = s[65];
  Status* (*get_input)(const Context*, std::size_t, const Value**) = s[90];
  Status* (*get_output)(Context*, std::size_t, const std::int64_t* sizes,
                        std::size_t rank, Value**) = s[91];
  void (*release_status)(Status*) = s[93];
  void (*release_tensor_info)(TensorInfo*) = s[99];
  Status* (*get_option)(const SessionOptions*, const char* key, char*,
                        std::size_t*) = s[238];
  Status* (*read_attribute)(const Attribute*, int type, void*, std::size_t room,
                            std::size_t* bytes) = s[272];
  Status* (*get_value_name)(const ValueInfo*, const char**) = s[289];
  int (*hardware_type)(const Hardware*) = s[307];
  const Slot* (*get_provider_api)() = s[317];
  Status* (*get_initializer)(const ValueInfo*, const Value**) = s[326];
  Status* (*is_constant)(const ValueInfo*, bool*) = s[331];
  Status* (*count_nodes)(const Graph*, std::size_t*) = s[344];
  Status* (*get_nodes)(const Graph*, const Node**, std::size_t) = s[345];
  Status* (*get_node_name)(const Node*, const char**) = s[349];
  Status* (*get_operator)(const Node*, const char**) = s[350];
  Status* (*get_domain)(const Node*, const char**) = s[351];
  Status* (*count_inputs)(const Node*, std::size_t*) = s[353];
  Status* (*get_inputs)(const Node*, const ValueInfo**, std::size_t) = s[354];
  Status* (*count_outputs)(const Node*, std::size_t*) = s[355];
  Status* (*get_outputs)(const Node*, const ValueInfo**, std::size_t) = s[356];
  Status* (*count_attributes)(const Node*, std::size_t*) = s[359];
  Status* (*get_attributes)(const Node*, const Attribute**, std::size_t) = s[360];
  Status* (*get_attribute_type)(const Attribute*, int*) = s[363];
  Status* (*get_attribute_name)(const Attribute*, const char**) = s[364];

  // The table of functions for providers.
  const Slot* p = get_provider_api();
  Status* (*create_device)(Factory*, const Hardware*, const void* metadata,
                           const void* options, Device**) = p[0];
  Status* (*claim)(Support*, const Node* const*, std::size_t, const Fusion*) = p[2];

  // Throws the error of a status.
  void check(Status* status) const {
    if (!status) return;
    const std::string message = get_error_message(status);
    release_status(status);
    throw std::runtime_error(message);
  }
  bool succeeds(Status* status) const {
    if (status) release_status(status);
    return !status;
  }
  // Returns what f throws as a status.
  template <class F>
  Status* guard(const F& f) const {
    try {
      f();
      return nullptr;
    } catch (const std::exception& e) {
      return create_status(failure, e.what());
    }
  }
};

// The following tables are filled by a plugin. Their first field is the version of the
// interface, after whose fields onnxruntime reads nothing.
struct Fusion {
  std::uint32_t version;
  bool drops_constants;  // the node that replaces others does not get constant inputs
};

struct ComputeInfo {
  std::uint32_t version;
  Status* (*create_state)(ComputeInfo*, void* context, void** state);
  Status* (*compute)(ComputeInfo*, void* state, Context*);
  void (*release_state)(ComputeInfo*, void* state);
};

struct Provider {
  std::uint32_t version;
  const char* (*name)(const Provider*);
  Status* (*get_capability)(Provider*, const Graph*, Support*);
  Status* (*compile)(Provider*, const Graph** originals, const Node** fused,
                     std::size_t count, ComputeInfo**, Node** contexts);
  void (*release)(Provider*, ComputeInfo**, std::size_t count);
  void* optional[8];
};

struct Factory {
  std::uint32_t version;
  const char* (*name)(const Factory*);
  const char* (*vendor)(const Factory*);
  Status* (*get_devices)(Factory*, const Hardware* const*, std::size_t count, Device**,
                         std::size_t most, std::size_t* found);
  Status* (*create)(Factory*, const Hardware* const*, const void* const* metadata,
                    std::size_t count, const SessionOptions*, const void* logger,
                    Provider**);
  void (*release)(Factory*, Provider*);
  std::uint32_t (*vendor_id)(const Factory*);
  const char* (*plugin_version)(const Factory*);
  void* optional[3];
  Status* (*create_data_transfer)(Factory*, void**);
  bool (*is_stream_aware)(const Factory*);
  void* create_stream;
};

}  // namespace fusedrnn::onnxruntime
