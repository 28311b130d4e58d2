// The threads of one call and the barrier they meet at once per step.
#pragma once

#include <atomic>

#include "../problem.h"

namespace fusedrnn {

// Spins, because a step lasts microseconds, and yields once the wait is long, because a
// thread that is waited for may have lost its core to another process.
class Barrier {
 public:
  void wait(int count);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

struct Range {
  index begin, end;
};

struct Team {
  int rank, count;
  Barrier* barrier;

  void meet() const {
    if (count > 1) barrier->wait(count);
  }
  // This thread's part of n things, in whole multiples of `grain`.
  Range share(index n, index grain = 1) const {
    const index grains = (n + grain - 1) / grain;
    const index begin = grains * rank / count * grain;
    const index end = grains * (rank + 1) / count * grain;
    return {begin < n ? begin : n, end < n ? end : n};
  }
};

}  // namespace fusedrnn
