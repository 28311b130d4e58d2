// This header launches a kernel on a GPU or as fibers.
#pragma once

#ifdef __CUDACC__
#include "launch.h"
#else
#include "emulator/launch.h"
#endif
