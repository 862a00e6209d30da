// Loss scaling on every device: gradients, weights and the state of the optimizer are memory of the
// device. Gradients are divided to the bit; what is not finite is found wherever it stands, and the
// step that it spoils changes no weight and no state; the scale moves as it does on the CPU.
#include <eigenformer/grad_scaler.h>

#include "device_parameters.h"

using namespace eigenformer_test;

namespace {

using Limits = std::numeric_limits<float>;

/// Parameters around the sizes of blocks and pieces, and one without elements.
struct Host {
  std::vector<ef::Tensor<float, 1>> values, gradients;
  explicit Host(float scale = 1) {
    unsigned seed = 0;
    for (Index size : {257, 0, 16387}) {
      values.push_back(random_tensor<float, 1>({size}, ++seed));
      gradients.push_back(random_tensor<float, 1>({size}, ++seed));
      for (Index i = 0; i < size; ++i) gradients.back()(i) *= scale;
    }
  }
};

TEST(GradScalerOnDevice, DividesGradientsToTheBit) {
  constexpr double kScale = 24;  // a division that rounds
  const Host host(24);
  for_each_device([&](const auto& bench) {
    DeviceParameters model(bench, host);
    ef::GradScaler scaler({.init_scale = kScale});
    EXPECT_TRUE(scaler.unscale(bench.device, model.parameters(), 2));
    for (std::size_t i = 0; i < host.values.size(); ++i) {
      const auto halves = model.gradients[i]->host();
      for (Index j = 0; j < halves.size(); ++j)
        ASSERT_EQ(halves(j), host.gradients[i](j) * static_cast<float>(2 / kScale))
            << i << ' ' << j;
    }
    EXPECT_THROW(scaler.unscale(bench.device, model.parameters()), std::logic_error);
  });
}

TEST(GradScalerOnDevice, StepsAreThoseOfUnscaledGradients) {
  const Host plain, scaled(65536);  // a power of two: exact
  for_each_device([&](const auto& bench) {
    const ef::Memory& memory = ef::memory_of(bench.device);
    DeviceParameters expected(bench, plain), model(bench, scaled);
    ef::AdamW by_itself(expected.parameters(), {}, memory),
        optimizer(model.parameters(), {}, memory);
    ef::GradScaler scaler;
    by_itself.step(bench.device);
    EXPECT_TRUE(scaler.step(bench.device, optimizer));
    scaler.update();
    EXPECT_EQ(scaler.state().good_steps, 1);
    for (std::size_t i = 0; i < plain.values.size(); ++i) {
      EXPECT_TRUE(same_bits(model.values[i]->host(), expected.values[i]->host())) << i;
      EXPECT_TRUE(same_bits(model.gradients[i]->host(), plain.gradients[i])) << i;
    }
  });
}

TEST(GradScalerOnDevice, AStepWithWhatIsNotFiniteIsSkipped) {
  for (float bad : {Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN()})
    for (Index at : {0, 16383, 16386}) {
      Host host;
      host.gradients[2](at) = bad;
      for_each_device([&](const auto& bench) {
        DeviceParameters model(bench, host);
        ef::AdamW optimizer(model.parameters(), {}, ef::memory_of(bench.device));
        ef::GradScaler scaler;
        EXPECT_FALSE(scaler.step(bench.device, optimizer)) << at;
        EXPECT_TRUE(scaler.found_inf());
        scaler.update();
        EXPECT_EQ(scaler.scale(), 32768.0);
        EXPECT_EQ(optimizer.step_count(), 0);
        for (std::size_t i = 0; i < host.values.size(); ++i)
          EXPECT_TRUE(same_bits(model.values[i]->host(), host.values[i])) << i;
        const auto state = model.state(optimizer.state());
        for (Index i = 0; i < state.size(); ++i) ASSERT_EQ(state(i), 0.0f);
      });
    }
}

// Clipping lies between unscaling and the step.
TEST(GradScalerOnDevice, ClipsWhatWasUnscaled) {
  const Host host(1024);
  for_each_device([&](const auto& bench) {
    DeviceParameters model(bench, host);
    ef::Sgd optimizer(model.parameters(), {.learning_rate = 1}, ef::memory_of(bench.device));
    ef::GradScaler scaler({.init_scale = 1024});
    EXPECT_TRUE(scaler.unscale(bench.device, optimizer));
    const double norm = ef::clip_gradient_norm(bench.device, optimizer.parameters(), 0.5);
    EXPECT_NEAR(norm, std::sqrt(257 + 16387), 2);
    EXPECT_TRUE(scaler.step(bench.device, optimizer));
    double moved = 0;
    for (std::size_t i = 0; i < host.values.size(); ++i) {
      const auto after = model.values[i]->host();
      for (Index j = 0; j < after.size(); ++j)
        moved += std::pow(static_cast<double>(after(j)) - host.values[i](j), 2);
    }
    EXPECT_NEAR(std::sqrt(moved), 0.5, 1e-4);
  });
}

}  // namespace
