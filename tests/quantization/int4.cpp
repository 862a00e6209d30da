// INT4: the definition bit for bit on every ISA, golden values of NumPy (INT8's too), error bounds,
// the way back, refusals.
#include <eigenformer/linear.h>
#include <eigenformer/quantization.h>
#include <eigenformer/reference/quantization.h>

#include <fstream>
#include <map>
#include <sstream>

#include "compare.h"

using namespace eigenformer_test;

namespace {

template <typename T>
class QuantizationInt4 : public ::testing::Test {};
TYPED_TEST_SUITE(QuantizationInt4, EveryScalar);

template <typename T>
void check_definition(const ef::Tensor<T, 2>& weights, Index group, ef::Int4Fit fit) {
  const Index rows = weights.dimension(0), columns = weights.dimension(1),
              groups = (columns + group - 1) / group;
  for (const bool above : {false, true}) {
    ef::Tensor<std::int8_t, 2> expected(rows, columns);
    ef::Tensor<float, 2> scales(rows, groups), minimums(rows, groups);
    for (Index r = 0; r < rows; ++r)
      ef::reference::quantize_int4(weights.data() + r * columns, columns, group,
                                   expected.data() + r * columns, scales.data() + r * groups,
                                   above ? minimums.data() + r * groups : nullptr, fit);
    for_each_product_isa([&](auto isa) {
      auto values = poisoned_tensor<std::int8_t, 2>({rows, columns});
      auto found = poisoned_tensor<float, 2>({rows, groups}),
           least = poisoned_tensor<float, 2>({rows, groups});
      if (above)
        ef::quantize_weights_int4_with_minimums_into(on(isa), values, found, least, weights, group,
                                                     fit);
      else
        ef::quantize_weights_int4_into(on(isa), values, found, weights, group, fit);
      ASSERT_TRUE(same_bits(found, scales)) << isa.name << " " << above << " " << columns;
      ASSERT_TRUE(same_bits(values, expected)) << isa.name << " " << above << " " << columns;
      ASSERT_TRUE(!above || same_bits(least, minimums)) << isa.name;
    });
    const ef::Tensor<float, 2> back =
        above ? ef::dequantize_grouped(expected, scales, minimums, group)
              : ef::dequantize_grouped(expected, scales, group);
    for (Index i = 0; i < weights.size(); ++i) {
      const Index at = i / columns * groups + i % columns / group;
      const float scale = scales.data()[at], number = static_cast<float>(expected.data()[i]);
      ASSERT_EQ(back.data()[i],
                above ? std::fma(scale, number, minimums.data()[at]) : number * scale);
      const double w = static_cast<double>(weights.data()[i]);
      if (fit == ef::Int4Fit::least_squares) continue;
      ASSERT_LE(std::abs(w - static_cast<double>(back.data()[i])),
                0.5 * scale * (1 + 1e-4) + 1e-6 * std::abs(w));
    }
  }
}

TYPED_TEST(QuantizationInt4, IsItsDefinition) {
  unsigned seed = 0;
  for (Index columns : {0, 1, 31, 32, 33, 64, 100, 257, 1200}) {
    auto weights = random_tensor<TypeParam, 2>({3, columns}, ++seed);
    for (Index i = 0; i < columns; ++i) weights(1, i) = weights(1, i) + TypeParam(5);
    for (Index i = 0; i < (std::min)(columns, Index{40}); ++i)
      weights(2, i) = TypeParam(i % 3 == 0 ? -0.0f : 0.0f);
    for (Index group : {32, 64, 128})
      for (const auto fit : {ef::Int4Fit::extremes, ef::Int4Fit::least_squares})
        check_definition(weights, group, fit);
  }
  check_definition(ef::Tensor<TypeParam, 2>(0, 40), 32, ef::Int4Fit::least_squares);
}

/// The sum of a group's squared errors by a scale and a minimum (0 of symmetric ones).
template <typename T>
double squared_error(const T* group, Index count, double scale, double minimum, double least,
                     double most) {
  double sum = 0;
  for (Index i = 0; i < count; ++i) {
    const double w = static_cast<double>(group[i]),
                 q = std::clamp(std::nearbyint((w - minimum) / scale), least, most),
                 error = w - (q * scale + minimum);
    sum += error * error;
  }
  return sum;
}

// The search in double finds no better scales, and those of the extremes are never better.
TYPED_TEST(QuantizationInt4, LeastSquaresLowersTheErrorOfEveryGroup) {
  const Index rows = 40, columns = 330;
  auto weights = random_tensor<TypeParam, 2>({rows, columns}, 8);
  for (Index i = 0; i < columns; ++i) {
    weights(1, i) = weights(1, i) + TypeParam(5);
    weights(2, i) = TypeParam(i % 3 == 0 ? -1 : 1);
    weights(3, i) = TypeParam(static_cast<float>(weights(3, i)) * 0x1p-7f);
    weights(4, i) = TypeParam(i % 32 == 0 ? 30 : static_cast<float>(weights(4, i)));
  }
  double before[2] = {}, after[2] = {}, in_double[2] = {};
  for (Index group : {32, 64, 128})
    for (const bool above : {false, true}) {
      const Index groups = (columns + group - 1) / group;
      ef::Tensor<std::int8_t, 2> values(rows, columns);
      ef::Tensor<float, 2> scales[2], minimums[2];
      for (const int fit : {0, 1}) {
        scales[fit] = minimums[fit] = ef::Tensor<float, 2>(rows, groups).setZero();
        if (above)
          ef::quantize_weights_int4_with_minimums_into(Eigen::DefaultDevice{}, values, scales[fit],
                                                       minimums[fit], weights, group,
                                                       static_cast<ef::Int4Fit>(fit));
        else
          ef::quantize_weights_int4_into(Eigen::DefaultDevice{}, values, scales[fit], weights,
                                         group, static_cast<ef::Int4Fit>(fit));
      }
      for (Index r = 0; r < rows; ++r)
        for (Index g = 0; g < groups; ++g) {
          const TypeParam* const own = weights.data() + r * columns + g * group;
          const Index count = (std::min)(group, columns - g * group);
          const auto error = [&](float scale, float minimum, double least) {
            return squared_error(own, count, scale, minimum, least, above ? 15 : 7);
          };
          const double extremes = error(scales[0](r, g), minimums[0](r, g), above ? 0 : -7),
                       fitted = error(scales[1](r, g), minimums[1](r, g), above ? 0 : -8);
          double length = 0;
          for (Index i = 0; i < count; ++i)
            length += static_cast<double>(own[i]) * static_cast<double>(own[i]);
          ASSERT_LE(fitted, extremes + 1e-9 * length) << r << " " << g << " " << group << above;
          float scale = scales[0](r, g), minimum = minimums[0](r, g);
          ef::reference::fit_int4<double>(own, count, &scale, above ? &minimum : nullptr);
          before[above] += extremes;
          after[above] += fitted;
          in_double[above] += error(scale, minimum, above ? 0 : -8);
        }
    }
  for (const bool above : {false, true}) {
    EXPECT_LT(after[above], 0.9 * before[above]) << above;
    EXPECT_NEAR(after[above], in_double[above], 1e-2 * after[above]) << above;
  }
}

TEST(QuantizationInt4Edges, TinyAndHugeNumbers) {
  const float smallest = std::numeric_limits<float>::denorm_min(),
              largest = (std::numeric_limits<float>::max)();
  ef::Tensor<float, 2> weights(1, 96);
  for (Index i = 0; i < 32; ++i) weights(0, i) = static_cast<float>(i - 16) * smallest;
  for (Index i = 32; i < 64; ++i) weights(0, i) = i % 2 == 0 ? largest : -largest;
  for (Index i = 64; i < 96; ++i) weights(0, i) = static_cast<float>(i) * 0x1p100f;
  const auto [q, scales] = ef::quantize_weights_int4(weights, 32);
  EXPECT_EQ(scales(0, 0), 2 * smallest);
  EXPECT_EQ(q(0, 0), -7);  // clamped: -16 over 2
  EXPECT_EQ(q(0, 32), 7);
  EXPECT_EQ(q(0, 33), -7);
  const auto [u, steps, minimums] = ef::quantize_weights_int4_with_minimums(weights, 32);
  EXPECT_EQ(u(0, 0), 0);
  EXPECT_EQ(u(0, 32), 15);
  EXPECT_EQ(u(0, 33), 0);
  EXPECT_EQ(minimums(0, 1), -largest);
  EXPECT_TRUE(std::isfinite(steps(0, 1)));
  // Squares of these would leave float's range: they stay as they are.
  const auto fitted =
      ef::quantize_weights_int4_with_minimums(weights, 32, ef::Int4Fit::least_squares);
  EXPECT_TRUE(same_bits(fitted.scales, steps));
  EXPECT_TRUE(same_bits(fitted.values, u));
  EXPECT_TRUE(
      same_bits(ef::quantize_weights_int4(weights, 32, ef::Int4Fit::least_squares).scales, scales));
}

/// The numbers of one line of quantization.txt.
struct Golden {
  Index rows, columns;
  std::vector<std::string> numbers;

  ef::Tensor<float, 2> floats() const {
    ef::Tensor<float, 2> result(rows, columns);
    for (std::size_t i = 0; i < numbers.size(); ++i)
      result.data()[i] =
          std::bit_cast<float>(static_cast<std::uint32_t>(std::stoul(numbers[i], nullptr, 16)));
    return result;
  }
  ef::Tensor<std::int8_t, 2> values() const {
    ef::Tensor<std::int8_t, 2> result(rows, columns);
    for (std::size_t i = 0; i < numbers.size(); ++i)
      result.data()[i] = static_cast<std::int8_t>(std::stoi(numbers[i]));
    return result;
  }
};

/// quantization.txt (golden/make_quantization.py).
std::map<std::string, Golden> golden_lines() {
  std::ifstream file(EIGENFORMER_GOLDEN_DIR "/quantization.txt");
  std::map<std::string, Golden> golden;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    Golden one;
    words >> name >> one.rows >> one.columns;
    for (std::string number; words >> number;) one.numbers.push_back(number);
    EXPECT_EQ(one.numbers.size(), static_cast<std::size_t>(one.rows * one.columns));
    golden[name] = one;
  }
  EXPECT_EQ(golden.size(), 15u);
  return golden;
}

TEST(QuantizationInt4Golden, EqualsNumPy) {
  auto golden = golden_lines();
  const auto weights = golden["weights"].floats(), x = golden["x"].floats();
  const auto [q, scales] = ef::quantize_weights_int4(weights);
  EXPECT_TRUE(same_bits(q, golden["symmetric_values"].values()));
  EXPECT_TRUE(same_bits(scales, golden["symmetric_scales"].floats()));
  EXPECT_TRUE(same_bits(ef::Tensor<float, 2>(ef::linear(x, ef::pack_weight<ef::int4>(weights))),
                        golden["symmetric_y"].floats()));
  const auto [u, steps, minimums] = ef::quantize_weights_int4_with_minimums(weights);
  EXPECT_TRUE(same_bits(u, golden["minimums_values"].values()));
  EXPECT_TRUE(same_bits(steps, golden["minimums_scales"].floats()));
  EXPECT_TRUE(same_bits(minimums, golden["minimums_minimums"].floats()));
  EXPECT_TRUE(
      same_bits(ef::Tensor<float, 2>(ef::linear(x, ef::pack_weight<ef::int4>(u, steps, minimums))),
                golden["minimums_y"].floats()));
}

TEST(QuantizationInt8Golden, EqualsNumPy) {
  auto golden = golden_lines();
  const auto weights = golden["weights"].floats(), x = golden["x"].floats();
  const auto [q, scales] = ef::quantize_weights_int8_per_channel(weights);
  EXPECT_TRUE(same_bits(q, golden["channels_values"].values()));
  const auto expected = golden["channels_scales"].floats();
  EXPECT_TRUE(same_bits(scales, ef::TensorView<const float, 1>(expected.data(), expected.size())));
  EXPECT_TRUE(same_bits(ef::int8_linear(x, q, scales), golden["channels_y"].floats()));
  const auto product = [&](const ef::Int8Packing& options) {
    return ef::Tensor<float, 2>(ef::linear(x, ef::pack_weight<std::int8_t>(weights, options)));
  };
  EXPECT_TRUE(same_bits(product({}), golden["channels_y"].floats()));
  const auto [values, steps] = ef::quantize_weights_int8_grouped(weights, 32);
  EXPECT_TRUE(same_bits(values, golden["groups_values"].values()));
  EXPECT_TRUE(same_bits(steps, golden["groups_scales"].floats()));
  EXPECT_TRUE(same_bits(product({.group_size = 32}), golden["groups_y"].floats()));
}

TEST(QuantizationInt4Errors, NameTheArgument) {
  auto weights = random_tensor<float, 2>({3, 70}, 1);
  ef::Tensor<std::int8_t, 2> values(3, 70);
  ef::Tensor<float, 2> scales(3, 3), narrow(3, 2);
  const Eigen::DefaultDevice device;
  values.setConstant(3);
  expect_throws<std::invalid_argument>([&] { ef::quantize_weights_int4(weights, 48); },
                                       {"quantize_weights_int4", "group_size is 48", "128"});
  expect_throws<std::invalid_argument>(
      [&] { ef::quantize_weights_int4_into(device, values, narrow, weights); },
      {"scales has shape (3, 2)", "(3, 3)"});
  expect_throws<std::invalid_argument>(
      [&] {
        ef::quantize_weights_int4_with_minimums_into(device, values, scales, narrow, weights);
      },
      {"quantize_weights_int4_with_minimums", "minimums has shape (3, 2)"});
  expect_throws<std::invalid_argument>([&] { ef::dequantize_grouped(values, scales, narrow, 32); },
                                       {"dequantize_grouped", "minimums has shape (3, 2)"});
  weights(2, 69) = std::numeric_limits<float>::infinity();
  expect_throws<std::invalid_argument>(
      [&] { ef::quantize_weights_int4_into(device, values, scales, weights); },
      {"weights[2, 69] is inf"});
  expect_throws<std::invalid_argument>(
      [&] {
        ef::quantize_weights_int4_with_minimums_into(device, values, scales, scales, weights);
      },
      {"weights[2, 69] is inf"});
  EXPECT_EQ(values(0, 0), 3);
}

}  // namespace
