// Operators of a divided vocabulary beside plain code in double on the joined rows, and what they
// refuse, argument by argument.
#include <eigenformer/linear.h>
#include <eigenformer/reference/beam_search.h>
#include <eigenformer/reference/log_softmax.h>
#include <eigenformer/reference/sampling.h>
#include <eigenformer/reference/speculative_tree.h>
#include <eigenformer/reference/top_k.h>

#include "vocabulary_support.h"

namespace eigenformer_test {
namespace {

namespace reference = ef::reference;
using Communicator = ef::ThreadCommunicator;
constexpr Eigen::DefaultDevice kDevice;
constexpr int kRanks = 3;
constexpr Index kRows = 5, kVocab = 301;

std::vector<ef::SamplingParams> chains() {
  std::vector<ef::SamplingParams> all{
      {},
      {.temperature = .7, .top_k = 30, .top_p = .9, .min_p = .01},
      {.temperature = 0},
      {.temperature = 1.3, .top_p = .8},
      {.min_p = .05},
      {.typical_p = .7},
      {.epsilon_cutoff = .003},
      {.eta_cutoff = .01},
      {.top_h = .5},
      {.mirostat = 2, .mirostat_mu = 5},
      {.mirostat = 1, .mirostat_mu = 5},
      {.top_n_sigma = 1},
      {.temperature = 1, .dynatemp_range = .4},
      {.top_p = .01, .min_tokens_to_keep = 4},
      {.top_p = .9, .repetition_penalty = 1.5, .frequency_penalty = .25},
      {.min_p = .1, .logit_bias = {{9, 3.f}, {200, -2.f}}},
      {.top_p = .9, .xtc_probability = 1, .xtc_threshold = .05}};
  for (auto& params : all) params.output_tokens = std::vector<std::int32_t>{3, 77, 3, 150, 300};
  return all;
}

struct Head {
  ef::Tensor<float, 2> hidden = random_tensor<float, 2>({kRows, 8}, 21),
                       weight = random_tensor<float, 2>({kVocab, 8}, 22);
  ef::Tensor<float, 2> logits = ef::linear(hidden, weight);
};

TEST(VocabularyReference, SamplesAndTheirProbabilities) {
  const Head head;
  const auto all = chains();
  Communicator::run(kRanks, [&](Communicator& communicator) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      const auto own = ef::vocabulary_parallel_sampling_probabilities(head.hidden, head.weight,
                                                                      communicator, all[i]);
      const auto expected = reference::sampling_probabilities(head.logits, all[i]);
      EXPECT_TRUE(within(own, shard_of(expected, communicator.rank(), kRanks), 1e-6)) << i;
      for (std::uint64_t seed = 0; seed < 5; ++seed) {
        const auto ids = ef::vocabulary_parallel_sample(head.hidden, head.weight, communicator,
                                                        all[i], ef::Philox{seed});
        for (Index r = 0; r < kRows; ++r)
          EXPECT_EQ(ids(r), reference::sampled_token(head.logits, r, all[i], ef::Philox{seed},
                                                     static_cast<std::uint32_t>(r)))
              << "chain " << i << ", row " << r;
      }
    }
    EXPECT_TRUE(same_bits(ef::vocabulary_parallel_greedy(head.hidden, head.weight, communicator),
                          reference::greedy_sample(head.logits)));
  });
}

TEST(VocabularyReference, LogProbabilities) {
  const Head head;
  const auto all = chains();
  const auto raw = reference::log_softmax(to_double(head.logits));
  const auto by_likelihood = reference::top_k(to_double(head.logits), kVocab);
  // -infinity of a token that is out is -infinity here too
  const auto expect_log = [](float log, double expected, const std::string& what) {
    if (std::isinf(expected) || std::isinf(log)) {
      EXPECT_EQ(log, expected) << what;
    } else {
      EXPECT_NEAR(log, expected, 1e-6 * (1 + std::abs(expected))) << what;
    }
  };
  Communicator::run(kRanks, [&](Communicator& communicator) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      const auto processed = reference::sampling_log_probabilities(head.logits, all[i]);
      const auto result = ef::vocabulary_parallel_sample_with_log_probabilities(
          head.hidden, head.weight, communicator, all[i], ef::Philox{3}, {.best = 4});
      const auto given = ef::vocabulary_parallel_log_probabilities_of(
          head.hidden, head.weight, communicator, result.ids, all[i]);
      for (Index r = 0; r < kRows; ++r) {
        const std::string what = "chain " + std::to_string(i) + ", row " + std::to_string(r);
        const std::int32_t id = result.ids(r);
        expect_log(result.log_probabilities(r), raw(r, id), what);
        expect_log(result.processed_log_probabilities(r), processed(r, id), what);
        expect_log(given(r), processed(r, id), what);
        EXPECT_EQ(by_likelihood(r, result.ranks(r) - 1), id) << what;
        for (Index n = 0; n < 4; ++n) {
          const std::int32_t best = result.best_ids(r, n);
          EXPECT_EQ(best, by_likelihood(r, n)) << what;
          expect_log(result.best_log_probabilities(r, n), raw(r, best), what);
          expect_log(result.best_processed_log_probabilities(r, n), processed(r, best), what);
        }
      }
    }
    const auto own = shard_of(head.logits, communicator.rank(), kRanks);
    EXPECT_TRUE(within(ef::vocabulary_parallel_log_softmax(own, kVocab, communicator),
                       shard_of(raw, communicator.rank(), kRanks), 1e-6));
    const auto [values, ids] = ef::vocabulary_parallel_top_k(own, 20, kVocab, communicator);
    for (Index r = 0; r < kRows; ++r)
      for (Index n = 0; n < 20; ++n) {
        EXPECT_EQ(ids(r, n), by_likelihood(r, n));
        EXPECT_EQ(values(r, n), head.logits(r, ids(r, n)));
      }
  });
}

TEST(VocabularyReference, BeamSearch) {
  constexpr Index vocab = 17;
  using Tokens = std::vector<std::int32_t>;
  // the scores after some tokens, in `row`
  const auto score = [](const Tokens& tokens, ef::Tensor<float, 2>& scores, Index row) {
    std::uint64_t seed = 5;
    for (const std::int32_t token : tokens) seed = seed * 31 + static_cast<std::uint64_t>(token);
    for (Index t = 0; t < vocab; ++t)
      scores(row, t) =
          -8 * static_cast<float>(ef::Philox{seed}.uniform(static_cast<std::uint32_t>(t)));
  };
  const ef::BeamSearchOptions options{.beams = 3, .max_new_tokens = 6, .end_tokens = {2}};
  const auto expected = reference::beam_search(options, [&](const Tokens& tokens) {
    ef::Tensor<float, 2> scores(1, vocab);
    score(tokens, scores, 0);
    return std::vector<double>(scores.data(), scores.data() + vocab);
  });
  Communicator::run(kRanks, [&](Communicator& communicator) {
    ef::BeamSearch search(1, options);
    std::vector<Tokens> beams(1);
    while (!search.done()) {
      ef::Tensor<float, 2> scores(static_cast<Index>(beams.size()), vocab);
      for (std::size_t i = 0; i < beams.size(); ++i) score(beams[i], scores, static_cast<Index>(i));
      ef::vocabulary_parallel_beam_search_step(
          kDevice, search, shard_of(scores, communicator.rank(), kRanks), vocab, communicator);
      std::vector<Tokens> next;
      for (Index i = 0; i < options.beams; ++i) {
        next.push_back(
            beams[static_cast<std::size_t>(search.parents()[static_cast<std::size_t>(i)])]);
        next.back().push_back(search.tokens()(i));
      }
      beams = next;
    }
    ASSERT_EQ(search.hypotheses(0).size(), expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(search.hypotheses(0)[i].tokens, expected[i].tokens);
      EXPECT_NEAR(search.hypotheses(0)[i].score, expected[i].score, 1e-12);
    }
  });
}

/// (batch, places, vocab), of which every other row is even.
ef::Tensor<double, 3> distributions(Index batch, Index places, Index vocab, unsigned seed) {
  auto p = random_tensor<double, 3>({batch, places, vocab}, seed);
  for (Index row = 0; row < batch * places; ++row) {
    double *const x = p.data() + row * vocab, total = 0;
    for (Index v = 0; v < vocab; ++v) total += x[v] = row % 2 == 0 ? 1.0 : std::exp(x[v]);
    for (Index v = 0; v < vocab; ++v) x[v] /= total;
  }
  return p;
}

TEST(VocabularyReference, Speculation) {
  constexpr Index batch = 60, nodes = 5, vocab = 131;
  const auto q = distributions(batch, nodes + 1, vocab, 1),
             p = distributions(batch, nodes + 1, vocab, 2);
  const ef::Tensor<double, 3> of_chain =
      q.slice(Eigen::array<Index, 3>{0, 0, 0}, Eigen::array<Index, 3>{batch, nodes, vocab});
  const std::vector<std::int32_t> tree{-1, -1, 0, 0, 3};
  ef::Tensor<std::int32_t, 1> parents(nodes);
  std::copy(tree.begin(), tree.end(), parents.data());
  ef::Tensor<std::int32_t, 2> tokens(batch, nodes);
  ef::Philox random{8};
  for (Index i = 0; i < tokens.size(); ++i)
    tokens.data()[i] = static_cast<std::int32_t>(random() % vocab);
  const ef::Philox rng{4};
  Communicator::run(kRanks, [&](Communicator& communicator) {
    const int rank = communicator.rank();
    const auto target = shard_of(p, rank, kRanks), draft = shard_of(q, rank, kRanks);
    const auto chain = ef::vocabulary_parallel_verify_speculative(
        tokens, shard_of(of_chain, rank, kRanks), target, vocab, communicator, ef::Philox{4});
    const auto walk = ef::vocabulary_parallel_verify_speculative_tree(
        tokens, parents, draft, target, vocab, communicator, ef::Philox{4});
    const auto certain = ef::vocabulary_parallel_verify_speculative_tree(
        tokens, parents, target, vocab, communicator, ef::Philox{4});
    for (Index r = 0; r < batch; ++r) {
      const ef::Tensor<double, 2> own_q = q.chip(r, 0), own_p = p.chip(r, 0);
      const std::vector<std::int32_t> drafts(&tokens(r, 0), &tokens(r, 0) + nodes);
      const auto row = static_cast<std::uint32_t>(r);
      const auto expect = [&](const auto& result, const std::vector<std::int32_t>& expected) {
        ASSERT_EQ(result.accepted_counts(r) + 1, static_cast<Index>(expected.size())) << r;
        for (std::size_t i = 0; i < expected.size(); ++i)
          EXPECT_EQ(result.tokens(r, static_cast<Index>(i)), expected[i]) << r;
      };
      expect(chain, reference::verified_tokens(drafts, own_q, own_p, rng, row));
      expect(walk, reference::verified_tree(drafts, tree, own_q, own_p, false, rng, row).tokens);
      expect(certain, reference::verified_tree(drafts, tree, {}, own_p, false, rng, row).tokens);
    }
  });
}

template <typename Call>
void refuses(Call&& call, std::initializer_list<std::string> words) {
  expect_throws<std::invalid_argument>(call, words);
}

// Of a head: what every operator that has one says of it.
TEST(VocabularyArguments, OfAHead) {
  const Head head;
  const ef::Tensor<float, 2> narrow(kVocab, 7), none(0, 8);
  const ef::SamplingParams plain, cold{.temperature = -1}, far{.logit_bias = {{kVocab, 1.f}}};
  const std::vector<ef::SamplingParams> few(kRows - 1);
  std::vector<ef::Philox> generators(kRows - 1, ef::Philox{1});
  const std::vector<std::int32_t> tokens(kRows, 1), fewer(kRows - 1, 1);
  Communicator::run(2, [&](Communicator& c) {
    const auto check = [&](const std::string& name, const auto& call) {
      refuses([&] { call(narrow, plain); }, {name, "weight has 7 columns, hidden has 8"});
      refuses([&] { call(none, plain); }, {name, "weight has 0 rows"});
      refuses([&] { call(head.weight, cold); }, {name, "temperature is -1"});
      refuses([&] { call(head.weight, far); }, {name, "301"});
      refuses([&] { call(head.weight, few); }, {name, "params has 4"});
    };
    check("vocabulary_parallel_sample", [&](const auto& weight, const auto& params) {
      ef::vocabulary_parallel_sample(head.hidden, weight, c, params, ef::Philox{1});
    });
    check("vocabulary_parallel_sample_with_log_probabilities",
          [&](const auto& weight, const auto& params) {
            ef::vocabulary_parallel_sample_with_log_probabilities(head.hidden, weight, c, params,
                                                                  ef::Philox{1});
          });
    check("vocabulary_parallel_log_probabilities_of", [&](const auto& weight, const auto& params) {
      ef::vocabulary_parallel_log_probabilities_of(head.hidden, weight, c, tokens, params);
    });
    check("vocabulary_parallel_sampling_probabilities",
          [&](const auto& weight, const auto& params) {
            ef::vocabulary_parallel_sampling_probabilities(head.hidden, weight, c, params);
          });
    refuses([&] { ef::vocabulary_parallel_sample(head.hidden, head.weight, c, plain, generators); },
            {"vocabulary_parallel_sample", "4"});
    refuses(
        [&] {
          ef::vocabulary_parallel_sample_with_log_probabilities(head.hidden, head.weight, c, plain,
                                                                generators);
        },
        {"vocabulary_parallel_sample_with_log_probabilities", "4"});
    refuses(
        [&] {
          ef::vocabulary_parallel_log_probabilities_of(head.hidden, head.weight, c, fewer, plain);
        },
        {"vocabulary_parallel_log_probabilities_of", "tokens has 4 elements"});
    refuses(
        [&] {
          ef::vocabulary_parallel_log_probabilities_of(
              head.hidden, head.weight, c, tokens,
              ef::SamplingParams{.xtc_probability = .5, .xtc_threshold = .1});
        },
        {"vocabulary_parallel_log_probabilities_of", "xtc_probability"});
  });
}

TEST(VocabularyArguments, Destinations) {
  const Head head;
  const ef::SamplingParams plain;
  const std::vector<std::int32_t> tokens(kRows, 1);
  Communicator::run(2, [&](Communicator& c) {
    std::vector<ef::SampleStatus> few(kRows - 1), statuses(kRows);
    ef::Tensor<std::int32_t, 1> ids(kRows), fewer(kRows - 1);
    ef::Tensor<float, 1> scores(kRows), fewer_scores(kRows - 1);
    ids.setConstant(-7);
    const auto sample = [&](auto& to, std::span<ef::SampleStatus> ends) {
      ef::vocabulary_parallel_sample_into(kDevice, to, head.hidden, head.weight, c, plain,
                                          ef::Philox{1}, ends);
    };
    refuses([&] { sample(fewer, {}); }, {"vocabulary_parallel_sample", "ids has 4 elements"});
    refuses([&] { sample(ids, few); }, {"vocabulary_parallel_sample", "statuses has 4 elements"});
    const auto score = [&](auto& to, std::span<ef::SampleStatus> ends) {
      ef::vocabulary_parallel_log_probabilities_of_into(kDevice, to, head.hidden, head.weight, c,
                                                        tokens, plain, ends);
    };
    constexpr auto of_tokens = "vocabulary_parallel_log_probabilities_of";
    refuses([&] { score(fewer_scores, {}); }, {of_tokens, "log_probabilities has 4 elements"});
    refuses([&] { score(scores, few); }, {of_tokens, "statuses has 4 elements"});
    const auto spread = [&](const auto& to, std::span<ef::SampleStatus> ends) {
      ef::vocabulary_parallel_sampling_probabilities_into(kDevice, to, head.hidden, head.weight, c,
                                                          plain, ends);
    };
    ef::Tensor<float, 2> own(kRows, ef::shard_range(kVocab, c.rank(), 2).size());
    const ef::TensorView<float, 2> all(own.data(), own.dimension(0), own.dimension(1));
    refuses([&] { spread(all, few); },
            {"vocabulary_parallel_sampling_probabilities", "statuses has 4 elements"});

    ef::Tensor<std::int32_t, 2> best(kRows, 2), wide(kRows, 3);
    ef::Tensor<float, 2> logs(kRows, 2);
    const ef::SampleViews good{ids, scores, scores, ids, best, logs, logs, statuses};
    const auto draw = [&](const ef::SampleViews& to) {
      ef::vocabulary_parallel_sample_with_log_probabilities_into(
          kDevice, to, head.hidden, head.weight, c, plain, ef::Philox{1});
    };
    constexpr auto name = "vocabulary_parallel_sample_with_log_probabilities";
    const auto refuses_view = [&](const ef::SampleViews& to, const std::string& argument) {
      refuses([&] { draw(to); }, {name, argument});
    };
    refuses_view({fewer, scores, scores, ids, best, logs, logs, statuses}, "ids has 4");
    refuses_view({ids, fewer_scores, scores, ids, best, logs, logs, statuses},
                 "log_probabilities has 4");
    refuses_view({ids, scores, fewer_scores, ids, best, logs, logs, statuses},
                 "processed_log_probabilities has 4");
    refuses_view({ids, scores, scores, fewer, best, logs, logs, statuses}, "ranks has 4");
    refuses_view({ids, scores, scores, ids, wide, logs, logs, statuses},
                 "best_log_probabilities has shape (5, 2)");
    refuses_view({ids, scores, scores, ids, best, logs, logs, few}, "statuses has 4");
    for (Index r = 0; r < kRows; ++r) EXPECT_EQ(ids(r), -7);  // nothing was written
    draw(good);
    EXPECT_GE(ids(0), 0);
  });
}

}  // namespace
}  // namespace eigenformer_test
