// Linear layers over int8 and int4 weights on a GPU: the bits of the CPU, for any number of tokens,
// scale for each row or group, epilogue and alignment. int4 with activations as they are: the bits
// of a float weight.
#include <eigenformer/quantization.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

/// Equal bits; NaN, which has different ones on a GPU, stands for any NaN.
template <typename T>
::testing::AssertionResult same_numbers(const ef::Tensor<T, 2>& a, const ef::Tensor<T, 2>& b) {
  for (Index i = 0; i < a.size(); ++i) {
    const float x = static_cast<float>(a.data()[i]), y = static_cast<float>(b.data()[i]);
    if (std::memcmp(a.data() + i, b.data() + i, sizeof(T)) != 0 && !(x != x && y != y))
      return ::testing::AssertionFailure() << "element " << i << ": " << x << " and " << y;
  }
  return ::testing::AssertionSuccess();
}

/// Token 1 holds NaN, token 2 infinity, token 3 zeros, where there are more.
template <typename T>
ef::Tensor<T, 2> tokens_of(Index tokens, Index in) {
  auto x = random_tensor<T, 2>({tokens, in}, 1);
  if (tokens > 4 && in > 0) {
    x(1, in - 1) = std::numeric_limits<T>::quiet_NaN();
    x(2, in / 2) = -std::numeric_limits<T>::infinity();
    for (Index j = 0; j < in; ++j) x(3, j) = T(0);
  }
  return x;
}

void check_plain(Index tokens, Index in, Index out) {
  const auto x = tokens_of<float>(tokens, in), added = random_tensor<float, 2>({tokens, out}, 2);
  const auto bias = random_tensor<float, 1>({out}, 3);
  const auto [values, scales] =
      ef::quantize_weights_int8_per_channel(random_tensor<float, 2>({out, in}, 4));
  auto expected = poisoned_tensor<float, 2>({tokens, out});
  ef::int8_linear_into(Eigen::DefaultDevice{}, expected, x, values, scales,
                       ef::Epilogue{}.bias(bias).residual(added));
  for_each_gpu([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_values = on_device(bench, values);
    auto device_scales = on_device(bench, scales);
    auto device_bias = on_device(bench, bias);
    auto y = on_device(bench, added);  // the residual is y itself
    const auto b = device_bias.cview();
    const auto r = y.cview();
    ef::int8_linear_into(bench.device, y.view(), device_x.cview(), device_values.cview(),
                         device_scales.cview(), ef::Epilogue{}.bias(b).residual(r));
    EXPECT_TRUE(same_numbers(y.host(), expected)) << tokens << " x " << in << " x " << out;
  });
}

TEST(Int8LinearOnDevice, PlainEqualsTheHosts) {
  check_plain(0, 64, 16);
  check_plain(1, 0, 3);
  check_plain(1, 1, 1);
  check_plain(5, 65, 17);    // rows that no pack of 16 bytes begins at
  check_plain(17, 592, 33);  // more than all warps take at a time
  check_plain(64, 16, 15);
}

TEST(Int8LinearOnDevice, PlainTilesEqualTheHosts) {
  check_plain(65, 208, 129);
  check_plain(129, 33, 5);
}

template <typename T>
void check_packed(Index tokens, Index in, Index out, Index group) {
  const auto x = tokens_of<T>(tokens, in), added = random_tensor<T, 2>({tokens, out}, 2);
  const auto bias = random_tensor<T, 1>({out}, 3);
  const auto weight = random_tensor<float, 2>({out, in}, 4);
  auto expected = poisoned_tensor<T, 2>({tokens, out});
  ef::linear_into(Eigen::DefaultDevice{}, expected, x,
                  ef::pack_weight<std::int8_t>(weight, {.group_size = group}),
                  ef::Epilogue{}.bias(bias).relu().residual(added));
  for_each_gpu([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_weight = on_device(bench, weight);
    auto device_bias = on_device(bench, bias);
    auto device_added = on_device(bench, added);
    auto y = on_device(bench, poisoned_tensor<T, 2>({tokens, out}));
    const auto packed = ef::pack_weight<std::int8_t>(bench.device, device_weight.cview(),
                                                     ef::Int8Packing{.group_size = group});
    const auto b = device_bias.cview();
    const auto r = device_added.cview();
    ef::linear_into(bench.device, y.view(), device_x.cview(), packed,
                    ef::Epilogue{}.bias(b).relu().residual(r));
    EXPECT_TRUE(same_numbers(y.host(), expected))
        << tokens << " x " << in << " x " << out << " by " << group;
  });
}

TEST(Int8LinearOnDevice, PackedEqualsTheHosts) {
  check_packed<ef::bfloat16>(6, 100, 18, 0);
  check_packed<ef::bfloat16>(1, 545, 31, 32);  // the last group is short, and in a pass of its own
  check_packed<ef::bfloat16>(9, 97, 16, 64);
  check_packed<ef::bfloat16>(17, 1100, 5, 128);
}

TEST(Int8LinearOnDevice, PackedTilesEqualTheHosts) {
  for (Index group : {0, 32, 64, 128}) check_packed<ef::bfloat16>(66, 273, 7, group);
}

/// Quantized on the GPU, and from values that are given; token 1 holds NaN, where there are more.
void check_int4(Index tokens, Index in, Index out, const ef::Int4Packing& options) {
  const auto x = tokens_of<ef::bfloat16>(tokens, in);
  const auto bias = random_tensor<float, 1>({out}, 3);
  const auto weight = random_tensor<float, 2>({out, in}, 4);
  const Index group = options.group_size;
  const auto [q, scales] = ef::quantize_weights_int4(weight, group, options.fit);
  const auto [u, steps, minimums] =
      ef::quantize_weights_int4_with_minimums(weight, group, options.fit);
  auto expected = poisoned_tensor<float, 2>({tokens, out});
  ef::linear_into(Eigen::DefaultDevice{}, expected, x, ef::pack_weight<ef::int4>(weight, options),
                  ef::Epilogue{}.bias(bias).relu());
  for_each_gpu([&, &q = q, &scales = scales, &u = u, &steps = steps,
                &minimums = minimums](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_weight = on_device(bench, weight);
    auto device_bias = on_device(bench, bias);
    const auto values = on_device(bench, options.zero_points ? u : q);
    const auto factors = on_device(bench, options.zero_points ? steps : scales),
               least = on_device(bench, minimums);
    const auto b = device_bias.cview();
    const auto check = [&](const ef::PackedWeight<ef::int4>& packed) {
      auto y = on_device(bench, poisoned_tensor<float, 2>({tokens, out}));
      ef::linear_into(bench.device, y.view(), device_x.cview(), packed,
                      ef::Epilogue{}.bias(b).relu());
      EXPECT_TRUE(same_numbers(y.host(), expected))
          << tokens << " x " << in << " x " << out << " by " << group;
    };
    check(ef::pack_weight<ef::int4>(bench.device, device_weight.cview(), options));
    if (options.zero_points)
      check(ef::pack_weight<ef::int4>(bench.device, values.cview(), factors.cview(), least.cview(),
                                      options));
    else
      check(ef::pack_weight<ef::int4>(bench.device, values.cview(), factors.cview(), options));
  });
}

TEST(Int4LinearOnDevice, EqualsTheHosts) {
  check_int4(6, 100, 18, {});
  check_int4(1, 545, 31, {.zero_points = true, .fit = ef::Int4Fit::least_squares});
  check_int4(17, 1100, 5, {.group_size = 128, .zero_points = true});
  check_int4(66, 273, 7, {.group_size = 64, .zero_points = true});
  check_int4(130, 97, 133, {.fit = ef::Int4Fit::least_squares});
}

TEST(Int4LinearOnDevice, GatedEqualsTheHosts) {
  const Index tokens = 16, in = 130, out = 33;
  const ef::Int4Packing options{.zero_points = true};
  const auto x = tokens_of<ef::half>(tokens, in);
  const auto gate = random_tensor<float, 2>({out, in}, 4),
             up = random_tensor<float, 2>({out, in}, 5);
  auto expected = poisoned_tensor<float, 2>({tokens, out});
  ef::gated_linear_into(Eigen::DefaultDevice{}, expected, x,
                        ef::pack_gated_weight<ef::int4>(gate, up, options), ef::Epilogue{}.relu());
  for_each_gpu([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_gate = on_device(bench, gate);
    auto device_up = on_device(bench, up);
    auto y = on_device(bench, poisoned_tensor<float, 2>({tokens, out}));
    const auto packed = ef::pack_gated_weight<ef::int4>(bench.device, device_gate.cview(),
                                                        device_up.cview(), options);
    ef::gated_linear_into(bench.device, y.view(), device_x.cview(), packed, ef::Epilogue{}.relu());
    EXPECT_TRUE(same_numbers(y.host(), expected));
  });
}

TEST(Int4LinearOnDevice, WithActivationsAsTheyAreEqualsAFloatWeight) {
  const Index in = 77, out = 19;
  const auto weight = random_tensor<float, 2>({out, in}, 4);
  for (const Index tokens : {1, 9})
    for (const bool zero_points : {false, true}) {
      const auto x = tokens_of<ef::bfloat16>(tokens, in);
      const auto [q, scales] = ef::quantize_weights_int4(weight);
      const auto [u, steps, minimums] = ef::quantize_weights_int4_with_minimums(weight);
      const ef::Tensor<float, 2> wide = zero_points ? ef::dequantize_grouped(u, steps, minimums, 32)
                                                    : ef::dequantize_grouped(q, scales, 32);
      for_each_gpu([&](const auto& bench) {
        auto device_x = on_device(bench, x);
        auto device_weight = on_device(bench, weight), device_wide = on_device(bench, wide);
        auto y = on_device(bench, poisoned_tensor<float, 2>({tokens, out})),
             expected = on_device(bench, poisoned_tensor<float, 2>({tokens, out}));
        ef::linear_into(
            bench.device, y.view(), device_x.cview(),
            ef::pack_weight<ef::int4>(bench.device, device_weight.cview(),
                                      {.zero_points = zero_points, .quantize_activations = false}));
        ef::linear_into(bench.device, expected.view(), device_x.cview(),
                        ef::pack_weight<float>(bench.device, device_wide.cview()));
        EXPECT_TRUE(same_numbers(y.host(), expected.host())) << tokens << " " << zero_points;
      });
    }
}

void check_gated(Index tokens, Index in, Index out, Index group) {
  using T = ef::half;
  const auto x = tokens_of<T>(tokens, in);
  const auto bias = random_tensor<float, 1>({2 * out}, 3);
  const auto gate = random_tensor<float, 2>({out, in}, 4),
             up = random_tensor<float, 2>({out, in}, 5);
  auto expected = poisoned_tensor<float, 2>({tokens, out});
  ef::gated_linear_into(Eigen::DefaultDevice{}, expected, x,
                        ef::pack_gated_weight<std::int8_t>(gate, up, {.group_size = group}),
                        ef::Epilogue{}.bias(bias).relu());
  for_each_gpu([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_gate = on_device(bench, gate);
    auto device_up = on_device(bench, up);
    auto device_bias = on_device(bench, bias);
    auto y = on_device(bench, poisoned_tensor<float, 2>({tokens, out}));
    const auto packed = ef::pack_gated_weight<std::int8_t>(
        bench.device, device_gate.cview(), device_up.cview(), {.group_size = group});
    const auto b = device_bias.cview();
    ef::gated_linear_into(bench.device, y.view(), device_x.cview(), packed,
                          ef::Epilogue{}.bias(b).relu());
    EXPECT_TRUE(same_numbers(y.host(), expected))
        << tokens << " x " << in << " x " << out << " by " << group;
  });
}

TEST(Int8LinearOnDevice, GatedEqualsTheHosts) {
  check_gated(3, 130, 17, 0);
  check_gated(16, 130, 33, 32);
  check_gated(65, 130, 66, 0);
  check_gated(66, 130, 35, 64);
}

}  // namespace
