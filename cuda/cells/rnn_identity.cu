#include "../instance.h"

namespace fusedrnn::cuda {
extern const CellEntry rnn_identity;
const CellEntry rnn_identity = cell<device::RnnIdentity>("rnn_identity");
}  // namespace fusedrnn::cuda
