#include "../instance.h"

namespace fusedrnn::cuda {

extern const CellEntry rnn_tanh, rnn_relu, rnn_identity;
const CellEntry rnn_tanh = cell<device::Rnn>("rnn_tanh");
const CellEntry rnn_relu = cell<device::Rnn>("rnn_relu", 1);
const CellEntry rnn_identity = cell<device::Rnn>("rnn_identity", 2);

}  // namespace fusedrnn::cuda
