#include "machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace fusedrnn {

namespace {

// Returns the size of a cache: from an environment variable, which tests set so that
// small shapes reach each order of tiles, else from the system, else `otherwise`.
index cache_size(const char* variable, int name, index otherwise) {
  if (const char* bytes = std::getenv(variable)) {
    if (const index size = std::atoll(bytes); size > 0) return size;
  }
  const index found = name < 0 ? 0 : sysconf(name);
  return found > 0 ? found : otherwise;
}

#ifdef _SC_LEVEL2_CACHE_SIZE
constexpr int level_one = _SC_LEVEL1_DCACHE_SIZE, level_two = _SC_LEVEL2_CACHE_SIZE;
#else
constexpr int level_one = -1, level_two = -1;
#endif

int allowed_processors() {
#if defined(__linux__)
  // More than 1024 processors do not fit into this set, and the system says so.
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return static_cast<int>(std::max(std::thread::hardware_concurrency(), 1u));
}

std::atomic<int> processors{0}, quota{0};
std::atomic<std::int64_t> read_again{0};

}  // namespace

const index first_level_cache = cache_size("FUSEDRNN_L1_BYTES", level_one, 32 << 10);
const index second_level_cache = cache_size("FUSEDRNN_L2_BYTES", level_two, 1 << 20);

int usable_cores() {
  using namespace std::chrono;
  const std::int64_t now = steady_clock::now().time_since_epoch().count();
  if (now >= read_again.load(std::memory_order_relaxed)) {
    processors.store(allowed_processors(), std::memory_order_relaxed);
    read_again.store(now + steady_clock::duration(seconds(1)).count(),
                     std::memory_order_relaxed);
  }
  const int here = processors.load(std::memory_order_relaxed);
  const int most = quota.load(std::memory_order_relaxed);
  return most > 0 ? std::min(here, most) : here;
}

void set_quota(int cores) { quota.store(cores); }

}  // namespace fusedrnn
