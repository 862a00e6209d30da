// Laws: the definition bit for bit, on every ISA and device, in place or not; the error bound; the
// refusals; the product with quantized weights equals exact integer sums scaled once, the same bits
// on every ISA, for every tail, batch and number of threads.
#include <eigenformer/quantization.h>
#include <eigenformer/reference/quantization.h>

#include "allocations.h"
#include "compare.h"

using namespace eigenformer_test;

namespace {

template <typename T>
class Quantization : public ::testing::Test {};
TYPED_TEST_SUITE(Quantization, EveryScalar);

TEST(QuantizationExample, OfTheContract) {
  ef::Tensor<float, 2> weights(2, 2);
  weights.setValues({{-2.0f, 1.5f}, {3.0f, -1.0f}});
  auto [q, scale] = ef::quantize_weights_int8(weights);
  EXPECT_EQ(scale, 3.0f / 127.0f);
  EXPECT_EQ(q(0, 0), -85);
  EXPECT_EQ(q(0, 1), 64);
  EXPECT_EQ(q(1, 0), 127);
  EXPECT_EQ(q(1, 1), -42);
  auto [qc, scales] = ef::quantize_weights_int8_per_channel(weights);
  EXPECT_EQ(scales(0), 2.0f / 127.0f);
  EXPECT_EQ(qc(0, 0), -127);
  ef::Tensor<float, 2> w = ef::dequantize(qc, scales);
  EXPECT_EQ(w(1, 0), 127.0f * scales(1));
  ef::Tensor<float, 2> w1 = ef::dequantize(q, scale);
  EXPECT_EQ(w1(0, 1), 64.0f * scale);
  ef::Tensor<float, 2> x(3, 2);
  x.setConstant(0.5f);
  ef::Tensor<float, 2> y = ef::int8_linear(x, qc, scales);
  EXPECT_NEAR(y(0, 0), -0.25f, 0.01f);
  static_assert(std::is_same_v<decltype(q), ef::Tensor<std::int8_t, 2>> &&
                std::is_same_v<decltype(scales), ef::Tensor<float, 1>>);
}

template <typename T, int Rank>
void check_tensor(const ef::Tensor<T, Rank>& weights) {
  const auto result = ef::quantize_weights_int8(weights);
  const float scale = ef::reference::int8_scale(weights.data(), weights.size());
  ASSERT_EQ(result.scale, scale);
  ef::Tensor<std::int8_t, Rank> expected(weights.dimensions());
  ef::reference::quantize(weights.data(), weights.size(), scale, expected.data());
  ASSERT_TRUE(same_bits(result.values, expected));
  Threads threads(3);
  ASSERT_TRUE(same_bits(ef::quantize_weights_int8(threads.device, weights).values, expected));
  for_each_product_isa([&](auto isa) {
    ef::Tensor<std::int8_t, Rank> other(weights.dimensions());
    float found = -1;
    ef::quantize_weights_int8_into(on(isa), other, found, weights);
    ASSERT_EQ(found, scale) << isa.name;
    ASSERT_TRUE(same_bits(other, expected)) << isa.name;
  });
  const auto back = ef::dequantize(result.values, result.scale);
  for (Index i = 0; i < weights.size(); ++i) {
    ASSERT_NE(result.values.data()[i], -128);
    const double w = static_cast<double>(weights.data()[i]);
    ASSERT_LE(std::abs(w - static_cast<double>(back.data()[i])), 0.5 * scale * (1 + 1e-4)) << i;
  }
}

TYPED_TEST(Quantization, OfATensorIsItsDefinition) {
  for (Index size : {0, 1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 129})
    check_tensor(random_tensor<TypeParam, 1>({size}, 1 + static_cast<unsigned>(size)));
  check_tensor(random_tensor<TypeParam, 3>({3, 5, 7}, 1));
  check_tensor(random_tensor<TypeParam, 2>({130, 1001}, 2));  // several chunks
  ef::Tensor<TypeParam, 2> zeros(3, 5);
  zeros.setZero();
  check_tensor(zeros);
  EXPECT_EQ(ef::quantize_weights_int8(zeros).scale, 1.0f);
}

TYPED_TEST(Quantization, OfRowsAndGroupsIsItsDefinition) {
  Threads threads(3);
  for (Index rows : {0, 1, 5, 130})
    for (Index columns : {0, 1, 31, 32, 33, 64, 100, 257}) {
      auto weights =
          random_tensor<TypeParam, 2>({rows, columns}, static_cast<unsigned>(rows + columns));
      if (rows > 1) std::fill_n(weights.data(), columns, TypeParam(0));
      const auto [qc, scales] = ef::quantize_weights_int8_per_channel(threads.device, weights);
      for (Index r = 0; r < rows; ++r) {
        const TypeParam* row = weights.data() + r * columns;
        ASSERT_EQ(scales(r), ef::reference::int8_scale(row, columns));
        std::vector<std::int8_t> expected(static_cast<std::size_t>(columns));
        ef::reference::quantize(row, columns, scales(r), expected.data());
        for (Index i = 0; i < columns; ++i)
          ASSERT_EQ(qc(r, i), expected[static_cast<std::size_t>(i)]);
      }
      const auto back = ef::dequantize(threads.device, qc, scales);
      for (Index i = 0; i < back.size(); ++i)
        ASSERT_EQ(back.data()[i], static_cast<float>(qc.data()[i]) * scales(i / columns));
      for (Index group : {32, 64, 128}) {
        const auto [qg, factors] = ef::quantize_weights_int8_grouped(weights, group);
        ASSERT_EQ(factors.dimension(1), (columns + group - 1) / group);
        const auto wide = ef::dequantize_grouped(qg, factors, group);
        for (Index r = 0; r < rows; ++r)
          for (Index g = 0; g * group < columns; ++g) {
            const Index n = std::min(group, columns - g * group);
            const TypeParam* from = weights.data() + r * columns + g * group;
            ASSERT_EQ(factors(r, g), ef::reference::int8_scale(from, n));
            std::vector<std::int8_t> expected(static_cast<std::size_t>(n));
            ef::reference::quantize(from, n, factors(r, g), expected.data());
            for (Index i = 0; i < n; ++i) {
              ASSERT_EQ(qg(r, g * group + i), expected[static_cast<std::size_t>(i)]);
              ASSERT_EQ(wide(r, g * group + i),
                        static_cast<float>(qg(r, g * group + i)) * factors(r, g));
            }
          }
      }
    }
}

TEST(QuantizationEdges, TinyAndHugeNumbers) {
  const float smallest = std::numeric_limits<float>::denorm_min(),
              largest = std::numeric_limits<float>::max();
  for (float w : {smallest, 4 * smallest, 190 * smallest, 1e-40f, 1e-37f, 1e30f, largest}) {
    ef::Tensor<float, 1> weights(3);
    weights.setValues({w, -w, 0.0f});
    const auto [q, scale] = ef::quantize_weights_int8(weights);
    EXPECT_GT(scale, 0.0f) << w;
    EXPECT_TRUE(std::isfinite(scale)) << w;
    EXPECT_GT(q(0), 0) << w;
    EXPECT_EQ(q(1), -q(0)) << w;
    EXPECT_EQ(q(2), 0);
  }
  // 127.5 and 0.5 are ties that a reciprocal gets wrong: with scale 1, 0.5 -> 0, 1.5 -> 2, 2.5 -> 2.
  ef::Tensor<float, 1> ties(6);
  ties.setValues({127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -3.5f});
  const auto [q, scale] = ef::quantize_weights_int8(ties);
  const std::int8_t expected[] = {127, 0, 2, 2, 0, -4};
  EXPECT_EQ(scale, 1.0f);
  for (Index i = 0; i < 6; ++i) EXPECT_EQ(q(i), expected[i]) << i;
}

TEST(QuantizationErrors, NameTheFirstBadWeightAndWriteNothing) {
  for (Index at : {0, 1, 17, 63, 64, 99, 149}) {
    auto weights = random_tensor<float, 2>({10, 15}, 1);
    weights.data()[149] = std::numeric_limits<float>::infinity();
    weights.data()[at] = std::numeric_limits<float>::quiet_NaN();
    const std::string where =
        "weights[" + std::to_string(at / 15) + ", " + std::to_string(at % 15) + "]";
    ef::Tensor<std::int8_t, 2> values(10, 15);
    ef::Tensor<float, 1> scales(10);
    values.setConstant(5);
    scales.setConstant(5.0f);
    float scale = 5.0f;
    const Eigen::DefaultDevice device;
    expect_throws<std::invalid_argument>(
        [&] { ef::quantize_weights_int8_into(device, values, scale, weights); },
        {"quantize_weights_int8", where, "nan"});
    expect_throws<std::invalid_argument>(
        [&] { ef::quantize_weights_int8_per_channel_into(device, values, scales, weights); },
        {"per_channel", where});
    expect_throws<std::invalid_argument>([&] { ef::quantize_weights_int8_grouped(weights, 32); },
                                         {"grouped", where});
    EXPECT_EQ(scale, 5.0f);
    for (Index i = 0; i < values.size(); ++i) ASSERT_EQ(values.data()[i], 5);
    for (Index i = 0; i < 10; ++i) ASSERT_EQ(scales(i), 5.0f);
  }
  ef::Tensor<float, 3> deep(2, 3, 4);
  deep.setZero();
  deep(1, 2, 3) = -std::numeric_limits<float>::infinity();
  expect_throws<std::invalid_argument>([&] { ef::quantize_weights_int8(deep); },
                                       {"weights[1, 2, 3]", "inf"});
  ef::Tensor<double, 1> wide(2);
  wide.setValues({1.0, 1e300});
  expect_throws<std::invalid_argument>([&] { ef::quantize_weights_int8(wide); }, {"weights[1]"});
}

TEST(QuantizationAtOnce, HasTheBitsOfCheckingFirst) {
  const ef::QuantizeOptions at_once{.check_first = false};
  Threads threads(2);
  // The last is past 4 MiB, where values are written around the caches.
  for (const auto& [rows, columns] :
       {std::pair<Index, Index>{0, 5}, {1, 1}, {3, 63}, {7, 130}, {2, 0}, {33, 131072}}) {
    const auto weights = random_tensor<float, 2>({rows, columns}, 1);
    for (Index group : {Index{0}, Index{64}}) {
      const Index groups = group == 0 ? 1 : (columns + group - 1) / group;
      ef::Tensor<std::int8_t, 2> checked(rows, columns), values(rows, columns),
          threaded(rows, columns);
      ef::Tensor<float, 2> checked_scales(rows, groups), scales(rows, groups),
          threaded_scales(rows, groups);
      const auto run = [&](const auto& device, auto& q, auto& s,
                           const ef::QuantizeOptions& options) {
        q.setConstant(-128);
        if (group == 0)
          ef::quantize_weights_int8_per_channel_into(
              device, q, ef::TensorView<float, 1>(s.data(), rows), weights, options);
        else
          ef::quantize_weights_int8_grouped_into(device, q, s, weights, group, options);
      };
      run(Eigen::DefaultDevice{}, checked, checked_scales, {});
      run(Eigen::DefaultDevice{}, values, scales, at_once);
      run(threads.device, threaded, threaded_scales, at_once);
      ASSERT_TRUE(same_bits(values, checked)) << rows << " x " << columns << " by " << group;
      ASSERT_TRUE(same_bits(scales, checked_scales)) << rows << " x " << columns << " by " << group;
      ASSERT_TRUE(same_bits(threaded, checked) && same_bits(threaded_scales, checked_scales))
          << "threads";
    }
  }
}

template <typename T>
void expect_groups_by_definition(const ef::Tensor<T, 2>& line, Index group, const char* what) {
  const Index count = line.dimension(1), groups = (count + group - 1) / group;
  ef::Tensor<float, 2> expected_scales(1, groups);
  ef::Tensor<std::int8_t, 2> expected(1, count);
  for (Index g = 0; g < groups; ++g) {
    const T* from = line.data() + g * group;
    const Index n = std::min(group, count - g * group);
    expected_scales(0, g) = ef::reference::int8_scale(from, n);
    ef::reference::quantize(from, n, expected_scales(0, g), expected.data() + g * group);
  }
  for_each_product_isa([&](auto isa) {
    for (const bool check_first : {true, false}) {
      auto scales = poisoned_tensor<float, 2>({1, groups});
      auto values = poisoned_tensor<std::int8_t, 2>({1, count});
      ef::quantize_weights_int8_grouped_into(on(isa), values, scales, line, group,
                                             {.check_first = check_first});
      ASSERT_TRUE(same_bits(values, expected))
          << isa.name << " " << count << " by " << group << " " << what;
      ASSERT_TRUE(same_bits(scales, expected_scales))
          << isa.name << " " << count << " by " << group << " " << what;
    }
  });
}

template <typename T>
void expect_bad_weights_found(const ef::Tensor<T, 2>& line, Index group) {
  const Index count = line.dimension(1);
  ef::Tensor<float, 2> scales(1, (count + group - 1) / group);
  ef::Tensor<std::int8_t, 2> values(1, count);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()})
    for (Index at = 0; at < count; at += 97) {
      auto broken = line;
      broken(0, at) = T(bad);
      for_each_product_isa([&](auto isa) {
        for (const bool check_first : {true, false})
          expect_throws<std::invalid_argument>(
              [&] {
                ef::quantize_weights_int8_grouped_into(on(isa), values, scales, broken, group,
                                                       {.check_first = check_first});
              },
              {"weights[0, " + std::to_string(at) + "]"});
      });
    }
}

// Vectors of groups at a time, whole ones and what is left (alone in a line of two groups), and
// groups whose scales leave the range of the corrected quotient. A line of one group is another
// path.
template <typename T>
void check_line_in_groups() {
  for (Index group : {32, 64, 128})
    for (Index count : {Index{0}, Index{5}, group + 5, 16 * group, 33 * group + 17}) {
      auto line = random_tensor<T, 2>({1, count}, 1);
      const auto set_group = [&](Index g, float factor) {
        for (Index i = g * group; i < std::min(count, (g + 1) * group); ++i)
          line(0, i) = T(static_cast<float>(line(0, i)) * factor);
      };
      const auto check = [&](const char* what) { expect_groups_by_definition(line, group, what); };
      check("random");
      set_group(3, 0.0f);
      set_group(18, 0.0f);
      check("zeros");
      set_group(2, 1e-30f);
      check("tiny");
      set_group(33, 1e30f);
      check("huge");
      if constexpr (!std::is_same_v<T, double>) {
        set_group(17, 1e-45f);
        check("denormal");
      }
      expect_bad_weights_found(line, group);
    }
}

TEST(QuantizationAtOnce, OfGroupsIsItsDefinitionOnEveryIsa) {
  check_line_in_groups<float>();
  check_line_in_groups<ef::bfloat16>();
  check_line_in_groups<double>();
}

TEST(QuantizationAtOnce, NamesTheFirstBadWeightToo) {
  Threads threads(2);
  for (Index at : {0, 31, 64, 99, 149})
    for (Index group : {Index{0}, Index{32}}) {
      auto weights = random_tensor<float, 2>({3, 50}, 1);
      weights.data()[149] = std::numeric_limits<float>::infinity();
      weights.data()[at] = std::numeric_limits<float>::quiet_NaN();
      const std::string where =
          "weights[" + std::to_string(at / 50) + ", " + std::to_string(at % 50) + "]";
      ef::Tensor<std::int8_t, 2> values(3, 50);
      ef::Tensor<float, 1> scales(3);
      ef::Tensor<float, 2> group_scales(3, 2);
      expect_throws<std::invalid_argument>(
          [&] {
            if (group == 0)
              ef::quantize_weights_int8_per_channel_into(threads.device, values, scales, weights,
                                                         {.check_first = false});
            else
              ef::quantize_weights_int8_grouped_into(threads.device, values, group_scales, weights,
                                                     group, {.check_first = false});
          },
          {where});
    }
}

TEST(QuantizationEdges, QuotientsNearTiesRoundAsADivisionDoes) {
  std::mt19937 generator(1);
  std::uniform_real_distribution<float> mantissa(1.0f, 2.0f);
  for (int exponent : {-120, -75, -61, -59, -20, 0, 3, 59, 61, 110})
    for (int repeat = 0; repeat < 12; ++repeat) {
      // The scale of a line whose largest number this is.
      const float largest = 127 * std::ldexp(mantissa(generator), exponent);
      const float scale = largest / 127;
      ef::Tensor<float, 1> line(254 * 9 + 1);
      Index at = 0;
      for (int k = -127; k < 127;
           ++k)  // each tie between two values, and four floats on either side of it
        for (int step = -4; step <= 4; ++step) {
          float w = (static_cast<float>(k) + 0.5f) * scale;
          for (int i = 0; i < std::abs(step); ++i)
            w = std::nextafter(w, step < 0 ? -INFINITY : INFINITY);
          line(at++) = w;
        }
      line(at) = largest;
      ef::Tensor<std::int8_t, 1> expected(line.size());
      ef::reference::quantize(line.data(), line.size(), scale, expected.data());
      for_each_product_isa([&](auto isa) {
        auto values = poisoned_tensor<std::int8_t, 1>({line.size()});
        float found = 0;
        ef::quantize_weights_int8_into(on(isa), values, found, line);
        ASSERT_EQ(found, scale) << isa.name;
        ASSERT_TRUE(same_bits(values, expected)) << isa.name << " scale " << scale;
      });
    }
}

TEST(QuantizationErrors, ShapesAndGroups) {
  const Eigen::DefaultDevice device;
  const ef::Tensor<float, 2> weights = random_tensor<float, 2>({4, 40}, 1);
  ef::Tensor<std::int8_t, 2> values(4, 40), wrong(4, 39);
  ef::Tensor<float, 1> scales(4), few(3);
  float scale = 0;
  expect_throws<std::invalid_argument>(
      [&] { ef::quantize_weights_int8_into(device, wrong, scale, weights); },
      {"(4, 39)", "(4, 40)"});
  expect_throws<std::invalid_argument>(
      [&] { ef::quantize_weights_int8_per_channel_into(device, values, few, weights); },
      {"scales has 3", "4 rows"});
  expect_throws<std::invalid_argument>([&] { ef::quantize_weights_int8_grouped(weights, 48); },
                                       {"group_size is 48", "32, 64 or 128"});
  expect_throws<std::invalid_argument>([&] { ef::dequantize(values, few); },
                                       {"dequantize", "scales has 3", "4 rows"});
  expect_throws<std::invalid_argument>(
      [&] { ef::dequantize_grouped(values, ef::Tensor<float, 2>(4, 1), 32); },
      {"(4, 1)", "(4, 2)"});
  expect_throws<std::invalid_argument>(
      [&] { ef::quantize_activations_int8_into(device, values, few, weights); },
      {"scales has 3", "4 tokens"});
  const auto x = random_tensor<float, 2>({2, 40}, 2);
  expect_throws<std::invalid_argument>([&] { ef::int8_linear(x, values, few); },
                                       {"int8_linear", "scales has 3", "4 rows"});
  expect_throws<std::invalid_argument>([&] { ef::int8_linear(x, wrong, scales); },
                                       {"39 columns", "40 features"});
}

TYPED_TEST(Quantization, OfActivationsIsPerTokenAndNeverThrows) {
  auto x = random_tensor<TypeParam, 2>({7, 50}, 1);
  x(2, 3) = std::numeric_limits<TypeParam>::quiet_NaN();
  x(5, 49) = -std::numeric_limits<TypeParam>::infinity();
  auto values = poisoned_tensor<std::int8_t, 2>({7, 50});
  auto scales = poisoned_tensor<float, 1>({7});
  ef::quantize_activations_int8_into(Eigen::DefaultDevice{}, values, scales, x);
  for (Index t = 0; t < 7; ++t) {
    std::vector<std::int8_t> expected(50, 0);
    if (t == 2 || t == 5) {
      ASSERT_TRUE(std::isnan(scales(t)));
    } else {
      ASSERT_EQ(scales(t), ef::reference::int8_scale(x.data() + t * 50, 50));
      ef::reference::quantize(x.data() + t * 50, 50, scales(t), expected.data());
    }
    for (Index i = 0; i < 50; ++i) ASSERT_EQ(values(t, i), expected[static_cast<std::size_t>(i)]);
  }
}

template <typename X>
void check_int8_linear(Index tokens, Index in, Index out) {
  const auto x = random_tensor<X, 2>({tokens, in}, static_cast<unsigned>(tokens + in));
  const auto [qc, scales] = ef::quantize_weights_int8_per_channel(
      random_tensor<float, 2>({out, in}, static_cast<unsigned>(out)));
  const auto bias = random_tensor<float, 1>({out}, 5);
  for (const bool with_bias : {false, true}) {
    const auto expected =
        ef::reference::int8_linear(x, qc, scales, with_bias ? bias.data() : nullptr);
    const ef::Epilogue<> b = with_bias ? ef::Epilogue{}.bias(bias) : ef::Epilogue{};
    for_each_product_isa([&, &values = qc, &factors = scales](auto isa) {
      auto y = poisoned_tensor<float, 2>({tokens, out});
      ef::int8_linear_into(on(isa), y, x, values, factors, b);
      ASSERT_TRUE(same_bits(y, expected))
          << isa.name << " " << tokens << " x " << in << " x " << out;
      y.setZero();
      ef::linear_into(on(isa), y, x, ef::pack_weight(on(isa), values, factors), b);
      ASSERT_TRUE(same_bits(y, expected))
          << isa.name << " packed " << tokens << " x " << in << " x " << out;
    });
  }
}

TEST(Int8Linear, IsExactAndTheSameOnEveryIsa) {
  Index tokens = 0;
  for (Index in : {0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 255, 257})
    for (Index out : {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65}) {
      tokens = (tokens + 5) % 29;
      check_int8_linear<float>(tokens, in, out);
      check_int8_linear<ef::bfloat16>(tokens, in, out);
      check_int8_linear<ef::half>(tokens, in, out);
    }
  check_int8_linear<float>(70, 2100, 150);
}

TEST(Int8Linear, IsExactForTheLargestProducts) {
  // Weights of -128, which only a caller can bring, and activations of -127 and 127: pairs of
  // products come within 256 of int16's end.
  for (Index in : {1, 2, 3, 4, 8, 67, 1000}) {
    ef::Tensor<std::int8_t, 2> values(5, in);
    ef::Tensor<float, 2> x(7, in);
    ef::Tensor<float, 1> scales(5);
    scales.setConstant(1.0f);
    for (Index o = 0; o < 5; ++o)
      for (Index i = 0; i < in; ++i)
        values(o, i) =
            static_cast<std::int8_t>(o == 0 || (o == 1 && i % 2 == 0) ? -128 : 127 - 63 * o);
    for (Index t = 0; t < 7; ++t)
      for (Index i = 0; i < in; ++i) x(t, i) = t == 0 || (t + i) % 3 != 0 ? -1.0f : 1.0f;
    const auto expected =
        ef::reference::int8_linear(x, values, scales, static_cast<const float*>(nullptr));
    for_each_product_isa([&](auto isa) {
      ef::Tensor<float, 2> y(7, 5);
      ef::int8_linear_into(on(isa), y, x, values, scales);
      ASSERT_TRUE(same_bits(y, expected)) << isa.name << " " << in;
    });
  }
}

TEST(Int8Linear, PackedFromFloatEqualsQuantizedThenPacked) {
  const auto weight = random_tensor<float, 2>({45, 67}, 1);
  const auto x = random_tensor<float, 2>({6, 67}, 2);
  const auto [qc, scales] = ef::quantize_weights_int8_per_channel(weight);
  Threads threads(2);
  const ef::Tensor<float, 2> y = ef::int8_linear(threads.device, x, qc, scales);
  EXPECT_TRUE(same_bits(y, ef::linear(x, ef::pack_weight<std::int8_t>(weight))));
  EXPECT_TRUE(same_bits(y, ef::linear(x, ef::pack_weight(threads.device, qc, scales))));
  EXPECT_TRUE(same_bits(y, ef::int8_linear(x, qc, scales)));
  const auto bias = random_tensor<float, 1>({45}, 3);
  EXPECT_TRUE(same_bits(ef::int8_linear(threads.device, x, qc, scales, bias),
                        ef::int8_linear(x, qc, scales, bias)));
}

TEST(QuantizationMemory, NothingIsAllocatedTwice) {
  const Eigen::DefaultDevice device;
  const auto weights = random_tensor<float, 2>({40, 70}, 1);
  ef::Tensor<std::int8_t, 2> values(40, 70);
  ef::Tensor<float, 1> scales(40);
  ef::Tensor<float, 2> factors(40, 3), back(40, 70), y(40, 40);
  float scale = 0;
  const auto all = [&] {
    ef::quantize_weights_int8_into(device, values, scale, weights);
    ef::quantize_weights_int8_grouped_into(device, values, factors, weights, 32);
    ef::quantize_activations_int8_into(device, values, scales, weights);
    ef::quantize_weights_int8_per_channel_into(device, values, scales, weights);
    ef::dequantize_into(device, back, values, scales);
    ef::int8_linear_into(device, y, weights, values, scales);
  };
  all();
  EXPECT_EQ(count_allocations(all), 0);
}

}  // namespace
