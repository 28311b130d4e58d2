// This file has the kernels of one instruction set for one element type. It is compiled
// once for each pair, with the instruction set's flags, FUSEDRNN_ARCH set to its name and
// FUSEDRNN_ELEMENT to float or double.
#include "gradients.h"
#include "pack.h"
#include "probe.h"
#include "product.h"
#include "random.h"
#include "run.h"
#include "shapes.h"
#include "steps.h"

namespace fusedrnn::FUSEDRNN_ARCH {

namespace {

using S = FUSEDRNN_ELEMENT;
using V = Vec<S>;

struct CellTable {
  CellKernels at[variants<V>];
};

template <class Cell, int variant = 0>
constexpr void add_cell(CellTable& to, int& count) {
  to.at[count++] = cell_kernels<Cell, S, variant>();
  if constexpr (variant + 1 < sizeof(Cell::variants) / sizeof(Variant)) {
    add_cell<Cell, variant + 1>(to, count);
  }
}

constexpr CellTable cells = [] {
  CellTable table{};
  int count = 0;
  AllCells::each([&]<template <class> class Cell>() { add_cell<Cell<V>>(table, count); });
  return table;
}();

constexpr auto& panels = panel_table<Own<V>>;

void run(const Block& block) { BlockRun<S>(block).run(); }
void walk(const Block& block, int rows_at_once) { BlockRun<S>(block).walk(rows_at_once); }

void bounds(const Options& options, char* to) {
  V of[5];
  clip_bounds(options.clip, Replaced<V, true>{options.activations}, of);
  for (int n = 0; n < 5; ++n) {
    S lanes[V::lanes];
    of[n].store(lanes);
    reinterpret_cast<S*>(to)[n] = lanes[0];
  }
}

void multiply_rows(const char* a, const char* b, index n, char* to) {
  const S *const left = reinterpret_cast<const S*>(a), *const right =
                                                           reinterpret_cast<const S*>(b);
  for (index j = 0; j < n; ++j) reinterpret_cast<S*>(to)[j] = left[j] * right[j];
}

void fill(double value, index n, char* to) {
  for (index j = 0; j < n; ++j) reinterpret_cast<S*>(to)[j] = static_cast<S>(value);
}

// These pointwise functions are the same for every cell.
using Any = Steps<Rnn<V>, S>;

}  // namespace

#define FUSEDRNN_TABLE_(element) kernels_##element
#define FUSEDRNN_TABLE(element) FUSEDRNN_TABLE_(element)

extern const Kernels FUSEDRNN_TABLE(FUSEDRNN_ELEMENT);
constinit const Kernels FUSEDRNN_TABLE(FUSEDRNN_ELEMENT){
    sizeof(S),
    V::lanes,
    {Precision::element, "FMA", 1, 0, panels.at, panel_bytes<S>, pack_panels<S>,
     pack_transposed<S>, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
    {gradient_tile<S>, pack_right<S>, pack_left<S>, add_products<S>,
     add_outer_products<S>},
    cells.at,
    run,
    walk,
    Any::put,
    Any::finish,
    Any::store_dh0,
    Any::store_dh,
    bounds,
    draw_zoneout<S>,
    draw_recurrent<S>,
    multiply_rows,
    fill,
    drop_out<S>,
    pack_bias<S>,
    add_columns<S>,
    write_biases<S>,
};

// The parts that both element types share are compiled with float.
#ifdef FUSEDRNN_WITH_ISA

extern const Kernels kernels_double;

namespace {

template <class E, class F>
void on_each_vector(const E* x, E* y, index n, F f) {
  using W = Vec<E>;
  for (index at = 0; at < n; at += W::lanes) {
    store_upto(f(load_upto<W>(x + at, n - at)), y + at, n - at);
  }
}
template <class E>
void sigmoid_of(const E* x, E* y, index n) {
  on_each_vector(x, y, n, [](Vec<E> v) { return sigmoid(v); });
}
template <class E>
void tanh_of(const E* x, E* y, index n) {
  on_each_vector(x, y, n, [](Vec<E> v) { return tanh(v); });
}

template <class E>
void exp_below_0_of(const E* x, E* y, index n) {
  on_each_vector(x, y, n, [](Vec<E> v) { return exp_below_0(v); });
}
template <class E>
void exp_minus_1_of(const E* x, E* y, index n) {
  on_each_vector(x, y, n, [](Vec<E> v) { return exp_minus_1(v); });
}
template <class E>
void log_1_plus_of(const E* x, E* y, index n) {
  on_each_vector(x, y, n, [](Vec<E> v) { return log_1_plus(v); });
}

constexpr MathEntry math[] = {
    {"sigmoid", sigmoid_of<float>, sigmoid_of<double>},
    {"tanh", tanh_of<float>, tanh_of<double>},
    {"exp_below_0", exp_below_0_of<float>, exp_below_0_of<double>},
    {"exp_minus_1", exp_minus_1_of<float>, exp_minus_1_of<double>},
    {"log_1_plus", log_1_plus_of<float>, log_1_plus_of<double>},
};

}  // namespace

extern const Base base;
constinit const Base base{&kernels_float,
                          &kernels_double,
                          math,
                          {multiply_add<float>, multiply_add<double>, read_all<float>}};

#endif

}  // namespace fusedrnn::FUSEDRNN_ARCH
