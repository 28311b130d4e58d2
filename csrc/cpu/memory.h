// Memory on cache lines and, where it is large, on huge pages: a kernel that walks down a
// panel of weights would otherwise miss the TLB.
//
// Blocks of 64 KB and more come from the operating system and not from malloc, whose heap
// would fragment around them. When freed they are kept and lent out again, because a
// training step asks for the same sizes every time, and the kernel's clearing of fresh
// pages took 11% of the time of a step at H = 1024. What is kept is bounded: 256 MB in
// all, no block that the last 32 requests left unused, and none after release_memory().
#pragma once

#include <cstddef>
#include <utility>

namespace fusedrnn {

class Memory {
 public:
  Memory() = default;
  // Throws std::bad_alloc.
  explicit Memory(std::size_t bytes);
  Memory(Memory&& other) noexcept
      : start_(std::exchange(other.start_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)),
        block_(std::exchange(other.block_, 0)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(start_, other.start_);
    std::swap(bytes_, other.bytes_);
    std::swap(block_, other.block_);
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
  std::size_t bytes_ = 0, block_ = 0;  // asked for, and of the block
};

// Scratch memory of a call. A thread keeps up to 1 MB between its calls, until it ends,
// so that a short call asks for none; more is a block for the call alone.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes);
  char* start() const { return start_; }

 private:
  Memory own_;
  char* start_;
};

// Gives back what is kept of freed blocks, and the calling thread's scratch memory.
void release_memory();

}  // namespace fusedrnn
