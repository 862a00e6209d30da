/// \file
/// CPU kernels of the optimizers: one pass over memory each. Parameters come cut into pieces of at
/// most problem::kPieceElements, so that threads share large parameters and do not pay for small
/// ones, and so that sums have a fixed order: lanes in a piece, then piece after piece. An AdamW
/// step moves 28 bytes and about 12 operations per element: memory sets its speed.
#pragma once

#include <algorithm>

#include "../problem/optimizer.h"
#include "backend.h"
#include "vector/copy.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename Backend, typename Body>
void for_each_piece(const Backend& on, const problem::ParameterPiece* pieces, Index count,
                    Body&& body) {
  parallel_for(on, count, Cost{problem::kPieceElements, kMoveCycles},
               [&](Index first, Index last, int) {
                 for (Index i = first; i < last; ++i) body(i, pieces[i]);
               });
}

/// The gradient that a step uses.
template <typename V, typename Part>
EIGENFORMER_INLINE V scaled_gradient(float* gradient, problem::GradientFactors by, Part part) {
  V g = load<V>(gradient, part);
  if (by.none()) return g;
  g = g * V::set1(by.scale) * V::set1(by.clip);
  store(g, gradient, part);
  return g;
}

template <typename Isa>
void adamw_piece(const problem::ParameterPiece& piece, const problem::AdamWFactors& f,
                 const problem::GradientFactors& by) {
  using V = simd::Vec<float, Isa>;
  const V minus_decay = V::set1(-f.decay), beta1 = V::set1(f.beta1), beta2 = V::set1(f.beta2),
          epsilon = V::set1(f.epsilon);
  const V one_minus_beta1 = V::set1(f.one_minus_beta1),
          one_minus_beta2 = V::set1(f.one_minus_beta2);
  const V minus_step = V::set1(-f.step_size), inverse_root_bias = V::set1(f.inverse_root_bias);
  for_each_vector<V>(0, piece.size, [&](Index i, auto part) {
    const V g = scaled_gradient<V>(piece.gradient + i, by, part);
    const V m = fma(beta1, load<V>(piece.first_moment + i, part), one_minus_beta1 * g);
    const V v = fma(beta2, load<V>(piece.second_moment + i, part), one_minus_beta2 * g * g);
    const V direction = m / fma(sqrt(v), inverse_root_bias, epsilon);
    store(m, piece.first_moment + i, part);
    store(v, piece.second_moment + i, part);
    const V value = load<V>(piece.value + i, part);
    store(value + fma(minus_step, direction, minus_decay * value), piece.value + i, part);
  });
}

template <typename Isa>
void sgd_piece(const problem::ParameterPiece& piece, const problem::SgdFactors& f,
               const problem::GradientFactors& by) {
  using V = simd::Vec<float, Isa>;
  const V minus_rate = V::set1(-f.learning_rate), momentum = V::set1(f.momentum),
          decay = V::set1(f.weight_decay);
  for_each_vector<V>(0, piece.size, [&](Index i, auto part) {
    const V value = load<V>(piece.value + i, part);
    V direction = fma(decay, value, scaled_gradient<V>(piece.gradient + i, by, part));
    if (piece.first_moment != nullptr) {
      const V velocity = fma(momentum, load<V>(piece.first_moment + i, part), direction);
      store(velocity, piece.first_moment + i, part);
      direction = f.nesterov ? fma(momentum, velocity, direction) : velocity;
    }
    store(fma(minus_rate, direction, value), piece.value + i, part);
  });
}

template <typename D, typename Isa>
void execute(const Backend<D, Isa>& on, const problem::Optimizer<problem::AdamWFactors>& p) {
  for_each_piece(on, p.pieces, p.count, [&](Index, const problem::ParameterPiece& piece) {
    adamw_piece<Isa>(piece, p.factors, p.gradient);
  });
}

template <typename D, typename Isa>
void execute(const Backend<D, Isa>& on, const problem::Optimizer<problem::SgdFactors>& p) {
  for_each_piece(on, p.pieces, p.count, [&](Index, const problem::ParameterPiece& piece) {
    sgd_piece<Isa>(piece, p.factors, p.gradient);
  });
}

template <typename D, typename Isa>
void execute(const Backend<D, Isa>& on, const problem::ZeroGradients& p) {
  using V = simd::Vec<float, Isa>;
  for_each_piece(on, p.pieces, p.count, [](Index, const problem::ParameterPiece& piece) {
    fill_line(piece.gradient, piece.size, V::zero());
  });
}

/// Products are made block by block, short enough for the loads of the next to begin meanwhile, and
/// whole rounds of four vectors, so that sums have the order of the piece. They are rounded as
/// floats in memory: GCC 12 takes a vector of doubles to float and back without the rounding.
template <typename Isa>
double scale_and_square(const problem::ParameterPiece& piece, const problem::ScaleGradients& p) {
  using F = simd::Vec<float, Isa>;
  using V = simd::Vec<double, Isa>;
  constexpr Index kBlock = 128;
  float products[kBlock];
  const F factor = F::set1(p.factor);
  const bool scales = p.factor != 1, write = p.write;
  const Index block = scales ? kBlock : piece.size;
  V squares[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  for (Index at = 0; at < piece.size; at += block) {
    const Index size = (std::min)(block, piece.size - at);
    float* const gradient = piece.gradient + at;
    float* const scaled = scales && !write ? products : gradient;
    if (scales)
      for_each_vector<F>(0, size, [&](Index i, auto part) {
        store(load<F>(gradient + i, part) * factor, scaled + i, part);
      });
    for_each_vector_interleaved<V, 4>(size, [&](Index i, auto part, int k) {
      const V g = load<V>(scaled + i, part);
      squares[k] = fma(g, g, squares[k]);
    });
  }
  return reduce_add((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

template <typename D, typename Isa>
void execute(const Backend<D, Isa>& on, const problem::ScaleGradients& p) {
  for_each_piece(on, p.pieces, p.count, [&p](Index index, const problem::ParameterPiece& piece) {
    p.sums[index] = scale_and_square<Isa>(piece, p);
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
