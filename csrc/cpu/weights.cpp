#include "weights.h"

#include <cstring>
#include <memory>

#include "../random.h"
#include "workforce.h"

namespace fusedrnn {

std::atomic<index> few_rows{12};

void insert_block(const char* from, index bytes, int blocks, int absent, char* to) {
  const index before = absent * bytes;
  std::memcpy(to, from, before);
  std::memset(to + before, 0, bytes);
  std::memcpy(to + before + bytes, from + before, (blocks - 1) * bytes - before);
}

void remove_block(const char* from, index bytes, int blocks, int absent, char* to) {
  const index before = absent * bytes;
  std::memmove(to, from, before);
  std::memmove(to + before, from + before + bytes, (blocks - 1) * bytes - before);
}

void drop_weights(const Weights& weights, const DroppedWeights& dropped, index item,
                  const char* from, char* to) {
  constexpr index values_per_thread = 1 << 15;
  const Layout& l = weights.layout();
  const index rows = weights.blocks() * l.H, row = l.R * item;
  const auto draw = static_cast<std::uint32_t>(Draw::weights);
  const Dropout<char> problem{1, rows, l.R,       from,         0,    row,          to,
                              0, row,  dropped.p, dropped.seed, draw, dropped.where};
  with_team(threads_for(rows * l.R, values_per_thread), Length::brief, 0,
            [&](const Team& team) { drop_rows(l, problem, item, team.share(rows)); });
}

Weights::Weights(const Kernels& kernels, const Product& product, const CellKernels& cell,
                 const Parameters<char>& parameters, const Vectors<const char>& vectors)
    : layout_(kernels, product, parameters.input_operands, cell, parameters.model,
              parameters.halves),
      user_parameters_(parameters),
      user_vectors_(vectors),
      parameters_(parameters),
      vectors_(vectors) {
  widen();
  if (has_absent() && user_parameters_.weight_ih) expand();
}

Weights::Weights(const Weights& whole, const DroppedWeights& dropped)
    : layout_(whole.layout_),
      user_parameters_(whole.user_parameters_),
      user_vectors_(whole.user_vectors_),
      parameters_(user_parameters_),
      vectors_(user_vectors_) {
  const index item = weight_bytes();
  dropped_ = Memory(static_cast<std::size_t>(blocks() * layout_.H * layout_.R * item));
  drop_weights(*this, dropped, item, user_parameters_.weight_hh, dropped_.as<char>());
  parameters_.weight_hh = dropped_.as<char>();
  widen();
  if (has_absent()) expand();
}

Weights::~Weights() {
  for (Slot* slot : {&bias_, &forward_, &backward_}) delete slot->load();
}

// Converts the parameters that are vectors from bfloat16.
void Weights::widen() {
  const Layout& l = layout_;
  if (!l.halves || parameters_.item == l.size) return;
  const index peepholes = (l.shape.peephole_count - has_absent()) * l.H;
  const index rows = blocks() * l.H;
  widened_ = Memory(static_cast<std::size_t>(l.bytes(peepholes + 4 * rows + 2 * l.H)));
  char* to = widened_.as<char>();
  const auto put = [&](const char*& from, index values) {
    if (!from) return;
    l.halves->widen(from, values, to);
    from = to;
    to += l.bytes(values);
  };
  put(parameters_.bias_ih, rows);
  put(parameters_.bias_hh, rows);
  put(vectors_.weight_ch, peepholes);
  put(vectors_.gamma_ih, rows);
  put(vectors_.gamma_hh, rows);
  put(vectors_.gamma_c, l.H);
  put(vectors_.beta_c, l.H);
}

// Copies parameters into arrays with zeros for the absent gate.
void Weights::expand() {
  const int gates = layout_.shape.gates, absent = layout_.shape.differs.absent;
  const int peepholes = layout_.shape.peephole_count;
  const int of_peephole = peepholes > 0 ? peephole_of(layout_.shape, absent) : 0;
  const index row = layout_.bytes(layout_.H), of_weights = layout_.H * weight_bytes();
  const index weights = gates * of_weights * (layout_.I + layout_.R);
  const index vectors = (6 * gates + peepholes) * row;
  expanded_ = Memory(static_cast<std::size_t>(vectors + weights));
  char* to = expanded_.as<char>();
  const auto put = [&]<class P>(const P*& from, index bytes, int blocks, int block) {
    if (!from) return;
    insert_block(reinterpret_cast<const char*>(from), bytes, blocks, block, to);
    from = reinterpret_cast<const P*>(to);
    to += blocks * bytes;
  };
  put(parameters_.bias_ih, row, gates, absent);
  put(parameters_.bias_hh, row, gates, absent);
  put(parameters_.scale_ih, row, gates, absent);
  put(parameters_.scale_hh, row, gates, absent);
  put(vectors_.gamma_ih, row, gates, absent);
  put(vectors_.gamma_hh, row, gates, absent);
  put(vectors_.weight_ch, row, peepholes, of_peephole);
  put(parameters_.weight_ih, layout_.I * of_weights, gates, absent);
  put(parameters_.weight_hh, layout_.R * of_weights, gates, absent);
}

const char* Weights::find(Slot& slot, Packing packing) const {
  if (const Memory* found = slot.load(std::memory_order_acquire)) {
    return found->as<const char>();
  }
  constexpr index values_per_thread = 1 << 18;
  const index bytes = fusedrnn::packed_bytes(layout_, packing);
  auto packed = std::make_unique<const Memory>(static_cast<std::size_t>(bytes));
  with_team(threads_for(bytes / layout_.size, values_per_thread), Length::usual, 0,
            [&](const Team& team) {
              pack(layout_, parameters_, packing, packed->as<char>(), team);
            });
  const Memory* found = nullptr;
  if (slot.compare_exchange_strong(found, packed.get())) found = packed.release();
  return found->as<const char>();  // of this thread, or of another that was first
}

// Counts the rows of one more call, and returns whether to multiply them without a
// packing. More rows at once than most_unpacked_rows would be packed in each step, and so
// would all in halves.
static bool skips_packing(std::atomic<index>& rows_before, index steps, index rows,
                          index few, bool halves) {
  const index before = rows_before.fetch_add(rows);
  if (halves) return before == 0 && steps == 1 && few > 0;
  if (steps > 1 && rows > steps * most_unpacked_rows) return false;
  return before + rows <= few || (before == 0 && steps == 1 && few > 0);
}

Weights::Packed Weights::forward(index steps, index rows, bool has_options) const {
  if (!forward_.load(std::memory_order_acquire) && !has_options && may_skip_packing()) {
    if (skips_packing(rows_forward_, steps, rows, few_rows, layout_.halves)) {
      return {bias(), true};
    }
  }
  return {find(forward_, Packing::forward), false};
}

const char* Weights::backward(index steps, index rows, bool has_options) const {
  if (!backward_.load(std::memory_order_acquire) && !has_options && may_skip_packing()) {
    const bool halves = layout_.halves != nullptr;
    if (skips_packing(rows_backward_, steps, rows, 3 * few_rows, halves)) return nullptr;
  }
  return find(backward_, Packing::backward);
}

}  // namespace fusedrnn
