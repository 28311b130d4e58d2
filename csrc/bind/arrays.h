// Arrays in and out of the bindings. src/fusedrnn/functional.py checks what users pass
// and allocates what they get; here a wrong array is a programming error and only
// refused.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../contract.h"

namespace fusedrnn {

namespace py = pybind11;

using Array = py::array;
using MaybeArray = std::optional<py::array>;

[[noreturn]] inline void refuse(const char* name) {
  throw py::value_error(std::string("_cpu: ") + name + " has a wrong dtype or shape");
}

// Whether an array has float32 (size 4) or float64 elements.
inline bool has_elements(const py::handle& a, index size) {
  return size == 4 ? py::isinstance<py::array_t<float>>(a)
                   : py::isinstance<py::array_t<double>>(a);
}

using Axes = std::initializer_list<index>;

// The start of an array of this shape whose last axis is contiguous.
inline const char* start_of(const Array& a, const char* name, Axes shape) {
  if (a.ndim() != static_cast<index>(shape.size())) refuse(name);
  index axis = 0, size = 1;
  for (const index n : shape) {
    if (a.shape(axis++) != n) refuse(name);
    size *= n;
  }
  const bool contiguous = a.strides(axis - 1) == a.itemsize() || a.shape(axis - 1) == 1;
  if (size > 0 && !contiguous) refuse(name);
  return static_cast<const char*>(a.data());
}
// The same of elements of a size, or null where there is no array.
inline const char* read(const MaybeArray& a, index element, const char* name,
                        Axes shape) {
  if (!a) return nullptr;
  if (!has_elements(*a, element)) refuse(name);
  return start_of(*a, name, shape);
}
inline char* write(MaybeArray& a, index element, const char* name, Axes shape) {
  if (!a) return nullptr;
  if (!a->writeable()) refuse(name);
  return const_cast<char*>(read(a, element, name, shape));
}
template <class E>
const E* read(const MaybeArray& a, const char* name, Axes shape) {
  if (!a) return nullptr;
  if (!py::isinstance<py::array_t<E>>(*a)) refuse(name);
  return reinterpret_cast<const E*>(start_of(*a, name, shape));
}

// Bytes from one element of an axis to the next, 0 where there is no array.
inline index stride(const MaybeArray& a, int axis) { return a ? a->strides(axis) : 0; }

// Flags of an array that kernels can read as it is: contiguous and aligned.
constexpr int whole_flags =
    int{py::array::c_style} | int{py::detail::npy_api::NPY_ARRAY_ALIGNED_};

// From so many bytes on it pays to keep an array's memory when it is freed.
constexpr index large_array = 1 << 17;

// An uninitialised array in memory of ours.
Array allocate(const std::vector<index>& shape, const py::dtype& dtype);

}  // namespace fusedrnn
