// Laws: random chains of all stages in any order keep the tokens of the reference, with its
// probabilities, and draw its tokens; each stage keeps what its system keeps; a stage whose
// parameters are set must stand in the order.
#include "allocations.h"
#include "random_chains.h"

using namespace eigenformer_test;

namespace {

using Sequences = std::vector<std::vector<std::int32_t>>;

/// Whether the reference has a token to draw.
bool has_token(const ef::Tensor<double, 2>& logits, const ef::SamplingParams& p) {
  std::vector<double> x = ef::reference::row_in_double(logits, 0);
  for (const ef::SamplingStage stage : p.order)
    if (stage <= ef::SamplingStage::function) ef::reference::adjust_logits(x, stage, p, logits);
  return *std::max_element(x.begin(), x.end()) > -HUGE_VAL;
}

TEST(SamplingStages, RandomChainsOfAllFilters) {
  Generator random(1);
  for (int trial = 0; trial < 4000; ++trial) {
    const Index vocab = 1 + below(random, trial % 40 == 0 ? 3000 : 300);
    const ef::SamplingParams p = random_filters(random);
    auto logits =
        random_tensor<double, 2>({1, vocab}, static_cast<unsigned>(trial), between(random, .01, 4));
    if (trial % 3 == 0)
      for (Index v = 0; v < vocab; ++v) logits(0, v) = std::nearbyint(logits(0, v));
    check_distribution(logits, p, "chain " + std::to_string(trial));
    if (HasFatalFailure()) return;
  }
}

TEST(SamplingStages, RandomChainsOfAllStages) {
  Generator random(2);
  int checked = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    const Index vocab = 2 + below(random, 150);
    ef::SamplingParams p = trial % 2 == 0 ? random_filters(random) : ef::SamplingParams{};
    p.order = random_order(random);
    set_random_processors(random, p, vocab);
    const auto logits = random_tensor<double, 2>({2, vocab}, static_cast<unsigned>(trial), 3);
    if (!has_token(logits, p)) continue;
    ef::Tensor<double, 2> first = ef::reference::sampling_probabilities(logits, p);
    std::vector<ef::SamplingParams> rows(2);
    rows[0] = p;
    const auto actual = ef::sampling_probabilities(logits, rows);
    for (Index v = 0; v < vocab; ++v)
      ASSERT_NEAR(actual(0, v), first(0, v), 1e-6) << "chain " << trial << " token " << v;
    ++checked;
  }
  EXPECT_GT(checked, 3000);
}

TEST(SamplingStages, DrawsAreThoseOfTheReference) {
  Generator random(3);
  for (int trial = 0; trial < 1000; ++trial) {
    const Index vocab = 1 + below(random, 200);
    ef::SamplingParams p = random_filters(random);
    p.xtc_probability = .5;
    const auto logits = random_tensor<double, 2>({2, vocab}, static_cast<unsigned>(trial), 2);
    ef::Philox rng{static_cast<std::uint64_t>(trial)};
    const ef::Philox same = rng;
    const auto ids = ef::sample(logits, p, rng);
    for (Index r = 0; r < 2; ++r)
      ASSERT_EQ(ids(r),
                ef::reference::sampled_token(logits, r, p, same, static_cast<std::uint32_t>(r)))
          << trial;
  }
}

TEST(SamplingStages, AFunctionOfTheCallers) {
  const auto logits = random_tensor<float, 2>({3, 50}, 4, 2);
  const auto doubled = [](Index row, Index token, float logit) {
    return token == row ? -kInfinity : 2 * logit;
  };
  auto by_hand = logits;
  for (Index r = 0; r < 3; ++r)
    for (Index v = 0; v < 50; ++v) by_hand(r, v) = doubled(r, v, logits(r, v));
  const ef::SamplingParams params{.top_p = .9};
  EXPECT_TRUE(same_bits(ef::sampling_probabilities(logits, params, doubled),
                        ef::sampling_probabilities(by_hand, params)));
  ef::Philox rng{5}, same{5};
  EXPECT_TRUE(same_bits(ef::sample(logits, params, rng, doubled),
                        ef::sample(Eigen::DefaultDevice{}, by_hand, params, same)));
  Ids ids(3);
  ef::Workspace workspace;
  ef::sample_into(Eigen::DefaultDevice{}, ids, logits, params, rng, {}, workspace, doubled);
  EXPECT_TRUE(same_bits(ids, ef::sample(by_hand, params, same)));
  // After the biases, before the temperature; where it stands in the order it runs.
  const ef::SamplingParams bias{.temperature = .5, .logit_bias = {{7, 3.f}}};
  ef::SamplingParams first = bias;
  std::swap(*std::find(first.order.begin(), first.order.end(), ef::SamplingStage::function),
            *std::find(first.order.begin(), first.order.end(), ef::SamplingStage::logit_bias));
  EXPECT_TRUE(same_bits(ef::sampling_probabilities(logits, first, doubled),
                        ef::sampling_probabilities(by_hand, bias)));
  EXPECT_FALSE(same_bits(ef::sampling_probabilities(logits, bias, doubled),
                         ef::sampling_probabilities(by_hand, bias)));
  expect_throws<std::invalid_argument>(
      [&] { ef::sample(logits, {.order = {ef::SamplingStage::temperature}}, rng, doubled); },
      {"sample", "order has no stage function"});
}

// One token, all tokens alike, tokens at -infinity, a prefix of none: every filter leaves at least
// one token, and none at -infinity.
TEST(SamplingStages, EdgesOfEveryFilter) {
  const std::vector<ef::SamplingParams> alone{
      {.top_n_sigma = .1},
      {.top_n_sigma = 1e300},
      {.xtc_probability = 1, .xtc_threshold = .01},
      {.epsilon_cutoff = 1},
      {.eta_cutoff = .9},
      {.top_h = 0},
      {.top_h = -1},
      {.top_h = .5},
      {.mirostat = 1, .mirostat_mu = -5},
      {.mirostat = 1, .mirostat_mu = 1000},
      {.mirostat = 2, .mirostat_mu = -5},
      {.mirostat = 2, .mirostat_mu = 1e6},
      {.temperature = .5, .dynatemp_range = .5},
      {.temperature = 0, .dynatemp_range = .5, .dynatemp_exponent = 0},
      {.min_p = 7},
      {.min_p = kInfinity},
      {.top_p = -1, .min_tokens_to_keep = 1000000},
      {.top_k = 1, .typical_p = 0, .min_tokens_to_keep = 3}};
  for (std::size_t i = 0; i < alone.size(); ++i)
    for (const auto& logits :
         {row_of<double>({3}), row_of<double>({2, 2, 2, 2}), row_of<double>({1, -HUGE_VAL, 1}),
          row_of<double>({0, -HUGE_VAL, -1, -1e308}), row_of<double>({1e308, -1e308, 0}),
          row_of<double>({-HUGE_VAL, 5}), row_of<double>({0, -1e-300, -1e-17, -800})})
      check_distribution(logits, alone[i], "edge " + std::to_string(i));
  EXPECT_EQ(kept_by(row_of({2, 2, 1, 2}), {.top_n_sigma = .1}), (Set{0, 1, 3}));
  EXPECT_EQ(kept_by(row_of({0, -1}), {.top_n_sigma = 2}), (Set{0, 1}));
  EXPECT_EQ(kept_by(row_of({0, -1}), {.top_n_sigma = 2 - 2e-12}), (Set{0}));  // no float's bound
  EXPECT_EQ(kept_by(row_of({0, 0, 0, 0}), {.top_h = .5}), (Set{0, 1}));
  EXPECT_EQ(kept_by(row_of({0, 0, 0, 0}), {.top_h = .49}), (Set{0}));
  EXPECT_EQ(kept_by(row_of({0, 0, 0, 0}), {.epsilon_cutoff = .3}), (Set{0, 1, 2, 3}));
  EXPECT_EQ(kept_by(row_of({0, 0, 0, 0}), {.mirostat = 2, .mirostat_mu = 1.9}), (Set{0}));
  EXPECT_EQ(kept_by(row_of({0, 0, 0, 0}), {.mirostat = 2, .mirostat_mu = 2}), (Set{0, 1, 2, 3}));
  EXPECT_EQ(kept_by(row_of({1, 3, 2}), {.min_p = 1.5}), (Set{1}));
}

// Of the entropy of a row that one token has, which is 0, no other token has a part.
TEST(SamplingStages, TopHOfOneTokenThatHasItAll) {
  for (Index vocab : {300, 5000, 9000})
    for (double gap : {1.0, 20.0, 800.0, 1e30})
      for (double temperature : {1.0, .001}) {
        auto row = random_tensor<float, 2>({1, vocab}, 5, .1);
        row = row - row.constant(static_cast<float>(gap));
        row(0, 7) = 1;
        const ef::SamplingParams params{
            .temperature = temperature, .order = ef::kLlamaCppOrder, .top_h = .4};
        ef::SamplingParams hot = params;
        hot.order = ef::kHuggingFaceOrder;
        for (const auto& p : {params, hot}) {
          check_distribution(row, p, "float");
          check_distribution(ef::Tensor<double, 2>(row.cast<double>()), p, "double");
        }
      }
}

// XTC leaves the least of the top choices, of equals the last, and what follows it sees the rest.
TEST(SamplingStages, XtcAndWhatFollows) {
  using enum ef::SamplingStage;
  const auto logits = log_of({.3, .1, .3, .1, .3 - .2, .1});
  const ef::SamplingParams out{.xtc_probability = 1, .xtc_threshold = .2};
  EXPECT_EQ(kept_by(logits, out), (Set{1, 2, 3, 4, 5}));
  ef::SamplingParams then = out;
  then.order = {xtc, temperature, top_k, top_p, min_p, typical_p};
  then.temperature = 0;
  EXPECT_EQ(kept_by(logits, then), (Set{2}));
  then.temperature = 1;
  then.top_k = 2;
  EXPECT_EQ(kept_by(logits, then), (Set{1, 2}));
  ef::SamplingParams all = out;
  all.min_tokens_to_keep = 6;
  EXPECT_EQ(kept_by(logits, all).size(), 6u);
  // the top choice of all equals is the last, of which nothing else is left
  EXPECT_EQ(kept_by(row_of({0, 0, 0}), {.xtc_probability = 1, .xtc_threshold = .3}), (Set{2}));
  // Blocks whose largest token is excluded.
  auto large = random_tensor<float, 2>({1, 1000}, 3, .3);
  for (Index v : {100, 300, 500, 700}) large(0, v) = 9;
  then = {.top_k = 3, .order = {xtc, top_k}, .xtc_probability = 1, .xtc_threshold = .1};
  check_distribution(large, then, "xtc, top-k");
  EXPECT_EQ(kept_by(large, then).count(700), 1u);
  EXPECT_EQ(kept_by(large, then).count(100), 0u);
}

// The coin is a number of its own: it leaves the number that the token is drawn with, and falls as
// often as it should.
TEST(SamplingStages, XtcDrawsACoin) {
  const auto logits = log_of({.5, .5});
  int excluded = 0;
  for (std::uint64_t seed = 0; seed < 4000; ++seed) {
    ef::Philox rng{seed};
    const bool coin = rng.uniform(0, 0, ef::Philox::Purpose::exclusion) <= .3;
    const double u = rng.uniform(0);
    const auto id = ef::sample(logits, {.xtc_probability = .3, .xtc_threshold = .4}, rng)(0);
    ASSERT_EQ(id, coin || u > .5 ? 1 : 0) << seed;
    excluded += coin;
  }
  EXPECT_NEAR(excluded, 1200, 150);
  const std::vector<std::int32_t> token{0};
  const ef::SamplingParams half{.xtc_probability = .5};
  expect_throws<std::invalid_argument>([&] { ef::sampling_probabilities(logits, half); },
                                       {"sampling_probabilities", "xtc_probability is 0.5"});
  expect_throws<std::invalid_argument>([&] { ef::log_probabilities_of(logits, token, half); },
                                       {"log_probabilities_of", "xtc_probability is 0.5"});
}

TEST(SamplingStages, GuidanceAndBadRows) {
  auto logits = random_tensor<float, 2>({3, 20}, 4, 2);
  std::vector<ef::SamplingParams> params(3);
  params[0] = {.guidance_scale = 2, .guidance_row = 2};
  const auto guided = ef::sampling_probabilities(logits, params);
  EXPECT_FALSE(same_bits(guided, ef::sampling_probabilities(logits, ef::SamplingParams{})));
  logits(0, 3) = -kInfinity;
  logits(2, 4) = -kInfinity;
  const auto without = ef::sampling_probabilities(logits, params);
  EXPECT_EQ(without(0, 3), 0.f);
  EXPECT_EQ(without(0, 4), 0.f);
  logits(2, 5) = kNaN;
  Ids ids(3);
  std::vector<ef::SampleStatus> statuses(3);
  ef::sample_into(Eigen::DefaultDevice{}, ids, logits, params, ef::Philox{1}, statuses);
  EXPECT_EQ(statuses,
            (std::vector{ef::SampleStatus::nan, ef::SampleStatus::ok, ef::SampleStatus::nan}));
}

// A history of one token, which every part of the search looks at again, in time of its length: a
// quadratic search of 200,000 tokens would take minutes.
TEST(SamplingStages, LongHistories) {
  const std::vector<std::int32_t> same(200000, 3);
  const auto logits = random_tensor<float, 2>({1, 10}, 4, 2);
  const auto p = ef::sampling_probabilities(
      logits, {.output_tokens = same, .dry_multiplier = 1e30, .dry_base = 2, .no_repeat_ngram = 0});
  EXPECT_EQ(p(0, 3), 0.f);
  EXPECT_EQ(kept_by(logits, {.output_tokens = same, .no_repeat_ngram = 100000}).count(3), 0u);
  EXPECT_EQ(kept_by(logits, {.output_tokens = same, .no_repeat_ngram = 200002}).size(), 10u);
}

TEST(SamplingStages, EmptyHistories) {
  const auto logits = random_tensor<float, 2>({1, 10}, 4, 2);
  const ef::SamplingParams params{.repetition_penalty = 2,
                                  .penalty_window = 3,
                                  .dry_multiplier = 1,
                                  .dry_allowed_length = 0,
                                  .dry_breakers = {{1}},
                                  .no_repeat_ngram = 1,
                                  .bad_words = {{1, 2}},
                                  .sequence_bias = {{{4, 5}, 1.f}}};
  EXPECT_TRUE(same_bits(ef::sampling_probabilities(logits, params),
                        ef::sampling_probabilities(logits, ef::SamplingParams{})));
}

TEST(SamplingStages, RefusesWithTheArgumentNamed) {
  const auto logits = row_of({1, 2, 3});
  const auto refused = [&](const ef::SamplingParams& params,
                           const std::vector<std::string>& fragments) {
    ef::Philox rng{1};
    expect_throws<std::invalid_argument>([&] { ef::sample(logits, params, rng); }, fragments);
    EXPECT_EQ(rng.position(), 0u);
  };
  const double nan = std::nan("");
  refused({.min_tokens_to_keep = 0}, {"min_tokens_to_keep is 0"});
  refused({.top_n_sigma = nan}, {"top_n_sigma is NaN"});
  refused({.xtc_probability = 1.5}, {"xtc_probability is 1.5", "0 to 1"});
  refused({.xtc_threshold = 0}, {"xtc_threshold is 0", "above 0"});
  refused({.epsilon_cutoff = -1}, {"epsilon_cutoff is -1"});
  refused({.eta_cutoff = nan}, {"eta_cutoff is nan"});
  refused({.top_h = nan}, {"top_h is NaN"});
  refused({.dynatemp_range = -1}, {"dynatemp_range is -1"});
  refused({.dynatemp_range = HUGE_VAL}, {"dynatemp_range is inf"});
  refused({.dynatemp_exponent = nan}, {"dynatemp_exponent is nan"});
  refused({.mirostat = 3}, {"mirostat is 3"});
  refused({.mirostat_mu = nan}, {"mirostat_mu is nan"});
  refused({.penalty_window = -1}, {"penalty_window is -1"});
  refused({.dry_multiplier = -1}, {"dry_multiplier is -1"});
  refused({.dry_base = .5}, {"dry_base is 0.5"});
  refused({.dry_allowed_length = -1}, {"dry_allowed_length is -1"});
  refused({.dry_window = -1}, {"dry_window is -1"});
  refused({.dry_breakers = {{}}}, {"dry_breakers[0] is empty"});
  refused({.no_repeat_ngram = -1}, {"no_repeat_ngram is -1"});
  refused({.bad_words = {{1}, {2, 3}}}, {"bad_words[1] has token 3", "[0, 3)"});
  refused({.sequence_bias = {{{-1}, 1.f}}}, {"sequence_bias[0] has token -1"});
  refused({.sequence_bias = {{{1}, kInfinity}}}, {"sequence_bias[0] is inf"});
  refused({.min_tokens = -1}, {"min_tokens is -1"});
  refused({.stop_tokens = {3}}, {"stop_tokens[0] is 3"});
  refused({.forced_tokens = {{0, 9}}}, {"forced_tokens[0] is 9"});
  refused({.guidance_scale = 2}, {"guidance_scale is 2", "guidance_row names no row"});
  refused({.guidance_row = 1}, {"guidance_row is 1"});
  refused({.guidance_scale = nan}, {"guidance_scale is nan"});
  using enum ef::SamplingStage;
  for (const auto& params : std::vector<ef::SamplingParams>{
           {.order = {top_k}, .xtc_probability = .5}, {.order = {top_k}, .bad_words = {{1}}}})
    refused(params, {"order has no stage", "whose parameters are set"});
}

TEST(SamplingStages, NothingIsAllocated) {
  Generator random(9);
  constexpr Index vocab = 500;
  const auto logits = random_tensor<float, 2>({3, vocab}, 6, 2.0);
  std::vector<ef::SamplingParams> params(3);
  for (ef::SamplingParams& p : params) {
    p = random_filters(random);
    set_random_processors(random, p, vocab);
    p.xtc_probability = .5;
  }
  Ids ids(3);
  std::vector<ef::SampleStatus> statuses(3);
  ef::Workspace workspace;
  const auto call = [&] {
    ef::sample_into(Eigen::DefaultDevice{}, ids, logits, params, ef::Philox{3}, statuses,
                    workspace);
  };
  call();
  EXPECT_EQ(count_allocations(call), 0);
}

// The same bits for a row alone and in a batch, on any number of threads and every ISA.
TEST(SamplingStages, SameBitsAloneInABatchAndOnThreads) {
  Generator random(8);
  constexpr Index rows = 7, vocab = 700;
  const auto logits = random_tensor<float, 2>({rows, vocab}, 6, 2.0);
  std::vector<ef::SamplingParams> params(rows);
  for (ef::SamplingParams& p : params) {
    p = random_filters(random);
    set_random_processors(random, p, vocab);
    p.guidance_row = -1;
    p.guidance_scale = 1;
  }
  expect_same_in_all_ways(logits, params);
}

}  // namespace
