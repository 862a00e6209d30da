// Unscaling 8.4 million gradients and finding whether all are finite: one read and one write. Peer:
// what an Eigen user writes by hand.
#include <eigenformer/grad_scaler.h>

#include <random>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

constexpr Eigen::Index kWeights = 8'400'000;

struct Gradients {
  ef::Tensor<float, 1> value{kWeights}, gradient{kWeights};
  ef::Tensor<bool, 0> finite;
  Gradients() {
    std::minstd_rand generator(1);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    for (Eigen::Index i = 0; i < kWeights; ++i) value(i) = gradient(i) = uniform(generator);
  }
  std::vector<ef::Parameter> parameters() {
    return {ef::Parameter{ef::TensorView<float, 1>(value.data(), kWeights),
                          ef::TensorView<float, 1>(gradient.data(), kWeights)}};
  }
};

void unscale_case(bench::Suite& suite) {
  auto ours = std::make_shared<Gradients>();
  auto by_hand = std::make_shared<Gradients>();
  // Factors near 1 keep the gradients normal numbers over any number of iterations; the work is
  // that of 65536.
  auto scaler = std::make_shared<ef::GradScaler>(
      ef::GradScalerOptions{.init_scale = 1.0000001, .growth_interval = 1'000'000'000});
  const double bytes = 4.0 * static_cast<double>(kWeights);
  auto& row =
      suite.row("GradScaler::unscale 8.4M gradients", bench::Limit::copy_bytes(bytes, bytes));
  row.ours([=](const auto& device) {
    scaler->unscale(device, ours->parameters());
    scaler->update(false);
  });
  row.peer("Eigen by hand", [=](const auto& device) {
    by_hand->gradient.device(device) = by_hand->gradient * 0.9999999f;
    by_hand->finite.device(device) = (by_hand->gradient.isfinite)().all();
  });
}

}  // namespace

EIGENFORMER_BENCHMARK(unscale_case)
