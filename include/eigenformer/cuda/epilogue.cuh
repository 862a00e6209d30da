/// \file
/// What becomes of the finished sums of a linear layer, as in cpu/linear/epilogue.h:
///
///   y = residual + function(value)              value: sum + bias
///   y = residual + function(gate) * up          of a gated layer, both with their bias
///
/// The product adds the bias itself, since some fold it into their last multiply-add.
#pragma once

#include <type_traits>

#include "../problem/linear.h"
#include "functions.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename Y, bool Gated, typename E>
struct Finish {
  using Function = ActivationFunction<typename E::function>;
  static constexpr int kMatrices = Gated ? 2 : 1;
  Y* y;  // (tokens, out)
  Index out;
  E epilogue;

  /// Of an output of matrix 0, or of 1 where the layer is gated; 0 where there is none.
  template <typename C>
  EIGENFORMER_DEVICE C bias(Index column, int matrix = 0) const {
    return epilogue.bias == nullptr ? C(0) : static_cast<C>(epilogue.bias[matrix * out + column]);
  }

  /// values[m]: the sum of matrix m and its bias. The residual may be y itself.
  template <typename C>
  EIGENFORMER_DEVICE void store(Index token, Index column, const C (&values)[kMatrices]) const {
    C value = Function::value(values[0]);
    if constexpr (Gated) value = value * values[1];
    const Index at = token * out + column;
    if (epilogue.residual != nullptr) value = static_cast<C>(epilogue.residual[at]) + value;
    y[at] = static_cast<Y>(value);
  }
};

/// That of a problem of linear layers.
template <bool Gated, typename Problem>
auto finish_of(const Problem& p) {
  using Y = std::remove_pointer_t<decltype(p.y)>;
  using E = std::remove_cvref_t<decltype(p.epilogue)>;
  return Finish<Y, Gated, E>{p.y, p.out, p.epilogue};
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
