#include "dispatch.h"

#include <omp.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "machine.h"
#include "workforce.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace fusedrnn {

// CMakeLists.txt defines which ISAs are compiled.
#ifdef FUSEDRNN_HAS_AVX512
namespace avx512 {
extern const Isa isa;
}
#endif
#ifdef FUSEDRNN_HAS_AVX2
namespace avx2 {
extern const Isa isa;
}
#endif
#ifdef FUSEDRNN_HAS_NEON
namespace neon {
extern const Isa isa;
}
#endif
namespace portable {
extern const Isa isa;
}

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

}  // namespace

const index first_level_cache = cache_size("FUSEDRNN_L1_BYTES", level_one, 32 << 10);
const index second_level_cache = cache_size("FUSEDRNN_L2_BYTES", level_two, 1 << 20);

const std::vector<CompiledIsa>& compiled_isas() {
  static const std::vector<CompiledIsa> isas = {
#ifdef FUSEDRNN_HAS_AVX512
      {&avx512::isa,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")},
#endif
#ifdef FUSEDRNN_HAS_AVX2
      {&avx2::isa, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#ifdef FUSEDRNN_HAS_NEON
      {&neon::isa, true},
#endif
      {&portable::isa, true},
  };
  return isas;
}

namespace {

const Isa* best_isa() {
  for (const auto& [isa, supported] : compiled_isas()) {
    if (supported) return isa;
  }
  return &portable::isa;
}

std::atomic<const Isa*> chosen_isa{nullptr};
std::atomic<int> chosen_threads{0}, followed_threads{0};

}  // namespace

const Isa& active_isa() {
  const Isa* isa = chosen_isa.load(std::memory_order_relaxed);
  if (isa) return *isa;
  chosen_isa.store(best_isa());
  return *chosen_isa.load();
}

void set_isa(const std::string& name) {
  if (name.empty()) return chosen_isa.store(best_isa());
  std::string compiled, unsupported;
  for (const auto& [isa, supported] : compiled_isas()) {
    if (isa->name == name && supported) return chosen_isa.store(isa);
    if (isa->name == name) unsupported = ", which this CPU lacks";
    if (supported) compiled += (compiled.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw std::invalid_argument("must be one of " + compiled + " on this machine, got " +
                              name + unsupported);
}

void set_num_threads(int n) { chosen_threads.store(n); }
void follow_threads(int n) { followed_threads.store(n); }

int get_num_threads() {
  const int chosen = chosen_threads.load(std::memory_order_relaxed);
  if (chosen > 0) return chosen;
  const int followed = followed_threads.load(std::memory_order_relaxed);
  return followed > 0 ? followed : omp_get_max_threads();
}

template <class S>
void run(void (*function)(const S* x, S* y, index n), const S* x, S* y, index n) {
  const FlushDenormals mode;
  function(x, y, n);
}
template void run(void (*)(const float*, float*, index), const float*, float*, index);
template void run(void (*)(const double*, double*, index), const double*, double*, index);

}  // namespace fusedrnn
