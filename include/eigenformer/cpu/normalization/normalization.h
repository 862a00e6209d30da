/// \file
/// CPU kernels of RMSNorm. A row is read twice, the second time out of L1: sum of squares, then the
/// scaled row; 3 flops per element against 2 sizeof(T) bytes, so memory bandwidth is the limit for
/// rows that are not in cache.
///
/// Backward (with r = 1 / sqrt(mean(x^2) + epsilon), g the gradient of y, n features):
///   grad_weight[j] += sum over rows of g[j] x[j] r
///   grad_x[j]       = r (g[j] w[j] - x[j] r^2 / n * sum_k g[k] w[k] x[k])
/// Three passes: r and the sum of each row; grad_weight, threads splitting the columns; grad_x,
/// threads splitting the rows. grad_x comes last so that it may take the place of grad_y or x. A
/// row whose grad_y is all zero takes no part: its NaN reach nothing.
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

/// x / rms is (x * unit) * inverse.
template <typename C>
struct RmsScale {
  C unit, inverse;
};

template <typename V, typename X>
RmsScale<typename V::scalar> rms_scale(const X* x, Index features, float epsilon) {
  using C = typename V::scalar;
  const auto mean_square = [&](auto unit) {
    return sum_over_vectors<V>(features,
                               [&](V sum, Index at, auto part) {
                                 const V value = load<V>(x + at, part) * unit;
                                 return fma(value, value, sum);
                               }) /
           static_cast<C>(features);
  };
  const C mean = mean_square(UnitOne{}) + static_cast<C>(epsilon);
  if (in_range(mean)) [[likely]]
    return {C(1), C(1) / std::sqrt(mean)};
  const C unit = row_unit<V>(x, features);
  const double scaled =
      static_cast<double>(mean_square(V::set1(unit))) + static_cast<double>(epsilon) * unit * unit;
  return {unit, static_cast<C>(1 / std::sqrt(scaled))};
}

template <typename Isa, typename Y, typename X, typename W>
void rms_norm_row(const problem::RmsNorm<Y, X, W>& p, Index row) {
  using V = simd::Vec<typename problem::RmsNorm<Y, X, W>::compute, Isa>;
  const X* x = p.x_row(row);
  Y* y = p.y + row * p.features;
  const auto found = rms_scale<V>(x, p.features, p.epsilon);
  const V scale = V::set1(found.inverse);
  with_unit<V>(found.unit, [&](auto unit) {
    for_each_vector<V>(0, p.features, [&](Index at, auto part) {
      store(load<V>(x + at, part) * unit * scale * load<V>(p.weight + at, part), y + at, part);
    });
  });
}

template <typename D, typename Isa, typename Y, typename X, typename W>
void execute(const Backend<D, Isa>& on, const problem::RmsNorm<Y, X, W>& p) {
  parallel_for(on, p.rows, Cost{p.features}, [&](Index first, Index last, int) {
    for (Index row = first; row < last; ++row) rms_norm_row<Isa>(p, row);
  });
}

template <typename D, typename Isa, typename Y, typename X, typename R, typename W>
void execute(const Backend<D, Isa>& on, const problem::AddRmsNorm<Y, X, R, W>& p) {
  using V = simd::Vec<detail::common_compute_type<Y, X, R, W>, Isa>;
  const Index features = p.norm.features;
  parallel_for(on, p.norm.rows, Cost{features}, [&](Index first, Index last, int) {
    for (Index row = first; row < last; ++row) {
      R* residual = p.residual + row * features;
      const X* addend = p.addend + row * features;
      for_each_vector<V>(0, features, [&](Index at, auto part) {
        store(load<V>(residual + at, part) + load<V>(addend + at, part), residual + at, part);
      });
      // It reads what was stored, rounded: the same bits as the two operators one after the other.
      rms_norm_row<Isa>(p.norm, row);
    }
  });
}

/// Adds to `Vectors` vectors of grad_weight that start at `column`. Rows are summed in blocks of
/// 64, which keeps the rounding error of 10^5 rows that of a few hundred.
template <typename V, int Vectors, typename Problem, typename Part>
void rms_norm_weight_gradient(const Problem& p, Index column, Index columns, Part part) {
  constexpr Index kRowBlock = 64;
  V total[Vectors];
  for (int k = 0; k < Vectors; ++k) total[k] = V::zero();
  for (Index begin = 0; begin < p.rows; begin += kRowBlock) {
    V block[Vectors];
    for (int k = 0; k < Vectors; ++k) block[k] = V::zero();
    for (Index row = begin; row < (std::min)(begin + kRowBlock, p.rows); ++row) {
      const auto& found = p.row_scratch[row];
      if (found.unit == 0) continue;
      const Index at = row * p.features + column;
      const V unit = V::set1(found.unit), scale = V::set1(found.inverse);
      for (int k = 0; k < Vectors; ++k) {
        const Index i = at + k * V::lanes;
        block[k] =
            fma(load<V>(p.x + i, part) * unit * scale, load<V>(p.grad_y + i, part), block[k]);
      }
    }
    for (int k = 0; k < Vectors; ++k) total[k] = total[k] + block[k];
  }
  typename V::scalar sums[Vectors * V::lanes];
  for (int k = 0; k < Vectors; ++k) total[k].store(sums + k * V::lanes);
  for (Index j = 0; j < columns; ++j) p.grad_weight[column + j] += sums[j];
}

template <typename V, typename Problem>
problem::RmsNormRow<typename V::scalar> rms_norm_backward_statistics(const Problem& p, Index row) {
  using C = typename V::scalar;
  const auto* x = p.x + row * p.features;
  const auto* grad_y = p.grad_y + row * p.features;
  const auto along_x = [&](C inverse, auto unit, auto gradient_unit) {
    const C projection = sum_over_vectors<V>(p.features, [&](V sum, Index at, auto part) {
      return fma(load<V>(grad_y + at, part) * gradient_unit * load<V>(p.weight + at, part),
                 load<V>(x + at, part) * unit, sum);
    });
    // One factor of the three is here, one with x, one with both: the cube may leave the range.
    return -(projection * inverse / static_cast<C>(p.features));
  };
  const auto found = rms_scale<V>(x, p.features, p.epsilon);
  if (found.unit == 1) {
    const C along = along_x(found.inverse, UnitOne{}, UnitOne{});
    if (std::isfinite(along)) [[likely]]
      return {C(1), found.inverse, along, C(1)};
  }
  if (!any_nonzero<V>(grad_y, p.features)) return {};
  const C gradient_unit = row_unit<V>(grad_y, p.features);
  return {found.unit, found.inverse,
          along_x(found.inverse, V::set1(found.unit), V::set1(gradient_unit)), gradient_unit};
}

template <typename V, typename Problem>
void rms_norm_backward_row(const Problem& p, Index row) {
  const Index begin = row * p.features;
  const auto& found = p.row_scratch[row];
  const V scale = V::set1(found.inverse), along_x = V::set1(found.along_x);
  const auto run = [&](auto unit, auto gradient_unit, auto result_unit) {
    for_each_vector<V>(0, p.features, [&](Index at, auto part) {
      const V gradient =
          load<V>(p.grad_y + begin + at, part) * gradient_unit * load<V>(p.weight + at, part);
      store(fma(load<V>(p.x + begin + at, part) * unit * scale, along_x, gradient) * scale *
                result_unit,
            p.grad_x + begin + at, part);
    });
  };
  with_gradient_units<V>(found.unit, found.gradient_unit, p.grad_x + begin, p.features, run);
}

template <typename D, typename Isa, typename GX, typename GW, typename GY, typename X, typename W>
void execute(const Backend<D, Isa>& on, const problem::RmsNormBackward<GX, GW, GY, X, W>& p) {
  using V = simd::Vec<typename problem::RmsNormBackward<GX, GW, GY, X, W>::compute, Isa>;
  parallel_for(on, p.rows, Cost{p.features}, [&](Index first, Index last, int) {
    for (Index row = first; row < last; ++row)
      p.row_scratch[row] = rms_norm_backward_statistics<V>(p, row);
  });
  constexpr Index kColumns = 4 * V::lanes;
  parallel_for(
      on, (p.features + kColumns - 1) / kColumns, Cost{p.rows * kColumns},
      [&](Index first, Index last, int) {
        for (Index block = first; block < last; ++block) {
          const Index begin = block * kColumns, end = (std::min)(begin + kColumns, p.features);
          if (end - begin == kColumns) {
            rms_norm_weight_gradient<V, 4>(p, begin, kColumns, WholeVector{});
          } else {
            for_each_vector<V>(begin, end, [&](Index at, auto part) {
              rms_norm_weight_gradient<V, 1>(p, at, std::min<Index>(V::lanes, end - at), part);
            });
          }
        }
      });
  parallel_for(on, p.rows, Cost{p.features}, [&](Index first, Index last, int) {
    for (Index row = first; row < last; ++row) rms_norm_backward_row<V>(p, row);
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
