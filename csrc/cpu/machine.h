// This header has what the kernels read of the machine.
#pragma once

#include "../contract.h"

namespace fusedrnn {

// The sizes are in bytes and of a core's own caches. Only the order of the panels and
// what is prefetched may depend on them, never the order of a sum.
extern const index first_level_cache, second_level_cache;

// Returns how many processors this process may use at the same time: those of its
// affinity mask, which is read again after a second, but no more than its quota.
int usable_cores();
// Sets the quota, in processors. 0: there is none.
void set_quota(int cores);

}  // namespace fusedrnn
