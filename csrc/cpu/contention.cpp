#include "contention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string_view>

#if defined(__linux__)
#include <sys/resource.h>
#include <time.h>
#endif

#include "machine.h"

namespace fusedrnn {

namespace {

using std::chrono::milliseconds;
constexpr milliseconds window{2};        // a time slice is about 4 ms
constexpr milliseconds most_window{10};  // before it the thread may have had no job
// A pause is at least as long as the job that lost a core, and doubles up to eight jobs.
constexpr milliseconds first_pause{5}, most_pause{160}, soon{20};
constexpr int most_jobs = 8;
// In a long job a thread on a shared core computes half of the time, so without half of
// its threads the job would not be faster. Nor may a short job before it take them away.
constexpr milliseconds long_job{20};

// FUSEDRNN_FIXED_THREADS=1 leaves no thread out.
const char* const fixed_threads = std::getenv("FUSEDRNN_FIXED_THREADS");
const bool are_fixed = fixed_threads && std::string_view(fixed_threads) == "1";

}  // namespace

std::optional<CoreShare::Usage> CoreShare::usage() {
#if defined(__linux__)
  // The times of getrusage are those of the last tick, 4 ms ago.
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

void CoreShare::look(Clock::time_point now) { looked_at_ = now, used_ = usage(); }

void CoreShare::begin_job() {
  const auto now = Clock::now();
  if (now - looked_at_ > most_window) look(now);
}

bool CoreShare::has_lost_core() {
  const auto now = Clock::now();
  const auto passed = now - looked_at_;
  if (passed < window) return false;
  const auto before = used_;
  look(now);
  return before && used_ && used_->sleeps == before->sleeps &&
         (used_->computed - before->computed) * 2 < passed;
}

int Contention::limit(int threads, Time now) const {
  return now < until_ ? std::max(threads - left_out_, 1) : threads;
}

void Contention::found(int lost, int threads, Time begin, Time end) {
  // If all lost their cores at once, the process used up the quota of its control group.
  if (lost == threads && threads <= usable_cores()) return;
  const Duration job = end - begin;
  if (job > long_job && 2 * lost >= threads) in_long_jobs_until_ = end + most_jobs * job;
  if (end < in_long_jobs_until_) return;
  if (begin < until_) {
    left_out_ += lost;
    return;
  }
  const bool is_again = end - until_ < std::max<Duration>(soon, 2 * job);
  pause_ = is_again
               ? std::min(2 * pause_, std::max<Duration>(most_pause, most_jobs * job))
               : std::max<Duration>(first_pause, job);
  left_out_ = lost;
  until_ = end + pause_;
}

void run_on_free_cores(int threads, bool brief, const Job& job, Watch* watch) {
  using Clock = Contention::Clock;
  thread_local Contention contention;
  // Another library waits for its threads in its own calls, whatever ours do.
  if (are_fixed || shares_team()) return run_on_team(threads, brief, job, watch);
  if (threads == 1) return job.work(job.argument, Team::single(watch));
  const auto begin = Clock::now();
  threads = contention.limit(threads, begin);
  if (threads == 1) return job.work(job.argument, Team::single(watch));
  std::atomic<int> lost{0};
  const auto part = [&](const Team& team) {
    thread_local CoreShare core;
    core.begin_job();
    job.work(job.argument, team);
    if (core.has_lost_core()) lost.fetch_add(1, std::memory_order_relaxed);
  };
  run_on_team(threads, brief, part, watch);
  if (lost > 0) contention.found(lost, threads, begin, Clock::now());
}

}  // namespace fusedrnn
