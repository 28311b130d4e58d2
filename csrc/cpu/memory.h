// Memory on cache lines and, where it is large, on huge pages: a kernel that walks down a
// panel of weights would otherwise miss the TLB.
//
// Blocks that are not small are kept when freed, up to a bound, and lent out again. A
// training step asks for the same sizes every time, and the kernel's clearing of fresh
// pages took 11% of the time of a step at H = 1024.
#pragma once

#include <cstddef>
#include <utility>

namespace fusedrnn {

class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t bytes);
  Memory(Memory&& other) noexcept
      : start_(std::exchange(other.start_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(start_, other.start_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Memory();

  template <class S>
  S* as() const {
    return static_cast<S*>(start_);
  }
  std::size_t bytes() const { return bytes_; }

 private:
  void* start_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace fusedrnn
