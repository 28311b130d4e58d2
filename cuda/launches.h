// The launch of a kernel, on a GPU or as fibers.
#pragma once

#ifdef __CUDACC__
#include "launch.h"
#else
#include "launch_twin.h"
#endif
