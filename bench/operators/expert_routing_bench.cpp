// Expert routing: 8 of 128 experts (Qwen3 30B) and 8 of 256 with groups (DeepSeek V3), and the
// order by expert. Limit: logits read, ids and weights written.
#include <eigenformer/expert_routing.h>

#include "report/harness.h"

namespace ef = eigenformer;
using Eigen::Index;

namespace {

void expert_routing_cases(bench::Suite& suite) {
  constexpr Index k = 8;
  for (const Index tokens : {1, 512}) {
    const auto ids = std::make_shared<ef::Tensor<std::int32_t, 2>>(tokens, k);
    const auto weights = std::make_shared<ef::Tensor<float, 2>>(tokens, k);
    const auto places = std::make_shared<ef::Tensor<std::int32_t, 2>>(tokens, k);
    const auto order = std::make_shared<ef::Tensor<std::int32_t, 1>>(tokens * k);
    for (const Index experts : {128, 256}) {
      const auto logits = std::make_shared<ef::Tensor<float, 2>>(tokens, experts);
      logits->setRandom();
      const auto bias = std::make_shared<ef::Tensor<float, 1>>(experts);
      bias->setRandom();
      const double read = static_cast<double>(logits->size()) * sizeof(float),
                   written = static_cast<double>(ids->size()) * 8;
      const std::string shape = std::to_string(tokens) + " tokens, 8 of " + std::to_string(experts);
      auto& row = suite.row("expert_routing " + shape, bench::Limit::copy_bytes(read, written));
      if (experts == 128)
        row.ours([=](const auto& device) {
          ef::expert_routing_into(device, *ids, *weights, *logits, {.normalise = true});
        });
      else
        row.ours([=](const auto& device) {
          ef::expert_routing_into(device, *ids, *weights, *logits, *bias,
                                  {.scores = ef::ExpertScores::sigmoid,
                                   .normalise = true,
                                   .groups = 8,
                                   .kept_groups = 4});
        });
      ef::expert_routing_into(Eigen::DefaultDevice{}, *ids, *weights, *logits);  // for the order
    }
    const auto offsets = std::make_shared<ef::Tensor<std::int32_t, 1>>(257);
    const double bytes = static_cast<double>(ids->size()) * sizeof(std::int32_t);
    suite
        .row("expert_order " + std::to_string(tokens) + " tokens, 8 of 256",
             bench::Limit::copy_bytes(bytes, 2 * bytes))
        .ours([=](const auto& device) {
          ef::expert_order_into(device, *offsets, *order, *places, *ids);
        });
  }
}

}  // namespace

EIGENFORMER_BENCHMARK(expert_routing_cases)
