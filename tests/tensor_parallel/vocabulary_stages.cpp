// Stages that look at many tokens of a divided row: what they keep is what they keep of the whole
// row, and sums travel for them, not rows.
#include <eigenformer/linear.h>

#include "vocabulary_support.h"

namespace eigenformer_test {
namespace {

constexpr Eigen::DefaultDevice kDevice;

/// Some of the stages that few chains have, with any numbers.
ef::SamplingParams rare_chain(Index vocab, ef::Philox& random) {
  const auto one_in = [&](unsigned n) { return random() % n == 0; };
  const auto number = [&](double lo, double hi) { return lo + (hi - lo) * (random() * 0x1p-32); };
  const auto size = static_cast<double>(vocab);
  const auto count = [&] { return static_cast<Index>(std::exp(number(0, std::log(size)))); };
  ef::SamplingParams p;
  if (one_in(2)) p.temperature = number(.3, 3);
  if (one_in(2)) p.min_tokens_to_keep = count();
  if (one_in(3)) p.top_p = one_in(2) ? number(.5, 1) : number(0, .5);
  if (one_in(5)) p.top_k = count();
  if (one_in(2)) p.top_k_ties = ef::TopKTies::keep_all;
  if (one_in(5)) p.min_p = one_in(2) ? number(.5, 1.2) : number(0, .5);
  if (one_in(4)) p.typical_p = number(.1, 1);
  if (one_in(4)) p.top_h = number(.1, 1);
  if (one_in(5)) p.epsilon_cutoff = number(0, one_in(2) ? 1 : 2 / size);
  if (one_in(5)) p.eta_cutoff = number(0, one_in(2) ? 1 : 2 / size);
  if (one_in(5)) p.top_n_sigma = number(0, 3);
  if (one_in(4)) p.xtc_probability = 1, p.xtc_threshold = one_in(2) ? number(0, .5) : 1 / size;
  if (one_in(4)) p.mirostat = one_in(3) ? 2 : 1, p.mirostat_mu = number(1, 20);
  if (one_in(4)) p.dynatemp_range = number(.1, 2), p.dynatemp_exponent = number(.5, 2);
  if (one_in(3)) p.order = one_in(2) ? ef::kVllmOrder : ef::kLlamaCppOrder;
  if (one_in(2)) p.order = shuffled_filters(random);
  return p;
}

/// Probabilities and a draw of one row.
template <typename T>
void check_row(ef::ThreadCommunicator& communicator, const ef::Tensor<T, 1>& row,
               const ef::SamplingParams& params, std::uint64_t seed, const std::string& what) {
  ef::Tensor<T, 2> hidden(1, 1);
  hidden.setConstant(T(1));
  const auto head = head_of(row);
  const ef::Tensor<T, 2> logits = ef::linear(hidden, head);
  const Index vocab = row.size();
  const int rank = communicator.rank(), ranks = communicator.size();
  ef::Tensor<float, 2> whole(1, vocab), own(1, ef::shard_range(vocab, rank, ranks).size());
  ef::sampling_probabilities_into(kDevice, whole, logits, params);
  ef::vocabulary_parallel_sampling_probabilities_into(kDevice, own, hidden, head, communicator,
                                                      params);
  ASSERT_TRUE(same_bits(own, shard_of(whole, rank, ranks))) << what << ", " << ranks << " ranks";
  ASSERT_TRUE(same_bits(
      ef::vocabulary_parallel_sample(hidden, head, communicator, params, ef::Philox{seed}),
      ef::sample(logits, params, ef::Philox{seed})))
      << what << ", " << ranks << " ranks";
}

template <typename T>
void check_rare_chains(Index vocab, int rows, std::initializer_list<int> worlds) {
  for (int ranks : worlds)
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      ef::Philox random{static_cast<std::uint64_t>(3 * vocab + ranks)};
      for (int row = 0; row < rows && !::testing::Test::HasFatalFailure(); ++row)
        check_row(communicator, logits_of_kind<T>(row, vocab, row + ranks),
                  rare_chain(vocab, random), static_cast<std::uint64_t>(row),
                  "vocabulary " + std::to_string(vocab) + ", row " + std::to_string(row));
    });
}

TEST(VocabularyStages, AreThoseOfOneRank) {
  check_rare_chains<float>(7, 100, {1, 3, 9});
  check_rare_chains<float>(301, 150, {1, 2, 3});
  check_rare_chains<float>(9001, 80, {1, 2, 3});
  check_rare_chains<Eigen::bfloat16>(4500, 40, {2, 3});
  check_rare_chains<double>(4200, 40, {2, 3});
}

// Limits that a token meets to the last bit or two: no sum of ranks tells on which side it is.
TEST(VocabularyStages, LimitsWithinRounding) {
  constexpr Index vocab = 5003;
  for (int kind : {0, 1, 4}) {
    const auto row = logits_of_kind<float>(kind, vocab, 5);
    std::vector<double> x(row.data(), row.data() + vocab);
    std::sort(x.begin(), x.end(), std::greater<>{});
    double total = 0, mean = 0, variance = 0;
    for (double logit : x) total += std::exp(logit - x[0]), mean += logit / vocab;
    for (double logit : x) variance += (logit - mean) * (logit - mean) / vocab;
    for (std::size_t place : {1u, 30u, 2600u}) {
      double above = 0;
      for (std::size_t i = 0; i <= place; ++i) above += std::exp(x[i] - x[0]);
      const double weight = std::exp(x[place] - x[0]);
      const std::vector<ef::SamplingParams> all{
          {.top_p = above / total},
          {.top_p = (above - weight) / total, .min_tokens_to_keep = 7},
          {.epsilon_cutoff = weight / total},
          {.min_tokens_to_keep = 100, .epsilon_cutoff = weight / total},
          {.top_n_sigma = (x[0] - x[place]) / std::sqrt(variance)},
          {.xtc_probability = 1, .xtc_threshold = weight / total},
          {.mirostat = 2, .mirostat_mu = -std::log2(weight / total)}};
      for (int ranks : {1, 2, 3})
        ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
          for (std::size_t i = 0; i < all.size(); ++i)
            check_row(communicator, row, all[i], i,
                      "kind " + std::to_string(kind) + ", set " + std::to_string(i));
        });
    }
  }
}

// Two tokens between which a draw falls to the last bit, and two whose log-probability is half way
// between floats.
TEST(VocabularyStages, DrawsAndScoresWithinRounding) {
  constexpr Index vocab = 700;
  constexpr double none = -std::numeric_limits<double>::infinity();
  ef::Tensor<double, 2> hidden(1, 1);
  hidden.setConstant(1);
  const auto row_of = [&](double first, double second) {
    ef::Tensor<double, 1> row(vocab);
    row.setConstant(none);
    row(211) = first, row(599) = second;
    return row;
  };
  for (int ranks : {1, 2, 3})
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      for (std::uint64_t seed = 0; seed < 40; ++seed) {
        const double u = ef::Philox{seed}.uniform(0);
        check_row(communicator, row_of(std::log(u), std::log1p(-u)), {}, seed,
                  "seed " + std::to_string(seed));
        const float score = -.01f * static_cast<float>(seed + 1);
        const double half =
            (static_cast<double>(score) + static_cast<double>(std::nextafter(score, 0.f))) / 2;
        const auto head = head_of(row_of(std::log(std::expm1(-half)), 0));
        const ef::Tensor<double, 2> logits = ef::linear(hidden, head);
        const std::vector<std::int32_t> tokens{599};
        ef::Tensor<float, 1> given(1), expected(1);
        ef::vocabulary_parallel_log_probabilities_of_into(kDevice, given, hidden, head,
                                                          communicator, tokens);
        ef::log_probabilities_of_into(kDevice, expected, logits, tokens);
        ASSERT_TRUE(same_bits(given, expected)) << seed;
        const auto by_ranks = ef::vocabulary_parallel_sample_with_log_probabilities(
            hidden, head, communicator, ef::SamplingParams{}, ef::Philox{seed}, {.best = 2});
        const auto by_one = ef::sample_with_log_probabilities(logits, ef::SamplingParams{},
                                                              ef::Philox{seed}, {.best = 2});
        ASSERT_TRUE(same_bits(by_ranks.best_log_probabilities, by_one.best_log_probabilities));
        ASSERT_TRUE(same_bits(by_ranks.best_processed_log_probabilities,
                              by_one.best_processed_log_probabilities));
        ASSERT_TRUE(same_bits(by_ranks.ids, by_one.ids));
      }
    });
}

// Guidance by other rows and penalties on log-probabilities, before and after other stages that
// change logits.
TEST(VocabularyStages, LogitsThatSeeAllOthers) {
  using Stage = ef::SamplingStage;
  constexpr Index rows = 12, vocab = 4700;
  auto hidden = random_tensor<float, 2>({rows, 8}, 3);
  const auto head = random_tensor<float, 2>({vocab, 8}, 4, 1.5);
  hidden(5, 0) = std::numeric_limits<float>::quiet_NaN();  // guides row 6
  const auto logits = ef::linear(hidden, head);
  std::vector<ef::SamplingParams> params;
  for (Index r = 0; r < rows; ++r) {
    ef::Philox random{static_cast<std::uint64_t>(r)};
    ef::SamplingParams p = rare_chain(vocab, random);
    if (r % 3 == 0) p = {.temperature = .8, .top_p = .9};
    if (r % 4 != 3) {
      p.guidance_row = r % 2 == 0 ? (r + rows - 1) % rows : 2;
      p.guidance_scale = .5 + .3 * static_cast<double>(r);
    }
    if (r % 3 == 0) {
      p.penalize_log_probabilities = true;
      p.repetition_penalty = 1.3;
      p.prompt_tokens = std::vector<std::int32_t>{7, 4000, 2350, 7};
      p.logit_bias = std::vector<ef::LogitBias>{{2350, 2.5f}, {4699, -1.f}};
      p.order = {Stage::logit_bias, Stage::penalties, Stage::guidance, Stage::temperature,
                 Stage::top_p};
    }
    if (r == 9)  // nothing is left for the guidance
      p.token_mask = std::vector<std::uint32_t>((vocab + 31) / 32, 0u),
      p.order = {Stage::penalties, Stage::logit_bias,  Stage::token_mask,
                 Stage::guidance,  Stage::temperature, Stage::top_p};
    params.push_back(p);
  }
  ef::Tensor<float, 2> whole(rows, vocab);
  ef::Tensor<std::int32_t, 1> tokens(rows);
  std::vector<ef::SampleStatus> expected(rows);
  ef::sampling_probabilities_into(kDevice, whole, logits, params, expected);
  ef::sample_into(kDevice, tokens, logits, params, ef::Philox{7});
  for (int ranks : {1, 2, 3})
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      CountingCommunicator counting{communicator};
      ef::Tensor<float, 2> own(rows, ef::shard_range(vocab, communicator.rank(), ranks).size());
      ef::Tensor<std::int32_t, 1> drawn(rows);
      std::vector<ef::SampleStatus> statuses(rows);
      ef::vocabulary_parallel_sampling_probabilities_into(kDevice, own, hidden, head, communicator,
                                                          params, statuses);
      ASSERT_TRUE(same_bits(own, shard_of(whole, communicator.rank(), ranks))) << ranks;
      ASSERT_EQ(statuses, expected);
      ef::vocabulary_parallel_sample_into(kDevice, drawn, hidden, head, communicator, params,
                                          ef::Philox{7});
      ASSERT_TRUE(same_bits(drawn, tokens)) << ranks;
      const ef::SamplingParams guided{.guidance_scale = 1.5, .guidance_row = 2};
      ef::vocabulary_parallel_sample_into(kDevice, drawn, hidden, head, counting, guided,
                                          ef::Philox{7});
      EXPECT_LT(counting.bytes, rows * vocab * sizeof(float) / 4);
    });
}

// A stage of the caller's sees the token's number in the whole vocabulary.
TEST(VocabularyStages, AFunctionOfTheCallers) {
  using Stage = ef::SamplingStage;
  constexpr Index rows = 4, vocab = 4700;
  const auto hidden = random_tensor<float, 2>({rows, 8}, 3);
  const auto head = random_tensor<float, 2>({vocab, 8}, 4, 1.5);
  const auto logits = ef::linear(hidden, head);
  const auto function = [](Index row, Index token, float logit) {
    return (token + row) % 3 == 0 ? -std::numeric_limits<float>::infinity()
                                  : logit * static_cast<float>(token % 7 + 1);
  };
  const std::vector<std::int32_t> given{4699, 2, 2350, -1};
  auto& workspace = ef::thread_workspace();
  ef::SamplingParams guided{.top_p = .9, .guidance_scale = 1.5, .guidance_row = 2};
  guided.logit_bias = std::vector<ef::LogitBias>{{2350, 2.5f}, {4699, -1.f}};
  guided.order = {Stage::logit_bias, Stage::function, Stage::guidance, Stage::temperature,
                  Stage::top_p};
  for (const ef::SamplingParams& params :
       {ef::SamplingParams{}, ef::SamplingParams{.temperature = 0}, ef::SamplingParams{.top_k = 40},
        guided}) {
    ef::Tensor<float, 2> whole(rows, vocab);
    ef::sampling_probabilities_into(kDevice, whole, logits, params, {}, workspace, function);
    const auto tokens = ef::sample(logits, params, ef::Philox{7}, function);
    ASSERT_FALSE(same_bits(whole, ef::sampling_probabilities(logits, params)));
    ef::Tensor<float, 1> of_given(rows);
    ef::log_probabilities_of_into(kDevice, of_given, logits, given, params, {}, workspace,
                                  function);
    for (int ranks : {1, 2, 3})
      ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
        auto& own_workspace = ef::thread_workspace();
        const int rank = communicator.rank();
        ef::Tensor<float, 2> own(rows, ef::shard_range(vocab, rank, ranks).size());
        ef::vocabulary_parallel_sampling_probabilities_into(
            kDevice, own, hidden, head, communicator, params, {}, own_workspace, function);
        ASSERT_TRUE(same_bits(own, shard_of(whole, rank, ranks))) << ranks;
        ASSERT_TRUE(same_bits(ef::vocabulary_parallel_sample(hidden, head, communicator, params,
                                                             ef::Philox{7}, function),
                              tokens))
            << ranks;
        ef::Tensor<std::int32_t, 1> drawn(rows);
        ef::vocabulary_parallel_sample_into(kDevice, drawn, hidden, head, communicator, params,
                                            ef::Philox{7}, {}, own_workspace, function);
        ASSERT_TRUE(same_bits(drawn, tokens)) << ranks;
        ef::Tensor<float, 1> scores(rows);
        ef::vocabulary_parallel_log_probabilities_of_into(kDevice, scores, hidden, head,
                                                          communicator, given, params, {},
                                                          own_workspace, function);
        ASSERT_TRUE(same_bits(scores, of_given)) << ranks;
      });
  }
}

// Of a row of 4 bytes a token.
TEST(VocabularyStages, SendLittle) {
  constexpr Index vocab = 30000;
  constexpr std::size_t whole = vocab * sizeof(float);
  using Stage = ef::SamplingStage;
  const std::vector<ef::SamplingParams> all{
      {.top_p = .9, .min_tokens_to_keep = 3},
      {.top_p = .9, .min_tokens_to_keep = 9000},
      {.min_p = .9, .min_tokens_to_keep = 2},
      {.top_p = .99},
      {.typical_p = .9},
      {.typical_p = .2, .min_tokens_to_keep = 5000},
      {.top_k = 40, .top_k_ties = ef::TopKTies::keep_all},
      {.top_k = 12345},
      {.epsilon_cutoff = .9},
      {.min_tokens_to_keep = 500, .eta_cutoff = 1e-3},
      {.top_h = .5},
      {.xtc_probability = 1, .xtc_threshold = 1e-5},
      {.dynatemp_range = .5},
      {.top_p = .9, .order = {Stage::top_p, Stage::temperature}, .dynatemp_range = .5},
      {.mirostat = 1, .mirostat_mu = 9},
      {.temperature = 1.2,
       .top_p = .99,
       .typical_p = .95,
       .xtc_probability = 1,
       .xtc_threshold = 1e-4,
       .top_h = .99}};
  ef::ThreadCommunicator::run(2, [&](ef::ThreadCommunicator& communicator) {
    ef::Tensor<float, 2> hidden(1, 1);
    hidden.setConstant(1);
    for (int kind = 0; kind < 7; ++kind) {
      const auto head = head_of(logits_of_kind(kind, vocab, 3));
      for (std::size_t i = 0; i < all.size(); ++i) {
        CountingCommunicator counting{communicator};
        ef::vocabulary_parallel_sample(hidden, head, counting, all[i], ef::Philox{1});
        EXPECT_LT(counting.bytes, whole / 2) << "kind " << kind << ", set " << i;
      }
    }
  });
}

}  // namespace
}  // namespace eigenformer_test
