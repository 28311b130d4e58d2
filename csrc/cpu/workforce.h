// This header says how many threads a call takes, and in which floating-point mode they
// compute.
#pragma once

#include <algorithm>

#include "contention.h"
#include "dispatch.h"
#include "float_mode.h"

namespace fusedrnn {

// Calls f(team) on so many threads. `steps` is the number of steps of the call, which are
// counted from call to call; `watch`, or null, can end it.
template <class F>
void with_team(int threads, Length length, index steps, const F& f,
               Watch* watch = nullptr) {
  thread_local index step = 0;
  const index first_step = step;
  const auto work = [&](Team team) {
    const FlushDenormals mode;
    team.step = first_step;
    f(team);
  };
  run_on_free_cores(threads, length, job_of(work), watch);
  step += steps;
}

// Returns one thread for each `values_per_thread` values, at most as many as a call may
// use.
inline int threads_for(index values, index values_per_thread) {
  const index most = std::max<index>(values / values_per_thread, 1);
  return static_cast<int>(std::min<index>(most, get_num_threads()));
}

}  // namespace fusedrnn
