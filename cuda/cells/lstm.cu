#include "../instance.h"

namespace fusedrnn::cuda {
extern const CellEntry lstm;
const CellEntry lstm = cell<device::Lstm>("lstm");
}  // namespace fusedrnn::cuda
