// This file runs a layer backward, in time blocks from the last to the first. Within a
// time block each step is a fused product Rᵀ·da and the cell, mirrored from forward.cpp
// and shared among threads in the same way. Then the block's da, still in cache, is
// multiplied into dW, dR, the biases and dx. So da never exists for the whole sequence.
//
// da is in a ring of rows of gradients (../record.h), one step longer than a time block
// because a step reads the da of the step after it.
//
// In halves, what a step reads of x, y, dy and the saved values is first converted to
// float32, and its da to an operand for the products.
//
// `direct` and `dc` hold the gradient that a row's step passes to the step before it.
// When the row has no step before, that is the gradient of h0 and c0.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "scratch.h"

namespace fusedrnn {

namespace {

class BackwardPass {
  const Layout& l_;
  const Backward& p_;
  const Team& team_;
  const bool in_halves_;
  const index time_block_, ring_, record_, saved_record_;
  const index record_ring_;  // steps of records in memory, in halves
  const BackwardScratch memory_;
  const Blocks own_;
  const Schedule all_;
  const Zoneout zoneout_;
  Call call_;
  const index da_row_;  // bytes of a row of gradients
  Step step_, second_step_, dx_step_;
  Matrix unpacked_[2];
  Block product_, second_, dx_;
  const WeightGradients weights_;

 public:
  BackwardPass(const Layout& l, const Backward& p, char* workspace, const Team& team)
      : l_(l),
        p_(p),
        team_(team),
        in_halves_(l.halves != nullptr),
        time_block_(BackwardScratch::time_block(l, p)),
        ring_(time_block_ + 1),
        record_(l.record_bytes()),
        saved_record_(l.saved_record_bytes()),
        record_ring_(std::max(BackwardScratch::record_steps(l, p), index{1})),
        memory_(l, p, workspace, team.rank, team.count),
        own_(l, p, p.masks, l.dense_panels(p.R), l.back_tile(), team,
             memory_.own_schedule),
        all_(p, p.masks, Team::single(), memory_.schedule),
        zoneout_(l, p.options, memory_.zoneout),
        call_(call_of(l, p, p.forward_weights, memory_.bounds)),
        da_row_(l.row_bytes(call_.gradient.values)),
        step_{&call_, {}, nullptr, nullptr, false, false, memory_.norm_rows},
        second_step_(step_),
        dx_step_(step_),
        unpacked_{with_weight(l.of_input, p.weight_ih, p.weight_item),
                  with_weight(l.of_recurrent, p.weight_hh, p.weight_item)},
        weights_(l, p, call_.gradient,
                 {memory_.partial_sums, memory_.right, memory_.dbias, memory_.sums},
                 {find_gradient_rows, this}) {
    const bool reads_c = in_halves_ && l.shape.has_c && !zones_out(p.options);
    call_.saved_c = reads_c ? l.record.cell() : -1;
    make_blocks();
  }

  void run() {
    start();
    for (index end = p_.T; end > 0; end -= time_block_) {
      const index begin = end > time_block_ ? end - time_block_ : 0;
      const index last = begin > 0 ? begin : -1;
      if (p_.input) p_.input->await(p_.T - begin, team_);
      if (p_.has_options) prepare(begin, end);
      for (index s = end - 1; s >= last; --s) {
        run_step(s);
        if (!own_.alone) team_.meet();
        team_.end_step();
      }
      if (own_.alone) team_.meet();
      weights_.add(all_, team_, begin, end);
      if (p_.has_options) weights_.add_vectors(all_, team_, begin, end);
      write_dx(begin, end);
      if (own_.alone || p_.has_options || p_.progress) team_.meet();
      if (p_.progress && team_.rank == 0) p_.progress->reach(p_.T - begin);
    }
  }

 private:
  bool has_record() const { return saves_slots(l_.shape.saves, p_.options); }

  char* da(index s) const { return memory_.da + s % ring_ * p_.B * da_row_; }
  char* records(index s) const {
    const index of = in_halves_ ? record_ring_ : ring_;
    return memory_.records + s % of * p_.B * record_;
  }
  const char* saved(index s) const {
    const bool is_read = p_.saved && !in_halves_;
    return is_read ? p_.saved + s * p_.B * record_ : records(s);
  }
  const char* y(index s) const { return p_.y + p_.time(s) * p_.y_t; }
  char* dropped(index s) const {
    return memory_.dropped + s % time_block_ * p_.B * l_.padded_bytes();
  }
  StateBefore cell_before(index s) const {
    const index before = s > 0 ? s - 1 : 0;
    const char* left = saved(before) + l_.bytes(l_.record.cell());
    if (p_.saved) left = p_.saved + before * p_.B * saved_record_ + l_.saved_cell();
    const index row = p_.saved ? saved_record_ : record_;
    return {p_, p_.masks, s, memory_.zeros, memory_.c0, left, l_.padded_bytes(), row};
  }
  // Returns h' as the user has it: y of the step before, or h0, in the type of y.
  StateBefore h_before(index s) const {
    const char* const h0 = in_halves_ ? memory_.h0 : p_.h0;
    return {p_,    p_.masks, s, memory_.zeros, h0, y(s > 0 ? s - 1 : 0), p_.R * l_.item,
            p_.y_b};
  }
  // Returns the h' that R multiplied in the step of row b.
  const char* h_dropped_before(index s, index b) const {
    return drops(p_.options) ? dropped(s) + b * l_.padded_bytes() : h_before(s)(b);
  }
  // Writes h' of row b and step s as float32, of some units.
  void widen_h(index s, index b, Range of, char* to) const {
    l_.halves->widen(h_before(s)(b) + of.begin * l_.item, of.end - of.begin,
                     to + l_.bytes(of.begin));
  }
  static GradientRows::Pointers find_gradient_rows(const void* pass,
                                                   const Schedule::Entry& at) {
    const auto& of = *static_cast<const BackwardPass*>(pass);
    const Backward& p = of.p_;
    const index b = of.all_.row(at.place);
    return {of.da(at.s) + b * of.da_row_, p.x + p.time(at.s) * p.x_t + b * p.x_b,
            of.h_dropped_before(at.s, b), of.saved(at.s) + b * of.record_};
  }
  Rows rows_of(const char* array, index apart) const {
    return own_.rows.rows_of(array, apart);
  }

  // Returns the units of h that a thread owns.
  Range units() const {
    const index end = own_.panels.end * l_.dense_units();
    return {own_.panels.begin * l_.dense_units(), end < p_.R ? end : p_.R};
  }
  // Returns the panels of the cell's units that this thread computes after a second
  // product.
  Range cell_panels() const {
    const index panels = l_.dense_panels(p_.H);
    return own_.alone ? Range{0, panels} : team_.share(panels);
  }
  Range units_of(Range panels) const {
    const index end = panels.end * l_.dense_units();
    return {panels.begin * l_.dense_units(), end < p_.H ? end : p_.H};
  }

  void make_blocks() {
    using namespace role;
    const Shape& shape = l_.shape;
    const bool norm = l_.model.norm, cell_has_second = shape.has_second();
    const auto fill = [&](Block& b, Step& step, Pointwise after, Range panels) {
      b.after = after;
      b.step = &step;
      b.panels = panels;
      b.partial_sums = memory_.partial_sums;
      b.panel_memory = memory_.panel;
      b.has_options = p_.has_options;
    };
    const char* const packed = p_.weights;
    product_ = l_.backward_block(packed ? packed + l_.back_recurrent() : nullptr,
                                 unpacked_ + 1, p_.R, cell_has_second ? 1 : 0);
    fill(product_, step_,
         norm || l_.model.projects ? l_.k.store_dh
         : cell_has_second         ? l_.cell.open_backward
                                   : l_.cell.backward[changed_by(p_, p_.dcells)],
         own_.panels);
    product_.terms[0].operand = memory_.da_operand;
    product_.used = bit(da_after) | bit(role::saved) | bit(direct) | bit(role::da);
    const auto prefetch = [&](int role, int parts) {
      product_.prefetched[product_.prefetched_count++] = {role, parts, 0, l_.P, false};
    };
    if (p_.has_options || shape.has_direct) product_.used |= bit(before_h);
    if (shape.has_direct) prefetch(before_h, 1);
    if (shape.has_c) {
      product_.used |= bit(before_c) | bit(role::dc);
      prefetch(before_c, 1);
    }
    prefetch(role::saved, shape.saves ? shape.slots + shape.has_c : 1);
    if (p_.dy) {
      product_.used |= bit(dy);
      prefetch(dy, 1);
    }
    if (p_.has_options) product_.used |= bit(dropped_h) | bit(role::dh);
    if (p_.dcells) product_.used |= bit(dcells);
    if (drops(p_.options)) product_.used |= bit(mask_h);
    const index row = l_.padded_bytes();
    product_.rows[direct] = rows_of(memory_.direct, row);
    product_.rows[role::dc] = rows_of(memory_.dc, row);
    product_.rows[role::dh] = rows_of(memory_.dh, row);
    product_.rows[mask_h] = rows_of(memory_.mask, row);
    product_.rows[dm] = rows_of(l_.has_second() ? memory_.dm : memory_.dh, row);
    if (p_.dh0) product_.rows[dh0] = rows_of(p_.dh0, l_.bytes(p_.R));

    if (l_.model.projects) {
      const index depth = round_up(p_.R, l_.lanes);
      second_ = l_.dense_backward_block(packed + l_.back_projection(), depth, depth);
      fill(second_, second_step_, norm ? l_.k.put : l_.cell.projected_backward,
           cell_panels());
    } else if (cell_has_second) {
      second_ =
          l_.dense_backward_block(packed + l_.back_recurrent(), l_.back_depth(), l_.P);
      fill(second_, second_step_, norm ? l_.k.put : l_.cell.close_backward, own_.panels);
    }
    second_.terms[0].operand = memory_.second_operand;
    second_step_.put = {dm, 0, 1, 0, 0, p_.H, true};

    if (!p_.dx) return;
    dx_ = l_.backward_block(packed, unpacked_, p_.I, 0);
    dx_.terms[0].role = left;
    dx_.terms[0].operand = memory_.dx_operand;
    fill(dx_, dx_step_, l_.k.put, {0, l_.dense_panels(p_.I)});
    dx_step_.put = {role::to, 0, 1, 0, 0, p_.I, false};
    dx_.used = bit(left) | bit(role::to);
    dx_.rows[left] = {nullptr, 0, nullptr, memory_.from};
    dx_.rows[role::to] = {nullptr, 0, nullptr, memory_.to};
  }

  // Copies a row of R or H values, or zeros, into a padded row.
  void copy_padded(const char* from, index values, char* to) const {
    const index count = l_.bytes(values), row = l_.bytes(round_up(values, l_.lanes));
    if (from) std::memcpy(to, from, count);
    std::memset(to + (from ? count : 0), 0, row - (from ? count : 0));
  }

  // Copies dc and c0 into padded rows, and the gradients of h_n to `direct`, where a
  // row's last step reads dh. For rows of length 0 they are the gradients of h0 and c0.
  // The padding of da is cleared: a product reads it, and 0 · inf would be NaN.
  void start() {
    const index row = l_.padded_bytes(), of_h = l_.bytes(p_.R), of_c = l_.bytes(p_.H);
    const index working = own_.rows.working(), rows = own_.rows.rows();
    if (p_.masks.resets || p_.has_options) std::memset(memory_.zeros, 0, row);
    const Range places = own_.share(team_, rows);
    for (index i = places.begin; i < places.end; ++i) {
      const index b = own_.rows.row(i);
      copy_padded(p_.dh_n ? p_.dh_n + b * of_h : nullptr, p_.R, memory_.direct + b * row);
      if (l_.shape.has_c) {
        copy_padded(p_.dc_n ? p_.dc_n + b * of_c : nullptr, p_.H, memory_.dc + b * row);
        copy_padded(p_.c0 + b * of_c, p_.H, memory_.c0 + b * row);
      }
      if (in_halves_) {
        l_.halves->narrow(p_.h0 + b * of_h, p_.R, memory_.h0 + b * p_.R * l_.item);
      }
      if (i >= working) {
        if (p_.dh0) std::memcpy(p_.dh0 + b * of_h, memory_.direct + b * row, of_h);
        store_dc0(b);
      }
      if (drops(p_.options)) {
        l_.k.draw_recurrent(p_.options, b, p_.R, memory_.mask + b * row);
      }
      for (index n = 0; n < ring_; ++n) {
        char* const of = memory_.da + (n * p_.B + b) * da_row_;
        if (p_.has_options) {
          std::memset(of, 0, da_row_);
          continue;
        }
        for (int slot = 0; slot < l_.shape.slots && p_.H != l_.P; ++slot) {
          std::memset(of + slot * row + of_c, 0, row - of_c);
        }
      }
    }
    if (p_.has_options) {
      zoneout_.start();
      l_.k.bounds(p_.options, memory_.bounds);
      // The saved gates are rounded, those that LayerNorm computes again are not.
      if (in_halves_ && !l_.model.norm) {
        char* const rounded = memory_.bounds + l_.bytes(5);
        std::memcpy(rounded, memory_.bounds, l_.bytes(5));
        round(rounded, 5);
        call_.bounds = rounded;
      }
      call_.vectors = pad_vectors(l_, p_.vectors, memory_.vectors);
    }
    own_.meet(team_);
    if (p_.has_options && own_.alone) team_.meet();
  }
  // Rounds n elements to bfloat16.
  void round(char* values, index n) const {
    constexpr index at_once = 256;
    char halves[2 * at_once];
    for (index k = 0; k < n; k += at_once) {
      const index count = n - k < at_once ? n - k : at_once;
      l_.halves->narrow(values + l_.bytes(k), count, halves);
      l_.halves->widen(halves, count, values + l_.bytes(k));
    }
  }
  void store_dc0(index b) const {
    if (!p_.dc0) return;
    const index of_c = l_.bytes(p_.H);
    std::memcpy(p_.dc0 + b * of_c, memory_.dc + b * l_.padded_bytes(), of_c);
  }

  // Recomputes the values of a time block that were not saved.
  void prepare(index begin, index end) {
    const bool is_recomputed = BackwardScratch::recomputes(l_, p_);
    if (!drops(p_.options) && !is_recomputed) return;
    const Range own = team_.share(all_.count(begin, end));
    Schedule::Entry next = all_.entry(begin, own.begin);
    for (index n = own.begin; n < own.end && drops(p_.options); ++n, all_.advance(next)) {
      const index b = all_.row(next.place), at = b * l_.padded_bytes();
      char* const to = dropped(next.s) + at;
      if (in_halves_) widen_h(next.s, b, {0, p_.R}, to);
      l_.k.multiply_rows(in_halves_ ? to : h_before(next.s)(b), memory_.mask + at, p_.R,
                         to);
    }
    for (index s = begin > 0 ? begin - 1 : 0; s < end && l_.shape.has_c && is_recomputed;
         ++s) {
      const Range rows = team_.share(p_.B);
      for (index b = rows.begin; b < rows.end; ++b) {
        char* const to = records(s) + b * record_ + l_.bytes(l_.record.cell());
        const char* const c = p_.cells + p_.time(s) * p_.cells_t + b * p_.cells_b;
        std::memcpy(to, c, l_.bytes(p_.H));
      }
    }
    team_.meet();
    if (!is_recomputed) return;
    recompute(begin, end);
    if (!in_halves_) return;
    next = all_.entry(begin, own.begin);
    for (index n = own.begin; n < own.end; ++n, all_.advance(next)) {
      char* const record = records(next.s) + all_.row(next.place) * record_;
      for (index at = 0; at < l_.record.cell(); at += l_.P) {
        round(record + l_.bytes(at), p_.H);
      }
    }
    team_.meet();
  }

  void recompute(index begin, index end) {
    const index count = all_.count(begin, end), most_rows = time_block_ * p_.B;
    char** list[RecomputedRows::lists];
    for (int n = 0; n < RecomputedRows::lists; ++n)
      list[n] = memory_.recomputed + n * most_rows;
    Schedule::Entry next = all_.entry(begin, 0);
    const Range own = team_.share(count);
    for (index n = 0; n < count; ++n, all_.advance(next)) {
      const index s = next.s, b = all_.row(next.place);
      const char *h_dropped = h_dropped_before(s, b), *h = h_before(s)(b);
      if (in_halves_) {
        char* const wide = memory_.recomputed_h + n * l_.padded_bytes();
        if (n >= own.begin && n < own.end) widen_h(s, b, {0, p_.R}, wide);
        if (!drops(p_.options)) h_dropped = wide;
        h = wide;
      }
      const char* const rows[] = {p_.x + p_.time(s) * p_.x_t + b * p_.x_b,
                                  records(s) + b * record_,
                                  h_dropped,
                                  h,
                                  l_.shape.has_c ? cell_before(s)(b) : nullptr,
                                  da(s) + b * da_row_ + l_.bytes(call_.gradient.operand)};
      for (int of = 0; of < RecomputedRows::lists; ++of) {
        list[of][n] = const_cast<char*>(rows[of]);
      }
    }
    Call call = call_;
    call.bounds = memory_.bounds;
    fusedrnn::recompute(
        l_, p_.forward_weights, call,
        {count, list[0], list[1], list[2], list[3], list[4], list[5], memory_.unused_row,
         memory_.norm_rows, p_.x_item, memory_.recomputed_operand},
        team_);
  }

  // Sets the rows of step s. Step -1 has no rows of its own; its roles that are not read
  // point to step 0.
  void find_rows(index s, index count) {
    using namespace role;
    const index now = s > 0 ? s : 0, t = p_.time(now), row = l_.padded_bytes();
    Rows* const rows = product_.rows;
    rows[da_after] = rows_of(da(s + 1) + l_.bytes(call_.gradient.recurrent), da_row_);
    rows[role::da] = rows_of(da(now), da_row_);
    if (has_record()) {
      rows[role::saved] = rows_of(saved(now), record_);
    } else {
      rows[role::saved] =
          in_halves_ ? rows_of(memory_.wide_y, row) : rows_of(y(now), p_.y_b);
    }
    if (product_.used & bit(before_h)) {
      rows[before_h] = in_halves_ ? rows_of(memory_.wide_h, row)
                                  : h_before(now).find(own_.rows, count, memory_.h);
      rows[dropped_h] = drops(p_.options) ? rows_of(dropped(now), row) : rows[before_h];
    }
    if (l_.shape.has_c) {
      rows[before_c] = cell_before(now).find(own_.rows, count, memory_.c);
    }
    if (p_.dy) {
      rows[dy] = in_halves_ ? rows_of(memory_.wide_dy, row)
                            : rows_of(p_.dy + t * p_.dy_t, p_.dy_b);
    }
    if (p_.dcells) rows[dcells] = rows_of(p_.dcells + t * p_.dcells_t, p_.dcells_b);
  }

  // Sets cuts[i] to whether no gradient of row i crosses step s. Returns null if the
  // gradients of all rows do.
  const bool* find_cuts(index s, index count, bool* cuts) const {
    if (!p_.masks.resets && !p_.options.bptt) return nullptr;
    for (index i = 0; i < count; ++i) {
      cuts[i] = p_.masks.is_cut(p_, s, own_.rows.row(i), p_.options.bptt);
    }
    return cuts;
  }

  // Takes dh and dc through the cell for the rows that take step s. For rows whose first
  // step was s + 1 they are the gradients of h0 and c0.
  void run_step(index s) {
    using namespace role;
    const index taken = own_.rows.count(s), later = own_.rows.count(s + 1);
    const bool passes_by = l_.shape.has_direct || p_.has_options;
    find_rows(s, taken);
    if (in_halves_) convert(s, taken, later);
    step_.cut = s >= 0 ? find_cuts(s, taken, memory_.cut) : nullptr;
    step_.cut_after = later > 0 ? find_cuts(s + 1, later, memory_.cut_after) : nullptr;
    product_.backwards = (team_.step + s) % 2 != 0;
    if (s >= 0 && p_.has_options) {
      zoneout_.find(product_, keeps_h, keeps_c, own_.rows, {0, taken}, p_.time(s),
                    units());
    }
    const auto run = [&](Range places, bool has_product, bool adds_direct) {
      if (places.begin >= places.end) return;
      product_.places = places;
      product_.count = has_product;
      step_.has_product = has_product;
      step_.adds_direct = adds_direct;
      l_.k.run(product_);
    };
    run({0, taken < later ? taken : later}, true, passes_by);
    run({later, taken}, false, true);
    if (later > taken) store_start(taken, later, run, passes_by);
    if (s >= 0) finish(s, taken);
  }

  // Converts, in halves, what step s reads: float32 to operands, and bfloat16 to float32,
  // of this thread's rows and units or, where a function takes whole rows, of rows that
  // all threads of a block share.
  void convert(index s, index taken, index later) {
    using namespace role;
    const bool by_rows = l_.model.norm || l_.has_second();
    const bool shares = memory_.shares_operands;
    const Range operands = shares ? team_.share(later) : Range{0, later};
    l_.product.put_left(product_.rows[da_after], operands, l_.back_depth(),
                        &memory_.da_operand, 1);
    const Range places =
        by_rows ? own_.share(team_, s < 0 ? 0 : taken) : Range{0, s < 0 ? 0 : taken};
    const Range own = by_rows ? Range{0, p_.H} : units();
    const index last = own.end < p_.R ? own.end : p_.R, row = l_.padded_bytes();
    const Range padded{own.begin, own.end == p_.H ? round_up(p_.H, l_.lanes) : own.end};
    for (index i = places.begin; i < places.end; ++i) {
      const index b = own_.rows.row(i);
      const auto widen = [&](const char* from, char* to) {
        l_.halves->widen(from + own.begin * l_.item, last - own.begin,
                         to + b * row + l_.bytes(own.begin));
      };
      if (has_record() && p_.saved) {
        load_record(l_, p_.saved + (s * p_.B + b) * saved_record_, padded,
                    records(s) + b * record_);
      }
      if (own.begin >= last) continue;
      if (!has_record()) widen(y(s) + b * p_.y_b, memory_.wide_y);
      if (p_.dy) widen(p_.dy + p_.time(s) * p_.dy_t + b * p_.dy_b, memory_.wide_dy);
      if (product_.used & bit(before_h)) {
        widen_h(s, b, {own.begin, last}, memory_.wide_h + b * row);
      }
    }
    if (by_rows || shares) own_.meet(team_);
  }

  // Stores dh0 and dc0, if wanted, of the rows whose first step was the one after this.
  template <class F>
  void store_start(index taken, index later, const F& run, bool adds_direct) {
    if (p_.dh0) {
      const auto [after, used, prefetched] =
          std::tuple(product_.after, product_.used, product_.prefetched_count);
      product_.after = l_.k.store_dh0;
      product_.used = bit(role::da_after) | bit(role::direct) | bit(role::dh0) |
                      (used & bit(role::mask_h));
      product_.prefetched_count = 0;
      run({taken, later}, true, adds_direct);
      product_.after = after;
      product_.used = used;
      product_.prefetched_count = prefetched;
    }
    const Range rows = own_.share(team_, later - taken);
    for (index i = rows.begin; i < rows.end; ++i) store_dc0(own_.rows.row(taken + i));
  }

  // Runs the parts of a step that need whole rows or a second product.
  void finish(index s, index taken) {
    using namespace role;
    const bool norm = l_.model.norm, projects = l_.model.projects;
    const bool cell_has_second = l_.shape.has_second();
    const auto multiply = [&](Range units_of_cell) {
      own_.meet(team_);
      std::memcpy(second_.rows, product_.rows, sizeof(second_.rows));
      const GradientRow& at = call_.gradient;
      const index from = l_.bytes(projects ? at.dh : at.recurrent);
      second_.rows[da_after] = rows_of(da(s) + from, da_row_);
      if (in_halves_) {
        const bool shares = memory_.shares_operands;
        l_.product.put_left(second_.rows[da_after],
                            shares ? team_.share(taken) : Range{0, taken},
                            second_.terms[0].K, &memory_.second_operand, 1);
        if (shares) team_.meet();
      }
      second_.used = product_.used | bit(dm);
      second_.places = {0, taken};
      second_step_.cut = step_.cut;
      if (!norm && projects) {
        zoneout_.find(second_, keeps_h, keeps_c, own_.rows, second_.places, p_.time(s),
                      units_of_cell);
      }
      l_.k.run(second_);
    };
    const auto walk = [&](Pointwise after, char* from) {
      own_.meet(team_);
      Block b = product_;
      b.places = own_.share(team_, taken);
      b.size = p_.H;
      b.after = after;
      b.used |= bit(dm);
      b.rows[dm] = rows_of(from, l_.padded_bytes());
      zoneout_.find(b, keeps_h, keeps_c, own_.rows, b.places, p_.time(s), {0, p_.H});
      l_.k.walk(b, rows_at_once(l_));
    };
    if (projects) {
      multiply(units_of(second_.panels));
      if (norm) walk(l_.cell.normalised_backward, memory_.dm);
    } else if (cell_has_second) {
      if (norm) walk(l_.cell.normalised_open_backward, memory_.dh);
      multiply(units());
      if (norm) walk(l_.cell.normalised_close_backward, memory_.dm);
    } else if (norm) {
      walk(l_.cell.normalised_backward, memory_.dh);
    }
  }

  // Computes dx = Wᵀ da. The threads share the rows of the time block or, if weights are
  // packed where they are used, the panels.
  void write_dx(index begin, index end) {
    if (!p_.dx) return;
    for (index s = begin; s < end; ++s) {
      for (index i = all_.count(s) + team_.rank; i < all_.rows(); i += team_.count) {
        std::memset(p_.dx + p_.time(s) * p_.dx_t + all_.row(i) * p_.dx_b, 0,
                    p_.I * p_.x_item);
      }
    }
    const index count = all_.count(begin, end);
    const Range own = p_.weights ? team_.share(count, l_.back_tile()) : Range{0, count};
    if (!p_.weights) dx_.panels = team_.share(l_.dense_panels(p_.I));
    if (own.begin >= own.end) return;
    Schedule::Entry next = all_.entry(begin, own.begin);
    for (index n = 0; n < own.end - own.begin; ++n, all_.advance(next)) {
      const index b = all_.row(next.place);
      memory_.from[n] = da(next.s) + b * da_row_ + l_.bytes(call_.gradient.input);
      memory_.to[n] = p_.dx + p_.time(next.s) * p_.dx_t + b * p_.dx_b;
    }
    dx_.places = {0, own.end - own.begin};
    const bool rounds = in_halves_ && p_.x_item != l_.size;
    if (in_halves_) {
      l_.product.put_left(dx_.rows[role::left], dx_.places, l_.back_depth(),
                          &memory_.dx_operand, 1);
    }
    if (rounds) dx_.rows[role::to] = {memory_.wide_dx, l_.bytes(p_.I), nullptr, nullptr};
    l_.k.run(dx_);
    const index first = dx_.panels.begin * l_.dense_units();
    const index last = std::min(dx_.panels.end * l_.dense_units(), p_.I);
    for (index n = 0; rounds && n < dx_.places.end && first < last; ++n) {
      const char* const row = memory_.wide_dx + n * l_.bytes(p_.I);
      l_.halves->narrow(row + l_.bytes(first), last - first,
                        memory_.to[n] + first * l_.item);
    }
  }
};

}  // namespace

index backward_workspace(const Layout& layout, const Backward& p, int threads) {
  return BackwardScratch(layout, p, nullptr, 0, threads).used();
}

void backward(const Layout& layout, const Backward& p, char* workspace,
              const Team& team) {
  BackwardPass(layout, p, workspace, team).run();
}

}  // namespace fusedrnn
