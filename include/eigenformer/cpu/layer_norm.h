/// \file
/// CPU kernels of LayerNorm. A row is read three times, but from memory once: mean, variance about the mean (no cancellation),
/// result.
///
/// Backward (with r = 1 / sqrt(variance + epsilon), h = (x - mean) r, g the gradient of y):
///   grad_weight[j] += sum over rows of g[j] h[j],   grad_bias[j] += sum over rows of g[j]
///   grad_x[j]       = r (g[j] w[j] - mean_k(g w) - h[j] mean_k(g w h))
/// in the three passes of RMSNorm's.
#pragma once

#include <cmath>

#include "../core/device.h"
#include "../core/rows.h"
#include "vector_loop.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// A checked request: pointers and sizes only.
template <typename Y, typename X, typename W>
struct LayerNormProblem {
  using compute = common_compute_type<Y, X, W>;
  Y* y;             // (rows, features)
  const X* x;       // (rows, features)
  const W* weight;  // (features)
  const W* bias;    // (features)
  Index rows, features;
  float epsilon;
};

/// What a row's backward pass needs.
template <typename C>
struct LayerNormRow {
  C mean, inverse_deviation;
  C mean_gradient, projection;  // mean(g w), mean(g w h)
};

template <typename GX, typename GW, typename GY, typename X, typename W>
struct LayerNormBackwardProblem {
  using compute = common_compute_type<GX, GY, X, W>;
  GX* grad_x;        // (rows, features)
  GW* grad_weight;   // (features), added to
  GW* grad_bias;     // (features), added to
  const GY* grad_y;  // (rows, features)
  const X* x;        // (rows, features)
  const W* weight;   // (features)
  Index rows, features;
  float epsilon;
  LayerNormRow<compute>* row_scratch;  // (rows)
};

namespace cpu {

template <typename C>
struct MeanAndInverseDeviation {
  C mean, inverse_deviation;
};

template <typename V, typename X>
MeanAndInverseDeviation<typename V::scalar> layer_norm_statistics(const X* x, Index features,
                                                                  float epsilon) {
  using C = typename V::scalar;
  const C n = static_cast<C>(features);
  const C mean =
      sum_over_vectors<V>(features,
                          [&](V sum, Index at, auto part) { return sum + load<V>(x + at, part); }) /
      n;
  const C squares = sum_over_vectors<V>(features, [&](V sum, Index at, auto part) {
    V distance = load<V>(x + at, part) - V::set1(mean);
    if constexpr (std::is_same_v<
                      decltype(part),
                      PartOfVector>) {  // lanes past the end are 0 - mean: out of the sum
      C lanes[V::lanes];
      distance.store(lanes);
      distance = V::load_partial(lanes, part.lanes);
    }
    return fma(distance, distance, sum);
  });
  return {mean, C(1) / std::sqrt(squares / n + static_cast<C>(epsilon))};
}

template <typename Isa, CpuDevice D, typename Y, typename X, typename W>
void layer_norm(Isa, const D& device, const LayerNormProblem<Y, X, W>& p) {
  using V = simd::Vec<typename LayerNormProblem<Y, X, W>::compute, Isa>;
  parallel_for(device, p.rows, rows_per_task(p.features), [&](Index first, Index last, int) {
    for (Index row = first; row < last; ++row) {
      const X* x = p.x + row * p.features;
      Y* y = p.y + row * p.features;
      const auto statistics = layer_norm_statistics<V>(x, p.features, p.epsilon);
      const V mean = V::set1(statistics.mean), scale = V::set1(statistics.inverse_deviation);
      for_each_vector<V>(0, p.features, [&](Index at, auto part) {
        const V normalized = (load<V>(x + at, part) - mean) * scale;
        store(fma(normalized, load<V>(p.weight + at, part), load<V>(p.bias + at, part)), y + at,
              part);
      });
    }
  });
}

/// Adds to `Vectors` vectors of grad_weight and grad_bias that start at `column`, rows in blocks of 64 as in RMSNorm.
template <typename V, int Vectors, typename Problem, typename Part>
void layer_norm_parameter_gradients(const Problem& p, Index column, Index columns, Part part) {
  constexpr Index kRowBlock = 64;
  V weight_total[Vectors], bias_total[Vectors];
  for (int k = 0; k < Vectors; ++k) weight_total[k] = bias_total[k] = V::zero();
  for (Index begin = 0; begin < p.rows; begin += kRowBlock) {
    V weight[Vectors], bias[Vectors];
    for (int k = 0; k < Vectors; ++k) weight[k] = bias[k] = V::zero();
    for (Index row = begin; row < (std::min)(begin + kRowBlock, p.rows); ++row) {
      const V mean = V::set1(p.row_scratch[row].mean),
              scale = V::set1(p.row_scratch[row].inverse_deviation);
      for (int k = 0; k < Vectors; ++k) {
        const Index i = row * p.features + column + k * V::lanes;
        const V gradient = load<V>(p.grad_y + i, part);
        weight[k] = fma((load<V>(p.x + i, part) - mean) * scale, gradient, weight[k]);
        bias[k] = bias[k] + gradient;
      }
    }
    for (int k = 0; k < Vectors; ++k) {
      weight_total[k] = weight_total[k] + weight[k];
      bias_total[k] = bias_total[k] + bias[k];
    }
  }
  typename V::scalar sums[Vectors * V::lanes];
  for (int k = 0; k < Vectors; ++k) weight_total[k].store(sums + k * V::lanes);
  for (Index j = 0; j < columns; ++j) p.grad_weight[column + j] += sums[j];
  for (int k = 0; k < Vectors; ++k) bias_total[k].store(sums + k * V::lanes);
  for (Index j = 0; j < columns; ++j) p.grad_bias[column + j] += sums[j];
}

template <typename V, typename Problem>
void layer_norm_backward_statistics(const Problem& p, Index row) {
  using C = typename V::scalar;
  const auto* x = p.x + row * p.features;
  const auto* grad_y = p.grad_y + row * p.features;
  const auto [mean, scale] = layer_norm_statistics<V>(x, p.features, p.epsilon);
  const V center = V::set1(mean);
  // Lanes past the end hold a gradient of 0, so that they add nothing.
  const C gradient = sum_over_vectors<V>(p.features, [&](V sum, Index at, auto part) {
    return fma(load<V>(grad_y + at, part), load<V>(p.weight + at, part), sum);
  });
  const C projection = sum_over_vectors<V>(p.features, [&](V sum, Index at, auto part) {
    return fma(load<V>(grad_y + at, part) * load<V>(p.weight + at, part),
               load<V>(x + at, part) - center, sum);
  });
  const C n = static_cast<C>(p.features);
  p.row_scratch[row] = {mean, scale, gradient / n, projection * scale / n};
}

template <typename V, typename Problem>
void layer_norm_backward_row(const Problem& p, Index row) {
  const Index begin = row * p.features;
  const auto& s = p.row_scratch[row];
  const V mean = V::set1(s.mean), scale = V::set1(s.inverse_deviation);
  const V mean_gradient = V::set1(s.mean_gradient), against = V::set1(-s.projection);
  for_each_vector<V>(0, p.features, [&](Index at, auto part) {
    const V normalized = (load<V>(p.x + begin + at, part) - mean) * scale;
    const V gradient = fma(load<V>(p.grad_y + begin + at, part), load<V>(p.weight + at, part),
                           V::zero() - mean_gradient);
    store(fma(normalized, against, gradient) * scale, p.grad_x + begin + at, part);
  });
}

template <typename Isa, CpuDevice D, typename GX, typename GW, typename GY, typename X, typename W>
void layer_norm_backward(Isa, const D& device,
                         const LayerNormBackwardProblem<GX, GW, GY, X, W>& p) {
  using V = simd::Vec<typename LayerNormBackwardProblem<GX, GW, GY, X, W>::compute, Isa>;
  parallel_for(device, p.rows, rows_per_task(p.features), [&](Index first, Index last, int) {
    for (Index row = first; row < last; ++row) layer_norm_backward_statistics<V>(p, row);
  });
  constexpr Index kColumns = 4 * V::lanes;
  parallel_for(device, (p.features + kColumns - 1) / kColumns, rows_per_task(p.rows * kColumns),
               [&](Index first, Index last, int) {
                 for (Index block = first; block < last; ++block) {
                   const Index begin = block * kColumns,
                               end = (std::min)(begin + kColumns, p.features);
                   if (end - begin == kColumns) {
                     layer_norm_parameter_gradients<V, 4>(p, begin, kColumns, WholeVector{});
                   } else {
                     for_each_vector<V>(begin, end, [&](Index at, auto part) {
                       layer_norm_parameter_gradients<V, 1>(
                           p, at, std::min<Index>(V::lanes, end - at), part);
                     });
                   }
                 }
               });
  parallel_for(device, p.rows, rows_per_task(p.features), [&](Index first, Index last, int) {
    for (Index row = first; row < last; ++row) layer_norm_backward_row<V>(p, row);
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
