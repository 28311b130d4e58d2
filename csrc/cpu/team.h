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
#include "watch.h"

namespace fusedrnn {

struct Team;

// A Barrier spins, because a step lasts microseconds, and soon yields, because a thread
// that has not arrived may have lost its core.
//
// It also keeps the threads apart. Linux may wake a worker on its caller's core and, as
// both are always ready to run, leave them there, one step every 30 µs, while the next
// core is idle. Each thread stores its CPU, and a worker that finds another thread on its
// CPU moves.
class Barrier {
 public:
  // Throws Interrupted if the call ends meanwhile.
  void wait(const Team& team);
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
  // Throws Interrupted if the call of the waiting thread ends meanwhile.
  void await(index steps, const Team& team) const;

 private:
  alignas(64) std::atomic<index> steps_{0};
};

struct Team {
  int rank, count;
  Barrier* barrier;
  index step = 0;  // a count of steps that goes on from call to call
  Watch* watch = nullptr;
  bool is_caller = false;  // whether this is the thread that made the call
  int spins = 0;           // how often it looks for another thread before it yields

  void meet() const {
    if (count > 1) barrier->wait(*this);
  }
  // Each thread calls this after each step. Throws Interrupted if the call ends.
  void end_step() const {
    if (watch) watch->end_step(is_caller);
  }
  // A thread that waits long calls this. Throws Interrupted if the call ends.
  void look() const {
    if (!watch) return;
    if (is_caller) watch->ask();
    watch->throw_if_ended();
  }
  // Returns the place of another thread in the team of its caller.
  Team worker(int its_rank) const {
    Team team = part(its_rank, count, barrier);
    team.is_caller = false;
    return team;
  }
  // Returns this thread's place among some of the threads.
  Team part(int its_rank, int its_count, Barrier* its_barrier) const {
    Team team = *this;
    team.rank = its_rank, team.count = its_count, team.barrier = its_barrier;
    return team;
  }
  // Returns a team of one thread.
  static Team single(Watch* watch = nullptr) { return {0, 1, nullptr, 0, watch, true}; }
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
// Returns whether this process's calls do.
bool shares_team();

// Runs the job on `threads` threads, the calling one and workers that it keeps for later
// calls, and returns when all are done. If the system has no more threads, there are
// fewer. If the workers sleep, a brief job runs on the calling thread alone, because
// waking them takes as long as the job, unless another brief job came just before.
void run_on_team(int threads, bool brief, Job job, Watch* watch);

// Returns the job of calling f(team).
template <class F>
Job job_of(const F& f) {
  return {[](const void* argument, const Team& team) {
            (*static_cast<const F*>(argument))(team);
          },
          &f};
}

// Calls f(team) on each thread.
template <class F>
void run_on_team(int threads, bool brief, const F& f, Watch* watch = nullptr) {
  run_on_team(threads, brief, job_of(f), watch);
}

}  // namespace fusedrnn
