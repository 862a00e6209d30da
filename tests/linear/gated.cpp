// Laws of gated pairs: the bits of two products and the activation, for every scalar, tail and ISA.
#include <eigenformer/activation.h>
#include <eigenformer/linear.h>

#include "linear_support.h"

using namespace eigenformer_test;

namespace {

template <typename Weight, typename X>
void expect_gated(const ef::Tensor<X, 2>& x, Index out, unsigned seed,
                  const ef::Int8Packing& options = {}) {
  const Index tokens = x.dimension(0), in = x.dimension(1);
  auto gate = random_tensor<float, 2>({out, in}, seed),
       up = random_tensor<float, 2>({out, in}, seed + 1);
  if (options.half_scales) gate = ef::Tensor<float, 2>(in_blocks(gate));
  if (options.half_scales) up = ef::Tensor<float, 2>(in_blocks(up));
  const auto bias = random_tensor<float, 1>({2 * out}, seed + 2);
  ef::Tensor<float, 1> gate_bias(out), up_bias(out);
  std::copy_n(bias.data(), out, gate_bias.data());
  std::copy_n(bias.data() + out, out, up_bias.data());
  for_each_product_isa([&](auto isa) {
    using Isa = decltype(isa);
    const auto pair = pack_pair_for(isa, gate, up, Weight{}, options);
    ASSERT_EQ(pair.pair().half_scales() != nullptr, options.half_scales && out > 0) << isa.name;
    const auto g =
        ef::silu(on(isa), linear_by<Isa, float>(isa, x, pack_for(isa, gate, Weight{}, options), out,
                                                ef::Epilogue{}.bias(gate_bias)));
    ef::Tensor<float, 2> expected =
        g * linear_by<Isa, float>(isa, x, pack_for(isa, up, Weight{}, options), out,
                                  ef::Epilogue{}.bias(up_bias));
    auto y = poisoned_tensor<float, 2>({tokens, out});
    ef::gated_linear_into(on(isa), y, x, pair, ef::Epilogue{}.silu().bias(bias));
    ASSERT_TRUE(same_bits(y, expected)) << isa.name << " " << tokens << " x " << in << " x " << out;
    if constexpr (std::is_same_v<Weight, float> ||
                  (std::is_same_v<Weight, ef::bfloat16> && std::is_same_v<X, ef::bfloat16>)) {
      auto plain = poisoned_tensor<float, 2>({tokens, out});
      ef::gated_linear_into(on(isa), plain, x, gate, up, ef::Epilogue{}.silu().bias(bias));
      ASSERT_TRUE(same_bits(plain, expected)) << isa.name << " plain";
    }
  });
}

TEST(LinearGated, HasTheBitsOfTwoProducts) {
  unsigned seed = 1;
  for (Index out : {0, 1, 7, 8, 15, 16, 17, 32, 40})
    for (Index tokens : {1, 2, 13, 30}) {
      const auto x = random_tensor<float, 2>({tokens, 70}, ++seed);
      const ef::Tensor<ef::bfloat16, 2> x16 = x.cast<ef::bfloat16>();
      expect_gated<float>(x, out, ++seed);
      expect_gated<ef::bfloat16>(x16, out, ++seed);
      expect_gated<ef::half>(x, out, ++seed);
      expect_gated<std::int8_t>(x, out, ++seed);
      expect_gated<std::int8_t>(x16, out, ++seed, {.group_size = 32, .half_scales = out % 2 == 1});
    }
}

TEST(LinearGated, PublicFormsAgreeOnAnyDevice) {
  const auto gate = random_tensor<float, 2>({90, 65}, 1), up = random_tensor<float, 2>({90, 65}, 2);
  const auto x = random_tensor<float, 2>({20, 65}, 3);
  ef::Tensor<float, 2> y(20, 90), other(20, 90);
  ef::gated_linear_into(Eigen::DefaultDevice{}, y, x, gate, up, ef::Epilogue{}.gelu());
  Threads threads(3);
  ef::gated_linear_into(threads.device, other, x,
                        ef::pack_gated_weight<float>(threads.device, gate, up),
                        ef::Epilogue{}.gelu());
  EXPECT_TRUE(same_bits(y, other));
  const ef::Tensor<float, 2> g = ef::gelu(ef::Tensor<float, 2>(ef::linear(x, gate)));
  const ef::Tensor<float, 2> expected = g * ef::linear(x, up);
  EXPECT_TRUE(same_bits(y, expected));
}

}  // namespace
