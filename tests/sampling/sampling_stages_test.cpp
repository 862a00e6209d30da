// Laws: random chains of all stages in any order keep the tokens of the reference, with its
// probabilities, and draw its tokens; each stage keeps what its system keeps; a stage whose
// parameters are set must stand in the order.
#include "allocations.h"
#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

using Generator = std::mt19937_64;
using Sequences = std::vector<std::vector<std::int32_t>>;

double between(Generator& random, double least, double most) {
  return std::uniform_real_distribution<double>(least, most)(random);
}
Index below(Generator& random, Index end) {
  return static_cast<Index>(random() % static_cast<std::uint64_t>(end));
}
std::int32_t token_of(Generator& random, Index vocab) {
  return static_cast<std::int32_t>(below(random, vocab));
}

std::vector<std::int32_t> tokens_of(Generator& random, Index count, Index vocab) {
  std::vector<std::int32_t> tokens;
  for (Index i = 0; i < count; ++i) tokens.push_back(token_of(random, vocab));
  return tokens;
}

/// Every stage, those that change logits in one random order and the filters in another.
ef::SamplingOrder random_order(Generator& random) {
  ef::SamplingOrder order = ef::kHuggingFaceOrder;
  std::shuffle(order.begin(), order.begin() + 11, random);
  std::shuffle(order.begin() + 11, order.begin() + 22, random);
  return order;
}

ef::SamplingParams random_filters(Generator& random) {
  ef::SamplingParams p{.order = random_order(random)};
  const auto often = [&](int of) { return random() % static_cast<unsigned>(of) == 0; };
  if (often(2)) p.temperature = between(random, .3, 2);
  if (often(4)) p.dynatemp_range = between(random, .1, 2);
  if (often(2)) p.dynatemp_exponent = between(random, .2, 2);
  if (often(4)) p.top_k = 1 + below(random, 60);
  if (often(4)) p.top_k_ties = ef::TopKTies::keep_all;
  if (often(4)) p.top_p = between(random, 0, 1);
  if (often(4)) p.min_p = between(random, 0, .3);
  if (often(4)) p.typical_p = between(random, .1, 1);
  if (often(4)) p.top_n_sigma = between(random, .1, 3);
  if (often(4)) p.xtc_probability = 1;
  if (often(2)) p.xtc_threshold = between(random, .01, .4);
  if (often(4)) p.epsilon_cutoff = between(random, 0, .1);
  if (often(4)) p.eta_cutoff = between(random, 0, .3);
  if (often(4)) p.top_h = between(random, .05, 1);
  if (often(4)) p.mirostat = 1 + static_cast<int>(below(random, 2));
  p.mirostat_mu = between(random, .5, 8);
  if (often(3)) p.min_tokens_to_keep = 1 + below(random, 5);
  return p;
}

void set_random_processors(Generator& random, ef::SamplingParams& p, Index vocab) {
  const auto often = [&](int of) { return random() % static_cast<unsigned>(of) == 0; };
  const Index words = (std::min)(vocab, Index{1} + below(random, 12));  // few: they repeat
  p.prompt_tokens = tokens_of(random, below(random, 30), words);
  p.output_tokens = tokens_of(random, below(random, 30), words);
  if (often(2)) p.repetition_penalty = between(random, .8, 1.5);
  if (often(3)) p.frequency_penalty = between(random, -.2, .5);
  if (often(3)) p.presence_penalty = between(random, -.2, .5);
  if (often(3)) p.penalty_window = below(random, 40);
  p.penalize_log_probabilities = often(3);
  if (often(2)) p.dry_multiplier = between(random, .1, 1);
  p.dry_allowed_length = below(random, 4);
  if (often(3)) p.dry_window = below(random, 40);
  for (Index i = below(random, 3); i > 0; --i)
    p.dry_breakers.push_back(tokens_of(random, 1 + below(random, 3), words));
  if (often(3)) p.no_repeat_ngram = 2 + below(random, 3);
  for (Index i = below(random, 3); i > 0; --i)
    p.bad_words.push_back(tokens_of(random, 1 + below(random, 3), words));
  for (Index i = below(random, 4); i > 0; --i)
    p.sequence_bias.push_back({tokens_of(random, 1 + below(random, 3), words),
                               static_cast<float>(between(random, -2, 2))});
  if (often(3))
    p.logit_bias = std::vector<ef::LogitBias>{{token_of(random, vocab), 1.5f}, {0, -.25f}};
  if (often(3)) p.min_tokens = below(random, 40);
  p.stop_tokens = {token_of(random, vocab)};
  if (often(8))
    p.forced_tokens = {
        {p.output_tokens.size() == 0 ? Index{0} : Index{3}, token_of(random, vocab)}};
  if (often(3)) {
    p.guidance_row = 1;
    p.guidance_scale = between(random, .5, 3);
  }
  if (often(3)) {
    std::vector<std::uint32_t> mask(static_cast<std::size_t>((vocab + 31) / 32));
    for (std::uint32_t& word : mask) word = static_cast<std::uint32_t>(random()) | 1u << 13;
    p.token_mask = std::move(mask);
  }
}

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

}  // namespace
