// This file has the products of one set of units with weights that are narrower than
// float32. It is compiled once for each set, with its flags, FUSEDRNN_ARCH set to
// narrow_<set> and FUSEDRNN_VECTORS to the vectors that it uses.
#include "../narrow.h"

#include "halves.h"

namespace fusedrnn::FUSEDRNN_ARCH {

namespace {

using V = Vec<float>;

// Weights for inference alone have no last panel of one vector.
template <class F, bool trains = false>
constexpr auto& panels_of = panel_table<F, shapes<V>.count - !trains>;

template <class F>
constexpr NarrowPanel panel{
    V::lanes, F::bytes / (F::per * V::lanes), F::per, F::grain, F::has_scales, F::offset};

// Does `rounds` rounds of a format's products on registers; returns the number of
// multiplications and additions.
template <class F>
double probe(index rounds) {
  constexpr int sums = F::most_sums;
  alignas(64) char some[128] = {};
  asm volatile("" : : "r"(some) : "memory");
  const auto left = F::template left<0>(some, 0);
  const auto right = F::template right<0>(some + 64);
  typename F::Sum sum[sums];
#pragma GCC unroll 24
  for (int n = 0; n < sums; ++n) sum[n] = F::Sum::broadcast(n);
  for (index round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int n = 0; n < sums; ++n) sum[n] = F::template add<0>(left, right, sum[n]);
    asm("" : : : "memory");
  }
  alignas(64) typename F::Sum kept[sums];
#pragma GCC unroll 24
  for (int n = 0; n < sums; ++n) kept[n] = sum[n];
  asm volatile("" : : "r"(kept) : "memory");
  return 2.0 * F::per / F::parts * V::lanes * sums * static_cast<double>(rounds);
}

#ifdef FUSEDRNN_WITH_TILES
void leave() { Tiles::release(); }

// Does the same for tiles.
template <class F>
double probe_tiles(index rounds) {
  alignas(64) static const char zeros[16 * 64] = {};
  constexpr int sums = 4;
  Tiles::configure(16);
  each_constant<sums>([]<int t>() { Tiles::clear<t>(); });
  Tiles::load<4>(zeros, 64);
  Tiles::load<5>(zeros, 64);
  for (index round = 0; round < rounds; ++round) {
    each_constant<sums>([]<int t>() { F::template multiply_tiles<t, 4, 5>(); });
  }
  Tiles::release();
  return 2.0 * 16 * 16 * 16 * F::per * sums * static_cast<double>(rounds);
}
template <class F>
constexpr auto probe_of = probe_tiles<F>;
#else
constexpr void (*leave)() = nullptr;
template <class F>
constexpr auto probe_of = probe<F>;
#endif

// Returns the product of a format. `put_left` is null where rows are read as they are,
// else an operand has `size` bytes for each element.
template <class F, int size>
constexpr Product product(Precision precision, const char* unit,
                          decltype(Product::pack) pack,
                          decltype(Product::put_left) put_left,
                          std::span<const PanelProduct> panels = panels_of<F>.at,
                          decltype(Product::pack_transposed) transposed = nullptr,
                          const Halves* halves = nullptr) {
  return {precision,
          unit,
          F::grain,
          size,
          panels,
          [](int width, index K) { return narrow_panel_bytes(panel<F>, width, K); },
          pack,
          transposed,
          [](index K) { return operand_bytes(K, F::grain, size); },
          put_left,
          nullptr,
          leave,
          probe_of<F>,
          halves};
}

// Packs weights that are narrow already, whatever their bytes.
template <class F>
void pack_whole(const Matrix& of, int unit_vectors, Range panels, char* to) {
  pack_narrow(panel<F>, of, unit_vectors, panels, to);
}

#ifdef FUSEDRNN_NARROW_INT8
#ifdef FUSEDRNN_WITH_TILES
using Int8Format = Bytes<64>;
constexpr const char* int8_unit = "AMX";
#elif defined(FUSEDRNN_WITH_ROW_PAIRS)
using Int8Format = Bytes<8>;
constexpr const char* int8_unit = "NEON I8MM";
#else
using Int8Format = Bytes<4>;
constexpr const char* int8_unit = Int8::unit;
#endif
constinit const Product int8 = product<Int8Format, 1>(
    Precision::int8, int8_unit, pack_whole<Int8Format>, put_int8<Int8Format::grain>);
#endif

#ifdef FUSEDRNN_NARROW_BFLOAT16
#if defined(FUSEDRNN_WITH_TILES)
using Bfloat16Format = TilePairs;
constexpr bool is_widened = false;
constexpr const char* bfloat16_unit = "AMX";
#elif defined(FUSEDRNN_HAS_PAIRS)
using Bfloat16Format = NativePairs<Pairs>;
constexpr bool is_widened = false;
constexpr const char* bfloat16_unit = Pairs::unit;
#else
using Bfloat16Format = WidenedPairs;
constexpr bool is_widened = true;
constexpr const char* bfloat16_unit = "FMA";
#endif
constexpr int grain = Bfloat16Format::grain, of_operand = is_widened ? 4 : 2;
constinit const Halves halves{
    put_halves_left<is_widened, grain>,
    {panels_of<Bfloat16Format, true>.at[0].tile, pack_right_halves<grain>,
     pack_left_halves<is_widened, grain>,
     add_products_of_halves<Bfloat16Format, of_operand>, add_outer_products_halves},
    widen,
    narrow_row};
constinit const Product bfloat16 = product<Bfloat16Format, of_operand>(
    Precision::bfloat16, bfloat16_unit, pack_pairs<grain>,
    put_bfloat16<is_widened, grain>, panels_of<Bfloat16Format, true>.at,
    pack_transposed_halves<grain>, &halves);
#endif

#ifdef FUSEDRNN_NARROW_FLOAT16
constinit const Product widened_float16 =
    product<Float16, 0>(Precision::float16, "FMA", pack_whole<Float16>, nullptr);
#endif

}  // namespace

extern const Narrow narrow;
constinit const Narrow narrow{{
    nullptr,
#ifdef FUSEDRNN_NARROW_INT8
    &int8,
#else
    nullptr,
#endif
#ifdef FUSEDRNN_NARROW_BFLOAT16
    &bfloat16,
#else
    nullptr,
#endif
#ifdef FUSEDRNN_NARROW_FLOAT16
    &widened_float16,
#else
    nullptr,
#endif
}};

}  // namespace fusedrnn::FUSEDRNN_ARCH
