// What the kernels want to know of the machine.
#pragma once

#include "../contract.h"

namespace fusedrnn {

// Bytes of a core's own caches. Only the order in which panels are taken and what is
// prefetched may depend on them, never the order of a sum.
extern const index first_level_cache, second_level_cache;

}  // namespace fusedrnn
