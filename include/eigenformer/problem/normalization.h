/// \file
/// What RMSNorm and LayerNorm ask for, forward and backward.
#pragma once

#include "../core/heads_view.h"
#include "../core/rows.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// Where row `row` begins: head row % heads of token row / heads.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE Index offset_of_row(Index row, Index heads,
                                                               const HeadStrides& strides) {
  if (heads == 1) return row * strides.token;
  return row / heads * strides.token + row % heads * strides.head;
}

/// A checked request: pointers and sizes only.
template <typename Y, typename X, typename W>
struct RmsNorm {
  using compute = detail::common_compute_type<Y, X, W>;
  Y* y;             // (rows, features)
  const X* x;       // (rows, features)
  const W* weight;  // (features)
  Index rows, features;
  float epsilon;
  Index heads;            // rows of x that a token has
  HeadStrides x_strides;  // row r of x is head r % heads of token r / heads

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE const X* x_row(Index row) const {
    return x + offset_of_row(row, heads, x_strides);
  }
};

/// residual += addend, then the norm of residual (which `norm.x` points to).
template <typename Y, typename X, typename R, typename W>
struct AddRmsNorm {
  RmsNorm<Y, R, W> norm;
  R* residual;      // (rows, features)
  const X* addend;  // (rows, features)
};

/// What a row's backward pass needs: with x' = x * unit and g' = g * gradient_unit,
///   grad_x[j] = (g'[j] w[j] inverse + x'[j] along_x) * unit / gradient_unit
template <typename C>
struct RmsNormRow {
  C unit, inverse;  // x * r is x' * inverse; unit 0: the row takes no part
  C along_x;        // -inverse^3 / n * sum_k g'[k] w[k] x'[k]
  C gradient_unit;
};

template <typename GX, typename GW, typename GY, typename X, typename W>
struct RmsNormBackward {
  using compute = detail::common_compute_type<GX, GY, X, W>;
  GX* grad_x;        // (rows, features)
  GW* grad_weight;   // (features), added to
  const GY* grad_y;  // (rows, features)
  const X* x;        // (rows, features)
  const W* weight;   // (features)
  Index rows, features;
  float epsilon;
  RmsNormRow<compute>* row_scratch;  // (rows), host memory: a GPU has its own
};

/// A checked request: pointers and sizes only.
template <typename Y, typename X, typename W>
struct LayerNorm {
  using compute = detail::common_compute_type<Y, X, W>;
  Y* y;             // (rows, features)
  const X* x;       // (rows, features)
  const W* weight;  // (features), or a row for each head
  const W* bias;    // as the weight
  Index rows, features;
  float epsilon;
  Index heads;            // rows of x that a token has
  HeadStrides x_strides;  // row r of x is head r % heads of token r / heads
  bool weights_of_heads;  // each head has its own

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE const X* x_row(Index row) const {
    return x + offset_of_row(row, heads, x_strides);
  }
  /// Where the weights and biases of a row begin.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE Index weights_of(Index row) const {
    return weights_of_heads ? row % heads * features : 0;
  }
};

/// A row, normalized, is (x * unit - center) * inverse + offset.
template <typename C>
struct LayerNormScale {
  C unit, center, inverse, offset;
};

/// What a row's backward pass needs, with g' = g * gradient_unit.
template <typename C>
struct LayerNormRow {
  LayerNormScale<C> scale;      // unit 0: the row takes no part
  C mean_gradient, projection;  // mean(g' w), mean(g' w h)
  C gradient_unit;
};

template <typename GX, typename GW, typename GY, typename X, typename W>
struct LayerNormBackward {
  using compute = detail::common_compute_type<GX, GY, X, W>;
  GX* grad_x;        // (rows, features)
  GW* grad_weight;   // (features), added to
  GW* grad_bias;     // (features), added to
  const GY* grad_y;  // (rows, features)
  const X* x;        // (rows, features)
  const W* weight;   // (features)
  Index rows, features;
  float epsilon;
  LayerNormRow<compute>* row_scratch;  // (rows), host memory: a GPU has its own
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
