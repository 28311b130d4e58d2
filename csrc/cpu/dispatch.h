// This header chooses what a call runs on: the ISA, the number of threads and the
// floating-point mode.
#pragma once

#include <string>
#include <vector>

#include "layout.h"

namespace fusedrnn {

struct CompiledIsa {
  Isa isa;
  bool supported;  // by this machine
};

inline const Kernels& kernels_of(const Isa& isa, index element) {
  return element == 4 ? *isa.base->f32 : *isa.base->f64;
}
// Returns the product for weights of a precision, on elements of some bytes. If the
// system refuses the units of the ISA to this process, it is that of the next best ones.
const Product& product_of(const Isa& isa, index element, Precision precision);

// The compiled ISAs, the best first.
const std::vector<CompiledIsa>& compiled_isas();

// Returns the ISA that weights are packed for from now on: the one set, else the best
// that is supported.
const Isa& active_isa();
// Throws std::invalid_argument for a name that is not compiled or not supported. The
// empty name chooses the best.
void set_isa(const std::string& name);

// Sets the number of threads, also beyond the usable cores. 0 stands for as many as are
// asked for, but not more than OpenMP allows (OMP_THREAD_LIMIT) and cores are usable.
void set_num_threads(int n);
// Sets the number of threads that are asked for, as by PyTorch. 0 follows OpenMP
// (OMP_NUM_THREADS, omp_set_num_threads).
void follow_threads(int n);
int get_threads_asked_for();
int get_num_threads();

// Runs a MathEntry's function in the floating-point mode of a call.
template <class S>
void run(void (*function)(const S* x, S* y, index n), const S* x, S* y, index n);

}  // namespace fusedrnn
