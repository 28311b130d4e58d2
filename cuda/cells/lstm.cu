#include "../instance.h"

namespace fusedrnn::cuda {

extern const CellEntry lstm, lstm_coupled;
const CellEntry lstm = cell<device::Lstm>("lstm");
const CellEntry lstm_coupled = cell<device::Lstm>("lstm_coupled", 1);

}  // namespace fusedrnn::cuda
