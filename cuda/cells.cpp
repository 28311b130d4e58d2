// The list of cells. To add one, write csrc/cells/<cell>.h and cuda/cells/<cell>.cu, and
// add it here.
#include "kernels.h"

namespace fusedrnn::cuda {

extern const CellEntry lstm, lstm_coupled, gru, gru_before, rnn_tanh, rnn_relu,
    rnn_identity;

std::span<const CellEntry* const> cells() {
  static const CellEntry* const all[] = {
      &lstm, &lstm_coupled, &gru, &gru_before, &rnn_tanh, &rnn_relu, &rnn_identity};
  return all;
}

}  // namespace fusedrnn::cuda
