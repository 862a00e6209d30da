// Laws: equal to the plain definition for every scalar, option, width, ISA and thread count; the
// gradient is the derivative; ignored rows are never looked at; bad targets change nothing.
#include <eigenformer/loss.h>
#include <eigenformer/reference/loss.h>

#include "allocations.h"
#include "compare.h"

using namespace eigenformer_test;

namespace {

const Eigen::DefaultDevice kDevice;

ef::Tensor<std::int32_t, 1> random_targets(Index rows, Index classes, unsigned seed,
                                           std::int32_t ignored = -100) {
  std::mt19937 generator(seed);
  ef::Tensor<std::int32_t, 1> targets(rows);
  for (Index r = 0; r < rows; ++r)
    targets(r) = r % 5 == 3
                     ? ignored
                     : static_cast<std::int32_t>(generator() % static_cast<std::uint32_t>(classes));
  return targets;
}

template <typename T>
class Loss : public ::testing::Test {};
TYPED_TEST_SUITE(Loss, EveryScalar);

template <typename T, typename G>
void compare_all_forms(Index rows, Index classes, const ef::CrossEntropyOptions& options) {
  const auto logits = random_tensor<T, 2>({rows, classes}, static_cast<unsigned>(classes), 2.0);
  const auto targets = random_targets(rows, classes, 7, options.ignore_index);
  const auto expected = ef::reference::cross_entropy(to_double(logits), targets, 0.25, options);
  const double allowed = std::is_same_v<T, double>
                             ? 1e-12
                             : 1e-5;  // the sum is float or better whatever the logits' type

  const auto loss = ef::cross_entropy(logits, targets, options);
  EXPECT_EQ(loss.count, expected.loss.count);
  ASSERT_NEAR(loss.sum, expected.loss.sum, allowed * (1 + std::abs(expected.loss.sum)))
      << rows << " x " << classes;

  auto gradient = poisoned_tensor<G, 2>({rows, classes});
  const auto with_gradient =
      ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, targets, 0.25, options);
  EXPECT_EQ(with_gradient.sum, loss.sum);
  EXPECT_EQ(with_gradient.count, loss.count);
  ASSERT_LE(relative_error(gradient, expected.gradient), tolerance<G>())
      << rows << " x " << classes;

  for (int count : {1, 2, 3}) {
    Threads threads(count);
    auto other = poisoned_tensor<G, 2>({rows, classes});
    EXPECT_EQ(
        ef::cross_entropy_with_gradient_into(threads.device, other, logits, targets, 0.25, options)
            .sum,
        loss.sum);
    EXPECT_EQ(ef::cross_entropy(threads.device, logits, targets, options).sum, loss.sum);
    ASSERT_TRUE(same_bits(gradient, other)) << count << " threads";
  }
  for_each_isa([&](auto isa) {
    auto other = poisoned_tensor<G, 2>({rows, classes});
    const auto by_tag =
        ef::cross_entropy_with_gradient_into(on(isa), other, logits, targets, 0.25, options);
    ASSERT_LE(relative_error(other, expected.gradient), tolerance<G>())
        << isa.name << " " << classes;
    ASSERT_NEAR(by_tag.sum, expected.loss.sum, allowed * (1 + std::abs(expected.loss.sum)))
        << isa.name;
  });
}

TYPED_TEST(Loss, EqualsItsDefinitionAtEveryWidth) {
  for (Index classes = 1; classes <= 35; ++classes)
    compare_all_forms<TypeParam, TypeParam>(6, classes, {});
  for (Index classes : {63, 64, 65, 127, 128, 129, 1000, 4099})
    compare_all_forms<TypeParam, TypeParam>(5, classes, {});
  for (Index classes : {1, 17, 300})
    compare_all_forms<TypeParam, ef::compute_type<TypeParam>>(7, classes, {});
}

TYPED_TEST(Loss, OptionsEqualTheirDefinition) {
  for (Index classes : {2, 19, 260}) {
    compare_all_forms<TypeParam, TypeParam>(6, classes, {.label_smoothing = 0.1});
    compare_all_forms<TypeParam, TypeParam>(6, classes, {.z_loss = 1e-2});
    compare_all_forms<TypeParam, TypeParam>(6, classes, {.label_smoothing = 0.3, .z_loss = 1e-3});
    compare_all_forms<TypeParam, TypeParam>(6, classes, {.ignore_index = 0});
  }
}

TYPED_TEST(Loss, InPlaceEqualsOutOfPlaceAndMisalignedEqualsAligned) {
  for (Index classes : {5, 16, 37, 200}) {
    const auto logits = random_tensor<TypeParam, 2>({4, classes}, 3);
    const auto targets = random_targets(4, classes, 9);
    auto gradient = poisoned_tensor<TypeParam, 2>({4, classes});
    const auto loss = ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, targets, 3.0);
    std::vector<TypeParam> memory(static_cast<std::size_t>(logits.size()) + 1,
                                  std::numeric_limits<TypeParam>::quiet_NaN());
    std::copy(logits.data(), logits.data() + logits.size(), memory.data() + 1);
    ef::TensorView<TypeParam, 2> in_place(memory.data() + 1, 4, classes);
    EXPECT_EQ(ef::cross_entropy_with_gradient_into(kDevice, in_place, in_place, targets, 3.0).sum,
              loss.sum);
    ASSERT_TRUE(same_bits(gradient, in_place));
    EXPECT_TRUE(std::isnan(static_cast<float>(memory[0])));
  }
}

TYPED_TEST(Loss, ARowDoesNotDependOnItsNeighbours) {
  const auto logits = random_tensor<TypeParam, 2>({9, 77}, 5);
  const auto targets = random_targets(9, 77, 4, 5);
  auto together = poisoned_tensor<TypeParam, 2>({9, 77});
  ef::cross_entropy_with_gradient_into(kDevice, together, logits, targets, 1.0);
  for (Index r = 0; r < 9; ++r) {
    const ef::TensorView<const TypeParam, 2> row(logits.data() + r * 77, 1, 77);
    const ef::TensorView<const std::int32_t, 1> target(targets.data() + r, 1);
    auto alone = poisoned_tensor<TypeParam, 2>({1, 77});
    ef::cross_entropy_with_gradient_into(kDevice, alone, row, target, 1.0);
    ASSERT_TRUE(
        same_bits(alone, ef::TensorView<const TypeParam, 2>(together.data() + r * 77, 1, 77)));
  }
}

TEST(LossGradient, IsTheDerivativeOfTheLoss) {
  for (const ef::CrossEntropyOptions& options :
       {ef::CrossEntropyOptions{},
        ef::CrossEntropyOptions{.label_smoothing = 0.2, .z_loss = 0.05}}) {
    auto logits = random_tensor<double, 2>({4, 7}, 11);
    const auto targets = random_targets(4, 7, 12);
    ef::Tensor<double, 2> gradient(4, 7);
    ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, targets, 1.0, options);
    constexpr double step = 1e-5;
    for (Index i = 0; i < logits.size(); ++i) {
      const double x = logits.data()[i];
      logits.data()[i] = x + step;
      const double above = ef::cross_entropy(logits, targets, options).sum;
      logits.data()[i] = x - step;
      const double below = ef::cross_entropy(logits, targets, options).sum;
      logits.data()[i] = x;
      ASSERT_NEAR(gradient.data()[i], (above - below) / (2 * step), 1e-8) << i;
    }
  }
}

TYPED_TEST(Loss, IgnoredRowsAreNeverLookedAt) {
  auto logits = random_tensor<TypeParam, 2>({3, 20}, 1);
  for (Index k = 0; k < 20; ++k) logits(1, k) = std::numeric_limits<TypeParam>::quiet_NaN();
  ef::Tensor<std::int32_t, 1> targets(3);
  targets.setValues({4, -100, 19});
  auto gradient = poisoned_tensor<TypeParam, 2>({3, 20});
  const auto loss = ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, targets, 1.0);
  EXPECT_EQ(loss.count, 2);
  EXPECT_TRUE(std::isfinite(loss.sum));
  for (Index k = 0; k < 20; ++k) EXPECT_EQ(static_cast<float>(gradient(1, k)), 0.0f);
  targets.setConstant(-100);
  const auto none = ef::cross_entropy(logits, targets);
  EXPECT_EQ(none.count, 0);
  EXPECT_EQ(none.sum, 0.0);
  EXPECT_EQ(none.mean(), 0.0);
}

TYPED_TEST(Loss, ExtremeLogits) {
  using T = TypeParam;
  const T infinity = std::numeric_limits<T>::infinity();
  for (Index classes : {3, 40}) {
    ef::Tensor<T, 2> logits(5, classes);
    logits.setConstant(static_cast<T>(-infinity));
    for (Index k = 0; k < classes; ++k)
      logits(4, k) = static_cast<T>(60000.0f);  // exp(60000) overflows every type
    logits(0, 1) = static_cast<T>(2.0f);        // one possible class, and it is the target
    logits(1, 1) = static_cast<T>(2.0f);        // the target is impossible
    for (Index k = 0; k < classes; ++k) logits(2, k) = static_cast<T>(1.0f);
    logits(2, classes - 1) = std::numeric_limits<T>::quiet_NaN();
    ef::Tensor<std::int32_t, 1> targets(5);  // row 3: all -infinity
    targets.setValues({1, 0, 0, 0, 0});
    auto gradient = poisoned_tensor<T, 2>({5, classes});
    ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, targets, 1.0);
    const auto row_loss = [&](Index r) {
      return ef::cross_entropy(ef::TensorView<const T, 2>(logits.data() + r * classes, 1, classes),
                               ef::TensorView<const std::int32_t, 1>(targets.data() + r, 1))
          .sum;
    };
    EXPECT_EQ(row_loss(0), 0.0);
    EXPECT_EQ(row_loss(1), std::numeric_limits<double>::infinity());
    EXPECT_TRUE(std::isnan(row_loss(2)));
    EXPECT_TRUE(std::isnan(row_loss(3)));
    EXPECT_NEAR(row_loss(4), std::log(static_cast<double>(classes)), 1e-2);
    for (Index k = 0; k < classes; ++k) {
      EXPECT_EQ(static_cast<float>(gradient(0, k)), 0.0f);
      EXPECT_EQ(static_cast<float>(gradient(1, k)), k == 1 ? 1.0f : k == 0 ? -1.0f : 0.0f);
      EXPECT_TRUE(std::isnan(static_cast<float>(gradient(2, k))));
      EXPECT_TRUE(std::isnan(static_cast<float>(gradient(3, k))));
    }
  }
}

TEST(LossGradient, OverflowOfAScaledHalfGradientIsInfinite) {
  ef::Tensor<ef::half, 2> logits(1, 2);
  logits.setValues({{ef::half(10.0f), ef::half(-10.0f)}});
  ef::Tensor<std::int32_t, 1> targets(1);
  targets.setValues({1});
  ef::cross_entropy_with_gradient_into(kDevice, logits, logits, targets, 65536.0);
  EXPECT_EQ(static_cast<float>(logits(0, 1)), -std::numeric_limits<float>::infinity());
}

// The loss is of distances from the maximum: what all logits share leaves it alone, and none
// overflows.
TYPED_TEST(Loss, OfLargeLogitsLosesNothing) {
  using T = TypeParam;
  using G = ef::compute_type<T>;
  for (const double shift : {0.0, 1024.0, -4096.0, 1e6, -1e6, 1e30, 3e38, -3e38})
    for (const double smoothing : {0.0, 0.1, 1.0}) {
      const Index rows = 3, classes = 77;
      auto logits = random_tensor<T, 2>({rows, classes}, 21);
      for (Index i = 0; i < logits.size(); ++i)
        logits.data()[i] = static_cast<T>(shift + static_cast<double>(logits.data()[i]));
      if (!std::isfinite(static_cast<double>(logits(0, 0)))) continue;  // beyond half
      const ef::CrossEntropyOptions options{.label_smoothing = smoothing};
      ef::Tensor<double, 2> centered = to_double(logits);
      for (Index r = 0; r < rows; ++r) {
        const double first = centered(r, 0);
        for (Index k = 0; k < classes; ++k) centered(r, k) -= first;
      }
      const auto targets = random_targets(rows, classes, 22);
      const auto expected = ef::reference::cross_entropy(centered, targets, 1, options);
      ef::Tensor<G, 2> gradient(rows, classes);
      const auto loss =
          ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, targets, 1.0, options);
      EXPECT_NEAR(loss.sum, expected.loss.sum, 1e-5 * (1 + expected.loss.sum))
          << shift << " " << smoothing;
      for (Index i = 0; i < gradient.size(); ++i)
        ASSERT_NEAR(static_cast<double>(gradient.data()[i]), expected.gradient.data()[i], 1e-6)
            << shift << " " << smoothing;
    }
}

TEST(LossGradient, OfLogitsOfBothEndsOfTheRange) {
  const float most = (std::numeric_limits<float>::max)();
  ef::Tensor<float, 2> logits(1, 100), gradient(1, 100);
  logits.setConstant(-most);
  logits(0, 3) = most;
  ef::Tensor<std::int32_t, 1> target(1);
  target(0) = 3;
  auto loss = ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, target, 1.0,
                                                   {.label_smoothing = 0.1});
  EXPECT_NEAR(loss.sum / (0.1 * 0.99 * 2 * static_cast<double>(most)), 1, 1e-6);
  EXPECT_NEAR(gradient(0, 3), 0.1 - 0.001, 1e-6);
  EXPECT_NEAR(gradient(0, 0), -0.001, 1e-9);
  target(0) = 5;
  loss = ef::cross_entropy(logits, target);
  EXPECT_NEAR(loss.sum / (2 * static_cast<double>(most)), 1, 1e-6);
  loss = ef::cross_entropy(logits, target, {.z_loss = 1e-4});
  EXPECT_NEAR(loss.sum / (1e-4 * static_cast<double>(most) * static_cast<double>(most)), 1, 1e-6);

  ef::Tensor<double, 2> wide(1, 100);
  wide.setConstant(1e300);
  EXPECT_NEAR(ef::cross_entropy(wide, target).sum, std::log(100.0), 1e-12);
  EXPECT_NEAR(ef::cross_entropy(wide, target, {.label_smoothing = 0.5}).sum, std::log(100.0),
              1e-12);
}

// Where p rounds to 1, 1 - p and -log p are what the other classes have.
template <typename T, typename G>
void expect_sure_rows_exact(std::initializer_list<double> row, double gradient_scale,
                            double allowed) {
  ef::Tensor<T, 2> logits(1, static_cast<Index>(row.size()));
  std::transform(row.begin(), row.end(), logits.data(), [](double x) { return static_cast<T>(x); });
  double others = 0;
  for (Index c = 1; c < logits.size(); ++c)
    others += std::exp(static_cast<double>(logits(0, c)) - static_cast<double>(logits(0, 0)));
  ef::Tensor<std::int32_t, 1> target(1);
  target(0) = 0;
  ef::Tensor<G, 2> gradient(1, logits.size());
  const auto loss =
      ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, target, gradient_scale);
  const double right = -gradient_scale * others / (1 + others);
  EXPECT_NEAR(loss.sum, std::log1p(others), 1e-6 * std::log1p(others));
  EXPECT_NEAR(ef::cross_entropy(logits, target).sum, std::log1p(others), 1e-6 * std::log1p(others));
  EXPECT_NEAR(static_cast<double>(gradient(0, 0)), right, allowed * std::abs(right));
}

TEST(LossGradient, OfSureRowsKeepsItsDigits) {
  expect_sure_rows_exact<float, float>({1e6, 1e6 - 17}, 65536, 1e-6);
  expect_sure_rows_exact<float, float>({20, 0}, 1, 1e-6);
  expect_sure_rows_exact<float, float>({10, 0, 0, -3, 1, 2, -1, 0, 0, 1, 0}, 1, 1e-6);
  expect_sure_rows_exact<ef::half, float>({15, 0}, 65536, 1e-6);
  expect_sure_rows_exact<ef::half, ef::half>({15, 0, 1}, 65536, 1e-3);
  expect_sure_rows_exact<ef::bfloat16, ef::bfloat16>({12, 0}, 1, 1e-2);
  expect_sure_rows_exact<double, double>({60, 0, 2}, 1, 1e-13);
}

TEST(LossGradient, OfAMillionEqualLogits) {
  ef::Tensor<float, 2> logits(1, 1000000), gradient(1, 1000000);
  logits.setConstant(0.3f);
  logits(0, 7) = 0.5f;  // so that terms are not whole
  const std::vector<int> targets{3};
  const double sum = 1.0 + 999999 * std::exp(static_cast<double>(0.3f) - static_cast<double>(0.5f));
  const double loss =
      ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, targets, 1.0).sum;
  EXPECT_NEAR(loss, 0.5 - static_cast<double>(0.3f) + std::log(sum), 1e-6 * 14);
  EXPECT_NEAR(gradient(0, 7) * sum, 1.0, 1e-5);
  EXPECT_NEAR(gradient(0, 999999) * sum, std::exp(-0.2), 1e-5);
}

TEST(LossGradient, ClassesWithoutMassStayZeroWhereTheFactorOverflows) {
  ef::Tensor<float, 2> logits(1, 2), gradient(1, 2);
  logits.setValues({{3e38f, 0.0f}});
  ef::Tensor<std::int32_t, 1> target(1);
  target(0) = 0;
  ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, target, 1.0, {.z_loss = 1});
  EXPECT_EQ(gradient(0, 0), std::numeric_limits<float>::infinity());
  EXPECT_EQ(gradient(0, 1), 0.0f);
  logits.setValues({{0.0f, 300.0f}});
  ef::cross_entropy_with_gradient_into(kDevice, logits, logits, target, 1e39);  // in place
  EXPECT_EQ(logits(0, 0), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(logits(0, 1), std::numeric_limits<float>::infinity());
}

TEST(LossTargets, ComeInAnyContainer) {
  const auto logits = random_tensor<float, 2>({3, 5}, 23);
  ef::Tensor<std::int32_t, 1> tensor(3);
  tensor.setValues({4, -100, 0});
  ef::Tensor<float, 2> gradient(3, 5), other(3, 5);
  const auto loss = ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, tensor, 1.0);
  EXPECT_EQ(loss.count, 2);
  const auto check = [&](const auto& targets) {
    EXPECT_EQ(ef::cross_entropy(logits, targets).sum, loss.sum);
    EXPECT_EQ(ef::cross_entropy(kDevice, logits, targets).count, 2);
    ef::cross_entropy_with_gradient_into(kDevice, other, logits, targets, 1.0);
    EXPECT_TRUE(same_bits(gradient, other));
  };
  check(std::vector<std::int32_t>{4, -100, 0});
  check(std::vector<std::int64_t>{4, -100, 0});
  check(std::array<Index, 3>{4, -100, 0});
  EXPECT_EQ(ef::cross_entropy(logits, {4, -100, 0}).sum, loss.sum);
  expect_throws<std::invalid_argument>(
      [&] {
        ef::cross_entropy(logits, std::vector<std::int64_t>{0, 1, std::int64_t{1} << 32});
      },
      {"target 2 is 4294967296"});
}

TEST(LossContract, EmptyTensors) {
  const ef::Tensor<float, 2> logits(0, 5);
  const ef::Tensor<std::int32_t, 1> targets(0);
  EXPECT_EQ(ef::cross_entropy(logits, targets).count, 0);
  const ef::Tensor<float, 2> no_classes(2, 0);
  ef::Tensor<std::int32_t, 1> ignored(2);
  ignored.setConstant(-100);
  EXPECT_EQ(ef::cross_entropy(no_classes, ignored).count, 0);
}

TEST(LossContract, RefusesBeforeWriting) {
  const auto logits = random_tensor<float, 2>({4, 6}, 1);
  ef::Tensor<float, 2> gradient(4, 6);
  gradient.setConstant(7.0f);
  ef::Tensor<std::int32_t, 1> targets(4);
  targets.setValues({0, 5, 6, 1});
  expect_throws<std::invalid_argument>(
      [&] { ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, targets, 1.0); },
      {"cross_entropy", "target 2 is 6", "[0, 6)"});
  targets.setValues({0, -1, 5, 1});
  expect_throws<std::invalid_argument>(
      [&] { ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, targets, 1.0); },
      {"target 1 is -1"});
  expect_throws<std::invalid_argument>(
      [&] { ef::cross_entropy(logits, targets, {.ignore_index = 3}); },
      {"target 1 is -1", "ignore_index 3"});
  targets.setValues({0, 0, 0, 0});
  ef::Tensor<float, 2> narrow(4, 5);
  expect_throws<std::invalid_argument>(
      [&] { ef::cross_entropy_with_gradient_into(kDevice, narrow, logits, targets, 1.0); },
      {"grad_logits has shape (4, 5)", "(4, 6)"});
  expect_throws<std::invalid_argument>(
      [&] { ef::cross_entropy(logits, ef::Tensor<std::int32_t, 1>(3)); },
      {"targets has 3", "4 rows"});
  expect_throws<std::invalid_argument>(
      [&] { ef::cross_entropy(logits, targets, {.label_smoothing = 1.5}); },
      {"label_smoothing", "1.5"});
  expect_throws<std::invalid_argument>([&] { ef::cross_entropy(logits, targets, {.z_loss = -1}); },
                                       {"z_loss"});
  expect_throws<std::invalid_argument>(
      [&] {
        ef::cross_entropy_with_gradient_into(kDevice, gradient, logits, targets,
                                             std::numeric_limits<double>::quiet_NaN());
      },
      {"gradient_scale"});
  for (Index i = 0; i < gradient.size(); ++i) EXPECT_EQ(gradient.data()[i], 7.0f);
}

TEST(LossContract, AllocatesNothingAfterTheFirstCall) {
  auto logits = random_tensor<float, 2>({64, 50}, 1);
  const auto targets = random_targets(64, 50, 2);
  ef::cross_entropy_with_gradient_into(kDevice, logits, logits, targets, 1.0);
  EXPECT_EQ(count_allocations([&] {
              ef::cross_entropy_with_gradient_into(kDevice, logits, logits, targets, 1.0);
              ef::cross_entropy(kDevice, logits, targets);
            }),
            0);
}

}  // namespace
