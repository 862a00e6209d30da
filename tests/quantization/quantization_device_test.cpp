// Quantization and dequantization on every device: the numbers of the definition, exactly.
#include <eigenformer/quantization.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

/// group 0: one scale per row.
template <typename T>
void check(Index rows, Index columns, Index group) {
  const Index width = group == 0 ? columns : group, groups = (columns + width - 1) / width;
  auto weights = random_tensor<T, 2>({rows, columns}, 3);
  for (Index j = 0; rows > 1 && j < columns; ++j) weights(1, j) = T(0);
  for_each_device([&](const auto& bench) {
    auto device_weights = on_device(bench, weights);
    auto values = on_device(bench, poisoned_tensor<std::int8_t, 2>({rows, columns}));
    auto scales = on_device(bench, poisoned_tensor<float, 2>({rows, groups}));
    const ef::TensorView<float, 1> row_scales(scales.view().data(), rows);
    if (group == 0)
      ef::quantize_weights_int8_per_channel_into(bench.device, values.view(), row_scales,
                                                 device_weights.cview());
    else
      ef::quantize_weights_int8_grouped_into(bench.device, values.view(), scales.view(),
                                             device_weights.cview(), group);
    const auto q = values.host();
    const auto s = scales.host();
    for (Index r = 0; r < rows; ++r)
      for (Index g = 0; g < groups; ++g) {
        using C = ef::compute_type<T>;
        const Index begin = g * width, end = std::min(begin + width, columns);
        C largest = 0;
        for (Index j = begin; j < end; ++j)
          largest = std::max(largest, std::abs(static_cast<C>(weights(r, j))));
        const float scale = largest == 0 ? 1.0f : static_cast<float>(largest / C(127));
        ASSERT_EQ(s(r, g), scale);
        for (Index j = begin; j < end; ++j)
          ASSERT_EQ(q(r, j), static_cast<int>(std::nearbyint(static_cast<C>(weights(r, j)) /
                                                             static_cast<C>(scale))))
              << r << ' ' << j;
      }
  });
}

TEST(QuantizationOnDevice, EqualsItsDefinition) {
  for (Index columns : {1, 17, 256, 1000})
    for (Index rows : {1, 5, 9})
      for (Index group : {0, 32, 128}) {
        check<float>(rows, columns, group);
        check<ef::bfloat16>(rows, columns, group);
        check<ef::half>(rows, columns, group);
      }
}

/// INT4 against the CPU, bit for bit, and back; the last row holds NaN, which the CPU refuses.
template <typename T>
void check_int4(Index rows, Index columns, Index group, ef::Int4Fit fit) {
  const Index groups = (columns + group - 1) / group;
  auto weights = random_tensor<T, 2>({rows, columns}, 3);
  for (Index j = 0; rows > 1 && j < columns; ++j) weights(1, j) = T(0);
  const auto [q, scales] = ef::quantize_weights_int4(weights, group, fit);
  const auto [u, steps, minimums] = ef::quantize_weights_int4_with_minimums(weights, group, fit);
  const auto back = ef::dequantize_grouped(u, steps, minimums, group);
  auto damaged = weights;
  damaged(rows - 1, 0) = std::numeric_limits<T>::quiet_NaN();
  for_each_gpu([&, &q = q, &scales = scales, &u = u, &steps = steps,
                &minimums = minimums](const auto& bench) {
    auto values = on_device(bench, poisoned_tensor<std::int8_t, 2>({rows, columns}));
    auto factors = on_device(bench, poisoned_tensor<float, 2>({rows, groups})),
         least = on_device(bench, poisoned_tensor<float, 2>({rows, groups})),
         numbers = on_device(bench, poisoned_tensor<float, 2>({rows, columns}));
    auto device_weights = on_device(bench, weights), bad = on_device(bench, damaged);
    ef::quantize_weights_int4_into(bench.device, values.view(), factors.view(),
                                   device_weights.cview(), group, fit);
    EXPECT_TRUE(same_bits(values.host(), q));
    EXPECT_TRUE(same_bits(factors.host(), scales));
    ef::quantize_weights_int4_with_minimums_into(bench.device, values.view(), factors.view(),
                                                 least.view(), device_weights.cview(), group, fit);
    EXPECT_TRUE(same_bits(values.host(), u));
    EXPECT_TRUE(same_bits(factors.host(), steps));
    EXPECT_TRUE(same_bits(least.host(), minimums));
    ef::dequantize_grouped_into(bench.device, numbers.view(), values.cview(), factors.cview(),
                                least.cview(), group);
    EXPECT_TRUE(same_bits(numbers.host(), back));
    ef::quantize_weights_int4_into(bench.device, values.view(), factors.view(), bad.cview(), group,
                                   fit);
    EXPECT_TRUE(std::isnan(factors.host()(rows - 1, 0)));
    EXPECT_EQ(values.host()(rows - 1, columns - 1), columns > group ? q(rows - 1, columns - 1) : 0);
  });
}

TEST(QuantizationOnDevice, Int4EqualsTheHosts) {
  for (Index columns : {1, 33, 300})
    for (Index group : {32, 128}) {
      check_int4<float>(3, columns, group, ef::Int4Fit::extremes);
      check_int4<ef::bfloat16>(2, columns, group, ef::Int4Fit::least_squares);
      check_int4<float>(3, columns, group, ef::Int4Fit::least_squares);
    }
}

/// Against the CPU, bit for bit; row 1 holds NaN, row 2 infinity, row 3 zeros, row 4 denormals.
template <typename T>
void check_activations(Index rows, Index columns) {
  auto x = random_tensor<T, 2>({rows, columns}, 5);
  for (Index j = 0; j < columns; ++j) {
    if (rows > 3) x(3, j) = T(0);
    if (rows > 4) x(4, j) = std::numeric_limits<T>::denorm_min();
  }
  if (rows > 2 && columns > 0) {
    x(1, columns - 1) = std::numeric_limits<T>::quiet_NaN();
    x(2, columns / 2) = std::numeric_limits<T>::infinity();
  }
  ef::Tensor<std::int8_t, 2> q(rows, columns);
  ef::Tensor<float, 1> s(rows);
  ef::quantize_activations_int8_into(Eigen::DefaultDevice{}, q, s, x);
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto values = on_device(bench, poisoned_tensor<std::int8_t, 2>({rows, columns}));
    auto scales = on_device(bench, poisoned_tensor<float, 1>({rows}));
    ef::quantize_activations_int8_into(bench.device, values.view(), scales.view(),
                                       device_x.cview());
    EXPECT_TRUE(same_bits(values.host(), q)) << rows << " x " << columns;
    EXPECT_TRUE(same_bits(scales.host(), s)) << rows << " x " << columns;
  });
}

TEST(QuantizationOnDevice, ActivationsEqualTheHosts) {
  for (Index columns : {0, 1, 31, 33, 255, 256, 257})
    for (Index rows : {0, 1, 5}) {
      check_activations<float>(rows, columns);
      check_activations<double>(rows, columns);
      check_activations<ef::bfloat16>(rows, columns);
      check_activations<ef::half>(rows, columns);
    }
}

template <typename T>
void check_tensor(Index count) {
  const auto weights = random_tensor<T, 1>({count}, 6);
  ef::Tensor<std::int8_t, 1> q(count);
  float s = 0;
  ef::quantize_weights_int8_into(Eigen::DefaultDevice{}, q, s, weights);
  for_each_device([&](const auto& bench) {
    auto device_weights = on_device(bench, weights);
    auto values = on_device(bench, poisoned_tensor<std::int8_t, 1>({count}));
    float scale = -1;
    ef::quantize_weights_int8_into(bench.device, values.view(), scale, device_weights.cview());
    EXPECT_EQ(scale, s) << count;
    EXPECT_TRUE(same_bits(values.host(), q)) << count;
    if (count == 0) return;
    auto bad = weights;
    bad(count - 1) = std::numeric_limits<T>::infinity();
    auto device_bad = on_device(bench, bad);
    auto untouched = on_device(bench, poisoned_tensor<std::int8_t, 1>({count}));
    scale = -1;
    EXPECT_THROW(
        ef::quantize_weights_int8_into(bench.device, untouched.view(), scale, device_bad.cview()),
        std::invalid_argument);
    EXPECT_EQ(scale, -1);
    EXPECT_TRUE(same_bits(untouched.host(), poisoned_tensor<std::int8_t, 1>({count})));
  });
}

TEST(QuantizationOnDevice, TensorsEqualTheHosts) {
  for (Index count : {0, 1, 33, 257, 16384, 40001}) check_tensor<float>(count);
  for (Index count : {0, 1, 20000}) {
    check_tensor<double>(count);
    check_tensor<ef::bfloat16>(count);
    check_tensor<ef::half>(count);
  }
}

/// group 0: one scale per row; all three forms.
template <typename T>
void check_back(Index rows, Index columns, Index group) {
  const Index groups = group == 0 ? 1 : (columns + group - 1) / group;
  ef::Tensor<std::int8_t, 2> q(rows, columns);
  for (Index i = 0; i < q.size(); ++i) q.data()[i] = static_cast<std::int8_t>(i * 37 % 255 - 127);
  auto scales = random_tensor<float, 2>({rows, groups}, 7);
  if (scales.size() > 1) scales.data()[1] = NAN;
  const auto row_scales = random_tensor<float, 1>({rows}, 9);
  ef::Tensor<T, 2> expected(rows, columns);
  const auto back = [&](const auto& device, auto&& to, const auto& values, const auto& factors,
                        const auto& row_factors) {
    if (group > 0)
      ef::dequantize_grouped_into(device, to, values, factors, group);
    else
      ef::dequantize_into(device, to, values, row_factors);
  };
  back(Eigen::DefaultDevice{}, expected, q, scales, row_scales);
  ef::Tensor<T, 2> by_tensor(rows, columns);
  ef::dequantize_into(Eigen::DefaultDevice{}, by_tensor, q, 0.3f);
  for_each_device([&](const auto& bench) {
    auto values = on_device(bench, q);
    auto factors = on_device(bench, scales);
    auto row_factors = on_device(bench, row_scales);
    auto to = on_device(bench, poisoned_tensor<T, 2>({rows, columns}));
    back(bench.device, to.view(), values.cview(), factors.cview(), row_factors.cview());
    EXPECT_TRUE(same_numbers(to.host(), expected)) << rows << " x " << columns << ", " << group;
    ef::dequantize_into(bench.device, to.view(), values.cview(), 0.3f);
    EXPECT_TRUE(same_bits(to.host(), by_tensor)) << rows << " x " << columns;
  });
}

TEST(QuantizationOnDevice, BackEqualsTheHosts) {
  for (Index columns : {0, 1, 31, 128, 257})
    for (Index rows : {0, 1, 3})
      for (Index group : {0, 32, 128}) {
        check_back<float>(rows, columns, group);
        check_back<double>(rows, columns, group);
        check_back<ef::bfloat16>(rows, columns, group);
        check_back<ef::half>(rows, columns, group);
      }
}

/// No public call on a GPU asks for it: the kernel is called as core/dispatch.h does.
template <typename T>
void check_first(Index count, std::vector<Index> bad, Index expected) {
  auto numbers = random_tensor<T, 1>({count}, 8);
  for (Index at : bad)
    numbers(at) =
        at % 2 == 0 ? std::numeric_limits<T>::quiet_NaN() : std::numeric_limits<T>::infinity();
  for_each_device([&](const auto& bench) {
    auto device_numbers = on_device(bench, numbers);
    EXPECT_EQ(
        ef::detail::run(bench.device,
                        ef::problem::FirstNotQuantizable<T>{device_numbers.cview().data(), count}),
        expected);
  });
}

TEST(QuantizationOnDevice, FindsTheFirstThatHasNoScale) {
  check_first<float>(0, {}, -1);
  check_first<float>(1, {}, -1);
  check_first<float>(1, {0}, 0);
  check_first<float>(300, {299, 257}, 257);
  check_first<float>(40000, {39999, 16384}, 16384);
  check_first<double>(300, {31}, 31);
  check_first<ef::bfloat16>(300, {32, 33}, 32);
  check_first<ef::half>(300, {}, -1);
}

}  // namespace
