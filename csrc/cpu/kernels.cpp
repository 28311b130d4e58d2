// Compiled once per ISA with that ISA's flags and FUSEDRNN_ARCH set to its name. To add a
// cell, write csrc/cells/<cell>.h and add one line to `cells` below.
#include "kernels.h"
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "backward.h"
#include "probe.h"

namespace fusedrnn::FUSEDRNN_ARCH {

namespace {

template <template <class> class CellOf, class S>
constexpr Kernels<S> kernels_of() {
  using L = Layout<CellOf, S>;
  return {
      [](index I, index H, bool backward, bool borrow) {
        const L layout(I, H);
        if (borrow) return backward ? 0 : layout.bias_size();
        return backward ? layout.backward_size() : layout.forward_size();
      },
      [](const Parameters<S>& p, bool backward, bool borrow, S* to, const Team& team) {
        if (!backward) return pack_forward<L>(p, borrow, to, team);
        if (!borrow) pack_backward<L>(p, to, team);
      },
      [](index I, index H) { return L(I, H).saved(); },
      [](const Forward<S>& p, int threads) {
        return ForwardPass<CellOf, S>::workspace(p, threads);
      },
      [](const Forward<S>& p, S* workspace, const Team& team) {
        ForwardPass<CellOf, S>(p, workspace, team).run(team);
      },
      [](const Backward<S>& p, int threads) {
        return BackwardPass<CellOf, S>::workspace(p, threads);
      },
      [](const Backward<S>& p, S* workspace, const Team& team) {
        BackwardPass<CellOf, S>(p, workspace, team).run(team);
      },
  };
}

template <template <class> class CellOf>
constexpr CellEntry cell(std::string_view name) {
  using Cell = CellOf<Vec<float>>;
  return {name, Cell::gates, Cell::has_c, kernels_of<CellOf, float>(),
          kernels_of<CellOf, double>()};
}

template <class S, class F>
void for_each_vector(const S* x, S* y, index n, F f) {
  using V = Vec<S>;
  for (index at = 0; at < n; at += V::lanes) {
    store_upto(f(load_upto<V>(x + at, n - at)), y + at, n - at);
  }
}

constexpr CellEntry cells[] = {
    cell<Lstm>("lstm"),
    cell<Gru>("gru"),
    cell<RnnTanh>("rnn_tanh"),
    cell<RnnRelu>("rnn_relu"),
    cell<RnnIdentity>("rnn_identity"),
};

template <class S>
void sigmoid_of(const S* x, S* y, index n) {
  for_each_vector(x, y, n, [](Vec<S> v) { return sigmoid(v); });
}
template <class S>
void tanh_of(const S* x, S* y, index n) {
  for_each_vector(x, y, n, [](Vec<S> v) { return tanh(v); });
}

constexpr MathEntry math[] = {
    {"sigmoid", sigmoid_of<float>, sigmoid_of<double>},
    {"tanh", tanh_of<float>, tanh_of<double>},
};

}  // namespace

extern const Isa isa;
constinit const Isa isa{FUSEDRNN_STRINGIFY(FUSEDRNN_ARCH),
                        cells,
                        math,
                        {multiply_add<float>, multiply_add<double>, read_all<float>}};

}  // namespace fusedrnn::FUSEDRNN_ARCH
