#include "../instance.h"

namespace fusedrnn::cuda {

using Cells = Family<device::Gru>;
extern const CellEntry gru;
const CellEntry gru = cell<Cells>("gru");

}  // namespace fusedrnn::cuda
