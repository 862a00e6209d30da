// Speculation over a divided vocabulary: probabilities and verified drafts are those of the whole
// rows, bit for bit.
#include <eigenformer/linear.h>

#include <atomic>
#include <functional>

#include "allocation_count.h"
#include "vocabulary_support.h"

namespace eigenformer_test {
namespace {

using Status = ef::SampleStatus;
constexpr Eigen::DefaultDevice kDevice;

template <typename T>
void check_probabilities(Index vocab, int rows, std::initializer_list<int> worlds) {
  ef::Tensor<T, 2> hidden(1, 1);
  hidden.setConstant(T(1));
  for (int ranks : worlds)
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      ef::Philox random{static_cast<std::uint64_t>(7 * vocab + ranks)};
      for (int row = 0; row < rows; ++row) {
        auto logits_row = logits_of_kind<T>(row, vocab, row + ranks);
        if (row % 11 == 10) logits_row(vocab / 2) = std::numeric_limits<T>::quiet_NaN();
        const auto head = head_of(logits_row);
        const ef::Tensor<T, 2> logits = ef::linear(hidden, head);
        ef::SamplingParams params = random_chain(vocab, random);
        if (row % 3 == 0) params = {.temperature = 1.f + .1f * static_cast<float>(row % 7)};
        params.xtc_probability = row % 2;
        ef::Tensor<float, 2> whole(1, vocab),
            own(1, ef::shard_range(vocab, communicator.rank(), ranks).size());
        own.setConstant(7);
        std::vector<Status> statuses(1, Status::negative), expected(1);
        ef::sampling_probabilities_into(kDevice, whole, logits, params, expected);
        ef::vocabulary_parallel_sampling_probabilities_into(kDevice, own, hidden, head,
                                                            communicator, params, statuses);
        ASSERT_TRUE(same_bits(own, shard_of(whole, communicator.rank(), ranks)))
            << "vocabulary " << vocab << ", " << ranks << " ranks, row " << row;
        ASSERT_EQ(statuses, expected);
      }
    });
}

TEST(VocabularySpeculation, ProbabilitiesAreThoseOfOneRank) {
  check_probabilities<float>(3, 30, {1, 2, 5});
  check_probabilities<float>(203, 150, {1, 2, 3, 5});
  check_probabilities<float>(5003, 60, {1, 2, 3, 5});
  check_probabilities<Eigen::bfloat16>(1000, 30, {2, 3});
  check_probabilities<double>(700, 30, {2, 3});
}

TEST(VocabularySpeculation, ProbabilitiesOfRowsWithParametersOfTheirOwn) {
  constexpr Index rows = 9, vocab = 300;
  const auto hidden = random_tensor<float, 2>({rows, 16}, 3);
  const auto head = random_tensor<float, 2>({vocab, 16}, 4);
  const auto logits = ef::linear(hidden, head);
  ef::Philox random{5};
  std::vector<ef::SamplingParams> params;
  for (Index r = 0; r < rows; ++r) {
    params.push_back(random_chain(vocab, random));
    params.back().xtc_probability = 0;
  }
  params[2] = {};
  params[4] = {};
  params[4].guidance_row = 6;
  params[4].guidance_scale = 1.5;
  const auto whole = ef::sampling_probabilities(logits, params);
  for (int ranks : {1, 3, 4})
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      const auto shard = ef::pack_column_shard<float>(head, communicator);
      ASSERT_TRUE(same_bits(
          ef::vocabulary_parallel_sampling_probabilities(hidden, shard, communicator, params),
          shard_of(whole, communicator.rank(), ranks)));
    });
}

/// (batch, places, vocab): some flat, some peaked, some with zeros, some equal to each other.
template <typename T>
ef::Tensor<T, 3> distributions(Index batch, Index places, Index vocab, int seed) {
  ef::Tensor<T, 3> p(batch, places, vocab);
  for (Index r = 0; r < batch; ++r)
    for (Index i = 0; i < places; ++i) {
      // every third place has the same distribution in draft and target
      const int own = (r + i) % 3 == 0 ? 99 : seed;
      const auto logits =
          logits_of_kind(static_cast<int>(r + 2 * i) % 7, vocab, own + static_cast<int>(5 * r + i));
      double total = 0;
      for (Index v = 0; v < vocab; ++v) total += std::exp(static_cast<double>(logits(v)));
      for (Index v = 0; v < vocab; ++v)
        p(r, i, v) = static_cast<T>(std::exp(static_cast<double>(logits(v))) / total);
    }
  return p;
}

ef::Tensor<std::int32_t, 2> random_tokens(Index batch, Index nodes, Index vocab,
                                          ef::Philox& random) {
  ef::Tensor<std::int32_t, 2> tokens(batch, nodes);
  for (Index i = 0; i < tokens.size(); ++i)
    tokens.data()[i] = random() % 29 == 0
                           ? -1
                           : static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab));
  return tokens;
}

/// Tokens that both distributions like.
template <typename T>
void likely_tokens(ef::Tensor<std::int32_t, 2>& tokens, const ef::Tensor<T, 3>& p,
                   const std::function<Index(Index)>& place_of, ef::Philox& random) {
  for (Index r = 0; r < tokens.dimension(0); ++r)
    for (Index i = 0; i < tokens.dimension(1); ++i) {
      if (random() % 3 == 0) continue;
      const T* const row = &p(r, place_of(i), 0);
      tokens(r, i) = static_cast<std::int32_t>(std::max_element(row, row + p.dimension(2)) - row);
    }
}

void expect_same(const ef::SpeculativeResult& a, const ef::SpeculativeResult& b,
                 const std::string& what) {
  EXPECT_TRUE(same_bits(a.accepted_counts, b.accepted_counts)) << what;
  EXPECT_TRUE(same_bits(a.tokens, b.tokens)) << what;
  EXPECT_EQ(a.statuses, b.statuses) << what;
}
void expect_same(const ef::SpeculativeTreeResult& a, const ef::SpeculativeTreeResult& b,
                 const std::string& what) {
  EXPECT_TRUE(same_bits(a.accepted_counts, b.accepted_counts)) << what;
  EXPECT_TRUE(same_bits(a.tokens, b.tokens)) << what;
  EXPECT_TRUE(same_bits(a.nodes, b.nodes)) << what;
  EXPECT_EQ(a.statuses, b.statuses) << what;
}

/// Puts numbers that are no probabilities somewhere, or zeros everywhere.
template <typename T>
void spoil(ef::Tensor<T, 3>& p, int kind, ef::Philox& random) {
  if (p.size() == 0) return;
  const Index at = static_cast<Index>(random() % static_cast<unsigned>(p.size()));
  const Index row = at / p.dimension(2) * p.dimension(2);
  if (kind == 1) p.data()[at] = std::numeric_limits<T>::quiet_NaN();
  if (kind == 2) p.data()[at] = std::numeric_limits<T>::infinity();
  if (kind == 3) p.data()[at] = T(-1);
  if (kind == 4) std::fill_n(p.data() + row, p.dimension(2), T(0));
  if (kind == 5) std::fill_n(p.data() + row, p.dimension(2), (std::numeric_limits<T>::max)());
}

template <typename Draft, typename Target>
void check_chains(Index batch, Index drafts, Index vocab, std::initializer_list<int> worlds) {
  ef::Philox random{static_cast<std::uint64_t>(vocab + drafts)};
  std::vector<Index> lengths;
  for (Index r = 0; r < batch; ++r)
    lengths.push_back(static_cast<Index>(random() % static_cast<unsigned>(drafts + 1)));
  for (int step = 0; step < 12; ++step) {
    auto target = distributions<Target>(batch, drafts + 1, vocab, step + 1);
    auto draft = distributions<Draft>(batch, drafts, vocab, step + 31);
    auto tokens = random_tokens(batch, drafts, vocab, random);
    likely_tokens(
        tokens, target, [](Index i) { return i; }, random);
    for (int i = 0; i < 3 && drafts > 0; ++i)
      i % 2 == 0 ? spoil(target, step % 6, random) : spoil(draft, step % 6, random);
    ef::SpeculativeOptions options;
    if (step % 2 == 1) options.draft_lengths = lengths;
    std::vector<ef::Philox> generators(static_cast<std::size_t>(batch), ef::Philox{7});
    const auto seed = static_cast<std::uint64_t>(step);
    const auto expected = ef::verify_speculative(tokens, draft, target, ef::Philox{seed}, options);
    const auto of_rows = ef::verify_speculative(tokens, draft, target, generators, options);
    for (int ranks : worlds)
      ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
        const auto q = shard_of(draft, communicator.rank(), ranks);
        const auto p = shard_of(target, communicator.rank(), ranks);
        const std::string what = "vocabulary " + std::to_string(vocab) + ", " +
                                 std::to_string(ranks) + " ranks, step " + std::to_string(step);
        ef::Philox rng{seed};
        expect_same(ef::vocabulary_parallel_verify_speculative(tokens, q, p, vocab, communicator,
                                                               rng, options),
                    expected, what);
        EXPECT_EQ(rng.position(), 1u);
        std::vector<ef::Philox> own(static_cast<std::size_t>(batch), ef::Philox{7});
        expect_same(ef::vocabulary_parallel_verify_speculative(tokens, q, p, vocab, communicator,
                                                               own, options),
                    of_rows, what);
      });
  }
}

TEST(VocabularySpeculation, ChainsAreThoseOfOneRank) {
  check_chains<float, float>(5, 3, 1, {1, 2});
  check_chains<float, float>(6, 4, 50, {1, 2, 3, 60});  // of 60 ranks 10 have no token
  check_chains<float, float>(7, 5, 1000, {1, 2, 3, 5});
  check_chains<Eigen::bfloat16, float>(4, 3, 257, {2, 3, 4});
  check_chains<double, double>(3, 2, 640, {2, 5});
  check_chains<float, float>(3, 0, 300, {2});
  check_chains<float, float>(0, 2, 300, {2});
}

template <typename T>
void check_trees(Index batch, Index nodes, Index vocab, std::initializer_list<int> worlds) {
  ef::Philox random{static_cast<std::uint64_t>(3 * vocab + nodes)};
  ef::Tensor<std::int32_t, 2> parents(batch, nodes);
  ef::Tensor<std::int32_t, 1> shared(nodes);
  for (int step = 0; step < 12; ++step) {
    // wide and flat ones, so that many siblings are refused
    for (Index r = 0; r < batch; ++r)
      for (Index i = 0; i < nodes; ++i)
        parents(r, i) = static_cast<std::int32_t>(random() % static_cast<unsigned>(i / 3 + 1)) - 1;
    for (Index i = 0; i < nodes; ++i) shared(i) = parents(0, i);
    auto target = distributions<T>(batch, nodes + 1, vocab, step + 1);
    auto draft = distributions<T>(batch, nodes + 1, vocab, step + 31);
    auto tokens = random_tokens(batch, nodes, vocab, random);
    if (step % 3 == 2)
      likely_tokens(
          tokens, target, [&](Index i) { return Index{shared(i)} + 1; }, random);
    if (step > 5) spoil(target, step % 6, random), spoil(draft, step % 6, random);
    const auto seed = static_cast<std::uint64_t>(step);
    const ef::SpeculativeTreeOptions options{.with_replacement = step % 4 == 3};
    const auto expected =
        ef::verify_speculative_tree(tokens, parents, draft, target, ef::Philox{seed}, options);
    const auto of_shared =
        ef::verify_speculative_tree(tokens, shared, draft, target, ef::Philox{seed}, options);
    const auto certain = ef::verify_speculative_tree(tokens, parents, target, ef::Philox{seed});
    for (int ranks : worlds)
      ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
        const auto q = shard_of(draft, communicator.rank(), ranks);
        const auto p = shard_of(target, communicator.rank(), ranks);
        const std::string what = "vocabulary " + std::to_string(vocab) + ", " +
                                 std::to_string(ranks) + " ranks, step " + std::to_string(step);
        expect_same(ef::vocabulary_parallel_verify_speculative_tree(
                        tokens, parents, q, p, vocab, communicator, ef::Philox{seed}, options),
                    expected, what);
        expect_same(ef::vocabulary_parallel_verify_speculative_tree(
                        tokens, shared, q, p, vocab, communicator, ef::Philox{seed}, options),
                    of_shared, what + ", shared");
        expect_same(ef::vocabulary_parallel_verify_speculative_tree(tokens, parents, p, vocab,
                                                                    communicator, ef::Philox{seed}),
                    certain, what + ", certain");
      });
  }
}

TEST(VocabularySpeculation, TreesAreThoseOfOneRank) {
  check_trees<float>(5, 9, 6, {1, 2, 7});
  check_trees<float>(5, 14, 1000, {1, 2, 3, 5});
  check_trees<Eigen::half>(4, 8, 257, {3});
  check_trees<double>(3, 9, 300, {2});
}

// What lies past a row's drafts is not read, nor are distributions that no token is drawn from.
TEST(VocabularySpeculation, ReadsWhatOneRankReads) {
  constexpr Index vocab = 400;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  auto target = distributions<float>(1, 4, vocab, 1), draft = target;
  ef::Tensor<float, 3> q =
      draft.slice(Eigen::array<Index, 3>{0, 0, 0}, Eigen::array<Index, 3>{1, 3, vocab});
  q.chip(0, 1) = q.chip(0, 1) * .5f;  // accepted
  q.chip(1, 1).setConstant(nan), q.chip(2, 1).setConstant(nan);
  target.chip(2, 1).setConstant(nan), target.chip(3, 1).setConstant(nan);
  ef::Tensor<std::int32_t, 2> tokens(1, 3);
  tokens.setValues({{17, 300, 5}});
  const std::vector<Index> lengths{1};
  const auto expected =
      ef::verify_speculative(tokens, q, target, ef::Philox{3}, {.draft_lengths = lengths});
  ASSERT_EQ(expected.statuses[0], Status::ok);
  ef::ThreadCommunicator::run(3, [&](ef::ThreadCommunicator& communicator) {
    expect_same(
        ef::vocabulary_parallel_verify_speculative(
            tokens, shard_of(q, communicator.rank(), 3), shard_of(target, communicator.rank(), 3),
            vocab, communicator, ef::Philox{3}, {.draft_lengths = lengths}),
        expected, "lengths");
  });
}

TEST(VocabularySpeculation, RefusesOnEveryRank) {
  constexpr Index vocab = 10;
  const auto target = distributions<float>(2, 3, vocab, 1),
             draft = distributions<float>(2, 3, 10, 2);
  const ef::Tensor<float, 3> two =
      draft.slice(Eigen::array<Index, 3>{0, 0, 0}, Eigen::array<Index, 3>{2, 2, vocab});
  ef::Tensor<std::int32_t, 2> tokens(2, 2), bad(2, 2);
  tokens.setValues({{1, 2}, {3, 4}});
  bad.setValues({{1, 2}, {3, 10}});
  ef::Tensor<std::int32_t, 1> parents(2), bad_parents(2);
  parents.setValues({-1, 0});
  bad_parents.setValues({-1, 1});
  const auto hidden = random_tensor<float, 2>({2, 4}, 3),
             head = random_tensor<float, 2>({10, 4}, 4);
  ef::ThreadCommunicator::run(3, [&](ef::ThreadCommunicator& communicator) {
    const int rank = communicator.rank();
    const auto q = shard_of(two, rank, 3), p = shard_of(target, rank, 3),
               q_tree = shard_of(draft, rank, 3);
    ef::Philox rng{1};
    const auto refuses = [&](auto&& call, std::initializer_list<std::string> words) {
      expect_throws<std::invalid_argument>(call, words);
    };
    constexpr auto chain = "vocabulary_parallel_verify_speculative",
                   tree = "vocabulary_parallel_verify_speculative_tree",
                   probabilities = "vocabulary_parallel_sampling_probabilities";
    const auto verify = [&](const auto& t, const auto& d, const auto& to, Index n) {
      ef::vocabulary_parallel_verify_speculative(t, d, to, n, communicator, rng);
    };
    refuses([&] { verify(bad, q, p, vocab); }, {chain, "draft_tokens(1, 1) is 10"});
    refuses([&] { verify(tokens, q, p, vocab + 3); },
            {chain, "target_probabilities has", "of 13 tokens"});
    refuses([&] { verify(tokens, q, p, 0); }, {chain, "vocab"});
    refuses([&] { verify(tokens, q_tree, p, vocab); }, {chain, "draft_probabilities has shape"});
    refuses([&] { verify(tokens, q, q, vocab); }, {chain, "target_probabilities has shape"});
    refuses(
        [&] {
          ef::vocabulary_parallel_verify_speculative_tree(tokens, bad_parents, q_tree, p, vocab,
                                                          communicator, rng);
        },
        {tree, "parents of row 0: that of node 1 is 1"});
    refuses(
        [&] {
          ef::vocabulary_parallel_verify_speculative_tree(tokens, parents, q, p, vocab,
                                                          communicator, rng);
        },
        {tree, "draft_probabilities has shape"});
    refuses(
        [&] {
          ef::vocabulary_parallel_verify_speculative_tree(tokens, parents, p, vocab + 3,
                                                          communicator, rng);
        },
        {tree, "of 13 tokens"});
    EXPECT_EQ(rng.position(), 0u);
    ef::Tensor<float, 2> out(2, 10);
    refuses(
        [&] {
          ef::vocabulary_parallel_sampling_probabilities_into(kDevice, out, hidden, head,
                                                              communicator, ef::SamplingParams{});
        },
        {probabilities, "probabilities has shape (2, 10)", "shard of rank"});
    refuses(
        [&] {
          ef::vocabulary_parallel_sampling_probabilities(
              hidden, head, communicator,
              ef::SamplingParams{.xtc_probability = .5, .xtc_threshold = .1});
        },
        {probabilities, "xtc_probability"});
    auto spoiled = hidden;
    spoiled(1, 0) = std::numeric_limits<float>::quiet_NaN();
    refuses(
        [&] {
          ef::vocabulary_parallel_sampling_probabilities(spoiled, head, communicator,
                                                         ef::SamplingParams{});
        },
        {probabilities, "row 1"});
  });
  std::atomic<int> stopped = 0;
  EXPECT_THROW(ef::ThreadCommunicator::run(3,
                                           [&](ef::ThreadCommunicator& communicator) {
                                             const int rank = communicator.rank();
                                             try {
                                               ef::vocabulary_parallel_verify_speculative(
                                                   rank == 1 ? bad : tokens, shard_of(two, rank, 3),
                                                   shard_of(target, rank, 3), vocab, communicator,
                                                   ef::Philox{1});
                                             } catch (const ef::CommunicatorError&) {
                                               ++stopped;
                                               throw;
                                             }
                                           }),
               std::exception);
  EXPECT_EQ(stopped, 2);
}

TEST(VocabularySpeculation, SecondCallsAllocateNothingAndSendLittle) {
  constexpr Index vocab = 20000, batch = 2, nodes = 4;
  const auto target = distributions<float>(batch, nodes + 1, vocab, 1),
             draft = distributions<float>(batch, nodes + 1, vocab, 2);
  const ef::Tensor<float, 3> of_chain =
      draft.slice(Eigen::array<Index, 3>{0, 0, 0}, Eigen::array<Index, 3>{batch, nodes, vocab});
  ef::Tensor<std::int32_t, 2> tokens(batch, nodes);
  tokens.setValues({{1, 9000, 3, 19000}, {5, 6, 7, 8}});
  ef::Tensor<std::int32_t, 1> parents(nodes);
  parents.setValues({-1, -1, -1, 0});
  ef::Tensor<float, 2> hidden(1, 1);
  hidden.setConstant(1);
  const auto head = head_of(logits_of_kind(1, vocab, 1));
  ef::ThreadCommunicator::run(3, [&](ef::ThreadCommunicator& communicator) {
    CountingCommunicator counting{communicator};
    const int rank = communicator.rank();
    const auto q = shard_of(of_chain, rank, 3), q_tree = shard_of(draft, rank, 3),
               p = shard_of(target, rank, 3);
    ef::SpeculativeResult chain;
    ef::SpeculativeTreeResult tree;
    ef::Tensor<float, 2> own(1, ef::shard_range(vocab, rank, 3).size());
    ef::Workspace workspace;
    const auto call = [&] {
      ef::vocabulary_parallel_verify_speculative_into(kDevice, chain, tokens, q, p, vocab, counting,
                                                      ef::Philox{1}, {}, workspace);
      ef::vocabulary_parallel_verify_speculative_tree_into(
          kDevice, tree, tokens, parents, q_tree, p, vocab, counting, ef::Philox{1}, {}, workspace);
      ef::vocabulary_parallel_sampling_probabilities_into(kDevice, own, hidden, head, counting,
                                                          ef::SamplingParams{}, {}, workspace);
    };
    call();
    // one row of floats has 80000; 157 sums and 254 tokens of shared blocks travel for each sum
    EXPECT_LT(counting.bytes, 14 * (157 + 254) * sizeof(double));
    communicator.barrier();
    EXPECT_EQ(count_allocations(call), 0);
    communicator.barrier();
  });
}

}  // namespace
}  // namespace eigenformer_test
