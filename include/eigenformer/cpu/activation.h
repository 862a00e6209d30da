/// \file
/// CPU kernels of activations: one vectorised pass over the elements, written once over the function. An exponential costs about 20
/// instructions a vector, so memory bandwidth is the limit for what is not in cache.
///
/// A function is a struct of two templates: value<V>(x) and derivative<V>(x). Arguments of products are clamped to [-800, 800],
/// where every function here has reached its limit: infinities then give the limit and not 0 * infinity. A NaN passes through every
/// clamp.
#pragma once

#include <cmath>

#include "../core/device.h"
#include "../core/rows.h"
#include "vector_loop.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// y = function(x), elements one by one.
template <typename Function, typename Y, typename X>
struct ActivationProblem {
  using compute = common_compute_type<Y, X>;
  Y* y;
  const X* x;
  Index count;
};

/// grad_x = grad_y * function'(x).
template <typename Function, typename GX, typename GY, typename X>
struct ActivationBackwardProblem {
  using compute = common_compute_type<GX, GY, X>;
  GX* grad_x;
  const GY* grad_y;
  const X* x;
  Index count;
};

/// y = function(gate) * up, (rows, features) each; a stride is the distance from one row to the next, 2 * features in a fused
/// tensor.
template <typename Function, typename Y, typename Gate, typename Up>
struct GatedProblem {
  using compute = common_compute_type<Y, Gate, Up>;
  Y* y;
  const Gate* gate;
  const Up* up;
  Index rows, features, y_stride, gate_stride, up_stride;
};

/// grad_gate = grad_y * up * function'(gate), grad_up = grad_y * function(gate).
template <typename Function, typename GG, typename GU, typename GY, typename Gate, typename Up>
struct GatedBackwardProblem {
  using compute = common_compute_type<GG, GU, GY, Gate, Up>;
  GG* grad_gate;
  GU* grad_up;
  const GY* grad_y;
  const Gate* gate;
  const Up* up;
  Index rows, features, grad_stride, grad_y_stride, gate_stride;  // grad_stride of both gradients, gate_stride of gate and up
};

/// y = x + residual.
template <typename Y, typename X, typename R>
struct ResidualAddProblem {
  using compute = common_compute_type<Y, X, R>;
  Y* y;
  const X* x;
  const R* residual;
  Index count;
};

namespace cpu {

template <typename V>
EIGENFORMER_INLINE V clamp_to_limits(V x) {
  return min(V::set1(800), max(V::set1(-800), x));  // in this order a NaN passes through
}

/// 1 / (1 + e^-x). Relative error below 3e-7 for float, 0 below -88.8.
template <typename V>
EIGENFORMER_INLINE V sigmoid(V x) {
  return V::set1(1) / (V::set1(1) + simd::exp(V::zero() - x));
}

/// erfc(z) for z >= 0: t e^(-z^2) P(t) with t = 1 / (1 + z / 2), the form of Hastings (1955); P of degree 9 is our own Chebyshev
/// fit of e^(z^2) erfc(z) / t on z in [0, 9.5] (error 1.3e-8 on values of 0.28 to 1). Float: absolute error below 2e-7, relative
/// below 3e-7 + 1.2e-7 z^2. Double calls std::erfc lane by lane.
template <typename V>
EIGENFORMER_INLINE V erfc_of_positive(V z) {
  if constexpr (sizeof(typename V::scalar) == 8) {
    return V::make([&](int i) { return std::erfc(z.v[i]); });
  } else {
    const V t = V::set1(1.0f) / fma(z, V::set1(0.5f), V::set1(1.0f));
    V p = V::set1(0.02014725944f);
    p = fma(p, t, V::set1(-0.1644381257f));
    p = fma(p, t, V::set1(0.5218200105f));
    p = fma(p, t, V::set1(-0.7881048781f));
    p = fma(p, t, V::set1(0.5142102493f));
    p = fma(p, t, V::set1(-0.1451309655f));
    p = fma(p, t, V::set1(0.240586545f));
    p = fma(p, t, V::set1(0.2356785033f));
    p = fma(p, t, V::set1(0.2831819435f));
    p = fma(p, t, V::set1(0.2820494531f));
    return t * p * simd::exp(V::zero() - z * z);
  }
}

/// Distribution function of the normal distribution, without cancellation for negative x.
template <typename V>
EIGENFORMER_INLINE V normal_distribution(V x) {
  const V tail = V::set1(0.5f) * erfc_of_positive(abs(x) * V::set1(static_cast<typename V::scalar>(0.70710678118654752440)));
  return select(less(x, V::zero()), tail, V::set1(1) - tail);
}

struct Silu {
  template <typename V>
  static EIGENFORMER_INLINE V value(V x) {
    return max(V::set1(-800), x) / (V::set1(1) + simd::exp(V::zero() - x));
  }
  template <typename V>
  static EIGENFORMER_INLINE V derivative(V x) {
    x = clamp_to_limits(x);
    const V s = sigmoid(x);
    return s * fma(x, V::set1(1) - s, V::set1(1));
  }
};

struct GeluErf {
  template <typename V>
  static EIGENFORMER_INLINE V value(V x) {
    return max(V::set1(-800), x) * normal_distribution(x);
  }
  template <typename V>
  static EIGENFORMER_INLINE V derivative(V x) {
    x = clamp_to_limits(x);
    const V density = V::set1(static_cast<typename V::scalar>(0.39894228040143267794)) * simd::exp(x * x * V::set1(-0.5f));
    return fma(x, density, normal_distribution(x));
  }
};

struct GeluTanh {
  // (1 + tanh(u)) / 2 is sigmoid(2 u): no tanh is needed, and nothing cancels for negative x.
  template <typename V>
  static EIGENFORMER_INLINE V twice_u(V x) {
    using C = typename V::scalar;
    return x * fma(x * x, V::set1(static_cast<C>(kTwoRootTwoOverPi * 0.044715)), V::set1(static_cast<C>(kTwoRootTwoOverPi)));
  }
  template <typename V>
  static EIGENFORMER_INLINE V value(V x) {
    return max(V::set1(-800), x) / (V::set1(1) + simd::exp(V::zero() - twice_u(x)));
  }
  template <typename V>
  static EIGENFORMER_INLINE V derivative(V x) {
    using C = typename V::scalar;
    x = clamp_to_limits(x);
    const V s = sigmoid(twice_u(x));
    const V slope =
        fma(x * x, V::set1(static_cast<C>(3 * kTwoRootTwoOverPi * 0.044715)), V::set1(static_cast<C>(kTwoRootTwoOverPi)));
    return s * fma(x * slope, V::set1(1) - s, V::set1(1));
  }
  static constexpr double kTwoRootTwoOverPi = 1.59576912160573071176;
};

struct Relu {
  template <typename V>
  static EIGENFORMER_INLINE V value(V x) {
    return max(V::zero(), x);  // in this order a NaN passes through
  }
  template <typename V>
  static EIGENFORMER_INLINE V derivative(V x) {
    return select(is_nan(x), x, select(less(V::zero(), x), V::set1(1), V::zero()));
  }
};

template <typename Isa, CpuDevice D, typename Function, typename Y, typename X>
void activation(Isa, const D& device, const ActivationProblem<Function, Y, X>& p) {
  using V = simd::Vec<typename ActivationProblem<Function, Y, X>::compute, Isa>;
  parallel_for(device, p.count, kElementsPerTask, [&](Index first, Index last, int) {
    for_each_vector<V>(first, last, [&](Index at, auto part) { store(Function::value(load<V>(p.x + at, part)), p.y + at, part); });
  });
}

template <typename Isa, CpuDevice D, typename Function, typename GX, typename GY, typename X>
void activation_backward(Isa, const D& device, const ActivationBackwardProblem<Function, GX, GY, X>& p) {
  using V = simd::Vec<typename ActivationBackwardProblem<Function, GX, GY, X>::compute, Isa>;
  parallel_for(device, p.count, kElementsPerTask, [&](Index first, Index last, int) {
    for_each_vector<V>(first, last, [&](Index at, auto part) {
      store(load<V>(p.grad_y + at, part) * Function::derivative(load<V>(p.x + at, part)), p.grad_x + at, part);
    });
  });
}

/// body(row, first, last) for the pieces of rows that make up elements [begin, end) of (rows, features): threads share out
/// elements, so that one long row is work for all of them.
template <typename Body>
EIGENFORMER_INLINE void for_each_row_piece(Index begin, Index end, Index features, Body&& body) {
  while (begin < end) {
    const Index row = begin / features, first = begin - row * features;
    const Index last = std::min(features, first + end - begin);
    body(row, first, last);
    begin += last - first;
  }
}

template <typename Isa, CpuDevice D, typename Function, typename Y, typename Gate, typename Up>
void gated(Isa, const D& device, const GatedProblem<Function, Y, Gate, Up>& p) {
  using V = simd::Vec<typename GatedProblem<Function, Y, Gate, Up>::compute, Isa>;
  parallel_for(device, p.rows * p.features, kElementsPerTask, [&](Index begin, Index end, int) {
    for_each_row_piece(begin, end, p.features, [&](Index row, Index first, Index last) {
      Y* y = p.y + row * p.y_stride;
      const Gate* gate = p.gate + row * p.gate_stride;
      const Up* up = p.up + row * p.up_stride;
      for_each_vector<V>(first, last, [&](Index at, auto part) {
        store(Function::value(load<V>(gate + at, part)) * load<V>(up + at, part), y + at, part);
      });
    });
  });
}

template <typename Isa, CpuDevice D, typename Function, typename GG, typename GU, typename GY, typename Gate, typename Up>
void gated_backward(Isa, const D& device, const GatedBackwardProblem<Function, GG, GU, GY, Gate, Up>& p) {
  using V = simd::Vec<typename GatedBackwardProblem<Function, GG, GU, GY, Gate, Up>::compute, Isa>;
  parallel_for(device, p.rows * p.features, kElementsPerTask, [&](Index begin, Index end, int) {
    for_each_row_piece(begin, end, p.features, [&](Index row, Index first, Index last) {
      GG* grad_gate = p.grad_gate + row * p.grad_stride;
      GU* grad_up = p.grad_up + row * p.grad_stride;
      const GY* grad_y = p.grad_y + row * p.grad_y_stride;
      const Gate* gate = p.gate + row * p.gate_stride;
      const Up* up = p.up + row * p.gate_stride;
      for_each_vector<V>(first, last, [&](Index at, auto part) {
        const V g = load<V>(grad_y + at, part), a = load<V>(gate + at, part), b = load<V>(up + at, part);
        store(g * b * Function::derivative(a), grad_gate + at, part);
        store(g * Function::value(a), grad_up + at, part);
      });
    });
  });
}

template <typename Isa, CpuDevice D, typename Y, typename X, typename R>
void residual_add(Isa, const D& device, const ResidualAddProblem<Y, X, R>& p) {
  using V = simd::Vec<typename ResidualAddProblem<Y, X, R>::compute, Isa>;
  parallel_for(device, p.count, kElementsPerTask, [&](Index first, Index last, int) {
    for_each_vector<V>(
        first, last, [&](Index at, auto part) { store(load<V>(p.x + at, part) + load<V>(p.residual + at, part), p.y + at, part); });
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
