// The threads of one call and the barrier they meet at once per step.
//
// The pool is ours, not OpenMP's, whose waiting cannot be bounded from inside a library:
// libgomp spins for 10 ms without yielding, so that two of its threads on one core, or
// beside another process, took 8 ms over a call of 0.1 ms. And its pool does not survive
// fork. OpenMP is asked only how many threads the user wants (dispatch.cpp).
//
// But beside a library whose OpenMP threads spin after each of its own calls, a pool of
// ours would share their cores. Then those threads do our work, too: share_team().
#pragma once

#include <atomic>

#include "../contract.h"

namespace fusedrnn {

// Spins, because a step lasts microseconds, and soon yields, because a thread that is
// waited for may have lost its core.
//
// It also keeps the threads apart: Linux may wake a worker on its caller's core and, as
// both are always ready to run, leave them there, one step every 30 µs, while the next
// core is idle. Each says where it runs, and a worker that finds another on its core
// moves.
class Barrier {
 public:
  void wait(int rank, int count);
  // To be called by each thread before its work.
  void keep_apart(int rank, int count);

 private:
  static constexpr int most_seen = 64;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
  alignas(64) std::atomic<int> cpu_[most_seen] = {};  // a thread's CPU + 1
};

// How many steps of a layer are done, for another layer that reads them meanwhile.
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
  // One thread for itself.
  static Team single() { return {0, 1, nullptr}; }
  // This thread's part of n things, in whole multiples of `grain`.
  Range share(index n, index grain = 1) const {
    const index grains = (n + grain - 1) / grain;
    const index begin = grains * rank / count * grain;
    const index end = grains * (rank + 1) / count * grain;
    return {begin < n ? begin : n, end < n ? end : n};
  }
};

// What the threads of a team run: work(argument, team).
struct Job {
  void (*work)(const void* argument, const Team& team);
  const void* argument;
};

// Lets calls run on the threads of an OpenMP library that is loaded, in this process but
// not in those forked off. Whether there is one of that name, with gcc's interface; none
// by that of "".
bool share_team(const char* library);

// Runs the job on `threads` threads, the calling one and workers of its own, which it
// keeps for later calls, and returns when all are done. Waking workers takes as long as a
// brief job, which runs on fewer threads instead unless another came just before it.
void run_on_team(int threads, bool brief, Job job);

// f(team) on each thread.
template <class F>
void run_on_team(int threads, bool brief, const F& f) {
  run_on_team(threads, brief,
              Job{[](const void* argument, const Team& team) {
                    (*static_cast<const F*>(argument))(team);
                  },
                  &f});
}

}  // namespace fusedrnn
