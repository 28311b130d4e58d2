#include "../instance.h"

namespace fusedrnn::cuda {
extern const CellEntry gru;
const CellEntry gru = cell<device::Gru>("gru");
}  // namespace fusedrnn::cuda
