// This file tests when calls leave out threads whose cores other work uses, at times that
// it makes up.
#include "contention_test.h"

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "../csrc/cpu/contention.h"
#include "../csrc/cpu/machine.h"

namespace fusedrnn::test {

namespace {

Contention::Time at(int ms) {
  return Contention::Time(std::chrono::seconds(1) + std::chrono::milliseconds(ms));
}

// Of the threads of a job some lost their cores; the times are milliseconds.
struct Found {
  int lost, threads, begin, end;
};

}  // namespace

int failures_of_contention() {
  Contention contention;
  int failures = 0;
  // After a job a call of four threads at a later time has so many.
  const auto check = [&](const Found& job, int later, int expected, const char* what) {
    if (job.lost) contention.found(job.lost, job.threads, at(job.begin), at(job.end));
    const int got = contention.limit(4, at(later));
    if (got == expected) return;
    std::printf("FAIL contention: %s: %d threads, expected %d\n", what, got, expected);
    ++failures;
  };
  const Found none{};
  const int cores = usable_cores();
  check({cores, cores, -40, -38}, -36, 4,
        "all lose their cores, as at the end of a quota");
  check({cores + 1, cores + 1, -40, -38}, -36, std::max(3 - cores, 1), "more than cores");
  check({1, 4, 10, 12}, 16, 3, "one loses its core");
  check({2, 3, 13, 15}, 16, 1, "two of the others do");
  check(none, 17, 4, "after 5 ms");
  check({1, 4, 18, 20}, 29, 3, "again");
  check(none, 30, 4, "after 10 ms");
  check({2, 4, 80, 82}, 86, 2, "not again, but later");
  check(none, 87, 4, "after 5 ms");
  check({1, 4, 500, 600}, 699, 3, "a long job");
  check(none, 700, 4, "after as long as it took");
  check({2, 4, 800, 850}, 851, 4, "half of the threads of a long job");
  check({1, 4, 860, 862}, 863, 4, "a short job beside it");
  return failures;
}

}  // namespace fusedrnn::test
