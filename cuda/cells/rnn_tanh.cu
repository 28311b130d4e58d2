#include "../instance.h"

namespace fusedrnn::cuda {
extern const CellEntry rnn_tanh;
const CellEntry rnn_tanh = cell<device::RnnTanh>("rnn_tanh");
}  // namespace fusedrnn::cuda
