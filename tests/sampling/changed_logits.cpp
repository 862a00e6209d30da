// Laws: a row of which stages change few logits, or ban them by a mask, gives the bits of a row
// that was changed by hand, whatever the chain, the scalar and the vocabulary; what is wrong with
// the row as given stays wrong under a mask.
#include <numeric>

#include "allocation_count.h"
#include "random_chains.h"

using namespace eigenformer_test;

namespace {

/// Whole blocks of 128 tokens, parts of one, and rows that filters list.
Index random_vocab(Generator& random, int trial) {
  constexpr std::array<Index, 8> sizes{1, 31, 127, 128, 129, 256, 300, 1025};
  return trial % 16 == 0 ? 4097 + below(random, 3000)
                         : sizes[random() % sizes.size()] + below(random, 3);
}

/// Few tokens, many, whole words, all.
std::vector<std::uint32_t> random_mask(Generator& random, Index vocab) {
  std::vector<std::uint32_t> mask(static_cast<std::size_t>((vocab + 31) / 32));
  const auto kind = random() % 4;
  for (std::uint32_t& word : mask) {
    const auto bits = static_cast<std::uint32_t>(random());
    word = kind == 0   ? (random() % 8 == 0 ? bits & bits >> 7 : 0)
           : kind == 1 ? bits | bits << 9
           : kind == 2 ? (random() % 2 == 0 ? ~std::uint32_t{0} : 0)
                       : ~std::uint32_t{0};
  }
  mask[random() % mask.size()] |= 1u;
  return mask;
}

/// Stages that change few logits, of a history that may be long, and the mask.
void set_processors_of_few(Generator& random, ef::SamplingParams& p, Index vocab) {
  set_random_processors(random, p, vocab);
  p.guidance_row = -1;
  p.guidance_scale = 1;
  p.forced_tokens = {};
  p.penalize_log_probabilities = false;
  if (random() % 3 == 0) {
    p.prompt_tokens = tokens_of(random, below(random, 300), vocab);
    p.output_tokens = tokens_of(random, below(random, 300), vocab);
  }
  if (random() % 2 == 0) p.token_mask = random_mask(random, vocab);
}

/// The logits after all stages that change them: a function after them sees these.
template <typename T>
auto changed_by_hand(const ef::Tensor<T, 2>& logits, ef::SamplingParams p) {
  using C = ef::compute_type<T>;
  ef::Tensor<C, 2> changed(1, logits.dimension(1));
  const auto last = std::find_if(p.order.begin(), p.order.end(), [](ef::SamplingStage stage) {
    return stage > ef::SamplingStage::function;
  });
  std::rotate(std::find(p.order.begin(), last, ef::SamplingStage::function),
              std::find(p.order.begin(), last, ef::SamplingStage::function) + 1, last);
  ef::sampling_probabilities(Eigen::DefaultDevice{}, logits, p, [&](Index, Index token, C logit) {
    return changed(0, token) = logit;
  });
  return changed;
}

template <typename T>
void check_random_chains(unsigned seed, int trials) {
  Generator random(seed);
  for (int trial = 0; trial < trials; ++trial) {
    const Index vocab = random_vocab(random, trial);
    const ef::SamplingParams filters = random_filters(random);
    ef::SamplingParams p = filters;
    set_processors_of_few(random, p, vocab);
    auto logits = random_tensor<T, 2>({1, vocab}, static_cast<unsigned>(trial) + seed,
                                      between(random, .01, 4));
    if (trial % 5 == 0) logits(0, below(random, vocab)) = -std::numeric_limits<T>::infinity();
    const std::string what = "seed " + std::to_string(seed) + " trial " + std::to_string(trial);
    std::vector<ef::SampleStatus> status(1);
    ef::Tensor<float, 2> actual(1, vocab);
    ef::sampling_probabilities_into(Eigen::DefaultDevice{}, actual, logits, p, status);
    if (status[0] != ef::SampleStatus::ok) {
      EXPECT_EQ(status[0], ef::SampleStatus::no_token) << what;
      continue;
    }
    const auto changed = changed_by_hand(logits, p);
    ASSERT_TRUE(same_bits(actual, ef::sampling_probabilities(changed, filters))) << what;
    const auto rng = [&] { return ef::Philox{static_cast<std::uint64_t>(trial)}; };
    const ef::LogProbabilityOptions best{.best = (std::min)(vocab, Index{3})};
    const auto drawn = ef::sample_with_log_probabilities(logits, p, rng(), best),
               expected = ef::sample_with_log_probabilities(changed, filters, rng(), best);
    ASSERT_TRUE(same_bits(drawn.ids, expected.ids)) << what;
    ASSERT_TRUE(same_bits(drawn.processed_log_probabilities, expected.processed_log_probabilities))
        << what;
    ASSERT_TRUE(same_bits(ef::log_probabilities_of(logits, drawn.ids, p),
                          ef::log_probabilities_of(changed, drawn.ids, filters)))
        << what;
  }
}

TEST(SamplingChanges, RowsAreThoseChangedByHand) {
  check_random_chains<float>(1, 2500);
  check_random_chains<double>(2, 700);
  check_random_chains<ef::bfloat16>(3, 700);
  check_random_chains<Eigen::half>(4, 700);
}

// What the penalties found out about the maxima is not true of the tokens that XTC leaves. Min-p
// keeps all tokens here: so hot, the lowest float weighs more than 1e-30.
TEST(SamplingChanges, TopKAfterTokensAreExcluded) {
  constexpr Index vocab = 8192;
  ef::Tensor<float, 2> logits(1, vocab);
  logits.setConstant(-1e37f);
  for (Index block = 0; block < vocab / 128; ++block)
    logits(0, block * 128) = static_cast<float>(block);
  std::vector<std::int32_t> history;
  for (std::int32_t token = 1; token < 100; ++token) history.push_back(token);
  using enum ef::SamplingStage;
  const ef::SamplingParams params{.temperature = 5e36,
                                  .top_k = 1,
                                  .min_p = 1e-30,
                                  .repetition_penalty = 1.1,
                                  .order = {penalties, temperature, min_p, xtc, top_k},
                                  .output_tokens = history,
                                  .xtc_probability = 1,
                                  .xtc_threshold = 5e-4};
  EXPECT_EQ(kept_by(logits, params), Set{0});
}

/// Penalties that lower the very tokens that a first filter would keep: of a history kernels look
/// at what may matter.
TEST(SamplingChanges, HistoriesOfTheLikeliestTokens) {
  Generator random(7);
  for (int trial = 0; trial < 240; ++trial) {
    const Index vocab = 8192 + below(random, 4000);
    const auto logits = random_tensor<float, 2>({1, vocab}, static_cast<unsigned>(trial),
                                                trial % 3 == 0 ? .2 : 3.0);
    std::vector<std::int32_t> ranked(static_cast<std::size_t>(vocab));
    std::iota(ranked.begin(), ranked.end(), 0);
    std::sort(ranked.begin(), ranked.end(),
              [&](auto a, auto b) { return logits(0, a) > logits(0, b); });
    const Index likeliest = std::array<Index, 4>{5, 60, 500, vocab}[random() % 4];
    std::vector<std::int32_t> prompt, output;
    for (Index i = 40 + below(random, 400); i > 0; --i)
      (random() % 4 == 0 ? prompt : output)
          .push_back(ranked[static_cast<std::size_t>(below(random, likeliest))]);
    ef::SamplingParams filters;
    if (trial % 4 == 0) filters.min_p = between(random, .001, .5);
    if (trial % 4 == 1) filters.temperature = 0;
    if (trial % 4 >= 2) filters.top_k = 1 + below(random, 60);
    if (trial % 4 == 3) filters.top_p = .9;
    ef::SamplingParams p = filters;
    p.prompt_tokens = prompt;
    p.output_tokens = output;
    if (random() % 2 == 0) p.repetition_penalty = between(random, 1, 1.6);
    if (random() % 2 == 0) p.presence_penalty = between(random, 0, 3);
    if (random() % 2 == 0) p.frequency_penalty = between(random, 0, .2);
    if (random() % 3 == 0) p.logit_bias = {{ranked[0], -2.0f}, {ranked[70], -1.0f}};
    ASSERT_TRUE(same_bits(ef::sampling_probabilities(logits, p),
                          ef::sampling_probabilities(changed_by_hand(logits, p), filters)))
        << "trial " << trial;
  }
}

TEST(SamplingChanges, WhatIsWrongUnderAMaskIsWrong) {
  for (Index vocab : {5, 128, 700, 5000}) {
    ef::Tensor<float, 2> logits = random_tensor<float, 2>({4, vocab}, 3);
    logits(0, 3) = kNaN;
    logits(1, 3) = kInfinity;
    std::vector<std::uint32_t> mask(static_cast<std::size_t>((vocab + 31) / 32));
    mask[0] = 0b10111;
    const ef::SamplingParams masked{.top_k = 2, .token_mask = std::vector(mask)};
    std::fill(mask.begin(), mask.end(), 0u);
    const ef::SamplingParams none{.top_k = 2, .token_mask = std::vector(mask)};
    const std::vector<ef::SamplingParams> params{masked, masked, none, masked};
    for_each_isa([&](auto isa) {
      Ids ids(4);
      std::vector<ef::SampleStatus> statuses(4);
      ef::sample_into(on(isa), ids, logits, params, ef::Philox{1}, statuses);
      EXPECT_EQ(statuses, (std::vector{ef::SampleStatus::nan, ef::SampleStatus::positive_infinity,
                                       ef::SampleStatus::no_token, ef::SampleStatus::ok}))
          << isa.name << " " << vocab;
      EXPECT_TRUE(ids(3) >= 0 && ids(3) < 5 && ids(3) != 3) << isa.name << " " << vocab;
    });
    // an infinity that penalties make is one, unless the mask bans its token
    ef::SamplingParams huge{.repetition_penalty = 1e-300};
    logits(3, 3) = 1;
    huge.output_tokens = std::vector<std::int32_t>{3};
    std::vector<ef::SampleStatus> status(1);
    Ids id(1);
    const ef::TensorView<const float, 2> row(logits.data() + 3 * vocab, 1, vocab);
    ef::sample_into(Eigen::DefaultDevice{}, id, row, huge, ef::Philox{1}, status);
    EXPECT_EQ(status[0], ef::SampleStatus::positive_infinity) << vocab;
    huge.token_mask = masked.token_mask;
    ef::sample_into(Eigen::DefaultDevice{}, id, row, huge, ef::Philox{1}, status);
    EXPECT_EQ(status[0], ef::SampleStatus::ok) << vocab;
  }
}

// A token that was the largest of its block and of the row falls or rises; the others stay.
TEST(SamplingChanges, MaximaFollow) {
  auto logits = random_tensor<float, 2>({1, 1000}, 5);
  for (Index token : {0, 127, 128, 500, 999}) {
    for (float to : {-kInfinity, -3.0f, 0.0f, 50.0f}) {
      ef::Tensor<float, 2> changed = logits;
      changed(0, token) = 9;
      const ef::SamplingParams params{
          .temperature = 0,
          .logit_bias = std::vector<ef::LogitBias>{{static_cast<std::int32_t>(token), to}}};
      const auto id = ef::sample(changed, params, ef::Philox{1});
      changed(0, token) += to;
      EXPECT_EQ(id(0), ef::greedy_sample(changed)(0)) << token << " " << to;
    }
  }
}

TEST(SamplingChanges, LongRowsAllocateNothingAndAreTheSameOnEveryIsaAndThread) {
  Generator random(9);
  constexpr Index vocab = 40007, rows = 5;
  const auto logits = random_tensor<float, 2>({rows, vocab}, 6, 2.0);
  std::vector<ef::SamplingParams> params(rows);
  for (ef::SamplingParams& p : params) {
    p = random_filters(random);
    p.xtc_probability = 0;
    set_processors_of_few(random, p, vocab);
    p.output_tokens = tokens_of(random, 1000, vocab);
    p.repetition_penalty = 1.2;
    p.token_mask = random_mask(random, vocab);
  }
  ef::Tensor<float, 2> probabilities(rows, vocab);
  std::vector<ef::SampleStatus> statuses(rows);
  ef::Workspace workspace;
  const auto call = [&] {
    ef::sampling_probabilities_into(Eigen::DefaultDevice{}, probabilities, logits, params, statuses,
                                    workspace);
  };
  call();
  EXPECT_EQ(count_allocations(call), 0);
  expect_same_in_all_ways(logits, params);
}

}  // namespace
