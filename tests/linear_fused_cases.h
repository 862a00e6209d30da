// Laws of fused epilogues, gated pairs and grouped int8 weights: the bits of the separate
// operators, for every scalar, tail and ISA; the same bits alone, in a batch and on threads; errors
// that change nothing.
#pragma once

#include <eigenformer/activation.h>
#include <eigenformer/linear.h>
#include <eigenformer/quantization.h>
#include <eigenformer/reference/quantization.h>

#include "compare.h"

namespace eigenformer_test {

template <typename Isa, typename Y, typename X, typename Weight, typename E>
ef::Tensor<Y, 2> linear_by(Isa isa, const ef::Tensor<X, 2>& x, const Weight& weight, Index out,
                           const E& epilogue) {
  auto y = poisoned_tensor<Y, 2>({x.dimension(0), out});
  ef::linear_into(on(isa), y, x, weight, epilogue);
  return y;
}

template <typename Isa, typename T>
ef::PackedWeight<T> pack_for(Isa isa, const ef::Tensor<float, 2>& weight, T,
                             const ef::Int8Packing& options = {}) {
  return ef::pack_weight<T>(on(isa), weight, options);
}

template <typename Isa, typename T>
ef::PackedGatedWeight<T> pack_pair_for(Isa isa, const ef::Tensor<float, 2>& gate,
                                       const ef::Tensor<float, 2>& up, T,
                                       const ef::Int8Packing& options = {}) {
  return ef::pack_gated_weight<T>(on(isa), gate, up, options);
}

/// activation: that of the epilogue; separately(backend, x): the operator of activation.h.
template <typename Weight, typename X, typename E, typename Operator>
void expect_fused(const ef::Tensor<X, 2>& x, const ef::Tensor<float, 2>& weight,
                  const E& activation, const Operator& separately) {
  const Index tokens = x.dimension(0), out = weight.dimension(0);
  const auto bias = random_tensor<float, 1>({out}, 3);
  const auto residual = random_tensor<ef::bfloat16, 2>({tokens, out}, 4);
  for_each_isa([&](auto isa) {
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
    const ef::Tensor<ef::half, 2> narrow =
        expected.template cast<ef::half>();  // output in another type
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

template <typename Weight, typename X>
void expect_gated(const ef::Tensor<X, 2>& x, Index out, unsigned seed,
                  const ef::Int8Packing& options = {}) {
  const Index tokens = x.dimension(0), in = x.dimension(1);
  const auto gate = random_tensor<float, 2>({out, in}, seed),
             up = random_tensor<float, 2>({out, in}, seed + 1);
  const auto bias = random_tensor<float, 1>({2 * out}, seed + 2);
  ef::Tensor<float, 1> gate_bias(out), up_bias(out);
  std::copy_n(bias.data(), out, gate_bias.data());
  std::copy_n(bias.data() + out, out, up_bias.data());
  for_each_isa([&](auto isa) {
    using Isa = decltype(isa);
    const auto pair = pack_pair_for(isa, gate, up, Weight{}, options);
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
      expect_gated<std::int8_t>(x16, out, ++seed, {.group_size = 32});
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

TEST(LinearGrouped, EqualsItsDefinitionOnEveryIsa) {
  unsigned seed = 1;
  for (Index group : {32, 64, 128})
    for (Index in : {0, 1, 5, 31, 32, 33, 64, 127, 128, 130, 300, 1100})
      for (Index out : {1, 17, 33}) {
        const Index tokens = 1 + seed % 17;
        const auto x = random_tensor<float, 2>({tokens, in}, ++seed);
        const auto [q, scales] =
            ef::quantize_weights_int8_grouped(random_tensor<float, 2>({out, in}, ++seed), group);
        const auto bias = random_tensor<float, 1>({out}, ++seed);
        const auto expected = ef::reference::int8_linear_grouped(x, q, scales, group, bias.data());
        for_each_isa([&, &values = q, &factors = scales](auto isa) {
          const auto packed = ef::pack_weight(on(isa), values, factors, {.group_size = group});
          const auto y =
              linear_by<decltype(isa), float>(isa, x, packed, out, ef::Epilogue{}.bias(bias));
          ASSERT_TRUE(same_bits(y, expected))
              << isa.name << " " << tokens << " x " << in << " x " << out << " by " << group;
        });
      }
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
  EXPECT_LE(relative_error(y, ef::reference::linear(to_double(x), to_double(weight))),
            3e-2);  // both sides rounded to 8 bits
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

TEST(LinearErrors, OfEpiloguesPairsAndGroups) {
  const auto x = random_tensor<float, 2>({3, 40}, 1), weight = random_tensor<float, 2>({5, 40}, 2);
  ef::Tensor<float, 2> y(3, 5);
  y.setConstant(7.0f);
  const ef::Tensor<float, 1> short_bias(4);
  const ef::Tensor<float, 2> narrow(3, 4);
  const Eigen::DefaultDevice device;
  expect_throws<std::invalid_argument>(
      [&] { ef::linear_into(device, y, x, weight, ef::Epilogue{}.bias(short_bias)); },
      {"linear", "bias has 4", "5 rows"});
  expect_throws<std::invalid_argument>(
      [&] { ef::linear_into(device, y, x, weight, ef::Epilogue{}.residual(narrow)); },
      {"linear", "residual has shape (3, 4)", "(3, 5)"});
  const ef::Tensor<float, 2> other = random_tensor<float, 2>({6, 40}, 3);
  expect_throws<std::invalid_argument>(
      [&] { ef::gated_linear_into(device, y, x, weight, other, ef::Epilogue{}.silu()); },
      {"gated_linear", "gate has shape (5, 40)", "up has shape (6, 40)"});
  expect_throws<std::invalid_argument>([&] { ef::pack_gated_weight<float>(weight, other); },
                                       {"pack_gated_weight", "gate", "up"});
  const ef::Tensor<float, 1> half_bias(5);
  expect_throws<std::invalid_argument>(
      [&] {
        ef::gated_linear_into(device, y, x, weight, weight, ef::Epilogue{}.silu().bias(half_bias));
      },
      {"gated_linear", "bias has 5", "gate has 5 rows", "each of gate and of up"});
  EXPECT_EQ(y(0, 0), 7.0f);
  expect_throws<std::invalid_argument>(
      [&] { ef::pack_weight<std::int8_t>(weight, {.group_size = 48}); },
      {"group_size is 48", "128"});
  expect_throws<std::invalid_argument>([&] { ef::pack_weight<float>(weight, {.group_size = 32}); },
                                       {"only int8 weights"});
  const auto [q, scales] = ef::quantize_weights_int8_grouped(weight, 32);
  expect_throws<std::invalid_argument>(
      [&, &v = q, &s = scales] { ef::pack_weight(v, s, {.group_size = 64}); },
      {"scales has 2 columns", "expected 1"});
  auto bad = other;
  bad(4, 39) = std::numeric_limits<float>::quiet_NaN();
  expect_throws<std::invalid_argument>([&] { ef::pack_gated_weight<std::int8_t>(other, bad); },
                                       {"pack_gated_weight", "up[4, 39]", "nan"});
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

TEST(LinearPacked, MovesAndCopiesKeepShapeAndMemoryTogether) {
  const auto weight = random_tensor<float, 2>({40, 30}, 1),
             small = random_tensor<float, 2>({3, 30}, 2);
  const auto x = random_tensor<float, 2>({2, 30}, 3);
  auto packed = ef::pack_weight<std::int8_t>(weight);
  const auto copy = packed;
  const ef::Tensor<float, 2> expected = ef::linear(x, copy);
  auto moved = std::move(packed);
  EXPECT_EQ(packed.rows(), 0);  // NOLINT(bugprone-use-after-move): what is left is an empty weight
  EXPECT_TRUE(same_bits(ef::linear(x, moved), expected));
  packed = ef::pack_weight<std::int8_t>(small);
  packed = copy;
  EXPECT_TRUE(same_bits(ef::linear(x, packed), expected));
  ef::pack_weight_into(Eigen::DefaultDevice{}, packed, small, {.group_size = 32});
  ef::pack_weight_into(Eigen::DefaultDevice{}, packed,
                       weight);  // the same memory, from groups back to rows
  EXPECT_EQ(packed.group_size(), 0);
  EXPECT_TRUE(same_bits(ef::linear(x, packed), expected));
}

TEST(LinearErrors, ShapesWhoseProductOverflows) {
  const Index huge = Index{1} << 33;
  const ef::TensorView<const float, 2> x(nullptr, huge, 0), weight(nullptr, huge, 0);
  expect_throws<std::invalid_argument>([&] { ef::linear(x, weight); }, {"linear", "overflows"});
  const ef::TensorView<const float, 2> vast(nullptr, Index{1} << 62, 64);
  expect_throws<std::invalid_argument>([&] { ef::quantize_weights_int8_grouped(vast, 32); },
                                       {"grouped", "overflows"});
  expect_throws<std::invalid_argument>([&] { ef::quantize_weights_int8_per_channel(vast); },
                                       {"per_channel", "overflows"});
  expect_throws<std::invalid_argument>([&] { ef::pack_weight<std::int8_t>(vast); },
                                       {"pack_weight", "overflows"});
}

template <typename Weight, typename X>
void expect_blocks_and_threads_of_isa(Index in) {
  const Index tokens = 140,
              out = 40;  // more rows than a block of AMX has, more of k than a block of any ISA
  const auto x = random_tensor<X, 2>({tokens, in}, 1);
  const auto weight = random_tensor<float, 2>({out, in}, 2);
  for_each_isa([&](auto isa) {
    using Isa = decltype(isa);
    const auto packed = pack_for(isa, weight, Weight{});
    const auto y = linear_by<Isa, float>(isa, x, packed, out, ef::Epilogue{});
    for (Index t : {0, 15, 16, 31, 32, 127, 128, 139}) {
      const ef::Tensor<X, 2> row = ef::TensorView<const X, 2>(x.data() + t * in, 1, in);
      const auto alone = linear_by<Isa, float>(isa, row, packed, out, ef::Epilogue{});
      for (Index o = 0; o < out; ++o)
        ASSERT_EQ(alone(0, o), y(t, o)) << isa.name << " " << t << " " << o;
    }
    Threads threads(2);
    auto other = poisoned_tensor<float, 2>({tokens, out});
    ef::linear_into(ef::cpu::backend(threads.device, isa), other, x, packed);
    ASSERT_TRUE(same_bits(y, other)) << isa.name;
  });
}

TEST(LinearBits, DoNotDependOnBlocksOrThreadsOnAnyIsa) {
  expect_blocks_and_threads_of_isa<ef::bfloat16, ef::bfloat16>(2100);
  expect_blocks_and_threads_of_isa<std::int8_t, float>(4200);
  expect_blocks_and_threads_of_isa<float, float>(1200);
}

TEST(LinearAmx, IsWhatTheTagRuns) {
#if defined(EIGENFORMER_ISA_AMX)
  provide_amx();
  const auto before = amx_emulated_instructions();
  const auto weight = random_tensor<float, 2>({33, 70}, 1);
  const ef::Tensor<ef::bfloat16, 2> x = random_tensor<ef::bfloat16, 2>({3, 70}, 2);
  linear_by<ef::isa::amx, float>(
      ef::isa::amx{}, x, pack_for(ef::isa::amx{}, weight, ef::bfloat16{}), 33, ef::Epilogue{});
  const auto between = amx_emulated_instructions();
  linear_by<ef::isa::amx, float>(ef::isa::amx{}, x, pack_for(ef::isa::amx{}, weight, std::int8_t{}),
                                 33, ef::Epilogue{});
  EXPECT_TRUE(amx_in_hardware() || (between > before && amx_emulated_instructions() > between));
#else
  GTEST_SKIP() << "this build has no AMX kernels";
#endif
}

}  // namespace eigenformer_test
