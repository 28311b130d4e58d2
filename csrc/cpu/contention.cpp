#include "contention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string_view>
#include <utility>

#if defined(__linux__)
#include <sys/resource.h>
#include <time.h>
#endif

namespace fusedrnn {

namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr milliseconds look{2}, window{20};  // a time slice is about 4 ms
constexpr microseconds gap{100};             // workers sleep in longer ones
// A pause is at least as long as the job before it, and at most as eight such jobs.
constexpr milliseconds first_pause{60}, most_pause{480}, longest_pause{1000};
constexpr int most_jobs = 8;
// A thread is slow if other work takes this part of its time, and left out if the team
// loses this part of what the thread adds, even if the team is not faster without it.
constexpr double slow_share = 0.4, worth = 0.8;

// FUSEDRNN_FIXED_THREADS=1 leaves no thread out.
const bool are_fixed = [] {
  const char* const value = std::getenv("FUSEDRNN_FIXED_THREADS");
  return value && std::string_view(value) == "1";
}();

}  // namespace

std::optional<CoreShare::Usage> CoreShare::usage() {
#if defined(__linux__)
  // The times of getrusage are up to a tick old, 4 ms.
  rusage found;
  timespec time;
  if (getrusage(RUSAGE_THREAD, &found) == 0 &&
      clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) {
    return Usage{
        std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec),
        found.ru_nvcsw};
  }
#endif
  return std::nullopt;
}

void CoreShare::begin_job(Clock::time_point posted) {
  if (posted - ended_at_ < gap) return;
  looked_at_ = posted, used_ = usage();
  is_after_gap_ = true;
}

double CoreShare::end_job() {
  ended_at_ = Clock::now();
  // After a gap another one may follow, in which the thread sleeps.
  if (!is_after_gap_ && ended_at_ - looked_at_ < look) return 0;
  is_after_gap_ = false;
  const auto passed = ended_at_ - std::exchange(looked_at_, ended_at_);
  const auto before = std::exchange(used_, usage());
  if (!before || !used_ || used_->sleeps != before->sleeps) return 0;
  passed_ += passed, computed_ += used_->computed - before->computed;
  if (passed_ < window) return 0;
  const std::chrono::duration<double> all = passed_, computed = computed_;
  passed_ = computed_ = {};
  return 1 - computed / all;
}

int Contention::limit(int threads, Length length, Time now) const {
  if (now >= until_) return threads;
  // Smaller teams than the one that lost cores may do without these, too.
  const int some =
      threads < threads_ ? std::min(threads, threads_ - left_out_) : threads - left_out_;
  // In a lasting job a thread on a shared core computes half of the time, so without half
  // of its threads it would be no faster.
  if (length == Length::lasting && 2 * some <= threads) return threads;
  return std::max(some, 1);
}

void Contention::found(int slow, double most, int threads, Time begin, Time end) {
  if (most * threads <= worth * slow) return;
  if (begin < until_) {
    left_out_ += slow;
    return;
  }
  const Duration job = end - begin, quiet = begin - until_ - 2 * window;
  const Duration first = std::clamp<Duration>(job, first_pause, longest_pause);
  const Duration last = std::clamp<Duration>(most_jobs * job, most_pause, longest_pause);
  pause_ = std::clamp(2 * pause_ - std::max(quiet, Duration{}), first, last);
  left_out_ = slow, threads_ = threads;
  until_ = end + pause_;
}

void run_on_free_cores(int threads, Length length, const Job& job, Watch* watch) {
  using Clock = Contention::Clock;
  thread_local Contention contention;
  const bool is_brief = length == Length::brief;
  // Another library waits for its threads in its own calls, whatever ours do.
  if (threads == 1 || are_fixed || shares_team()) {
    return run_on_team(threads, is_brief, job, watch);
  }
  const auto begin = Clock::now();
  threads = contention.limit(threads, length, begin);
  if (threads == 1) return run_on_team(1, is_brief, job, watch);
  std::atomic<int> slow{0};
  std::atomic<double> most{0};
  int count = 1;  // fewer than asked for, where the system has no more
  const auto part = [&](const Team& team) {
    thread_local CoreShare core;
    core.begin_job(begin);
    job.work(job.argument, team);
    if (const double taken = core.end_job(); taken > slow_share) {
      ++slow;
      for (double seen = most;
           taken > seen && !most.compare_exchange_weak(seen, taken);) {
      }
    }
    if (team.is_caller) count = team.count;
  };
  run_on_team(threads, is_brief, part, watch);
  if (slow > 0) contention.found(slow, most, count, begin, Clock::now());
}

}  // namespace fusedrnn
