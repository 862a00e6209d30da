/// \file
/// Part of sampling_test.cpp: draws, log-probabilities and speculative verification.
#pragma once

#include "sampling_support.h"

namespace eigenformer_test {
namespace {

TEST(SamplingDraws, EveryContractCall) {
  const ef::Tensor<float, 2> logits = random_tensor<float, 2>({3, 40}, 2);
  const std::uint64_t seed = 42;
  const int k = 5;
  const float p = .9f, temperature = .8f;
  ef::Philox rng{seed};
  ef::Tensor<std::int32_t, 1> ids = ef::greedy_sample(logits);
  ids = ef::top_k_sample(logits, k, temperature, rng);
  ids = ef::top_p_sample(logits, p, temperature, rng);
  ids = ef::sample(
      logits, ef::SamplingParams{.temperature = .8f, .top_k = 50, .top_p = .95f, .min_p = .05f},
      rng);
  const std::vector<ef::SamplingParams> rows(3);
  const std::span<const ef::SamplingParams> per_row_params = rows;
  ids = ef::sample(logits, per_row_params, rng);
  ids = ef::sample(logits, rows, rng);
  EXPECT_EQ(rng.position(), 5u);
  const ef::SamplingParams params;
  ef::Tensor<float, 2> distribution = ef::sampling_probabilities(logits, params);
  distribution = ef::sampling_probabilities(logits, per_row_params);
  const Eigen::DefaultDevice device;
  ids = ef::greedy_sample(device, logits);
  ids = ef::top_k_sample(device, logits, k, temperature, rng);
  ids = ef::top_p_sample(device, logits, p, temperature, rng);
  ids = ef::sample(device, logits, params, rng);
  distribution = ef::sampling_probabilities(device, logits, params);
  std::vector<ef::Philox> generators(3, ef::Philox{1});
  ids = ef::sample(logits, params, std::span<ef::Philox>(generators));
  ids = ef::top_k_sample(logits, k, temperature, generators);
  for (const auto& generator : generators) EXPECT_EQ(generator.position(), 2u);
  const ef::Tensor<float, 2> none(0, 40);
  EXPECT_EQ(ef::sample(none, params, rng).size(), 0);
  EXPECT_EQ(ef::greedy_sample(none).size(), 0);
  EXPECT_EQ(ef::sampling_probabilities(none, params).dimension(1), 40);
}

TEST(SamplingDraws, DependOnSeedPositionAndRowOnly) {
  const auto logits = random_tensor<float, 2>({9, 5000}, 6, 2.0);
  const ef::SamplingParams params{.temperature = 1.2, .top_p = .97};
  ef::Philox rng{11, 5};
  const Ids expected = ef::sample(logits, params, rng);
  const auto distribution = ef::sampling_probabilities(logits, params);
  for (int threads : {1, 2, 3}) {
    Threads pool(threads);
    ef::Philox again{11, 5};
    EXPECT_TRUE(same_bits(ef::sample(pool.device, logits, params, again), expected));
    EXPECT_TRUE(same_bits(ef::greedy_sample(pool.device, logits), ef::greedy_sample(logits)));
    EXPECT_TRUE(same_bits(ef::sampling_probabilities(pool.device, logits, params), distribution));
  }
  ef::Philox again{11, 5};
  const Ids first = ef::sample(ef::TensorView<const float, 2>(logits.data(), 4, 5000), params,
                               again);  // fewer rows around
  for (Index r = 0; r < 4; ++r) EXPECT_EQ(first(r), expected(r));
  // A generator of its own follows the request from row to row: it draws at row 0.
  std::vector<ef::Philox> generators;
  for (std::uint64_t r = 0; r < 9; ++r) generators.emplace_back(100 + r);
  const Ids own = ef::sample(logits, params, generators);
  for (Index r = 0; r < 9; ++r) {
    ef::Philox one{100 + static_cast<std::uint64_t>(r)};
    EXPECT_EQ(ef::sample(ef::TensorView<const float, 2>(logits.data() + r * 5000, 1, 5000), params,
                         one)(0),
              own(r));
  }
  // Parameters a row: each row as if all had its own.
  std::vector<ef::SamplingParams> rows(9, params);
  rows[3] = {.temperature = 0};
  rows[5] = {.top_k = 2};
  const std::vector<std::int32_t> history{1, 2, 3};
  rows[6] = {.presence_penalty = 2, .output_tokens = history};
  const auto mixed = ef::sampling_probabilities(logits, rows);
  for (Index r = 0; r < 9; ++r) {
    const auto alone = ef::sampling_probabilities(logits, rows[static_cast<std::size_t>(r)]);
    for (Index v = 0; v < 5000; ++v) ASSERT_EQ(mixed(r, v), alone(r, v)) << r;
  }
}

TEST(SamplingDraws, FollowTheDistribution) {
  constexpr Index batch = 500, steps = 60;
  for (Index vocab : {6, 300})
    for (const auto& [name, params] : parameter_sets()) {
      const auto row = random_tensor<float, 2>({1, vocab}, 12, 1.5);
      const ef::Tensor<float, 2> logits = row.broadcast(Eigen::array<Index, 2>{batch, 1});
      const auto reference = ef::reference::sampling_probabilities(row, params);
      std::vector<double> counts(static_cast<std::size_t>(vocab)),
          expected(reference.data(), reference.data() + vocab);
      ef::Philox rng{2024};
      for (Index s = 0; s < steps; ++s) {
        const Ids ids = ef::sample(logits, params, rng);
        for (Index r = 0; r < batch; ++r) ++counts[static_cast<std::size_t>(ids(r))];
      }
      expect_distributed(counts, expected, name + " vocab " + std::to_string(vocab));
    }
}

TEST(SamplingLogProbabilities, RawProcessedRankAndBest) {
  const auto logits = random_tensor<float, 2>({6, 700}, 31, 2.0);
  const std::vector<std::int32_t> history{3};
  const ef::SamplingParams params{
      .temperature = .7, .top_k = 20, .presence_penalty = .5, .output_tokens = history};
  ef::Philox rng{5}, same{5};
  const auto result = ef::sample_with_log_probabilities(logits, params, rng, {.best = 30});
  EXPECT_TRUE(same_bits(result.ids, ef::sample(logits, params, same)));
  EXPECT_EQ(rng.position(), 1u);
  const auto raw = ef::reference::sampling_probabilities(logits, {});
  const auto processed = ef::reference::sampling_probabilities(logits, params);
  for (Index r = 0; r < 6; ++r) {
    EXPECT_NEAR(result.log_probabilities(r), std::log(raw(r, result.ids(r))), 1e-5);
    EXPECT_NEAR(result.processed_log_probabilities(r), std::log(processed(r, result.ids(r))), 1e-5);
    std::vector<std::int32_t> sorted(700);
    for (std::size_t v = 0; v < 700; ++v) sorted[v] = static_cast<std::int32_t>(v);
    std::stable_sort(sorted.begin(), sorted.end(),
                     [&](auto a, auto b) { return logits(r, a) > logits(r, b); });
    EXPECT_EQ(sorted[static_cast<std::size_t>(result.ranks(r)) - 1], result.ids(r));
    for (Index i = 0; i < 30; ++i) {
      const std::int32_t id = sorted[static_cast<std::size_t>(i)];
      EXPECT_EQ(result.best_ids(r, i), id);
      EXPECT_NEAR(result.best_log_probabilities(r, i), std::log(raw(r, id)), 1e-5);
      if (processed(r, id) > 0) {
        EXPECT_NEAR(result.best_processed_log_probabilities(r, i), std::log(processed(r, id)),
                    1e-5);
      } else {
        EXPECT_EQ(result.best_processed_log_probabilities(r, i), -kInfinity);
      }
    }
  }
  const auto few = ef::sample_with_log_probabilities(row_of({1, -kInfinity, 1}), {.temperature = 0},
                                                     rng, {.best = 9});
  EXPECT_EQ(few.best_ids.dimension(1), 3);
  EXPECT_EQ(few.best_ids(0, 1), 2);
  EXPECT_EQ(few.best_ids(0, 2), 1);
  EXPECT_EQ(few.best_log_probabilities(0, 2), -kInfinity);
  EXPECT_EQ(few.processed_log_probabilities(0), 0.f);
  expect_throws<std::invalid_argument>(
      [&] { ef::sample_with_log_probabilities(row_of({1}), {.top_k = 1}, rng, {.best = -1}); },
      {"best is -1"});
}

/// Verifies `batch` chains per step whose drafts are drawn from `draft`; counts the token at each place of the chain.
void check_speculative(const ef::Tensor<double, 2>& draft, const ef::Tensor<double, 2>& target,
                       const std::string& what) {
  const Index drafts = draft.dimension(0), vocab = draft.dimension(1), batch = 2000, steps = 15;
  ef::Tensor<double, 3> q(batch, drafts, vocab), p(batch, drafts + 1, vocab);
  for (Index r = 0; r < batch; ++r) {
    std::copy(draft.data(), draft.data() + draft.size(), q.data() + r * draft.size());
    std::copy(target.data(), target.data() + target.size(), p.data() + r * target.size());
  }
  std::vector<std::vector<double>> counts(static_cast<std::size_t>(drafts) + 1,
                                          std::vector<double>(static_cast<std::size_t>(vocab)));
  ef::Philox rng{77};
  for (Index s = 0; s < steps; ++s) {
    ef::Tensor<std::int32_t, 2> tokens(batch, drafts);
    for (Index i = 0; i < drafts; ++i) {
      ef::Tensor<double, 2> logits(batch, vocab);
      for (Index r = 0; r < batch; ++r)
        for (Index v = 0; v < vocab; ++v) logits(r, v) = std::log(draft(i, v));
      const Ids ids = ef::sample(logits, {.temperature = 1}, rng);
      for (Index r = 0; r < batch; ++r) tokens(r, i) = ids(r);
    }
    const auto result = ef::verify_speculative(tokens, q, p, rng);
    for (Index r = 0; r < batch; ++r) {
      const Index accepted = result.accepted_counts(r);
      for (Index i = 0; i <= drafts; ++i) {
        if (i <= accepted)
          ++counts[static_cast<std::size_t>(i)][static_cast<std::size_t>(result.tokens(r, i))];
        else
          ASSERT_EQ(result.tokens(r, i), -1);
        if (i < accepted) {
          ASSERT_EQ(result.tokens(r, i), tokens(r, i));
        }
      }
    }
  }
  for (Index i = 0; i <= drafts; ++i) {
    const std::vector<double> expected(target.data() + i * vocab, target.data() + (i + 1) * vocab);
    expect_distributed(counts[static_cast<std::size_t>(i)], expected,
                       what + " place " + std::to_string(i));
  }
}

TEST(SpeculativeVerification, TokensFollowTheTarget) {
  const auto draft = ef::reference::sampling_probabilities(random_tensor<float, 2>({3, 12}, 1),
                                                           {.temperature = 1.5});
  const auto target =
      ef::reference::sampling_probabilities(random_tensor<float, 2>({4, 12}, 2), {.top_k = 7});
  check_speculative(draft, target, "different");
  ef::Tensor<double, 2> same(4, 12);
  std::copy(draft.data(), draft.data() + 36, same.data());
  std::copy(draft.data(), draft.data() + 12, same.data() + 36);
  check_speculative(draft, same, "the same");
  check_speculative(draft,
                    ef::reference::sampling_probabilities(random_tensor<float, 2>({4, 12}, 2),
                                                          {.temperature = 0}),
                    "greedy target");
}

TEST(SpeculativeVerification, EdgesAndErrors) {
  ef::Philox rng{1};
  ef::Tensor<float, 3> q(2, 1, 3), p(2, 2, 3);
  q.setConstant(1.f / 3);
  p.setConstant(kNaN);  // rows that must not be read
  const std::vector<Index> lengths{0, 1};
  ef::Tensor<std::int32_t, 2> tokens(2, 1);
  tokens(0, 0) = 99;  // past its length
  tokens(1, 0) = 2;
  for (Index v = 0; v < 3; ++v) p(0, 0, v) = p(1, 0, v) = v == 1;
  const auto result = ef::verify_speculative(tokens, q, p, rng, {.draft_lengths = lengths});
  EXPECT_EQ(result.accepted_counts(0), 0);
  EXPECT_EQ(result.tokens(0, 0), 1);
  EXPECT_EQ(result.accepted_counts(1), 0);  // p(2) = 0: refused, drawn from the residual
  EXPECT_EQ(result.tokens(1, 0), 1);
  EXPECT_EQ(result.tokens(1, 1), -1);
  EXPECT_EQ(rng.position(), 1u);
  expect_throws<std::invalid_argument>([&] { ef::verify_speculative(tokens, q, p, rng); },
                                       {"draft_tokens(0, 0) is 99"});
  tokens(1, 0) = 1;  // accepted, and the bonus distribution is NaN
  expect_throws<std::invalid_argument>(
      [&] { ef::verify_speculative(tokens, q, p, rng, {.draft_lengths = lengths}); },
      {"row 1", "NaN"});
  const std::vector<Index> wrong{0, 2};
  expect_throws<std::invalid_argument>(
      [&] { ef::verify_speculative(tokens, q, p, rng, {.draft_lengths = wrong}); },
      {"draft_lengths[1] is 2"});
  const ef::Tensor<float, 3> short_target(2, 1, 3), narrow(2, 1, 2);
  expect_throws<std::invalid_argument>(
      [&] { ef::verify_speculative(tokens, q, short_target, rng); },
      {"target_probabilities", "(2, 1, 3)"});
  expect_throws<std::invalid_argument>([&] { ef::verify_speculative(tokens, narrow, p, rng); },
                                       {"draft_probabilities", "(2, 1, 2)"});
  EXPECT_EQ(rng.position(), 1u);
  // p equals q up to rounding: where a draft is refused and no residual is left, the target itself is drawn from.
  ef::Tensor<float, 3> halves(1, 1, 2), quarter(1, 2, 2);
  halves.setConstant(.5f);
  quarter.setConstant(.25f);  // everywhere below q
  ef::Tensor<std::int32_t, 2> zero(1, 1);
  zero.setZero();
  int refused = 0;
  for (int i = 0; i < 20; ++i) {
    const auto r = ef::verify_speculative(zero, halves, quarter, rng);
    refused += r.accepted_counts(0) == 0;
    EXPECT_GE(r.tokens(0, 0), 0);
  }
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace eigenformer_test
