// Log-probabilities, speculative verification and the candidates of a vocabulary's shard on every
// device: what the CPU says.
#include <eigenformer/problem/tensor_parallel.h>
#include <eigenformer/tensor_parallel.h>

#include "device.h"
#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

using Status = ef::SampleStatus;

std::span<Status> statuses_of(const ef::TensorView<std::int8_t, 1>& bytes) {
  return {reinterpret_cast<Status*>(bytes.data()), static_cast<std::size_t>(bytes.size())};
}

/// NaN equals NaN, -infinity itself.
void expect_near(float got, float expected, const std::string& what) {
  if (std::isfinite(expected))
    ASSERT_NEAR(got, expected, 1e-6 * (1 + std::abs(expected))) << what;
  else
    ASSERT_TRUE(std::isnan(expected) ? std::isnan(got) : got == expected) << what << ": " << got;
}

// ---- log-probabilities --------------------------------------------------------------------------

/// A stage of the caller's.
struct HalvedLogit {
  EIGENFORMER_HOST_DEVICE float operator()(Index row, Index token, float logit) const {
    return token % 7 == row ? -std::numeric_limits<float>::infinity() : logit / 2;
  }
};

template <typename T, typename... Function>
void check_log_probabilities(Index vocab, Index best, const Function&... function) {
  constexpr Index batch = 5;
  auto logits = random_tensor<T, 2>({batch, vocab}, 4, 3.0);
  for (Index t = 0; t < vocab; ++t) logits(1, t) = static_cast<T>(static_cast<float>(t % 4));
  logits(2, vocab - 1) = static_cast<T>(kNaN);
  for (Index t = 1; t < vocab; t += 2) logits(3, t) = static_cast<T>(-kInfinity);
  std::vector<ef::SamplingParams> params(
      batch, {.temperature = .8, .top_k = 40, .top_p = .9, .logit_bias = {{0, 2.f}}});
  params[4] = {};
  ef::SamplesWithLogProbabilities expected;
  ef::Workspace workspace;
  ef::sample_with_log_probabilities_into(Eigen::DefaultDevice{}, expected, logits, params,
                                         ef::Philox(3), {.best = best}, workspace, function...);
  const std::string what = "vocab " + std::to_string(vocab);
  for_each_device([&](const auto& bench) {
    const auto x = on_device(bench, logits);
    const auto ids = on_device(bench, poisoned_tensor<std::int32_t, 1>({batch}));
    const auto raw = on_device(bench, poisoned_tensor<float, 1>({batch}));
    const auto processed = on_device(bench, poisoned_tensor<float, 1>({batch}));
    const auto ranks = on_device(bench, poisoned_tensor<std::int32_t, 1>({batch}));
    const auto best_ids = on_device(bench, poisoned_tensor<std::int32_t, 2>({batch, best}));
    const auto best_raw = on_device(bench, poisoned_tensor<float, 2>({batch, best}));
    const auto best_processed = on_device(bench, poisoned_tensor<float, 2>({batch, best}));
    const auto statuses = on_device(bench, poisoned_tensor<std::int8_t, 1>({batch}));
    ef::sample_with_log_probabilities_into(
        bench.device,
        ef::SampleViews{ids.view(), raw.view(), processed.view(), ranks.view(), best_ids.view(),
                        best_raw.view(), best_processed.view(), statuses_of(statuses.view())},
        x.cview(), params, ef::Philox(3), workspace, function...);
    const auto got_ids = ids.host(), got_ranks = ranks.host();
    const auto got_raw = raw.host(), got_processed = processed.host();
    const auto got_best = best_ids.host();
    const auto got_best_raw = best_raw.host(), got_best_processed = best_processed.host();
    const auto got_statuses = statuses.host();
    for (Index r = 0; r < batch; ++r) {
      ASSERT_EQ(static_cast<Status>(got_statuses(r)),
                expected.statuses[static_cast<std::size_t>(r)]);
      ASSERT_EQ(got_ids(r), expected.ids(r)) << what;
      ASSERT_EQ(got_ranks(r), expected.ranks(r)) << what;
      expect_near(got_raw(r), expected.log_probabilities(r), what);
      expect_near(got_processed(r), expected.processed_log_probabilities(r), what);
      for (Index i = 0; i < best; ++i) {
        ASSERT_EQ(got_best(r, i), expected.best_ids(r, i)) << what << " row " << r << " " << i;
        expect_near(got_best_raw(r, i), expected.best_log_probabilities(r, i), what);
        expect_near(got_best_processed(r, i), expected.best_processed_log_probabilities(r, i),
                    what);
      }
    }
  });
}

TEST(SamplingResultsOnDevice, LogProbabilitiesRanksAndBest) {
  check_log_probabilities<float>(1, 1);
  check_log_probabilities<float>(33, 33);
  check_log_probabilities<float>(257, 5);
  check_log_probabilities<ef::bfloat16>(300, 0);
  check_log_probabilities<ef::half>(100, 17);
  check_log_probabilities<float>(257, 5, HalvedLogit{});
}

template <typename... Function>
void check_given_tokens(const Function&... function) {
  constexpr Index batch = 6, vocab = 130;
  auto logits = random_tensor<float, 2>({batch, vocab}, 4, 3.0);
  logits(3, 3) = logits(4, 3) = kNaN;
  const std::vector<std::int32_t> tokens{0, 129, 64, 5, -1, -1};
  const ef::SamplingParams params{.top_k = 60};
  ef::Tensor<float, 1> expected(batch);
  std::vector<Status> expected_statuses(batch);
  ef::Workspace workspace;
  ef::log_probabilities_of_into(Eigen::DefaultDevice{}, expected, logits, tokens, params,
                                expected_statuses, workspace, function...);
  for_each_device([&](const auto& bench) {
    const auto x = on_device(bench, logits);
    ef::Tensor<std::int32_t, 1> list(batch);
    std::copy(tokens.begin(), tokens.end(), list.data());
    constexpr bool checked = ef::CpuDevice<std::remove_cvref_t<decltype(bench.device)>>;
    if (!checked) list(2) = vocab;  // what the host cannot see gives NaN
    const auto given = on_device(bench, list);
    const auto out = on_device(bench, poisoned_tensor<float, 1>({batch}));
    const auto bytes = on_device(bench, poisoned_tensor<std::int8_t, 1>({batch}));
    ef::log_probabilities_of_into(bench.device, out.view(), x.cview(), given.cview(), params,
                                  statuses_of(bytes.view()), workspace, function...);
    const auto got = out.host();
    const auto statuses = bytes.host();
    for (Index r = 0; r < batch; ++r) {
      expect_near(got(r), !checked && r == 2 ? kNaN : expected(r), "row " + std::to_string(r));
      EXPECT_EQ(static_cast<Status>(statuses(r)), expected_statuses[static_cast<std::size_t>(r)]);
    }
  });
}

TEST(SamplingResultsOnDevice, LogProbabilitiesOfGivenTokens) {
  check_given_tokens();
  check_given_tokens(HalvedLogit{});
}

TEST(SamplingResultsOnDevice, ViewsOfWrongSizesAreRefused) {
  const auto logits = random_tensor<float, 2>({2, 4}, 4);
  ef::SamplesWithLogProbabilities of;
  ef::Philox random;
  ef::sample_with_log_probabilities_into(Eigen::DefaultDevice{}, of, logits, ef::SamplingParams{},
                                         random, {.best = 3});
  const ef::SampleViews right = ef::detail::views_of(of, 2, 3);
  const auto refused = [&](const ef::SampleViews& views, const std::string& argument) {
    expect_throws<std::invalid_argument>(
        [&] {
          ef::sample_with_log_probabilities_into(Eigen::DefaultDevice{}, views, logits,
                                                 ef::SamplingParams{}, random);
        },
        {"sample_with_log_probabilities: " + argument});
    EXPECT_EQ(random.position(), 1u);
  };
  ef::Tensor<float, 1> three(3);
  ef::Tensor<float, 2> narrow(2, 2);
  ef::Tensor<std::int32_t, 2> wide(2, 5);
  using Row = ef::TensorView<float, 1>;
  using Table = ef::TensorView<float, 2>;
  const auto with = [&](Row raw, Table best, ef::TensorView<std::int32_t, 2> best_ids,
                        std::span<Status> statuses) {
    return ef::SampleViews{right.ids, raw,  right.processed_log_probabilities,      right.ranks,
                           best_ids,  best, right.best_processed_log_probabilities, statuses};
  };
  refused(with(Row(three.data(), 3), right.best_log_probabilities, right.best_ids, right.statuses),
          "log_probabilities has 3 elements");
  refused(with(right.log_probabilities, Table(narrow.data(), 2, 2), right.best_ids, right.statuses),
          "best_log_probabilities has shape");
  refused(with(right.log_probabilities, right.best_log_probabilities,
               ef::TensorView<std::int32_t, 2>(wide.data(), 2, 5), right.statuses),
          "best_ids has 5 columns");
  refused(with(right.log_probabilities, right.best_log_probabilities, right.best_ids, {}),
          "statuses has 0 elements");
}

// ---- speculative verification -------------------------------------------------------------------

/// Rows of distributions, some numbers 0, and drafts of any tokens.
template <typename P>
ef::Tensor<P, 3> distributions(Index batch, Index count, Index vocab, unsigned seed) {
  ef::Tensor<P, 3> result(batch, count, vocab);
  std::mt19937 generator(seed);
  for (Index row = 0; row < batch * count; ++row) {
    std::vector<double> weights(static_cast<std::size_t>(vocab));
    double sum = 0;
    for (double& w : weights) sum += w = static_cast<double>(generator() % 5);
    if (sum == 0) sum = weights[0] = 1;
    for (Index v = 0; v < vocab; ++v)
      result.data()[row * vocab + v] =
          static_cast<P>(static_cast<float>(weights[static_cast<std::size_t>(v)] / sum));
  }
  return result;
}

template <typename Draft, typename Target>
struct Chains {
  ef::Tensor<std::int32_t, 2> tokens;
  ef::Tensor<Draft, 3> draft;
  ef::Tensor<Target, 3> target;
  Chains(Index batch, Index drafts, Index vocab)
      : tokens(batch, drafts),
        draft(distributions<Draft>(batch, drafts, vocab, 1)),
        target(distributions<Target>(batch, drafts + 1, vocab, 2)) {
    std::mt19937 generator(3);
    for (Index i = 0; i < tokens.size(); ++i)
      tokens.data()[i] = static_cast<std::int32_t>(generator() % static_cast<unsigned>(vocab));
  }
};

/// On a GPU a draft that is no token ends its row, as the -1 of `expected_of` does.
template <typename Draft, typename Target>
void check_speculative(const Chains<Draft, Target>& chains, const std::vector<ef::Philox>& random,
                       const ef::SpeculativeOptions& options, Index out_of_range = -1) {
  const Index batch = chains.tokens.dimension(0), drafts = chains.tokens.dimension(1),
              vocab = chains.target.dimension(2);
  ef::SpeculativeResult expected;
  auto own = random;
  ef::verify_speculative_into(Eigen::DefaultDevice{}, expected, chains.tokens, chains.draft,
                              chains.target, own, options);
  for_each_device([&](const auto& bench) {
    auto list = chains.tokens;
    if (!ef::CpuDevice<std::remove_cvref_t<decltype(bench.device)>> && out_of_range >= 0)
      list.data()[out_of_range] = static_cast<std::int32_t>(vocab);
    const auto tokens = on_device(bench, list);
    const auto draft = on_device(bench, chains.draft);
    const auto target = on_device(bench, chains.target);
    const auto accepted = on_device(bench, poisoned_tensor<std::int32_t, 1>({batch}));
    const auto out = on_device(bench, poisoned_tensor<std::int32_t, 2>({batch, drafts + 1}));
    const auto bytes = on_device(bench, poisoned_tensor<std::int8_t, 1>({batch}));
    auto generators = random;
    ef::verify_speculative_into(
        bench.device, ef::SpeculativeViews{accepted.view(), out.view(), statuses_of(bytes.view())},
        tokens.cview(), draft.cview(), target.cview(), generators, options);
    EXPECT_EQ(generators[0].position(), own[0].position());
    const auto got_accepted = accepted.host();
    const auto got = out.host();
    const auto statuses = bytes.host();
    for (Index r = 0; r < batch; ++r) {
      ASSERT_EQ(static_cast<Status>(statuses(r)), expected.statuses[static_cast<std::size_t>(r)])
          << r;
      ASSERT_EQ(got_accepted(r), expected.accepted_counts(r)) << r;
      for (Index i = 0; i <= drafts; ++i) ASSERT_EQ(got(r, i), expected.tokens(r, i)) << r;
    }
  });
}

std::vector<ef::Philox> generators(Index rows) {
  std::vector<ef::Philox> all;
  for (Index r = 0; r < rows; ++r) all.emplace_back(static_cast<std::uint64_t>(r), 3);
  return all;
}

TEST(SamplingResultsOnDevice, SpeculativeKeepsTheTokensOfTheCpu) {
  check_speculative(Chains<float, float>(200, 3, 5), generators(200), {});
  check_speculative(Chains<float, ef::bfloat16>(20, 2, 300), generators(20), {});
  check_speculative(Chains<ef::half, double>(20, 1, 129), generators(20), {});
  check_speculative(Chains<float, float>(2, 0, 33), generators(2), {});
  check_speculative(Chains<float, float>(2, 2, 1), generators(2), {});
  check_speculative(Chains<float, float>(4, 3, 40), generators(4), {.draft_lengths = {0, 1, 2, 3}});
  Chains<float, float> no_token(4, 3, 40);
  for (Index v = 0; v < 40; ++v) no_token.target(1, 0, v) = no_token.draft(1, 0, v);  // accepted
  no_token.tokens(1, 1) = -1;
  check_speculative(no_token, generators(4), {}, 4);
}

TEST(SamplingResultsOnDevice, BadDistributionsHarmNoOther) {
  Chains<float, float> chains(8, 2, 200);
  for (Index v = 0; v < 200; ++v) {
    chains.target(1, 0, v) = 0;  // refused, and no token
    chains.target(2, 0, v) = chains.draft(2, 0, v) = .005f;
    chains.target(2, 1, v) = chains.draft(2, 1, v) = .005f;  // accepted: no residual is needed
  }
  for (Index r = 3; r < 8; ++r) chains.target(r, 0, chains.tokens(r, 0)) = 0;  // refused
  for (Index r = 3; r < 8; ++r) chains.draft(r, 0, chains.tokens(r, 0)) = .01f;
  chains.target(3, 0, 199) = kNaN;
  chains.target(4, 0, 150) = -1;
  chains.target(4, 0, 151) = kNaN;
  chains.draft(5, 0, 7) = kInfinity;
  chains.draft(6, 0, chains.tokens(6, 0)) = kNaN;  // one of the two of a draft
  for (Index v = 0; v < 200; ++v) chains.draft(7, 0, v) = chains.target(7, 0, v);
  chains.draft(7, 0, chains.tokens(7, 0)) = .5f;  // refused, and no residual but rounding
  check_speculative(chains, generators(8), {});
}

TEST(SamplingResultsOnDevice, SpeculativeViewsOfWrongSizesAreRefused) {
  const Chains<float, float> chains(2, 3, 10);
  ef::SpeculativeResult result;
  ef::Philox random;
  ef::verify_speculative_into(Eigen::DefaultDevice{}, result, chains.tokens, chains.draft,
                              chains.target, random);
  const ef::TensorView<std::int32_t, 1> counts(result.accepted_counts.data(), 2);
  const ef::TensorView<std::int32_t, 2> narrow(result.tokens.data(), 2, 3);
  expect_throws<std::invalid_argument>(
      [&] {
        ef::verify_speculative_into(Eigen::DefaultDevice{},
                                    ef::SpeculativeViews{counts, narrow, result.statuses},
                                    chains.tokens, chains.draft, chains.target, random);
      },
      {"verify_speculative: the results have 2 counts, tokens of shape (2, 3)", "(2, 4)"});
  EXPECT_EQ(random.position(), 1u);
}

// ---- a shard of the vocabulary ------------------------------------------------------------------

template <typename T>
void check_vocabulary(Index size, Index kept) {
  constexpr Index rows = 5;
  auto logits = random_tensor<T, 2>({rows, size}, 4, 3.0);
  if (size > 2) {
    for (Index t = 0; t < size; ++t) logits(1, t) = static_cast<T>(static_cast<float>(t % 3));
    logits(2, size - 1) = static_cast<T>(kNaN);
    logits(2, 0) = logits(3, 1) = static_cast<T>(kInfinity);
    for (Index t = 0; t < size; ++t) logits(4, t) = static_cast<T>(-kInfinity);
  }
  using Candidate = ef::problem::VocabularyCandidate;
  const auto candidates = [&](const auto& device, const T* data) {
    std::vector<Candidate> found(static_cast<std::size_t>(rows * kept), Candidate{7, 7});
    std::vector<std::int32_t> order(static_cast<std::size_t>(4 * size));
    ef::detail::run(device, ef::problem::Vocabulary<T>{
                                data, found.data(), order.data(), rows, kept, {1000, 1000 + size}});
    return found;
  };
  const auto expected = candidates(Eigen::DefaultDevice{}, logits.data());
  for_each_device([&](const auto& bench) {
    const auto x = on_device(bench, logits);
    const auto found = candidates(bench.device, x.cview().data());
    for (std::size_t i = 0; i < found.size(); ++i) {
      ASSERT_EQ(found[i].token, expected[i].token) << size << " " << kept << " " << i;
      ASSERT_EQ(found[i].logit, expected[i].logit) << size << " " << kept << " " << i;
    }
  });
}

TEST(SamplingResultsOnDevice, CandidatesOfAShard) {
  check_vocabulary<float>(0, 1);
  check_vocabulary<float>(1, 1);
  check_vocabulary<float>(300, 1);
  check_vocabulary<float>(301, 7);
  check_vocabulary<float>(33, 40);
  check_vocabulary<ef::bfloat16>(257, 257);
}

}  // namespace
