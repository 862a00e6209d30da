// Cross-entropy on every device, against the double reference: widths around warps and blocks,
// every option, rows that are hard, memory that is the logits'.
#include <eigenformer/loss.h>
#include <eigenformer/reference/loss.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

ef::Tensor<std::int32_t, 1> some_targets(Index rows, Index classes, std::int32_t ignored) {
  ef::Tensor<std::int32_t, 1> targets(rows);
  for (Index r = 0; r < rows; ++r)
    targets(r) =
        r % 5 == 3 ? ignored : static_cast<std::int32_t>((r * 7919 + classes / 2) % classes);
  return targets;
}

// T: of the logits, G: of the gradient.
template <typename T, typename G>
void check(Index rows, Index classes, const ef::CrossEntropyOptions& options = {}) {
  const auto logits = random_tensor<T, 2>({rows, classes}, static_cast<unsigned>(classes), 2.0);
  const auto targets = some_targets(rows, classes, options.ignore_index);
  const auto expected = ef::reference::cross_entropy(to_double(logits), targets, 0.25, options);
  const double allowed =
      (std::is_same_v<T, double> ? 1e-12 : 1e-5) * (1 + std::abs(expected.loss.sum));
  for_each_device([&](const auto& bench) {
    auto x = on_device(bench, logits);
    const ef::LossResult loss = ef::cross_entropy(bench.device, x.cview(), targets, options);
    EXPECT_EQ(loss.count, expected.loss.count);
    EXPECT_NEAR(loss.sum, expected.loss.sum, allowed) << rows << " x " << classes;
    auto gradient = on_device(bench, poisoned_tensor<G, 2>({rows, classes}));
    const ef::LossResult with_gradient = ef::cross_entropy_with_gradient_into(
        bench.device, gradient.view(), x.cview(), targets, 0.25, options);
    EXPECT_EQ(with_gradient.sum, loss.sum);
    EXPECT_EQ(with_gradient.count, loss.count);
    EXPECT_LE(relative_error(gradient.host(), expected.gradient), tolerance<G>())
        << rows << " x " << classes;
    if constexpr (std::is_same_v<T, G>) {
      const ef::LossResult in_place = ef::cross_entropy_with_gradient_into(
          bench.device, x.view(), x.cview(), targets, 0.25, options);
      EXPECT_EQ(in_place.sum, loss.sum);
      EXPECT_TRUE(same_bits(x.host(), gradient.host())) << "in the place of the logits";
    }
  });
}

TEST(LossOnDevice, EqualsTheReference) {
  for (Index classes : {1, 2, 31, 32, 33, 255, 256, 257, 1000})
    for (Index rows : {0, 1, 5}) {
      check<float, float>(rows, classes);
      check<double, double>(rows, classes);
      check<ef::bfloat16, ef::bfloat16>(rows, classes);
      check<ef::half, ef::half>(rows, classes);
      check<ef::bfloat16, float>(rows, classes);
    }
}

TEST(LossOnDevice, OptionsEqualTheirDefinition) {
  for (Index classes : {2, 33, 515}) {
    check<float, float>(5, classes, {.label_smoothing = 0.1});
    check<float, float>(5, classes, {.z_loss = 1e-2});
    check<double, double>(5, classes, {.label_smoothing = 0.3, .z_loss = 1e-3});
    check<ef::half, float>(5, classes, {.label_smoothing = 1});
    check<float, float>(5, classes, {.ignore_index = 0});
  }
}

// Large logits, targets that are nearly sure, classes without mass: what a float can say of them.
TEST(LossOnDevice, HardRows) {
  const Index classes = 300;
  auto logits = random_tensor<float, 2>({6, classes}, 4);
  ef::Tensor<std::int32_t, 1> targets(6);
  for (Index r = 0; r < 6; ++r) targets(r) = static_cast<std::int32_t>(50 * r + 1);
  for (Index k = 0; k < classes; ++k) {
    logits(1, k) *= 1e30f;
    logits(2, k) += 1e6f;
    if (k % 3 == 1) logits(4, k) = -std::numeric_limits<float>::infinity();
    if (k != targets(5)) logits(5, k) = -std::numeric_limits<float>::infinity();
  }
  logits(0, targets(0)) = 18;
  logits(3, targets(3)) = 80;
  const auto expected = ef::reference::cross_entropy(to_double(logits), targets);
  for_each_device([&](const auto& bench) {
    auto x = on_device(bench, logits);
    auto gradient = on_device(bench, poisoned_tensor<float, 2>({6, classes}));
    const auto loss =
        ef::cross_entropy_with_gradient_into(bench.device, gradient.view(), x.cview(), targets, 1);
    EXPECT_NEAR(loss.sum / expected.loss.sum, 1, 1e-6);
    const auto found = gradient.host();
    for (Index r = 0; r < 6; ++r)
      for (Index k = 0; k < classes; ++k)
        ASSERT_NEAR(found(r, k), expected.gradient(r, k),
                    1e-5 * std::abs(expected.gradient(r, k)) + 1e-12)
            << r << ", " << k;
  });
}

// NaN, infinity, and no class at all make their row NaN, and no other; an ignored row may hold
// anything.
TEST(LossOnDevice, SaysWhatIsNoNumber) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = static_cast<float>(kInfinity);
  const Index classes = 40;
  for (const auto& [row, numbers] :
       {std::pair{0, nan}, std::pair{1, inf}, std::pair{2, -inf}, std::pair{3, nan}}) {
    auto logits = random_tensor<float, 2>({4, classes}, 5);
    ef::Tensor<std::int32_t, 1> targets(4);
    targets.setValues({4, 5, 39, -100});
    for (Index k = 0; k < classes; ++k)
      if (numbers != inf || k % 7 == 0) logits(row, k) = numbers;
    for_each_device([&, at = row](const auto& bench) {
      auto x = on_device(bench, logits);
      auto gradient = on_device(bench, poisoned_tensor<float, 2>({4, classes}));
      const auto loss = ef::cross_entropy_with_gradient_into(bench.device, gradient.view(),
                                                             x.cview(), targets, 1);
      EXPECT_EQ(std::isnan(loss.sum), at != 3);
      const auto found = gradient.host();
      for (Index r = 0; r < 4; ++r)
        for (Index k = 0; k < classes; ++k)
          ASSERT_EQ(std::isnan(found(r, k)), r == at && at != 3) << r << ", " << k;
      for (Index k = 0; k < classes; ++k) ASSERT_EQ(found(3, k), 0.0f);
    });
  }
}

// A class of no mass is not the target's: with smoothing its loss is infinite.
TEST(LossOnDevice, MayBeInfinite) {
  auto logits = random_tensor<float, 2>({1, 64}, 6);
  logits(0, 9) = -static_cast<float>(kInfinity);
  ef::Tensor<std::int32_t, 1> target(1);
  for_each_device([&](const auto& bench) {
    auto x = on_device(bench, logits);
    target(0) = 9;
    EXPECT_EQ(ef::cross_entropy(bench.device, x.cview(), target).sum, kInfinity);
    target(0) = 3;
    EXPECT_EQ(ef::cross_entropy(bench.device, x.cview(), target, {.label_smoothing = 0.1}).sum,
              kInfinity);
  });
}

}  // namespace
