#include "../instance.h"

namespace fusedrnn::cuda {

using Cells = Family<device::Lstm>;
extern const CellEntry lstm;
const CellEntry lstm = cell<Cells>("lstm");

}  // namespace fusedrnn::cuda
