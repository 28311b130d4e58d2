// The cells (csrc/cells/) for a GPU's threads, and what their variants are called. To add
// one: its header and its names here, and its name in cuda/CMakeLists.txt.
#pragma once

#define FUSEDRNN_ARCH device

#include <array>
#include <string_view>

#include "../csrc/cells/gru.h"
#include "../csrc/cells/lstm.h"
#include "../csrc/cells/rnn.h"

namespace fusedrnn::cuda {

// The i-th name is that of variant i of a cell; all variants share the cell's kernels.
template <template <class> class CellOf>
inline constexpr std::array<std::string_view, 0> names_of{};
template <>
inline constexpr std::array<std::string_view, 2> names_of<device::Lstm>{"lstm",
                                                                        "lstm_coupled"};
template <>
inline constexpr std::array<std::string_view, 2> names_of<device::Gru>{"gru",
                                                                       "gru_before"};
template <>
inline constexpr std::array<std::string_view, 3> names_of<device::Rnn>{
    "rnn_tanh", "rnn_relu", "rnn_identity"};

}  // namespace fusedrnn::cuda
