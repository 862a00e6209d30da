// Laws: the distribution is that of a sort in double for every filter, order and size; ties go by
// index; draws follow the distribution and depend on (seed, position, row) only; bad rows are named
// and harm no other; speculative tokens follow the target.
#include "allocations.h"
#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

template <typename T>
class Sampling : public ::testing::Test {};
TYPED_TEST_SUITE(Sampling, EveryScalar);

TYPED_TEST(Sampling, DistributionOfEverySmallVocabulary) {
  for (Index vocab = 1; vocab <= 70; ++vocab)
    for (const auto& [name, params] : parameter_sets())
      check_distribution(random_tensor<TypeParam, 2>({2, vocab}, static_cast<unsigned>(vocab), 2.0),
                         params, name + " vocab " + std::to_string(vocab));
}

TYPED_TEST(Sampling, DistributionOfLargeVocabularies) {
  for (Index vocab : {127, 128, 129, 1000, 32000}) {
    for (double scale : {0.5, 4.0})
      for (const auto& [name, params] : parameter_sets())
        check_distribution(random_tensor<TypeParam, 2>({1, vocab}, 7, scale), params,
                           name + " vocab " + std::to_string(vocab));
  }
}

TEST(SamplingDistribution, Vocabulary128256FlatPeakedAndTied) {
  auto tied = random_tensor<float, 2>({1, 128256}, 3, 2.0);
  for (Index i = 0; i < tied.size(); ++i) tied.data()[i] = std::nearbyint(tied.data()[i]);
  for (const auto& [name, params] : parameter_sets()) {
    if (name != "top-k 50" && name != "top-p 0.9" && name != "top-p 0.3" && name != "combined" &&
        name != "typical 0.9" && name != "top-k 3000")
      continue;
    check_distribution(random_tensor<float, 2>({1, 128256}, 1, 0.01), params, name + " flat");
    check_distribution(random_tensor<float, 2>({1, 128256}, 2, 3.0), params, name + " peaked");
    check_distribution(tied, params, name + " tied");
  }
}

TEST(SamplingDistribution, EveryIsaKeepsTheSameTokens) {
  const auto logits = random_tensor<float, 2>({2, 3000}, 5, 3.0);
  const auto expected = ef::reference::sampling_probabilities(
      logits, {.temperature = .9, .top_p = .9f, .min_p = .001});
  const ef::SamplingParams params{.temperature = .9, .top_p = .9f, .min_p = .001};
  for_each_isa([&](auto tag) {
    auto actual = poisoned_tensor<float, 2>({2, 3000});
    ef::sampling_probabilities_into(on(tag), actual, logits, params);
    for (Index r = 0; r < 2; ++r) EXPECT_EQ(kept(actual, r), kept(expected, r)) << tag.name;
    EXPECT_LT(relative_error(actual, expected), 1e-6) << tag.name;
  });
}

TEST(SamplingLogits, PenaltiesBiasAndMask) {
  const std::vector<std::int32_t> prompt{0, 1, 1}, output{2, 3, 3, 1, 60};
  const std::vector<ef::LogitBias> bias{{5, 3.f}, {6, -kInfinity}, {5, .5f}};
  std::vector<std::uint32_t> mask(3, 0xFFFFFFFFu);
  mask[0] = ~(1u << 4 | 1u << 9);
  mask[2] = 0x0000000Fu;
  for (const auto order : {ef::kHuggingFaceOrder, ef::kVllmOrder, ef::kLlamaCppOrder}) {
    const ef::SamplingParams params{.temperature = .9,
                                    .top_p = .95f,
                                    .repetition_penalty = 1.3,
                                    .frequency_penalty = .4,
                                    .presence_penalty = .2,
                                    .order = order,
                                    .prompt_tokens = prompt,
                                    .output_tokens = output,
                                    .logit_bias = bias,
                                    .token_mask = mask};
    check_distribution(random_tensor<float, 2>({2, 70}, 9, 2.0), params, "adjusted float");
    check_distribution(random_tensor<double, 2>({2, 70}, 9, 2.0), params, "adjusted double");
    check_distribution(random_tensor<ef::half, 2>({2, 70}, 9, 2.0), params, "adjusted half");
  }
  // By hand: 2 and -2 both become less likely, -infinity stays; frequency counts, presence does
  // not.
  const std::vector<std::int32_t> all{0, 1, 2, 0};
  const auto p =
      ef::sampling_probabilities(row_of({2, -2, -kInfinity, 0}), {.repetition_penalty = 2,
                                                                  .frequency_penalty = .25,
                                                                  .presence_penalty = 1,
                                                                  .output_tokens = all});
  EXPECT_NEAR(std::log(p(0, 0) / p(0, 3)), 1 - .5 - 1, 1e-6);
  EXPECT_NEAR(std::log(p(0, 1) / p(0, 3)), -4 - .25 - 1, 1e-5);
  EXPECT_EQ(p(0, 2), 0.f);
}

TEST(SamplingRows, GreedyTakesTheLowestIndexOfEquals) {
  for (Index vocab : {1, 2, 7, 8, 9, 31, 33, 127, 128, 129, 255, 257, 1000, 32000}) {
    auto logits = random_tensor<float, 2>({3, vocab}, static_cast<unsigned>(vocab));
    for (Index i = 0; i < logits.size(); ++i) logits.data()[i] = std::nearbyint(logits.data()[i]);
    EXPECT_TRUE(same_bits(ef::greedy_sample(logits), ef::reference::greedy_sample(logits)))
        << vocab;
    ef::Philox rng{1};
    EXPECT_TRUE(same_bits(ef::sample(logits, {.temperature = 0}, rng),
                          ef::reference::greedy_sample(logits)))
        << vocab;
    for_each_isa([&](auto tag) {
      Ids ids(3);
      ef::greedy_sample_into(on(tag), ids, logits);
      EXPECT_TRUE(same_bits(ids, ef::reference::greedy_sample(logits))) << vocab << " " << tag.name;
    });
  }
}

TEST(SamplingRows, OnlyTheRowIsReadAtAnyAlignment) {
  for (Index vocab : {1, 5, 16, 127, 129, 300})
    for (Index offset : {0, 1, 3}) {
      std::vector<float> memory(static_cast<std::size_t>(2 * vocab + offset + 40), kNaN);
      const auto logits = random_tensor<float, 2>({2, vocab}, 4);
      std::copy(logits.data(), logits.data() + 2 * vocab, memory.begin() + offset);
      const ef::TensorView<const float, 2> view(memory.data() + offset, 2, vocab);
      EXPECT_TRUE(same_bits(ef::greedy_sample(view), ef::greedy_sample(logits)));
      const ef::SamplingParams params{.temperature = .8, .top_k = 9, .top_p = .9};
      EXPECT_TRUE(same_bits(ef::sampling_probabilities(view, params),
                            ef::sampling_probabilities(logits, params)));
    }
}

TEST(SamplingRows, BadRowsAreNamedAndHarmNoOther) {
  for (Index at : {0, 63, 129}) {
    const auto good = random_tensor<float, 2>({5, 130}, 8);
    auto logits = good;
    logits(1, at) = kNaN;
    logits(2, at) = kInfinity;
    for (Index v = 0; v < 130; ++v) logits(3, v) = -kInfinity;
    ef::Philox rng{3}, same{3};
    const std::vector<ef::SampleStatus> expected{ef::SampleStatus::ok, ef::SampleStatus::nan,
                                                 ef::SampleStatus::positive_infinity,
                                                 ef::SampleStatus::no_token, ef::SampleStatus::ok};
    std::vector<ef::SampleStatus> statuses(5);
    Ids ids(5), alone = ef::sample(good, {.top_k = 20}, same);
    ef::sample_into(Eigen::DefaultDevice{}, ids, logits, {.top_k = 20}, rng, statuses);
    EXPECT_EQ(statuses, expected);
    for (Index r = 0; r < 5; ++r) EXPECT_EQ(ids(r), r == 0 || r == 4 ? alone(r) : -1);
    EXPECT_EQ(rng.position(), 1u);
    statuses.assign(5, ef::SampleStatus::ok);
    ef::greedy_sample_into(Eigen::DefaultDevice{}, ids, logits, statuses);
    EXPECT_EQ(statuses, expected);
    EXPECT_EQ(ids(4), ef::greedy_sample(good)(4));
    expect_throws<std::invalid_argument>([&] { ef::greedy_sample(logits); },
                                         {"greedy_sample", "row 1", "NaN"});
    logits(1, at) = 0;
    expect_throws<std::invalid_argument>([&] { ef::sample(logits, {}, rng); },
                                         {"sample", "row 2", "+infinity"});
    logits(2, at) = 0;
    expect_throws<std::invalid_argument>([&] { ef::top_k_sample(logits, 3, 1.f, rng); },
                                         {"top_k_sample", "row 3", "-infinity"});
    expect_throws<std::invalid_argument>(
        [&] { ef::sampling_probabilities(logits, {.temperature = 0}); }, {"row 3"});
    EXPECT_EQ(rng.position(), 1u);
  }
  const std::vector<std::uint32_t> nothing(1, 0u);
  expect_throws<std::invalid_argument>(
      [&] {
        ef::sampling_probabilities(row_of({1, 2}), {.token_mask = nothing});
      },
      {"row 0", "no token is left"});
}

TEST(SamplingRows, RefusesWithTheArgumentNamed) {
  ef::Philox rng{1};
  const auto logits = row_of({1, 2, 3});
  const auto refused = [&](const ef::SamplingParams& params,
                           const std::vector<std::string>& fragments) {
    expect_throws<std::invalid_argument>([&] { ef::sample(logits, params, rng); }, fragments);
    expect_throws<std::invalid_argument>([&] { ef::sampling_probabilities(logits, params); },
                                         fragments);
  };
  const double nan = std::nan("");
  refused({.temperature = -1}, {"sampl", "temperature", "-1"});
  refused({.temperature = nan}, {"temperature"});
  refused({.temperature = HUGE_VAL}, {"temperature"});
  refused({.top_k = -1}, {"top_k is -1"});
  refused({.top_k = std::numeric_limits<Index>::min()}, {"top_k is -"});
  refused({.top_p = nan}, {"top_p is NaN"});
  refused({.min_p = nan}, {"min_p"});
  refused({.min_p = -.1}, {"min_p"});
  refused({.typical_p = nan}, {"typical_p"});
  refused({.repetition_penalty = 0}, {"repetition_penalty"});
  refused({.repetition_penalty = nan}, {"repetition_penalty"});
  refused({.frequency_penalty = nan}, {"frequency_penalty"});
  refused({.presence_penalty = HUGE_VAL}, {"presence_penalty"});
  const std::vector<std::int32_t> bad{1, 3}, negative{-1};
  refused({.prompt_tokens = bad}, {"prompt_tokens[1] is 3", "3)"});
  refused({.output_tokens = negative}, {"output_tokens[0] is -1"});
  constexpr auto largest = std::numeric_limits<std::int32_t>::max();
  refused({.prompt_tokens = {largest}}, {"prompt_tokens[0] is 2147483647"});
  refused({.output_tokens = {0, -largest - 1}}, {"output_tokens[1] is -2147483648"});
  refused({.logit_bias = {{largest, 1.f}}}, {"logit_bias[0]", "token 2147483647"});
  refused({.logit_bias = {{-1, 1.f}}}, {"logit_bias[0]", "token -1"});
  const std::vector<ef::LogitBias> bias{{4, 1.f}}, infinite{{0, kInfinity}}, unknown{{0, kNaN}};
  refused({.logit_bias = bias}, {"logit_bias[0]", "token 4"});
  refused({.logit_bias = infinite}, {"logit_bias[0]", "inf"});
  refused({.logit_bias = unknown}, {"logit_bias[0]", "nan"});
  const std::vector<std::uint32_t> words(2, 7u);
  refused({.token_mask = words}, {"token_mask has 2 words", "1"});
  auto order = ef::kHuggingFaceOrder;
  order[13] = order[14];
  refused({.order = order}, {"order has stage top_p at place 14 again", "once"});
  order[13] = static_cast<ef::SamplingStage>(23);
  refused({.order = order}, {"order has stage 23 at place 13"});
  using enum ef::SamplingStage;
  refused({.order = {temperature, penalties}},
          {"stage penalties at place 1", "before all filters"});
  refused({.order = {temperature, none, top_k}}, {"stage top_k at place 2 after none"});
  refused({.top_k = 2, .order = {penalties, top_p}}, {"order has no stage top_k"});
  refused({.temperature = .5, .order = {}}, {"order has no stage temperature"});
  expect_throws<std::invalid_argument>([&] { ef::top_k_sample(logits, 0, 1.f, rng); },
                                       {"top_k_sample", "top_k is 0"});
  expect_throws<std::invalid_argument>(
      [&] { ef::top_k_sample(logits, std::numeric_limits<Index>::min(), 1.f, rng); },
      {"top_k_sample", "top_k is -"});
  Ids own_ids(1);
  expect_throws<std::invalid_argument>(
      [&] { ef::top_k_sample_into(Eigen::DefaultDevice{}, own_ids, logits, 0, 1., rng); },
      {"top_k_sample", "top_k is 0"});
  expect_throws<std::invalid_argument>([&] { ef::top_p_sample(logits, .5f, -1.f, rng); },
                                       {"top_p_sample", "temperature"});
  const ef::Tensor<float, 2> no_vocabulary(2, 0);
  expect_throws<std::invalid_argument>([&] { ef::greedy_sample(no_vocabulary); },
                                       {"vocabulary of 0"});
  expect_throws<std::invalid_argument>([&] { ef::sample(no_vocabulary, {.temperature = 1}, rng); },
                                       {"vocabulary of 0"});
  std::vector<ef::SamplingParams> two(2);
  expect_throws<std::invalid_argument>([&] { ef::sample(logits, two, rng); },
                                       {"params has 2 sets", "1 rows"});
  const ef::Tensor<float, 2> rows = random_tensor<float, 2>({2, 4}, 1);
  two[1].top_k = -3;
  expect_throws<std::invalid_argument>([&] { ef::sample(rows, two, rng); },
                                       {"params of row 1", "top_k is -3"});
  std::vector<ef::Philox> one(1);
  expect_throws<std::invalid_argument>([&] { ef::sample(rows, {.top_k = 1}, one); },
                                       {"rng has 1 generators", "2 rows"});
  Ids short_ids(1);
  expect_throws<std::invalid_argument>(
      [&] { ef::greedy_sample_into(Eigen::DefaultDevice{}, short_ids, rows); },
      {"ids has 1", "2 rows"});
  EXPECT_EQ(rng.position(), 0u);
  EXPECT_EQ(one[0].position(), 0u);
}

// Sizes at the limits are told from those past them before any memory is read.
TEST(SamplingRows, SizesAtTheirLimits) {
  constexpr Index largest = std::numeric_limits<std::int32_t>::max();
  ef::Philox rng{1};
  const ef::TensorView<const float, 2> empty(nullptr, 0, largest);
  EXPECT_EQ(ef::greedy_sample(empty).size(), 0);
  EXPECT_EQ(ef::sample(empty, {.top_p = .5}, rng).size(), 0);  // without scratch for 2^31 tokens
  EXPECT_EQ(ef::sample_with_log_probabilities(empty, {}, rng).ids.size(), 0);
  if constexpr (sizeof(Index) > 4) {
    const auto too_many = static_cast<Index>(std::int64_t{1} << 31),
               rows = static_cast<Index>((std::int64_t{1} << 32) + 1);
    expect_throws<std::invalid_argument>(
        [&] { ef::greedy_sample(ef::TensorView<const float, 2>(nullptr, 0, too_many)); },
        {"vocabulary of 2147483648"});
    const ef::TensorView<const float, 2> tall(nullptr, rows, 1);
    ef::TensorView<std::int32_t, 1> ids(nullptr, rows);
    expect_throws<std::invalid_argument>(
        [&] { ef::sample_into(Eigen::DefaultDevice{}, ids, tall, {.top_k = 1}, rng); },
        {"rng is one generator", "4294967297 rows"});
    const Index drafts = (Index{1} << 28) + 1;
    const ef::TensorView<const std::int32_t, 2> tokens(nullptr, 0, drafts);
    const ef::TensorView<const float, 3> q(nullptr, 0, drafts, 1), p(nullptr, 0, drafts + 1, 1);
    expect_throws<std::invalid_argument>([&] { ef::verify_speculative(tokens, q, p, rng); },
                                         {"draft_tokens has 268435457 columns"});
  }
  EXPECT_EQ(rng.position(), 2u);
}

// -infinity stays what it is where the penalties themselves overflow, and a row made +infinite is
// told.
TEST(SamplingLogits, PenaltiesThatOverflow) {
  const ef::SamplingParams params{
      .frequency_penalty = -1e308, .presence_penalty = 1e308, .output_tokens = {1, 1, 1}};
  EXPECT_EQ(kept_by(row_of({0, -kInfinity, 0}), params), (Set{0, 2}));
  Ids ids(2);
  std::vector<ef::SampleStatus> statuses(2);
  ef::Philox rng{1};
  ef::Tensor<float, 2> two(2, 3);
  two.setZero();
  std::vector<ef::SamplingParams> rows(2);
  rows[0] = params;
  ef::sample_into(Eigen::DefaultDevice{}, ids, two, rows, rng, statuses);
  EXPECT_EQ(statuses[0], ef::SampleStatus::positive_infinity);
  EXPECT_EQ(statuses[1], ef::SampleStatus::ok);
  EXPECT_EQ(ids(0), -1);
}

// Parameters and generators that are kept in a variable own what had no name.
TEST(SamplingLogits, StoredParametersOwnTemporaries) {
  const auto make = [](std::int32_t token) {
    std::vector<std::uint32_t> mask(2, 0xFFFFFFFFu);
    mask[0] = ~(1u << 3);
    return ef::SamplingParams{.presence_penalty = 2,
                              .prompt_tokens = {token},
                              .output_tokens = std::vector<std::int32_t>{1, 2, token},
                              .logit_bias = {{5, -kInfinity}, {6, 2.f}},
                              .token_mask = std::move(mask)};
  };
  const std::vector<std::int32_t> prompt{4}, output{1, 2, 4};
  const std::vector<ef::LogitBias> bias{{5, -kInfinity}, {6, 2.f}};
  const std::vector<std::uint32_t> mask{~(1u << 3), 0xFFFFFFFFu};
  const ef::SamplingParams viewed{.presence_penalty = 2,
                                  .prompt_tokens = prompt,
                                  .output_tokens = output,
                                  .logit_bias = bias,
                                  .token_mask = mask};
  const auto logits = random_tensor<float, 2>({2, 64}, 3);
  const ef::SamplingParams stored = make(4);
  const std::vector<std::int32_t> other(100, 7);  // memory that a dangling view might see
  const auto expected = ef::sampling_probabilities(logits, viewed);
  EXPECT_TRUE(same_bits(ef::sampling_probabilities(logits, stored), expected));
  const std::vector<ef::SamplingParams> rows{make(4), make(4)};
  EXPECT_TRUE(same_bits(ef::sampling_probabilities(logits, rows), expected));
  const ef::Generators generator = ef::Philox{9};
  EXPECT_TRUE(
      same_bits(ef::sample(logits, rows, generator), ef::sample(logits, viewed, ef::Philox{9})));
}

TEST(SamplingDraws, DestinationFormsAllocateNothing) {
  const auto logits = random_tensor<float, 2>({4, 3000}, 6, 2.0);
  const std::vector<std::int32_t> history{1, 2, 3};
  const ef::SamplingParams params{.temperature = .9,
                                  .top_k = 500,
                                  .top_p = .9,
                                  .typical_p = .95,
                                  .presence_penalty = 1,
                                  .output_tokens = history};
  Ids ids(4);
  ef::Tensor<float, 2> distribution(4, 3000);
  std::vector<ef::SampleStatus> statuses(4);
  ef::Philox rng{1};
  ef::Workspace workspace;
  const Eigen::DefaultDevice device;
  const auto calls = [&] {
    ef::greedy_sample_into(device, ids, logits, statuses, workspace);
    ef::sample_into(device, ids, logits, params, rng, statuses, workspace);
    ef::top_k_sample_into(device, ids, logits, 50, 1.0, rng, statuses, workspace);
    ef::sampling_probabilities_into(device, distribution, logits, params, statuses, workspace);
  };
  calls();
  EXPECT_EQ(count_allocations(calls), 0);
}

}  // namespace
