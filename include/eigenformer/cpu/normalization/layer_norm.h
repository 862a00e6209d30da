/// \file
/// CPU kernels of LayerNorm. A row is read three times, but from memory once: mean, variance about
/// the mean (no cancellation), result. The mean is that of the distances from the first element, so
/// that a row of equal numbers has exactly itself, and what rounding left out of it comes from the
/// second pass, as does the variance about it (Chan, Golub and LeVeque, "Algorithms for computing
/// the sample variance", 1983): a mean of 10^7 times the spread loses nothing.
///
/// Backward (with r = 1 / sqrt(variance + epsilon), h = (x - mean) r, g the gradient of y):
///   grad_weight[j] += sum over rows of g[j] h[j],   grad_bias[j] += sum over rows of g[j]
///   grad_x[j]       = r (g[j] w[j] - mean_k(g w) - h[j] mean_k(g w h))
/// in the three passes of RMSNorm's, and like there for rows whose grad_y is all zero.
#pragma once

#include <cmath>

#include "../../core/rows.h"
#include "../../problem/normalization.h"
#include "../backend.h"
#include "../vector/loop.h"
#include "../vector/row_unit.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// What is known of a row times its unit: a number near the mean, how far the mean is from it, the
/// variance.
template <typename C>
struct RowMoments {
  C center, correction, variance;
};

template <typename V>
struct DistanceSums {
  V distances, squares;
  friend EIGENFORMER_INLINE DistanceSums operator+(const DistanceSums& a, const DistanceSums& b) {
    return {a.distances + b.distances, a.squares + b.squares};
  }
};

template <typename V, typename X, typename Unit>
RowMoments<typename V::scalar> row_moments(const X* x, Index features, typename V::scalar unit,
                                           Unit factor) {
  using C = typename V::scalar;
  if (features == 0) return {};
  const C n = static_cast<C>(features), first = static_cast<C>(x[0]) * unit;
  const C distances = sum_over_vectors<V>(features, [&](V sum, Index at, auto part) {
    return sum + present(load<V>(x + at, part) * factor - V::set1(first), part);
  });
  const C center = first + distances / n;
  const auto sums = accumulate_vectors<V>(
      features, DistanceSums<V>{V::zero(), V::zero()},
      [&](const DistanceSums<V>& sum, Index at, auto part) {
        const V distance = present(load<V>(x + at, part) * factor - V::set1(center), part);
        return DistanceSums<V>{sum.distances + distance, fma(distance, distance, sum.squares)};
      });
  const C correction = reduce_add(sums.distances) / n;
  return {center, correction,
          (std::max)(reduce_add(sums.squares) / n - correction * correction, C(0))};  // NaN stays
}

template <typename V, typename X>
problem::LayerNormScale<typename V::scalar> layer_norm_scale(const X* x, Index features,
                                                             float epsilon) {
  using C = typename V::scalar;
  const auto row = row_moments<V>(x, features, C(1), UnitOne{});
  const C spread = row.variance + static_cast<C>(epsilon);
  if (in_range(spread)) [[likely]] {
    const C inverse = C(1) / std::sqrt(spread);
    return {C(1), row.center, inverse, -row.correction * inverse};
  }
  const C unit = row_unit<V>(x, features);
  const auto scaled = row_moments<V>(x, features, unit, V::set1(unit));
  if (scaled.variance == 0) {  // epsilon in that unit may be no number of C
    const C inverse = static_cast<C>(1 / std::sqrt(static_cast<double>(epsilon)));
    return {C(1), row.center, inverse, -row.correction * inverse};
  }
  const C inverse = static_cast<C>(1 / std::sqrt(static_cast<double>(scaled.variance) +
                                                 static_cast<double>(epsilon) * unit * unit));
  return {unit, scaled.center, inverse, -scaled.correction * inverse};
}

/// f(normalize), where normalize(x) is a vector of the row, normalized.
template <typename V, typename F>
EIGENFORMER_INLINE void with_normalized(const problem::LayerNormScale<typename V::scalar>& scale,
                                        F&& f) {
  const V center = V::set1(scale.center), inverse = V::set1(scale.inverse),
          offset = V::set1(scale.offset);
  with_unit<V>(scale.unit, [&](auto unit) {
    f([&](const V& x) { return fma(x * unit - center, inverse, offset); });
  });
}

template <typename D, typename Isa, typename Y, typename X, typename W>
void execute(const Backend<D, Isa>& on, const problem::LayerNorm<Y, X, W>& p) {
  using V = simd::Vec<typename problem::LayerNorm<Y, X, W>::compute, Isa>;
  parallel_for(on, p.rows, Cost{p.features}, [&](Index first, Index last, int) {
    for (Index row = first; row < last; ++row) {
      const X* x = p.x_row(row);
      Y* y = p.y + row * p.features;
      const W* weight = p.weight + p.weights_of(row);
      const W* bias = p.bias + p.weights_of(row);
      with_normalized<V>(layer_norm_scale<V>(x, p.features, p.epsilon), [&](auto normalize) {
        for_each_vector<V>(0, p.features, [&](Index at, auto part) {
          store(fma(normalize(load<V>(x + at, part)), load<V>(weight + at, part),
                    load<V>(bias + at, part)),
                y + at, part);
        });
      });
    }
  });
}

/// Adds to `Vectors` vectors of grad_weight and grad_bias that start at `column`, rows in blocks of
/// 64 as in RMSNorm.
template <typename V, int Vectors, typename Problem, typename Part>
void layer_norm_parameter_gradients(const Problem& p, Index column, Index columns, Part part) {
  constexpr Index kRowBlock = 64;
  V weight_total[Vectors], bias_total[Vectors];
  for (int k = 0; k < Vectors; ++k) weight_total[k] = bias_total[k] = V::zero();
  for (Index begin = 0; begin < p.rows; begin += kRowBlock) {
    V weight[Vectors], bias[Vectors];
    for (int k = 0; k < Vectors; ++k) weight[k] = bias[k] = V::zero();
    for (Index row = begin; row < (std::min)(begin + kRowBlock, p.rows); ++row) {
      const auto& found = p.row_scratch[row].scale;
      if (found.unit == 0) continue;
      const V unit = V::set1(found.unit), center = V::set1(found.center),
              inverse = V::set1(found.inverse), offset = V::set1(found.offset);
      for (int k = 0; k < Vectors; ++k) {
        const Index i = row * p.features + column + k * V::lanes;
        const V gradient = load<V>(p.grad_y + i, part);
        const V normalized = fma(load<V>(p.x + i, part) * unit - center, inverse, offset);
        weight[k] = fma(normalized, gradient, weight[k]);
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
problem::LayerNormRow<typename V::scalar> layer_norm_backward_statistics(const Problem& p,
                                                                         Index row) {
  using C = typename V::scalar;
  const auto* x = p.x + row * p.features;
  const auto* grad_y = p.grad_y + row * p.features;
  const C n = static_cast<C>(p.features);
  const auto scale = layer_norm_scale<V>(x, p.features, p.epsilon);
  // Lanes past the end hold a gradient of 0, so that they add nothing.
  const auto sums = [&](C gradient_unit, auto unit, auto gradient_factor) {
    const V center = V::set1(scale.center);
    const C gradient = sum_over_vectors<V>(p.features, [&](V sum, Index at, auto part) {
      return fma(load<V>(grad_y + at, part) * gradient_factor, load<V>(p.weight + at, part), sum);
    });
    const C projection = sum_over_vectors<V>(p.features, [&](V sum, Index at, auto part) {
      return fma(load<V>(grad_y + at, part) * gradient_factor * load<V>(p.weight + at, part),
                 load<V>(x + at, part) * unit - center, sum);
    });
    return problem::LayerNormRow<C>{scale, gradient / n,
                                    (projection * scale.inverse + gradient * scale.offset) / n,
                                    gradient_unit};
  };
  if (scale.unit == 1) {
    const auto found = sums(C(1), UnitOne{}, UnitOne{});
    if (std::isfinite(found.mean_gradient) && std::isfinite(found.projection)) [[likely]]
      return found;
  }
  if (!any_nonzero<V>(grad_y, p.features)) return {};
  const C gradient_unit = row_unit<V>(grad_y, p.features);
  return sums(gradient_unit, V::set1(scale.unit), V::set1(gradient_unit));
}

template <typename V, typename Problem>
void layer_norm_backward_row(const Problem& p, Index row) {
  const Index begin = row * p.features;
  const auto& found = p.row_scratch[row];
  const V center = V::set1(found.scale.center), inverse = V::set1(found.scale.inverse),
          offset = V::set1(found.scale.offset);
  const V mean_gradient = V::set1(found.mean_gradient), against = V::set1(-found.projection);
  const auto run = [&](auto unit, auto gradient_unit, auto result_unit) {
    for_each_vector<V>(0, p.features, [&](Index at, auto part) {
      const V normalized = fma(load<V>(p.x + begin + at, part) * unit - center, inverse, offset);
      const V gradient = fma(load<V>(p.grad_y + begin + at, part) * gradient_unit,
                             load<V>(p.weight + at, part), V::zero() - mean_gradient);
      store(fma(normalized, against, gradient) * inverse * result_unit, p.grad_x + begin + at,
            part);
    });
  };
  with_gradient_units<V>(found.scale.unit, found.gradient_unit, p.grad_x + begin, p.features, run);
}

template <typename D, typename Isa, typename GX, typename GW, typename GY, typename X, typename W>
void execute(const Backend<D, Isa>& on, const problem::LayerNormBackward<GX, GW, GY, X, W>& p) {
  using V = simd::Vec<typename problem::LayerNormBackward<GX, GW, GY, X, W>::compute, Isa>;
  parallel_for(on, p.rows, Cost{p.features}, [&](Index first, Index last, int) {
    for (Index row = first; row < last; ++row)
      p.row_scratch[row] = layer_norm_backward_statistics<V>(p, row);
  });
  constexpr Index kColumns = 4 * V::lanes;
  parallel_for(on, (p.features + kColumns - 1) / kColumns, Cost{p.rows * kColumns},
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
  parallel_for(on, p.rows, Cost{p.features}, [&](Index first, Index last, int) {
    for (Index row = first; row < last; ++row) layer_norm_backward_row<V>(p, row);
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
