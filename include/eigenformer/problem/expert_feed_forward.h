/// \file
/// What products by expert and the sums of their results ask for.
#pragma once

#include <cstdint>

#include "../core/rows.h"
#include "linear.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// y = epilogue(x w^T), each row with the weight, or the pair of a gated unit, of its expert. E is
/// an Epilogue without a residual; its bias is one expert's after the other's.
template <typename Y, typename X, typename S, bool Gated, typename E>
struct ExpertLinear {
  static constexpr bool kUsesTiles = true;
  Y* y;                         // (pairs, out), by expert
  const X* x;                   // (tokens, in) where there is an order, (pairs, in) by expert else
  const std::int32_t* offsets;  // (experts + 1), of the backend
  const std::int32_t* order;    // (pairs), of the backend, or nullptr
  const PackedPanels<const S>* weights;  // (experts), of one shape and layout; host memory
  Index experts, pairs, tokens, in, out;
  E epilogue;

  /// Elements of one expert's bias.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE Index bias_size() const {
    return Gated ? 2 * out : out;
  }
};

/// y[t] = the sum over j of weights[t, j] * x[places[t, j]], then + sigmoid(shared_gate[t]) *
/// shared[t], or + shared[t]. A place outside [0, pairs) gives NaN.
template <typename Y, typename X, typename W>
struct ExpertCombine {
  using compute = detail::common_compute_type<Y, X, W>;
  Y* y;                        // (tokens, features)
  const X* x;                  // (pairs, features)
  const std::int32_t* places;  // (tokens, chosen)
  const W* weights;            // (tokens, chosen)
  const X* shared;             // (tokens, features), or nullptr
  const W* shared_gate;        // (tokens), or nullptr
  Index tokens, chosen, features, pairs;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
