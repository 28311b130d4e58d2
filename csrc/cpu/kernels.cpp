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
      [](const Model& m, bool backward, bool borrow) {
        const L layout(m);
        if (borrow) return backward ? 0 : layout.bias_size();
        const index projection = m.projects ? Dense<S>(0, m.R).back_size(m.H) : 0;
        return backward ? layout.backward_size() + projection
                        : layout.forward_size() + Second<L>(m).forward_size();
      },
      [](const Parameters<S>& p, bool backward, bool borrow, S* to, const Team& team) {
        if (!backward) return pack_forward<L>(p, borrow, to, team);
        if (!borrow) pack_backward<L>(p, to, team);
      },
      [](const Model& m, const Options& o) {
        return saves_slots<typename L::Cell>(o) ? record_stride<L>(m) : 0;
      },
      [](const Model& m, const Options& o) -> index {
        const Record<typename L::Cell> record{m.norm, L(m).P};
        return saves_slots<typename L::Cell>(o) ? record.values() : 0;
      },
      [](const Forward<S>& p, int threads) {
        return ForwardPass<CellOf, S>::plan(p, threads);
      },
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
constexpr CellEntry cell(std::string_view name, int variant = 0) {
  using Cell = CellOf<Vec<float>>;
  return {name,
          Cell::gates,
          Cell::has_c,
          Cell::peepholes,
          variant,
          kernels_of<CellOf, float>(),
          kernels_of<CellOf, double>()};
}

template <class S, class F>
void on_each_vector(const S* x, S* y, index n, F f) {
  using V = Vec<S>;
  for (index at = 0; at < n; at += V::lanes) {
    store_upto(f(load_upto<V>(x + at, n - at)), y + at, n - at);
  }
}

constexpr CellEntry cells[] = {
    cell<Lstm>("lstm"),           cell<Lstm>("lstm_coupled", 1), cell<Gru>("gru"),
    cell<Gru>("gru_before", 1),   cell<Rnn>("rnn_tanh"),         cell<Rnn>("rnn_relu", 1),
    cell<Rnn>("rnn_identity", 2),
};

template <class S>
void sigmoid_of(const S* x, S* y, index n) {
  on_each_vector(x, y, n, [](Vec<S> v) { return sigmoid(v); });
}
template <class S>
void tanh_of(const S* x, S* y, index n) {
  on_each_vector(x, y, n, [](Vec<S> v) { return tanh(v); });
}

constexpr MathEntry math[] = {
    {"sigmoid", sigmoid_of<float>, sigmoid_of<double>},
    {"tanh", tanh_of<float>, tanh_of<double>},
};

}  // namespace

extern const Isa isa;
constinit const Isa isa{FUSEDRNN_STRINGIFY(FUSEDRNN_ARCH),
                        cells,
                        {drop_out<float>, drop_out<double>},
                        math,
                        {multiply_add<float>, multiply_add<double>, read_all<float>}};

}  // namespace fusedrnn::FUSEDRNN_ARCH
