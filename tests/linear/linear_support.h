/// \file
/// A layer by the kernels of one ISA, weights packed for them, and a law of all quantized weights.
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

/// A token that holds NaN or infinity gives NaN and changes no other.
template <typename T>
void expect_nan_stays_with_its_token(const ef::PackedWeight<T>& weight) {
  const Index tokens = 14, in = weight.columns(), out = weight.rows();
  auto x = random_tensor<float, 2>({tokens, in}, 1);
  const ef::Tensor<float, 2> before = ef::linear(x, weight);
  x(3, 7) = std::numeric_limits<float>::quiet_NaN();
  x(12, in - 1) = -std::numeric_limits<float>::infinity();
  const ef::Tensor<float, 2> after = ef::linear(x, weight);
  for (Index t = 0; t < tokens; ++t)
    for (Index o = 0; o < out; ++o) {
      if (t == 3 || t == 12)
        ASSERT_TRUE(std::isnan(after(t, o)));
      else
        ASSERT_EQ(after(t, o), before(t, o));
    }
}

}  // namespace eigenformer_test
