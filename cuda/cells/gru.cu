#include "../instance.h"

namespace fusedrnn::cuda {

extern const CellEntry gru, gru_before;
const CellEntry gru = cell<device::Gru>("gru");
const CellEntry gru_before = cell<device::Gru>("gru_before", 1);

}  // namespace fusedrnn::cuda
