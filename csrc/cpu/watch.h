// This header lets a caller end a call before its end, between two steps.
#pragma once

#include <atomic>
#include <chrono>

#include "../contract.h"
#include "float_mode.h"

namespace fusedrnn {

// A thread throws Interrupted to leave a call that its caller ends.
struct Interrupted {};

// Calls of this thread ask here whether they should end; null: they never do. The
// function may do anything, also call the kernels.
using Question = bool (*)();
extern constinit thread_local Question asks_to_end;

// The Watch of a call asks its caller ten times a second. If the call is to end, each of
// its threads throws Interrupted, after a step or where it waits for another thread.
class Watch {
 public:
  // The calling thread reads the clock once in `steps` steps.
  explicit Watch(index steps) : steps_(steps) {}

  bool has_ended() const { return ended_.load(std::memory_order_relaxed); }
  void throw_if_ended() const {
    if (has_ended()) throw Interrupted();
  }
  // Asks if it is time, on the calling thread.
  void ask() {
    const auto now = Clock::now();
    if (now < next_) return;
    const FloatMode mode(caller_mode_);
    if (asks_to_end()) ended_.store(true, std::memory_order_relaxed);
    next_ = Clock::now() + period;
  }
  // Each thread calls this after each step.
  void end_step(bool is_caller) {
    if (is_caller && --steps_left_ <= 0) {
      steps_left_ = steps_;
      ask();
    }
    throw_if_ended();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds period{100};

  const FloatMode::Bits caller_mode_ = FloatMode::now();
  const index steps_;
  index steps_left_ = 0;
  Clock::time_point next_ = Clock::now() + period;
  alignas(64) std::atomic<bool> ended_{false};
};

}  // namespace fusedrnn
