/// \file
/// A layer by the kernels of one ISA, and weights packed for them.
#pragma once

#include <eigenformer/linear.h>

#include "compare.h"

namespace eigenformer_test {

template <typename Isa, typename Y, typename X, typename Weight, typename E>
ef::Tensor<Y, 2> linear_by(Isa isa, const ef::Tensor<X, 2>& x, const Weight& weight, Index out,
                           const E& epilogue) {
  auto y = poisoned_tensor<Y, 2>({x.dimension(0), out});
  ef::linear_into(on(isa), y, x, weight, epilogue);
  return y;
}

template <typename Isa, typename W, typename T>
ef::PackedWeight<T> pack_for(Isa isa, const ef::Tensor<W, 2>& weight, T,
                             const ef::Int8Packing& options = {}) {
  return ef::pack_weight<T>(on(isa), weight, options);
}

template <typename Isa, typename T>
ef::PackedGatedWeight<T> pack_pair_for(Isa isa, const ef::Tensor<float, 2>& gate,
                                       const ef::Tensor<float, 2>& up, T,
                                       const ef::Int8Packing& options = {}) {
  return ef::pack_gated_weight<T>(on(isa), gate, up, options);
}

/// With a bias or none, the output as wide as the input.
template <typename Isa, typename X, typename Weight>
ef::Tensor<X, 2> run(Isa isa, const ef::Tensor<X, 2>& x, const Weight& weight, Index out,
                     const ef::Tensor<float, 1>* bias = nullptr) {
  const ef::Epilogue<> epilogue = bias == nullptr ? ef::Epilogue{} : ef::Epilogue{}.bias(*bias);
  return linear_by<Isa, X>(isa, x, weight, out, epilogue);
}

}  // namespace eigenformer_test
