/// \file
/// CUDA kernels of the optimizers: one pass over memory each, one block per piece of a parameter
/// (at most problem::kPieceElements), coalesced. AdamW moves 28 bytes and some 12 operations per
/// element, SGD 12 or 20 bytes, either 4 more where it scales gradients, a norm 4, scaling 8, both
/// with one multiply-add in double: memory is the limit, of which 85% and more is expected from a
/// few hundred pieces on; few pieces leave multiprocessors idle. The operations are those of the
/// CPU, one by one; sums over a piece are in double, in a fixed tree. The table of pieces, 40 bytes
/// for 16384 elements, is staged with every call; sums come back, and the call waits for them.
#pragma once

#include <cmath>

#include "../problem/optimizer.h"
#include "collectives.cuh"
#include "launch.cuh"
#include "packs.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

using problem::ParameterPiece;

/// body(i, piece) for the elements of all pieces.
template <typename Body>
struct PieceElements {
  static constexpr int kThreads = kRowThreads;
  const ParameterPiece* pieces;
  Index count;
  Body body;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    for (Index at = block.index(); at < count; at += block.count()) {
      const ParameterPiece piece = pieces[at];
      for (Index i = block.thread(); i < piece.size; i += block.size()) body(i, piece);
    }
  }
};

template <typename D>
const ParameterPiece* stage_pieces(const Backend<D>& on, const char* name,
                                   const ParameterPiece* pieces, Index count) {
  const auto [staged] = stage(on, name, std::span(pieces, static_cast<std::size_t>(count)));
  return staged;
}

template <typename D, typename Body>
void for_each_element(const Backend<D>& on, const char* name, const ParameterPiece* pieces,
                      Index count, const Body& body) {
  if (count <= 0) return;
  launch_rows(on, name, count, 0,
              PieceElements<Body>{stage_pieces(on, name, pieces, count), count, body});
}

/// The gradient that a step uses.
EIGENFORMER_DEVICE inline float scaled_gradient(float& gradient,
                                                const problem::GradientFactors& by) {
  if (by.none()) return gradient;
  return gradient = gradient * by.scale * by.clip;
}

struct AdamWStep {
  problem::AdamWFactors f;
  problem::GradientFactors by;

  EIGENFORMER_DEVICE void operator()(Index i, const ParameterPiece& piece) const {
    const float g = scaled_gradient(piece.gradient[i], by), value = piece.value[i];
    const float m = std::fma(f.beta1, piece.first_moment[i], f.one_minus_beta1 * g);
    const float v = std::fma(f.beta2, piece.second_moment[i], f.one_minus_beta2 * g * g);
    const float direction = m / std::fma(std::sqrt(v), f.inverse_root_bias, f.epsilon);
    piece.first_moment[i] = m;
    piece.second_moment[i] = v;
    piece.value[i] = value + std::fma(-f.step_size, direction, -f.decay * value);
  }
};

template <typename D>
void execute(const Backend<D>& on, const problem::Optimizer<problem::AdamWFactors>& p) {
  for_each_element(on, "AdamW", p.pieces, p.count, AdamWStep{p.factors, p.gradient});
}

struct SgdStep {
  problem::SgdFactors f;
  problem::GradientFactors by;

  EIGENFORMER_DEVICE void operator()(Index i, const ParameterPiece& piece) const {
    const float value = piece.value[i];
    float direction = std::fma(f.weight_decay, value, scaled_gradient(piece.gradient[i], by));
    if (piece.first_moment != nullptr) {
      const float velocity = std::fma(f.momentum, piece.first_moment[i], direction);
      piece.first_moment[i] = velocity;
      direction = f.nesterov ? std::fma(f.momentum, velocity, direction) : velocity;
    }
    piece.value[i] = std::fma(-f.learning_rate, direction, value);
  }
};

template <typename D>
void execute(const Backend<D>& on, const problem::Optimizer<problem::SgdFactors>& p) {
  for_each_element(on, "Sgd", p.pieces, p.count, SgdStep{p.factors, p.gradient});
}

struct ZeroGradient {
  EIGENFORMER_DEVICE void operator()(Index i, const ParameterPiece& piece) const {
    piece.gradient[i] = 0.0f;
  }
};

template <typename D>
void execute(const Backend<D>& on, const problem::ZeroGradients& p) {
  for_each_element(on, "zero_grad", p.pieces, p.count, ZeroGradient{});
}

/// Scaling, the search for what is not finite and the norm, in one read of 16 bytes per thread.
struct ScaleGradientsKernel {
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp;
  problem::ScaleGradients p;  // its pieces and sums on the device

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = block.template shared<double>(kWarps);
    for (Index at = block.index(); at < p.count; at += block.count()) {
      const ParameterPiece piece = p.pieces[at];
      double squares = 0;
      for_each_pack_of_line(
          block, piece.size,
          [&]<int N>(WidthOf<N>, Index j) {
            auto products = load_pack<float, N>(piece.gradient + j);
            for (int i = 0; i < N; ++i) {
              products[i] *= p.factor;
              const double g = static_cast<double>(products[i]);
              squares = std::fma(g, g, squares);
            }
            if (p.write) store_pack<N>(products, piece.gradient + j);
          },
          static_cast<const float*>(piece.gradient));
      squares = reduce_block(block, scratch, squares, Add{});
      if (block.thread() == 0) p.sums[at] = squares;
    }
  }
};

template <typename D>
void execute(const Backend<D>& on, const problem::ScaleGradients& p) {
  const char* const name = p.write ? "scale_gradients" : "gradient_norm";
  fetch(on, name, p.sums, p.count, [&](double* sums) {
    const auto pieces = stage_pieces(on, name, p.pieces, p.count);
    launch_rows(on, name, p.count, shared_bytes<double>(ScaleGradientsKernel::kWarps),
                ScaleGradientsKernel{{pieces, p.count, p.factor, p.write, sums}});
  });
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
