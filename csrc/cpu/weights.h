// Weights holds the parameters of a layer in one direction, and their packings for
// forward and backward.
//
// A packing is created when a call first needs it, and then kept. The first few rows, and
// a first call of one step, are multiplied without it, in the same order of sums, because
// packing would take longer: with the weights as they lie in memory or, for more rows at
// once than most_unpacked_rows, with panels that are packed where they are used
// (isa/run.h). Calls with options always use a packing.
#pragma once

#include <atomic>

#include "layout.h"
#include "memory.h"

namespace fusedrnn {

// DroppedWeights has what weight dropout depends on.
struct DroppedWeights {
  double p;  // 0: none
  std::uint64_t seed;
  std::uint32_t where;
};

// Up to so many rows in all are multiplied without a packing, and three times as many in
// backward, where the unpacked weights already lie in the order of the product. Tests
// change it.
extern std::atomic<index> few_rows;

class Weights {
 public:
  // Parameters have the blocks of the user's gates, and must outlive this object. Without
  // parameters only sizes can be asked for.
  Weights(const Kernels& kernels, const Product& product, const CellKernels& cell,
          const Parameters<char>& parameters, const Vectors<const char>& vectors);
  // Copies `whole` with some elements of weight_hh dropped.
  Weights(const Weights& whole, const DroppedWeights& dropped);
  ~Weights();

  const Layout& layout() const { return layout_; }
  const Vectors<const char>& vectors() const { return vectors_; }
  const Parameters<char>& parameters() const { return parameters_; }
  // Returns whether weights are narrower than the element type.
  bool is_narrow() const { return layout_.product.precision != Precision::element; }
  index weight_bytes() const { return layout_.weight_item(parameters_); }
  // Returns the number of blocks of rows in the user's parameters: the kernels' gates
  // without an absent one.
  int blocks() const { return layout_.shape.gates - has_absent(); }
  // Returns whether the cell has a gate without weights, whose rows are zero for the
  // kernels.
  bool has_absent() const { return layout_.shape.differs.absent >= 0; }
  // Returns whether every call needs the kernels with options.
  bool has_options() const {
    return layout_.model.projects || layout_.model.norm || vectors_.weight_ch ||
           layout_.shape.has_second() || has_absent();
  }

  struct Packed {
    const char* start;
    bool unpacked;  // only the biases are packed
  };
  // `rows`: those of all steps.
  Packed forward(index steps, index rows, bool has_options) const;
  const char* bias() const { return find(bias_, Packing::bias); }
  // Returns null for unpacked weights.
  const char* backward(index steps, index rows, bool has_options) const;
  // Returns the bytes of the packing for forward.
  index packed_bytes() const { return fusedrnn::packed_bytes(layout_, Packing::forward); }

 private:
  // A Slot is filled once, by whichever thread is first.
  using Slot = std::atomic<const Memory*>;

  bool may_skip_packing() const { return !is_narrow() || layout_.halves; }
  const char* find(Slot& slot, Packing packing) const;
  void widen();
  void expand();

  const Layout layout_;
  const Parameters<char> user_parameters_;
  const Vectors<const char> user_vectors_;
  Memory dropped_, widened_, expanded_;
  Parameters<char> parameters_;  // as the kernels read them
  Vectors<const char> vectors_;
  mutable Slot bias_{nullptr}, forward_{nullptr}, backward_{nullptr};
  mutable std::atomic<index> rows_forward_{0}, rows_backward_{0};
};

// Copies weight_hh (as the user has it) or its gradient, whose elements have `item`
// bytes, with the dropped elements set to 0.
void drop_weights(const Weights& weights, const DroppedWeights& dropped, index item,
                  const char* from, char* to);

// Returns the place of a slot among the peepholes.
inline int peephole_of(const Shape& shape, int slot) {
  int at = 0;
  while (shape.peepholes[at].slot != slot) ++at;
  return at;
}

// Copies blocks of `bytes` each: insert_block from an array without the absent block of a
// cell's `blocks` to one where it is zeros, remove_block the other way, also in place.
void insert_block(const char* from, index bytes, int blocks, int absent, char* to);
void remove_block(const char* from, index bytes, int blocks, int absent, char* to);

}  // namespace fusedrnn
