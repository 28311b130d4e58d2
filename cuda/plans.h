// This header shows the plans of recurrences to Python, for tests and benchmarks.
#pragma once

#include <pybind11/pybind11.h>

#include "tuning.h"

namespace fusedrnn::cuda {

pybind11::dict to_dict(const Candidate& candidate);
// Adds the functions of plans to the module.
void define_plans(pybind11::module_& m);

}  // namespace fusedrnn::cuda
