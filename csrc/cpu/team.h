// This header has the threads of one call and the barrier at which they meet once per
// step.
//
// We have our own pool because OpenMP's waiting cannot be bounded from inside a library:
// libgomp spins for 10 ms without yielding, so two of its threads on one core, or beside
// another process, took 8 ms for a call of 0.1 ms. Nor does OpenMP's pool survive fork.
// OpenMP only says how many threads the user wants (dispatch.cpp).
//
// The exception is a library whose OpenMP threads spin after each of its own calls: our
// pool would compete with them for cores, so share_team() runs our work on those threads.
#pragma once

#include <atomic>

#include "../contract.h"

namespace fusedrnn {

// A Barrier spins, because a step lasts microseconds, and soon yields, because a thread
// that has not arrived may have lost its core.
//
// It also keeps the threads apart. Linux may wake a worker on its caller's core and, as
// both are always ready to run, leave them there, one step every 30 µs, while the next
// core is idle. Each thread stores its CPU, and a worker that finds another thread on its
// CPU moves.
class Barrier {
 public:
  void wait(int rank, int count);
  // Each thread calls this before its work.
  void keep_apart(int rank, int count);

 private:
  static constexpr int most_tracked = 64;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
  alignas(64) std::atomic<int> cpu_[most_tracked] = {};  // a thread's CPU + 1
};

// Progress counts the finished steps of a layer, for another layer that reads them
// meanwhile.
class Progress {
 public:
  void reach(index steps) { steps_.store(steps, std::memory_order_release); }
  void await(index steps) const;

 private:
  alignas(64) std::atomic<index> steps_{0};
};

struct Team {
  int rank, count;
  Barrier* barrier;
  index step = 0;  // a count of steps that goes on from call to call

  void meet() const {
    if (count > 1) barrier->wait(rank, count);
  }
  // Returns a team of one thread.
  static Team single() { return {0, 1, nullptr}; }
  // Returns this thread's part of n items, in whole multiples of `grain`.
  Range share(index n, index grain = 1) const {
    const index grains = (n + grain - 1) / grain;
    const index begin = grains * rank / count * grain;
    const index end = grains * (rank + 1) / count * grain;
    return {begin < n ? begin : n, end < n ? end : n};
  }
};

// A Job is what the threads of a team run: work(argument, team).
struct Job {
  void (*work)(const void* argument, const Team& team);
  const void* argument;
};

// Lets calls run on the threads of a loaded OpenMP library, in this process but not in
// forked children. Returns whether a library of that name with gcc's interface is loaded.
// The empty name stops sharing.
bool share_team(const char* library);

// Runs the job on `threads` threads, the calling one and workers that it keeps for later
// calls, and returns when all are done. If the workers sleep, a brief job runs on the
// calling thread alone, because waking them takes as long as the job, unless another
// brief job came just before.
void run_on_team(int threads, bool brief, Job job);

// Calls f(team) on each thread.
template <class F>
void run_on_team(int threads, bool brief, const F& f) {
  run_on_team(threads, brief,
              Job{[](const void* argument, const Team& team) {
                    (*static_cast<const F*>(argument))(team);
                  },
                  &f});
}

}  // namespace fusedrnn
