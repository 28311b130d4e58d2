#include "../instance.h"

namespace fusedrnn::cuda {

using Cells = Family<device::RnnTanh, device::RnnRelu, device::RnnIdentity>;
extern const CellEntry rnn_tanh;
const CellEntry rnn_tanh = cell<Cells>("rnn_tanh");
extern const CellEntry rnn_relu;
const CellEntry rnn_relu = cell<Cells>("rnn_relu", 1);
extern const CellEntry rnn_identity;
const CellEntry rnn_identity = cell<Cells>("rnn_identity", 2);

}  // namespace fusedrnn::cuda
