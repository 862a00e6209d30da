/// \file
/// What cross-entropy asks for.
#pragma once

#include <cstdint>

#include "../core/values.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// A checked request: pointers and sizes only. L: scalar of the logits, G: of the gradient.
template <typename L, typename G>
struct CrossEntropy {
  const L* logits;       // (rows, classes)
  const Index* targets;  // (rows)
  // (rows, classes), may be the memory of the logits where G is L; nullptr: the loss alone
  G* gradient;
  double* row_loss;  // (rows), written; host memory, as the targets
  Index rows, classes;
  double gradient_scale;
  std::int32_t ignore_index;
  double label_smoothing, z_loss;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
