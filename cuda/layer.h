// One layer in one direction on a GPU: the products before and after, and the recurrence.
//
//   forward   W x for a stretch of times as one product, then the recurrence over it
//   backward  the recurrence over all times, then dx, dW, dR as one product each, db
//
// Arrays are as in csrc/contract.h, with these differences: states, c and peepholes are
// float32 where storage has 16 bits; x may have any strides but its last; y and dx have
// rows at one distance (y_t = B y_b). Everything is queued on the call's stream.
#pragma once

#include <type_traits>
#include <vector>

#include "vec.h"
// after FUSEDRNN_ARCH
#include "../csrc/pointwise.h"
#include "kernels.h"
#include "launches.h"
#include "products.h"

namespace fusedrnn::cuda {

template <template <class> class CellOf, class P>
class Layer {
  using Call = ForwardCall;
  using S = typename P::Storage;
  using Stored = typename P::Stored;
  using E = typename P::Operand;
  using A = typename P::State;
  using Cell = CellOf<device::Vec<A>>;
  static constexpr int gates = Cell::gates, slots = Cell::slots;
  static constexpr int first_input = slots - gates;
  static constexpr bool tf32 = std::is_same_v<E, TensorFloat32>;

  template <int tiles, bool resident>
  using Forwards = ForwardRecurrence<CellOf, P, tiles, resident>;
  template <int tiles, bool resident>
  using Backwards = BackwardRecurrence<CellOf, P, tiles, resident>;
  // What packed weights and the estimate of a plan ask of is alike in all of them.
  using ForwardEngine = typename Forwards<1, false>::Engine;
  using BackwardEngine = typename Backwards<1, false>::Engine;

  // The recurrences that are compiled, f.operator()<tiles, resident>(): exact float64
  // takes the plain way, and weights stay in registers where the matrix units read them.
  template <class F>
  static void for_each_instance(const F& f) {
    f.template operator()<1, false>();
    if constexpr (sizeof(A) == 4) f.template operator()<4, false>();
    if constexpr (P::on_matrix_units && gates > 1) f.template operator()<1, true>();
  }

 public:
  static index packed_bytes(index H, bool backward) {
    Carver carver(nullptr);
    if (!backward) carver.take<A>(slots * H);
    carver.take<Quad>(packed_quads(H, backward));
    return carver.used();
  }

  static void pack(const PackCall& call) {
    const OnDevice current(call.device);
    const index H = call.H;
    Carver carver(call.packed);
    if (!call.backward) {
      pack_bias<Cell, Stored>(call.precision, call.bias_ih, call.bias_hh,
                              carver.take<A>(slots * H), H, call.device, call.stream);
    }
    const index quads = packed_quads(H, call.backward);
    PackWeights<P> weights{
        P::of(call.precision),
        static_cast<const S*>(call.weight_hh),
        carver.take<Quad>(quads),
        H,
        padded_units(H),
        quads,
        call.backward ? BackwardEngine::octets : ForwardEngine::octets,
        call.backward ? BackwardEngine::segments : ForwardEngine::segments,
        call.backward,
        {}};
    for (int k = 0; k < gates; ++k) weights.recurrent_gate[k] = Cell::recurrent_gate[k];
    launch_each(weights, quads, call.device, call.stream);
  }

  // The values that backward needs beside x, y and cells: slots as stored and, if there
  // are no cells, c as a state.
  static index saved_bytes(const Call& call) {
    Carver carver(nullptr);
    Saved(call, carver);
    return carver.used();
  }

  static index forward_workspace(const ForwardCall& call) {
    if (call.B == 0) return 0;
    Carver carver(nullptr);
    ForwardRoom(call, choose(call, call.device, false), carver);
    return carver.used();
  }

  static void forward(const ForwardCall& call) {
    if (call.B == 0) return;
    const OnDevice current(call.device);
    const Plan plan = choose(call, call.device, false);
    Carver carver(call.workspace);
    const ForwardRoom room(call, plan, carver);
    prepare(call, plan, room, static_cast<const A*>(call.h0),
            static_cast<const A*>(call.c0), static_cast<A*>(call.h_n),
            static_cast<A*>(call.c_n), true);
    const Matrix x = matrix_of_x<Stored>(call, element_of(call.precision), room.x, {});
    const auto products = products_of(call, room);
    Carver weights(const_cast<void*>(call.packed));
    const A* const bias = weights.take<A>(slots * call.H);
    const Quad* const quads = weights.take<Quad>(0);
    Carver saving(call.saved);
    const Saved saved(call, saving);

    if (call.trace && call.lengths) {
      const index rows = call.T * call.B * gates;
      clear(call.trace, rows * call.H * index{sizeof(S)}, call.stream);
    }
    for (index begin = 0; begin < call.T; begin += room.stretch) {
      const index end = begin + room.stretch < call.T ? begin + room.stretch : call.T;
      const index earliest = earliest_time(call, begin, end);
      const index rows = (end - begin) * call.B, width = gates * call.H;
      Matrix some = x;
      some.data = static_cast<const S*>(x.data) + earliest * call.B * x.stride;
      some.rows = rows;
      products.multiply_inputs(some,
                               {room.a_x, state_element<A>, rows, width, width, false});
      with_instance(plan, [&]<int tiles, bool resident>() {
        launch_turns(call, plan, begin, end, [&](index from, index to) {
          Forwards<tiles, resident> p{};
          fill(p, call, plan, room, from, to);
          p.weights = quads;
          p.bias = bias;
          p.a_x = room.a_x + (earliest_time(call, from, to) - earliest) * call.B * width;
          p.h = static_cast<A*>(call.h_n);
          p.c = static_cast<A*>(call.c_n);
          p.y = static_cast<S*>(call.y);
          p.y_t = call.B * call.y_b;
          p.y_b = call.y_b;
          p.saved = saved.slots;
          p.cells = saved.c;
          p.cells_t = saved.c_t;
          p.cells_b = saved.c_b;
          return p;
        });
      });
    }
  }

  static index backward_workspace(const BackwardCall& call) {
    if (call.B == 0) return 0;
    Carver carver(nullptr);
    BackwardRoom(call, choose(call, call.device, true), carver);
    return carver.used();
  }

  static void backward(const BackwardCall& call) {
    const OnDevice current(call.device);
    if (call.T == 0 || call.B == 0) {
      clear_gradients<Cell, S, A>(call);
      if (call.B == 0) return;
    }
    const Plan plan = choose(call, call.device, true);
    Carver carver(call.workspace);
    const BackwardRoom room(call, plan, carver);
    A* const dh = static_cast<A*>(call.dh0);
    A* const dc = static_cast<A*>(call.dc0);
    prepare(call, plan, room, static_cast<const A*>(call.dh_n),
            static_cast<const A*>(call.dc_n), dh, dc, false);
    if (call.T == 0) return;
    const index H = call.H, rows = call.T * call.B;

    const auto previous = [&](const A* mask) {
      const Previous<Stored> kernel{call,
                                    Stored::of(call.precision),
                                    static_cast<const S*>(call.y),
                                    call.B * call.y_b,
                                    call.y_b,
                                    static_cast<const A*>(call.h0),
                                    room.h_prev,
                                    room.drawn.masks(call),
                                    mask};
      launch_each(kernel, rows * H, call.device, call.stream);
    };
    // Products see it masked, what passes them by does not.
    const bool differs = Cell::has_direct && room.drawn.mask;
    if (!differs || room.saved) previous(room.drawn.mask);
    const Element element = element_of(call.precision);
    const Matrix x = matrix_of_x<Stored>(call, element, room.x, room.drawn.masks(call));
    const auto products = products_of(call, room);
    const Matrix h_prev{room.h_prev, element, rows, H, H, false};
    Carver saving(call.saved ? call.saved : room.saved);
    const Saved saved(call, saving);
    if (room.saved) {
      compute_again(call, room, products, x, h_prev, saved);
    }
    if (differs) previous(nullptr);
    if (room.dweight_ch) {
      const index bytes = call.B * Cell::peephole_count * H * index{sizeof(A)};
      clear(room.dweight_ch, bytes, call.stream);
    }
    with_instance(plan, [&]<int tiles, bool resident>() {
      launch_turns(call, plan, 0, call.T + 1, [&](index from, index to) {
        Backwards<tiles, resident> p{};
        fill(p, call, plan, room, from, to);
        p.weights = static_cast<const Quad*>(call.packed);
        p.h_prev = room.h_prev;
        p.y = static_cast<const S*>(call.y);
        p.y_t = call.B * call.y_b;
        p.y_b = call.y_b;
        p.saved = saved.slots;
        p.cells = cells_of(call, saved);
        p.dy = static_cast<const S*>(call.dy);
        p.dy_t = call.dy_t;
        p.dy_b = call.dy_b;
        p.units.dcells = static_cast<const A*>(call.dcells);
        p.units.dcells_t = call.dcells_t;
        p.units.dcells_b = call.dcells_b;
        p.units.any |= call.dcells != nullptr;
        p.dh = dh;
        p.dc = dc;
        p.da = room.da;
        p.bptt = call.options.bptt < call.T ? static_cast<int>(call.options.bptt) : 0;
        p.units.dweight_ch = room.dweight_ch;
        return p;
      });
    });
    if (differs) previous(room.drawn.mask);

    const index da_stride = slots * H;
    products.write_gradients(
        call, {room.da + first_input * H, element, rows, gates * H, da_stride, false}, x,
        h_prev, [&](int slot, int count) {
          return Matrix{room.da + slot * H, element, rows, count * H, da_stride, true};
        });
    BiasGradients<Stored> bias{Stored::of(call.precision),
                               room.da,
                               rows,
                               H,
                               slots,
                               {},
                               {},
                               static_cast<S*>(call.dbias_ih),
                               static_cast<S*>(call.dbias_hh)};
    blocks_of_slots<Cell>(bias.input_block, bias.recurrent_block);
    if (bias.dbias_ih || bias.dbias_hh) launch_columns(bias, call.stream);
    if constexpr (Cell::peephole_count > 0) {
      if (!room.dweight_ch || !call.dvectors.weight_ch) return;
      RowSums<A> sums{};
      sums.rows = call.B;
      sums.H = H;
      for (int k = 0; k < Cell::peephole_count; ++k) {
        sums.jobs[sums.count++] = {room.dweight_ch + k * H, nullptr,
                                   Cell::peephole_count * H, 0,
                                   static_cast<A*>(call.dvectors.weight_ch) + k * H};
      }
      launch_sums(sums, call.stream);
    }
  }

  static Plan choose(const Sizes& p, int device, bool backward) {
    return backward
               ? choose_plan(p, device, work_of<BackwardEngine>(), instances<Backwards>())
               : choose_plan(p, device, work_of<ForwardEngine>(), instances<Forwards>());
  }

 private:
  static index packed_quads(index H, bool backward) {
    return backward ? BackwardEngine::packed_quads(H) : ForwardEngine::packed_quads(H);
  }

  template <class Engine>
  static Work work_of() {
    return {P::on_matrix_units,  sizeof(E),        Engine::octets,
            Engine::group_units, Engine::segments, DepthBlock<P>::depth,
            Engine::held};
  }

  template <template <int, bool> class Recurrence>
  static std::span<const Instance> instances() {
    static const std::vector<Instance> all = [] {
      std::vector<Instance> list;
      for_each_instance([&]<int tiles, bool resident>() {
        using Kernel = Recurrence<tiles, resident>;
        list.push_back(
            {tiles, resident, Kernel::Engine::lay_out, clusters_at_once<Kernel>});
      });
      return list;
    }();
    return all;
  }

  struct Saved {
    S* slots;
    A* c;
    index c_t, c_b;
    // One piece of memory, c before the smaller slots: so much for each step and row.
    Saved(const Call& call, Carver& carver)
        : c(static_cast<A*>(call.cells)), c_t(call.cells_t), c_b(call.cells_b) {
      const index count = call.T * call.B * call.H;
      const bool keeps_c = Cell::has_c && !c;
      const index of_c = keeps_c ? count * index{sizeof(A)} : 0;
      const bool has_slots = saves_slots(Cell::saves, call.options);
      const index of_slots = has_slots ? count * Layer::slots * index{sizeof(S)} : 0;
      char* const all = carver.take<char>(of_c + of_slots);
      slots = all && has_slots ? reinterpret_cast<S*>(all + of_c) : nullptr;
      if (!keeps_c) return;
      c = reinterpret_cast<A*>(all);
      c_t = call.B * call.H;
      c_b = call.H;
    }
  };
  static Cells<A> cells_of(const Call& call, const Saved& saved) {
    return {static_cast<const A*>(call.c0), saved.c, saved.c_t, saved.c_b};
  }
  // Scratch memory that both directions have.
  struct Room {
    E* operand;
    Drawn<A> drawn;
    void* matmul;
    Room(const Call& call, const Plan& plan, int segments, Carver& carver)
        : operand(
              carver.take<E>(operands_in_turn * operand_rows(plan) * segments * plan.P)),
          drawn(call, carver),
          matmul(carver.take<char>(matmul_workspace)) {}
    static index operand_rows(const Plan& plan) {
      return index{plan.row_groups} * plan.tiles * 8;
    }
  };
  struct ForwardRoom : Room {
    index stretch;
    A* a_x;
    S* x;  // a copy, or null
    ForwardRoom(const ForwardCall& call, const Plan& plan, Carver& carver)
        : Room(call, plan, 1, carver), stretch(call.T) {
      constexpr index most_bytes = index{256} << 20;
      const index per_step = call.B * gates * call.H * index{sizeof(A)};
      const index fit = most_bytes / per_step > 1 ? most_bytes / per_step : 1;
      if (fit < stretch) stretch = fit;
      a_x = carver.take<A>(stretch * call.B * gates * call.H);
      x = row_stride(call) ? nullptr : carver.take<S>(call.T * call.B * call.I);
    }
  };
  struct BackwardRoom : Room {
    S *da, *h_prev;
    S* x;           // a copy, or null
    A* dweight_ch;  // or null
    char* saved;    // where that is computed again, from
    A *bias, *sums;
    BackwardRoom(const BackwardCall& call, const Plan& plan, Carver& carver)
        : Room(call, plan, gates, carver),
          da(carver.take<S>(call.T * call.B * slots * call.H)),
          h_prev(carver.take<S>(call.T * call.B * call.H)),
          x(row_stride(call) && !call.lengths ? nullptr
                                              : carver.take<S>(call.T * call.B * call.I)),
          dweight_ch(call.vectors.weight_ch
                         ? carver.take<A>(call.B * Cell::peephole_count * call.H)
                         : nullptr),
          saved(nullptr),
          bias(nullptr),
          sums(nullptr) {
      if (call.saved || saved_bytes(call) == 0) return;
      saved = carver.take<char>(saved_bytes(call));
      bias = carver.take<A>(slots * call.H);
      sums = sizeof(S) == sizeof(A) ? reinterpret_cast<A*>(saved)
                                    : carver.take<A>(call.T * call.B * slots * call.H);
    }
  };

  static UnitOptions<A> units_of(const Call& call, const Room& room) {
    auto units = UnitOptions<A>::of(call);
    units.mask = room.drawn.mask;
    units.kept = room.drawn.kept;
    return units;
  }
  static index earliest_time(const Sizes& p, index begin, index end) {
    return p.reverse ? p.T - end : begin;
  }

  // The slots, of h' as the product saw it.
  static void compute_again(const BackwardCall& call, const BackwardRoom& room,
                            const LayerProducts<Cell, S>& products, const Matrix& x,
                            const Matrix& h_prev, const Saved& saved) {
    const index H = call.H, rows = call.T * call.B;
    constexpr Element sums = state_element<A>;
    const auto to = [&](int slot, int count) {
      return Matrix{room.sums + slot * H, sums, rows, count * H, slots * H, false};
    };
    products.multiply_inputs(x, to(first_input, gates));
    products.multiply_recurrent(h_prev, to, [](int slot) { return slot >= first_input; });
    pack_bias<Cell, Stored>(call.precision, call.bias_ih, call.bias_hh, room.bias, H,
                            call.device, call.stream);
    const SlotsAgain<CellOf, A> again{
        call,      units_of(call, room),  room.drawn.masks(call),
        room.bias, cells_of(call, saved), room.sums};
    launch(again, shape_of_each(rows * H, call.device), call.stream);
    if constexpr (sizeof(S) != sizeof(A)) {
      const index width = slots * H, step = call.B * width;
      convert({room.sums, step, width, saved.slots, step, width, call.T, call.B, width,
               sums, element_of(call.precision)},
              call.device, call.stream);
    }
  }

  static LayerProducts<Cell, S> products_of(const Call& call, const Room& room) {
    return {call, element_of(call.precision), room.matmul, 0};
  }

  static void prepare(const Call& call, const Plan& plan, const Room& room, const A* from,
                      const A* c_from, A* state, A* c_state, bool forward) {
    room.drawn.draw(call, Cell::has_c);
    const index rows = Room::operand_rows(plan);
    const index segments = forward ? 1 : gates;
    const int group_units =
        forward ? ForwardEngine::group_units : BackwardEngine::group_units;
    const Prepare<P> start{call,
                           P::of(call.precision),
                           from,
                           c_from,
                           state,
                           Cell::has_c ? c_state : nullptr,
                           room.operand,
                           rows,
                           segments,
                           plan.P,
                           index{plan.unit_groups} * group_units,
                           forward,
                           room.drawn.masks(call),
                           room.drawn.mask};
    launch_each(start, operands_in_turn * rows * segments * plan.P, call.device,
                call.stream);
  }

  static void fill(Recurrence<P>& p, const Call& call, const Plan& plan, const Room& room,
                   index begin, index end) {
    static_cast<Sizes&>(p) = call;
    p.precision = P::of(call.precision);
    p.plan = plan;
    p.begin = begin;
    p.end = end;
    p.operand = room.operand;
    p.masks = room.drawn.masks(call);
    p.units = units_of(call, room);
  }

  // Queues turns [begin, end): kernel(begin, end), or for each turn a launch of its own.
  template <class F>
  static void launch_turns(const Call& call, const Plan& plan, index begin, index end,
                           const F& kernel) {
    const Launch shape = shape_of(plan);
    if (plan.exchange == Exchange::step) {
      const auto turn = [&](index i) { return kernel(begin + i, begin + i + 1); };
      launch_in_turn(end - begin, turn, shape, call.stream);
    } else {
      launch(kernel(begin, end), shape, call.stream);
    }
  }

  template <class F>
  static void with_instance(const Plan& plan, const F& f) {
    for_each_instance([&]<int tiles, bool resident>() {
      if (plan.tiles == tiles && plan.resident == resident) {
        f.template operator()<tiles, resident>();
      }
    });
  }
};

}  // namespace fusedrnn::cuda
