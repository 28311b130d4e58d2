// This file tests when calls leave out threads whose cores other work uses, at times that
// it makes up.
#include "contention_test.h"

#include <chrono>
#include <cstdio>

#include "../csrc/cpu/contention.h"

namespace fusedrnn::test {

namespace {

Contention::Time at(int ms) {
  return Contention::Time(std::chrono::seconds(1) + std::chrono::milliseconds(ms));
}

// Other work took up to `most` of the time of `slow` of a job's threads; the times are
// milliseconds.
struct Found {
  int slow;
  double most;
  int threads, begin, end;
};

}  // namespace

int failures_of_contention() {
  Contention contention;
  int failures = 0;
  // After a job a call at a later time has so many of its threads.
  const auto check = [&](const Found& job, int later, int expected, const char* what,
                         int threads = 4, Length length = Length::usual) {
    if (job.slow) {
      contention.found(job.slow, job.most, job.threads, at(job.begin), at(job.end));
    }
    const int got = contention.limit(threads, length, at(later));
    if (got == expected) return;
    std::printf("FAIL contention: %s: %d threads, expected %d\n", what, got, expected);
    ++failures;
  };
  const Found none{};
  check({1, 0.2, 4, -9, 0}, 1, 4, "less is lost than a thread is worth");
  check({2, 0.3, 4, -9, 0}, 1, 4, "nor are two worth leaving out");
  check({4, 0.7, 4, -9, 0}, 1, 4, "all are slow, as at the end of a quota");
  check({1, 0.5, 4, -9, 0}, 59, 3, "one is slow");
  check({2, 0.8, 3, 10, 15}, 59, 1, "two of the others are");
  check(none, 60, 4, "after 60 ms");
  check({1, 0.5, 4, 90, 100}, 219, 3, "again, as soon as it is known");
  check(none, 220, 4, "after 120 ms");
  check({1, 0.5, 4, 270, 280}, 509, 3, "again, 10 ms later than that");
  check(none, 510, 4, "after 230 ms");
  check({2, 0.7, 4, 990, 1000}, 1059, 2, "long after that");
  check(none, 1059, 2, "a smaller team", 2);
  check(none, 1059, 4, "half of the threads of a lasting job", 4, Length::lasting);
  check(none, 1059, 6, "a quarter of the threads of a lasting job", 8, Length::lasting);
  check(none, 1060, 4, "after 60 ms");
  check({1, 0.5, 4, 1900, 2000}, 2099, 3, "a long job");
  check(none, 2100, 4, "after as long as it took");
  return failures;
}

}  // namespace fusedrnn::test
