/// \file
/// CPU kernels of activations: one vectorised pass over the elements, written once over the
/// function. An exponential costs about 20 instructions per vector, so memory bandwidth is the limit
/// for what is not in cache.
#pragma once

#include <limits>

#include "../core/rows.h"
#include "../problem/activation.h"
#include "backend.h"
#include "vector/functions.h"
#include "vector/loop.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename D, typename Isa, typename Function, typename Y, typename X>
void execute(const Backend<D, Isa>& on, const problem::Activation<Function, Y, X>& p) {
  using V = simd::Vec<typename problem::Activation<Function, Y, X>::compute, Isa>;
  parallel_for(on, p.count, Cost{1}, [&](Index first, Index last, int) {
    for_each_vector<V>(first, last, [&](Index at, auto part) {
      store(ActivationFunction<Function>::value(load<V>(p.x + at, part)), p.y + at, part);
    });
  });
}

template <typename D, typename Isa, typename Y, typename X>
void execute(const Backend<D, Isa>& on, const problem::Softcap<Y, X>& p) {
  using V = simd::Vec<typename problem::Softcap<Y, X>::compute, Isa>;
  const V scale = V::set1(p.scale), cap = V::set1(p.cap), unit = V::set1(p.scale / p.cap);
  parallel_for(on, p.count, Cost{1}, [&](Index first, Index last, int) {
    if (p.cap == 0)
      for_each_vector<V>(first, last, [&](Index at, auto part) {
        store(load<V>(p.x + at, part) * scale, p.y + at, part);
      });
    else
      for_each_vector<V>(first, last, [&](Index at, auto part) {
        store(tanh(load<V>(p.x + at, part) * unit) * cap, p.y + at, part);
      });
  });
}

template <typename D, typename Isa, typename Function, typename GX, typename GY, typename X>
void execute(const Backend<D, Isa>& on, const problem::ActivationBackward<Function, GX, GY, X>& p) {
  using V = simd::Vec<typename problem::ActivationBackward<Function, GX, GY, X>::compute, Isa>;
  parallel_for(on, p.count, Cost{1}, [&](Index first, Index last, int) {
    for_each_vector<V>(first, last, [&](Index at, auto part) {
      store(load<V>(p.grad_y + at, part) *
                ActivationFunction<Function>::derivative(load<V>(p.x + at, part)),
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

template <typename D, typename Isa, typename Function, typename Y, typename Gate, typename Up>
void execute(const Backend<D, Isa>& on, const problem::Gated<Function, Y, Gate, Up>& p) {
  using V = simd::Vec<typename problem::Gated<Function, Y, Gate, Up>::compute, Isa>;
  parallel_for(on, p.rows * p.features, Cost{1}, [&](Index begin, Index end, int) {
    for_each_row_piece(begin, end, p.features, [&](Index row, Index first, Index last) {
      Y* y = p.y + row * p.y_stride;
      const Gate* gate = p.gate + row * p.gate_stride;
      const Up* up = p.up + row * p.up_stride;
      for_each_vector<V>(first, last, [&](Index at, auto part) {
        store(
            ActivationFunction<Function>::value(load<V>(gate + at, part)) * load<V>(up + at, part),
            y + at, part);
      });
    });
  });
}

template <typename D, typename Isa, typename Y, typename X>
void execute(const Backend<D, Isa>& on, const problem::ClampedSwiglu<Y, X>& p) {
  using V = simd::Vec<typename problem::ClampedSwiglu<Y, X>::compute, Isa>;
  const V alpha = V::set1(p.alpha), limit = V::set1(p.limit), one = V::set1(1);
  parallel_for(on, p.rows * p.features, Cost{1}, [&](Index begin, Index end, int) {
    for_each_row_piece(begin, end, p.features, [&](Index row, Index first, Index last) {
      const X* const gate = p.gate_up + row * 2 * p.features;
      const X* const up = gate + p.features;
      for_each_vector<V>(first, last, [&](Index at, auto part) {
        // in this order a NaN passes through; below -800 / alpha the product has reached 0
        const V g = minimum(limit, maximum(V::set1(-800), load<V>(gate + at, part)));
        const V u = minimum(limit, maximum(V::zero() - limit, load<V>(up + at, part)));
        store((u + one) * (g * sigmoid(alpha * g)), p.y + row * p.features + at, part);
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

template <typename D, typename Isa, typename Function, typename GG, typename GU, typename GY,
          typename Gate, typename Up>
void execute(const Backend<D, Isa>& on,
             const problem::GatedBackward<Function, GG, GU, GY, Gate, Up>& p) {
  using V =
      simd::Vec<typename problem::GatedBackward<Function, GG, GU, GY, Gate, Up>::compute, Isa>;
  parallel_for(on, p.rows * p.features, Cost{1}, [&](Index begin, Index end, int) {
    for_each_row_piece(begin, end, p.features, [&](Index row, Index first, Index last) {
      GG* grad_gate = p.grad_gate + row * p.grad_stride;
      GU* grad_up = p.grad_up + row * p.grad_stride;
      const GY* grad_y = p.grad_y + row * p.grad_y_stride;
      const Gate* gate = p.gate + row * p.gate_stride;
      const Up* up = p.up + row * p.gate_stride;
      for_each_vector<V>(first, last, [&](Index at, auto part) {
        const V g = load<V>(grad_y + at, part), a = load<V>(gate + at, part),
                b = load<V>(up + at, part);
        store(product_with_small(g, b, ActivationFunction<Function>::derivative(a)), grad_gate + at,
              part);
        store(g * ActivationFunction<Function>::value(a), grad_up + at, part);
      });
    });
  });
}

template <typename D, typename Isa, typename Y, typename X, typename R>
void execute(const Backend<D, Isa>& on, const problem::ResidualAdd<Y, X, R>& p) {
  using V = simd::Vec<typename problem::ResidualAdd<Y, X, R>::compute, Isa>;
  parallel_for(on, p.count, Cost{1}, [&](Index first, Index last, int) {
    for_each_vector<V>(first, last, [&](Index at, auto part) {
      store(load<V>(p.x + at, part) + load<V>(p.residual + at, part), p.y + at, part);
    });
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
