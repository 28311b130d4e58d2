// An Arena hands out parts of one block of memory, in whole cache lines. Without memory
// it only counts how many bytes are needed.
#pragma once

#include "../contract.h"

namespace fusedrnn {

class Arena {
  char* memory_;
  index used_ = 0;

 public:
  static constexpr index line = 64;

  explicit Arena(char* memory) : memory_(memory) {}
  char* take(index bytes) {
    char* const part = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(bytes, line);
    return part;
  }
  // Returns this thread's part; each thread gets one of the same size.
  char* of_thread(index bytes, int rank, int threads) {
    const index each = round_up(bytes, line);
    char* const all = take(threads * each);
    return all ? all + rank * each : nullptr;
  }
  template <class E>
  E* of_thread(index count, int rank, int threads) {
    return reinterpret_cast<E*>(of_thread(count * index{sizeof(E)}, rank, threads));
  }
  index used() const { return used_; }
};

}  // namespace fusedrnn
