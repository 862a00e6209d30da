// Laws: the scale moves on the schedule of torch.amp.GradScaler; a step with a gradient that is not
// finite changes no weight and no optimizer state; no order of calls divides or steps a gradient
// twice, or steps one that was not divided: it is refused; an exception leaves all as it was; a
// checkpoint goes on where it was.
#include <eigenformer/grad_scaler.h>

#include <map>
#include <optional>
#include <random>
#include <thread>

#include "compare.h"
#include "failing_allocations.h"
#include "scaler_support.h"

using namespace eigenformer_test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

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
  Weights one(3 * ef::problem::kPieceElements + 5), other(3 * ef::problem::kPieceElements + 5);
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
  for (bool bad_first : {false, true}) {
    Weights good, bad;
    bad.gradient(0) = kInfinity;
    ef::Sgd steps(good.parameters()), skips(bad.parameters());
    ef::GradScaler scaler;
    if (bad_first) {
      EXPECT_FALSE(scaler.step(skips));
    }
    EXPECT_TRUE(scaler.step(steps));  // each is skipped for its own gradients only
    if (!bad_first) {
      EXPECT_FALSE(scaler.step(skips));
    }
    EXPECT_TRUE(scaler.found_inf());
    scaler.update();
    EXPECT_EQ(scaler.scale(), 32768.0);
  }
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

TEST(GradScaler, GroupsAreUnscaledByThemselvesAndSteppedTogether) {
  for (Index group : {0, 1, 2}) {
    std::vector<Weights> weights;
    std::vector<ef::Parameter> all;
    for (int i = 0; i < 3; ++i) weights.emplace_back(20);
    for (auto& w : weights) {
      w.value.setZero();
      w.gradient.setConstant(65536.0f);
      all.push_back(w.parameters()[0]);
    }
    ef::Sgd optimizer(all, {.learning_rate = 1});
    ef::GradScaler scaler;
    const std::span<const ef::Parameter> list(optimizer.parameters());
    EXPECT_TRUE(scaler.unscale(list.subspan(static_cast<std::size_t>(group), 1)));
    expect_throws<std::logic_error>([&] { scaler.unscale(optimizer); }, {"unscaled already"});
    for (Index i = 0; i < 3; ++i)  // refused as a whole
      EXPECT_EQ(weights[static_cast<std::size_t>(i)].gradient(0), i == group ? 1.0f : 65536.0f);
    EXPECT_TRUE(scaler.step(optimizer));
    for (auto& w : weights)
      for (Index i = 0; i < 20; ++i) EXPECT_EQ(w.value(i), -1.0f);
    scaler.update();
    weights[static_cast<std::size_t>(group)].gradient(7) = kInfinity;
    scaler.unscale(list.first(1));
    EXPECT_FALSE(scaler.step(optimizer));
  }
}

TEST(GradScaler, PartsOfOneGradient) {
  Weights weights(40);
  const auto part = [&](Index begin, Index size) {
    return std::vector<ef::Parameter>{
        {ef::TensorView<float, 1>(weights.value.data() + begin, size),
         ef::TensorView<float, 1>(weights.gradient.data() + begin, size)}};
  };
  CountingOptimizer whole{part(0, 40)}, left{part(0, 20)}, right{part(20, 20)};
  ef::GradScaler scaler;
  scaler.unscale(part(0, 20));
  const ef::Tensor<float, 1> gradient = weights.gradient;
  for (Index begin : {0, 10, 19})  // each overlaps what is unscaled
    expect_throws<std::logic_error>([&] { scaler.unscale(part(begin, 20)); }, {"already"});
  expect_throws<std::logic_error>([&] { scaler.step(whole); }, {"GradScaler::step", "part"});
  EXPECT_TRUE(same_bits(gradient, weights.gradient));
  scaler.unscale(part(20, 20));
  EXPECT_TRUE(scaler.step(whole));  // both halves are
  scaler.update();
  weights.gradient.setConstant(1.0f);
  scaler.unscale(part(0, 40));
  EXPECT_TRUE(scaler.step(left));
  EXPECT_TRUE(scaler.step(right));
  expect_throws<std::logic_error>([&] { scaler.step(whole); }, {"stepped already"});
  scaler.update();
  auto twice = part(0, 40);
  twice.push_back(part(39, 1)[0]);
  weights.gradient.setConstant(1.0f);
  expect_throws<std::invalid_argument>([&] { scaler.unscale(twice); }, {"share a gradient"});
  EXPECT_EQ(weights.gradient(39), 1.0f);
  EXPECT_FALSE(scaler.pending());
}

TEST(GradScaler, TheMultiplierIsOneForAStep) {
  Weights a(8), b(8);
  a.gradient.setConstant(65536.0f);
  b.gradient.setConstant(65536.0f);
  ef::Sgd optimizer({a.parameters()[0], b.parameters()[0]});
  ef::GradScaler scaler;
  EXPECT_TRUE(scaler.unscale(a.parameters(), 8));
  EXPECT_EQ(a.gradient(0), 8.0f);
  expect_throws<std::logic_error>([&] { scaler.step(optimizer); }, {"different multipliers"});
  EXPECT_EQ(b.gradient(0), 65536.0f);
  EXPECT_TRUE(scaler.unscale(b.parameters(), 8));
  EXPECT_TRUE(scaler.step(optimizer));
  scaler.update();
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  for (double bad : {nan, 1e300, -1e300, 0.0, 1e-60})
    expect_throws<std::invalid_argument>([&] { scaler.unscale(a.parameters(), bad); },
                                         {"GradScaler::unscale", "multiplier"});
  EXPECT_FALSE(scaler.pending());
}

TEST(GradScaler, StepsByTheVerdictOfAllRanks) {
  for (bool found_inf : {false, true}) {
    Weights weights;
    CountingOptimizer optimizer{weights.parameters()};
    ef::GradScaler scaler;
    EXPECT_TRUE(scaler.unscale(optimizer));
    EXPECT_EQ(scaler.step(optimizer, found_inf), !found_inf);
    EXPECT_EQ(optimizer.steps, found_inf ? 0 : 1);
    EXPECT_EQ(scaler.found_inf(), found_inf);
    expect_throws<std::logic_error>([&] { scaler.step(optimizer, found_inf); }, {"already"});
    if (found_inf)
      expect_throws<std::logic_error>([&] { scaler.update(false); }, {"GradScaler::update"});
    scaler.update();  // by the verdict, as all ranks do
    EXPECT_EQ(scaler.scale(), found_inf ? 32768.0 : 65536.0);
    EXPECT_EQ(scaler.skipped_steps(), found_inf ? 1 : 0);
    EXPECT_EQ(scaler.state().good_steps, found_inf ? 0 : 1);
  }
  Weights weights;
  weights.gradient(0) = kInfinity;
  CountingOptimizer optimizer{weights.parameters()};
  ef::GradScaler scaler;
  scaler.unscale(optimizer);
  expect_throws<std::logic_error>([&] { scaler.step(optimizer, false); }, {"found_inf is false"});
  EXPECT_EQ(optimizer.steps, 0);
  EXPECT_FALSE(scaler.step(optimizer, true));
}

TEST(GradScaler, AStepThatThrowsIsTriedAgain) {
  Weights weights;
  weights.gradient.setConstant(65536.0f);
  CountingOptimizer optimizer{weights.parameters()};
  optimizer.failures = 2;
  ef::GradScaler scaler;
  for (int attempt = 0; attempt < 2; ++attempt) {
    expect_throws<std::runtime_error>([&] { scaler.step(optimizer); }, {"no"});
    EXPECT_EQ(weights.gradient(0), 1.0f);
  }
  EXPECT_TRUE(scaler.step(optimizer));
  EXPECT_EQ(optimizer.steps, 1);
  EXPECT_EQ(weights.gradient(0), 1.0f);
  expect_throws<std::logic_error>([&] { scaler.step(optimizer); }, {"already"});
}

TEST(GradScaler, OptimizersWithoutGradients) {
  CountingOptimizer first, second, empty{Weights(0).parameters()};
  ef::GradScaler scaler;
  for (CountingOptimizer* optimizer : {&first, &second, &empty}) {
    EXPECT_TRUE(scaler.step(*optimizer));
    expect_throws<std::logic_error>([&] { scaler.step(*optimizer); }, {"already"});
    EXPECT_EQ(optimizer->steps, 1);
  }
  scaler.update();
  EXPECT_TRUE(scaler.step(first));
}

/// Any allocation may fail: the gradients are divided once all the same.
template <typename D>
int failures_of_unscale(const D& device) {
  int failures = 0;
  std::thread([&] {  // a thread with an empty workspace
    Weights weights(3 * ef::problem::kPieceElements);
    weights.gradient.setConstant(65536.0f);
    ef::GradScaler scaler;
    const auto parameters = weights.parameters();
    failures = with_failing_allocations([&] { scaler.unscale(device, parameters); },
                                        [&] {
                                          EXPECT_EQ(weights.gradient(0), 65536.0f);
                                          EXPECT_FALSE(scaler.pending());
                                        });
    for (Index i = 0; i < weights.gradient.size(); ++i) ASSERT_EQ(weights.gradient(i), 1.0f);
    EXPECT_TRUE(scaler.pending());
  })
      .join();
  return failures;
}

TEST(GradScaler, AFailedAllocationChangesNothing) {
  EXPECT_GE(failures_of_unscale(Eigen::DefaultDevice{}), 3);
  Threads threads(3);
  EXPECT_GE(failures_of_unscale(threads.device), 3);
  for (int failures = 0; failures < 20; ++failures) {  // memory for the first so many only
    Weights weights(12 * ef::problem::kPieceElements);
    weights.gradient.setConstant(65536.0f);
    ef::GradScaler scaler;
    const auto parameters = weights.parameters();
    Allocations::fail_at = Allocations::count + failures + 1;
    try {
      scaler.unscale(threads.device, parameters);
      Allocations::fail_at = std::numeric_limits<long>::max();
    } catch (const std::bad_alloc&) {
      Allocations::fail_at = std::numeric_limits<long>::max();
      EXPECT_EQ(weights.gradient(0), 65536.0f);
      scaler.unscale(threads.device, parameters);
    }
    for (Index i = 0; i < weights.gradient.size(); ++i) ASSERT_EQ(weights.gradient(i), 1.0f);
  }
}

TEST(GradScaler, EveryOrderOfCallsFollowsThePlainScaler) {
  std::mt19937 random(7);
  const auto dice = [&](unsigned n) { return static_cast<std::size_t>(random() % n); };
  std::map<std::string, int> seen;
  for (int sequence = 0; sequence < 300; ++sequence) {
    PlainScaler plain;
    ef::GradScaler scaler({.init_scale = 64,
                           .growth_interval = PlainScaler::kInterval,
                           .min_scale = 1,
                           .max_scale = 256});
    ef::Tensor<float, 1> values(6), gradients(6);
    gradients.setZero();
    std::array<int, 6> steps{};
    const auto parameters = [&](const std::set<std::size_t>& which) {
      std::vector<std::size_t> order(which.begin(), which.end());
      std::shuffle(order.begin(), order.end(), random);
      std::vector<ef::Parameter> list;
      for (std::size_t i : order)
        list.push_back({ef::TensorView<float, 1>(values.data() + i, 1),
                        ef::TensorView<float, 1>(gradients.data() + i, 1)});
      return list;
    };
    for (int call = 0; call < 40; ++call) {
      std::set<std::size_t> which;
      for (std::size_t n = 1 + dice(3); n > 0; --n) which.insert(dice(6));
      std::optional<bool> expected, actual;
      std::string name;
      const std::size_t kind = dice(10);
      if (kind < 2) {  // new gradients, often
        name = "gradients";
        for (std::size_t i = 0; i < 6; ++i)
          plain.cells[i].gradient = gradients.data()[i] =
              dice(12) == 0 ? (dice(2) == 0 ? kInfinity : -kInfinity)
                            : static_cast<float>(dice(100));
      } else if (kind < 5) {
        name = "unscale";
        const double multiplier = dice(4) == 0 ? 0.5 : 1;
        expected = plain.unscale(which, multiplier);
        actual = outcome([&] { return scaler.unscale(parameters(which), multiplier); });
      } else if (kind < 8) {
        name = "step";
        const auto verdict = dice(2) == 0 ? std::nullopt : std::optional<bool>(dice(2) == 0);
        StepCounter optimizer{parameters(which), steps, {which.begin(), which.end()}};
        expected = plain.step(which, verdict);
        actual = outcome(
            [&] { return verdict ? scaler.step(optimizer, *verdict) : scaler.step(optimizer); });
      } else if (kind < 9 || dice(4) > 0) {
        name = "update";
        const auto found = dice(3) > 0 ? std::nullopt : std::optional<bool>(dice(2) == 0);
        expected = plain.update(found);
        actual = outcome([&] {
          found ? scaler.update(*found) : scaler.update();
          return true;
        });
      } else {
        name = "load_state";
        plain.scale = static_cast<double>(1 << dice(9));
        plain.good = static_cast<Index>(dice(PlainScaler::kInterval));
        plain.skipped = static_cast<Index>(dice(50));
        plain.forget();
        scaler.load_state({plain.scale, plain.good, plain.skipped});
      }
      ++seen[name + (expected ? *expected ? " true" : " false" : " refused")];
      ASSERT_EQ(actual, expected) << name << " in sequence " << sequence;
      ASSERT_EQ(scaler.scale(), plain.scale);
      ASSERT_EQ(scaler.state().good_steps, plain.good);
      ASSERT_EQ(scaler.skipped_steps(), plain.skipped);
      ASSERT_EQ(scaler.pending(), plain.pending);
      ASSERT_EQ(scaler.found_inf(), plain.found_inf);
      for (std::size_t i = 0; i < 6; ++i) {
        ASSERT_EQ(gradients.data()[i], plain.cells[i].gradient) << name;
        ASSERT_EQ(steps[i], plain.cells[i].steps) << name;
      }
    }
  }
  for (const char* reached : {"unscale true", "unscale false", "unscale refused", "step true",
                              "step false", "step refused", "update true", "update refused"})
    EXPECT_GT(seen[reached], 100) << reached;
}

TEST(GradScaler, GoesOnFromACheckpoint) {
  ef::GradScaler scaler({.growth_interval = 3}), restored({.growth_interval = 3});
  for (bool found_inf : {false, true, false, false}) scaler.update(found_inf);
  restored.load_state(scaler.state());
  EXPECT_EQ(restored.scale(), 32768.0);
  EXPECT_EQ(restored.skipped_steps(), 1);
  restored.update(false);
  EXPECT_EQ(restored.scale(), 65536.0);
  Weights weights;  // over a used scaler: as a new one
  weights.gradient(0) = kInfinity;
  ef::GradScaler used;
  ef::Sgd optimizer(weights.parameters());
  used.step(optimizer);
  used.load_state({});
  EXPECT_FALSE(used.found_inf());
  EXPECT_FALSE(used.pending());
  weights.gradient.setConstant(65536.0f);
  EXPECT_TRUE(used.unscale(optimizer));
  EXPECT_EQ(weights.gradient(0), 1.0f);
  EXPECT_TRUE(used.step(optimizer));
  used.update();
  EXPECT_EQ(used.skipped_steps(), 0);
  constexpr Index most = std::numeric_limits<Index>::max();  // counts do not overflow
  used.load_state({.good_steps = most, .skipped_steps = most});
  used.update(false);
  EXPECT_EQ(used.scale(), 131072.0);
  used.update(true);
  EXPECT_EQ(used.skipped_steps(), most);
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
