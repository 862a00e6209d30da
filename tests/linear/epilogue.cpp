// Laws of fused epilogues: the bits of the separate operators, for every scalar, tail and ISA.
#include <eigenformer/activation.h>
#include <eigenformer/linear.h>

#include "linear_support.h"

using namespace eigenformer_test;

namespace {

/// activation: that of the epilogue; separately(backend, x): the operator of activation.h.
template <typename Weight, typename X, typename E, typename Operator>
void expect_fused(const ef::Tensor<X, 2>& x, const ef::Tensor<float, 2>& weight,
                  const E& activation, const Operator& separately) {
  const Index tokens = x.dimension(0), out = weight.dimension(0);
  const auto bias = random_tensor<float, 1>({out}, 3);
  const auto residual = random_tensor<ef::bfloat16, 2>({tokens, out}, 4);
  for_each_product_isa([&](auto isa) {
    const auto packed = pack_for(isa, weight, Weight{});
    const auto sums =
        linear_by<decltype(isa), float>(isa, x, packed, out, ef::Epilogue{}.bias(bias));
    ef::Tensor<float, 2> expected = separately(on(isa), sums);
    const auto fused = activation.bias(bias);
    ASSERT_TRUE(same_bits(linear_by<decltype(isa), float>(isa, x, packed, out, fused), expected))
        << isa.name;
    for (Index i = 0; i < expected.size(); ++i)
      expected.data()[i] += static_cast<float>(residual.data()[i]);
    const auto joined = fused.residual(residual);
    ASSERT_TRUE(same_bits(linear_by<decltype(isa), float>(isa, x, packed, out, joined), expected))
        << isa.name;
    // output in another type
    const ef::Tensor<ef::half, 2> narrow = expected.template cast<ef::half>();
    ASSERT_TRUE(same_bits(linear_by<decltype(isa), ef::half>(isa, x, packed, out, joined), narrow))
        << isa.name;
    auto in_place = residual;  // the residual stream, updated where it stands
    ef::linear_into(on(isa), in_place, x, packed, fused.residual(in_place));
    const ef::Tensor<ef::bfloat16, 2> stream = expected.template cast<ef::bfloat16>();
    ASSERT_TRUE(same_bits(in_place, stream)) << isa.name;
  });
}

TEST(LinearEpilogue, HasTheBitsOfSeparateOperators) {
  unsigned seed = 1;
  for (Index out : {1, 15, 16, 17, 31, 33, 70})
    for (Index tokens : {1, 3, 14, 37}) {
      const auto weight = random_tensor<float, 2>({out, 45}, ++seed);
      const auto x = random_tensor<float, 2>({tokens, 45}, ++seed);
      const ef::Tensor<ef::bfloat16, 2> x16 = x.cast<ef::bfloat16>();
      const auto silu = [](auto device, const auto& s) { return ef::silu(device, s); };
      const auto gelu = [](auto device, const auto& s) { return ef::gelu(device, s); };
      const auto gelu_tanh = [](auto device, const auto& s) {
        return ef::gelu(device, s, {.approximation = ef::GeluApproximation::tanh});
      };
      const auto relu = [](auto device, const auto& s) { return ef::relu(device, s); };
      const auto nothing = [](auto, const auto& s) { return s; };
      expect_fused<float>(x, weight, ef::Epilogue{}.silu(), silu);
      expect_fused<ef::bfloat16>(x16, weight, ef::Epilogue{}.gelu(), gelu);
      expect_fused<ef::half>(x, weight, ef::Epilogue{}.gelu_tanh(), gelu_tanh);
      expect_fused<std::int8_t>(x16, weight, ef::Epilogue{}.relu(), relu);
      expect_fused<std::int8_t>(x, weight, ef::Epilogue{}, nothing);
    }
}

TEST(LinearEpilogue, IsAValue) {
  const auto x = random_tensor<float, 2>({2, 9}, 1), weight = random_tensor<float, 2>({5, 9}, 2);
  const auto first = random_tensor<float, 1>({5}, 3), second = random_tensor<float, 1>({5}, 4);
  auto epilogue = ef::Epilogue{}.bias(first);
  epilogue = ef::Epilogue{}.bias(second);
  EXPECT_TRUE(same_bits(ef::linear(x, weight, epilogue), ef::linear(x, weight, second)));
  epilogue = ef::Epilogue{};
  EXPECT_TRUE(same_bits(ef::linear(x, weight, epilogue), ef::linear(x, weight)));
}

}  // namespace
