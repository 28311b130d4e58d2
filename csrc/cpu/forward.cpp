// This file runs a layer forward. Each step is a fused product W·x + R·h' and the cell.
// If W is large for the rows of a step, W·x is instead one product for a time block of
// steps, before them. A thread owns a block of rows × hidden units throughout, so W·x and
// the cell state stay in its own caches. Threads that own units meet once per step;
// threads that own whole rows never do.
//
// Pre-activations are in a ring of row records (../record.h). In training the ring is
// `saved` itself and holds every step.
//
// A row's state before a step is found by a pointer, so masks cost no copies: a row that
// is reset reads zeros, and one whose sequence starts late reads h0 then.
//
// In halves the pointwise functions write float32 as always, to records and to rows of h
// of this step, and a thread then rounds what it owns to y and `saved`.
//
// Options change only the pointwise function of a tile. Where it needs whole rows
// (LayerNorm) or the results of a second product, all threads meet in between.
#include <cstring>
#include <optional>

#include "scratch.h"

namespace fusedrnn {

namespace {

class ForwardPass {
  const Layout& l_;
  const Forward& p_;
  const Team& team_;
  const index time_block_;
  const bool saves_, fused_;
  const bool in_halves_;
  const index record_, saved_record_, ring_;  // bytes of a record, steps in the ring
  const index h_row_, cell_row_;              // bytes from one row of h or c to the next
  const ForwardScratch memory_;
  char* const records_;
  const Blocks own_;
  const Zoneout zoneout_;
  Call call_;
  Step step_, second_step_, inputs_step_;
  Matrix unpacked_[2];
  Block product_;
  std::optional<Block> inputs_, second_;
  index begin_ = 0;  // the first step in the ring

 public:
  ForwardPass(const Layout& l, const Forward& p, char* workspace, const Team& team)
      : l_(l),
        p_(p),
        team_(team),
        time_block_(ForwardScratch::time_block(l, p)),
        saves_(ForwardScratch::saves(l, p)),
        fused_(ForwardScratch::fuses(l, time_block_)),
        in_halves_(l.halves != nullptr),
        record_(l.record_bytes()),
        saved_record_(l.saved_record_bytes()),
        ring_(saves_ && !in_halves_ ? p.T : time_block_),
        h_row_(in_halves_ ? ForwardScratch::h_row_bytes(l) : p.y_b),
        cell_row_(saves_ ? saved_record_ : record_),
        memory_(l, p, workspace, team.rank, team.count),
        records_(saves_ && !in_halves_ ? p.saved : memory_.records),
        own_(l, p, p.masks, l.panels(), l.tile_rows(), team, memory_.schedule),
        zoneout_(l, p.options, memory_.zoneout),
        call_(call_of(l, p, p.weights, memory_.bounds)),
        step_{&call_, {}, nullptr, nullptr, false, false, memory_.norm_rows},
        second_step_(step_),
        inputs_step_(step_),
        unpacked_{with_weight(l.of_input, p.weight_ih, p.weight_item),
                  with_weight(l.of_recurrent, p.weight_hh, p.weight_item)},
        product_(l.forward_block(p.weights, unpacked(), fused_, true)) {
    call_.saves = saves_;
    make_blocks();
  }

  void run() {
    start();
    for (index begin = 0; begin < p_.T; begin += time_block_) {
      if (!saves_ || in_halves_) begin_ = begin;
      const index end = begin + time_block_ < p_.T ? begin + time_block_ : p_.T;
      if (p_.input) p_.input->await(end, team_);
      if (!fused_) multiply_inputs(begin, end);
      for (index s = begin; s < end; ++s) {
        run_step(s, (team_.step + s) % 2 != 0);
        bool met = finish(s);
        finish_rows(s);
        if (in_halves_) {
          round(s, met);
          met = false;  // what is rounded is overwritten in the next step
        }
        if (!own_.alone && !met) team_.meet();
        if (p_.progress && team_.rank == 0) p_.progress->reach(s + 1);
        team_.end_step();
      }
    }
  }

 private:
  const Matrix* unpacked() const { return p_.unpacked ? unpacked_ : nullptr; }
  char* records(index s) const {
    const index n = s - begin_;  // -1 for the step before the ring's first
    return records_ + (n < 0 ? n + ring_ : n) * p_.B * record_;
  }
  char* y(index s) const { return p_.y + p_.time(s) * p_.y_t; }
  // Returns the rows of h after step s, h_row_ apart.
  char* h_of(index s) const {
    return in_halves_ ? memory_.h_now + (s & 1) * p_.B * h_row_ : y(s);
  }
  // Returns the rows of c after step s, cell_row_ apart.
  char* cells_of(index s) const {
    if (!saves_) return records(s) + l_.bytes(l_.record.cell());
    return p_.saved + s * p_.B * saved_record_ + l_.saved_cell();
  }
  char* dropped(index s) const {
    return memory_.dropped + (1 + (s & 1)) * p_.B * l_.padded_bytes();
  }
  Rows rows_of(const char* array, index apart) const {
    return own_.rows.rows_of(array, apart);
  }
  Range units() const {
    const index end = own_.panels.end * l_.panel_units;
    return {own_.panels.begin * l_.panel_units, end < p_.H ? end : p_.H};
  }

  // Sets the parts of the blocks that are the same for all steps.
  void make_blocks() {
    using namespace role;
    const bool norm = l_.model.norm, cell_has_second = l_.shape.has_second();
    const auto fill = [&](Block& b, Step& step, Pointwise after) {
      b.after = after;
      b.step = &step;
      b.panels = own_.panels;
      b.has_options = p_.has_options;
      b.panel_memory = memory_.panel;
    };
    if (!fused_) {
      inputs_.emplace(l_.forward_block(p_.weights, unpacked(), true, false));
      inputs_step_.put = {record,
                          norm ? l_.shape.first_input() : 0,
                          l_.shape.slots,
                          l_.record.input(0),
                          l_.P,
                          p_.H,
                          true};
      fill(*inputs_, inputs_step_, l_.k.put);
      inputs_->used = bit(x) | bit(record);
    }
    for (Block* const b : {&product_, inputs_ ? &*inputs_ : nullptr}) {
      for (int n = 0, inputs = 0; b && n < b->count; ++n) {
        Term& term = b->terms[n];
        term.operand = term.role == x ? memory_.x_operand[inputs++] : memory_.h_operand;
      }
    }
    if (!fused_ && !norm) product_.start_role = record;
    step_.put = {record, 0, l_.shape.gates, l_.record.recurrent(0), l_.P, p_.H, true};
    fill(product_, step_,
         norm              ? l_.k.put
         : cell_has_second ? l_.cell.open
                           : l_.cell.forward[changed_by(p_, p_.cells || p_.trace)]);
    product_.used = bit(h_dropped) | bit(h) | bit(record);
    if (fused_) product_.used |= bit(x);
    if (l_.shape.has_c) product_.used |= bit(c) | bit(c_prev);
    product_.prefetched[product_.prefetched_count++] = {h, 1, 0, 0, true};
    if (norm) {
      product_.prefetched[product_.prefetched_count++] = {
          record, l_.shape.gates, l_.record.recurrent(0), l_.P, true};
    } else if (saves_) {
      const int parts = l_.shape.slots + l_.shape.has_c;
      product_.prefetched[product_.prefetched_count++] = {record, parts, 0, l_.P, true};
    }
    if (p_.has_options) product_.used |= bit(h_prev);
    if (p_.cells) product_.used |= bit(cells);
    if (p_.trace) product_.used |= bit(trace);
    if (drops(p_.options)) product_.used |= bit(next_h_dropped) | bit(mask);
    if (l_.has_second()) product_.used |= bit(operand);
    const index row = l_.padded_bytes();
    product_.rows[operand] = rows_of(memory_.operand, row);
    product_.rows[mask] = rows_of(memory_.mask, row);
    if (!l_.has_second()) return;
    second_.emplace(l_.second_block(p_.weights));
    second_->terms[0].operand = memory_.second_operand;
    fill(*second_, second_step_,
         l_.model.projects ? l_.k.finish
         : norm            ? l_.k.put
                           : l_.cell.close);
    second_step_.put = {record, 0, 1, l_.record.recurrent(0), l_.P, p_.H, true};
    const index panels = l_.dense_panels(l_.of_second.H);
    second_->panels = own_.alone ? Range{0, panels} : team_.share(panels);
  }

  // Copies c0 into padded rows. Rows of length 0 keep their initial state.
  void start() {
    const index row = l_.padded_bytes(), of_h = l_.bytes(p_.R), of_c = l_.bytes(p_.H);
    if (p_.has_options || p_.masks.resets) std::memset(memory_.zeros, 0, row);
    const Range own = units();
    const index first = l_.bytes(own.begin), count = l_.bytes(own.end) - first;
    for (index i = 0; i < own_.rows.rows() && l_.shape.has_c; ++i) {
      const index b = own_.rows.row(i);
      char* const to = memory_.c0 + b * row;
      std::memcpy(to + first, p_.c0 + b * of_c + first, count);
      if (own.end == p_.H) std::memset(to + of_c, 0, row - of_c);
    }
    for (index i = own_.rows.working(); i < own_.rows.rows(); ++i) {
      const index b = own_.rows.row(i);
      store_state(b, p_.h0 + b * of_h, memory_.c0 + b * row);
    }
    if (!p_.has_options) return;
    zoneout_.start();
    l_.k.bounds(p_.options, memory_.bounds);
    call_.vectors = pad_vectors(l_, p_.vectors, memory_.vectors);
    if (!drops(p_.options)) return;
    const Range places = own_.share(team_, own_.rows.rows());
    for (index i = places.begin; i < places.end; ++i) {
      const index b = own_.rows.row(i);
      char* const factors = memory_.mask + b * row;
      l_.k.draw_recurrent(p_.options, b, p_.R, factors);
      l_.k.multiply_rows(p_.h0 + b * of_h, factors, p_.R, memory_.dropped + b * row);
    }
    own_.meet(team_);
  }

  // Stores the state of row b after its last step, of this thread's units.
  void store_state(index b, const char* h, const char* c) const {
    const Range own = units();
    const index end = own.end < p_.R ? own.end : p_.R;
    const index first = l_.bytes(own.begin);
    if (own.begin < end) {
      std::memcpy(p_.h_n + b * l_.bytes(p_.R) + first, h + first, l_.bytes(end) - first);
    }
    if (l_.shape.has_c) {
      std::memcpy(p_.c_n + b * l_.bytes(p_.H) + first, c + first,
                  l_.bytes(own.end) - first);
    }
  }

  // Stores the state of rows whose last step is s, and clears h of rows that do not take
  // it.
  void finish_rows(index s) const {
    const Range own = units();
    const index end = own.end < p_.R ? own.end : p_.R, now = own_.rows.count(s);
    for (index i = own_.rows.count(s + 1); i < now; ++i) {
      const index b = own_.rows.row(i);
      store_state(b, h_of(s) + b * h_row_, cells_of(s) + b * cell_row_);
    }
    for (index i = now; i < own_.rows.rows() && own.begin < end; ++i) {
      std::memset(y(s) + own_.rows.row(i) * p_.y_b + own.begin * l_.item, 0,
                  (end - own.begin) * l_.item);
    }
  }

  // Rounds the results of step s to y, `saved` and `trace`: those of this thread's rows
  // and units or, where all threads have met, of whole rows that they share.
  void round(index s, bool have_met) const {
    const Halves& halves = *l_.halves;
    const index count = own_.rows.count(s);
    const Range places = have_met ? own_.share(team_, count) : Range{0, count};
    const Range own = have_met ? Range{0, p_.H} : units();
    const index last = own.end < p_.R ? own.end : p_.R, of_gates = l_.shape.gates * p_.H;
    for (index i = places.begin; i < places.end; ++i) {
      const index b = own_.rows.row(i);
      if (own.begin < last) {
        halves.narrow(h_of(s) + b * h_row_ + l_.bytes(own.begin), last - own.begin,
                      y(s) + b * p_.y_b + own.begin * l_.item);
      }
      if (saves_) {
        const Range padded{own.begin,
                           own.end == p_.H ? round_up(p_.H, l_.lanes) : own.end};
        save_record(l_, records(s) + b * record_, padded,
                    p_.saved + (s * p_.B + b) * saved_record_);
      }
      if (!p_.trace) continue;
      const char* const gates = memory_.gates + b * l_.bytes(of_gates);
      char* const to = p_.trace + (p_.time(s) * p_.B + b) * of_gates * l_.item;
      for (index at = own.begin; at < of_gates; at += p_.H) {
        halves.narrow(gates + l_.bytes(at), own.end - own.begin, to + at * l_.item);
      }
    }
  }

  // Computes a = bias + W x for this thread's rows and units of steps [begin, end), into
  // the records.
  void multiply_inputs(index begin, index end) {
    const index count = own_.rows.count(begin, end);
    Schedule::Entry next = own_.rows.entry(begin, 0);
    for (index n = 0; n < count; ++n, own_.rows.advance(next)) {
      const index b = own_.rows.row(next.place);
      memory_.x[n] = const_cast<char*>(p_.x) + p_.time(next.s) * p_.x_t + b * p_.x_b;
      memory_.to[n] = records(next.s) + b * record_;
    }
    inputs_->rows[role::x] = {nullptr, 0, nullptr, memory_.x};
    inputs_->rows[role::record] = {nullptr, 0, nullptr, memory_.to};
    inputs_->places = {0, count};
    convert_inputs(inputs_->rows[role::x], count);
    share_operands();
    l_.k.run(*inputs_);
    if (!l_.model.norm) return;
    own_.meet(team_);
    Block rows{};
    rows.places = own_.share(team_, count);
    rows.size = p_.H;
    rows.rows[role::record] = inputs_->rows[role::record];
    rows.used = bit(role::record);
    rows.has_options = true;
    rows.after = l_.cell.normalise_inputs;
    rows.step = &step_;
    l_.k.walk(rows, rows_at_once(l_));
  }

  // Converts the rows of a product that does not read them in place. share_operands
  // follows.
  void convert(const Rows& rows, index count, index K, const Operand* to, int operands,
               bool from_halves = false) const {
    if (!l_.converts()) return;
    const Range own = memory_.shares_operands ? team_.share(count) : Range{0, count};
    const auto put = from_halves ? l_.halves->put_left : l_.product.put_left;
    put(rows, own, K, to, operands);
  }
  void convert_inputs(const Rows& rows, index count) const {
    const bool from_halves = in_halves_ && p_.x_item == l_.item;
    convert(rows, count, p_.I, memory_.x_operand, l_.input_operands, from_halves);
  }
  void share_operands() const {
    if (memory_.shares_operands) team_.meet();
  }

  // Sets the rows of step s.
  void find_rows(index s) {
    using namespace role;
    const index count = own_.rows.count(s), t = p_.time(s), row = l_.padded_bytes();
    Rows* const rows = product_.rows;
    const char* const left = h_of(s > 0 ? s - 1 : 0);
    const StateBefore h_before{p_,   p_.masks,       s,     memory_.zeros, p_.h0,
                               left, l_.bytes(p_.R), h_row_};
    rows[h_dropped] = h_before.find(own_.rows, count, memory_.h);
    rows[h_prev] = rows[h_dropped];
    if (drops(p_.options)) {
      const StateBefore of{
          p_, p_.masks, s, memory_.zeros, memory_.dropped, dropped(s - 1), row, row};
      rows[h_dropped] = of.find(own_.rows, count, memory_.h_dropped);
      rows[next_h_dropped] = rows_of(dropped(s), row);
    }
    if (l_.shape.has_c) {
      const char* const c_left = cells_of(s > 0 ? s - 1 : 0);
      const StateBefore of{p_,         p_.masks, s,   memory_.zeros,
                           memory_.c0, c_left,   row, cell_row_};
      rows[c_prev] = of.find(own_.rows, count, memory_.c);
      rows[c] = rows_of(cells_of(s), cell_row_);
    }
    rows[record] = rows_of(records(s), record_);
    rows[x] = rows_of(p_.x + t * p_.x_t, p_.x_b);
    rows[h] = l_.model.projects ? product_.rows[operand] : rows_of(h_of(s), h_row_);
    if (p_.cells) rows[cells] = rows_of(p_.cells + t * p_.cells_t, p_.cells_b);
    if (p_.trace) {
      const index of_row = l_.bytes(l_.shape.gates * p_.H);
      char* const gates = in_halves_ ? memory_.gates : p_.trace + t * p_.B * of_row;
      rows[trace] = rows_of(gates, of_row);
    }
  }

  void run_step(index s, bool backwards) {
    find_rows(s);
    product_.places = {0, own_.rows.count(s)};
    product_.backwards = backwards;
    if (p_.has_options && !l_.model.norm && !l_.shape.has_second()) {
      zoneout_.find(product_, role::keep_h, role::keep_c, own_.rows, product_.places,
                    p_.time(s), units());
    }
    const index count = product_.places.end;
    if (fused_) convert_inputs(product_.rows[role::x], count);
    convert(product_.rows[role::h_dropped], count, p_.R, &memory_.h_operand, 1);
    share_operands();
    l_.k.run(product_);
  }

  // Runs a function on whole rows of step s, which threads that own units share.
  void walk(index s, Pointwise after) {
    Block b = product_;
    b.places = own_.share(team_, own_.rows.count(s));
    b.after = after;
    zoneout_.find(b, role::keep_h, role::keep_c, own_.rows, b.places, p_.time(s),
                  {0, p_.H});
    l_.k.walk(b, rows_at_once(l_));
  }

  // Runs the parts of a step that need whole rows or a second product. Returns whether
  // all threads met after it, because the results of other threads are copied next for a
  // row that ends here.
  bool finish(index s) {
    using namespace role;
    const bool norm = l_.model.norm, cell_has_second = l_.shape.has_second();
    if (norm) {
      own_.meet(team_);
      walk(s, l_.cell.normalised_forward);
    }
    if (l_.has_second()) {
      own_.meet(team_);
      Block& second = *second_;
      std::memcpy(second.rows, product_.rows, sizeof(second.rows));
      second.rows[h] = rows_of(h_of(s), h_row_);
      second.used = product_.used;
      second.places = {0, own_.rows.count(s)};
      const index end = second.panels.end * l_.dense_units();
      const Range columns{second.panels.begin * l_.dense_units(),
                          end < second.size ? end : second.size};
      zoneout_.find(second, keep_h, keep_c, own_.rows, second.places, p_.time(s),
                    columns);
      convert(second.rows[operand], second.places.end, p_.H, &memory_.second_operand, 1);
      share_operands();
      l_.k.run(second);
      if (norm && cell_has_second) {
        own_.meet(team_);
        walk(s, l_.cell.normalised_close);
      }
    }
    const bool meets = norm || l_.has_second();
    if (meets) own_.meet(team_);
    return meets;
  }
};

}  // namespace

index forward_workspace(const Layout& layout, const Forward& p, int threads) {
  return ForwardScratch(layout, p, nullptr, 0, threads).used();
}

void forward(const Layout& layout, const Forward& p, char* workspace, const Team& team) {
  ForwardPass(layout, p, workspace, team).run();
}

ForwardPlan plan(const Layout& l, const Forward& p, int threads) {
  const index steps = ForwardScratch::time_block(l, p);
  return {threads,
          Blocks::cuts_rows(l, p, l.panels(), l.tile_rows(), threads),
          ForwardScratch::fuses(l, steps),
          steps,
          l.tile_rows(),
          l.panel_units,
          saves_slots(l.shape.saves, p.options) ? l.saved_record_bytes() : 0,
          forward_workspace(l, p, threads)};
}

}  // namespace fusedrnn
