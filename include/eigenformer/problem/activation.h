/// \file
/// What activations, gated activations and the residual sum ask for.
#pragma once

#include "../core/rows.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// The functions, as tags: a backend knows the value and the derivative of each.
struct Identity {};
struct Silu {};
struct GeluErf {};  // x times the distribution function of the normal distribution
struct GeluTanh {};
struct Relu {};

/// y = function(x), elements one by one.
template <typename Function, typename Y, typename X>
struct Activation {
  using compute = detail::common_compute_type<Y, X>;
  Y* y;
  const X* x;
  Index count;
};

/// y = cap * tanh(scale * x / cap), or scale * x where cap is 0.
template <typename Y, typename X>
struct Softcap {
  using compute = detail::common_compute_type<Y, X>;
  Y* y;
  const X* x;
  Index count;
  compute scale, cap;
};

/// grad_x = grad_y * function'(x).
template <typename Function, typename GX, typename GY, typename X>
struct ActivationBackward {
  using compute = detail::common_compute_type<GX, GY, X>;
  GX* grad_x;
  const GY* grad_y;
  const X* x;
  Index count;
};

/// y = function(gate) * up, (rows, features) each; a stride is the distance from one row to the
/// next, 2 * features in a fused tensor.
template <typename Function, typename Y, typename Gate, typename Up>
struct Gated {
  using compute = detail::common_compute_type<Y, Gate, Up>;
  Y* y;
  const Gate* gate;
  const Up* up;
  Index rows, features, y_stride, gate_stride, up_stride;
};

/// y = (clamp(up) + 1) * g * sigmoid(alpha * g), g = min(gate, limit), of rows [gate | up].
template <typename Y, typename X>
struct ClampedSwiglu {
  using compute = detail::common_compute_type<Y, X>;
  Y* y;              // (rows, features)
  const X* gate_up;  // (rows, 2 * features)
  Index rows, features;
  compute alpha, limit;
};

/// grad_gate = grad_y * up * function'(gate), grad_up = grad_y * function(gate).
template <typename Function, typename GG, typename GU, typename GY, typename Gate, typename Up>
struct GatedBackward {
  using compute = detail::common_compute_type<GG, GU, GY, Gate, Up>;
  GG* grad_gate;
  GU* grad_up;
  const GY* grad_y;
  const Gate* gate;
  const Up* up;
  // grad_stride is that of both gradients, gate_stride that of gate and up.
  Index rows, features, grad_stride, grad_y_stride, gate_stride;
};

/// y = x + residual.
template <typename Y, typename X, typename R>
struct ResidualAdd {
  using compute = detail::common_compute_type<Y, X, R>;
  Y* y;
  const X* x;
  const R* residual;
  Index count;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
