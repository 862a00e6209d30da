// AdamW over 8.4 million weights: 28 bytes per element, nothing else. Limit: memory. Peer: what an
// Eigen user writes by hand.
#include <eigenformer/optimizer.h>

#include <random>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

constexpr Eigen::Index kWeights = 8'400'000;

ef::Tensor<float, 1> random_vector(unsigned seed) {
  std::minstd_rand generator(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  ef::Tensor<float, 1> result(kWeights);
  for (Eigen::Index i = 0; i < kWeights; ++i) result(i) = uniform(generator);
  return result;
}

struct Weights {
  ef::Tensor<float, 1> value = random_vector(1), gradient = random_vector(2), m{kWeights},
                       v{kWeights};
  std::vector<ef::Parameter> parameters() {
    return {ef::Parameter{ef::TensorView<float, 1>(value.data(), kWeights),
                          ef::TensorView<float, 1>(gradient.data(), kWeights)}};
  }
};

struct Trained {
  Weights weights;
  ef::AdamW optimizer{weights.parameters(), {.learning_rate = 1e-4}};
};

void adamw_case(bench::Suite& suite) {
  auto trained = std::make_shared<Trained>();
  auto by_hand = std::make_shared<Weights>();
  by_hand->m.setZero();
  by_hand->v.setZero();
  constexpr double elements = static_cast<double>(kWeights);
  auto& row =
      suite.row("AdamW::step 8.4M weights", bench::Limit::copy_bytes(16 * elements, 12 * elements));
  row.ours([=](const auto& device) { trained->optimizer.step(device); });
  row.peer("Eigen by hand", [=, t = std::make_shared<int>(0)](const auto& device) {
    auto& [w, g, m, v] = *by_hand;
    ++*t;
    const float correction1 = 1.0f - std::pow(0.9f, static_cast<float>(*t)),
                correction2 = 1.0f - std::pow(0.999f, static_cast<float>(*t));
    m.device(device) = m * 0.9f + g * 0.1f;
    v.device(device) = v * 0.999f + g * g * 0.001f;
    w.device(device) = w * (1.0f - 1e-4f * 0.01f) -
                       (m * (1e-4f / correction1)) / ((v * (1.0f / correction2)).sqrt() + 1e-8f);
  });
}

void norm_case(bench::Suite& suite) {
  auto weights = std::make_shared<Weights>();
  auto norm = std::make_shared<ef::Tensor<float, 0>>();
  auto& row = suite.row("gradient_norm 8.4M weights",
                        bench::Limit::read_bytes(4.0 * static_cast<double>(kWeights)));
  row.ours([=, sink = std::make_shared<double>()](const auto& device) {
    *sink = ef::gradient_norm(device, weights->parameters());
  });
  row.peer("Eigen by hand", [=](const auto& device) {
    norm->device(device) = weights->gradient.square().sum().sqrt();
  });
}

}  // namespace

EIGENFORMER_BENCHMARK(adamw_case)
EIGENFORMER_BENCHMARK(norm_case)
