// This header has how a long call runs without Python's lock.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

#include "../cpu/watch.h"

namespace fusedrnn {

// Unlocked lets other threads of Python run while it lives. If Python ends meanwhile, the
// thread sleeps until the process ends: Python before 3.14 would end it by unwinding its
// stack, through destructors that must not throw and that need Python.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  ~Unlocked() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }

 private:
  PyThreadState* const state_;
};

// Runs the handlers of the signals that came meanwhile, if this is Python's main thread.
// Returns whether one raised an exception, which is then that of the thread.
bool handle_signals();

// Runs f without the GIL. If a signal's handler raises an exception, as that of Ctrl-C
// does, f ends between two steps and the exception is thrown.
template <class F>
void without_gil(const F& f) {
  // A call within a call, by a handler, leaves the outer one as it is.
  struct Asking {
    const Question before = asks_to_end;
    Asking() { asks_to_end = handle_signals; }
    ~Asking() { asks_to_end = before; }
  };
  bool is_interrupted = false;
  {
    const Unlocked unlocked;
    const Asking asking;
    try {
      f();
    } catch (const Interrupted&) {
      is_interrupted = true;
    }
  }
  if (is_interrupted) throw pybind11::error_already_set();
}

}  // namespace fusedrnn
