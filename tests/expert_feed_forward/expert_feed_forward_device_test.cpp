// Experts on every device: near plain double; a token has the same bits alone and beside others; an
// id that is no expert gives its token NaN on a GPU and disturbs no other.
#include "device.h"
#include "expert_support.h"

using namespace eigenformer_test;

namespace {

/// Packed on a device, which may do so when it is waited for: what is packed lives as long.
template <typename S, typename B>
struct DeviceExperts {
  DeviceExperts(const B& bench, const RandomExperts& random,
                const ef::PackingOptions<S>& options = {})
      : gates(bench, stacked(random.gates)),
        ups(bench, stacked(random.ups)),
        down_matrices(bench, stacked(random.downs)) {
    const Index hidden = random.gates[0].dimension(0), in = random.gates[0].dimension(1);
    for (Index e = 0; e < static_cast<Index>(random.gates.size()); ++e) {
      const Index at = e * hidden * in;
      using View = ef::TensorView<const float, 2>;
      gate_ups.push_back(
          ef::pack_gated_weight<S>(bench.device, View(gates.cview().data() + at, hidden, in),
                                   View(ups.cview().data() + at, hidden, in), options));
      downs.push_back(ef::pack_weight<S>(
          bench.device, View(down_matrices.cview().data() + at, in, hidden), options));
    }
  }
  DeviceTensor<B, float, 2> gates, ups, down_matrices;
  std::vector<ef::PackedGatedWeight<S>> gate_ups;
  std::vector<ef::PackedWeight<S>> downs;
};

template <typename T, typename S>
void check_experts(Index tokens, Index experts, Index k, Index in, Index hidden, double bound,
                   const ef::PackingOptions<S>& options = {}, Index one = -1) {
  const RandomExperts random(experts, in, hidden);
  const auto x = random_tensor<T, 2>({tokens, in}, 7);
  const auto ids = some_experts(tokens, k, experts, one);
  const auto weights = random_tensor<float, 2>({tokens, k}, 5);
  ef::Tensor<double, 2> expected(tokens, in);
  expected.setZero();
  ef::reference::expert_feed_forward(expected, to_double(x), ids, to_double(weights),
                                     random.in_double(false), silu_unit);
  for_each_device([&](const auto& bench) {
    const DeviceExperts<S, std::remove_cvref_t<decltype(bench)>> packed(bench, random, options);
    const auto& gate_ups = packed.gate_ups;
    const auto& downs = packed.downs;
    const auto from = on_device(bench, x);
    const auto chosen = on_device(bench, ids);
    const auto parts = on_device(bench, weights);
    const auto y = on_device(bench, poisoned_tensor<T, 2>({tokens, in}));
    ef::expert_feed_forward_into(bench.device, y.view(), from.cview(), chosen.cview(),
                                 parts.cview(), gate_ups, downs, ef::Epilogue{}.silu());
    const auto whole = y.host();
    EXPECT_LT(relative_error(whole, expected), bound) << tokens << " tokens, " << experts;
    if (tokens == 0) return;
    const auto alone = on_device(bench, poisoned_tensor<T, 2>({1, in}));
    const Index t = tokens / 2;
    ef::expert_feed_forward_into(
        bench.device, alone.view(), ef::TensorView<const T, 2>(from.cview().data() + t * in, 1, in),
        ef::TensorView<const std::int32_t, 2>(chosen.cview().data() + t * k, 1, k),
        ef::TensorView<const float, 2>(parts.cview().data() + t * k, 1, k), gate_ups, downs,
        ef::Epilogue{}.silu());
    EXPECT_TRUE(same_bits(alone.host(), rows_of(whole, t, 1))) << tokens << " tokens";
  });
}

TEST(ExpertsOnDevice, ArePlainDouble) {
  for (const Index tokens : {0, 1, 3, 20}) {
    check_experts<float, float>(tokens, 5, 2, 24, 17, 1e-6);
    check_experts<ef::bfloat16, ef::bfloat16>(tokens, 5, 2, 24, 16, 0.02);
    check_experts<float, std::int8_t>(tokens, 4, 3, 32, 20, 0.03);
  }
  check_experts<ef::bfloat16, ef::bfloat16>(40, 3, 2, 33, 24, 0.02, {}, 1);  // one has all
  check_experts<float, std::int8_t>(30, 3, 3, 64, 40, 0.03, {.group_size = 32});
  check_experts<float, ef::int4>(9, 4, 2, 64, 40, 0.2);
  check_experts<float, ef::int4>(40, 4, 2, 64, 40, 0.2, {.zero_points = true});
  check_experts<float, ef::int4>(9, 4, 2, 64, 40, 0.2, {.quantize_activations = false});
  check_experts<ef::half, ef::half>(12, 9, 1, 16, 8, 5e-3);
}

TEST(ExpertsOnDevice, BiasesSharedExpertsAndStrangers) {
  constexpr Index tokens = 6, experts = 3, k = 2, in = 16, hidden = 8;
  const RandomExperts random(experts, in, hidden);
  const auto x = random_tensor<float, 2>({tokens, in}, 7);
  auto ids = some_experts(tokens, k, experts);
  const auto weights = random_tensor<float, 2>({tokens, k}, 5);
  const auto shared = random_tensor<float, 2>({tokens, in}, 8);
  const auto gate = random_tensor<float, 1>({tokens}, 9);
  ef::Tensor<double, 2> expected(tokens, in);
  for (Index t = 0; t < tokens; ++t)
    for (Index i = 0; i < in; ++i)
      expected(t, i) =
          static_cast<double>(shared(t, i)) / (1 + std::exp(-static_cast<double>(gate(t))));
  ef::reference::expert_feed_forward(expected, to_double(x), ids, to_double(weights),
                                     random.in_double(true), silu_unit);
  const auto run = [&](const auto& bench) {
    const DeviceExperts<float, std::remove_cvref_t<decltype(bench)>> packed(bench, random);
    const auto& gate_ups = packed.gate_ups;
    const auto& downs = packed.downs;
    const auto from = on_device(bench, x);
    const auto chosen = on_device(bench, ids);
    const auto parts = on_device(bench, weights);
    const auto added = on_device(bench, shared);
    const auto by = on_device(bench, gate);
    const auto first_bias = on_device(bench, random.gate_up_bias);
    const auto second_bias = on_device(bench, random.down_bias);
    const auto offsets = on_device(bench, poisoned_tensor<std::int32_t, 1>({experts + 1}));
    const auto order = on_device(bench, poisoned_tensor<std::int32_t, 1>({tokens * k}));
    const auto places = on_device(bench, poisoned_tensor<std::int32_t, 2>({tokens, k}));
    const auto inner = on_device(bench, poisoned_tensor<float, 2>({tokens * k, hidden}));
    const auto results = on_device(bench, poisoned_tensor<float, 2>({tokens * k, in}));
    const auto y = on_device(bench, poisoned_tensor<float, 2>({tokens, in}));
    const auto first = first_bias.cview(), second = second_bias.cview();
    ef::expert_order_into(bench.device, offsets.view(), order.view(), places.view(),
                          chosen.cview());
    ef::expert_linear_into(bench.device, inner.view(), from.cview(), gate_ups, offsets.cview(),
                           order.cview(), ef::Epilogue{}.bias(first).silu());
    ef::expert_linear_into(bench.device, results.view(), inner.cview(), downs, offsets.cview(),
                           ef::Epilogue{}.bias(second));
    ef::combine_experts_into(bench.device, y.view(), results.cview(), places.cview(), parts.cview(),
                             added.cview(), by.cview());
    return y.host();
  };
  for_each_device(
      [&](const auto& bench) { EXPECT_LT(relative_error(run(bench), expected), 1e-6); });
  ids(2, 1) = -1;
  ids(4, 0) = experts;
  for_each_gpu([&](const auto& bench) {
    const auto y = run(bench);
    for (Index t = 0; t < tokens; ++t)
      for (Index i = 0; i < in; ++i)
        if (t == 2 || t == 4)
          EXPECT_TRUE(std::isnan(y(t, i)));
        else
          EXPECT_NEAR(static_cast<double>(y(t, i)), expected(t, i), 1e-4);
  });
}

}  // namespace
