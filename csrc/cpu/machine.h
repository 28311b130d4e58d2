// What the kernels want to know of the machine.
#pragma once

#include "../contract.h"

namespace fusedrnn {

// Bytes of a core's own, second-level cache. Only the order in which panels are taken and
// what is prefetched may depend on it, never the order of a sum.
extern const index second_level_cache;

}  // namespace fusedrnn
