/// \file
/// CUDA kernels of the gradients of RMSNorm and LayerNorm, in four launches: what a row needs, one
/// block per row; the gradients of weight and bias over every 64 rows, one thread per column; their
/// sums over these blocks of rows, in order; grad_x, one block per row, last, so that it may take
/// the place of grad_y or x. Formulas and rows that take no part are those of cpu/normalization. x
/// and grad_y are read three times, twice out of L2 where they fit it, grad_x is written once; some
/// 20 flops per element: memory is the limit, of which 70% of two reads and a write is expected
/// where L2 holds the call's rows, 40% where it does not. A partial sum per 64 rows adds 2% to 5%.
#pragma once

#include <cmath>
#include <limits>

#include "normalization.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Rows that are summed one after the other, as on the CPU.
inline constexpr Index kGradientRows = 64;

template <typename C>
EIGENFORMER_DEVICE bool takes_part(const problem::RmsNormRow<C>& row) {
  return row.unit != 0;
}
template <typename C>
EIGENFORMER_DEVICE bool takes_part(const problem::LayerNormRow<C>& row) {
  return row.scale.unit != 0;
}

/// An element of x, normalized.
template <typename C>
EIGENFORMER_DEVICE C normalized(const problem::RmsNormRow<C>& row, C x) {
  return x * row.unit * row.inverse;
}
template <typename C>
EIGENFORMER_DEVICE C normalized(const problem::LayerNormRow<C>& row, C x) {
  return std::fma(x * row.scale.unit - row.scale.center, row.scale.inverse, row.scale.offset);
}

/// An element of grad_x from those of x, grad_y and weight.
template <typename C>
EIGENFORMER_DEVICE C gradient_of(const problem::RmsNormRow<C>& row, C x, C grad_y, C weight) {
  const C gradient = grad_y * row.gradient_unit * weight;
  return std::fma(normalized(row, x), row.along_x, gradient) * row.inverse;
}
template <typename C>
EIGENFORMER_DEVICE C gradient_of(const problem::LayerNormRow<C>& row, C x, C grad_y, C weight) {
  const C gradient = std::fma(grad_y * row.gradient_unit, weight, -row.mean_gradient);
  return std::fma(normalized(row, x), -row.projection, gradient) * row.scale.inverse;
}

/// unit / gradient_unit, as a number of C.
template <typename C>
EIGENFORMER_DEVICE C result_unit(C unit, C gradient_unit) {
  const C largest = std::ldexp(C(1), std::numeric_limits<C>::max_exponent - 1);
  const C quotient = unit / gradient_unit;
  return quotient < largest ? quotient : largest;
}
template <typename C>
EIGENFORMER_DEVICE C result_unit(const problem::RmsNormRow<C>& row) {
  return result_unit(row.unit, row.gradient_unit);
}
template <typename C>
EIGENFORMER_DEVICE C result_unit(const problem::LayerNormRow<C>& row) {
  return result_unit(row.scale.unit, row.gradient_unit);
}

/// Whether any number of a row is not 0.
template <typename C, typename Block, typename Scratch, typename X>
EIGENFORMER_DEVICE bool any_nonzero(Block& block, const Scratch& scratch, const X* x, Index count) {
  C any = 0;
  for_each_pack_of_line(
      block, count,
      [&]<int N>(WidthOf<N>, Index j) {
        const auto values = load_pack<C, N>(x + j);
        for (int i = 0; i < N; ++i)
          if (values[i] != 0) any = C(1);  // NaN is
      },
      x);
  return reduce_block(block, scratch, any, Larger{}) != 0;
}

/// What the rows of a norm need, as Statistics of its problem find it.
template <typename Statistics>
struct RowStatistics {
  static constexpr int kThreads = kRowThreads;
  Statistics statistics;
  typename Statistics::Row* rows;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto& p = statistics.p;
    const auto scratch = Statistics::scratch(block);
    for (Index row = block.index(); row < p.rows; row += block.count()) {
      const auto found =
          statistics.find(block, scratch, p.x + row * p.features, p.grad_y + row * p.features);
      if (block.thread() == 0) rows[row] = found;
    }
  }
};

inline constexpr int kRowWarps = kRowThreads / kWarp;

template <typename Problem>
struct RmsNormStatistics {
  using C = typename Problem::compute;
  using Row = problem::RmsNormRow<C>;
  static constexpr auto name = "rms_norm_backward";
  Problem p;

  static constexpr std::size_t shared() { return shared_bytes<C>(kRowWarps); }
  template <typename Block>
  EIGENFORMER_DEVICE static auto scratch(Block& block) {
    return block.template shared<C>(kRowWarps);
  }

  template <typename Block, typename Scratch, typename X, typename GY>
  EIGENFORMER_DEVICE Row find(Block& block, const Scratch& scratch, const X* x,
                              const GY* grad_y) const {
    const RmsScale<C> scale = rms_scale<C>(block, scratch, x, p.features, p.epsilon);
    const auto along_x = [&](C unit, C gradient_unit) {
      C sum = 0;
      for_each_pack_of_line(
          block, p.features,
          [&]<int N>(WidthOf<N>, Index j) {
            const auto values = load_pack<C, N>(x + j), gradients = load_pack<C, N>(grad_y + j),
                       weights = load_pack<C, N>(p.weight + j);
            for (int i = 0; i < N; ++i)
              sum = std::fma(gradients[i] * gradient_unit * weights[i], values[i] * unit, sum);
          },
          x, grad_y, p.weight);
      // One factor of the three is here, one with x, one with both: the cube may leave the range.
      return -(reduce_block(block, scratch, sum, Add{}) * scale.inverse /
               static_cast<C>(p.features));
    };
    if (scale.unit == 1) {  // this and the next: all threads of the block, or none
      const C along = along_x(C(1), C(1));
      if (std::isfinite(along)) return {C(1), scale.inverse, along, C(1)};
    }
    if (!any_nonzero<C>(block, scratch, grad_y, p.features)) return {};
    const C gradient_unit = row_unit<C>(block, scratch, grad_y, p.features);
    return {scale.unit, scale.inverse, along_x(scale.unit, gradient_unit), gradient_unit};
  }
};

template <typename Problem>
struct LayerNormStatistics {
  using C = typename Problem::compute;
  using Row = problem::LayerNormRow<C>;
  static constexpr auto name = "layer_norm_backward";
  Problem p;

  static constexpr std::size_t shared() { return layer_norm_scratch_bytes<C>(kRowWarps); }
  template <typename Block>
  EIGENFORMER_DEVICE static auto scratch(Block& block) {
    return layer_norm_scratch<C>(block, kRowWarps);
  }

  template <typename Block, typename Scratch, typename X, typename GY>
  EIGENFORMER_DEVICE Row find(Block& block, const Scratch& scratch, const X* x,
                              const GY* grad_y) const {
    const C n = static_cast<C>(p.features);
    const auto scale = layer_norm_scale<C>(block, scratch, x, p.features, p.epsilon);
    const auto with = [&](C gradient_unit) {
      TwoSums<C> sums{0, 0};  // of g w, and of it times the distance from the center
      for_each_pack_of_line(
          block, p.features,
          [&]<int N>(WidthOf<N>, Index j) {
            const auto values = load_pack<C, N>(x + j), gradients = load_pack<C, N>(grad_y + j),
                       weights = load_pack<C, N>(p.weight + j);
            for (int i = 0; i < N; ++i) {
              const C gradient = gradients[i] * gradient_unit;
              sums = {std::fma(gradient, weights[i], sums.first),
                      std::fma(gradient * weights[i], values[i] * scale.unit - scale.center,
                               sums.second)};
            }
          },
          x, grad_y, p.weight);
      sums = reduce_block(block, scratch.sums, sums, Add{});
      return Row{scale, sums.first / n,
                 (sums.second * scale.inverse + sums.first * scale.offset) / n, gradient_unit};
    };
    if (scale.unit == 1) {  // this and the next: all threads of the block, or none
      const Row found = with(C(1));
      if (std::isfinite(found.mean_gradient) && std::isfinite(found.projection)) return found;
    }
    if (!any_nonzero<C>(block, scratch.magnitudes, grad_y, p.features)) return {};
    return with(row_unit<C>(block, scratch.magnitudes, grad_y, p.features));
  }
};

/// Sums over a block of rows for one column: element `at` of (blocks, features).
template <typename Problem, typename Row>
struct ParameterPartials {
  using C = typename Problem::compute;
  Problem p;
  const Row* rows;
  C* weights;
  C* biases;  // nullptr: there is none

  EIGENFORMER_DEVICE void operator()(Index at) const {
    const Index column = at % p.features, begin = at / p.features * kGradientRows;
    const Index end = begin + kGradientRows < p.rows ? begin + kGradientRows : p.rows;
    C weight = 0, bias = 0;
    for (Index row = begin; row < end; ++row) {
      const Row found = rows[row];
      if (!takes_part(found)) continue;
      const C gradient = static_cast<C>(p.grad_y[row * p.features + column]),
              x = static_cast<C>(p.x[row * p.features + column]);
      weight = std::fma(normalized(found, x), gradient, weight);
      bias = bias + gradient;
    }
    weights[at] = weight;
    if (biases != nullptr) biases[at] = bias;
  }
};

/// gradient[column] += the column's partial sums, in their order.
template <typename GW, typename C>
struct AddPartials {
  const C* partials;  // (blocks, features)
  Index blocks, features;
  GW* gradient;

  EIGENFORMER_DEVICE void operator()(Index column) const {
    C total = 0;
    for (Index block = 0; block < blocks; ++block)
      total = total + partials[block * features + column];
    gradient[column] += total;
  }
};

template <typename Problem, typename Row>
struct InputGradient {
  using C = typename Problem::compute;
  static constexpr int kThreads = kRowThreads;
  Problem p;
  const Row* rows;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    using GX = std::remove_reference_t<decltype(*p.grad_x)>;
    for (Index row = block.index(); row < p.rows; row += block.count()) {
      const Row found = rows[row];
      const bool part = takes_part(found);
      const C unit = part ? result_unit(found) : C(0);
      const auto* x = p.x + row * p.features;
      const auto* grad_y = p.grad_y + row * p.features;
      const auto* weight = p.weight;
      GX* grad_x = p.grad_x + row * p.features;
      for_each_pack_of_line(
          block, p.features,
          [&]<int N>(WidthOf<N>, Index j) {
            const auto values = load_pack<C, N>(x + j), gradients = load_pack<C, N>(grad_y + j),
                       weights = load_pack<C, N>(weight + j);
            Pack<C, N> results;
            for (int i = 0; i < N; ++i)
              results[i] =
                  part ? gradient_of(found, values[i], gradients[i], weights[i]) * unit : C(0);
            store_pack<N>(results, grad_x + j);
          },
          x, grad_y, weight, static_cast<const GX*>(grad_x));
    }
  }
};

/// Both norms; grad_bias may be nullptr.
template <typename Statistics, typename D, typename Problem, typename GW>
void norm_backward(const Backend<D>& on, const Problem& p, GW* grad_bias) {
  using C = typename Statistics::C;
  using Row = typename Statistics::Row;
  constexpr auto name = Statistics::name;
  if (p.rows <= 0 || p.features <= 0) return;
  const Index blocks = (p.rows + kGradientRows - 1) / kGradientRows, sums = blocks * p.features;
  with_scratch<Row, C, C>(
      on, name, {p.rows, sums, grad_bias != nullptr ? sums : 0},
      [&](Row* rows, C* weights, C* biases) {
        if (grad_bias == nullptr) biases = nullptr;
        launch_rows(on, name, p.rows, Statistics::shared(), RowStatistics<Statistics>{{p}, rows});
        launch_for_each(on, name, sums, ParameterPartials<Problem, Row>{p, rows, weights, biases});
        launch_for_each(on, name, p.features,
                        AddPartials<GW, C>{weights, blocks, p.features, p.grad_weight});
        if (biases != nullptr)
          launch_for_each(on, name, p.features,
                          AddPartials<GW, C>{biases, blocks, p.features, grad_bias});
        launch_rows(on, name, p.rows, 0, InputGradient<Problem, Row>{p, rows});
      });
}

/// Kernels keep what they know of rows in scratch of the stream; row_scratch is the CPU's.
template <typename D, typename GX, typename GW, typename GY, typename X, typename W>
void execute(const Backend<D>& on, const problem::RmsNormBackward<GX, GW, GY, X, W>& p) {
  norm_backward<RmsNormStatistics<problem::RmsNormBackward<GX, GW, GY, X, W>>>(
      on, p, static_cast<GW*>(nullptr));
}

template <typename D, typename GX, typename GW, typename GY, typename X, typename W>
void execute(const Backend<D>& on, const problem::LayerNormBackward<GX, GW, GY, X, W>& p) {
  norm_backward<LayerNormStatistics<problem::LayerNormBackward<GX, GW, GY, X, W>>>(on, p,
                                                                                   p.grad_bias);
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
