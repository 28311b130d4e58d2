// This header has the floating-point modes of a thread.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define FUSEDRNN_X86 1
#include <immintrin.h>
#endif

namespace fusedrnn {

// A FloatMode sets the mode of this thread, and restores the one before.
class FloatMode {
 public:
#ifdef FUSEDRNN_X86
  using Bits = unsigned;
  static Bits now() { return _mm_getcsr(); }
  static constexpr Bits flush_denormals = 0x8040;
#elif defined(__aarch64__)
  using Bits = unsigned long long;
  static Bits now() {
    Bits bits;
    asm volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  static constexpr Bits flush_denormals = 1ull << 24;
#else
  using Bits = unsigned;
  static Bits now() { return 0; }
  static constexpr Bits flush_denormals = 0;
#endif

  explicit FloatMode(Bits bits) : before_(now()) { set(bits); }
  ~FloatMode() { set(before_); }
  FloatMode(const FloatMode&) = delete;

 private:
  static void set([[maybe_unused]] Bits bits) {
#ifdef FUSEDRNN_X86
    _mm_setcsr(bits);
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" ::"r"(bits));
#endif
  }

  const Bits before_;
};

// FlushDenormals makes a call treat denormal numbers as zero. A state that decays towards
// zero passes through denormals, which cost some hundred cycles each on many machines.
class FlushDenormals : FloatMode {
 public:
  FlushDenormals() : FloatMode(now() | flush_denormals) {}
};

}  // namespace fusedrnn
