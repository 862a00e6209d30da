// Laws of grouped int8 weights: exact integer sums, scaled as the definition scales them, on every
// ISA; the same bits alone, in a batch and on threads.
#include <eigenformer/linear.h>
#include <eigenformer/quantization.h>
#include <eigenformer/reference/linear.h>
#include <eigenformer/reference/quantization.h>

#include "linear_support.h"

using namespace eigenformer_test;

namespace {

TEST(LinearGrouped, EqualsItsDefinitionOnEveryIsa) {
  unsigned seed = 1;
  for (Index group : {32, 64, 128})
    for (Index in : {0, 1, 5, 31, 32, 33, 64, 127, 128, 130, 300, 1100})
      for (Index out : {1, 17, 33}) {
        const Index tokens = 1 + seed % 17;
        const auto x = random_tensor<float, 2>({tokens, in}, ++seed);
        auto [q, scales] =
            ef::quantize_weights_int8_grouped(random_tensor<float, 2>({out, in}, ++seed), group);
        // Those of every other weight are halves, and kept as such; but not if the last is none.
        const bool halves = seed % 2 == 0;
        if (halves) scales = ef::Tensor<float, 2>(scales.cast<ef::half>().cast<float>());
        const bool narrow = halves && in > 0 && seed % 3 != 0;
        if (halves && in > 0 && !narrow) scales(out - 1, scales.dimension(1) - 1) = 0.1f;
        const auto bias = random_tensor<float, 1>({out}, ++seed);
        const auto expected =
            ef::reference::grouped_linear(x, q, scales, nullptr, group, bias.data());
        for_each_product_isa([&, &values = q, &factors = scales](auto isa) {
          const auto packed = ef::pack_weight(on(isa), values, factors,
                                              {.group_size = group, .half_scales = halves});
          ASSERT_EQ(packed.half_scales() != nullptr, narrow) << isa.name;
          ASSERT_EQ(packed.scales() != nullptr, !narrow && in > 0) << isa.name;
          const auto y =
              linear_by<decltype(isa), float>(isa, x, packed, out, ef::Epilogue{}.bias(bias));
          ASSERT_TRUE(same_bits(y, expected))
              << isa.name << " " << tokens << " x " << in << " x " << out << " by " << group;
        });
      }
}

// A packed weight that has halves is copied, written over by one that has floats, and by halves.
TEST(LinearGrouped, HalvesAndFloatsTakeEachOthersPlace) {
  const Eigen::DefaultDevice here;
  const auto x = random_tensor<float, 2>({3, 70}, 1);
  const auto [q, scales] =
      ef::quantize_weights_int8_grouped(random_tensor<float, 2>({20, 70}, 2), 32);
  const ef::Tensor<float, 2> halves = scales.cast<ef::half>().cast<float>();
  const ef::Int8Packing as_halves{.group_size = 32, .half_scales = true},
      as_floats{.group_size = 32};
  const ef::Tensor<float, 2> with_halves = ef::linear(x, ef::pack_weight(q, halves, as_floats)),
                             with_floats = ef::linear(x, ef::pack_weight(q, scales, as_floats));
  auto packed = ef::pack_weight(q, halves, as_halves);
  ASSERT_NE(packed.half_scales(), nullptr);
  const auto copy = packed;
  EXPECT_NE(copy.half_scales(), packed.half_scales());
  const auto check = [&](const auto& weight, const ef::Tensor<float, 2>& expected, bool narrow) {
    EXPECT_EQ(weight.half_scales() != nullptr, narrow);
    EXPECT_TRUE(same_bits(ef::Tensor<float, 2>(ef::linear(x, weight)), expected));
  };
  check(copy, with_halves, true);
  ef::pack_weight_into(here, packed, q, scales, as_floats);
  check(packed, with_floats, false);
  ef::pack_weight_into(here, packed, q, halves, as_halves);
  check(packed, with_halves, true);
  ef::pack_weight_into(here, packed, q, scales, as_halves);  // no halves
  check(packed, with_floats, false);
  check(copy, with_halves, true);
}

TEST(LinearGrouped, RowsThreadsAndPackingFromFloatChangeNothing) {
  const Index tokens = 41, in = 4802, out = 300, group = 64;
  const auto x = random_tensor<float, 2>({tokens, in}, 1);
  const auto weight = random_tensor<float, 2>({out, in}, 2);
  const auto packed = ef::pack_weight<std::int8_t>(weight, {.group_size = group});
  EXPECT_EQ(packed.group_size(), group);
  const ef::Tensor<float, 2> y = ef::linear(x, packed);
  const auto [q, scales] = ef::quantize_weights_int8_grouped(weight, group);
  const ef::Tensor<float, 2> from_values =
      ef::linear(x, ef::pack_weight(q, scales, {.group_size = group}));
  EXPECT_TRUE(same_bits(y, from_values));
  // both sides rounded to 8 bits
  EXPECT_LE(relative_error(y, ef::reference::linear(to_double(x), to_double(weight))), 3e-2);
  for (Index t : {0, 11, 12, 40}) {
    const ef::TensorView<const float, 2> row(x.data() + t * in, 1, in);
    const ef::Tensor<float, 2> alone = ef::linear(row, packed);
    for (Index o = 0; o < out; ++o) ASSERT_EQ(alone(0, o), y(t, o)) << t << " " << o;
  }
  for (int count : {2, 3}) {
    Threads threads(count);
    const ef::Tensor<float, 2> other =
        ef::linear(threads.device, x,
                   ef::pack_weight<std::int8_t>(threads.device, weight, {.group_size = group}));
    ASSERT_TRUE(same_bits(y, other)) << count;
  }
}

}  // namespace
