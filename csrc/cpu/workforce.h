// This header says how many threads a call takes, and in which floating-point mode they
// compute.
#pragma once

#include <algorithm>

#include "dispatch.h"

#if defined(__x86_64__) || defined(_M_X64)
#define FUSEDRNN_X86 1
#include <immintrin.h>
#endif

namespace fusedrnn {

// FlushDenormals makes a call treat denormal numbers as zero, and restores the caller's
// mode. A state that decays towards zero passes through denormals, which cost some
// hundred cycles each on many machines.
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

// Calls f(team) on so many threads. `steps` is the number of steps of the call, which are
// counted from call to call.
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

// Returns one thread for each `values_per_thread` values, at most as many as a call may
// use.
inline int threads_for(index values, index values_per_thread) {
  const index most = std::max<index>(values / values_per_thread, 1);
  return static_cast<int>(std::min<index>(most, get_num_threads()));
}

}  // namespace fusedrnn
