#include "team.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

#if defined(__linux__)
#include <sched.h>
#endif

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "machine.h"

namespace fusedrnn {

constinit thread_local Question asks_to_end = nullptr;

namespace {

void pause() {
#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// After a yield to a process that computes without pause a thread waits for the end of
// that process's time slice, 4 ms. So a thread that soon has work again does not yield at
// once, and a worker without a job sleeps without having yielded.
constexpr int spins_before_yield = 3000;   // about 45 µs
constexpr int spins_before_sleep = 10000;  // about 0.15 ms
constexpr std::chrono::microseconds recent{300};
using Clock = std::chrono::steady_clock;

// Waits until done() without sleeping. Once it takes long, it calls slow() before each
// yield, with true the first time.
template <class F, class G>
void spin_until(int spins, const F& done, const G& slow) {
  for (int spin = 0; !done(); ++spin) {
    if (spin < spins) {
      pause();
    } else {
      slow(spin == spins);
      std::this_thread::yield();
    }
  }
}

// Returns how often a thread of a team looks for what it waits for before it yields. It
// yields at once if threads share cores, because another one needs its core.
int spins_of(int threads) { return threads > usable_cores() ? 0 : spins_before_yield; }

// Runs a job's part; another thread of the team learns from its watch that the call
// ended.
void run_unless_ended(const Job& job, const Team& team) {
  try {
    job.work(job.argument, team);
  } catch (const Interrupted&) {
  }
}

// A Worker is a thread that waits for jobs: it spins for a moment after each job, then
// sleeps.
class Worker {
 public:
  Worker() : thread_([this] { serve(); }) {}
  ~Worker() {
    post(stop);
    thread_.join();
  }

  bool is_asleep() const { return state_.load(std::memory_order_relaxed) == asleep; }

  void start(const Job& job, const Team& team) {
    job_ = job;
    team_ = team;
    if (is_asleep()) leave_this_cpu();
    post(busy);
  }
  void await() const {
    spin_until(
        team_.spins, [this] { return state_.load(std::memory_order_acquire) != busy; },
        [](bool) {});
  }

 private:
  enum State : int { idle, asleep, busy, stop };

  // seq_cst orders the store with a waiter's registration: after a weaker store
  // notify_one could miss a waiter, which would sleep on.
  void post(State state) {
    state_.store(state, std::memory_order_seq_cst);
    state_.notify_one();
  }

  // Keeps the worker off the caller's CPU. Linux often wakes a worker there, where it
  // waits until the caller's time slice ends, up to 5 ms: in a third of all cases after
  // the caller itself slept.
  void leave_this_cpu() {
#if defined(__linux__)
    const int here = sched_getcpu();
    if (here < 0 || sched_getaffinity(0, sizeof allowed_, &allowed_) != 0) return;
    cpu_set_t others = allowed_;
    CPU_CLR(here, &others);
    if (CPU_COUNT(&others) == 0) return;
    bound_ = pthread_setaffinity_np(thread_.native_handle(), sizeof others, &others) == 0;
#endif
  }

  void serve() {
    for (;;) {
      for (int spin = 0; spin < spins_before_sleep && is_idle(); ++spin) pause();
      int state = idle;
      if (state_.compare_exchange_strong(state, asleep)) state_.wait(asleep);
      if (state_.load(std::memory_order_acquire) == stop) return;
#if defined(__linux__)
      if (bound_) sched_setaffinity(0, sizeof allowed_, &allowed_);  // free again
      bound_ = false;
#endif
      team_.barrier->keep_apart(team_.rank, team_.count);
      run_unless_ended(job_, team_);
      state_.store(idle, std::memory_order_release);
    }
  }
  bool is_idle() const { return state_.load(std::memory_order_acquire) == idle; }

  alignas(64) std::atomic<int> state_{idle};
  Job job_{};
  Team team_{};
#if defined(__linux__)
  cpu_set_t allowed_;
  bool bound_ = false;
#endif
  std::thread thread_;  // last, because it reads the other members
};

// Returns how often this process has been forked off another.
int forks() {
  static std::atomic<int> count{0};
#if defined(__unix__) || defined(__APPLE__)
  static const int watched = pthread_atfork(nullptr, nullptr, [] { ++count; });
  static_cast<void>(watched);
#endif
  return count.load(std::memory_order_relaxed);
}

// A Pool has the workers of one calling thread. In a forked child these threads do not
// exist, so it drops their records.
class Pool {
 public:
  ~Pool() { forget_if_forked(); }

  bool is_running() const { return is_running_; }

  void run(int threads, bool brief, Watch* watch, const Job& job) {
    forget_if_forked();
    if (brief && !are_awake(threads - 1)) {
      const bool alone = Clock::now() - last_brief_ > recent;
      if (alone) job.work(job.argument, Team::single(watch));
      last_brief_ = Clock::now();
      if (alone) return;
    }
    threads = 1 + provide(threads - 1);
    Barrier barrier;
    barrier.keep_apart(0, threads);
    const Team team{0, threads, &barrier, 0, watch, true, spins_of(threads)};
    is_running_ = true;
    for (int rank = 1; rank < threads; ++rank) {
      workers_[rank - 1]->start(job, team.worker(rank));
    }
    run_unless_ended(job, team);
    for (int rank = 1; rank < threads; ++rank) workers_[rank - 1]->await();
    is_running_ = false;
    if (watch) watch->throw_if_ended();
  }

 private:
  // Returns how many workers there are for a job that could use `count`. The system may
  // refuse further threads; no result depends on their number.
  int provide(int count) {
    workers_.reserve(count);
    try {
      while (static_cast<int>(workers_.size()) < count) {
        workers_.push_back(std::make_unique<Worker>());
      }
    } catch (const std::system_error&) {
    }
    return std::min(count, static_cast<int>(workers_.size()));
  }

  bool are_awake(int count) const {
    const auto none_asleep = [](const auto& worker) { return !worker->is_asleep(); };
    return count <= static_cast<int>(workers_.size()) &&
           std::all_of(workers_.begin(), workers_.begin() + count, none_asleep);
  }

  void forget_if_forked() {
    if (forks_ == forks()) return;
    for (auto& worker : workers_) static_cast<void>(worker.release());
    workers_.clear();
    forks_ = forks();
  }

  int forks_ = forks();
  bool is_running_ = false;
  Clock::time_point last_brief_;  // the last brief job that found workers asleep
  std::vector<std::unique_ptr<Worker>> workers_;
};

// OpenMP is another library's OpenMP, by the functions that gcc's parallel regions call.
struct OpenMP {
  void (*parallel)(void (*work)(void*), void* argument, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();
  int (*max_threads)();
  int forks;  // when it was found: a forked child must not use it
};
std::atomic<const OpenMP*> shared_openmp{nullptr};

// Returns the library on whose threads this process computes, or null.
const OpenMP* team_of_openmp() {
  const OpenMP* const omp = shared_openmp.load(std::memory_order_acquire);
  return omp && omp->forks == forks() ? omp : nullptr;
}

// Returns whether the system makes `count` threads beside those that there are.
bool can_make(int count) {
  std::vector<std::thread> made;
  std::atomic<bool> is_over{false};
  try {
    made.reserve(count);
    while (static_cast<int>(made.size()) < count) {
      made.emplace_back([&] { is_over.wait(false); });
    }
  } catch (const std::system_error&) {
  }
  const bool has_made_all = static_cast<int>(made.size()) == count;
  is_over.store(true);
  is_over.notify_all();
  for (std::thread& thread : made) thread.join();
  return has_made_all;
}

// Returns whether an OpenMP library has `threads` threads for this one, or can make them:
// it would end the process if it could not.
bool has_threads(const OpenMP& omp, int threads) {
  thread_local int made = 1;
  const int all = std::max(threads, omp.max_threads());
  if (all > made && !can_make(all - 1)) return false;
  made = all;
  return true;
}

// Runs a job on the first `threads` threads of an OpenMP library. All of its threads
// enter, so that the library need not end some.
void run_on(const OpenMP& omp, int threads, bool brief, Watch* watch, const Job& job) {
  thread_local Clock::time_point last;
  if (brief) {
    const auto now = Clock::now();
    const bool alone = now - last > recent;
    last = now;
    if (alone) return job.work(job.argument, Team::single(watch));
  }
  struct Region {
    const OpenMP& omp;
    int threads;
    Watch* watch;
    const Job& job;
    Barrier barrier;
  } region{omp, threads, watch, job, {}};
  const auto work = [](void* argument) {
    auto& of = *static_cast<Region*>(argument);
    const int rank = of.omp.thread_num();
    const int count = std::min(of.threads, of.omp.num_threads());
    if (rank >= count) return;
    of.barrier.keep_apart(rank, count);
    const auto meeting = [&](const Team& team) {
      of.job.work(of.job.argument, team);
      team.meet();  // our barrier yields to a thread that has not begun
    };
    const Team caller{0, count, &of.barrier, 0, of.watch, true, spins_of(count)};
    run_unless_ended(job_of(meeting), rank == 0 ? caller : caller.worker(rank));
  };
  omp.parallel(work, &region, static_cast<unsigned>(std::max(threads, omp.max_threads())),
               0);
  last = Clock::now();
  if (watch) watch->throw_if_ended();
}

}  // namespace

bool share_team(const char* library) {
  shared_openmp.store(nullptr);
#if defined(__unix__)
  if (!*library) return false;
  void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return false;
  OpenMP omp{};
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
    return function != nullptr;
  };
  const bool found = find(omp.parallel, "GOMP_parallel") &&
                     find(omp.thread_num, "omp_get_thread_num") &&
                     find(omp.num_threads, "omp_get_num_threads") &&
                     find(omp.max_threads, "omp_get_max_threads");
  if (!found) return false;
  omp.forks = forks();
  shared_openmp.store(new OpenMP(omp), std::memory_order_release);  // read for ever
  return true;
#else
  static_cast<void>(library);
  return false;
#endif
}

bool shares_team() { return team_of_openmp() != nullptr; }

void Barrier::wait(const Team& team) {
  const int phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == team.count - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  spin_until(
      team.spins, [&] { return phase_.load(std::memory_order_acquire) != phase; },
      [&](bool first) {
        if (first) keep_apart(team.rank, team.count);
        team.look();
      });
}

void Progress::await(index steps, const Team& team) const {
  spin_until(
      team.spins, [&] { return steps_.load(std::memory_order_acquire) >= steps; },
      [&](bool) { team.look(); });
}

void Barrier::keep_apart([[maybe_unused]] int rank, [[maybe_unused]] int count) {
#if defined(__linux__)
  const int here = sched_getcpu();
  if (here < 0 || rank >= most_tracked) return;
  cpu_[rank].store(here + 1, std::memory_order_relaxed);
  const int tracked = std::min(count, most_tracked);
  bool shared = false;
  cpu_set_t allowed;
  for (int other = 0; other < tracked; ++other) {
    shared |= other != rank && cpu_[other].load(std::memory_order_relaxed) == here + 1;
  }
  // The calling thread belongs to the user, so only workers move.
  if (!shared || rank == 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t free = allowed;
  for (int other = 0; other < tracked; ++other) {
    const int cpu = cpu_[other].load(std::memory_order_relaxed) - 1;
    if (cpu >= 0) CPU_CLR(cpu, &free);
  }
  if (CPU_COUNT(&free) == 0) return;
  if (sched_setaffinity(0, sizeof free, &free) != 0) return;
  sched_setaffinity(0, sizeof allowed, &allowed);  // moved, and free again
  cpu_[rank].store(sched_getcpu() + 1, std::memory_order_relaxed);
#endif
}

void run_on_team(int threads, bool brief, Job job, Watch* watch) {
  if (threads == 1) return job.work(job.argument, Team::single(watch));
  const OpenMP* const omp = team_of_openmp();
  if (omp && has_threads(*omp, threads)) {
    return run_on(*omp, threads, brief, watch, job);
  }
  thread_local Pool pool;
  // A call within a call, by a signal's handler, has no workers.
  if (pool.is_running()) return job.work(job.argument, Team::single(watch));
  pool.run(threads, brief, watch, job);
}

}  // namespace fusedrnn
