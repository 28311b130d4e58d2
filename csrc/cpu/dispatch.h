// From a checked problem to the kernel that runs it: the ISA, the number of threads, the
// floating-point mode of the call.
#pragma once

#include <string>
#include <vector>

#include "layout.h"

namespace fusedrnn {

struct CompiledIsa {
  const Isa* isa;
  bool supported;  // by this machine
};

// Best first.
const std::vector<CompiledIsa>& compiled_isas();

// The ISA that weights are packed for from now on: the best supported one, or the one
// set.
const Isa& active_isa();
// Throws std::invalid_argument for a name not compiled or not supported; the empty name
// stands for the best.
void set_isa(const std::string& name);

// n = 0 follows OpenMP (OMP_NUM_THREADS, omp_set_num_threads).
void set_num_threads(int n);
// Sets the number of threads that n = 0 means above; 0: OpenMP's again.
void follow_threads(int n);
int get_num_threads();

// A MathEntry's function, in the floating-point mode of a call.
template <class S>
void run(void (*function)(const S* x, S* y, index n), const S* x, S* y, index n);

}  // namespace fusedrnn
