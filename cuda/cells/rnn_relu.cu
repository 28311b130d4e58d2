#include "../instance.h"

namespace fusedrnn::cuda {
extern const CellEntry rnn_relu;
const CellEntry rnn_relu = cell<device::RnnRelu>("rnn_relu");
}  // namespace fusedrnn::cuda
