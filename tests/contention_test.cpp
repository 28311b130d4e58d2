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
  check({1, 0.5, 4, -9, 0}, 19, 3, "one is slow");
  check({2, 0.8, 3, 10, 15}, 19, 1, "two of the others are");
  check(none, 20, 4, "after 20 ms");
  check({1, 0.5, 4, 50, 60}, 99, 3, "again, as soon as it is known");
  check(none, 100, 4, "after 40 ms");
  check({1, 0.5, 4, 150, 160}, 229, 3, "again, 10 ms later than that");
  check(none, 230, 4, "after 70 ms");
  check({2, 0.7, 4, 490, 500}, 519, 2, "long after that");
  check(none, 519, 2, "a smaller team", 2);
  check(none, 519, 4, "half of the threads of a lasting job", 4, Length::lasting);
  check(none, 519, 6, "a quarter of the threads of a lasting job", 8, Length::lasting);
  check(none, 520, 4, "after 20 ms");
  check({1, 0.5, 4, 900, 1000}, 1099, 3, "a long job");
  check(none, 1100, 4, "after as long as it took");
  return failures;
}

}  // namespace fusedrnn::test
