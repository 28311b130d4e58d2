// fusedrnn._cuda: arrays of a GPU in and out. src/fusedrnn/cuda.py checks what users pass
// and allocates what they get; here a wrong array is a programming error and only
// refused.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../csrc/vec/random.h"
#include "dlpack.h"
#include "kernels.h"

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

// An array on a device: where, how large, from one element to the next along each axis.
// `owner` keeps its memory.
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

  // As NumPy's indexing, with integers, slices of step 1, None and one Ellipsis.
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

// Memory of ours on a device, given back on the stream it was made on.
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
  // Another stream reads it, and is waited for before it is given back.
  void used_on(std::uintptr_t stream) { users_.insert(reinterpret_cast<Stream>(stream)); }

 private:
  int device_;
  Stream stream_;
  std::set<Stream> users_;
  void* memory_;
};

// Copies between a contiguous view and the host's memory, of the same number of bytes.
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
  const py::gil_scoped_release release;
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

// What a call is asked for beside its arrays.
struct CallOptions {
  Options values;
  bool adds_dx;
};
using RowArrays = std::map<std::string, MaybeView>;

// What a layer is called with: a cell in a precision, on a device and stream.
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

  std::string state_dtype() const { return elements_.state; }

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
    const py::gil_scoped_release release;
    kernels_.pack(call);
  }

  index saved_bytes(index T, index B, index H) const {
    return kernels_.saved_bytes({T, B, 0, H, H, false});
  }

  void forward(const View& x, const View& weight_ih, const View& packed,
               const MaybeView& h0, const MaybeView& c0, const MaybeView& lengths,
               const MaybeView& resets, bool reverse, const View& y, const View& h_n,
               const MaybeView& c_n, const MaybeView& saved,
               const py::function& workspace) const {
    ForwardCall call{};
    start(call, x, weight_ih, h_n, h0, c0, lengths, resets, reverse);
    call.packed = bytes(packed, "packed", kernels_.packed_bytes(call.H, false));
    call.y = rows(y, "y", {call.T, call.B, call.H});
    call.y_t = y.strides[0];
    call.y_b = y.strides[1];
    call.h_n = state(h_n, "h_n", call);
    call.c_n = cell_.has_c ? state(c_n, "c_n", call) : nullptr;
    if (cell_.has_c && !call.c_n) refuse("c_n");
    if (saved) call.saved = bytes(*saved, "saved", kernels_.saved_bytes(call));
    const index needed = kernels_.forward_workspace(call);
    const auto room = workspace(needed).cast<View>();
    call.workspace = bytes(room, "workspace", needed);
    const py::gil_scoped_release release;
    kernels_.forward(call);
  }

  void backward(const View& x, const View& weight_ih, const View& packed,
                const MaybeView& h0, const MaybeView& c0, const MaybeView& lengths,
                const MaybeView& resets, bool reverse, const View& y,
                const MaybeView& saved, const MaybeView& dy, const MaybeView& dh_n,
                const MaybeView& dc_n, const View& dx, bool adds_dx, index bptt,
                const View& dweight_ih, const View& dweight_hh, const View& dbias_ih,
                const View& dbias_hh, const View& dh0, const MaybeView& dc0,
                const py::function& workspace) const {
    BackwardCall call{};
    start(call, x, weight_ih, dh0, h0, c0, lengths, resets, reverse);
    const index GH = cell_.gates * call.H;
    call.packed = bytes(packed, "packed", kernels_.packed_bytes(call.H, true));
    call.y = rows(y, "y", {call.T, call.B, call.H});
    call.y_t = y.strides[0];
    call.y_b = y.strides[1];
    const index saved_size = kernels_.saved_bytes(call);
    if (saved_size > 0 && !saved) refuse("saved");
    if (saved) call.saved = bytes(*saved, "saved", saved_size);
    if (dy) {
      call.dy = rows(*dy, "dy", {call.T, call.B, call.H});
      call.dy_t = dy->strides[0];
      call.dy_b = dy->strides[1];
    }
    call.dh_n = state(dh_n, "dh_n", call);
    call.dc_n = cell_.has_c ? state(dc_n, "dc_n", call) : nullptr;
    call.dx = rows(dx, "dx", {call.T, call.B, call.I});
    call.dx_b = dx.strides[1];
    if (call.T > 1 && call.B > 0 && dx.strides[0] != call.B * dx.strides[1]) refuse("dx");
    call.adds_dx = adds_dx;
    call.bptt = static_cast<int>(bptt < call.T ? bptt : 0);
    call.dweight_ih = whole(dweight_ih, "dweight_ih", {GH, call.I});
    call.dweight_hh = whole(dweight_hh, "dweight_hh", {GH, call.H});
    call.dbias_ih = whole(dbias_ih, "dbias_ih", {GH});
    call.dbias_hh = whole(dbias_hh, "dbias_hh", {GH});
    call.dh0 = state(dh0, "dh0", call);
    call.dc0 = cell_.has_c ? state(dc0, "dc0", call) : nullptr;
    if (cell_.has_c && !call.dc0) refuse("dc0");
    const index needed = kernels_.backward_workspace(call);
    const auto room = workspace(needed).cast<View>();
    call.workspace = bytes(room, "workspace", needed);
    const py::gil_scoped_release release;
    kernels_.backward(call);
  }

  // With options: arrays by name, those that there are.
  index row_saved_bytes(index T, index B, index H, index R, bool projects,
                        bool norm) const {
    const Sizes p{T, B, 0, H, R, false};
    const Model m{0, H, R, cell_.variant, projects, norm};
    return is_double() ? cell_.rows64.saved_bytes(p, m) : cell_.rows32.saved_bytes(p, m);
  }
  void row_forward(const RowArrays& arrays, const CallOptions& options, bool reverse,
                   const py::function& workspace) const {
    if (is_double()) {
      run_rows<RowCall<double>>(cell_.rows64.forward_workspace, cell_.rows64.forward,
                                arrays, options, reverse, workspace);
    } else {
      run_rows<RowCall<float>>(cell_.rows32.forward_workspace, cell_.rows32.forward,
                               arrays, options, reverse, workspace);
    }
  }
  void row_backward(const RowArrays& arrays, const CallOptions& options, bool reverse,
                    const py::function& workspace) const {
    if (is_double()) {
      run_rows<RowBackCall<double>>(cell_.rows64.backward_workspace,
                                    cell_.rows64.backward, arrays, options, reverse,
                                    workspace);
    } else {
      run_rows<RowBackCall<float>>(cell_.rows32.backward_workspace, cell_.rows32.backward,
                                   arrays, options, reverse, workspace);
    }
  }

  py::dict explain(index T, index B, index I, index H, bool backward) const {
    const Plan plan = kernels_.choose({T, B, I, H, H, false}, device_, backward);
    constexpr const char* exchanges[] = {"cluster", "grid", "step"};
    py::dict told;
    told["exchange"] = exchanges[static_cast<int>(plan.exchange)];
    told["rows"] = 8 * plan.tiles;
    told["row groups"] = plan.row_groups;
    told["blocks"] = py::make_tuple(plan.blocks_x, plan.blocks_y);
    told["threads"] = plan.threads();
    told["warps to a group of units"] = plan.splits;
    told["weights"] = plan.resident ? "registers" : plan.on_chip ? "shared memory" : "L2";
    told["operand"] = plan.shares_operand() ? "shared memory" : "L2";
    told["shared bytes"] = plan.shared_bytes;
    told["launches"] = plan.exchange == Exchange::step ? T + (backward ? 1 : 0) : 1;
    return told;
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
  void* whole(const View& v, const char* name, const std::vector<index>& shape) const {
    if (!v.is_contiguous()) refuse(name);
    return checked(v, name, shape, elements_.storage);
  }
  void* whole(const MaybeView& v, const char* name,
              const std::vector<index>& shape) const {
    return v ? whole(*v, name, shape) : nullptr;
  }
  // Of which only the last axis must be contiguous.
  void* rows(const View& v, const char* name, const std::vector<index>& shape) const {
    if (v.ndim() != 3 || (v.size() > 0 && v.shape[2] > 1 && v.strides[2] != 1)) {
      refuse(name);
    }
    return checked(v, name, shape, elements_.storage);
  }
  void* state(const View& v, const char* name, const Sizes& p) const {
    if (!v.is_contiguous()) refuse(name);
    return checked(v, name, {p.B, p.H}, elements_.state);
  }
  void* state(const MaybeView& v, const char* name, const Sizes& p) const {
    return v ? state(*v, name, p) : nullptr;
  }
  void* bytes(const View& v, const char* name, index needed) const {
    if (v.size() * v.dtype->bytes < needed || !v.is_contiguous() || v.device != device_ ||
        v.pointer % 16 != 0) {
      refuse(name);
    }
    return reinterpret_cast<void*>(v.pointer);
  }

  bool is_double() const { return precision_ == Precision::float64; }

  // An array by name, or null; of which only the last axis must be contiguous if `rows`.
  template <class A>
  A* find(const RowArrays& arrays, const char* name, const std::vector<index>& shape,
          bool rows = false) const {
    const auto found = arrays.find(name);
    if (found == arrays.end() || !found->second) return nullptr;
    const View& v = *found->second;
    if (!rows && !v.is_contiguous()) refuse(name);
    if (rows && v.size() > 0 && v.shape.back() > 1 && v.strides.back() != 1) refuse(name);
    return static_cast<A*>(checked(v, name, shape, elements_.storage));
  }
  static index stride(const RowArrays& arrays, const char* name, int axis) {
    const auto found = arrays.find(name);
    return found == arrays.end() || !found->second
               ? 0
               : found->second->strides[static_cast<std::size_t>(axis)];
  }

  template <class C, class Workspace, class Run>
  void run_rows(const Workspace& needs, const Run& run, const RowArrays& arrays,
                const CallOptions& options, bool reverse,
                const py::function& workspace) const {
    using A = std::remove_const_t<std::remove_pointer_t<decltype(C::x)>>;
    const auto shape_of = [&](const char* name, std::size_t rank) {
      const auto found = arrays.find(name);
      if (found == arrays.end() || !found->second) refuse(name);
      if (found->second->shape.size() != rank) refuse(name);
      return found->second->shape;
    };
    const auto of_x = shape_of("x", 3), of_R = shape_of("weight_hh", 2);
    C call{};
    call.T = of_x[0];
    call.B = of_x[1];
    call.I = of_x[2];
    call.H = shape_of("weight_ih", 2)[0] / cell_.gates;
    call.R = of_R[1];
    call.reverse = reverse;
    const index T = call.T, B = call.B, I = call.I, H = call.H, R = call.R;
    const index GH = cell_.gates * H;
    if (I < 1 || H < 1 || R < 1 || R > H) refuse("weight_hh");
    const auto get = [&](const char* name, const std::vector<index>& shape,
                         bool rows = false) {
      return find<A>(arrays, name, shape, rows);
    };
    call.weight_ih = get("weight_ih", {GH, I});
    call.weight_hh = get("weight_hh", {GH, R});
    call.bias_ih = get("bias_ih", {GH});
    call.bias_hh = get("bias_hh", {GH});
    call.weight_hr = get("weight_hr", {R, H});
    call.vectors = {get("weight_ch", {cell_.peepholes * H}), get("gamma_ih", {GH}),
                    get("gamma_hh", {GH}), get("gamma_c", {H}), get("beta_c", {H})};
    call.model = {I,
                  H,
                  R,
                  cell_.variant,
                  call.weight_hr != nullptr,
                  call.vectors.gamma_ih != nullptr};
    if (!call.model.projects && R != H) refuse("weight_hr");
    if (call.model.norm && !call.vectors.gamma_hh) refuse("gamma_hh");
    if (call.model.norm && cell_.has_c &&
        !(call.vectors.gamma_c && call.vectors.beta_c)) {
      refuse("gamma_c");
    }
    call.options = options.values;
    call.device = device_;
    call.stream = stream_;
    call.tf32 = precision_ == Precision::tf32;
    call.x = get("x", {T, B, I}, true);
    call.x_t = stride(arrays, "x", 0);
    call.x_b = stride(arrays, "x", 1);
    call.h0 = get("h0", {B, R});
    call.c0 = get("c0", {B, H});
    if (const auto lengths = arrays.find("lengths");
        lengths != arrays.end() && lengths->second) {
      const View& v = *lengths->second;
      call.wide_lengths = v.dtype->name == "int64";
      if (!v.is_contiguous()) refuse("lengths");
      call.lengths = checked(v, "lengths", {B}, call.wide_lengths ? "int64" : "int32");
    }
    if (const auto resets = arrays.find("resets");
        resets != arrays.end() && resets->second) {
      const View& v = *resets->second;
      call.resets = static_cast<const bool*>(checked(v, "resets", {T, B}, "bool"));
      call.resets_t = v.strides[0];
      call.resets_b = v.strides[1];
    }
    call.y = get("y", {T, B, R}, true);
    call.y_b = stride(arrays, "y", 1);
    if (!call.y || (T > 1 && B > 0 && stride(arrays, "y", 0) != B * call.y_b))
      refuse("y");
    call.cells = get("cells", {T, B, H}, true);
    call.cells_t = stride(arrays, "cells", 0);
    call.cells_b = stride(arrays, "cells", 1);
    call.trace = get("trace", {T, B, cell_.gates, H});
    const bool is_double_ = is_double();
    const index saved = is_double_ ? cell_.rows64.saved_bytes(call, call.model)
                                   : cell_.rows32.saved_bytes(call, call.model);
    if (const auto found = arrays.find("saved"); found != arrays.end() && found->second) {
      call.saved = static_cast<A*>(bytes(*found->second, "saved", saved));
    }
    if constexpr (std::is_same_v<C, RowBackCall<A>>) {
      call.dy = get("dy", {T, B, R}, true);
      call.dy_t = stride(arrays, "dy", 0);
      call.dy_b = stride(arrays, "dy", 1);
      call.dh_n = get("dh_n", {B, R});
      call.dc_n = get("dc_n", {B, H});
      call.dcells = get("dcells", {T, B, H}, true);
      call.dcells_t = stride(arrays, "dcells", 0);
      call.dcells_b = stride(arrays, "dcells", 1);
      call.dx = get("dx", {T, B, I}, true);
      call.dx_b = stride(arrays, "dx", 1);
      if (!call.dx || (T > 1 && B > 0 && stride(arrays, "dx", 0) != B * call.dx_b)) {
        refuse("dx");
      }
      call.adds_dx = options.adds_dx;
      call.dweight_ih = get("dweight_ih", {GH, I});
      call.dweight_hh = get("dweight_hh", {GH, R});
      call.dbias_ih = get("dbias_ih", {GH});
      call.dbias_hh = get("dbias_hh", {GH});
      call.dweight_hr = get("dweight_hr", {R, H});
      call.dvectors = {get("dweight_ch", {cell_.peepholes * H}), get("dgamma_ih", {GH}),
                       get("dgamma_hh", {GH}), get("dgamma_c", {H}), get("dbeta_c", {H})};
      call.dh0 = get("dh0", {B, R});
      call.dc0 = get("dc0", {B, H});
      if (!call.dweight_ih || !call.dweight_hh || !call.dh0) refuse("dweight_ih");
      if (cell_.has_c && !call.dc0) refuse("dc0");
      if (!call.saved && cell_.has_c && !call.cells) refuse("cells");
    } else {
      call.h_n = get("h_n", {B, R});
      call.c_n = get("c_n", {B, H});
      if (!call.h_n || (cell_.has_c && !call.c_n)) refuse("h_n");
    }
    const index needed = needs(call);
    const auto room = workspace(needed).cast<View>();
    call.workspace = bytes(room, "workspace", needed);
    const py::gil_scoped_release release;
    run(call);
  }

  void start(Call& call, const View& x, const View& weight_ih, const View& like,
             const MaybeView& h0, const MaybeView& c0, const MaybeView& lengths,
             const MaybeView& resets, bool reverse) const {
    if (x.ndim() != 3 || like.ndim() != 2) refuse("x");
    call.T = x.shape[0];
    call.B = x.shape[1];
    call.I = x.shape[2];
    call.H = like.shape[1];
    call.R = call.H;
    call.reverse = reverse;
    call.variant = cell_.variant;
    call.precision = precision_;
    if (call.I < 1 || call.H < 1) refuse("x");
    call.device = device_;
    call.stream = stream_;
    call.x = rows(x, "x", {call.T, call.B, call.I});
    call.x_t = x.strides[0];
    call.x_b = x.strides[1];
    call.weight_ih = whole(weight_ih, "weight_ih", {cell_.gates * call.H, call.I});
    call.h0 = state(h0, "h0", call);
    call.c0 = cell_.has_c ? state(c0, "c0", call) : nullptr;
    if (lengths) {
      call.wide_lengths = lengths->dtype->name == "int64";
      if (!lengths->is_contiguous()) refuse("lengths");
      call.lengths =
          checked(*lengths, "lengths", {call.B}, call.wide_lengths ? "int64" : "int32");
    }
    if (resets) {
      call.resets =
          static_cast<const bool*>(checked(*resets, "resets", {call.T, call.B}, "bool"));
      call.resets_t = resets->strides[0];
      call.resets_b = resets->strides[1];
    }
  }

  const Precision precision_;
  const CellEntry& cell_;
  const Kernels kernels_;
  const ElementNames elements_;
  const int device_;
  const Stream stream_;
};

// Three axes, those that are missing of length 1.
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
  const py::gil_scoped_release release;
  const OnDevice current(to.device);
  drop_out(problem, to.device, stream);
}
// Dropout of (T, B, n) in float32 or float64, of "weights" or "between" layers.
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

// Copies from one element to another, where one of the two is float32 or both are alike.
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
  const py::gil_scoped_release release;
  const OnDevice current(to.device);
  convert(problem, to.device, reinterpret_cast<Stream>(stream));
}
void clear_view(const View& to, std::uintptr_t stream) {
  if (!to.is_contiguous()) refuse("clear");
  const OnDevice current(to.device);
  clear(reinterpret_cast<void*>(to.pointer), to.size() * to.dtype->bytes,
        reinterpret_cast<Stream>(stream));
}

// DLPack (https://dmlc.github.io/dlpack): how libraries hand each other arrays.

constexpr const char* capsule_name = "dltensor";

const std::pair<DLDataType, const char*> dlpack_dtypes[] = {
    {{kDLFloat, 32, 1}, "float32"},   {{kDLFloat, 64, 1}, "float64"},
    {{kDLBfloat, 16, 1}, "bfloat16"}, {{kDLFloat, 16, 1}, "float16"},
    {{kDLInt, 32, 1}, "int32"},       {{kDLInt, 64, 1}, "int64"},
    {{kDLBool, 8, 1}, "bool"},        {{kDLUInt, 8, 1}, "uint8"}};

// Takes the array over: its deleter is called when the view's owner goes.
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
  struct Lent {
    DLManagedTensor managed;
    std::vector<std::int64_t> shape, strides;
    View view;
  };
  auto lent = std::make_unique<Lent>(Lent{{},
                                          {view.shape.begin(), view.shape.end()},
                                          {view.strides.begin(), view.strides.end()},
                                          view});
  DLTensor& tensor = lent->managed.dl_tensor;
  tensor.data = reinterpret_cast<void*>(view.pointer);
  tensor.device = {kDLCUDA, view.device};
  tensor.ndim = static_cast<int>(view.ndim());
  for (const auto& [known, name] : dlpack_dtypes) {
    if (view.dtype->name == name) tensor.dtype = known;
  }
  tensor.shape = lent->shape.data();
  tensor.strides = lent->strides.data();
  lent->managed.manager_ctx = lent.get();
  lent->managed.deleter = [](DLManagedTensor* self) {
    const py::gil_scoped_acquire gil;
    delete static_cast<Lent*>(self->manager_ctx);
  };
  // A capsule that nobody took over still owns the array.
  py::capsule capsule(&lent->managed, capsule_name, [](PyObject* object) {
    if (!PyCapsule_IsValid(object, capsule_name)) return;
    auto* const managed =
        static_cast<DLManagedTensor*>(PyCapsule_GetPointer(object, capsule_name));
    managed->deleter(managed);
  });
  lent.release();
  return capsule;
}

}  // namespace
}  // namespace fusedrnn::cuda

PYBIND11_MODULE(_cuda, m) {
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
                       std::uint32_t where, index bptt, bool adds_dx) {
             return CallOptions{{clip, cell_clip, zoneout_h, zoneout_c, recurrent_dropout,
                                 training, seed, where, bptt},
                                adds_dx};
           }),
           py::arg("clip"), py::arg("cell_clip"), py::arg("zoneout_h"),
           py::arg("zoneout_c"), py::arg("recurrent_dropout"), py::arg("training"),
           py::arg("seed"), py::arg("where"), py::arg("bptt"), py::arg("adds_dx"));
  m.def("drop", &drop);
  m.def("convert", &convert_view);
  m.def("clear", &clear_view);
  py::class_<Kernel>(m, "Kernel")
      .def(py::init<const std::string&, const std::string&, int, std::uintptr_t>(),
           py::arg("cell"), py::arg("precision"), py::arg("device"), py::arg("stream"))
      .def_property_readonly("state_dtype", &Kernel::state_dtype)
      .def("packed_bytes", &Kernel::packed_bytes)
      .def("pack", &Kernel::pack)
      .def("saved_bytes", &Kernel::saved_bytes)
      .def("forward", &Kernel::forward)
      .def("backward", &Kernel::backward)
      .def("row_saved_bytes", &Kernel::row_saved_bytes)
      .def("row_forward", &Kernel::row_forward)
      .def("row_backward", &Kernel::row_backward)
      .def("explain", &Kernel::explain);

  m.def(
      "wish",
      [](int exchange, int tiles, int resident, int staged, int groups, int splits,
         int blocks_x) {
        wish = {exchange, tiles, resident, staged, groups, splits, blocks_x};
      },
      py::arg("exchange") = -1, py::arg("tiles") = 0, py::arg("resident") = -1,
      py::arg("staged") = -1, py::arg("groups") = 0, py::arg("splits") = 0,
      py::arg("blocks_x") = 0);
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
    return facts;
  });
  m.def("runtime_version", &runtime_version);
  m.def("use_blas", &use_blas);
  m.def("is_capturing", [](int ordinal, std::uintptr_t stream) {
    const OnDevice current(ordinal);
    return is_capturing(reinterpret_cast<Stream>(stream));
  });
  m.def("order", [](int ordinal, std::uintptr_t before, std::uintptr_t after) {
    const OnDevice current(ordinal);
    order(reinterpret_cast<Stream>(before), reinterpret_cast<Stream>(after));
  });
}
