/// \file
/// What optimizers and gradients ask for.
#pragma once

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// A run of one parameter: at most kPieceElements elements.
struct ParameterPiece {
  float* value;
  float* gradient;
  float* first_moment;   // (size), nullptr where the operation has none; SGD's momentum
  float* second_moment;  // (size), nullptr where the operation has none
  Index size;
};

/// 16384 elements: 64 KiB of each array, so that a piece's four arrays share a second-level cache,
/// and 512 pieces in 8.4 million weights.
inline constexpr Index kPieceElements = 16384;

/// The factors of one AdamW step, the same for every element.
struct AdamWFactors {
  float decay;  // learning_rate * weight_decay
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float step_size;          // learning_rate / (1 - beta1^t)
  float inverse_root_bias;  // 1 / sqrt(1 - beta2^t)
  float epsilon;
};

struct SgdFactors {
  float learning_rate, momentum, weight_decay;
  bool nesterov;
};

/// What a step multiplies each gradient by before it uses it: first the one, then the other, with
/// a rounding each. Unless both are 1 the products replace the gradients.
struct GradientFactors {
  float scale = 1, clip = 1;
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool none() const { return scale == 1 && clip == 1; }
};

template <typename Factors>
struct Optimizer {
  const ParameterPiece* pieces;
  Index count;
  Factors factors;
  GradientFactors gradient;
};

struct ZeroGradients {
  const ParameterPiece* pieces;
  Index count;
};

/// sums[i] = the sum of squares of piece i's gradients times factor, each product rounded to float:
/// infinite or NaN exactly where one of them is, for squares of floats are far within double.
/// `write` replaces the gradients by the products. The sums are host memory, as the pieces.
struct ScaleGradients {
  const ParameterPiece* pieces;
  Index count;
  float factor;
  bool write;
  double* sums;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
