// Routing of tokens to experts against stable sorts in double, on every ISA, scalar and rule;
// equals by lowest index; what has no order disturbs no other token. Pairs in the order of experts.
#include <eigenformer/expert_routing.h>
#include <eigenformer/reference/expert_routing.h>

#include <numeric>

#include "allocations.h"
#include "compare.h"

using namespace eigenformer_test;

namespace {

using ef::ExpertScores;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Case {
  Index experts, k;
  ef::ExpertRoutingOptions options = {};
  bool bias = false;
};
const std::vector<Case> kCases{
    {1, 1},
    {8, 2, {.normalise = true}},
    {60, 4},
    {128, 8, {.normalise = true, .scale = 2.5f}},
    {17, 17},
    {33, 4, {.scores = ExpertScores::softmax_of_chosen}},
    {32, 4, {.scores = ExpertScores::softmax_of_chosen}, true},
    {16, 3, {.scores = ExpertScores::sigmoid}},
    {256,
     8,
     {.scores = ExpertScores::sigmoid,
      .normalise = true,
      .scale = 2.5f,
      .groups = 8,
      .kept_groups = 4},
     true},
    {12, 4, {.scores = ExpertScores::sigmoid, .groups = 6, .kept_groups = 2}, true},
    {20, 5, {.groups = 4, .kept_groups = 3}},
    {130, 6, {.groups = 13, .kept_groups = 2}}};

template <typename T>
void expect_routing(const Case& c) {
  constexpr Index tokens = 5;
  auto logits = random_tensor<T, 2>({tokens, c.experts}, static_cast<unsigned>(c.experts), 2.0);
  if (!c.bias && c.options.groups == 1)  // equals and -infinity, of which scores would not differ
    for (Index i = 0; i < logits.size(); i += 3)
      logits.data()[i] =
          i % 2 == 0 ? static_cast<T>(0.5f) : static_cast<T>(i % 9 ? -kInfinity : 0.5f);
  for (Index t = 0; t < tokens; ++t) logits(t, 0) = static_cast<T>(0.25f);
  const auto bias = random_tensor<float, 1>({c.experts}, 3, 0.5);
  const auto wide = to_double(logits);
  const auto wide_bias = to_double(bias);
  std::vector<double> biases;
  if (c.bias) biases.assign(wide_bias.data(), wide_bias.data() + c.experts);
  ef::Tensor<std::int32_t, 2> expected(tokens, c.k);
  ef::Tensor<double, 2> weights(tokens, c.k);
  for (Index t = 0; t < tokens; ++t)
    ef::reference::expert_routing(&wide(t, 0), c.experts, c.k, biases, c.options, &expected(t, 0),
                                  &weights(t, 0));
  const auto check = [&](const auto& device, const char* name) {
    auto ids = poisoned_tensor<std::int32_t, 2>({tokens, c.k});
    auto parts = poisoned_tensor<ef::compute_type<T>, 2>({tokens, c.k});
    if (c.bias)
      ef::expert_routing_into(device, ids, parts, logits, bias, c.options);
    else
      ef::expert_routing_into(device, ids, parts, logits, c.options);
    EXPECT_TRUE(same_bits(ids, expected)) << name << " " << c.experts << " " << c.k;
    EXPECT_LT(relative_error(parts, weights), 1e-6) << name << " " << c.experts << " " << c.k;
    for (Index t = 0; t < tokens; ++t) {  // alone, a token has the same bits
      const ef::TensorView<const T, 2> own(&logits(t, 0), 1, c.experts);
      if (c.bias) continue;
      const auto [id, part] = ef::expert_routing(device, own, c.k, c.options);
      for (Index j = 0; j < c.k; ++j) {
        EXPECT_EQ(id(0, j), ids(t, j));
        EXPECT_EQ(part(0, j), parts(t, j));
      }
    }
  };
  for_each_isa([&](auto isa) { check(on(isa), isa.name); });
  Threads threads(3);
  check(threads.device, "threads");
}

template <typename T>
class ExpertRouting : public ::testing::Test {};
TYPED_TEST_SUITE(ExpertRouting, EveryScalar);

TYPED_TEST(ExpertRouting, IsTheBeginningOfAStableSort) {
  for (const Case& c : kCases) expect_routing<TypeParam>(c);
}

TEST(ExpertRoutingRules, WeightsOfHand) {
  ef::Tensor<float, 2> logits(1, 4);
  logits.setValues({{0.f, std::log(3.f), std::log(4.f), std::log(2.f)}});
  const auto plain = ef::expert_routing(logits, 2);
  EXPECT_EQ(plain.ids(0, 0), 2);
  EXPECT_EQ(plain.ids(0, 1), 1);
  EXPECT_NEAR(plain.weights(0, 0), 0.4f, 1e-6);
  EXPECT_NEAR(plain.weights(0, 1), 0.3f, 1e-6);
  const auto whole = ef::expert_routing(logits, 2, {.normalise = true, .scale = 7});
  EXPECT_NEAR(whole.weights(0, 0), 4.f, 1e-5);
  EXPECT_NEAR(whole.weights(0, 1), 3.f, 1e-5);
  const auto chosen = ef::expert_routing(logits, 2, {.scores = ExpertScores::softmax_of_chosen});
  EXPECT_NEAR(chosen.weights(0, 0), 4.f / 7, 1e-6);
  const auto sigmoid = ef::expert_routing(logits, 2, {.scores = ExpertScores::sigmoid});
  EXPECT_NEAR(sigmoid.weights(0, 0), 0.8f, 1e-6);
  EXPECT_NEAR(sigmoid.weights(0, 1), 0.75f, 1e-6);
}

TEST(ExpertRoutingRules, ChosenScoresOfZeroAreNoNaN) {
  ef::Tensor<float, 2> logits(3, 4), weights(3, 2);
  ef::Tensor<std::int32_t, 2> ids(3, 2);
  // the bias keeps away from the one expert whose softmax is not 0 in float
  logits.setValues({{0.f, -200.f, -201.f, -300.f},
                    {-400.f, -200.f, -201.f, -300.f},
                    {0.f, -kInfinity, -kInfinity, -kInfinity}});
  ef::Tensor<float, 1> bias(4);
  bias.setValues({-1000.f, 2.f, 1.f, 0.f});
  const double e = std::exp(1.0);
  for_each_isa([&](auto isa) {
    for (const auto scores : {ExpertScores::softmax, ExpertScores::softmax_of_chosen}) {
      ef::expert_routing_into(on(isa), ids, weights, logits, bias,
                              {.scores = scores, .normalise = true, .scale = 2});
      // a bias of logits leaves those of -infinity behind
      for (Index t = 0; t < (scores == ExpertScores::softmax ? 3 : 2); ++t) {
        EXPECT_EQ(ids(t, 0), 1) << isa.name;
        EXPECT_EQ(ids(t, 1), 2) << isa.name;
        EXPECT_NEAR(weights(t, 0), t < 2 ? 2 * e / (1 + e) : 0, 1e-6) << isa.name;
        EXPECT_NEAR(weights(t, 1), t < 2 ? 2 / (1 + e) : 0, 1e-6) << isa.name;
      }
    }
    ef::expert_routing_into(on(isa), ids, weights, logits, bias,
                            {.scores = ExpertScores::sigmoid, .normalise = true});
    for (Index i = 0; i < weights.size(); ++i) EXPECT_EQ(weights.data()[i], 0) << isa.name;
  });
}

TEST(ExpertRoutingRules, EqualsComeByLowestIndex) {
  ef::Tensor<float, 2> logits(1, 12), weights(1, 4);
  ef::Tensor<std::int32_t, 2> ids(1, 4);
  ef::Tensor<float, 1> bias(12);
  for (const float number : {0.f, -5.f, 88.f}) {
    logits.setConstant(number);
    bias.setConstant(0.5f);
    for (const auto scores :
         {ExpertScores::softmax, ExpertScores::softmax_of_chosen, ExpertScores::sigmoid})
      for (const Index groups : {1, 3, 6}) {
        const ef::ExpertRoutingOptions options{
            .scores = scores, .groups = groups, .kept_groups = groups == 1 ? 1 : groups - 1};
        ef::expert_routing_into(Eigen::DefaultDevice{}, ids, weights, logits, bias, options);
        for (Index j = 0; j < 4; ++j) EXPECT_EQ(ids(0, j), j);
      }
  }
  // A logit that rounds to the sigmoid of another is still the larger.
  logits.setConstant(30.f);
  logits(0, 7) = 31.f;
  EXPECT_EQ(ef::expert_routing(logits, 1, {.scores = ExpertScores::sigmoid}).ids(0, 0), 7);
  bias.setConstant(std::numeric_limits<float>::quiet_NaN());
  bias(9) = -100;
  ef::expert_routing_into(Eigen::DefaultDevice{}, ids, weights, logits, bias);
  EXPECT_EQ(ids(0, 0), 9);  // NaN counts as -infinity
  EXPECT_EQ(ids(0, 1), 0);
}

TEST(ExpertRoutingRules, WhatHasNoOrderHarmsNoOther) {
  auto logits = random_tensor<float, 2>({5, 9}, 2);
  const auto expected = ef::expert_routing(logits, 3);
  logits(0, 8) = std::numeric_limits<float>::quiet_NaN();
  logits(2, 0) = kInfinity;
  for (Index e = 0; e < 9; ++e) logits(4, e) = -kInfinity;
  for (const auto scores :
       {ExpertScores::softmax, ExpertScores::softmax_of_chosen, ExpertScores::sigmoid}) {
    const auto got = ef::expert_routing(logits, 3, {.scores = scores});
    for (Index t = 0; t < 5; ++t)
      for (Index j = 0; j < 3; ++j) {
        EXPECT_EQ(got.ids(t, j), t % 2 == 0 ? j : expected.ids(t, j));
        EXPECT_EQ(std::isnan(got.weights(t, j)), t % 2 == 0);
      }
  }
}

TEST(ExpertRoutingMemory, NothingIsAllocatedTheSecondTime) {
  const auto logits = random_tensor<float, 2>({30, 128}, 3);
  ef::Tensor<std::int32_t, 2> ids(30, 8), places(30, 8);
  ef::Tensor<float, 2> weights(30, 8);
  ef::Tensor<std::int32_t, 1> offsets(129), order(240);
  ef::Workspace workspace;
  const auto call = [&] {
    ef::expert_routing_into(Eigen::DefaultDevice{}, ids, weights, logits, {}, workspace);
    ef::expert_order_into(Eigen::DefaultDevice{}, offsets, order, places, ids, workspace);
  };
  call();
  EXPECT_EQ(count_allocations(call), 0);
}

TEST(ExpertRoutingErrors, NameTheArgument) {
  const auto logits = random_tensor<float, 2>({2, 12}, 4);
  const auto refused = [&](Index k, const ef::ExpertRoutingOptions& options,
                           const std::vector<std::string>& text) {
    expect_throws<std::invalid_argument>([&] { ef::expert_routing(logits, k, options); }, text);
  };
  refused(0, {}, {"expert_routing", "k is 0, expected 1 to 12"});
  refused(13, {}, {"k is 13"});
  refused(1, {.scale = kInfinity}, {"scale is inf"});
  refused(1, {.groups = 5}, {"groups is 5", "12 experts"});
  refused(1, {.groups = 0}, {"groups is 0"});
  refused(1, {.groups = 12}, {"groups is 12", "two experts"});
  refused(1, {.groups = 4, .kept_groups = 5}, {"kept_groups is 5, expected 1 to 4"});
  refused(4, {.groups = 4, .kept_groups = 1}, {"k is 4", "3 experts"});
  const Eigen::DefaultDevice device;
  ef::Tensor<std::int32_t, 2> ids(2, 3), few(1, 3);
  ef::Tensor<float, 2> weights(2, 3), narrow(2, 2), one(1, 3);
  const ef::Tensor<float, 1> bias(11);
  ids.setConstant(-7);
  expect_throws<std::invalid_argument>(
      [&] { ef::expert_routing_into(device, ids, narrow, logits); }, {"weights", "(2, 2)"});
  expect_throws<std::invalid_argument>([&] { ef::expert_routing_into(device, few, one, logits); },
                                       {"ids has 1 rows, logits has 2"});
  expect_throws<std::invalid_argument>(
      [&] { ef::expert_routing_into(device, ids, weights, logits, bias); },
      {"bias has 11 elements", "12 experts"});
  const ef::Tensor<float, 2> many(1, 2049);
  expect_throws<std::invalid_argument>([&] { ef::expert_routing(many, 1); }, {"2049 experts"});
  for (Index i = 0; i < ids.size(); ++i) EXPECT_EQ(ids.data()[i], -7);
  EXPECT_EQ(ef::expert_routing(ef::Tensor<float, 2>(0, 4), 2).ids.dimension(1), 2);
}

// ---- order by expert ----------------------------------------------------------------------------

TEST(ExpertOrder, IsAStableSortOfThePairs) {
  std::mt19937 generator(1);
  for (const Index experts : {1, 2, 7, 128})
    for (const Index tokens : {0, 1, 5, 200}) {
      const Index k = experts < 3 ? 1 : 3;
      ef::Tensor<std::int32_t, 2> ids(tokens, k);
      for (Index i = 0; i < ids.size(); ++i)
        ids.data()[i] = static_cast<std::int32_t>(generator() % static_cast<unsigned>(experts));
      if (experts == 7) ids.setConstant(4);  // one has all, the others none
      auto places = poisoned_tensor<std::int32_t, 2>({tokens, k});
      auto order = poisoned_tensor<std::int32_t, 1>({tokens * k}),
           offsets = poisoned_tensor<std::int32_t, 1>({experts + 1});
      ef::expert_order_into(Eigen::DefaultDevice{}, offsets, order, places, ids);
      std::vector<std::int32_t> expected(static_cast<std::size_t>(ids.size()));
      std::iota(expected.begin(), expected.end(), 0);
      std::stable_sort(expected.begin(), expected.end(), [&](std::int32_t a, std::int32_t b) {
        return ids.data()[a] < ids.data()[b];
      });
      for (Index i = 0; i < ids.size(); ++i) {
        const std::int32_t pair = expected[static_cast<std::size_t>(i)];
        EXPECT_EQ(order(i), pair);
        EXPECT_EQ(places.data()[pair], i);
        EXPECT_TRUE(offsets(ids.data()[pair]) <= i && i < offsets(ids.data()[pair] + 1));
      }
      EXPECT_EQ(offsets(0), 0);
      EXPECT_EQ(offsets(experts), tokens * k);
    }
}

TEST(ExpertOrder, RefusesWhatIsNoExpert) {
  ef::Tensor<std::int32_t, 2> ids(2, 2), places(2, 2), narrow(2, 1);
  ef::Tensor<std::int32_t, 1> offsets(4), order(4), few(3), one(1);
  const Eigen::DefaultDevice device;
  for (const std::int32_t bad : {-1, 3}) {
    ids.setValues({{0, 1}, {bad, 2}});
    offsets.setConstant(-7);
    expect_throws<std::invalid_argument>(
        [&] { ef::expert_order_into(device, offsets, order, places, ids); },
        {"expert_order", "id " + std::to_string(bad) + " of pair 2", "0 <= id < 3"});
    EXPECT_EQ(offsets(0), -7);
  }
  ids.setConstant(0);
  expect_throws<std::invalid_argument>(
      [&] { ef::expert_order_into(device, offsets, few, places, ids); }, {"order has 3"});
  expect_throws<std::invalid_argument>(
      [&] { ef::expert_order_into(device, offsets, order, narrow, ids); }, {"places", "(2, 1)"});
  expect_throws<std::invalid_argument>(
      [&] { ef::expert_order_into(device, one, order, places, ids); }, {"offsets has 1"});
}

}  // namespace
