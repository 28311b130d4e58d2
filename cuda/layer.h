// This header runs one layer in one direction on a GPU: the products before and after,
// and the recurrence.
//
//   forward   W x for a time block as one product, then the recurrence over it
//   backward  the recurrence over all times, with db, then products for dx, dW and dR
//
// Arrays are as in csrc/contract.h, with these differences: states, c and peepholes are
// float32 if storage has 16 bits; only the last axis of x must be contiguous; rows of y
// and dx are at a constant distance (y_t = B y_b). Everything is queued on the call's
// stream.
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
  // The properties of an engine that packed weights and the estimate of a plan need are
  // alike in all of them.
  using ForwardEngine = typename Forwards<1, false>::Engine;
  using BackwardEngine = typename Backwards<1, false>::Engine;

  // Calls f.operator()<tiles, resident>() for each recurrence that is compiled: exact
  // float64 has the plain one only, and weights stay in registers only for the matrix
  // units.
  template <class F>
  static void for_each_instance(const F& f) {
    f.template operator()<1, false>();
    if constexpr (sizeof(A) == 4) f.template operator()<4, false>();
    if constexpr (P::on_matrix_units && gates > 1) f.template operator()<1, true>();
  }

 public:
  static index packed_bytes(index H, bool backward) {
    Arena arena(nullptr);
    if (!backward) arena.take<A>(slots * H);
    arena.take<Quad>(packed_quads(H, backward));
    return arena.used();
  }

  static void pack(const PackCall& call) {
    const OnDevice current(call.device);
    const index H = call.H;
    Arena arena(call.packed);
    if (!call.backward) {
      pack_bias<Cell, Stored>(call.precision, call.bias_ih, call.bias_hh,
                              arena.take<A>(slots * H), H, call.device, call.stream);
    }
    const index quads = packed_quads(H, call.backward);
    PackWeights<P> weights{
        P::of(call.precision),
        static_cast<const S*>(call.weight_hh),
        arena.take<Quad>(quads),
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

  // Returns the bytes of what backward needs beside x, y and cells: slots as stored and,
  // without cells, c as a state.
  static index saved_bytes(const Call& call) {
    Arena arena(nullptr);
    Saved(call, arena);
    return arena.used();
  }

  static index forward_workspace(const ForwardCall& call) {
    if (call.B == 0) return 0;
    Arena arena(nullptr);
    ForwardScratch(call, choose_for(call, false), arena);
    return arena.used();
  }

  static void forward(const ForwardCall& call) {
    if (call.B == 0) return;
    const OnDevice current(call.device);
    const Plan plan = choose_for(call, false);
    Arena arena(call.workspace);
    const ForwardScratch scratch(call, plan, arena);
    prepare(call, plan, scratch, static_cast<const A*>(call.h0),
            static_cast<const A*>(call.c0), static_cast<A*>(call.h_n),
            static_cast<A*>(call.c_n), true);
    const Matrix x = matrix_of_x<Stored>(call, element_of(call.precision), scratch.x, {});
    const auto products = products_of(call, scratch);
    Arena weights(const_cast<void*>(call.packed));
    const A* const bias = weights.take<A>(slots * call.H);
    const Quad* const quads = weights.take<Quad>(0);
    Arena saving(call.saved);
    const Saved saved(call, saving);

    if (call.trace && call.lengths) {
      const index rows = call.T * call.B * gates;
      clear(call.trace, rows * call.H * index{sizeof(S)}, call.stream);
    }
    for (index begin = 0; begin < call.T; begin += scratch.time_block) {
      const index end =
          begin + scratch.time_block < call.T ? begin + scratch.time_block : call.T;
      const index earliest = earliest_time(call, begin, end);
      const index rows = (end - begin) * call.B, width = gates * call.H;
      products.multiply_inputs(
          rows_of<S>(x, earliest * call.B, rows),
          {scratch.a_x, state_element<A>, rows, width, width, false});
      with_instance(plan, [&]<int tiles, bool resident>() {
        launch_iterations(call, plan, begin, end, [&](index from, index to) {
          Forwards<tiles, resident> p{};
          fill(p, call, plan, scratch, from, to);
          p.weights = quads;
          p.bias = bias;
          p.a_x =
              scratch.a_x + (earliest_time(call, from, to) - earliest) * call.B * width;
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
    Arena arena(nullptr);
    BackwardScratch(call, choose_for(call, true), arena);
    return arena.used();
  }

  static void backward(const BackwardCall& call) {
    const OnDevice current(call.device);
    if (call.T == 0 || call.B == 0) {
      clear_gradients<Cell, S, A>(call);
      if (call.B == 0) return;
    }
    const Plan plan = choose_for(call, true);
    Arena arena(call.workspace);
    const BackwardScratch scratch(call, plan, arena);
    A* const dh = static_cast<A*>(call.dh0);
    A* const dc = static_cast<A*>(call.dc0);
    prepare(call, plan, scratch, static_cast<const A*>(call.dh_n),
            static_cast<const A*>(call.dc_n), dh, dc, false);
    if (call.T == 0) return;
    const index H = call.H, rows = call.T * call.B;

    const std::vector<Entering> entering = entering_of(call, scratch);
    const Element element = element_of(call.precision);
    const Matrix x =
        matrix_of_x<Stored>(call, element, scratch.x, scratch.mask_arrays.masks(call));
    const auto products = products_of(call, scratch);
    Arena saving(call.saved ? call.saved : scratch.saved);
    const Saved saved(call, saving);
    if (scratch.saved) {
      recompute(call, scratch, products, x, entering.front().h, saved);
    }
    if (scratch.dweight_ch) {
      const index bytes = call.B * Cell::peephole_count * H * index{sizeof(A)};
      clear(scratch.dweight_ch, bytes, call.stream);
    }
    with_instance(plan, [&]<int tiles, bool resident>() {
      launch_iterations(call, plan, 0, call.T + 1, [&](index from, index to) {
        Backwards<tiles, resident> p{};
        fill(p, call, plan, scratch, from, to);
        p.weights = static_cast<const Quad*>(call.packed);
        p.h = {Stored::of(call.precision), static_cast<const A*>(call.h0),
               static_cast<const S*>(call.y), call.B * call.y_b, call.y_b};
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
        p.da = scratch.da;
        p.dbias = scratch.dbias;
        p.bptt = call.options.bptt < call.T ? static_cast<int>(call.options.bptt) : 0;
        p.units.dweight_ch = scratch.dweight_ch;
        return p;
      });
    });

    const index da_stride = slots * H;
    products.write_gradients(
        call, {scratch.da + first_input * H, element, rows, gates * H, da_stride, false},
        x, entering, [&](int slot, int count) {
          return Matrix{scratch.da + slot * H, element, rows, count * H, da_stride, true};
        });
    if (scratch.dbias) {
      BiasGradients<Stored> bias{Stored::of(call.precision),
                                 scratch.dbias,
                                 Scratch::operand_rows(plan) / 2,
                                 H,
                                 slots,
                                 {},
                                 {},
                                 static_cast<S*>(call.dbias_ih),
                                 static_cast<S*>(call.dbias_hh)};
      blocks_of_slots<Cell>(bias.input_block, bias.recurrent_block);
      launch_columns(bias, call.stream);
    }
    if constexpr (Cell::peephole_count > 0) {
      if (!scratch.dweight_ch || !call.dvectors.weight_ch) return;
      RowSums<A> sums{};
      sums.rows = call.B;
      sums.H = H;
      for (int k = 0; k < Cell::peephole_count; ++k) {
        sums.jobs[sums.count++] = {scratch.dweight_ch + k * H, nullptr,
                                   Cell::peephole_count * H, 0,
                                   static_cast<A*>(call.dvectors.weight_ch) + k * H};
      }
      launch_sums(sums, call.stream);
    }
  }

  static Plan choose(const Sizes& p, int device, bool backward) {
    return choose_plan(p, device, work(backward), instances(backward));
  }
  // A backward that keeps weights in registers has none for activations that an option
  // selects: such a call keeps them elsewhere.
  static Plan choose_for(const Call& call, bool backward) {
    if (!backward || !replaces(call.options.activations)) {
      return choose(call, call.device, backward);
    }
    static const std::vector<Instance> others = [] {
      std::vector<Instance> list;
      for (const Instance& i : instances(true)) {
        if (!i.resident) list.push_back(i);
      }
      return list;
    }();
    return choose_plan(call, call.device, work(true), others);
  }
  static std::vector<Candidate> candidates(const Sizes& p, int device, bool backward) {
    return cuda::candidates(p, device, work(backward), instances(backward));
  }

 private:
  static Work work(bool backward) {
    return backward ? work_of<BackwardEngine>() : work_of<ForwardEngine>();
  }
  static std::span<const Instance> instances(bool backward) {
    return backward ? instances_of<Backwards>() : instances_of<Forwards>();
  }
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
  static std::span<const Instance> instances_of() {
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
    // All is one block of memory with c before the smaller slots: a constant size per
    // step and row.
    Saved(const Call& call, Arena& arena)
        : c(static_cast<A*>(call.cells)), c_t(call.cells_t), c_b(call.cells_b) {
      const index count = call.T * call.B * call.H;
      const bool keeps_c = Cell::has_c && !c;
      const index of_c = keeps_c ? count * index{sizeof(A)} : 0;
      const bool has_slots = saves_slots(Cell::saves, call.options);
      const index of_slots = has_slots ? count * Layer::slots * index{sizeof(S)} : 0;
      char* const all = arena.take<char>(of_c + of_slots);
      slots = all && has_slots ? reinterpret_cast<S*>(all + of_c) : nullptr;
      if (!keeps_c) return;
      c = reinterpret_cast<A*>(all);
      c_t = call.B * call.H;
      c_b = call.H;
    }
  };
  static States<Exact<A>> cells_of(const Call& call, const Saved& saved) {
    return {{}, static_cast<const A*>(call.c0), saved.c, saved.c_t, saved.c_b};
  }
  // Scratch is the scratch memory that both directions have.
  struct Scratch {
    E* operand;
    MaskArrays<A> mask_arrays;
    void* matmul;
    Scratch(const Call& call, const Plan& plan, int segments, Arena& arena)
        : operand(
              arena.take<E>(operand_buffers * operand_rows(plan) * segments * plan.P)),
          mask_arrays(call, arena),
          matmul(arena.take<char>(matmul_workspace)) {}
    static index operand_rows(const Plan& plan) {
      return index{plan.row_groups} * plan.tiles * 8;
    }
  };
  struct ForwardScratch : Scratch {
    index time_block;
    A* a_x;
    S* x;  // a copy, or null
    ForwardScratch(const ForwardCall& call, const Plan& plan, Arena& arena)
        : Scratch(call, plan, 1, arena), time_block(call.T) {
      constexpr index most_bytes = index{256} << 20;
      const index per_step = call.B * gates * call.H * index{sizeof(A)};
      const index fit = most_bytes / per_step > 1 ? most_bytes / per_step : 1;
      if (fit < time_block) time_block = fit;
      a_x = arena.take<A>(time_block * call.B * gates * call.H);
      x = row_stride(call) ? nullptr : arena.take<S>(call.T * call.B * call.I);
    }
  };
  struct BackwardScratch : Scratch {
    S* da;
    S* h_entering;          // (T, B, H), or (B, H) of the first step; or null
    S* x;                   // a copy, or null
    A *dbias, *dweight_ch;  // or null
    char* saved;            // recomputed values, from bias and sums; or null
    A *bias, *sums;
    BackwardScratch(const BackwardCall& call, const Plan& plan, Arena& arena)
        : Scratch(call, plan, gates, arena),
          da(arena.take<S>(call.T * call.B * slots * call.H)),
          h_entering(call.T == 0                 ? nullptr
                     : copies_entering(call)     ? arena.take<S>(call.T * call.B * call.H)
                     : call.h0 && !stores_states ? arena.take<S>(call.B * call.H)
                                                 : nullptr),
          x(row_stride(call) && !call.lengths ? nullptr
                                              : arena.take<S>(call.T * call.B * call.I)),
          dbias(call.dbias_ih || call.dbias_hh
                    ? arena.take<A>(Scratch::operand_rows(plan) / 2 * slots * call.H)
                    : nullptr),
          dweight_ch(call.vectors.weight_ch
                         ? arena.take<A>(call.B * Cell::peephole_count * call.H)
                         : nullptr),
          saved(nullptr),
          bias(nullptr),
          sums(nullptr) {
      if (call.saved || saved_bytes(call) == 0) return;
      saved = arena.take<char>(saved_bytes(call));
      bias = arena.take<A>(slots * call.H);
      sums = sizeof(S) == sizeof(A) ? reinterpret_cast<A*>(saved)
                                    : arena.take<A>(call.T * call.B * slots * call.H);
    }
  };

  static constexpr bool stores_states = sizeof(S) == sizeof(A);

  // Returns whether products need a copy of h' that enters the steps: R reads it masked,
  // or it is not y of the step before, or all rows must be one matrix.
  static bool copies_entering(const BackwardCall& call) {
    const bool recomputes = !call.saved && saved_bytes(call) > 0;
    return call.lengths || call.resets || drops(call.options) || recomputes ||
           call.T == 1;
  }
  // Returns h' that enters the steps as R reads it, after queueing the copy if there is
  // one. The step from the initial state is the first part, because 16 bits round a sum
  // once more after each.
  static std::vector<Entering> entering_of(const BackwardCall& call,
                                           const BackwardScratch& scratch) {
    const index B = call.B, H = call.H, rows = call.T * B;
    const Element element = element_of(call.precision);
    if (copies_entering(call)) {
      const Previous<Stored> kernel{call,
                                    Stored::of(call.precision),
                                    static_cast<const S*>(call.y),
                                    B * call.y_b,
                                    call.y_b,
                                    static_cast<const A*>(call.h0),
                                    scratch.h_entering,
                                    scratch.mask_arrays.masks(call),
                                    scratch.mask_arrays.mask};
      launch_each(kernel, rows * H, call.device, call.stream);
      return {{0, {scratch.h_entering, element, rows, H, H, false}}};
    }
    std::vector<Entering> parts;
    if (call.h0) {
      const void* first = call.h0;
      if constexpr (!stores_states) {
        first = scratch.h_entering;
        convert(
            {call.h0, 0, H, scratch.h_entering, 0, H, 1, B, H, state_element<A>, element},
            call.device, call.stream);
      }
      parts.push_back({call.reverse ? rows - B : 0, {first, element, B, H, H, false}});
    }
    const Matrix y{call.y, element, rows, H, call.y_b, false};
    parts.push_back(
        {call.reverse ? 0 : B, rows_of<S>(y, call.reverse ? B : 0, rows - B)});
    return parts;
  }

  static UnitOptions<A> units_of(const Call& call, const Scratch& scratch) {
    auto units = UnitOptions<A>::of(call);
    units.mask = scratch.mask_arrays.mask;
    units.zoneout_bits = scratch.mask_arrays.zoneout_bits;
    return units;
  }
  static index earliest_time(const Sizes& p, index begin, index end) {
    return p.reverse ? p.T - end : begin;
  }

  // Recomputes the slots; h_prev is h' as the product read it.
  static void recompute(const BackwardCall& call, const BackwardScratch& scratch,
                        const LayerProducts<Cell, S>& products, const Matrix& x,
                        const Matrix& h_prev, const Saved& saved) {
    const index H = call.H, rows = call.T * call.B;
    constexpr Element sums = state_element<A>;
    const auto to = [&](int slot, int count) {
      return Matrix{scratch.sums + slot * H, sums, rows, count * H, slots * H, false};
    };
    products.multiply_inputs(x, to(first_input, gates));
    products.multiply_recurrent(h_prev, to, [](int slot) { return slot >= first_input; });
    pack_bias<Cell, Stored>(call.precision, call.bias_ih, call.bias_hh, scratch.bias, H,
                            call.device, call.stream);
    const RecomputeSlots<CellOf, A> kernel{
        call,         units_of(call, scratch), scratch.mask_arrays.masks(call),
        scratch.bias, cells_of(call, saved),   scratch.sums};
    launch(kernel, shape_of_each(rows * H, call.device), call.stream);
    if constexpr (sizeof(S) != sizeof(A)) {
      const index width = slots * H, step = call.B * width;
      convert({scratch.sums, step, width, saved.slots, step, width, call.T, call.B, width,
               sums, element_of(call.precision)},
              call.device, call.stream);
    }
  }

  static LayerProducts<Cell, S> products_of(const Call& call, const Scratch& scratch) {
    return {call, element_of(call.precision), scratch.matmul, 0};
  }

  static void prepare(const Call& call, const Plan& plan, const Scratch& scratch,
                      const A* from, const A* c_from, A* state, A* c_state,
                      bool forward) {
    scratch.mask_arrays.draw(call, Cell::has_c);
    const index rows = Scratch::operand_rows(plan);
    const index segments = forward ? 1 : gates;
    const int group_units =
        forward ? ForwardEngine::group_units : BackwardEngine::group_units;
    const Prepare<P> start{call,
                           P::of(call.precision),
                           from,
                           c_from,
                           state,
                           Cell::has_c ? c_state : nullptr,
                           scratch.operand,
                           rows,
                           segments,
                           plan.P,
                           index{plan.unit_groups} * group_units,
                           forward,
                           scratch.mask_arrays.masks(call),
                           scratch.mask_arrays.mask};
    launch_each(start, operand_buffers * rows * segments * plan.P, call.device,
                call.stream);
  }

  static void fill(Recurrence<P>& p, const Call& call, const Plan& plan,
                   const Scratch& scratch, index begin, index end) {
    static_cast<Sizes&>(p) = call;
    p.precision = P::of(call.precision);
    p.plan = plan;
    p.begin = begin;
    p.end = end;
    p.operand = scratch.operand;
    p.masks = scratch.mask_arrays.masks(call);
    p.units = units_of(call, scratch);
  }

  // Queues iterations [begin, end): one launch of kernel(begin, end), or a launch for
  // each.
  template <class F>
  static void launch_iterations(const Call& call, const Plan& plan, index begin,
                                index end, const F& kernel) {
    const Launch shape = shape_of(plan);
    Timer* timer = nullptr;
    if (timers) timer = &timers->emplace_back(call.stream);
    if (plan.exchange == Exchange::step) {
      const auto one = [&](index i) { return kernel(begin + i, begin + i + 1); };
      launch_in_order(end - begin, one, shape, call.stream);
    } else {
      launch(kernel(begin, end), shape, call.stream);
    }
    if (timer) timer->stop(call.stream);
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
