/// \file
/// CUDA kernels of the optimizers: one pass over memory each, one block per piece of a parameter
/// (at most problem::kPieceElements), coalesced. AdamW moves 28 bytes and some 12 operations per
/// element, SGD 12 or 20 bytes, a norm 4, scaling 8: memory is the limit, of which 85% and more is
/// expected from a few hundred pieces on; few pieces leave multiprocessors idle. The operations are
/// those of the CPU, one by one; sums over a piece are in double, in a fixed tree. The table of
/// pieces, 40 bytes for 16384 elements, is staged with every call; what is asked of the pieces
/// comes back, and the call waits for it.
#pragma once

#include <cmath>

#include "../problem/optimizer.h"
#include "collectives.cuh"
#include "launch.cuh"
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

/// results[i] = finish(body(element) combined over the elements of piece i); nothing combined is 0.
template <typename Body>
struct PieceReduction {
  using Sum = typename Body::Sum;
  using Result = typename Body::Result;
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp;
  const ParameterPiece* pieces;
  Index count;
  Result* results;
  Body body;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = block.template shared<Sum>(kWarps);
    for (Index at = block.index(); at < count; at += block.count()) {
      const ParameterPiece piece = pieces[at];
      Sum sum{};
      for (Index i = block.thread(); i < piece.size; i += block.size())
        body(sum, piece.gradient[i]);
      sum = reduce_block(block, scratch, sum, typename Body::Combine{});
      if (block.thread() == 0) results[at] = body.finish(sum);
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

template <typename D, typename Body>
void reduce_pieces(const Backend<D>& on, const char* name, const ParameterPiece* pieces,
                   Index count, typename Body::Result* results, const Body& body) {
  using Kernel = PieceReduction<Body>;
  fetch(on, name, results, count, [&](typename Body::Result* device) {
    launch_rows(on, name, count, shared_bytes<typename Body::Sum>(Kernel::kWarps),
                Kernel{stage_pieces(on, name, pieces, count), count, device, body});
  });
}

struct AdamWStep {
  problem::AdamWFactors f;

  EIGENFORMER_DEVICE void operator()(Index i, const ParameterPiece& piece) const {
    const float g = piece.gradient[i], value = piece.value[i];
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
  for_each_element(on, "AdamW", p.pieces, p.count, AdamWStep{p.factors});
}

struct SgdStep {
  problem::SgdFactors f;

  EIGENFORMER_DEVICE void operator()(Index i, const ParameterPiece& piece) const {
    const float value = piece.value[i];
    float direction = std::fma(f.weight_decay, value, piece.gradient[i]);
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
  for_each_element(on, "Sgd", p.pieces, p.count, SgdStep{p.factors});
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

struct AddSquare {
  using Sum = double;
  using Result = double;
  using Combine = Add;

  EIGENFORMER_DEVICE void operator()(double& sum, float gradient) const {
    const double g = static_cast<double>(gradient);
    sum = std::fma(g, g, sum);
  }
  EIGENFORMER_DEVICE double finish(double sum) const { return sum; }
};

template <typename D>
void execute(const Backend<D>& on, const problem::GradientSquares& p) {
  reduce_pieces(on, "gradient_norm", p.pieces, p.count, p.sums, AddSquare{});
}

/// Scales a gradient, but for a factor of 1, which writes nothing; the sum is 1 where one is not
/// finite.
struct ScaleAndLook {
  using Sum = int;
  using Result = bool;
  using Combine = Larger;
  float factor;

  EIGENFORMER_DEVICE void operator()(int& not_finite, float& gradient) const {
    float g = gradient;
    if (factor != 1.0f) {
      g *= factor;
      gradient = g;
    }
    if (!std::isfinite(g)) not_finite = 1;
  }
  EIGENFORMER_DEVICE bool finish(int not_finite) const { return not_finite == 0; }
};

template <typename D>
void execute(const Backend<D>& on, const problem::ScaleGradients& p) {
  reduce_pieces(on, "scale_gradients", p.pieces, p.count, p.finite, ScaleAndLook{p.factor});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
