// The experts of a Qwen3-30B-A3B-like layer, 8 of 32 with 2048 features and 768 hidden: one token,
// whose experts' weights are read once, a batch and a prompt, whose products are the limit.
#include <eigenformer/expert_feed_forward.h>
#include <eigenformer/parallel_region.h>

#include <algorithm>
#include <random>
#include <vector>

#include "report/harness.h"

namespace ef = eigenformer;
using Eigen::Index;

namespace {

template <typename T, typename S>
void cases(bench::Suite& suite, const std::string& name,
           const ef::PackingOptions<S>& packing = {}) {
  constexpr Index experts = 32, k = 8, in = 2048, hidden = 768;
  // of a weight: of int4 by 32 with a scale and a minimum
  constexpr double bytes = std::is_same_v<S, ef::int4> ? 0.75 : sizeof(S);
  struct Weights {
    std::vector<ef::PackedGatedWeight<S>> gate_ups;
    std::vector<ef::PackedWeight<S>> downs;
  };
  const auto w = std::make_shared<Weights>();
  ef::Tensor<float, 2> up(hidden, in), down(in, hidden);
  up.setRandom();
  down.setRandom();
  for (Index e = 0; e < experts; ++e) {
    w->gate_ups.push_back(ef::pack_gated_weight<S>(up, up, packing));
    w->downs.push_back(ef::pack_weight<S>(down, packing));
  }
  for (const Index tokens : {1, 16, 512}) {
    const auto x = std::make_shared<ef::Tensor<T, 2>>(tokens, in);
    const auto y = std::make_shared<ef::Tensor<T, 2>>(tokens, in);
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    for (Index i = 0; i < x->size(); ++i) x->data()[i] = static_cast<T>(normal(generator));
    ef::Tensor<float, 2> logits(tokens, experts);
    for (Index i = 0; i < logits.size(); ++i) logits.data()[i] = normal(generator);
    const auto routed = std::make_shared<ef::ExpertRoutingResult<float>>(
        ef::expert_routing(logits, k, {.normalise = true}));
    std::vector<bool> used(experts);
    for (Index i = 0; i < routed->ids.size(); ++i)
      used[static_cast<std::size_t>(routed->ids.data()[i])] = true;
    const double of_expert = 3.0 * in * hidden,
                 read = static_cast<double>(std::count(used.begin(), used.end(), true)) * of_expert;
    const auto limit = bench::Limit::product(
        2.0 * static_cast<double>(tokens * k) * of_expert, read * bytes,
        std::is_same_v<S, float> ? bench::Peak::float_fma : bench::Peak::int8);
    suite.row("expert_feed_forward " + std::to_string(tokens) + " tokens, 8 of 32, " + name, limit)
        .ours([=](const auto& device) {
          const ef::ParallelRegion region(device);
          ef::expert_feed_forward_into(device, *y, *x, routed->ids, routed->weights, w->gate_ups,
                                       w->downs, ef::Epilogue{}.silu());
        });
  }
}

void expert_feed_forward_cases(bench::Suite& suite) {
  cases<float, float>(suite, "float");
  cases<float, std::int8_t>(suite, "INT8");
  cases<float, ef::int4>(suite, "INT4 with minimums", {.zero_points = true});
}

}  // namespace

EIGENFORMER_BENCHMARK(expert_feed_forward_cases)
