#include "weight_gradients.h"

#include <cstring>

namespace fusedrnn {

void WeightGradients::find(const Schedule& all, index begin, index end, index done,
                           Depth& rows) const {
  const index left = all.count(begin, end) - done;
  rows.count = left < gradient_depth ? left : gradient_depth;
  rows.first = end == p_.T && done == 0;
  Schedule::Entry next = all.entry(begin, done);
  for (index n = 0; n < rows.count; ++n, all.advance(next)) {
    const auto of = rows_.find(rows_.pass, next);
    rows.da[n] = of.da;
    rows.x[n] = of.x;
    rows.h_dropped[n] = of.h_dropped;
    rows.saved[n] = of.saved;
  }
}

void WeightGradients::add(const Schedule& all, const Team& team, index begin,
                          index end) const {
  if (!p_.dweight_ih && !p_.dweight_hh && !p_.dweight_hr && !wants_biases()) return;
  const Kernels& k = l_.k;
  const index rows = all.count(begin, end);
  const Range of_da = team.share(l_.shape.slots * l_.P, l_.gradients().tile);
  for (index done = 0; done < rows; done += gradient_depth) {
    Depth depth;
    find(all, begin, end, done, depth);
    if (depth.count <= most_outer_products && !p_.has_options) {
      add_outer_products(depth, of_da);
    } else {
      if (done > 0) team.meet();  // the panels are still being read
      add_products(depth, team, of_da);
    }
    if (!wants_biases()) continue;
    k.add_columns(depth.da, nullptr, depth.count, of_da, memory_.dbias, depth.first,
                  false);
  }
  if (begin > 0 || !wants_biases()) return;
  k.write_biases(l_.shape, memory_.dbias, l_.P, p_.H, of_da, p_.dbias_ih, p_.dbias_hh);
}

void WeightGradients::add_outer_products(const Depth& rows, Range of_da) const {
  const auto& add = l_.gradients().add_outer_products;
  const index h_item = drops(p_.options) ? l_.size : l_.item;
  add(rows.da, rows.x, p_.x_item, rows.count, of_da, of_W(nullptr), rows.first);
  add(rows.da, rows.h_dropped, h_item, rows.count, of_da, of_R(nullptr), rows.first);
}

void WeightGradients::add_products(const Depth& rows, const Team& team,
                                   Range of_da) const {
  const Gradients& of = l_.gradients();
  const index depth = rows.count, P = l_.P, tile = of.tile;
  char* const x_panels = memory_.right;
  char* const h_panels = x_panels + panel_bytes(l_, depth, p_.I);
  char* const second_panels = h_panels + panel_bytes(l_, depth, p_.R);
  const Range own_rows = team.share(depth, l_.halves ? 2 : 1);  // pairs
  const index h_item = drops(p_.options) ? l_.size : l_.item;
  if (p_.dweight_ih) of.pack_right(rows.x, p_.x_item, own_rows, depth, p_.I, x_panels);
  if (p_.dweight_hh) {
    of.pack_right(rows.h_dropped, h_item, own_rows, depth, p_.R, h_panels);
  }
  if (l_.has_second()) {
    const char* second[gradient_depth];
    const index at = l_.bytes(p_.model.projects ? row_.m : row_.operand);
    for (index n = 0; n < depth; ++n) second[n] = rows.da[n] + at;
    of.pack_right(second, l_.size, own_rows, depth, p_.H, second_panels);
  }
  team.meet();

  const auto add = [&](Range columns, const Target* targets, int count) {
    const index at_once = gradient_tiles_at_once * tile;
    for (index column = columns.begin; column < columns.end; column += at_once) {
      const index last = column + at_once < columns.end ? column + at_once : columns.end;
      of.pack_left(rows.da, depth, {column, last}, memory_.left);
      for (int n = 0; n < count; ++n) {
        of.add_products(memory_.left, depth, {column, last}, targets[n], rows.first);
      }
    }
  };
  Range own = of_da;
  if (p_.model.norm) {
    own = team.share(2 * l_.shape.gates * P, tile);
    own = {row_.input + own.begin, row_.input + own.end};
  }
  Target targets[3] = {of_W(x_panels), of_R(h_panels)};
  if (l_.has_second() && !p_.model.projects) {
    Target& of_first = targets[1];
    targets[2] = {of_first.begin,
                  1,
                  l_.of_second.blocks,
                  p_.H,
                  P,
                  second_panels,
                  p_.H,
                  p_.dweight_hh,
                  p_.gradient_item};
    of_first.begin += P;
    of_first.order += 1;
    of_first.blocks -= 1;
    add(own, targets, 3);
  } else {
    add(own, targets, 2);
  }
  if (!p_.model.projects || !p_.dweight_hr) return;
  const Range of_dh = team.share(round_up(p_.R, l_.lanes), tile);
  const Target of_projection{
      row_.dh,       1,    l_.of_second.blocks, p_.R,   round_up(p_.R, l_.lanes),
      second_panels, p_.H, p_.dweight_hr,       l_.size};
  add({row_.dh + of_dh.begin, row_.dh + of_dh.end}, &of_projection, 1);
}

void WeightGradients::add_vectors(const Schedule& all, const Team& team, index begin,
                                  index end) const {
  const auto& [weight_ch, gamma_ih, gamma_hh, gamma_c, beta_c] = p_.dvectors;
  if (!weight_ch && !gamma_ih && !gamma_hh && !gamma_c && !beta_c) return;
  const Shape& shape = l_.shape;
  const Range own = team.share(l_.P, l_.lanes);
  const index rows = all.count(begin, end), of_unit = l_.size;
  const bool norm = p_.model.norm, norm_c = norm && shape.has_c;
  const int peepholes = weight_ch ? shape.peephole_count : 0;
  const auto sums = [&](int vector) { return memory_.sums + vector * l_.padded_bytes(); };
  const int of_x = shape.peephole_count, of_h = of_x + shape.gates;
  const int of_gamma_c = of_h + shape.gates, of_beta_c = of_gamma_c + 1;
  for (index done = 0; done < rows && (norm || peepholes > 0); done += gradient_depth) {
    Depth depth;
    find(all, begin, end, done, depth);
    // Adds Σ a b, or Σ a, of elements a_at of the rows of gradients and elements b_at of
    // the rows b.
    const auto add = [&](int vector, index a_at, const char* const* b, index b_at) {
      const char *a[gradient_depth], *other[gradient_depth];
      for (index n = 0; n < depth.count; ++n) {
        a[n] = depth.da[n] + a_at * of_unit;
        if (b) other[n] = b[n] + b_at * of_unit;
      }
      l_.k.add_columns(a, b ? other : nullptr, depth.count, own, sums(vector),
                       depth.first, true);
    };
    for (int k = 0; k < peepholes; ++k) {
      const auto& [slot, reads_new_c] = shape.peepholes[k];
      add(k, slot * l_.P, depth.da, reads_new_c ? row_.c : row_.c_prev);
    }
    for (int k = 0; k < shape.gates && norm; ++k) {
      const int slot = k + shape.first_input();
      add(of_x + k, slot * l_.P, depth.saved, l_.record.input(slot));
      add(of_h + k, k * l_.P, depth.saved, l_.record.recurrent(k));
    }
    if (!norm_c) continue;
    add(of_gamma_c, row_.squashed, depth.da, row_.normal_c);
    add(of_beta_c, row_.squashed, nullptr, 0);
  }
  if (begin > 0) return;
  const index last = own.end < p_.H ? own.end : p_.H;
  const auto write = [&](int vector, char* to, int block) {
    if (!to || own.begin >= last) return;
    const index first = own.begin * of_unit, count = (last - own.begin) * of_unit;
    std::memcpy(to + block * p_.H * of_unit + first, sums(vector) + first, count);
  };
  for (int k = 0; k < shape.peephole_count; ++k) write(k, weight_ch, k);
  for (int k = 0; k < shape.gates; ++k) {
    write(of_x + k, gamma_ih, l_.of_input.blocks[k]);
    write(of_h + k, gamma_hh, l_.of_recurrent.blocks[k]);
  }
  write(of_gamma_c, gamma_c, 0);
  write(of_beta_c, beta_c, 0);
}

}  // namespace fusedrnn
