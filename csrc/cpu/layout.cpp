#include "layout.h"

#include <algorithm>
#include <cstring>

namespace fusedrnn {

namespace {

Term term_of(const Layout& layout, int role, const char* panels, int width, index depth) {
  const Product& product = layout.product;
  Term term{};
  term.role = role;
  term.panels = panels;
  term.panel_bytes = product.panel_bytes(width, depth);
  const int grain = product.grain;
  term.k_bytes =
      (product.panel_bytes(width, 2 * grain) - product.panel_bytes(width, grain)) / grain;
  term.K = term.depth = depth;
  term.left_bytes = product.put_left ? product.operand_bytes : layout.size;
  return term;
}

}  // namespace

Block Layout::forward_block(const char* weights, const Matrix* unpacked, bool with_x,
                            bool with_h) const {
  Block b{};
  b.product = &product;
  for (int n = 0; n < input_operands && with_x; ++n) {
    Term& term = b.terms[b.count++];
    term = term_of(*this, role::x, weights + input_panels(), width, I);
    term.column = shape.first_input() * unit_vectors;
    if (unpacked) term.matrix = unpacked;
  }
  if (with_h) {
    Term& term = b.terms[b.count++];
    term = term_of(*this, role::h_dropped, weights + recurrent_panels(), width, R);
    if (unpacked) term.matrix = unpacked + 1;
  }
  for (Term& term : b.terms) {
    if (unpacked) term.panels = nullptr;
  }
  const index depth = (with_x ? I : 0) + (with_h ? R : 0);
  b.panel_product = &find(width, sums);
  b.width = width;
  b.unit_vectors = unit_vectors;
  b.size = H;
  b.padded = P;
  b.row_bytes = bytes(depth);
  b.panel_bytes = panel_bytes(depth);
  if (!model.norm) {
    b.start = weights;
    b.start_slot = P;
  }
  return b;
}

Block Layout::second_block(const char* weights) const {
  Block b = dense_block(role::operand, weights + second_panels(), H, of_second.H);
  b.panel_bytes = second_panel_bytes();
  return b;
}

Block Layout::backward_block(const char* panels, const Matrix* unpacked, index N,
                             int first_slot) const {
  constexpr index large_panel = 160 * 1024;
  Block b = dense_block(role::da_after, panels, back_depth(), N);
  b.terms[0].from = first_slot * P;
  b.terms[0].matrix = unpacked;
  b.transposed = true;
  b.narrow_product = &find(1, 1);
  b.panel_bytes = panels ? back_panel_bytes() : 0;
  if (b.panel_bytes > large_panel) b.pieces = shape.gates;
  return b;
}

Block Layout::dense_backward_block(const char* panels, index depth, index K) const {
  Block b = dense_block(role::da_after, panels, depth, H);
  b.terms[0].K = K;
  b.transposed = true;
  b.narrow_product = &find(1, 1);
  b.row_bytes = b.terms[0].left_bytes * K;
  b.panel_bytes = product.panel_bytes(2, K);
  return b;
}

Block Layout::dense_block(int role, const char* panels, index depth, index N) const {
  Block b{};
  b.product = &product;
  b.terms[b.count++] = term_of(*this, role, panels, 2, depth);
  b.panel_product = &find(2, 2);
  b.width = b.unit_vectors = 2;
  b.size = N;
  b.padded = round_up(N, lanes);
  b.row_bytes = halves ? b.terms[0].left_bytes * depth : bytes(depth);
  return b;
}

void save_record(const Layout& l, const char* record, Range units, char* saved) {
  const Record &from = l.record, &to = l.saved;
  const index of_c = l.bytes(to.has_c * to.P), wide = l.saved_halves();
  std::memcpy(saved + of_c, record + l.bytes(from.scale()), wide - of_c);
  if (from.P == to.P && units.end - units.begin == to.P) {
    return l.halves->narrow(record, to.cell(), saved + wide);
  }
  for (index part = 0; part * to.P < to.cell(); ++part) {
    l.halves->narrow(record + l.bytes(part * from.P + units.begin),
                     units.end - units.begin,
                     saved + wide + (part * to.P + units.begin) * l.item);
  }
}

void load_record(const Layout& l, const char* saved, Range units, char* record) {
  const Record &from = l.saved, &to = l.record;
  const index first = l.bytes(units.begin), count = l.bytes(units.end) - first;
  const index of_c = l.bytes(from.has_c * from.P), wide = l.saved_halves();
  if (to.has_c) std::memcpy(record + l.bytes(to.cell()) + first, saved + first, count);
  std::memcpy(record + l.bytes(to.scale()), saved + of_c, wide - of_c);
  if (from.P == to.P && units.end - units.begin == to.P) {
    return l.halves->widen(saved + wide, to.cell(), record);
  }
  for (index part = 0; part * from.P < from.cell(); ++part) {
    l.halves->widen(saved + wide + (part * from.P + units.begin) * l.item,
                    units.end - units.begin, record + l.bytes(part * to.P + units.begin));
  }
}

void drop_rows(const Layout& l, const Dropout<char>& of, index item, Range rows) {
  if (item == l.size) return l.k.drop_out(of, rows, 0);
  // Rows are widened in parts, because a thread of a team must not allocate.
  constexpr index at_once = 512;
  alignas(64) char values[4 * at_once];
  Dropout<char> part = of;
  part.from = part.to = values;
  part.from_t = part.from_b = part.to_t = part.to_b = 0;
  for (index n = rows.begin; n < rows.end; ++n) {
    const index i = n / of.B, j = n % of.B;
    const char* const from = of.from + i * of.from_t + j * of.from_b;
    char* const to = of.to + i * of.to_t + j * of.to_b;
    for (index first = 0; first < of.N; first += at_once) {
      part.N = std::min(of.N - first, at_once);
      l.halves->widen(from + first * item, part.N, values);
      l.k.drop_out(part, {n, n + 1}, first);
      l.halves->narrow(values, part.N, to + first * item);
    }
  }
}

index padded_vectors_bytes(const Layout& l, const Vectors<const char>& v) {
  if (!v.weight_ch && !v.gamma_ih) return 0;
  return (l.shape.peephole_count + 2 * l.shape.gates + 2) * l.padded_bytes();
}

Vectors<const char> pad_vectors(const Layout& l, const Vectors<const char>& v, char* to) {
  const index of_row = l.bytes(l.H), row = l.padded_bytes();
  const auto pad = [&](const char* from, int blocks) -> const char* {
    if (!from) return nullptr;
    char* const start = to;
    for (int block = 0; block < blocks; ++block, to += row) {
      std::memcpy(to, from + block * of_row, of_row);
      std::memset(to + of_row, 0, row - of_row);
    }
    return start;
  };
  return {pad(v.weight_ch, l.shape.peephole_count), pad(v.gamma_ih, l.shape.gates),
          pad(v.gamma_hh, l.shape.gates), pad(v.gamma_c, 1), pad(v.beta_c, 1)};
}

Call call_of(const Layout& layout, const ForwardOf<char>& p, const char* bias,
             const char* bounds) {
  Call call{};
  call.model = p.model;
  call.options = p.options;
  call.vectors = p.vectors;
  call.P = layout.P;
  call.bias = bias;
  call.bounds = bounds;
  call.has_direct = layout.shape.has_direct || zones_out(p.options);
  call.gradient = GradientRow(layout.shape, p.model, p.vectors.weight_ch != nullptr,
                              layout.P, round_up(p.R, layout.lanes));
  return call;
}

index Zoneout::bytes(const Layout& layout, const Options& options, bool has_options,
                     index B, int threads, bool by_rows) {
  if (!has_options) return 0;
  const index group = (layout.shape.has_c ? 2 : 4) * 16, P = round_up(layout.P, group);
  const index of_expected = 2 * layout.padded_bytes();
  if (!options.training || !zones_out(options)) return of_expected;
  index values = (B + threads - 1) / threads * P;
  if (!by_rows && threads > 1) {
    const index units = layout.dense_units();  // no panel is wider
    const index panels = (layout.P + units - 1) / units;
    const index own = round_up((panels / threads + 2) * units, group) + group;
    const index of_all = B * (own < P ? own : P);
    values = of_all > values ? of_all : values;
  }
  return of_expected + layout.bytes(2 * values);
}

void Zoneout::start() const {
  const Options& o = options_;
  layout_.k.fill(o.zoneout_h, layout_.P, expected_);
  layout_.k.fill(o.zoneout_c, layout_.P, expected_ + layout_.padded_bytes());
}

void Zoneout::find(Block& block, int role_h, int role_c, const Schedule& rows,
                   Range places, index time, Range units) const {
  block.used |= bit(role_h) | bit(role_c);
  if (!draws()) {
    block.rows[role_h] = {expected_, 0, nullptr, nullptr};
    block.rows[role_c] = {expected_ + layout_.padded_bytes(), 0, nullptr, nullptr};
    return;
  }
  const index first = units.begin / group() * group();
  const index width = round_up(units.end, group()) - first;
  const index apart = layout_.bytes(2 * width), count = places.end - places.begin;
  char* const keep_h = drawn_ - layout_.bytes(first);
  char* const keep_c = keep_h + layout_.bytes(width);
  const index* const order = rows.order();
  layout_.k.draw_zoneout({&options_, layout_.shape.has_c, time, units,
                          order ? order + places.begin : nullptr,
                          order ? 0 : rows.row(places.begin), count, keep_h, keep_c,
                          apart});
  block.rows[role_h] = {keep_h - places.begin * apart, apart, nullptr, nullptr};
  block.rows[role_c] = {expected_ + layout_.padded_bytes(), 0, nullptr, nullptr};
  if (options_.zoneout_c <= 0) return;
  block.rows[role_c] = {keep_c - places.begin * apart, apart, nullptr, nullptr};
}

index packed_bytes(const Layout& layout, Packing packing) {
  switch (packing) {
    case Packing::forward:
      return layout.forward_bytes();
    case Packing::backward:
      return layout.backward_bytes();
    default:
      return layout.bias_bytes();
  }
}

void pack(const Layout& layout, const Parameters<char>& p, Packing packing, char* to,
          const Team& team) {
  const Kernels& k = layout.k;
  const index item = layout.weight_item(p);
  const Matrix W = with_weight(layout.of_input, p.weight_ih, item, p.scale_ih);
  const Matrix R = with_weight(layout.of_recurrent, p.weight_hh, item, p.scale_hh);
  const auto transposed = [&](const Matrix& of, char* at) {
    const Range own = team.share(layout.dense_panels(of.K));
    const index panel = layout.product.panel_bytes(2, of.slots * of.P);
    layout.product.pack_transposed(of, own, at + own.begin * panel);
  };
  if (packing == Packing::backward) {
    transposed(W, to);
    transposed(R, to + layout.back_recurrent());
    if (p.model.projects) {
      transposed(with_weight(layout.of_second, p.weight_hr, item),
                 to + layout.back_projection());
    }
    return;
  }
  if (team.rank == 0) k.pack_bias(layout.shape, p, layout.P, to);
  if (packing == Packing::bias) return;
  const auto pack_own = [&](const Matrix& of, int unit_vectors, index panels, index at,
                            index panel_bytes) {
    const Range own = team.share(panels);
    layout.product.pack(of, unit_vectors, own, to + at + own.begin * panel_bytes);
  };
  pack_own(W, layout.unit_vectors, layout.panels(), layout.input_panels(),
           layout.panel_bytes(layout.I));
  pack_own(R, layout.unit_vectors, layout.panels(), layout.recurrent_panels(),
           layout.panel_bytes(layout.R));
  if (!layout.has_second()) return;
  const bool projects = p.model.projects;
  const Matrix second =
      with_weight(layout.of_second, projects ? p.weight_hr : p.weight_hh, item,
                  projects ? p.scale_hr : p.scale_hh);
  pack_own(second, 2, layout.dense_panels(layout.of_second.H), layout.second_panels(),
           layout.second_panel_bytes());
}

}  // namespace fusedrnn
