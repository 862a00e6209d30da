// What quantization and int8 products refuse: numbers that have no scale, wherever they stand, and
// scales that are no scales.
#include <eigenformer/quantization.h>

#include "compare.h"

using namespace eigenformer_test;

namespace {

// NaN and infinity in a line that is otherwise clean, so that nothing but the vector path can find
// them, at every place of a step.
template <typename T>
void find_bad_numbers_in_clean_lines() {
  for (Index group : {32, 64, 128}) {
    const Index columns = 32 * group;
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
          -std::numeric_limits<float>::infinity()})
      for (Index at :
           {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 23, 31, 40, 250, 777, 1023}) {
        ef::Tensor<T, 2> weights(1, columns);
        weights.setConstant(T(1));
        weights(0, at) = T(bad);
        ef::Tensor<std::int8_t, 2> values(1, columns);
        ef::Tensor<float, 2> scales(1, columns / group);
        ef::Tensor<float, 1> row_scale(1);
        const std::string where = "weights[0, " + std::to_string(at) + "]";
        for_each_product_isa([&](auto isa) {
          for (const bool check_first : {true, false}) {
            expect_throws<std::invalid_argument>(
                [&] {
                  ef::quantize_weights_int8_grouped_into(on(isa), values, scales, weights, group,
                                                         {.check_first = check_first});
                },
                {where});
            expect_throws<std::invalid_argument>(
                [&] {
                  ef::quantize_weights_int8_per_channel_into(on(isa), values, row_scale, weights,
                                                             {.check_first = check_first});
                },
                {where});
          }
        });
        expect_throws<std::invalid_argument>(
            [&] { ef::pack_weight<std::int8_t>(weights, {.group_size = group}); }, {where});
      }
  }
}

TEST(QuantizationErrors, FindBadNumbersInCleanLines) {
  find_bad_numbers_in_clean_lines<float>();
  find_bad_numbers_in_clean_lines<double>();
  find_bad_numbers_in_clean_lines<ef::bfloat16>();
  find_bad_numbers_in_clean_lines<ef::half>();
}

TEST(QuantizationErrors, RefuseDoublesPastTheRangeOfFloat) {
  for (Index columns : {5, 64, 1024})
    for (const double bad : {1e300, -1e300, 4.4e40}) {
      ef::Tensor<double, 2> weights(2, columns);
      weights.setConstant(1);
      weights(1, 3) = bad;
      ef::Tensor<std::int8_t, 2> values(2, columns);
      ef::Tensor<float, 2> scales(2, (columns + 31) / 32);
      ef::Tensor<float, 1> row_scales(2);
      float scale = 0;
      for (const bool check_first : {true, false}) {
        expect_throws<std::invalid_argument>(
            [&] {
              ef::quantize_weights_int8_grouped_into(Eigen::DefaultDevice{}, values, scales,
                                                     weights, 32, {.check_first = check_first});
            },
            {"weights[1, 3]"});
        expect_throws<std::invalid_argument>(
            [&] {
              ef::quantize_weights_int8_per_channel_into(Eigen::DefaultDevice{}, values, row_scales,
                                                         weights, {.check_first = check_first});
            },
            {"weights[1, 3]"});
      }
      expect_throws<std::invalid_argument>(
          [&] { ef::quantize_weights_int8_into(Eigen::DefaultDevice{}, values, scale, weights); },
          {"weights[1, 3]"});
      expect_throws<std::invalid_argument>([&] { ef::pack_weight<std::int8_t>(weights); },
                                           {"weights[1, 3]"});
      ef::quantize_activations_int8_into(Eigen::DefaultDevice{}, values, row_scales, weights);
      EXPECT_EQ(row_scales(0), 1.0f / 127);
      EXPECT_TRUE(std::isnan(row_scales(1)));
      for (Index i = 0; i < columns; ++i) EXPECT_EQ(values(1, i), 0);
      weights(1, 3) = 4e40;  // of scale 3.15e38
      ef::quantize_activations_int8_into(Eigen::DefaultDevice{}, values, row_scales, weights);
      EXPECT_EQ(row_scales(1), static_cast<float>(4e40 / 127));
      EXPECT_EQ(values(1, 3), 127);
    }
}

TEST(QuantizationErrors, NameTheFirstBadScale) {
  const auto x = random_tensor<float, 2>({3, 64}, 1);
  const auto [q, scales] =
      ef::quantize_weights_int8_per_channel(random_tensor<float, 2>({7, 64}, 2));
  const auto [grouped, group_scales] =
      ef::quantize_weights_int8_grouped(random_tensor<float, 2>({7, 64}, 2), 32);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity(), -1.0f, -1e-45f}) {
    ef::Tensor<float, 1> broken = scales;
    broken(4) = broken(6) = bad;
    expect_throws<std::invalid_argument>([&, &v = q] { ef::pack_weight(v, broken); },
                                         {"pack_weight", "scales[4] is"});
    expect_throws<std::invalid_argument>([&, &v = q] { ef::int8_linear(x, v, broken); },
                                         {"int8_linear", "scales[4] is"});
    ef::Tensor<float, 2> broken_groups = group_scales;
    broken_groups(5, 1) = bad;
    expect_throws<std::invalid_argument>(
        [&, &v = grouped] { ef::pack_weight(v, broken_groups, {.group_size = 32}); },
        {"pack_weight", "scales[5, 1] is"});
    auto packed = ef::pack_weight(q, scales);
    const auto before = ef::linear(x, packed);
    expect_throws<std::invalid_argument>(
        [&, &v = q] { ef::pack_weight_into(Eigen::DefaultDevice{}, packed, v, broken); },
        {"scales[4]"});
    EXPECT_TRUE(same_bits(ef::linear(x, packed), before));  // nothing has changed
  }
  ef::Tensor<float, 1> zeros = scales;  // a scale of 0 is a row of zeros
  zeros(2) = 0;
  EXPECT_EQ(ef::linear(x, ef::pack_weight(q, zeros))(1, 2), 0.0f);
  EXPECT_TRUE(same_bits(ef::int8_linear(x, q, zeros), ef::linear(x, ef::pack_weight(q, zeros))));
  zeros(2) = std::numeric_limits<float>::quiet_NaN();  // what a token with NaN is scaled by
  EXPECT_TRUE(std::isnan(ef::dequantize(q, zeros)(2, 5)));
}

}  // namespace
