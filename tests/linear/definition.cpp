// Laws: equal to the plain definition for every pair of scalars, tail, block and ISA, packed or
// not.
#include <eigenformer/linear.h>
#include <eigenformer/reference/linear.h>

#include "linear_support.h"

using namespace eigenformer_test;

namespace {

template <typename X, typename W>
struct Pair {
  using Activation = X;
  using Weight = W;
};
template <typename P>
class Linear : public ::testing::Test {};
#if defined(EIGENFORMER_SANITIZED)
using Pairs = ::testing::Types<Pair<float, float>, Pair<ef::bfloat16, ef::bfloat16>>;
#else
using Pairs =
    ::testing::Types<Pair<float, float>, Pair<double, double>, Pair<ef::bfloat16, ef::bfloat16>,
                     Pair<ef::half, ef::half>, Pair<float, ef::bfloat16>, Pair<float, ef::half>,
                     Pair<ef::bfloat16, float>, Pair<ef::half, float>>;
#endif
TYPED_TEST_SUITE(Linear, Pairs);

/// What a plain weight is packed as, to compare with.
template <typename X, typename W>
using Packing = std::conditional_t<std::is_same_v<X, ef::bfloat16>, ef::bfloat16, W>;

TYPED_TEST(Linear, EqualsItsDefinitionAtEveryTail) {
  using X = typename TypeParam::Activation;
  using W = typename TypeParam::Weight;
  constexpr double allowed = std::max(tolerance<X>(), std::is_same_v<X, ef::bfloat16> ? 1e-2 : 0.0);
  unsigned seed = 1;
  for (Index in : {0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 65, 130})
    for (Index out : {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65}) {
      const Index tokens = seed % 30 == 0 ? 0 : 1 + seed % 29;
      const auto x = random_tensor<X, 2>({tokens, in}, ++seed);
      const auto weight = random_tensor<W, 2>({out, in}, ++seed);
      const auto bias = random_tensor<float, 1>({out}, ++seed);
      const auto wide_bias = to_double(bias);
      const auto expected =
          ef::reference::linear(to_double(x), to_double(weight), wide_bias.data());
      for_each_product_isa([&](auto isa) {
        const auto y = run(isa, x, weight, out, &bias);
        ASSERT_LE(relative_error(y, expected), allowed)
            << isa.name << " " << tokens << " x " << in << " x " << out;
        const auto packed = pack_for(isa, weight, Packing<X, W>{});
        ASSERT_TRUE(same_bits(y, run(isa, x, packed, out, &bias)))
            << isa.name << " " << tokens << " x " << in << " x " << out;
        ASSERT_TRUE(same_bits(run(isa, x, weight, out), run(isa, x, packed, out)))
            << isa.name << " without bias";
      });
    }
}

// Blocks of k are 256, 512 or 1024 steps of 1, 2 or 4 inputs: sizes around each, whose last block
// is one element.
TYPED_TEST(Linear, EqualsItsDefinitionAroundEveryBlock) {
  using X = typename TypeParam::Activation;
  using W = typename TypeParam::Weight;
  constexpr double allowed = std::max(tolerance<X>(), std::is_same_v<X, ef::bfloat16> ? 1e-2 : 0.0);
  for (Index block : {32, 128, 256, 512, 1024, 2048, 4096})
    for (Index in : {block - 1, block, block + 1, block + 2})
      for (Index tokens : {1, 13}) {
        constexpr Index out = 9;
        auto x = random_tensor<X, 2>({tokens, in}, 71);
        auto weight = random_tensor<W, 2>({out, in}, 72);
        // The last input outweighs the others together: without it nothing is right.
        for (Index t = 0; t < tokens; ++t) x(t, in - 1) = X(8);
        for (Index o = 0; o < out; ++o) weight(o, in - 1) = W(static_cast<float>(8 + o));
        const auto expected = ef::reference::linear(to_double(x), to_double(weight));
        for_each_product_isa([&](auto isa) {
          ASSERT_LE(relative_error(run(isa, x, weight, out), expected), allowed)
              << isa.name << " " << tokens << " x " << in;
          ASSERT_LE(
              relative_error(run(isa, x, pack_for(isa, weight, Packing<X, W>{}), out), expected),
              allowed)
              << isa.name << " packed " << tokens << " x " << in;
        });
      }
}

// A double weight is packed as any other is: as its numbers rounded once to the packed scalar.
TEST(LinearPacking, TakesEveryFloatingScalar) {
  const auto weight = random_tensor<double, 2>({37, 19}, 73);
  const auto x = random_tensor<float, 2>({3, 19}, 74);
  const auto check = [&]<typename T>(T) {
    const ef::Tensor<T, 2> rounded = weight.cast<T>();
    EXPECT_TRUE(same_bits(ef::linear(x, ef::pack_weight<T>(weight)),
                          ef::linear(x, ef::pack_weight<T>(rounded))));
    const auto gated = [&](const auto& w) {
      return ef::gated_linear(x, ef::pack_gated_weight<T>(w, w), ef::Epilogue{}.silu());
    };
    EXPECT_TRUE(same_bits(gated(weight), gated(rounded)));
  };
  check(float{});
  check(ef::bfloat16{});
  check(ef::half{});
}

}  // namespace
