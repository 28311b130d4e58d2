#include "rows.h"

#include "launches.h"
#include "tuning.h"

namespace fusedrnn::cuda {

template <class Kernel>
void launch_each(const Kernel& kernel, index count, int ordinal, Stream stream) {
  launch(kernel, shape_of_each(count, ordinal), stream);
}

template <class P>
void launch_columns(const BiasGradients<P>& kernel, Stream stream) {
  launch(kernel,
         {static_cast<int>(ceil_div(kernel.slots * kernel.H, 32)), 1, most_threads,
          most_threads * index{sizeof(typename P::State)}, false, false},
         stream);
}

template <class A>
void launch_sums(const RowSums<A>& kernel, Stream stream) {
  constexpr int used = 256;
  launch(kernel,
         {static_cast<int>(ceil_div(kernel.H, 32)), kernel.count, used,
          used * index{sizeof(A)}, false, false},
         stream);
}
template void launch_sums(const RowSums<float>&, Stream);
template void launch_sums(const RowSums<double>&, Stream);

template void launch_each(const ReadLengths&, index, int, Stream);
template void launch_each(const DrawZoneout&, index, int, Stream);
template void launch_each(const DrawRecurrent<float>&, index, int, Stream);
template void launch_each(const DrawRecurrent<double>&, index, int, Stream);

template <class S>
void drop_out(const Dropout<S>& problem, int ordinal, Stream stream) {
  launch_each(DropOut<S>{problem}, problem.T * problem.B * problem.N, ordinal, stream);
}
template void drop_out(const Dropout<float>&, int, Stream);
template void drop_out(const Dropout<double>&, int, Stream);

void convert(const Conversion& problem, int ordinal, Stream stream) {
  launch_each(Convert{problem}, problem.T * problem.B * problem.N, ordinal, stream);
}

void take_steps(const TakeSteps& problem, int ordinal, Stream stream) {
  launch_each(RunTakeSteps{problem}, problem.B, ordinal, stream);
}
void move_rows(const MoveRows& problem, int ordinal, Stream stream) {
  launch_each(RunMoveRows{problem}, problem.T * problem.B * problem.N, ordinal, stream);
}
void sum_repeated(const SumRepeated& problem, int ordinal, Stream stream) {
  launch_each(RunSumRepeated{problem}, problem.B * problem.N, ordinal, stream);
}

#define FUSEDRNN_ROWS(P)                                               \
  template void launch_each(const PackBias<P>&, index, int, Stream);   \
  template void launch_each(const Previous<P>&, index, int, Stream);   \
  template void launch_each(const GatherRows<P>&, index, int, Stream); \
  template void launch_columns(const BiasGradients<P>&, Stream);
#define FUSEDRNN_OPERANDS(P)                                            \
  template void launch_each(const PackWeights<P>&, index, int, Stream); \
  template void launch_each(const Prepare<P>&, index, int, Stream);
FUSEDRNN_ROWS(Exact<float>)
FUSEDRNN_ROWS(Exact<double>)
FUSEDRNN_ROWS(OnHalf)
FUSEDRNN_OPERANDS(Exact<float>)
FUSEDRNN_OPERANDS(Exact<double>)
FUSEDRNN_OPERANDS(OnTensorFloat32)
FUSEDRNN_OPERANDS(OnHalf)
#undef FUSEDRNN_OPERANDS
#undef FUSEDRNN_ROWS

}  // namespace fusedrnn::cuda
