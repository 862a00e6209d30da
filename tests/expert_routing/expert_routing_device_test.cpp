// Expert routing on every device: the ids of the reference and weights near it, whatever the rule;
// tokens without an order; the stable order of pairs, also of ids that are no expert.
#include <eigenformer/expert_routing.h>
#include <eigenformer/reference/expert_routing.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

using ef::ExpertScores;

template <typename T>
void check_routing(Index tokens, Index experts, Index k, const ef::ExpertRoutingOptions& options,
                   bool biased) {
  auto logits = random_tensor<T, 2>({tokens, experts}, static_cast<unsigned>(experts), 2.0);
  if (!biased && options.groups == 1)
    for (Index i = 0; i < logits.size(); i += 3) logits.data()[i] = static_cast<T>(0.5f);
  const auto bias = random_tensor<float, 1>({experts}, 3, 0.5);
  const auto wide = to_double(logits);
  const auto wide_bias = to_double(bias);
  std::vector<double> biases;
  if (biased) biases.assign(wide_bias.data(), wide_bias.data() + experts);
  ef::Tensor<std::int32_t, 2> expected(tokens, k);
  ef::Tensor<double, 2> parts(tokens, k);
  for (Index t = 0; t < tokens; ++t)
    ef::reference::expert_routing(&wide(t, 0), experts, k, biases, options, &expected(t, 0),
                                  &parts(t, 0));
  const Index bad = tokens / 2;
  logits(bad, experts - 1) = std::numeric_limits<T>::quiet_NaN();
  for_each_device([&](const auto& bench) {
    using C = ef::compute_type<T>;
    const auto from = on_device(bench, logits);
    const auto by = on_device(bench, bias);
    const auto ids = on_device(bench, poisoned_tensor<std::int32_t, 2>({tokens, k}));
    const auto weights = on_device(bench, poisoned_tensor<C, 2>({tokens, k}));
    if (biased)
      ef::expert_routing_into(bench.device, ids.view(), weights.view(), from.cview(), by.cview(),
                              options);
    else
      ef::expert_routing_into(bench.device, ids.view(), weights.view(), from.cview(), options);
    const auto got = ids.host();
    const auto numbers = weights.host();
    for (Index t = 0; t < tokens; ++t)
      for (Index j = 0; j < k; ++j) {
        ASSERT_EQ(got(t, j), t == bad ? j : expected(t, j)) << experts << " token " << t;
        if (t == bad)
          ASSERT_TRUE(std::isnan(static_cast<double>(numbers(t, j))));
        else
          ASSERT_NEAR(static_cast<double>(numbers(t, j)), parts(t, j), 1e-6 * (1 + parts(t, j)));
      }
  });
}

TEST(ExpertRoutingOnDevice, IsTheReference) {
  check_routing<float>(3, 8, 2, {.normalise = true}, false);
  check_routing<float>(9, 128, 8, {}, false);
  check_routing<ef::bfloat16>(2, 32, 4, {.scores = ExpertScores::softmax_of_chosen}, false);
  check_routing<double>(2, 33, 33, {.scale = 3}, false);
  check_routing<ef::half>(2, 40, 3, {.scores = ExpertScores::sigmoid, .normalise = true}, true);
  const ef::ExpertRoutingOptions groups{.scores = ExpertScores::sigmoid,
                                        .normalise = true,
                                        .scale = 2.5f,
                                        .groups = 8,
                                        .kept_groups = 4};
  check_routing<float>(4, 256, 8, groups, true);
  check_routing<float>(3, 80, 9, {.groups = 40, .kept_groups = 7}, false);
  check_routing<float>(1, 2048, 5, {}, false);
}

TEST(ExpertRoutingOnDevice, ChosenScoresOfZeroAreNoNaN) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  ef::Tensor<float, 2> logits(3, 4);
  logits.setValues(
      {{0.f, -200.f, -201.f, -300.f}, {-400.f, -200.f, -201.f, -300.f}, {0.f, none, none, none}});
  ef::Tensor<float, 1> bias(4);
  bias.setValues({-1000.f, 2.f, 1.f, 0.f});
  for_each_device([&](const auto& bench) {
    const auto from = on_device(bench, logits);
    const auto by = on_device(bench, bias);
    const auto ids = on_device(bench, poisoned_tensor<std::int32_t, 2>({3, 2}));
    const auto weights = on_device(bench, poisoned_tensor<float, 2>({3, 2}));
    for (const auto scores :
         {ExpertScores::softmax, ExpertScores::softmax_of_chosen, ExpertScores::sigmoid}) {
      ef::expert_routing_into(bench.device, ids.view(), weights.view(), from.cview(), by.cview(),
                              {.scores = scores, .normalise = true});
      const auto chosen = ids.host();
      const auto parts = weights.host();
      const double e = std::exp(1.0);
      // a bias of logits leaves those of -infinity behind
      for (Index t = 0; t < (scores == ExpertScores::softmax_of_chosen ? 2 : 3); ++t) {
        const double all = t < 2 && scores != ExpertScores::sigmoid ? 1 : 0;
        EXPECT_EQ(chosen(t, 0), 1);
        EXPECT_EQ(chosen(t, 1), 2);
        EXPECT_NEAR(parts(t, 0), all * e / (1 + e), 1e-6);
        EXPECT_NEAR(parts(t, 1), all / (1 + e), 1e-6);
      }
    }
  });
}

TEST(ExpertOrderOnDevice, IsStable) {
  for (const Index experts : {1, 3, 40})
    for (const Index tokens : {0, 1, 130}) {
      ef::Tensor<std::int32_t, 2> ids(tokens, 2);
      for (Index i = 0; i < ids.size(); ++i)
        ids.data()[i] = static_cast<std::int32_t>(i * i % 97 % experts);
      ef::Tensor<std::int32_t, 2> places(tokens, 2);
      ef::Tensor<std::int32_t, 1> offsets(experts + 1), order(2 * tokens);
      ef::expert_order_into(Eigen::DefaultDevice{}, offsets, order, places, ids);
      for_each_device([&](const auto& bench) {
        const auto from = on_device(bench, ids);
        const auto at = on_device(bench, poisoned_tensor<std::int32_t, 2>({tokens, 2}));
        const auto begins = on_device(bench, poisoned_tensor<std::int32_t, 1>({experts + 1}));
        const auto pairs = on_device(bench, poisoned_tensor<std::int32_t, 1>({2 * tokens}));
        ef::expert_order_into(bench.device, begins.view(), pairs.view(), at.view(), from.cview());
        EXPECT_TRUE(same_bits(begins.host(), offsets));
        EXPECT_TRUE(same_bits(pairs.host(), order));
        EXPECT_TRUE(same_bits(at.host(), places));
      });
    }
}

TEST(ExpertOrderOnDevice, IdsThatAreNoExpertHaveNoPlace) {
  ef::Tensor<std::int32_t, 2> ids(3, 2);
  ids.setValues({{1, -1}, {1 << 30, 0}, {2, 3}});
  for_each_gpu([&](const auto& bench) {
    const auto from = on_device(bench, ids);
    const auto at = on_device(bench, poisoned_tensor<std::int32_t, 2>({3, 2}));
    const auto begins = on_device(bench, poisoned_tensor<std::int32_t, 1>({4}));
    const auto pairs = on_device(bench, poisoned_tensor<std::int32_t, 1>({6}));
    ef::expert_order_into(bench.device, begins.view(), pairs.view(), at.view(), from.cview());
    const auto places = at.host(), expected = [] {
      ef::Tensor<std::int32_t, 2> t(3, 2);
      t.setValues({{1, -1}, {-1, 0}, {2, -1}});
      return t;
    }();
    EXPECT_TRUE(same_bits(places, expected));
    const auto offsets = begins.host();
    for (Index e = 0; e <= 3; ++e) EXPECT_EQ(offsets(e), e);
  });
}

}  // namespace
