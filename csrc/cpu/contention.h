// This header leaves out cores that other work uses, too.
//
// The threads of a team meet after every step, so a team with one thread on a shared core
// waits, for milliseconds each time, whenever the system gives that core to the other
// work. With one thread fewer the rest run without waiting. No result depends on it.
#pragma once

#include <chrono>
#include <optional>

#include "team.h"

namespace fusedrnn {

// A CoreShare finds whether its thread lost its core for long.
class CoreShare {
 public:
  // The thread calls these before and after its part of a job.
  void begin_job();
  // Returns whether the thread had less than half of the time since the last look, which
  // was at least 2 ms ago.
  bool has_lost_core();

 private:
  using Clock = std::chrono::steady_clock;
  struct Usage {
    std::chrono::nanoseconds computed;
    long sleeps;
  };
  static std::optional<Usage> usage();
  void look(Clock::time_point now);

  Clock::time_point looked_at_{};
  std::optional<Usage> used_;
};

// A Contention says how many threads the calls of one thread should use.
class Contention {
 public:
  using Clock = std::chrono::steady_clock;
  using Time = Clock::time_point;

  int limit(int threads, Time now) const;
  // Takes note that `lost` of the threads of a job lost their cores. So many are left out
  // for a while, which is longer if it happened soon after the last while.
  void found(int lost, int threads, Time begin, Time end);

 private:
  using Duration = Time::duration;
  int left_out_ = 0;
  Duration pause_{};
  Time until_{}, in_long_jobs_until_{};
};

// Runs the job on a team of `threads` threads, without those whose cores other work uses.
void run_on_free_cores(int threads, bool brief, const Job& job, Watch* watch);

}  // namespace fusedrnn
