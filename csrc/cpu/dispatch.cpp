#include "dispatch.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <numeric>
#include <stdexcept>

#include "machine.h"
#include "memory.h"

#if defined(__x86_64__) || defined(_M_X64)
#define FUSEDRNN_X86 1
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace fusedrnn {

// CMakeLists.txt defines which are compiled.
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

// The size of a cache: what an environment variable says, for tests, so that small shapes
// reach each order of tiles; else what the system does, or `otherwise`.
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

namespace {

// State that decays towards zero passes through denormals, which cost some hundred cycles
// each on many machines: the call takes them as zero and leaves the caller's mode alone.
class FlushDenormals {
#ifdef FUSEDRNN_X86
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | (1ull << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  unsigned long long before_;
#endif
};

// A thread is worth waking for this much work in all, and worth meeting once per step for
// this much in each step (floating-point operations per thread).
constexpr double work_per_thread = 2.5e5;
constexpr double step_work_per_thread = 3e4;
// Less than this is done in 0.1 to 0.2 ms by one thread; a sleeping one is there after
// some 50 µs.
constexpr double brief_work = 2e7;

struct Workforce {
  int threads;
  bool brief;
};

Workforce workforce(const Sizes& p, const Masks& masks, int gates, double passes) {
  const index rows = masks.lengths
                         ? std::accumulate(masks.lengths, masks.lengths + p.B, index{0})
                         : p.T * p.B;
  const double per_step = 2.0 * gates * static_cast<double>(p.H * rows) / p.T;
  const double step = per_step * static_cast<double>(p.R);
  const double input = per_step * static_cast<double>(p.I);
  const double all = passes * static_cast<double>(p.T) * (step + input);
  const double most = std::min(all / work_per_thread,
                               (step + (p.T == 1 ? input : 0)) / step_work_per_thread);
  const int limit = get_num_threads();
  return {most >= limit ? limit
          : most > 1    ? static_cast<int>(most)
                        : 1,
          all < brief_work};
}

template <class F>
void with_team(const Workforce& force, index steps, const F& f) {
  thread_local index step = 0;
  const index first_step = step;
  run_on_team(force.threads, force.brief, [&](Team team) {
    const FlushDenormals mode;
    team.step = first_step;
    f(team);
  });
  step += steps;
}

}  // namespace

void pack(const Layout& layout, const Parameters<char>& parameters, bool backward,
          bool borrow, char* to) {
  constexpr index values_per_thread = 1 << 18;
  const index values = packed_bytes(layout, backward, borrow) / layout.size;
  const index most = std::max<index>(values / values_per_thread, 1);
  const int threads = static_cast<int>(std::min<index>(most, get_num_threads()));
  with_team({threads, false}, 0, [&](const Team& team) {
    pack(layout, parameters, backward, borrow, to, team);
  });
}

ForwardPlan plan(const Layout& layout, const Forward& p) {
  return plan(layout, p, workforce(p, p.masks, layout.shape.gates, 1).threads);
}

void run(const Layout& layout, const Forward& p) {
  const Workforce force = workforce(p, p.masks, layout.shape.gates, 1);
  const index bytes = forward_workspace(layout, p, force.threads);
  const Workspace scratch(static_cast<std::size_t>(bytes));
  with_team(force, p.T,
            [&](const Team& team) { forward(layout, p, scratch.start(), team); });
}

void run(const Layout& layout, const Backward& p) {
  const Workforce force = workforce(p, p.masks, layout.shape.gates, 2);
  const index bytes = backward_workspace(layout, p, force.threads);
  const Workspace scratch(static_cast<std::size_t>(bytes));
  with_team(force, p.T,
            [&](const Team& team) { backward(layout, p, scratch.start(), team); });
}

void run(const Dropout<char>& p, index element) {
  constexpr index values_per_thread = 1 << 15;
  const index most = p.T * p.B * p.N / values_per_thread + 1;
  const int threads = static_cast<int>(std::min<index>(most, get_num_threads()));
  const Isa& isa = active_isa();
  const Kernels& kernels = element == sizeof(float) ? *isa.f32 : *isa.f64;
  with_team({threads, true}, 0,
            [&](const Team& team) { kernels.drop_out(p, team.share(p.T * p.B)); });
}

template <class S>
void run(void (*function)(const S* x, S* y, index n), const S* x, S* y, index n) {
  const FlushDenormals mode;
  function(x, y, n);
}
template void run(void (*)(const float*, float*, index), const float*, float*, index);
template void run(void (*)(const double*, double*, index), const double*, double*, index);

}  // namespace fusedrnn
