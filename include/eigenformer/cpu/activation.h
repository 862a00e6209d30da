/// \file
/// CPU kernels of activations: one vectorised pass over the elements, written once over the
/// function. An exponential costs about 20 instructions a vector, so memory bandwidth is the limit
/// for what is not in cache.
#pragma once

#include <limits>

#include "../core/device.h"
#include "../core/rows.h"
#include "activation_functions.h"
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

/// y = function(gate) * up, (rows, features) each; a stride is the distance from one row to the
/// next, 2 * features in a fused tensor.
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
  Index rows, features, grad_stride, grad_y_stride,
      gate_stride;  // grad_stride of both gradients, gate_stride of gate and up
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

template <typename Isa, CpuDevice D, typename Function, typename Y, typename X>
void activation(Isa, const D& device, const ActivationProblem<Function, Y, X>& p) {
  using V = simd::Vec<typename ActivationProblem<Function, Y, X>::compute, Isa>;
  parallel_for(device, p.count, kElementsPerTask, [&](Index first, Index last, int) {
    for_each_vector<V>(first, last, [&](Index at, auto part) {
      store(Function::value(load<V>(p.x + at, part)), p.y + at, part);
    });
  });
}

template <typename Isa, CpuDevice D, typename Function, typename GX, typename GY, typename X>
void activation_backward(Isa, const D& device,
                         const ActivationBackwardProblem<Function, GX, GY, X>& p) {
  using V = simd::Vec<typename ActivationBackwardProblem<Function, GX, GY, X>::compute, Isa>;
  parallel_for(device, p.count, kElementsPerTask, [&](Index first, Index last, int) {
    for_each_vector<V>(first, last, [&](Index at, auto part) {
      store(load<V>(p.grad_y + at, part) * Function::derivative(load<V>(p.x + at, part)),
            p.grad_x + at, part);
    });
  });
}

/// body(row, first, last) for the pieces of rows that make up elements [begin, end) of (rows,
/// features): threads share out elements, so that one long row is work for all of them.
template <typename Body>
EIGENFORMER_INLINE void for_each_row_piece(Index begin, Index end, Index features, Body&& body) {
  while (begin < end) {
    const Index row = begin / features, first = begin - row * features;
    const Index last = (std::min)(features, first + end - begin);
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

/// a * b * c for |c| of at most about 1; where a * b overflows, both are above 1, and b * c comes
/// first.
template <typename V>
EIGENFORMER_INLINE V product_with_small(const V& a, const V& b, const V& c) {
  const V ab = a * b;
  const V largest = V::set1((std::numeric_limits<typename V::scalar>::max)());
  return select(less_equal(abs(ab), largest), ab * c, a * (b * c));
}

template <typename Isa, CpuDevice D, typename Function, typename GG, typename GU, typename GY,
          typename Gate, typename Up>
void gated_backward(Isa, const D& device,
                    const GatedBackwardProblem<Function, GG, GU, GY, Gate, Up>& p) {
  using V = simd::Vec<typename GatedBackwardProblem<Function, GG, GU, GY, Gate, Up>::compute, Isa>;
  parallel_for(device, p.rows * p.features, kElementsPerTask, [&](Index begin, Index end, int) {
    for_each_row_piece(begin, end, p.features, [&](Index row, Index first, Index last) {
      GG* grad_gate = p.grad_gate + row * p.grad_stride;
      GU* grad_up = p.grad_up + row * p.grad_stride;
      const GY* grad_y = p.grad_y + row * p.grad_y_stride;
      const Gate* gate = p.gate + row * p.gate_stride;
      const Up* up = p.up + row * p.gate_stride;
      for_each_vector<V>(first, last, [&](Index at, auto part) {
        const V g = load<V>(grad_y + at, part), a = load<V>(gate + at, part),
                b = load<V>(up + at, part);
        store(product_with_small(g, b, Function::derivative(a)), grad_gate + at, part);
        store(g * Function::value(a), grad_up + at, part);
      });
    });
  });
}

template <typename Isa, CpuDevice D, typename Y, typename X, typename R>
void residual_add(Isa, const D& device, const ResidualAddProblem<Y, X, R>& p) {
  using V = simd::Vec<typename ResidualAddProblem<Y, X, R>::compute, Isa>;
  parallel_for(device, p.count, kElementsPerTask, [&](Index first, Index last, int) {
    for_each_vector<V>(first, last, [&](Index at, auto part) {
      store(load<V>(p.x + at, part) + load<V>(p.residual + at, part), p.y + at, part);
    });
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
