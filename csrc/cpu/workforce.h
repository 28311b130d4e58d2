// How many threads a call takes, and in what state they compute.
#pragma once

#include <algorithm>

#include "dispatch.h"

#if defined(__x86_64__) || defined(_M_X64)
#define FUSEDRNN_X86 1
#include <immintrin.h>
#endif

namespace fusedrnn {

// State that decays towards zero passes through denormals, which cost some hundred cycles
// each on many machines: the call takes them as zero and leaves the caller's mode alone.
class FlushDenormals {
#ifdef FUSEDRNN_X86
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | (1ull << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  unsigned long long before_;
#endif
};

// f(team) on so many threads. `steps` are those of the call: a count of them goes on from
// call to call.
template <class F>
void with_team(int threads, bool brief, index steps, const F& f) {
  thread_local index step = 0;
  const index first_step = step;
  run_on_team(threads, brief, [&](Team team) {
    const FlushDenormals mode;
    team.step = first_step;
    f(team);
  });
  step += steps;
}

// One thread for each so many values, of those that a call may have.
inline int threads_for(index values, index values_per_thread) {
  const index most = std::max<index>(values / values_per_thread, 1);
  return static_cast<int>(std::min<index>(most, get_num_threads()));
}

}  // namespace fusedrnn
