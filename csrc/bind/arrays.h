// Arrays in and out of the bindings.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../contract.h"

namespace fusedrnn {

namespace py = pybind11;

using Array = py::array;
using MaybeArray = std::optional<py::array>;

constexpr bool is_little_endian = std::endian::native == std::endian::little;

[[noreturn]] inline void refuse(const char* name) {
  throw py::value_error(std::string("_cpu: ") + name + " has a wrong dtype or shape");
}

// Returns whether an object is an array of a NumPy type in the machine's byte order. A
// subclass does not count: a masked array means more than its values.
inline bool has_elements(const py::handle& object, int type) {
  const auto& api = py::detail::npy_api::get();
  if (Py_TYPE(object.ptr()) != api.PyArray_Type_) return false;
  const auto* const dtype =
      py::detail::array_descriptor_proxy(py::detail::array_proxy(object.ptr())->descr);
  return dtype->type_num == type && dtype->byteorder != (is_little_endian ? '>' : '<');
}
// Bfloat16 is NumPy's dtype for it, which is that of the package ml_dtypes. Python sets
// it once the package is imported; before, there are no such arrays.
struct Bfloat16 {
  py::object dtype;  // never destroyed, because Python may have ended before
  std::atomic<int> type = -1;
};
inline Bfloat16& bfloat16() {
  static Bfloat16& found = *new Bfloat16;
  return found;
}
constexpr index half_item = 2;  // bytes of a bfloat16

// Returns the NumPy type of elements of `size` bytes.
inline int element_type(index size) {
  if (size == half_item) return bfloat16().type;
  return size == 4 ? py::detail::npy_api::NPY_FLOAT_ : py::detail::npy_api::NPY_DOUBLE_;
}
inline py::dtype element_dtype(index size) {
  if (size == half_item) return py::reinterpret_borrow<py::dtype>(bfloat16().dtype);
  return size == 4 ? py::dtype::of<float>() : py::dtype::of<double>();
}

constexpr int is_aligned = py::detail::npy_api::NPY_ARRAY_ALIGNED_;
constexpr int is_whole = int{py::array::c_style} | is_aligned;

// Axes is the shape of an array of at most five axes.
struct Axes {
  index count = 0, lengths[5] = {};

  Axes(std::initializer_list<index> of) {
    for (const index length : of) lengths[count++] = length;
  }
  bool operator==(const Array& a) const {
    return a.ndim() == count && std::equal(lengths, lengths + count, a.shape());
  }
};

// Reusing freed memory pays for arrays of at least so many bytes.
constexpr index large_array = 1 << 17;

// Returns an uninitialised array. Large ones lie in our own memory (../cpu/memory.h).
Array allocate(const std::vector<index>& shape, const py::dtype& dtype);

// Sequence is an array (T, B, n), whatever the order of its axes in memory.
struct Sequence {
  const char* start = nullptr;
  index T = 0, B = 0, n = 0;
  index t = 0, b = 0;  // strides in bytes
  bool unbatched = false;
};

// Reader reads arguments of one element type. `ok` becomes false if the kernels cannot
// read one of them as it lies.
class Reader {
 public:
  explicit Reader(index element) : element_(element) {}

  bool ok = true;

  // Reads an array (T, B, n), (B, T, n) if batch_first, or (T, n).
  Sequence sequence(const py::handle& object, bool batch_first) {
    if (!has_elements(object, element_type(element_))) return failed<Sequence>();
    const auto a = py::reinterpret_borrow<Array>(object);
    const index rank = a.ndim(), last = rank - 1;
    if (rank != 2 && rank != 3) return failed<Sequence>();
    const bool unbatched = rank == 2;
    const int time = batch_first && !unbatched, row = !time;
    const Sequence s{static_cast<const char*>(a.data()),
                     a.shape(time),
                     unbatched ? 1 : a.shape(row),
                     a.shape(last),
                     a.strides(time),
                     unbatched ? 0 : a.strides(row),
                     unbatched};
    const bool contiguous = a.strides(last) == element_ || s.n == 1 || a.size() == 0;
    const bool even = s.t % element_ == 0 && s.b % element_ == 0;
    if (!contiguous || !even || !(a.flags() & is_aligned)) return failed<Sequence>();
    return s;
  }
  // Reads a sequence of known sizes, or None as an empty one.
  Sequence sequence(const py::handle& object, bool batch_first, const Sequence& like,
                    index n) {
    if (object.is_none()) return {};
    const Sequence s = sequence(object, batch_first);
    if (s.unbatched != like.unbatched || s.T != like.T || s.B != like.B || s.n != n) {
      ok = false;
    }
    return s;
  }
  // Returns the start of a contiguous array, or null for None.
  const char* whole(const py::handle& object, const Axes& axes) {
    return whole(object, axes, element_type(element_));
  }
  // `type`: the NumPy type of the elements.
  const char* whole(const py::handle& object, const Axes& axes, int type) {
    if (object.is_none()) return nullptr;
    if (!has_elements(object, type)) return failed<const char*>();
    const auto a = py::reinterpret_borrow<Array>(object);
    if (!(axes == a) || (a.flags() & is_whole) != is_whole) return failed<const char*>();
    return static_cast<const char*>(a.data());
  }

 private:
  template <class E>
  E failed() {
    ok = false;
    return {};
  }

  index element_;
};

}  // namespace fusedrnn
