// This header leaves threads out of a team while other work uses their cores.
//
// The threads of a team meet after every step, so a team with one thread on a shared core
// waits, for milliseconds each time, whenever the system gives that core to the other
// work. With one thread fewer it runs on: the last worker sleeps, and the system moves
// the other work, or a thread, to the core that this frees. No result depends on it.
#pragma once

#include <chrono>
#include <optional>

#include "team.h"

namespace fusedrnn {

// A Length says how long a job takes: about as long as waking a thread (brief), or longer
// than several time slices of the system (lasting).
enum class Length { brief, usual, lasting };

// A CoreShare measures how much of its thread's time other work takes.
class CoreShare {
 public:
  using Clock = std::chrono::steady_clock;
  // The thread calls these before and after its part of a job that a caller posted then.
  void begin_job(Clock::time_point posted);
  // Once in 20 ms of jobs this returns the part of them, since they were posted, in which
  // the thread did not compute, otherwise 0.
  double end_job();

 private:
  struct Usage {
    std::chrono::nanoseconds computed;
    long sleeps;
  };
  static std::optional<Usage> usage();

  Clock::time_point looked_at_{}, ended_at_{};
  std::optional<Usage> used_;
  bool is_after_gap_ = true;
  std::chrono::nanoseconds passed_{}, computed_{};  // of the jobs that were looked at
};

// A Contention says how many threads the calls of one thread should use.
class Contention {
 public:
  using Clock = std::chrono::steady_clock;
  using Time = Clock::time_point;

  int limit(int threads, Length length, Time now) const;
  // Takes note that other work took up to `most` of the time of `slow` of a job's
  // threads. If the team loses most of what these add, they are left out for a pause. It
  // doubles if they are slow again at once, and is shorter the later that is.
  void found(int slow, double most, int threads, Time begin, Time end);

 private:
  using Duration = Time::duration;
  int left_out_ = 0, threads_ = 0;
  Duration pause_{};
  Time until_{};
};

// Runs the job on a team of `threads` threads, or fewer while other work uses cores.
void run_on_free_cores(int threads, Length length, const Job& job, Watch* watch);

}  // namespace fusedrnn
