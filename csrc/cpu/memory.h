// Memory begins on a cache line and, if it is large, lies on huge pages: a kernel that
// walks down a panel of weights would otherwise miss the TLB.
//
// Blocks of 64 KB and more are mapped from the operating system instead of malloc, whose
// heap would fragment around them. Freed blocks are kept and reused, because a training
// step asks for the same sizes every time, and clearing fresh pages took the operating
// system 11% of a step at H = 1024. The kept blocks are bounded: 80 MB in all or, if
// more, three times the largest of the last 32 requests, but never more than 256 MB, and
// none after release_memory(). Whenever a block is freed, those that the last 32 requests
// did not use are released.
#pragma once

#include <cstddef>
#include <new>
#include <span>
#include <utility>

#include "../contract.h"

namespace fusedrnn {

// OutOfMemory says how many bytes there are not; 0: more than can be addressed.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::size_t bytes);
  const char* what() const noexcept override { return message_; }

 private:
  char message_[64];
};

// Returns the bytes of an array of elements of `item` bytes. Throws OutOfMemory if their
// number overflows.
std::size_t bytes_of(std::span<const index> shape, index item);

class Memory {
 public:
  Memory() = default;
  // Throws OutOfMemory.
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
  std::size_t bytes_ = 0, block_ = 0;  // requested, and of the block
};

// A Workspace is the scratch memory of a call. A thread keeps up to 1 MB from call to
// call until it ends, so that a short call allocates none; a larger workspace is
// allocated for the call, as is that of a call within a call, by a signal's handler.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  char* start() const { return start_; }

 private:
  Memory own_;
  bool shares_ = false;  // uses the thread's
  char* start_;
};

// Frees the kept blocks and the calling thread's scratch memory.
void release_memory();

}  // namespace fusedrnn
