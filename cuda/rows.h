// This header has the kernels beside the recurrence: packing, the initial operand and
// state, rows gathered for the products of the gradients, sums of columns. They are
// compiled once, in rows.cu.
#pragma once

#include "../csrc/contract.h"
#include "../csrc/random.h"
#include "kernels.h"
#include "masks.h"
#include "product.h"
#include "runtime.h"

namespace fusedrnn::cuda {

// Returns 0 if element n of row (i, j) is dropped, else 1 / (1 - p).
FUSEDRNN_DEVICE double dropout_factor(std::uint64_t seed, std::uint32_t draw,
                                      std::uint32_t where, double p, index i, index j,
                                      index n) {
  constexpr index block = Generator::block;
  std::uint32_t words[4];
  Generator(seed, draw, where)
      .words(static_cast<std::uint32_t>(n / (4 * block) * block + n % block),
             static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(j), words);
  return words[n / block % 4] < Generator::threshold(p) ? 0 : 1 / (1 - p);
}

// Returns the launch of a kernel of `count` independent elements: a few to a thread of a
// full device.
inline Launch shape_of_each(index count, int ordinal) {
  const index most = index{device(ordinal).multiprocessors} * 8;
  const index blocks = ceil_div(count, most_threads);
  const index used = blocks < 1 ? 1 : blocks < most ? blocks : most;
  return {static_cast<int>(used), 1, most_threads, 0, false, false};
}

// Queues a kernel of `count` independent elements.
template <class Kernel>
void launch_each(const Kernel& kernel, index count, int device, Stream stream);

// Calls f(i) for every i below count, shared among all threads of a grid of one row.
template <class F>
FUSEDRNN_DEVICE void for_each(index count, const F& f) {
  const index step = index{blocks_x()} * threads();
#pragma unroll 1
  for (index i = index{block_x()} * threads() + thread(); i < count; i += step) f(i);
}
// Calls f(t, b, n, i) for every element of (T, B, N); i is its number.
template <class F>
FUSEDRNN_DEVICE void for_each(index T, index B, index N, const F& f) {
  for_each(T * B * N, [&](index i) { f(i / N / B, i / N % B, i % N, i); });
}

// Packs weight_hh (gates·H, H) as Product reads it: for forward, where an octet is a
// gate, or for backward, transposed, where the depth has a segment for each gate.
template <class P>
struct PackWeights {
  using E = typename P::Operand;
  using S = typename P::Storage;
  using A = typename P::State;
  using Block = DepthBlock<P>;

  P precision;
  const S* weight_hh;
  Quad* to;
  index H, padded, quads;
  int octets, segments;
  bool backward;
  int recurrent_gate[4];

  FUSEDRNN_DEVICE void operator()() const {
    for_each(quads, [&](index i) {
      constexpr int parts = Block::bytes / 16, in_part = 16 / sizeof(E);
      const index part = i % parts, u = i / parts % 8;
      const int place = static_cast<int>(i / (8 * parts) % octets);
      const index block = i / (8 * parts) / octets;
      const index blocks_of_segment = padded / Block::depth;
      const index blocks = blocks_of_segment * segments;
      const index group = block / blocks, segment = block % blocks / blocks_of_segment;
      const index first = block % blocks_of_segment * Block::depth + part * in_part;
      Elements<E> value;
      for (int e = 0; e < in_part; ++e) {
        const auto [octet, element] = packed_source<P>(place, e, octets);
        const index unit = (backward ? group * octets + octet : group) * 8 + u;
        const index k = first + element;
        A weight = 0;
        if (unit < H && k < H) {
          const index row = backward ? recurrent_gate[segment] * H + k
                                     : recurrent_gate[octet] * H + unit;
          weight = precision.state(weight_hh[row * H + (backward ? unit : k)]);
        }
        value.at[e] = precision.operand(weight);
      }
      __builtin_memcpy(to + i, &value, sizeof(value));
    });
  }
};

// Packs the bias (slots, H), the sum of both biases where an input and a recurrent part
// meet in one sum.
template <class P>
struct PackBias {
  using S = typename P::Storage;
  using A = typename P::State;

  P precision;
  const S *bias_ih, *bias_hh;  // or null
  A* to;
  index H;
  int slots;
  int input_block[4], recurrent_block[4];  // of a slot, or -1

  FUSEDRNN_DEVICE void operator()() const {
    for_each(slots * H, [&](index i) {
      const index slot = i / H, unit = i % H;
      A bias = 0;
      if (bias_ih && input_block[slot] >= 0) {
        bias += precision.state(bias_ih[input_block[slot] * H + unit]);
      }
      if (bias_hh && recurrent_block[slot] >= 0) {
        bias += precision.state(bias_hh[recurrent_block[slot] * H + unit]);
      }
      to[i] = bias;
    });
  }
};

// Prepares the operand buffers and the state for iteration 0. The operand of iteration 0
// is the state that enters it, or zeros backward. The other buffers are marked as
// unwritten, except padding that no thread writes.
template <class P>
struct Prepare : Sizes {
  using E = typename P::Operand;
  using A = typename P::State;

  P precision;
  const A *from, *c_from;  // h0, c0 or their like; null: zeros
  A *state, *c_state;      // null where the cell has none
  E* operand;              // (operand_buffers, rows, segments, padded)
  index rows, segments, padded;
  index written_units;  // of a segment
  bool with_state;      // whether the operand of iteration 0 is that state
  Masks masks;
  const A* mask;  // (B, H) of recurrent dropout, or null

  FUSEDRNN_DEVICE void operator()() const {
    const index width = segments * padded, size = rows * width;
    for_each(operand_buffers * size, [&](index i) {
      const index row = i / width, unit = i % padded;
      if (i >= size && unit < written_units) {
        __builtin_memset(operand + i, unwritten & 0xff, sizeof(E));
        return;
      }
      const bool real = i < size && with_state && from && row < B && unit < H;
      const bool is_reset = real && T > 0 && masks.is_reset(time(0), row);
      A value = real && !is_reset ? from[row * H + unit] : A{0};
      if (real && mask) value *= mask[row * H + unit];
      operand[i] = precision.operand(value);
    });
    for_each(B * H, [&](index i) {
      state[i] = from ? from[i] : A{0};
      if (c_state) c_state[i] = c_from ? c_from[i] : A{0};
    });
  }
};

// Copies lengths as the recurrences read them, clamped to [0, T], because the host cannot
// check them without waiting.
struct ReadLengths {
  const void* from;  // int64 if wide, else int32
  bool wide;
  int* to;
  index T, B;

  FUSEDRNN_DEVICE void operator()() const {
    for_each(B, [&](index b) {
      const index length = wide ? static_cast<const std::int64_t*>(from)[b]
                                : static_cast<const std::int32_t*>(from)[b];
      to[b] = static_cast<int>(length < 0 ? 0 : length > T ? T : length);
    });
  }
};

// Writes (T, B, H), what R reads of the state that enters the step at each time: zero
// after a reset, and where no step is taken.
template <class P>
struct Previous : Sizes {
  using S = typename P::Storage;
  using A = typename P::State;

  P precision;
  const S* y;
  index y_t, y_b;
  const A* h0;  // or null: zeros
  S* to;
  Masks masks;
  const A* mask;  // (B, H) of recurrent dropout, or null

  FUSEDRNN_DEVICE void operator()() const {
    for_each(T, B, H, [&](index t, index b, index unit, index i) {
      const int length = masks.length(b);
      A h = 0;
      if (masks.is_within(t, length) && !masks.is_reset(t, b)) {
        const index before = masks.time_before(*this, t, length);
        if (before >= 0) {
          h = precision.state(y[before * y_t + b * y_b + unit]);
        } else if (h0) {
          h = h0[b * H + unit];
        }
        if (mask) h *= mask[b * H + unit];
      }
      to[i] = precision.storage(h);
    });
  }
};

// Gathers (T, B, width) contiguously, with zeros past a row's length, where the source
// may hold anything.
template <class P>
struct GatherRows {
  using S = typename P::Storage;

  const S* from;
  index from_t, from_b;
  S* to;
  index T, B, width;
  Masks masks;

  FUSEDRNN_DEVICE void operator()() const {
    for_each(T, B, width, [&](index t, index b, index column, index i) {
      to[i] = masks.is_active(t, b) ? from[t * from_t + b * from_b + column] : S{};
    });
  }
};

// Applies the Dropout of csrc/contract.h to (T, B, N).
template <class S>
struct DropOut : Dropout<S> {
  FUSEDRNN_DEVICE void operator()() const {
    for_each(this->T, this->B, this->N, [&](index i, index j, index n, index) {
      const double factor =
          dropout_factor(this->seed, this->draw, this->where, this->p, i, j, n);
      const S value = this->from[i * this->from_t + j * this->from_b + n];
      this->to[i * this->to_t + j * this->to_b + n] = value * static_cast<S>(factor);
    });
  }
};

// Draws the recurrent dropout: (B, n) factors of the h that R reads, one draw for a whole
// call.
template <class A>
struct DrawRecurrent {
  Options options;
  A* to;
  index B, n;

  FUSEDRNN_DEVICE void operator()() const {
    for_each(1, B, n, [&](index, index b, index unit, index i) {
      const auto draw = static_cast<std::uint32_t>(Draw::recurrent);
      to[i] = static_cast<A>(dropout_factor(options.seed, draw, options.where,
                                            options.recurrent_dropout, 0, b, unit));
    });
  }
};

// Draws which states of each unit zoneout keeps, (T, B, H): bit 0 for h, bit 1 for c.
struct DrawZoneout {
  Options options;
  bool has_c;
  std::uint8_t* to;
  index T, B, H;

  FUSEDRNN_DEVICE void operator()() const {
    constexpr index block = Generator::block;
    const index words = has_c ? 2 : 4;  // of each counter, for h
    const Generator generator(options.seed, static_cast<std::uint32_t>(Draw::zoneout),
                              options.where);
    const std::uint32_t h = Generator::threshold(options.zoneout_h);
    const std::uint32_t c = Generator::threshold(options.zoneout_c);
    for_each(T, B, H, [&](index t, index b, index unit, index i) {
      std::uint32_t drawn[4];
      generator.words(
          static_cast<std::uint32_t>(unit / (words * block) * block + unit % block),
          static_cast<std::uint32_t>(t), static_cast<std::uint32_t>(b), drawn);
      const index word = unit / block % words;
      const bool keeps_c = has_c && drawn[(word + words) % 4] < c;
      to[i] = static_cast<std::uint8_t>((drawn[word] < h) | keeps_c << 1);
    });
  }
};

// MaskArrays has the arrays by which a call's kernels mask rows and units, in its scratch
// memory.
template <class A>
struct MaskArrays {
  int* lengths;                // or null
  A* mask;                     // (B, R) factors of the h that R reads, or null
  std::uint8_t* zoneout_bits;  // (T, B, H) where zoneout draws, or null

  template <class S>
  MaskArrays(const ForwardOf<S>& call, Arena& arena)
      : lengths(call.lengths ? arena.take<int>(call.B) : nullptr),
        mask(drops(call.options) ? arena.take<A>(call.B * call.R) : nullptr),
        zoneout_bits(zones_out(call.options) && call.options.training
                         ? arena.take<std::uint8_t>(call.T * call.B * call.H)
                         : nullptr) {}

  template <class S>
  Masks masks(const ForwardOf<S>& call) const {
    return {lengths, call.resets, call.resets_t, call.resets_b};
  }
  // Queues the kernels that fill the arrays.
  template <class S>
  void draw(const ForwardOf<S>& call, bool has_c) const {
    const index T = call.T, B = call.B, H = call.H, R = call.R;
    const auto queue = [&](const auto& kernel, index count) {
      launch_each(kernel, count, call.device, call.stream);
    };
    if (lengths) queue(ReadLengths{call.lengths, call.wide_lengths, lengths, T, B}, B);
    if (mask) queue(DrawRecurrent<A>{call.options, mask, B, R}, B * R);
    if (zoneout_bits)
      queue(DrawZoneout{call.options, has_c, zoneout_bits, T, B, H}, T * B * H);
  }
};

// Reads or writes an element of any type, exactly.
FUSEDRNN_DEVICE double element_at(const void* from, Element element, index i) {
  if (element == Element::float64) return static_cast<const double*>(from)[i];
  if (element == Element::float32) return static_cast<const float*>(from)[i];
  return from_half(static_cast<const Half*>(from)[i], element == Element::bfloat16);
}
FUSEDRNN_DEVICE void put_element(double value, void* to, Element element, index i) {
  if (element == Element::float64) {
    static_cast<double*>(to)[i] = value;
  } else if (element == Element::float32) {
    static_cast<float*>(to)[i] = static_cast<float>(value);
  } else {
    const bool bfloat = element == Element::bfloat16;
    static_cast<Half*>(to)[i] = to_half(static_cast<float>(value), bfloat);
  }
}

struct Convert : Conversion {
  FUSEDRNN_DEVICE void operator()() const {
    for_each(T, B, N, [&](index i, index j, index n, index) {
      const double value = element_at(from, from_element, i * from_t + j * from_b + n);
      put_element(value, to, to_element, i * to_t + j * to_b + n);
    });
  }
};

// A thread takes a row of the batch.
struct RunTakeSteps : TakeSteps {
  FUSEDRNN_DEVICE void operator()() const {
    for_each(B, [&](index b) {
      const index end = lengths ? wide ? static_cast<const std::int64_t*>(lengths)[b]
                                       : static_cast<const std::int32_t*>(lengths)[b]
                                : T;
      int count = 0;
      for (index t = 0; t < T; ++t) {
        const bool taken = t < end && mask[t * mask_t + b * mask_b];
        places[t * B + b] = taken ? count : -1;
        repeated[0][t * B + b] = taken ? count : count - 1;
        repeated[1][t * B + b] = count;
        if (!taken) continue;
        times[count * B + b] = static_cast<int>(t);
        if (resets_of_steps) {
          resets_of_steps[count * B + b] = resets[t * resets_t + b * resets_b];
        }
        ++count;
      }
      counts[b] = count;
      for (index t = T - 1; t >= 0 && repeated[1][t * B + b] == count; --t) {
        repeated[1][t * B + b] = -1;
      }
      for (index k = count; k < T; ++k) {
        times[k * B + b] = -1;
        if (resets_of_steps) resets_of_steps[k * B + b] = false;
      }
    });
  }
};

struct RunMoveRows : MoveRows {
  FUSEDRNN_DEVICE void operator()() const {
    for_each(T, B, N, [&](index t, index b, index n, index) {
      const index source = at[t * B + b];
      const double value =
          source >= 0 ? element_at(from, from_element, source * from_t + b * from_b + n)
          : initial   ? element_at(initial, initial_element, b * N + n)
                      : 0.0;
      put_element(value, to, to_element, t * to_t + b * to_b + n);
    });
  }
};

// A thread takes a column of a row of the batch, against its direction.
struct RunSumRepeated : SumRepeated {
  FUSEDRNN_DEVICE void operator()() const {
    for_each(1, B, N, [&](index, index b, index n, index) {
      double sum = 0;
      for (index i = 0; i < T; ++i) {
        const index t = reverse ? i : T - 1 - i, after = reverse ? t + 1 : t - 1;
        const index step = at[t * B + b];
        sum += element_at(from, from_element, t * from_t + b * from_b + n);
        const bool is_last = after < 0 || after >= T || at[after * B + b] != step;
        if (!is_last) continue;
        if (step >= 0 && to) {
          put_element(sum, to, to_element, step * to_t + b * to_b + n);
        } else if (step < 0 && initial) {
          const index place = b * N + n;
          sum += element_at(initial, initial_element, place);
          put_element(sum, initial, initial_element, place);
        }
        sum = 0;
      }
    });
  }
};

// Sums each column of (rows, slots·H), which are sums of da, into the biases of its slot.
// A block sums 32 columns: each warp some rows, in order, then all warps' sums in order.
template <class P>
struct BiasGradients {
  using S = typename P::Storage;
  using A = typename P::State;

  P precision;
  const A* sums_of_da;
  index rows, H;
  int slots;
  int input_block[4], recurrent_block[4];
  S *dbias_ih, *dbias_hh;

  FUSEDRNN_DEVICE void operator()() const {
    const index column = index{block_x()} * 32 + lane(), columns = slots * H;
    const int warp = thread() / 32, warps = threads() / 32;
    A* const sums = reinterpret_cast<A*>(shared());
    A sum = 0;
    if (column < columns) {
#pragma unroll 8
      for (index row = warp; row < rows; row += warps) {
        sum += sums_of_da[row * columns + column];
      }
    }
    sums[thread()] = sum;
    sync_block();
    if (warp > 0 || column >= columns) return;
    for (int other = 1; other < warps; ++other) sum += sums[other * 32 + lane()];
    const int slot = static_cast<int>(column / H);
    const index unit = column % H;
    if (dbias_ih && input_block[slot] >= 0) {
      dbias_ih[input_block[slot] * H + unit] = precision.storage(sum);
    }
    if (dbias_hh && recurrent_block[slot] >= 0) {
      dbias_hh[recurrent_block[slot] * H + unit] = precision.storage(sum);
    }
  }
};

template <class P>
void launch_columns(const BiasGradients<P>& kernel, Stream stream);

// Computes Σ a b over the rows of H columns, for each job.
template <class A>
struct RowSums {
  static constexpr int most = 24;
  struct Job {
    const A *a, *b;  // b null: Σ a
    index a_row, b_row;
    A* to;
  };
  Job jobs[most];
  int count;
  index rows, H;

  FUSEDRNN_DEVICE void operator()() const {
    const Job& job = jobs[block_y()];
    const index column = index{block_x()} * 32 + lane();
    const int warp = thread() / 32, warps = threads() / 32;
    A* const sums = reinterpret_cast<A*>(shared());
    A sum = 0;
    if (column < H) {
#pragma unroll 4
      for (index row = warp; row < rows; row += warps) {
        const A a = job.a[row * job.a_row + column];
        sum += job.b ? a * job.b[row * job.b_row + column] : a;
      }
    }
    sums[thread()] = sum;
    sync_block();
    if (warp > 0 || column >= H) return;
    for (int other = 1; other < warps; ++other) sum += sums[other * 32 + lane()];
    job.to[column] = sum;
  }
};

template <class A>
void launch_sums(const RowSums<A>& kernel, Stream stream);

}  // namespace fusedrnn::cuda
