// This is the module fusedrnn._cuda: arrays of a GPU in and out. src/fusedrnn/cuda.py
// checks the user's arguments and allocates the results; a wrong array here is a bug and
// only refused.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../csrc/bind/gil.h"
#include "../csrc/random.h"
#include "dlpack.h"
#include "kernels.h"
#include "plans.h"

namespace py = pybind11;

namespace fusedrnn::cuda {
namespace {

[[noreturn]] void refuse(const std::string& name) {
  throw py::value_error("_cuda: " + name + " has a wrong dtype, shape or device");
}

struct Dtype {
  std::string_view name;
  index bytes;
};
constexpr Dtype dtypes[] = {{"float32", 4}, {"float64", 8}, {"bfloat16", 2},
                            {"float16", 2}, {"int32", 4},   {"int64", 8},
                            {"bool", 1},    {"uint8", 1}};

const Dtype& find_dtype(const std::string& name) {
  for (const Dtype& dtype : dtypes) {
    if (dtype.name == name) return dtype;
  }
  throw py::type_error("_cuda: no dtype " + name);
}

// A View is an array on a device: its address, shape and strides in elements. `owner`
// keeps its memory alive.
struct View {
  std::uintptr_t pointer;
  std::vector<index> shape, strides;
  const Dtype* dtype;
  int device;
  py::object owner;

  View(std::uintptr_t at, std::vector<index> lengths,
       std::optional<std::vector<index>> steps, const std::string& of, int on,
       py::object keeps)
      : pointer(at),
        shape(std::move(lengths)),
        strides(steps ? std::move(*steps) : contiguous_strides()),
        dtype(&find_dtype(of)),
        device(on),
        owner(std::move(keeps)) {
    if (strides.size() != shape.size()) refuse("strides");
  }

  index ndim() const { return static_cast<index>(shape.size()); }
  index size() const {
    index n = 1;
    for (const index length : shape) n *= length;
    return n;
  }
  bool is_contiguous() const { return size() == 0 || same_steps(contiguous_strides()); }

  // Indexes like NumPy, with integers, slices of step 1, None and one Ellipsis.
  View at(const py::object& key) const {
    const py::tuple keys =
        py::isinstance<py::tuple>(key) ? key.cast<py::tuple>() : py::make_tuple(key);
    index named = 0;
    for (const py::handle k : keys) {
      named += !k.is_none() && !py::isinstance<py::ellipsis>(k);
    }
    View part = *this;
    part.shape.clear();
    part.strides.clear();
    std::size_t axis = 0;
    const auto keep = [&] {
      part.shape.push_back(shape.at(axis));
      part.strides.push_back(strides.at(axis));
      ++axis;
    };
    const auto skip = [&](index elements) {
      part.pointer += static_cast<std::uintptr_t>(elements * dtype->bytes);
    };
    for (const py::handle k : keys) {
      if (k.is_none()) {
        part.shape.push_back(1);
        part.strides.push_back(1);
      } else if (py::isinstance<py::ellipsis>(k)) {
        for (index rest = ndim() - named; rest > 0; --rest) keep();
      } else if (py::isinstance<py::slice>(k)) {
        index begin = 0, end = 0, step = 0, length = 0;
        if (!k.cast<py::slice>().compute(shape.at(axis), &begin, &end, &step, &length) ||
            step != 1) {
          throw py::index_error("_cuda: slice");
        }
        skip(begin * strides[axis]);
        keep();
        part.shape.back() = length;
      } else {
        const auto i = k.cast<index>();
        if (i < 0 || i >= shape.at(axis)) throw py::index_error("_cuda: index");
        skip(i * strides[axis++]);
      }
    }
    while (axis < shape.size()) keep();
    return part;
  }
  View swap_axes(std::size_t a, std::size_t b) const {
    View swapped = *this;
    std::swap(swapped.shape.at(a), swapped.shape.at(b));
    std::swap(swapped.strides.at(a), swapped.strides.at(b));
    return swapped;
  }

 private:
  std::vector<index> contiguous_strides() const {
    std::vector<index> steps(shape.size());
    index step = 1;
    for (std::size_t axis = shape.size(); axis-- > 0; step *= shape[axis]) {
      steps[axis] = step;
    }
    return steps;
  }
  bool same_steps(const std::vector<index>& steps) const {
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
      if (shape[axis] > 1 && steps[axis] != strides[axis]) return false;
    }
    return true;
  }
};

using MaybeView = std::optional<View>;

// Memory is our own memory on a device, freed on the stream on which it was allocated.
class Memory {
 public:
  Memory(index bytes, int ordinal, std::uintptr_t stream)
      : device_(ordinal), stream_(reinterpret_cast<Stream>(stream)) {
    const OnDevice current(ordinal);
    memory_ = allocate(bytes, stream_);
  }
  ~Memory() {
    try {
      const OnDevice current(device_);
      for (const Stream user : users_) order(user, stream_);
      release(memory_, stream_);
    } catch (const Error&) {
      // The device is gone, and its memory with it.
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::uintptr_t pointer() const { return reinterpret_cast<std::uintptr_t>(memory_); }
  // Records another stream that reads the memory, which is waited for before it is freed.
  void used_on(std::uintptr_t stream) { users_.insert(reinterpret_cast<Stream>(stream)); }

 private:
  int device_;
  Stream stream_;
  std::set<Stream> users_;
  void* memory_;
};

// These copy between a contiguous view and host memory of the same number of bytes.
void copy_from_host(const View& to, const py::array& from, std::uintptr_t stream) {
  const bool fits = to.is_contiguous() && (from.flags() & py::array::c_style) &&
                    from.nbytes() == to.size() * to.dtype->bytes;
  if (!fits) refuse("copy");
  const OnDevice current(to.device);
  copy(reinterpret_cast<void*>(to.pointer), from.data(), from.nbytes(),
       reinterpret_cast<Stream>(stream));
}
void copy_to_host(py::array to, const View& from, std::uintptr_t stream) {
  const bool fits = from.is_contiguous() && (to.flags() & py::array::c_style) &&
                    to.nbytes() == from.size() * from.dtype->bytes;
  if (!fits) refuse("copy");
  void* const data = to.mutable_data();
  const index bytes = to.nbytes();
  const Unlocked unlocked;
  const OnDevice current(from.device);
  copy(data, reinterpret_cast<const void*>(from.pointer), bytes,
       reinterpret_cast<Stream>(stream));
  synchronize(reinterpret_cast<Stream>(stream));
}

void copy_on_device(const View& to, const View& from, std::uintptr_t stream) {
  const bool fits = to.is_contiguous() && from.is_contiguous() &&
                    to.shape == from.shape && to.dtype == from.dtype &&
                    to.device == from.device;
  if (!fits) refuse("copy");
  const OnDevice current(to.device);
  copy(reinterpret_cast<void*>(to.pointer), reinterpret_cast<const void*>(from.pointer),
       to.size() * to.dtype->bytes, reinterpret_cast<Stream>(stream));
}

Precision find_precision(const std::string& name) {
  constexpr std::pair<std::string_view, Precision> known[] = {
      {"float32", Precision::float32},
      {"float64", Precision::float64},
      {"tf32", Precision::tf32},
      {"bfloat16", Precision::bfloat16},
      {"float16", Precision::float16}};
  for (const auto& [key, precision] : known) {
    if (key == name) return precision;
  }
  throw py::value_error("_cuda: no precision " + name);
}

struct ElementNames {
  std::string storage, state;
};
ElementNames elements_of(Precision precision) {
  switch (precision) {
    case Precision::float64:
      return {"float64", "float64"};
    case Precision::bfloat16:
      return {"bfloat16", "float32"};
    case Precision::float16:
      return {"float16", "float32"};
    default:
      return {"float32", "float32"};
  }
}

// The kind of an activation and its four numbers; kind 0 is the cell's own.
using Numbers = std::array<double, 5>;
Activation activation_of(const Numbers& n) {
  return {static_cast<int>(n[0]), n[1], n[2], n[3], n[4]};
}

// CallOptions has the options of a call beside its arrays.
struct CallOptions {
  Options values;
  bool adds_dx;
};
using Arrays = std::map<std::string, const View*>;

// A Kernel is a cell in a precision, on a device and stream.
class Kernel {
 public:
  Kernel(const std::string& cell, const std::string& precision, int ordinal,
         std::uintptr_t stream)
      : precision_(find_precision(precision)),
        cell_(find_cell(cell)),
        kernels_(cell_.kernels(precision_)),
        elements_(elements_of(precision_)),
        device_(ordinal),
        stream_(reinterpret_cast<Stream>(stream)) {}

  index packed_bytes(index H, bool backward) const {
    return kernels_.packed_bytes(H, backward);
  }

  void pack(const View& weight_hh, const MaybeView& bias_ih, const MaybeView& bias_hh,
            bool backward, const View& packed) const {
    PackCall call{};
    call.precision = precision_;
    const index H = weight_hh.ndim() == 2 ? weight_hh.shape[1] : 0;
    call.device = device_;
    call.stream = stream_;
    call.H = H;
    call.backward = backward;
    call.weight_hh = whole(weight_hh, "weight_hh", {cell_.gates * H, H});
    call.bias_ih = whole(bias_ih, "bias_ih", {cell_.gates * H});
    call.bias_hh = whole(bias_hh, "bias_hh", {cell_.gates * H});
    call.packed = bytes(packed, "packed", kernels_.packed_bytes(H, backward));
    const Unlocked unlocked;
    kernels_.pack(call);
  }

  // Takes the arrays that exist by their names in kernels.h; without packed weights steps
  // go row by row. Returns what was saved, or None.
  py::object forward(const Arrays& arrays, const CallOptions& options, bool reverse,
                     bool saves, const py::function& allocate) const {
    py::object saved = py::none();
    with_runs(arrays, [&]<class S>(const Runs<S>& runs) {
      ForwardOf<S> call{};
      fill<S>(call, arrays, options, reverse);
      const bool has_h = set(call.h_n, arrays, "h_n", {call.B, call.R}, elements_.state);
      const bool has_c = set(call.c_n, arrays, "c_n", {call.B, call.H}, elements_.state);
      if (!has_h || has_c != cell_.has_c) refuse("h_n");
      if (const index needed = runs.saved_bytes(call); saves && needed > 0) {
        saved = allocate(needed);
        call.saved = static_cast<S*>(bytes(saved.cast<View>(), "saved", needed));
      }
      run_in(allocate, runs.forward_workspace(call), runs.forward, call);
    });
    return saved;
  }
  // Returns the bytes that a forward of these arrays, whose values do not matter, would
  // save.
  index saved_bytes(const Arrays& arrays, const CallOptions& options) const {
    index needed = 0;
    with_runs(arrays, [&]<class S>(const Runs<S>& runs) {
      ForwardOf<S> call{};
      fill<S>(call, arrays, options, false);
      needed = runs.saved_bytes(call);
    });
    return needed;
  }
  void backward(const Arrays& arrays, const CallOptions& options, bool reverse,
                const py::function& allocate) const {
    with_runs(arrays, [&]<class S>(const Runs<S>& runs) {
      BackwardOf<S> call{};
      fill<S>(call, arrays, options, reverse);
      fill_back(call, arrays, options);
      if (const View* saved = find(arrays, "saved")) {
        call.saved = static_cast<S*>(bytes(*saved, "saved", runs.saved_bytes(call)));
      }
      const bool is_empty = call.T == 0 || call.B == 0;
      if (!is_empty && !call.saved && cell_.has_c && !call.cells) refuse("cells");
      run_in(allocate, runs.backward_workspace(call), runs.backward, call);
    });
  }

  py::dict explain(index T, index B, index I, index H, bool backward) const {
    const Plan plan = kernels_.choose({T, B, I, H, H, false}, device_, backward);
    constexpr const char* exchanges[] = {"cluster", "grid", "step"};
    py::dict summary;
    summary["exchange"] = exchanges[static_cast<int>(plan.exchange)];
    summary["rows"] = 8 * plan.tiles;
    summary["row groups"] = plan.row_groups;
    summary["blocks"] = py::make_tuple(plan.blocks_x, plan.blocks_y);
    summary["threads"] = plan.threads();
    summary["warps to a group of units"] = plan.splits;
    summary["weights"] = plan.resident  ? "registers"
                         : plan.on_chip ? "shared memory"
                                        : "L2";
    summary["operand"] = plan.shares_operand() ? "shared memory" : "L2";
    summary["shared bytes"] = plan.shared_bytes;
    summary["launches"] = plan.exchange == Exchange::step ? T + (backward ? 1 : 0) : 1;
    return summary;
  }
  // Returns all plans that this thread's choices leave.
  py::list plans(index T, index B, index I, index H, bool backward) const {
    py::list all;
    for (const Candidate& candidate :
         kernels_.candidates({T, B, I, H, H, false}, device_, backward)) {
      all.append(to_dict(candidate));
    }
    return all;
  }

 private:
  static const CellEntry& find_cell(const std::string& name) {
    for (const CellEntry* cell : cells()) {
      if (cell->name == name) return *cell;
    }
    throw py::value_error("_cuda: no cell " + name);
  }

  void* checked(const View& v, const char* name, const std::vector<index>& shape,
                const std::string& dtype) const {
    if (v.dtype->name != dtype || v.shape != shape || v.device != device_) refuse(name);
    return reinterpret_cast<void*>(v.pointer);
  }
  // Returns the address of a contiguous array of the storage type.
  void* whole(const View& v, const char* name, const std::vector<index>& shape) const {
    if (!v.is_contiguous()) refuse(name);
    return checked(v, name, shape, elements_.storage);
  }
  void* whole(const MaybeView& v, const char* name,
              const std::vector<index>& shape) const {
    return v ? whole(*v, name, shape) : nullptr;
  }
  void* bytes(const View& v, const char* name, index needed) const {
    if (v.size() * v.dtype->bytes < needed || !v.is_contiguous() || v.device != device_ ||
        v.pointer % 16 != 0) {
      refuse(name);
    }
    return reinterpret_cast<void*>(v.pointer);
  }

  // Returns an array by name, or null.
  static const View* find(const Arrays& arrays, const char* name) {
    const auto found = arrays.find(name);
    return found == arrays.end() ? nullptr : found->second;
  }
  static const View& get(const Arrays& arrays, const char* name, index ndim) {
    const View* const v = find(arrays, name);
    if (!v || v->ndim() != ndim) refuse(name);
    return *v;
  }
  // Sets `to` to an array, which must be contiguous or, with strides, contiguous in its
  // last axis. Returns whether there is one; an array without elements may have a null
  // address.
  template <class E>
  bool set(E*& to, const Arrays& arrays, const char* name,
           const std::vector<index>& shape, const std::string& dtype,
           index* stride_t = nullptr, index* stride_b = nullptr) const {
    const View* const v = find(arrays, name);
    if (!v) return false;
    if (!stride_b && !v->is_contiguous()) refuse(name);
    to = static_cast<E*>(checked(*v, name, shape, dtype));
    if (!stride_b) return true;
    if (v->size() > 0 && v->shape[2] > 1 && v->strides[2] != 1) refuse(name);
    *stride_t = v->strides[0];
    *stride_b = v->strides[1];
    return true;
  }

  // Sets `to` to a required array, whose rows by time and then by batch have a constant
  // distance.
  template <class E>
  void set_rows(E*& to, const Arrays& arrays, const char* name,
                const std::vector<index>& shape, index* stride) const {
    index stride_t = 0;
    const index T = shape[0], B = shape[1];
    if (!set(to, arrays, name, shape, elements_.storage, &stride_t, stride) ||
        (T > 1 && B > 0 && stride_t != B * *stride)) {
      refuse(name);
    }
  }

  template <class F>
  void with_runs(const Arrays& arrays, const F& f) const {
    if (find(arrays, "packed")) {
      f(kernels_.runs);
    } else if (!cell_.rows32.forward || elements_.storage != elements_.state) {
      refuse("packed");
    } else if (precision_ == Precision::float64) {
      f(cell_.rows64);
    } else {
      f(cell_.rows32);
    }
  }
  template <class C>
  void run_in(const py::function& allocate, index needed, void (*run)(const C&),
              C& call) const {
    const auto workspace = allocate(needed).template cast<View>();
    call.workspace = bytes(workspace, "workspace", needed);
    const Unlocked unlocked;
    run(call);
  }

  // Fills in the arguments of both directions.
  template <class S, class C>
  void fill(C& call, const Arrays& arrays, const CallOptions& options,
            bool reverse) const {
    const auto& [storage, of_state] = elements_;
    const View& x = get(arrays, "x", 3);
    const View& of_W = get(arrays, "weight_ih", 2);
    const View& of_R = get(arrays, "weight_hh", 2);
    const index T = call.T = x.shape[0], B = call.B = x.shape[1];
    const index I = call.I = x.shape[2], H = call.H = of_W.shape[0] / cell_.gates;
    const index R = call.R = of_R.shape[1], GH = cell_.gates * H;
    if (I < 1 || H < 1 || R < 1 || R > H) refuse("weight_hh");
    call.reverse = reverse;
    call.options = options.values;
    call.precision = precision_;
    call.device = device_;
    call.stream = stream_;
    set(call.x, arrays, "x", {T, B, I}, storage, &call.x_t, &call.x_b);
    set(call.h0, arrays, "h0", {B, R}, of_state);
    set(call.c0, arrays, "c0", {B, H}, of_state);
    set(call.weight_ih, arrays, "weight_ih", {GH, I}, storage);
    set(call.weight_hh, arrays, "weight_hh", {GH, R}, storage);
    set(call.bias_ih, arrays, "bias_ih", {GH}, storage);
    set(call.bias_hh, arrays, "bias_hh", {GH}, storage);
    set(call.weight_hr, arrays, "weight_hr", {R, H}, storage);
    set_vectors(call.vectors, arrays, "", H);
    const auto& v = call.vectors;
    call.model = {
        I, H, R, cell_.variant, call.weight_hr != nullptr, v.gamma_ih != nullptr};
    if (!call.model.projects && R != H) refuse("weight_hr");
    if (call.model.norm && !(v.gamma_hh && (!cell_.has_c || (v.gamma_c && v.beta_c)))) {
      refuse("gamma_hh");
    }
    if (const View* const packed = find(arrays, "packed")) {
      if (call.model.projects || call.model.norm) refuse("packed");
      constexpr bool is_back = std::is_base_of_v<BackwardOf<S>, C>;
      call.packed = bytes(*packed, "packed", kernels_.packed_bytes(H, is_back));
    }
    if (const View* const v_lengths = find(arrays, "lengths")) {
      call.wide_lengths = v_lengths->dtype->name == "int64";
      const char* const dtype = call.wide_lengths ? "int64" : "int32";
      set(call.lengths, arrays, "lengths", {B}, dtype);
    }
    if (const View* const v_resets = find(arrays, "resets")) {
      call.resets =
          static_cast<const bool*>(checked(*v_resets, "resets", {T, B}, "bool"));
      call.resets_t = v_resets->strides[0];
      call.resets_b = v_resets->strides[1];
    }
    set_rows(call.y, arrays, "y", {T, B, R}, &call.y_b);
    set(call.cells, arrays, "cells", {T, B, H}, of_state, &call.cells_t, &call.cells_b);
    set(call.trace, arrays, "trace", {T, B, cell_.gates, H}, storage);
  }

  template <class S>
  void fill_back(BackwardOf<S>& call, const Arrays& arrays,
                 const CallOptions& options) const {
    const auto& [storage, of_state] = elements_;
    const index T = call.T, B = call.B, I = call.I, H = call.H, R = call.R;
    const index GH = cell_.gates * H;
    set(call.dy, arrays, "dy", {T, B, R}, storage, &call.dy_t, &call.dy_b);
    set(call.dh_n, arrays, "dh_n", {B, R}, of_state);
    set(call.dc_n, arrays, "dc_n", {B, H}, of_state);
    set(call.dcells, arrays, "dcells", {T, B, H}, of_state, &call.dcells_t,
        &call.dcells_b);
    if (find(arrays, "dx")) set_rows(call.dx, arrays, "dx", {T, B, I}, &call.dx_b);
    call.adds_dx = options.adds_dx;
    set(call.dweight_ih, arrays, "dweight_ih", {GH, I}, storage);
    set(call.dweight_hh, arrays, "dweight_hh", {GH, R}, storage);
    set(call.dbias_ih, arrays, "dbias_ih", {GH}, storage);
    set(call.dbias_hh, arrays, "dbias_hh", {GH}, storage);
    set(call.dweight_hr, arrays, "dweight_hr", {R, H}, storage);
    set_vectors(call.dvectors, arrays, "d", H);
    const bool has_h = set(call.dh0, arrays, "dh0", {B, R}, of_state);
    const bool has_c = set(call.dc0, arrays, "dc0", {B, H}, of_state);
    if (!has_h || has_c != cell_.has_c) refuse("dh0");
  }

  template <class S>
  void set_vectors(Vectors<S>& to, const Arrays& arrays, const std::string& prefix,
                   index H) const {
    const auto vector = [&](S*& at, const char* name, index size) {
      set(at, arrays, (prefix + name).c_str(), {size}, elements_.state);
    };
    vector(to.weight_ch, "weight_ch", cell_.peepholes * H);
    vector(to.gamma_ih, "gamma_ih", cell_.gates * H);
    vector(to.gamma_hh, "gamma_hh", cell_.gates * H);
    vector(to.gamma_c, "gamma_c", H);
    vector(to.beta_c, "beta_c", H);
  }

  const Precision precision_;
  const CellEntry& cell_;
  const Kernels kernels_;
  const ElementNames elements_;
  const int device_;
  const Stream stream_;
};

// A Cube is an array of three axes; missing ones have length 1.
struct Cube {
  index T = 1, B = 1, N = 1, t = 0, b = 0;
  explicit Cube(const View& v) {
    const std::size_t rank = v.shape.size();
    if (rank > 3 || (rank && v.shape[rank - 1] > 1 && v.strides[rank - 1] != 1)) {
      refuse("array");
    }
    if (rank > 0) N = v.shape[rank - 1];
    if (rank > 1) B = v.shape[rank - 2];
    if (rank > 1) b = v.strides[rank - 2];
    if (rank > 2) T = v.shape[0];
    if (rank > 2) t = v.strides[0];
  }
};

template <class S>
void drop_as(const View& from, double p, std::uint64_t seed, std::uint32_t draw,
             std::uint32_t where, const View& to, Stream stream) {
  const Cube in(from), out(to);
  const Dropout<S> problem{out.T,
                           out.B,
                           out.N,
                           reinterpret_cast<const S*>(from.pointer),
                           in.t,
                           in.b,
                           reinterpret_cast<S*>(to.pointer),
                           out.t,
                           out.b,
                           p,
                           seed,
                           draw,
                           where};
  const Unlocked unlocked;
  const OnDevice current(to.device);
  drop_out(problem, to.device, stream);
}
// Applies dropout to (T, B, n) in float32 or float64, of "weights" or "between" layers.
void drop(const View& from, double p, std::uint64_t seed, const std::string& what,
          std::uint32_t where, const View& to, std::uintptr_t stream) {
  if (from.shape != to.shape || from.dtype != to.dtype) refuse("drop");
  const auto draw =
      static_cast<std::uint32_t>(what == "weights" ? Draw::weights : Draw::between);
  const auto on = reinterpret_cast<Stream>(stream);
  if (to.dtype->name == "float32") {
    drop_as<float>(from, p, seed, draw, where, to, on);
  } else if (to.dtype->name == "float64") {
    drop_as<double>(from, p, seed, draw, where, to, on);
  } else {
    refuse("drop");
  }
}

Element element_of(const View& v) {
  constexpr std::pair<std::string_view, Element> known[] = {
      {"float32", Element::float32},
      {"float64", Element::float64},
      {"bfloat16", Element::bfloat16},
      {"float16", Element::float16}};
  for (const auto& [name, element] : known) {
    if (v.dtype->name == name) return element;
  }
  refuse("array");
}

// Copies from one element type to another, of which one is float32 or both are alike.
void convert_view(const View& from, const View& to, std::uintptr_t stream) {
  const Element in = element_of(from), out = element_of(to);
  const bool known = in == out || in == Element::float32 || out == Element::float32;
  const bool mixed = in != out && (in == Element::float64 || out == Element::float64);
  if (from.shape != to.shape || !known || mixed) refuse("convert");
  const Cube a(from), b(to);
  const Conversion problem{reinterpret_cast<const void*>(from.pointer),
                           a.t,
                           a.b,
                           reinterpret_cast<void*>(to.pointer),
                           b.t,
                           b.b,
                           b.T,
                           b.B,
                           b.N,
                           in,
                           out};
  const Unlocked unlocked;
  const OnDevice current(to.device);
  convert(problem, to.device, reinterpret_cast<Stream>(stream));
}

template <class E>
E* pointer_of(const std::optional<View>& v) {
  return v ? reinterpret_cast<E*>(v->pointer) : nullptr;
}
// `steps` is (4, T, B): TakeSteps::times, places and repeated.
void take_steps_of(const View& mask, const std::optional<View>& lengths,
                   const std::optional<View>& resets, const View& steps,
                   const View& counts, const std::optional<View>& resets_of_steps,
                   std::uintptr_t stream) {
  const index T = mask.shape[0], B = mask.shape[1], each = T * B;
  int* const to = reinterpret_cast<int*>(steps.pointer);
  const TakeSteps problem{reinterpret_cast<const bool*>(mask.pointer),
                          pointer_of<const bool>(resets),
                          mask.strides[0],
                          mask.strides[1],
                          resets ? resets->strides[0] : 0,
                          resets ? resets->strides[1] : 0,
                          pointer_of<const void>(lengths),
                          lengths && lengths->dtype->name == "int64",
                          to,
                          to + each,
                          {to + 2 * each, to + 3 * each},
                          reinterpret_cast<int*>(counts.pointer),
                          pointer_of<bool>(resets_of_steps),
                          T,
                          B};
  const Unlocked unlocked;
  const OnDevice current(mask.device);
  take_steps(problem, mask.device, reinterpret_cast<Stream>(stream));
}

// Returns the conversion of one (T, B, n) to another of its shape and element type; `to`
// may be missing.
Conversion conversion_of(const View& from, const std::optional<View>& to) {
  if (to && (from.shape != to->shape || from.dtype != to->dtype)) refuse("move");
  const Cube a(from), b(to ? *to : from);
  const Element element = element_of(from);
  return {reinterpret_cast<const void*>(from.pointer),
          a.t,
          a.b,
          pointer_of<void>(to),
          b.t,
          b.b,
          a.T,
          a.B,
          a.N,
          element,
          element};
}
void move_rows_of(const View& from, const View& at, const std::optional<View>& initial,
                  const View& to, std::uintptr_t stream) {
  const MoveRows problem{
      conversion_of(from, to), reinterpret_cast<const int*>(at.pointer),
      pointer_of<const void>(initial), initial ? element_of(*initial) : Element::float32};
  const Unlocked unlocked;
  const OnDevice current(from.device);
  move_rows(problem, from.device, reinterpret_cast<Stream>(stream));
}
void sum_repeated_of(const View& from, const View& at, bool reverse,
                     const std::optional<View>& to, const std::optional<View>& initial,
                     std::uintptr_t stream) {
  const SumRepeated problem{conversion_of(from, to),
                            reinterpret_cast<const int*>(at.pointer),
                            pointer_of<void>(initial),
                            initial ? element_of(*initial) : Element::float32, reverse};
  const Unlocked unlocked;
  const OnDevice current(from.device);
  sum_repeated(problem, from.device, reinterpret_cast<Stream>(stream));
}
void clear_view(const View& to, std::uintptr_t stream) {
  if (!to.is_contiguous()) refuse("clear");
  const OnDevice current(to.device);
  clear(reinterpret_cast<void*>(to.pointer), to.size() * to.dtype->bytes,
        reinterpret_cast<Stream>(stream));
}

// Libraries exchange arrays by DLPack (https://dmlc.github.io/dlpack).

constexpr const char* capsule_name = "dltensor";

const std::pair<DLDataType, const char*> dlpack_dtypes[] = {
    {{kDLFloat, 32, 1}, "float32"},   {{kDLFloat, 64, 1}, "float64"},
    {{kDLBfloat, 16, 1}, "bfloat16"}, {{kDLFloat, 16, 1}, "float16"},
    {{kDLInt, 32, 1}, "int32"},       {{kDLInt, 64, 1}, "int64"},
    {{kDLBool, 8, 1}, "bool"},        {{kDLUInt, 8, 1}, "uint8"}};

// Takes over the array: its deleter is called when the view's owner goes.
View from_dlpack(const py::capsule& capsule) {
  if (std::string(capsule.name()) != capsule_name) {
    throw py::value_error("must be a capsule named \"dltensor\"");
  }
  auto* const managed = capsule.get_pointer<DLManagedTensor>();
  const DLTensor& tensor = managed->dl_tensor;
  const char* dtype = nullptr;
  for (const auto& [known, name] : dlpack_dtypes) {
    if (known.code == tensor.dtype.code && known.bits == tensor.dtype.bits &&
        tensor.dtype.lanes == 1) {
      dtype = name;
    }
  }
  if (!dtype) throw py::type_error("has a dtype that fusedrnn does not know");
  std::vector<index> shape(tensor.shape, tensor.shape + tensor.ndim);
  std::optional<std::vector<index>> strides;
  if (tensor.strides) {
    strides.emplace(tensor.strides, tensor.strides + tensor.ndim);
  }
  PyCapsule_SetName(capsule.ptr(), "used_dltensor");
  py::capsule owner(managed, [](void* p) {
    auto* const taken = static_cast<DLManagedTensor*>(p);
    if (taken->deleter) taken->deleter(taken);
  });
  const auto at = reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset;
  return View(at, std::move(shape), std::move(strides), dtype, tensor.device.device_id,
              std::move(owner));
}

py::capsule to_dlpack(const View& view) {
  struct Exported {
    DLManagedTensor managed;
    std::vector<std::int64_t> shape, strides;
    View view;
  };
  auto exported =
      std::make_unique<Exported>(Exported{{},
                                          {view.shape.begin(), view.shape.end()},
                                          {view.strides.begin(), view.strides.end()},
                                          view});
  DLTensor& tensor = exported->managed.dl_tensor;
  tensor.data = reinterpret_cast<void*>(view.pointer);
  tensor.device = {kDLCUDA, view.device};
  tensor.ndim = static_cast<int>(view.ndim());
  for (const auto& [known, name] : dlpack_dtypes) {
    if (view.dtype->name == name) tensor.dtype = known;
  }
  tensor.shape = exported->shape.data();
  tensor.strides = exported->strides.data();
  exported->managed.manager_ctx = exported.get();
  exported->managed.deleter = [](DLManagedTensor* self) {
    const py::gil_scoped_acquire gil;
    delete static_cast<Exported*>(self->manager_ctx);
  };
  // A capsule that was not consumed still owns the array.
  py::capsule capsule(&exported->managed, capsule_name, [](PyObject* object) {
    if (!PyCapsule_IsValid(object, capsule_name)) return;
    auto* const managed =
        static_cast<DLManagedTensor*>(PyCapsule_GetPointer(object, capsule_name));
    managed->deleter(managed);
  });
  exported.release();
  return capsule;
}

}  // namespace
}  // namespace fusedrnn::cuda

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  using namespace fusedrnn::cuda;
  using fusedrnn::cuda::index;
  m.doc() = "Kernels of fusedrnn for NVIDIA GPUs. Private: use fusedrnn's own functions.";

  py::register_exception<Error>(m, "Error", PyExc_RuntimeError);
  py::register_exception<OutOfMemory>(m, "OutOfMemoryError", PyExc_MemoryError);

  py::class_<View>(m, "View")
      .def(py::init<std::uintptr_t, std::vector<index>, std::optional<std::vector<index>>,
                    const std::string&, int, py::object>(),
           py::arg("pointer"), py::arg("shape"), py::arg("strides"), py::arg("dtype"),
           py::arg("device"), py::arg("owner"))
      .def_readonly("pointer", &View::pointer)
      .def_property_readonly("shape",
                             [](const View& v) { return py::tuple(py::cast(v.shape)); })
      .def_property_readonly("strides",
                             [](const View& v) { return py::tuple(py::cast(v.strides)); })
      .def_property_readonly("dtype",
                             [](const View& v) { return std::string(v.dtype->name); })
      .def_property_readonly("itemsize", [](const View& v) { return v.dtype->bytes; })
      .def_readonly("device", &View::device)
      .def_readonly("owner", &View::owner)
      .def_property_readonly("ndim", &View::ndim)
      .def_property_readonly("size", &View::size)
      .def_property_readonly("is_contiguous", &View::is_contiguous)
      .def("__getitem__", &View::at)
      .def("swapaxes", &View::swap_axes)
      .def_static("from_dlpack", &from_dlpack)
      .def("to_dlpack", &to_dlpack);

  py::class_<Memory>(m, "Memory")
      .def(py::init<index, int, std::uintptr_t>(), py::arg("bytes"), py::arg("device"),
           py::arg("stream"))
      .def_property_readonly("pointer", &Memory::pointer)
      .def("used_on", &Memory::used_on);
  py::class_<Event>(m, "Event")
      .def(py::init([](int ordinal, std::uintptr_t stream) {
             const OnDevice current(ordinal);
             return std::make_unique<Event>(reinterpret_cast<Stream>(stream));
           }),
           py::arg("device"), py::arg("stream"))
      .def_property_readonly("is_done", &Event::is_done);
  m.def("copy_from_host", &copy_from_host);
  m.def("copy_to_host", &copy_to_host);
  m.def("copy_on_device", &copy_on_device);

  py::class_<CallOptions>(m, "Options")
      .def(py::init([](double clip, double cell_clip, double zoneout_h, double zoneout_c,
                       double recurrent_dropout, bool training, std::uint64_t seed,
                       std::uint32_t where, index bptt, const Numbers& state,
                       const Numbers& gate, bool adds_dx) {
             return CallOptions{{clip,
                                 cell_clip,
                                 zoneout_h,
                                 zoneout_c,
                                 recurrent_dropout,
                                 training,
                                 seed,
                                 where,
                                 bptt,
                                 {activation_of(state), activation_of(gate)}},
                                adds_dx};
           }),
           py::arg("clip"), py::arg("cell_clip"), py::arg("zoneout_h"),
           py::arg("zoneout_c"), py::arg("recurrent_dropout"), py::arg("training"),
           py::arg("seed"), py::arg("where"), py::arg("bptt"), py::arg("activation"),
           py::arg("recurrent_activation"), py::arg("adds_dx"));
  m.def("drop", &drop);
  m.def("convert", &convert_view);
  m.def("clear", &clear_view);
  m.def("take_steps", &take_steps_of);
  m.def("move_rows", &move_rows_of);
  m.def("sum_repeated", &sum_repeated_of);
  py::class_<Kernel>(m, "Kernel")
      .def(py::init<const std::string&, const std::string&, int, std::uintptr_t>(),
           py::arg("cell"), py::arg("precision"), py::arg("device"), py::arg("stream"))
      .def("packed_bytes", &Kernel::packed_bytes)
      .def("pack", &Kernel::pack)
      .def("forward", &Kernel::forward)
      .def("saved_bytes", &Kernel::saved_bytes)
      .def("backward", &Kernel::backward)
      .def("explain", &Kernel::explain)
      .def("plans", &Kernel::plans);

  define_plans(m);
  m.def("cells", [] {
    py::list names;
    for (const CellEntry* cell : cells()) names.append(std::string(cell->name));
    return names;
  });
  m.def("device_count", &device_count);
  m.def("device_of",
        [](std::uintptr_t p) { return device_of(reinterpret_cast<void*>(p)); });
  m.def("device", [](int ordinal) {
    const Device& d = device(ordinal);
    py::dict facts;
    facts["name"] = d.name;
    facts["capability"] = d.capability;
    facts["multiprocessors"] = d.multiprocessors;
    facts["shared_bytes"] = d.shared_bytes;
    facts["largest_cluster"] = d.largest_cluster;
    facts["clock"] = d.clock;
    return facts;
  });
  m.def("runtime_version", &runtime_version);
  m.def("use_blas", &use_blas);
  m.def("is_capturing", [](int ordinal, std::uintptr_t stream) {
    const OnDevice current(ordinal);
    return is_capturing(reinterpret_cast<Stream>(stream));
  });
  m.def("synchronize", [](int ordinal, std::uintptr_t stream) {
    const OnDevice current(ordinal);
    synchronize(reinterpret_cast<Stream>(stream));
  });
  m.def("order", [](int ordinal, std::uintptr_t before, std::uintptr_t after) {
    const OnDevice current(ordinal);
    order(reinterpret_cast<Stream>(before), reinterpret_cast<Stream>(after));
  });
}
