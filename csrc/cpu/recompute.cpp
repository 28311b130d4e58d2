#include "recompute.h"

namespace fusedrnn {

void recompute(const Layout& l, const char* weights, Call call,
               const RecomputedRows& rows, const Team& team) {
  const bool norm = l.model.norm, cell_has_second = l.shape.has_second();
  // The cell writes h as it is, without zoneout and projection.
  call.options.zoneout_h = call.options.zoneout_c = 0;
  call.model.projects = true;
  call.saves = true;
  Step step{&call, {}, nullptr, nullptr, false, false, rows.norm_rows};
  const auto convert = [&](char** list, index K, const Operand& to, bool from_halves) {
    if (!l.converts()) return;
    const auto put = from_halves ? l.halves->put_left : l.product.put_left;
    put({nullptr, 0, nullptr, list}, team.share(rows.count), K, &to, 1);
  };
  const auto run = [&](Block b, Pointwise after, Range panels) {
    for (int n = 0; n < b.count && l.converts(); ++n) {
      const int role = b.terms[n].role;
      b.terms[n].operand = rows.operands[role == role::x           ? 0
                                         : role == role::h_dropped ? 1
                                                                   : 2];
    }
    b.rows[role::x] = {nullptr, 0, nullptr, rows.x};
    b.rows[role::record] = {nullptr, 0, nullptr, rows.record};
    b.rows[role::h_dropped] = {nullptr, 0, nullptr, rows.h_dropped};
    b.rows[role::h_prev] = {nullptr, 0, nullptr, rows.h_prev};
    b.rows[role::c_prev] = {nullptr, 0, nullptr, rows.c_prev};
    b.rows[role::operand] = {nullptr, 0, nullptr, rows.operand};
    b.rows[role::h] = b.rows[role::c] = {rows.unused_row, 0, nullptr, nullptr};
    b.used |= bit(role::x) | bit(role::record) | bit(role::h_dropped) |
              bit(role::h_prev) | bit(role::c_prev) | bit(role::h) | bit(role::c);
    b.has_options = true;
    b.after = after;
    b.step = &step;
    if (b.product) {
      b.places = {0, rows.count};
      b.panels = panels;
      l.k.run(b);
    } else {
      b.places = team.share(rows.count);
      b.size = l.H;
      l.k.walk(b, rows_at_once(l));
    }
    team.meet();
  };
  convert(rows.x, l.I, rows.operands[0], rows.x_item != l.size);
  convert(rows.h_dropped, l.R, rows.operands[1], false);
  if (l.converts()) team.meet();
  const Range panels = team.share(l.panels());
  if (norm) {
    step.put = {
        role::record, l.shape.first_input(), l.shape.slots, l.record.input(0), l.P, l.H,
        true};
    run(l.forward_block(weights, nullptr, true, false), l.k.put, panels);
    step.put = {role::record, 0, l.shape.gates, l.record.recurrent(0), l.P, l.H, true};
    run(l.forward_block(weights, nullptr, false, true), l.k.put, panels);
    Block whole{};
    whole.used = bit(role::operand);
    run(whole, l.cell.renormalise, {});
  } else {
    Block b = l.forward_block(weights, nullptr, true, true);
    b.used = cell_has_second ? bit(role::operand) : 0;
    run(b, cell_has_second ? l.cell.open : l.cell.forward[changes::all], panels);
  }
  if (!cell_has_second) return;
  convert(rows.operand, l.H, rows.operands[2], false);
  if (l.converts()) team.meet();
  Block second = l.second_block(weights);
  second.used = bit(role::operand);
  step.put = {role::record, 0, 1, l.record.recurrent(0), l.P, l.H, true};
  run(second, norm ? l.k.put : l.cell.close, team.share(l.dense_panels(l.H)));
  if (norm) run(Block{}, l.cell.renormalise, {});
}

}  // namespace fusedrnn
