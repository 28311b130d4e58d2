#include "dispatch.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "machine.h"
#include "workforce.h"

#if defined(FUSEDRNN_HAS_AVX2) || defined(FUSEDRNN_HAS_AVX512)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(FUSEDRNN_HAS_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fusedrnn {

// CMakeLists.txt defines which ISAs, and which sets of units for narrow weights, are
// compiled.
namespace portable {
extern const Base base;
}
namespace narrow_portable {
extern const Narrow narrow;
}
#ifdef FUSEDRNN_HAS_AVX2
namespace avx2 {
extern const Base base;
}
namespace narrow_avx2 {
extern const Narrow narrow;
}
namespace narrow_avx2_vnni {
extern const Narrow narrow;
}
#endif
#ifdef FUSEDRNN_HAS_AVX512
namespace avx512 {
extern const Base base;
}
namespace narrow_avx512 {
extern const Narrow narrow;
}
namespace narrow_avx512_vnni {
extern const Narrow narrow;
}
namespace narrow_avx512_bf16 {
extern const Narrow narrow;
}
namespace narrow_avx512_amx {
extern const Narrow narrow;
}
#endif
#ifdef FUSEDRNN_HAS_NEON
namespace neon {
extern const Base base;
}
namespace narrow_neon {
extern const Narrow narrow;
}
namespace narrow_neon_dotprod {
extern const Narrow narrow;
}
namespace narrow_neon_i8mm {
extern const Narrow narrow;
}
namespace narrow_neon_bf16 {
extern const Narrow narrow;
}
#endif

namespace {

#ifdef FUSEDRNN_HAS_AVX2
// Older compilers do not know this feature by name.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

#ifdef FUSEDRNN_HAS_NEON
#ifdef __linux__
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }
bool has_bf16() { return getauxval(AT_HWCAP2) >> 14 & 1; }
#else
// Elsewhere the compiler's target says what every machine has.
constexpr bool has_dotprod() {
#ifdef __ARM_FEATURE_DOTPROD
  return true;
#else
  return false;
#endif
}
constexpr bool has_i8mm() {
#ifdef __ARM_FEATURE_MATMUL_INT8
  return true;
#else
  return false;
#endif
}
constexpr bool has_bf16() {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  return true;
#else
  return false;
#endif
}
#endif
#endif

#ifdef FUSEDRNN_HAS_AVX512
#ifdef FUSEDRNN_EMULATES_AMX
bool has_amx() { return true; }
bool may_use_amx() { return true; }
#else
// Returns whether the processor has tiles, for bytes and bfloat16, and the system saves
// them.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned units = 1u << 22 | 1u << 24 | 1u << 25, saved_tiles = 3u << 17;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & units) != units) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & saved_tiles) == saved_tiles;
}

// Asks the system for tiles, which a process must before it first uses them.
bool may_use_amx() {
#ifdef __linux__
  constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool permitted = syscall(SYS_arch_prctl, request, tile_data) == 0;
  return permitted;
#else
  return false;
#endif
}
#endif
#endif

}  // namespace

#if defined(FUSEDRNN_HAS_AVX2) || defined(FUSEDRNN_HAS_AVX512)
#define HAS(feature) (__builtin_cpu_supports(feature) != 0)
#endif

static std::vector<CompiledIsa> make_isas() {
  std::vector<CompiledIsa> isas;  // the best last
  // A set of units has the products of the set before it that it does not replace.
  const auto add = [&](const char* name, const Base& base, const Narrow& narrow,
                       bool supported, bool extends) {
    Isa isa{name, &base, narrow};
    for (int n = 0; n < precisions && extends; ++n) {
      if (!isa.narrow.of[n]) isa.narrow.of[n] = isas.back().isa.narrow.of[n];
    }
    isas.push_back({isa, supported && (!extends || isas.back().supported)});
  };
  add("portable", portable::base, narrow_portable::narrow, true, false);
#ifdef FUSEDRNN_HAS_NEON
  add("neon", neon::base, narrow_neon::narrow, true, false);
  add("neon_dotprod", neon::base, narrow_neon_dotprod::narrow, has_dotprod(), true);
  add("neon_i8mm", neon::base, narrow_neon_i8mm::narrow, has_i8mm(), true);
  add("neon_bf16", neon::base, narrow_neon_bf16::narrow, has_bf16(), true);
#endif
#ifdef FUSEDRNN_HAS_AVX2
  add("avx2", avx2::base, narrow_avx2::narrow, HAS("avx2") && HAS("fma") && HAS("f16c"),
      false);
  add("avx2_vnni", avx2::base, narrow_avx2_vnni::narrow, has_avx_vnni(), true);
#endif
#ifdef FUSEDRNN_HAS_AVX512
  add("avx512", avx512::base, narrow_avx512::narrow,
      HAS("avx512f") && HAS("avx512dq") && HAS("avx512vl") && HAS("avx512bw") &&
          HAS("fma"),
      false);
  add("avx512_vnni", avx512::base, narrow_avx512_vnni::narrow, HAS("avx512vnni"), true);
  add("avx512_bf16", avx512::base, narrow_avx512_bf16::narrow, HAS("avx512bf16"), true);
  add("avx512_amx", avx512::base, narrow_avx512_amx::narrow, has_amx(), true);
#endif
  std::reverse(isas.begin(), isas.end());
  return isas;
}

// Returns whether the system lets this process use the units of an ISA, and asks it once.
static bool may_use_units([[maybe_unused]] const Isa& isa) {
#ifdef FUSEDRNN_HAS_AVX512
  if (isa.name == "avx512_amx") return may_use_amx();
#endif
  return true;
}

const Product& product_of(const Isa& isa, index element, Precision precision) {
  const int n = static_cast<int>(precision);
  const Isa* found = &isa;
  // The units of the next ISA in the list are the next best ones.
  for (const CompiledIsa& other : compiled_isas()) {
    if (n == 0 || may_use_units(*found)) break;
    if (other.isa.base == isa.base && other.isa.name != isa.name) found = &other.isa;
  }
  return n ? *found->narrow.of[n] : kernels_of(isa, element).product;
}

const std::vector<CompiledIsa>& compiled_isas() {
  // They are never destroyed, because threads may compute until the process ends.
  static const auto& isas = *new std::vector<CompiledIsa>(make_isas());
  return isas;
}

namespace {

const Isa* best_isa() {
  for (const auto& [isa, supported] : compiled_isas()) {
    if (supported) return &isa;
  }
  return &compiled_isas().back().isa;
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
    if (isa.name == name && supported) {
      if (may_use_units(isa)) return chosen_isa.store(&isa);
      throw std::invalid_argument("must be another than " + name +
                                  ", whose tiles the system refused to this process");
    }
    if (isa.name == name) unsupported = ", which this CPU lacks";
    if (supported) compiled += (compiled.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("must be one of " + compiled + " on this machine, got " +
                              name + unsupported);
}

void set_num_threads(int n) { chosen_threads.store(n); }
void follow_threads(int n) { followed_threads.store(n); }

int get_threads_asked_for() {
  const int followed = followed_threads.load(std::memory_order_relaxed);
  return followed > 0 ? followed : omp_get_max_threads();
}

int get_num_threads() {
  const int chosen = chosen_threads.load(std::memory_order_relaxed);
  if (chosen > 0) return chosen;
  return std::min({get_threads_asked_for(), omp_get_thread_limit(), usable_cores()});
}

template <class S>
void run(void (*function)(const S* x, S* y, index n), const S* x, S* y, index n) {
  const FlushDenormals mode;
  function(x, y, n);
}
template void run(void (*)(const float*, float*, index), const float*, float*, index);
template void run(void (*)(const double*, double*, index), const double*, double*, index);

}  // namespace fusedrnn
