// This header reads and creates PyTorch's tensors through its C interface, which is
// looked up at run time.
#pragma once

#include <dlfcn.h>

#include <string>
#include <utility>
#include <vector>

#include "../cpu/memory.h"
#include "arrays.h"

namespace fusedrnn {

// These are functions of PyTorch's C interface, which is stable across versions, as
// torch/csrc/inductor/aoti_torch/c/shim.h declares them. They return 0 for success.
struct Shim {
  using Handle = struct Opaque*;
  int (*get_data_ptr)(Handle, void** to);
  int (*get_dim)(Handle, std::int64_t* to);
  int (*get_sizes)(Handle, std::int64_t** to);
  int (*get_strides)(Handle, std::int64_t** to);
  int (*get_dtype)(Handle, std::int32_t* to);
  int (*get_device_type)(Handle, std::int32_t* to);
  int (*delete_tensor_object)(Handle);
  int (*empty_strided)(std::int64_t rank, const std::int64_t* sizes,
                       const std::int64_t* strides, std::int32_t dtype,
                       std::int32_t device_type, std::int32_t device, Handle* to);
  std::int32_t float32, float64, bfloat16, cpu;

  std::int32_t dtype(index item) const {
    return item == half_item ? bfloat16 : item == 4 ? float32 : float64;
  }
  // Returns the bytes of an element, 0 for a type that the kernels do not read.
  index item(std::int32_t type) const {
    return type == float32 ? 4 : type == float64 ? 8 : type == bfloat16 ? half_item : 0;
  }
};

// Torch has the parts of PyTorch that are used; fusedrnn.torch sets them.
struct Torch {
  PyObject *tensor, *parameter;  // types
  py::object to_handles, from_handles, from_numpy, bfloat16, is_grad_enabled, forward_ad;
  std::vector<py::object> observers;  // functions; true means that calls are observed
  Shim shim;
};

// It is never destroyed, because Python may have ended before.
inline Torch& torch() {
  static Torch& found = *new Torch;
  return found;
}

inline Shim find_shim(const std::string& library) {
  void* const handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  Shim shim{};
  const auto find = [&](auto& function, const std::string& name) {
    void* const found =
        dlsym(handle ? handle : RTLD_DEFAULT, ("aoti_torch_" + name).c_str());
    if (!found) throw py::import_error("PyTorch lacks aoti_torch_" + name);
    function = reinterpret_cast<std::decay_t<decltype(function)>>(found);
  };
  find(shim.get_data_ptr, "get_data_ptr");
  find(shim.get_dim, "get_dim");
  find(shim.get_sizes, "get_sizes");
  find(shim.get_strides, "get_strides");
  find(shim.get_dtype, "get_dtype");
  find(shim.get_device_type, "get_device_type");
  find(shim.delete_tensor_object, "delete_tensor_object");
  find(shim.empty_strided, "empty_strided");
  std::int32_t (*number)();
  find(number, "dtype_float32");
  shim.float32 = number();
  find(number, "dtype_float64");
  shim.float64 = number();
  find(number, "dtype_bfloat16");
  shim.bfloat16 = number();
  find(number, "device_type_cpu");
  shim.cpu = number();
  return shim;
}

inline PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }

inline bool is_true(const py::object& function) {
  PyObject* const found = PyObject_CallNoArgs(function.ptr());
  if (!found) throw py::error_already_set();
  const auto result = py::reinterpret_steal<py::object>(found);
  return !result.is_none() && PyObject_IsTrue(result.ptr()) == 1;
}

// Returns whether anything but autograd observes calls.
inline bool is_observed() {
  static PyObject* const level = intern("_current_level");
  for (const py::object& observer : torch().observers) {
    if (is_true(observer)) return true;
  }
  // Forward-mode differentiation is active at level 0 and above.
  PyObject* const found = PyObject_GetAttr(torch().forward_ad.ptr(), level);
  if (!found) throw py::error_already_set();
  return PyLong_AsLong(py::reinterpret_steal<py::object>(found).ptr()) >= 0;
}

// NewTensors creates tensors on the CPU and hands them to Python together.
class NewTensors {
 public:
  explicit NewTensors(index element) : element_(element) {}
  NewTensors(const NewTensors&) = delete;
  ~NewTensors() {
    for (Shim::Handle handle : handles_) {
      if (handle) torch().shim.delete_tensor_object(handle);
    }
  }

  // Creates the next tensor, of elements of `item` bytes (0: of the element type), and
  // returns its memory.
  char* add(const Axes& axes, index item = 0) {
    const Shim& shim = torch().shim;
    if (item == 0) item = element_;
    const std::size_t bytes =
        bytes_of({axes.lengths, static_cast<std::size_t>(axes.count)}, item);
    std::int64_t sizes[5], strides[5], apart = 1;
    for (index n = axes.count - 1; n >= 0; --n) {
      sizes[n] = axes.lengths[n];
      strides[n] = apart;
      apart *= sizes[n] > 0 ? sizes[n] : 1;
    }
    Shim::Handle handle = nullptr;
    handles_.push_back(nullptr);
    const int failed = shim.empty_strided(axes.count, sizes, strides, shim.dtype(item),
                                          shim.cpu, 0, &handle);
    if (failed) throw OutOfMemory(bytes);
    handles_.back() = handle;
    void* start = nullptr;
    shim.get_data_ptr(handle, &start);
    return static_cast<char*>(start);
  }
  // Hands the tensors over to Python, in order.
  py::list take() {
    py::list capsules;
    for (Shim::Handle handle : handles_) {
      capsules.append(py::capsule(handle, static_cast<const char*>(nullptr)));
    }
    handles_.clear();  // from_handles takes them over
    return capsules.empty() ? capsules : py::list(torch().from_handles(capsules));
  }

 private:
  const index element_;
  std::vector<Shim::Handle> handles_;
};

// Creates a tensor that only backward reads, in reused memory: clearing fresh pages is
// expensive.
inline py::object new_large(const Axes& axes, index item, char*& start) {
  // NumPy may have no bfloat16.
  const py::dtype dtype =
      item == half_item ? py::dtype::of<std::int16_t>() : element_dtype(item);
  Array array = allocate({axes.lengths, axes.lengths + axes.count}, dtype);
  start = static_cast<char*>(array.mutable_data());
  const py::object tensor = torch().from_numpy(array);
  return item == half_item ? tensor.attr("view")(torch().bfloat16) : tensor;
}

// TensorReader reads tensors on the CPU of one element type, that of the first, or in
// halves of bfloat16 and float32. They are collected, then opened together. `ok` becomes
// false if the kernels cannot read one of them as it lies.
class TensorReader {
 public:
  // `exact`: subclasses of tensors are refused.
  explicit TensorReader(bool exact) : exact_(exact) {}
  TensorReader(const TensorReader&) = delete;
  ~TensorReader() {
    for (const View& v : views_) torch().shim.delete_tensor_object(v.handle);
  }

  bool ok = true, requires_grad = false, unbatched = false;
  bool halves = false;
  index element = 0;           // bytes, in halves those of float32
  index item = 0, x_item = 0;  // bytes of an element of y, and of x
  index parameter_item = 0;

  struct View {
    Shim::Handle handle = nullptr;
    const char* start = nullptr;
    index rank = 0, item = 0;
    const std::int64_t *shape = nullptr, *strides = nullptr;  // in elements
  };

  // Adds a tensor, or None. `other`: its element type may differ.
  void collect(const py::handle& tensor, bool other = false) {
    static PyObject *const is_neg = intern("is_neg"), *const grad =
                                                          intern("requires_grad");
    if (tensor.is_none()) return places_.push_back(-1);
    if (!is_tensor(tensor)) return fail();
    PyObject* const self[] = {tensor.ptr()};
    PyObject* const negative = PyObject_VectorcallMethod(
        is_neg, self, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
    if (!negative) throw py::error_already_set();
    Py_DECREF(negative);  // True and False are immortal
    if (negative == Py_True) return fail();
    if (exact_) {
      PyObject* const flag = PyObject_GetAttr(tensor.ptr(), grad);
      if (!flag) throw py::error_already_set();
      Py_DECREF(flag);
      requires_grad |= flag == Py_True;
    }
    places_.push_back(static_cast<int>(tensors_.size()));
    others_.push_back(other);
    tensors_.append(tensor);
  }
  // `in_halves`: whatever the type of the first tensor.
  void open(bool in_halves) {
    if (!ok) return;
    const Shim& shim = torch().shim;
    views_.reserve(tensors_.size());  // each handle of the list becomes a view's
    const py::list handles(torch().to_handles(tensors_));
    for (std::size_t n = 0; n < handles.size(); ++n) {
      View& v = views_.emplace_back();
      v.handle =
          static_cast<Shim::Handle>(PyCapsule_GetPointer(handles[n].ptr(), nullptr));
      std::int32_t dtype = -1, device = -1;
      std::int64_t rank = 0;
      std::int64_t *shape = nullptr, *strides = nullptr;
      void* start = nullptr;
      // Sparse and nested tensors have no sizes, strides or data.
      if (shim.get_dim(v.handle, &rank) || shim.get_sizes(v.handle, &shape) ||
          shim.get_strides(v.handle, &strides) || shim.get_dtype(v.handle, &dtype) ||
          shim.get_device_type(v.handle, &device) || device != shim.cpu ||
          shim.get_data_ptr(v.handle, &start)) {
        fail();
        continue;
      }
      v.rank = rank;
      v.shape = shape;
      v.strides = strides;
      v.start = static_cast<const char*>(start);
      v.item = shim.item(dtype);
      if (n == 0) {
        halves = in_halves || v.item == half_item;
        x_item = v.item;
        element = halves ? 4 : v.item;
        item = parameter_item = halves ? half_item : v.item;
      }
      const bool fits = v.item == element || (halves && v.item == half_item);
      if (!others_[n] && (v.item == 0 || !fits)) fail();
    }
  }

  // Returns the next collected tensor, or an empty view for None.
  View next() {
    const int place = ok ? places_[next_++] : -1;
    return place < 0 ? View{} : views_[place];
  }
  // Returns the next tensor, which must be contiguous and of a shape, or an empty view
  // for None.
  View whole_view(const Axes& axes) {
    const View v = next();
    if (v.handle && !check(v, axes)) fail();
    return v;
  }
  // Returns the start of such a tensor, of elements of `of_item` bytes (0: of the element
  // type), or null for None.
  const char* whole(const Axes& axes, index of_item = 0) {
    const View v = whole_view(axes);
    if (v.handle && v.item != (of_item ? of_item : element)) fail();
    return v.start;
  }

 private:
  bool is_tensor(const py::handle& object) const {
    if (!exact_) return PyObject_IsInstance(object.ptr(), torch().tensor) == 1;
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    return type == torch().tensor || type == torch().parameter;
  }
  void fail() { ok = false; }
  static bool check(const View& v, const Axes& axes) {
    if (v.rank != axes.count) return false;
    index apart = 1;
    for (index n = v.rank - 1; n >= 0; --n) {
      if (v.shape[n] != axes.lengths[n]) return false;
      if (v.shape[n] > 1 && v.strides[n] != apart) return false;
      apart *= v.shape[n] > 0 ? v.shape[n] : 1;
    }
    return true;
  }

  const bool exact_;
  py::list tensors_;
  std::vector<int> places_;
  std::vector<bool> others_;
  std::vector<View> views_;
  std::size_t next_ = 0;
};

}  // namespace fusedrnn
