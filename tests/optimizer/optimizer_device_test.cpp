// Optimizers and what is done to gradients on every device: the CPU's numbers, for parameters
// around the sizes of warps, blocks and pieces. Weights, gradients and moments are memory of the
// device.
#include "device.h"
#include "device_parameters.h"
#include "optimizer_support.h"

using namespace eigenformer_test;

namespace {

const std::vector<Index> kSizes = {1, 0, 31, 32, 33, 255, 257, 16384, 16385, 40000};

/// Three steps, one of which scales the gradients; the groups differ in their options. Each
/// operation rounds as the CPU's does.
template <typename Optimizer, typename Options>
void check_steps(const Options& first, const Options& second) {
  using Group = typename Optimizer::Group;
  const Model start(kSizes);
  Model expected(kSizes);
  const auto groups = [&](const std::vector<ef::Parameter>& all) {
    return std::vector<Group>{{{all.begin(), all.begin() + 5}, first},
                              {{all.begin() + 5, all.end()}, second}};
  };
  Optimizer by_cpu(groups(expected.parameters()));
  const auto take_steps = [](auto& optimizer, const auto& device) {
    optimizer.step(device);
    optimizer.step(device, {0.3f, 0.7f});
    optimizer.step(device);
  };
  take_steps(by_cpu, Eigen::DefaultDevice{});
  const ef::Tensor<float, 1> expected_state = ef::TensorView<const float, 1>(
      by_cpu.state().data(), static_cast<Index>(by_cpu.state().size()));
  for_each_device([&](const auto& bench) {
    const DeviceParameters model(bench, start);
    Optimizer optimizer(groups(model.parameters()), ef::memory_of(bench.device));
    take_steps(optimizer, bench.device);
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      EXPECT_TRUE(within(model.values[i]->host(), expected.values[i], 1e-6)) << kSizes[i];
      EXPECT_TRUE(same_bits(model.gradients[i]->host(), expected.gradients[i])) << kSizes[i];
    }
    EXPECT_TRUE(within(model.state(optimizer.state()), expected_state, 1e-6));
    optimizer.zero_grad(bench.device);
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      const auto zeros = model.gradients[i]->host();
      for (Index j = 0; j < kSizes[i]; ++j) ASSERT_EQ(zeros(j), 0.0f) << kSizes[i];
    }
  });
}

TEST(OptimizerOnDevice, AdamWEqualsTheCpu) {
  check_steps<ef::AdamW, ef::AdamWOptions>({}, {.learning_rate = 0.1, .weight_decay = 0});
}

TEST(OptimizerOnDevice, SgdEqualsTheCpu) {
  check_steps<ef::Sgd, ef::SgdOptions>({.learning_rate = 0.1, .weight_decay = 0.01},
                                       {.learning_rate = 0.1, .momentum = 0.9});
  check_steps<ef::Sgd, ef::SgdOptions>({.learning_rate = 0.1, .momentum = 0.9, .nesterov = true},
                                       {.learning_rate = 0.01});
}

TEST(GradientsOnDevice, AreMeasuredScaledAndClipped) {
  const Model start(kSizes);
  double squares = 0;
  for (const auto& gradient : start.gradients)
    for (double g : doubles(gradient)) squares += g * g;
  const double norm = std::sqrt(squares);
  for_each_device([&](const auto& bench) {
    const DeviceParameters model(bench, start);
    const auto parameters = model.parameters();
    EXPECT_NEAR(ef::gradient_norm(bench.device, parameters), norm, 1e-12 * norm);
    EXPECT_TRUE(ef::all_finite(bench.device, parameters));
    EXPECT_TRUE(ef::scale_gradients(bench.device, parameters, 0.5));
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      const auto halves = model.gradients[i]->host();
      for (Index j = 0; j < kSizes[i]; ++j) ASSERT_EQ(halves(j), start.gradients[i](j) * 0.5f);
    }
    EXPECT_NEAR(ef::clip_gradient_norm(bench.device, parameters, 2.0), norm / 2, 1e-12 * norm);
    EXPECT_NEAR(ef::gradient_norm(bench.device, parameters), 2.0, 1e-5);
    EXPECT_EQ(ef::gradient_norm(bench.device, {}), 0.0);
    EXPECT_TRUE(ef::all_finite(bench.device, {}));
  });
}

TEST(GradientsOnDevice, AreNotFiniteWhereOneIsNot) {
  using Limits = std::numeric_limits<float>;
  for (float bad : {Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN()})
    for (Index at : {0, 16383, 16384, 39999}) {
      Model start({33, 40000});
      start.gradients[1](at) = bad;
      for_each_device([&](const auto& bench) {
        const DeviceParameters model(bench, start);
        EXPECT_FALSE(ef::all_finite(bench.device, model.parameters())) << at;
        EXPECT_FALSE(std::isfinite(ef::gradient_norm(bench.device, model.parameters()))) << at;
      });
    }
  Model start({5});
  start.gradients[0](3) = 1e38f;
  for_each_device([&](const auto& bench) {
    const DeviceParameters model(bench, start);
    EXPECT_TRUE(ef::all_finite(bench.device, model.parameters()));
    EXPECT_FALSE(ef::scale_gradients(bench.device, model.parameters(), 10.0)) << "overflows";
  });
}

}  // namespace
