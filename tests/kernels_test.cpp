// This program tests the kernels without Python, for machines that only an emulator runs
// (tests/aarch64.sh). It compares every ISA of this build with the portable one in
// float64, which tests/test_kernels.py compares with the reference, and sigmoid and tanh
// with libm in long double. Results must have the same bits for any number of threads and
// any cut of the sequence.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../csrc/cpu/memory.h"
#include "../csrc/cpu/stack.h"
#include "../csrc/cpu/workforce.h"
#include "contention_test.h"
#include "products_test.h"

using namespace fusedrnn;

namespace {

int failures = 0;
int checks = 0;

void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

using Values = std::vector<double>;

// Arrays has the arrays of one layer, as doubles that are exact in float.
struct Arrays {
  index T, B, I, H;
  int gates;
  bool reverse;
  Values x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, dy, dh_n, dc_n;
  std::vector<index> lengths;  // empty without masks
  std::shared_ptr<bool[]> resets;
  Options options{INFINITY, INFINITY, 0, 0, 0, false, 0, 0, 0};
  bool row_wise = false;

  void ask_for_options() {
    options = {2, 3, 0.2, 0.3, 0.25, true, 77, 3, 0};
    row_wise = true;
  }

  Arrays(std::mt19937& random, int G, index t, index b, index i, index h, bool backwards,
         bool masked)
      : T(t), B(b), I(i), H(h), gates(G), reverse(backwards) {
    const auto fill = [&](Values& to, index size, double scale) {
      std::normal_distribution<float> normal;
      to.resize(size);
      for (double& value : to) value = static_cast<float>(normal(random) * scale);
    };
    const double narrow = 1 / std::sqrt(static_cast<double>(H));
    fill(x, T * B * I, 1);
    fill(weight_ih, G * H * I, 1 / std::sqrt(static_cast<double>(I)));
    fill(weight_hh, G * H * H, narrow);
    fill(bias_ih, G * H, narrow);
    fill(bias_hh, G * H, narrow);
    for (Values* state : {&h0, &c0, &dh_n, &dc_n}) fill(*state, B * H, 1);
    fill(dy, T * B * H, 1);
    if (!masked) return;
    for (index row = 0; row < B; ++row) lengths.push_back(row ? random() % (T + 1) : T);
    resets = std::shared_ptr<bool[]>(new bool[T * B]);
    for (index at = 0; at < T * B; ++at) resets[at] = random() % 4 == 0;
  }

  // Returns the lengths of the rows within times [first, first + steps).
  std::vector<index> lengths_within(index first, index steps) const {
    std::vector<index> within;
    for (const index length : lengths) {
      within.push_back(std::clamp<index>(length - first, 0, steps));
    }
    return within;
  }
};

// These are the results of a training step: y, h_n, c_n, then the gradients.
constexpr const char* names[] = {"y",          "h_n",        "c_n",      "dx",
                                 "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh",
                                 "dh0",        "dc0"};
using Results = std::vector<Values>;

template <class S>
std::vector<S> as(const Values& from) {
  return {from.begin(), from.end()};
}
template <class S>
Values widened(const std::vector<S>& from) {
  return {from.begin(), from.end()};
}

// Tested has a cell's kernels for an element type.
struct Tested {
  const Kernels& kernels;
  const CellKernels& cell;
};
Tested tested(const Isa& isa, std::string_view name, index size) {
  const Kernels& kernels = kernels_of(isa, size);
  for (const CellKernels& cell : kernels.cells) {
    if (cell.name == name) return {kernels, cell};
  }
  std::abort();
}

void run(const Layout& layout, const Forward& p) {
  const int threads = get_num_threads();
  const Workspace scratch(
      static_cast<std::size_t>(forward_workspace(layout, p, threads)));
  with_team(threads, Length::usual, p.T,
            [&](const Team& team) { forward(layout, p, scratch.start(), team); });
}
void run(const Layout& layout, const Backward& p) {
  const int threads = get_num_threads();
  const Workspace scratch(
      static_cast<std::size_t>(backward_workspace(layout, p, threads)));
  with_team(threads, Length::usual, p.T,
            [&](const Team& team) { backward(layout, p, scratch.start(), team); });
}

// Runs forward in `chunks` pieces and, if there is only one, backward.
template <class S>
Results train(const Tested& of, const Arrays& a, bool unpacked, index chunks) {
  const bool has_c = of.cell.shape.has_c;
  const Model model{a.I, a.H, a.H, of.cell.shape.variant, false, false};
  const Layout layout(of.kernels, of.kernels.product, 1, of.cell, model);
  const index GH = a.gates * a.H, BH = a.B * a.H, size = sizeof(S);
  const auto x = as<S>(a.x), w_ih = as<S>(a.weight_ih), w_hh = as<S>(a.weight_hh);
  const auto b_ih = as<S>(a.bias_ih), b_hh = as<S>(a.bias_hh), dy = as<S>(a.dy);
  const auto dh_n = as<S>(a.dh_n), dc_n = as<S>(a.dc_n), h0 = as<S>(a.h0),
             c0 = as<S>(a.c0);
  const auto read = [](const std::vector<S>& v, index from = 0) {
    return reinterpret_cast<const char*>(v.data() + from);
  };
  const auto write = [](std::vector<S>& v, index from = 0) {
    return reinterpret_cast<char*>(v.data() + from);
  };
  const Parameters<char> parameters{model,      read(w_ih), read(w_hh),
                                    read(b_ih), read(b_hh), nullptr};
  const auto packed = [&](Packing packing) {
    std::vector<S> to(packed_bytes(layout, packing) / size);
    pack(layout, parameters, packing, write(to), Team::single());
    return to;
  };
  const auto forward_weights = packed(unpacked ? Packing::bias : Packing::forward);
  const auto backward_weights = packed(Packing::backward);
  std::vector<S> y(a.T * BH), h_n(h0), c_n(c0);
  const bool saves = saves_slots(of.cell.shape.saves, a.options);
  std::vector<S> saved(saves ? a.T * a.B * layout.record_bytes() / size : 0);
  const auto start = [&](ForwardOf<char>& p, index first, index steps) {
    p.T = steps, p.B = a.B, p.I = a.I, p.H = p.R = a.H, p.reverse = a.reverse;
    p.model = model, p.options = a.options;
    p.weight_ih = read(w_ih), p.weight_hh = read(w_hh);
    p.x = read(x, first * a.B * a.I), p.x_t = a.B * a.I * size, p.x_b = a.I * size;
    p.y = write(y, first * BH), p.y_t = BH * size, p.y_b = a.H * size;
  };
  for (index chunk = 0; chunk < chunks; ++chunk) {
    const index begin = a.T * chunk / chunks, end = a.T * (chunk + 1) / chunks;
    if (begin == end) continue;
    const std::vector<S> h(h_n), c(c_n);
    const index first = a.reverse ? a.T - end : begin;
    Forward p{};
    start(p, first, end - begin);
    p.x_item = size;
    const auto lengths = a.lengths_within(first, p.T);
    if (a.resets) p.masks = {lengths.data(), &a.resets[first * a.B]};
    p.has_options = a.row_wise, p.unpacked = unpacked;
    p.h0 = read(h), p.c0 = has_c ? read(c) : nullptr;
    p.weights = read(forward_weights);
    p.h_n = write(h_n), p.c_n = has_c ? write(c_n) : nullptr;
    p.saved = chunks == 1 && saves ? write(saved) : nullptr;
    run(layout, p);
  }
  Results results{widened(y), widened(h_n), has_c ? widened(c_n) : Values{}};
  if (chunks > 1) return results;

  std::vector<S> dx(a.T * a.B * a.I), dw_ih(GH * a.I), dw_hh(GH * a.H), db_ih(GH),
      db_hh(GH), dh0(BH), dc0(BH);
  Backward p{};
  start(p, 0, a.T);
  p.x_item = p.gradient_item = size;
  p.has_options = a.row_wise, p.forward_weights = read(forward_weights);
  if (a.resets) p.masks = {a.lengths.data(), a.resets.get()};
  p.h0 = read(h0), p.c0 = has_c ? read(c0) : nullptr;
  p.weights = unpacked ? nullptr : read(backward_weights);
  p.saved = write(saved);
  p.dy = read(dy), p.dy_t = BH * size, p.dy_b = a.H * size, p.dh_n = read(dh_n);
  p.dc_n = has_c ? read(dc_n) : nullptr;
  p.dx = write(dx), p.dx_t = a.B * a.I * size, p.dx_b = a.I * size;
  p.dweight_ih = write(dw_ih), p.dweight_hh = write(dw_hh);
  p.dbias_ih = write(db_ih), p.dbias_hh = write(db_hh);
  p.dh0 = write(dh0), p.dc0 = has_c ? write(dc0) : nullptr;
  run(layout, p);
  for (const auto* gradient : {&dx, &dw_ih, &dw_hh, &db_ih, &db_hh, &dh0}) {
    results.push_back(widened(*gradient));
  }
  results.push_back(has_c ? widened(dc0) : Values{});
  return results;
}

void compare(const Results& got, const Results& expected, double tolerance,
             const std::string& what) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    double scale = 1, worst = 0;
    for (const double value : expected[i]) scale = std::fmax(scale, std::fabs(value));
    bool finite = true;
    for (std::size_t k = 0; k < got[i].size(); ++k) {
      finite &= std::isfinite(got[i][k]);
      worst = std::fmax(worst, std::fabs(got[i][k] - expected[i][k]));
    }
    check(finite && worst <= tolerance * scale,
          what + " " + names[i] + " off by " + std::to_string(worst / scale));
  }
}

template <class S>
void test_cell(const Isa& isa, std::string_view name, const Arrays& a, double tolerance,
               const std::string& what) {
  set_num_threads(1);
  const Isa& portable = compiled_isas().back().isa;
  const Results expected = train<double>(tested(portable, name, 8), a, false, 1);
  const Tested of = tested(isa, name, sizeof(S));
  const Results got = train<S>(of, a, false, 1);
  compare(got, expected, name == "rnn_identity" ? 8 * tolerance : tolerance, what);
  if (!a.row_wise) {
    check(train<S>(of, a, true, 1) == got, what + " differs with unpacked weights");
  }
  set_num_threads(3);
  check(train<S>(of, a, false, 1) == got, what + " differs with 3 threads");
  if (a.options.training) return;
  Results whole(got.begin(), got.begin() + 3);
  check(train<S>(of, a, false, 2) == whole, what + " differs in two pieces");
}

long double exact_of(std::string_view name, long double x) {
  if (name == "tanh") return std::tanh(x);
  if (name == "exp_below_0") return std::exp(x);
  if (name == "exp_minus_1") return std::expm1(x);
  if (name == "log_1_plus") return std::log1p(x);
  return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
}

template <class S>
void test_math(const MathEntry& function, const std::string& what) {
  std::vector<S> x{0, -S(0.0), INFINITY, -INFINITY, NAN};
  for (double v = -100; v < 100; v += 0.0137) x.push_back(static_cast<S>(v));
  for (double v = 1e-30; v < 1; v *= 1.7) x.push_back(static_cast<S>(v));
  const bool is_cells = function.name == "sigmoid" || function.name == "tanh";
  for (S& v : x) {
    if (!is_cells) v = -std::fabs(v);
    if (function.name == "log_1_plus") v = std::exp(v);
  }
  std::vector<S> y(x.size());
  if constexpr (sizeof(S) == 4) {
    fusedrnn::run(function.f32, x.data(), y.data(), static_cast<index>(x.size()));
  } else {
    fusedrnn::run(function.f64, x.data(), y.data(), static_cast<index>(x.size()));
  }
  long double worst = 0;
  for (std::size_t k = 0; k < x.size(); ++k) {
    const long double v = x[k];
    const long double exact = exact_of(function.name, v);
    if (v != v) {
      check(y[k] != y[k], what + " loses a NaN");
    } else if (std::isinf(v) || v == 0) {
      check(y[k] == exact, what + " wrong at a limit");
    } else if (std::fabs(exact) >= std::numeric_limits<S>::min()) {
      const S near = static_cast<S>(std::fabs(exact));
      long double ulp = std::nextafter(near, S(INFINITY)) - near;
      // A denormal term of the sum or the quotient counts as 0.
      if (!is_cells) {
        ulp = std::fmax(ulp, static_cast<long double>(std::numeric_limits<S>::min()));
      }
      worst = std::fmax(worst, std::fabs(y[k] - exact) / ulp);
    }
  }
  check(worst <= 4,
        what + " off by " + std::to_string(static_cast<double>(worst)) + " ULP");
}

// NarrowWeights has the weights of a layer in a narrow precision. float16 is truncated.
struct NarrowWeights {
  std::vector<char> values;
  std::vector<float> scales;

  NarrowWeights(const Values& from, index rows, Precision precision) {
    const bool bytes = precision == Precision::int8;
    const index K = static_cast<index>(from.size()) / rows;
    values.resize(from.size() * (bytes ? 1 : 2));
    for (index row = 0; row < rows; ++row) {
      double most = 0;
      for (index k = 0; k < K; ++k) {
        most = std::fmax(most, std::fabs(from[row * K + k]));
      }
      if (bytes) scales.push_back(static_cast<float>(most / 127));
      for (index k = row * K; k < (row + 1) * K; ++k) {
        const float value = static_cast<float>(from[k]);
        const auto of = std::bit_cast<std::uint32_t>(value);
        const std::uint32_t exponent = of >> 23 & 255;
        const std::uint32_t normal =
            (of >> 16 & 0x8000) | (exponent - 112) << 10 | (of >> 13 & 0x3ff);
        const auto half =
            static_cast<std::uint16_t>(precision == Precision::bfloat16 ? of >> 16
                                       : exponent > 112                 ? normal
                                                                        : 0);
        if (bytes) {
          values[k] = static_cast<char>(std::lrint(127 * from[k] / most));
        } else {
          __builtin_memcpy(&values[2 * k], &half, 2);
        }
      }
    }
  }
};

// Runs forward in `chunks` pieces with weights of a narrow precision.
Results infer(const Isa& isa, Precision precision, std::string_view name, const Arrays& a,
              index chunks) {
  const Tested of = tested(isa, name, 4);
  const index GH = a.gates * a.H, BH = a.B * a.H, size = sizeof(float);
  const NarrowWeights w_ih(a.weight_ih, GH, precision), w_hh(a.weight_hh, GH, precision);
  const auto b_ih = as<float>(a.bias_ih), b_hh = as<float>(a.bias_hh);
  const auto x = as<float>(a.x);
  const auto read = [](const auto& v) { return reinterpret_cast<const char*>(v.data()); };
  const Model model{a.I, a.H, a.H, of.cell.shape.variant, false, false};
  const int operands = precision == Precision::int8 ? 2 : 1;
  const Parameters<char> parameters{
      model,   read(w_ih.values),  read(w_hh.values),  read(b_ih), read(b_hh),
      nullptr, w_ih.scales.data(), w_hh.scales.data(), nullptr,    operands};
  const Layout layout(of.kernels, product_of(isa, 4, precision), operands, of.cell,
                      model);
  std::vector<float> packed(packed_bytes(layout, Packing::forward) / size);
  pack(layout, parameters, Packing::forward, reinterpret_cast<char*>(packed.data()),
       Team::single());
  auto h_n = as<float>(a.h0), c_n = as<float>(a.c0);
  std::vector<float> y(a.T * BH);
  for (index chunk = 0; chunk < chunks; ++chunk) {
    const index begin = a.T * chunk / chunks, end = a.T * (chunk + 1) / chunks;
    if (begin == end) continue;
    const auto h = h_n, c = c_n;
    Forward p{};
    p.T = end - begin, p.B = a.B, p.I = a.I, p.H = p.R = a.H;
    p.x_item = size;
    p.model = model, p.options = a.options;
    p.has_options = of.cell.shape.has_second();
    p.x = read(x) + begin * a.B * a.I * size;
    p.x_t = a.B * a.I * size, p.x_b = a.I * size;
    p.y = reinterpret_cast<char*>(y.data() + begin * BH);
    p.y_t = BH * size, p.y_b = a.H * size;
    p.h0 = read(h), p.c0 = of.cell.shape.has_c ? read(c) : nullptr;
    p.weights = read(packed);
    p.h_n = reinterpret_cast<char*>(h_n.data());
    p.c_n = of.cell.shape.has_c ? reinterpret_cast<char*>(c_n.data()) : nullptr;
    run(layout, p);
  }
  return {widened(y), widened(h_n), widened(c_n)};
}

// Compares a step of every ISA with one of the portable kernels, and several steps in one
// piece and on one thread with others.
void test_narrow(const Isa& isa, const std::string& isa_name) {
  const Isa& portable = compiled_isas().back().isa;
  std::mt19937 random(4);
  constexpr index shapes[][4] = {{1, 1, 3, 5}, {4, 7, 33, 20}, {5, 37, 70, 50}};
  constexpr const char* precision_names[] = {"", "int8", "bfloat16", "float16"};
  for (const CellKernels& cell : isa.base->f32->cells) {
    if (cell.shape.differs.absent >= 0) continue;
    for (const auto& [T, B, I, H] : shapes) {
      Arrays a(random, cell.shape.gates, T, B, I, H, false, false);
      Arrays step = a;
      step.T = 1;
      step.x.resize(B * I);
      for (int n = 1; n < precisions; ++n) {
        const auto precision = static_cast<Precision>(n);
        const std::string what = isa_name + " " + std::string(cell.name) + " " +
                                 precision_names[n] + " " + std::to_string(B);
        set_num_threads(1);
        // Only a second product rounds what the step has computed.
        const double tolerance = cell.shape.has_second() ? 1e-2 : 1e-5;
        compare(infer(isa, precision, cell.name, step, 1),
                infer(portable, precision, cell.name, step, 1), tolerance, what);
        const Results whole = infer(isa, precision, cell.name, a, 1);
        check(infer(isa, precision, cell.name, a, 2) == whole, what + " in two pieces");
        set_num_threads(3);
        check(infer(isa, precision, cell.name, a, 1) == whole, what + " with 3 threads");
      }
    }
  }
}

// Trains a layer in float32 or in halves.
Results train_stack(const Isa& isa, std::string_view name, const Arrays& a, bool halves) {
  const Tested of = tested(isa, name, 4);
  const Precision precision = halves ? Precision::bfloat16 : Precision::element;
  const Halves& convert = *product_of(isa, 4, Precision::bfloat16).halves;
  const index GH = a.gates * a.H, BH = a.B * a.H, item = halves ? 2 : 4;
  const bool has_c = of.cell.shape.has_c;
  const auto wide = [](const auto& v) { return reinterpret_cast<const char*>(v.data()); };
  const auto typed = [&](const auto& values) {
    const auto from = as<float>(values);
    std::vector<char> to(from.size() * item);
    if (halves) convert.narrow(wide(from), std::ssize(from), to.data());
    if (!halves) __builtin_memcpy(to.data(), from.data(), to.size());
    return to;
  };
  const auto values_of = [&](const std::vector<char>& from) {
    std::vector<float> to(from.size() / item);
    char* const start = reinterpret_cast<char*>(to.data());
    if (halves) convert.widen(from.data(), std::ssize(to), start);
    if (!halves) __builtin_memcpy(start, from.data(), from.size());
    return widened(to);
  };
  const auto x = typed(a.x), w_ih = typed(a.weight_ih), w_hh = typed(a.weight_hh);
  const auto b_ih = typed(a.bias_ih), b_hh = typed(a.bias_hh), dy = typed(a.dy);
  const auto h0 = as<float>(a.h0), c0 = as<float>(a.c0), dh_n = as<float>(a.dh_n);
  const Model model{a.I, a.H, a.H, of.cell.shape.variant, false, false};
  Stack stack{{}, 1, 0};
  stack.weights.push_back(std::make_unique<const Weights>(
      of.kernels, product_of(isa, 4, precision), of.cell,
      Parameters<char>{model, w_ih.data(), w_hh.data(), b_ih.data(), b_hh.data(), nullptr,
                       nullptr, nullptr, nullptr, 1, halves, halves ? item : 0},
      Vectors<const char>{}));
  StackForward c{};
  c.T = a.T, c.B = a.B, c.options = a.options, c.x_item = item;
  c.x = x.data(), c.x_t = a.B * a.I * item, c.x_b = a.I * item;
  c.h0 = wide(h0), c.c0 = has_c ? wide(c0) : nullptr;
  std::vector<char> y(a.T * BH * item), dx(a.T * a.B * a.I * item);
  std::vector<char> saved(a.T * a.B * saved_bytes(stack, c));
  std::vector<float> h_n(BH), c_n(BH), dh0(BH), dc0(BH), dw_ih(GH * a.I), dw_hh(GH * a.H),
      db_ih(GH), db_hh(GH);
  const auto write = [](auto& v) { return reinterpret_cast<char*>(v.data()); };
  c.y = y.data(), c.y_t = BH * item, c.y_b = a.H * item;
  c.h_n = write(h_n), c.c_n = has_c ? write(c_n) : nullptr, c.saved = saved.data();
  forward(stack, c);
  StackBackward d{};
  static_cast<StackCall&>(d) = c;
  d.y = c.y, d.y_t = c.y_t, d.y_b = c.y_b, d.saved = c.saved;
  d.dy = dy.data(), d.dy_t = c.y_t, d.dy_b = c.y_b, d.dh_n = wide(dh_n);
  d.dx = dx.data(), d.dx_t = c.x_t, d.dx_b = c.x_b;
  d.dh0 = write(dh0), d.dc0 = has_c ? write(dc0) : nullptr;
  char* gradients[parameter_count] = {write(dw_ih), write(dw_hh), write(db_ih),
                                      write(db_hh)};
  d.gradients = gradients, d.gradient_item = 4;
  backward(stack, d);
  return {values_of(y),   widened(h_n),   widened(dh0),   values_of(dx),
          widened(dw_ih), widened(dw_hh), widened(db_ih), widened(db_hh)};
}

// Compares layers of bfloat16 with those of float32.
void test_halves(const Isa& isa, const std::string& isa_name) {
  std::mt19937 random(5);
  constexpr index shapes[][4] = {{1, 1, 3, 5}, {4, 7, 33, 20}, {5, 37, 17, 50}};
  for (const std::string_view name : {"lstm", "gru", "rnn_tanh"}) {
    for (const auto& [T, B, I, H] : shapes) {
      const int gates = tested(isa, name, 4).cell.shape.gates;
      const Arrays a(random, gates, T, B, I, H, false, false);
      set_num_threads(2);
      compare(train_stack(isa, name, a, true), train_stack(isa, name, a, false), 3e-2,
              isa_name + " " + std::string(name) + " in halves " + std::to_string(B));
    }
  }
  set_num_threads(1);
}

// Compares y, h_n and c_n of the portable kernels with those that another product gives.
void test_product(const Product& product, const CellKernels& cell, const Arrays& a,
                  double tolerance, const std::string& what) {
  const Kernels& own = *compiled_isas().back().isa.base->f32;
  Kernels kernels = own;
  kernels.product = product;
  kernels.product.pack_transposed = own.product.pack_transposed;
  set_num_threads(1);
  const auto forward = [&](const Kernels& with, const Arrays& arrays, index chunks) {
    Results results = train<float>({with, cell}, arrays, false, chunks);
    results.resize(3);
    return results;
  };
  // With two pieces only forward runs: backward's products are those of the element type.
  const Results expected = forward(own, a, 2), got = forward(kernels, a, 2);
  compare(got, expected, tolerance, what);
  if (!a.options.training) {
    check(forward(kernels, a, 3) == got, what + " differs in three pieces");
  }
  set_num_threads(3);
  check(forward(kernels, a, 2) == got, what + " differs with 3 threads");
  if (a.resets) return;
  // The first rows alone must have the same bits.
  Arrays few = a;
  few.B = a.B / 2 + 1;
  const auto keep = [&](Values& of, index outer, index inner) {
    Values kept;
    for (index t = 0; t < outer; ++t) {
      const auto row = of.begin() + t * a.B * inner;
      kept.insert(kept.end(), row, row + few.B * inner);
    }
    of = kept;
  };
  keep(few.x, a.T, a.I);
  keep(few.h0, 1, a.H);
  keep(few.c0, 1, a.H);
  Results rows = got;
  keep(rows[0], a.T, a.H);
  keep(rows[1], 1, a.H);
  if (cell.shape.has_c) keep(rows[2], 1, a.H);
  check(forward(kernels, few, 2) == rows, what + " differs with other rows");
}

void test_products() {
  std::mt19937 random(2);
  constexpr index shapes[][4] = {
      {5, 3, 4, 7}, {6, 37, 9, 33}, {40, 1, 3, 16}, {4, 20, 70, 50}};
  for (const CellKernels& cell : compiled_isas().back().isa.base->f32->cells) {
    if (cell.name == "rnn_identity") continue;  // it grows without bounds
    for (const auto& [T, B, I, H] : shapes) {
      for (const bool masked : {false, true}) {
        Arrays a(random, cell.shape.gates, T, B, I, H, masked, masked);
        a.row_wise = cell.shape.differs.absent >= 0 || cell.shape.differs.second >= 0;
        const std::string what = std::string(cell.name) + " " + std::to_string(B) + "," +
                                 std::to_string(H) + (masked ? " masked" : "");
        test_product(test::matrix_product, cell, a, 1e-4, "matrix " + what);
        test_product(test::int8_product, cell, a, 0.1, "int8 " + what);
        a.ask_for_options();
        test_product(test::matrix_product, cell, a, 1e-4, "matrix, options " + what);
        test_product(test::int8_product, cell, a, 0.1, "int8, options " + what);
      }
    }
  }
}

}  // namespace

int main() {
  check(test::failures_of_contention() == 0, "contention");
  test_products();
  constexpr index shapes[][4] = {{1, 1, 1, 1},   {5, 3, 4, 7},    {7, 1, 9, 33},
                                 {6, 20, 7, 50}, {40, 13, 3, 16}, {3, 70, 20, 17},
                                 {130, 2, 5, 20}};
  for (const auto& [isa, supported] : compiled_isas()) {
    const std::string name(isa.name);
    std::printf("%s: %s\n", name.c_str(), supported ? "run" : "this CPU lacks it");
    if (!supported) continue;
    test_narrow(isa, name);
    test_halves(isa, name);
    // A name with an underscore adds units to the vectors of another ISA.
    if (name.find('_') != std::string::npos) continue;
    for (const MathEntry& function : isa.base->math) {
      test_math<float>(function, name + " float " + std::string(function.name));
      test_math<double>(function, name + " double " + std::string(function.name));
    }
    std::mt19937 random(1);
    for (const CellKernels& cell : isa.base->f32->cells) {
      for (const auto& [T, B, I, H] : shapes) {
        // A linear recurrence grows with T, so it is tested on few steps.
        const index steps = cell.name == "rnn_identity" && T > 7 ? 7 : T;
        for (const auto& [reverse, masked] :
             {std::pair{false, false}, {true, false}, {true, true}}) {
          Arrays a(random, cell.shape.gates, steps, B, I, H, reverse, masked);
          // The plain kernels lack some variants.
          const Variant& differs = cell.shape.differs;
          a.row_wise = differs.absent >= 0 || differs.second >= 0;
          const std::string what = name + " " + std::string(cell.name) + " " +
                                   std::to_string(steps) + "," + std::to_string(B) + "," +
                                   std::to_string(I) + "," + std::to_string(H) +
                                   (masked ? " masked" : "");
          test_cell<float>(isa, cell.name, a, 1e-4, what + " float");
          test_cell<double>(isa, cell.name, a, 1e-11, what + " double");
          a.ask_for_options();
          test_cell<float>(isa, cell.name, a, 1e-4, what + " float with options");
          test_cell<double>(isa, cell.name, a, 1e-11, what + " double with options");
        }
      }
    }
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
