// A layer's parameters in one direction, packed for the forward or the backward kernels
// of one ISA, or only borrowed: packing for a few rows costs more than it gains.
#pragma once

#include <array>
#include <limits>

#include "../cpu/dispatch.h"
#include "../cpu/memory.h"
#include "arrays.h"

namespace fusedrnn {

// The options of a call; by default none.
struct CallOptions {
  bool row_wise = false;  // the plain kernels do not do
  Options values{std::numeric_limits<double>::infinity(),
                 std::numeric_limits<double>::infinity(),
                 0,
                 0,
                 0,
                 false,
                 0,
                 0,
                 0};
};

// Parameters (or gradients) that exist, in the order of reference.Parameters.
using Arrays = std::array<MaybeArray, 10>;

// Never changes, so threads share it.
class Weights {
 public:
  Weights(const std::string& cell, const Arrays& p, bool backward,
          const std::optional<std::string>& isa, bool borrow);

  std::string cell() const { return std::string(cell_.name); }
  std::string isa() const { return std::string(isa_.name); }
  index saved_size(const CallOptions& options) const;
  index saved_values(const CallOptions& options) const;

  void forward(const CallOptions& options, const Array& x, const Array& h0,
               const MaybeArray& c0, const MaybeArray& lengths, const MaybeArray& resets,
               bool reverse, MaybeArray y, MaybeArray h_n, MaybeArray c_n,
               MaybeArray saved, MaybeArray cells, MaybeArray trace) const;
  // `forward`: the weights of the forward, which backward needs with options.
  void backward(const CallOptions& options, const Weights& forward, const Array& x,
                const Array& h0, const MaybeArray& c0, const MaybeArray& lengths,
                const MaybeArray& resets, bool reverse, const Array& y,
                const MaybeArray& saved, const MaybeArray& cells, const MaybeArray& dy,
                const MaybeArray& dh_n, const MaybeArray& dc_n, const MaybeArray& dcells,
                MaybeArray dx, Arrays& d, MaybeArray dh0, MaybeArray dc0) const;
  py::dict plan(index T, index B, const CallOptions& options) const;

  // A layer's whole call, for speed where one step takes a microsecond: x (T, B, I), the
  // state (1, B, H) each or None for zeros. Returns (y, state) or, where an argument
  // needs preparing or is wrong, None: the caller then takes the long way, which words
  // errors.
  py::object call(const py::object& x, const py::object& state) const;

  // The arrays of a plain forward.
  struct Outputs {
    Array y, h_n;
    MaybeArray c_n, saved;
  };
  // A plain call as it comes, or nothing where an argument needs preparing or is wrong:
  // x (T, B, I) of contiguous rows, h0 and c0 (B, H), or (layers, B, H) where that is
  // not 0, or None for zeros.
  std::optional<Outputs> plain_forward(const py::handle& x, const py::handle& h0,
                                       const py::handle& c0, bool reverse, bool saves,
                                       index layers) const;
  // And back: the gradients of x, h0, c0 and the parameters whose bits are in `wanted`.
  py::object plain_backward(const py::handle& x, const py::handle& h0,
                            const py::handle& c0, bool reverse, const py::handle& y,
                            const py::handle& saved, const py::handle& dy,
                            const py::handle& dh_n, const py::handle& dc_n,
                            unsigned wanted) const;

 private:
  struct PlainStart;

  const char* ready(const py::handle& object, Axes shape) const;
  const char* ready_rows(const py::handle& object, Axes shape, index& stride_t,
                         index& stride_b) const;
  Array make(const std::vector<index>& shape) const;
  bool start_plain(ForwardOf<char>& p, const py::handle& x, const py::handle& h0,
                   const py::handle& c0, bool reverse, index layers,
                   std::optional<Array>& zeros) const;
  Vectors<const char> vectors() const;
  void sizes(Sizes& p, const Array& x, bool reverse) const;
  void start(ForwardOf<char>& p, Masks& masks, const CallOptions& options, const Array& x,
             const Array& h0, const MaybeArray& c0, const MaybeArray& lengths,
             const MaybeArray& resets, bool reverse) const;

  const Isa& isa_;
  const index size_;  // of an element
  const CellKernels& cell_;
  const bool backward_, borrow_;
  const Array weight_ih_, weight_hh_;
  const std::array<MaybeArray, 5> vectors_;
  const Layout layout_;
  const Model& model_;
  Memory packed_;
};

}  // namespace fusedrnn
