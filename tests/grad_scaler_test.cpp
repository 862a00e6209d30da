// Laws: the scale moves on the schedule of torch.amp.GradScaler; a step with a gradient that is not finite changes no weight and no
// optimizer state; misuse is refused; a checkpoint goes on where it was.
#include <eigenformer/grad_scaler.h>

#include "allocations.h"
#include "compare.h"

using namespace eigenformer_test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Weights {
  ef::Tensor<float, 1> value, gradient;
  explicit Weights(Index size = 37)
      : value(random_tensor<float, 1>({size}, 1)), gradient(random_tensor<float, 1>({size}, 2)) {}
  std::vector<ef::Parameter> parameters() {
    return {ef::Parameter{ef::TensorView<float, 1>(value.data(), value.size()),
                          ef::TensorView<float, 1>(gradient.data(), gradient.size())}};
  }
};

TEST(GradScaler, GrowsAndBacksOffOnSchedule) {
  ef::GradScaler scaler;
  EXPECT_EQ(scaler.scale(), 65536.0);
  for (int step = 1; step < 2000; ++step) scaler.update(false);
  EXPECT_EQ(scaler.scale(), 65536.0);
  scaler.update(false);  // the 2000th good step
  EXPECT_EQ(scaler.scale(), 131072.0);
  EXPECT_EQ(scaler.state().good_steps, 0);
  for (int step = 0; step < 1999; ++step) scaler.update(false);
  scaler.update(true);  // the row of good steps starts again
  EXPECT_EQ(scaler.scale(), 65536.0);
  EXPECT_EQ(scaler.skipped_steps(), 1);
  for (int step = 1; step < 2000; ++step) scaler.update(false);
  EXPECT_EQ(scaler.scale(), 65536.0);
  scaler.update(false);
  EXPECT_EQ(scaler.scale(), 131072.0);
}

TEST(GradScaler, OptionsSetTheScheduleAndItsLimits) {
  ef::GradScaler scaler({.init_scale = 8,
                         .growth_factor = 4,
                         .backoff_factor = 0.25,
                         .growth_interval = 2,
                         .min_scale = 1,
                         .max_scale = 100});
  scaler.update(false);
  scaler.update(false);
  EXPECT_EQ(scaler.scale(), 32.0);
  scaler.update(false);
  scaler.update(false);
  EXPECT_EQ(scaler.scale(), 100.0);
  for (double expected : {25.0, 6.25, 1.5625, 1.0, 1.0}) {
    scaler.update(true);
    EXPECT_EQ(scaler.scale(), expected);
  }
  EXPECT_EQ(scaler.skipped_steps(), 5);
}

TEST(GradScaler, UnscaleDividesAndFindsWhatIsNotFinite) {
  for (Index size : {1, 5, 16, 37, 40000}) {
    Weights weights(size);
    const ef::Tensor<float, 1> scaled = weights.gradient;
    ef::GradScaler scaler({.init_scale = 1024});
    EXPECT_TRUE(scaler.unscale(weights.parameters()));
    EXPECT_FALSE(scaler.found_inf());
    for (Index i = 0; i < size; ++i) ASSERT_EQ(weights.gradient(i), scaled(i) / 1024.0f);
    scaler.update();
    for (float bad : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
      weights.gradient(size - 1) = bad;
      EXPECT_FALSE(scaler.unscale(weights.parameters()));
      EXPECT_TRUE(scaler.found_inf());
      scaler.update();
      EXPECT_FALSE(scaler.found_inf());
    }
    EXPECT_EQ(scaler.scale(), 128.0);
  }
}

TEST(GradScaler, ThreadsGiveTheSameBits) {
  Weights one(3 * ef::kPieceElements + 5), other(3 * ef::kPieceElements + 5);
  Threads threads(3);
  ef::GradScaler a({.init_scale = 3}), b({.init_scale = 3});
  EXPECT_TRUE(a.unscale(one.parameters()));
  EXPECT_TRUE(b.unscale(threads.device, other.parameters()));
  EXPECT_TRUE(same_bits(one.gradient, other.gradient));
}

TEST(GradScaler, ASkippedStepChangesNothingButGradients) {
  Weights weights;
  ef::AdamW optimizer(weights.parameters());
  ef::GradScaler scaler;
  EXPECT_TRUE(scaler.step(optimizer));
  scaler.update();
  const ef::Tensor<float, 1> value = weights.value;
  const std::vector<float> state(optimizer.state().begin(), optimizer.state().end());
  weights.gradient(3) = kInfinity;
  EXPECT_FALSE(scaler.step(optimizer));
  scaler.update();
  EXPECT_TRUE(same_bits(value, weights.value));
  EXPECT_TRUE(std::equal(state.begin(), state.end(), optimizer.state().begin()));
  EXPECT_EQ(optimizer.step_count(), 1);
  EXPECT_EQ(scaler.scale(), 32768.0);
  EXPECT_EQ(scaler.skipped_steps(), 1);
}

TEST(GradScaler, AStepEqualsOneWithoutScaling) {
  Weights plain, scaled;
  for (Index i = 0; i < scaled.gradient.size(); ++i)
    scaled.gradient(i) *= 65536.0f;  // a power of two: exact
  ef::Sgd a(plain.parameters()), b(scaled.parameters());
  ef::GradScaler scaler;
  a.step();
  scaler.unscale(b);
  EXPECT_TRUE(scaler.step(b));
  EXPECT_TRUE(same_bits(plain.value, scaled.value));
}

TEST(GradScaler, DisabledChecksButNeverScales) {
  Weights weights;
  const ef::Tensor<float, 1> gradient = weights.gradient, value = weights.value;
  ef::GradScaler scaler({.enabled = false});
  ef::Sgd optimizer(weights.parameters());
  EXPECT_EQ(scaler.scale(), 1.0);
  EXPECT_TRUE(scaler.unscale(optimizer));
  EXPECT_TRUE(same_bits(gradient, weights.gradient));
  scaler.update();
  weights.gradient(0) = kInfinity;
  EXPECT_FALSE(scaler.step(optimizer));
  scaler.update();
  EXPECT_TRUE(same_bits(value, weights.value));
  EXPECT_EQ(scaler.scale(), 1.0);
  EXPECT_EQ(scaler.skipped_steps(), 1);
}

TEST(GradScaler, TwoOptimizersShareOneScale) {
  Weights good, bad;
  bad.gradient(0) = kInfinity;
  ef::Sgd first(good.parameters()), second(bad.parameters());
  ef::GradScaler scaler;
  EXPECT_TRUE(scaler.step(first));  // each is skipped for its own gradients only
  EXPECT_FALSE(scaler.step(second));
  scaler.update();
  EXPECT_EQ(scaler.scale(), 32768.0);
}

TEST(GradScaler, RefusesMisuse) {
  Weights weights;
  ef::Sgd optimizer(weights.parameters());
  ef::GradScaler scaler;
  expect_throws<std::logic_error>([&] { scaler.update(); }, {"GradScaler::update", "no gradients"});
  scaler.unscale(optimizer);
  const ef::Tensor<float, 1> gradient = weights.gradient;
  expect_throws<std::logic_error>([&] { scaler.unscale(optimizer); },
                                  {"GradScaler::unscale", "already"});
  EXPECT_TRUE(same_bits(gradient, weights.gradient));
  scaler.step(optimizer);
  expect_throws<std::logic_error>([&] { scaler.step(optimizer); }, {"GradScaler::step", "already"});
  EXPECT_EQ(optimizer.step_count(), 1);
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  expect_throws<std::invalid_argument>([&] { ef::GradScaler({.init_scale = nan}); },
                                       {"init_scale", "nan"});
  expect_throws<std::invalid_argument>([&] { ef::GradScaler({.init_scale = 0}); }, {"init_scale"});
  expect_throws<std::invalid_argument>([&] { ef::GradScaler({.growth_factor = 1}); },
                                       {"growth_factor"});
  expect_throws<std::invalid_argument>([&] { ef::GradScaler({.backoff_factor = 1}); },
                                       {"backoff_factor"});
  expect_throws<std::invalid_argument>([&] { ef::GradScaler({.growth_interval = 0}); },
                                       {"growth_interval", "0"});
  expect_throws<std::invalid_argument>([&] { ef::GradScaler({.min_scale = 0}); }, {"min_scale"});
  expect_throws<std::invalid_argument>([&] { ef::GradScaler({.max_scale = 0x1p121}); },
                                       {"max_scale"});
  expect_throws<std::invalid_argument>([&] { scaler.load_state({.scale = -1}); },
                                       {"load_state", "scale"});
  expect_throws<std::invalid_argument>([&] { scaler.load_state({.good_steps = -1}); },
                                       {"good_steps", "-1"});
}

TEST(GradScaler, GoesOnFromACheckpoint) {
  ef::GradScaler scaler({.growth_interval = 3}), restored({.growth_interval = 3});
  for (bool found_inf : {false, true, false, false}) scaler.update(found_inf);
  restored.load_state(scaler.state());
  EXPECT_EQ(restored.scale(), 32768.0);
  EXPECT_EQ(restored.skipped_steps(), 1);
  restored.update(false);
  EXPECT_EQ(restored.scale(), 65536.0);
}

TEST(GradScaler, AllocatesNothingAfterTheFirstStep) {
  Weights weights;
  ef::AdamW optimizer(weights.parameters());
  ef::GradScaler scaler;
  scaler.step(optimizer);
  scaler.update();
  EXPECT_EQ(count_allocations([&] {
              scaler.step(optimizer);
              scaler.update();
            }),
            0);
}

}  // namespace
