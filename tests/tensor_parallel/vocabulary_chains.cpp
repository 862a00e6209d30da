// Any chain of stages over a divided vocabulary draws what it draws from the whole row, and what
// travels is small beside the row.
#include <eigenformer/linear.h>

#include <atomic>

#include "allocation_count.h"
#include "vocabulary_support.h"

namespace eigenformer_test {
namespace {

using Status = ef::SampleStatus;
constexpr Eigen::DefaultDevice kDevice;

ef::Tensor<float, 2> one() {
  ef::Tensor<float, 2> hidden(1, 1);
  hidden.setConstant(1);
  return hidden;
}

struct Drawn {
  std::int32_t token;
  Status status;
  friend bool operator==(const Drawn&, const Drawn&) = default;
};

template <typename Hidden, typename Head, typename C>
Drawn drawn_by_ranks(const Hidden& hidden, const Head& head, C& communicator,
                     const ef::SamplingParams& params, std::uint64_t seed) {
  ef::Tensor<std::int32_t, 1> ids(1);
  std::vector<Status> statuses(1, Status::negative);
  ef::vocabulary_parallel_sample_into(kDevice, ids, hidden, head, communicator, params,
                                      ef::Philox{seed}, statuses);
  return {ids(0), statuses[0]};
}

template <typename T>
Drawn drawn_by_one(const ef::Tensor<T, 2>& logits, const ef::SamplingParams& params,
                   std::uint64_t seed) {
  ef::Tensor<std::int32_t, 1> ids(1);
  std::vector<Status> statuses(1, Status::negative);
  ef::sample_into(kDevice, ids, logits, params, ef::Philox{seed}, statuses);
  return {ids(0), statuses[0]};
}

void check_random_chains(Index vocab, int rows, int draws) {
  for (int ranks : {1, 2, 3, 5})
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      ef::Philox random{static_cast<std::uint64_t>(vocab + ranks)};
      for (int row = 0; row < rows; ++row) {
        const auto head = head_of(logits_of_kind(row, vocab, row + ranks));
        const ef::Tensor<float, 2> logits = ef::linear(one(), head);
        const ef::SamplingParams params = random_chain(vocab, random);
        for (std::uint64_t seed = 0; seed < static_cast<std::uint64_t>(draws); ++seed)
          ASSERT_EQ(drawn_by_ranks(one(), head, communicator, params, seed),
                    drawn_by_one(logits, params, seed))
              << "vocabulary " << vocab << ", " << ranks << " ranks, row " << row << ", seed "
              << seed;
      }
    });
}

TEST(VocabularyChains, AreThoseOfOneRank) {
  check_random_chains(203, 400, 3);
  check_random_chains(5003, 150, 3);
  check_random_chains(20011, 40, 2);
}

TEST(VocabularyChains, AreThoseOfOneRankInBfloat16AndDouble) {
  const auto check = [&]<typename T>(T) {
    ef::Tensor<T, 2> hidden(1, 1);
    hidden.setConstant(T(1));
    for (int ranks : {2, 3})
      ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
        ef::Philox random{static_cast<std::uint64_t>(ranks)};
        for (int row = 0; row < 60; ++row) {
          const Index vocab = row % 2 == 0 ? 301 : 5000;
          const auto head = head_of(logits_of_kind<T>(row, vocab, row));
          const ef::Tensor<T, 2> logits = ef::linear(hidden, head);
          const ef::SamplingParams params = random_chain(vocab, random);
          for (std::uint64_t seed = 0; seed < 3; ++seed)
            ASSERT_EQ(drawn_by_ranks(hidden, head, communicator, params, seed),
                      drawn_by_one(logits, params, seed))
                << "row " << row;
        }
      });
  };
  check(Eigen::bfloat16{});
  check(double{});
}

// Where many tokens are weighed in float: p that leaves little out, equals at the end, orders in
// which other stages follow.
TEST(VocabularyChains, NucleiOfManyTokens) {
  for (int ranks : {1, 2, 3, 5})
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      ef::Philox random{static_cast<std::uint64_t>(ranks)};
      for (int row = 0; row < 42; ++row) {
        const Index vocab = row % 2 == 0 ? 9001 : 20011;
        const auto head = head_of(logits_of_kind(row, vocab, row + ranks));
        const ef::Tensor<float, 2> logits = ef::linear(one(), head);
        const auto number = [&] { return random() * 0x1p-32; };
        ef::SamplingParams params{.temperature = .3 + 1.5 * number(), .top_p = number()};
        if (row % 5 == 0) params.top_p = 1 - std::pow(10, -1 - row % 6);
        if (row % 4 == 1) params.min_p = .01;
        if (row % 4 == 2) params.order = ef::kVllmOrder;
        if (row % 4 == 3) params.order = ef::kLlamaCppOrder;
        if (row % 9 == 4) params.typical_p = .9;
        if (row % 13 == 6) params.temperature = 1e-6;  // whose weights floats do not tell
        for (std::uint64_t seed = 0; seed < 3; ++seed)
          ASSERT_EQ(drawn_by_ranks(one(), head, communicator, params, seed),
                    drawn_by_one(logits, params, seed))
              << ranks << " ranks, row " << row << ", seed " << seed;
      }
    });
}

// Sums that meet their limit exactly: equals, of which p of the weight is a whole number.
TEST(VocabularyChains, LimitsThatAreMetExactly) {
  ef::Tensor<float, 1> halves(4096), equals(9000);
  equals.setConstant(1.5f);
  halves.setConstant(-40.f);
  for (Index i = 0; i < 64; ++i) halves(i * 64) = 2;
  std::vector<ef::SamplingParams> all;
  for (double p : {0.0, .25, .5, .75, 1 - 1e-16})
    all.insert(all.end(), {{.top_p = p},
                           {.epsilon_cutoff = p / 64},
                           {.top_p = .5, .min_p = p},
                           {.top_n_sigma = p, .mirostat = 2, .mirostat_mu = 6}});
  for (int ranks : {2, 3, 5})
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      for (const auto* row : {&halves, &equals})
        for (std::size_t i = 0; i < all.size(); ++i)
          for (std::uint64_t seed = 0; seed < 10; ++seed) {
            const auto head = head_of(*row);
            const ef::Tensor<float, 2> logits = ef::linear(one(), head);
            ASSERT_EQ(drawn_by_ranks(one(), head, communicator, all[i], seed),
                      drawn_by_one(logits, all[i], seed))
                << i;
          }
    });
}

/// A hidden state for each row of logits, with the head that makes them: finite logits.
struct Rows {
  ef::Tensor<float, 2> hidden, head, logits;
  std::vector<ef::SamplingParams> params;
};
Rows rows_of_logits(Index rows, Index vocab) {
  Rows made{{rows, rows}, {vocab, rows}, {}, {}};
  made.hidden.setZero();
  ef::Philox random{17};
  for (Index r = 0; r < rows; ++r) {
    made.hidden(r, r) = 1;
    const auto logits = logits_of_kind(r % 5 == 4 ? 6 : static_cast<int>(r % 5), vocab, 3);
    for (Index t = 0; t < vocab; ++t) made.head(t, r) = logits(t);
    made.params.push_back(random_chain(vocab, random));
  }
  made.logits = ef::linear(made.hidden, made.head);
  return made;
}

TEST(VocabularyChains, NucleiOfRowsThatEndApart) {
  constexpr Index rows = 9;
  Rows all = rows_of_logits(rows, 9001);
  for (std::size_t r = 0; r < rows; ++r)
    if (r != 4) all.params[r] = {.top_p = .1 + .1 * static_cast<double>(r), .min_p = r % 2 * .01};
  for (int ranks : {2, 3})
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      for (std::uint64_t seed = 0; seed < 4; ++seed)
        EXPECT_TRUE(same_bits(ef::vocabulary_parallel_sample(all.hidden, all.head, communicator,
                                                             all.params, ef::Philox{seed}),
                              ef::sample(all.logits, all.params, ef::Philox{seed})));
    });
}

TEST(VocabularyChains, RowsHaveParametersAndGeneratorsOfTheirOwn) {
  constexpr Index rows = 23;
  for (const bool guided : {false, true}) {
    Rows all = rows_of_logits(rows, 4500);
    if (guided) {
      all.params[3].guidance_row = 8;
      all.params[3].guidance_scale = 1.6;
    }
    Eigen::ThreadPool pool(2);
    const Eigen::ThreadPoolDevice threads(&pool, 2);
    for (int ranks : {1, 2, 3})
      ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
        std::vector<ef::Philox> generators(rows, ef::Philox{3}), again = generators;
        for (std::uint64_t step = 0; step < 4; ++step) {
          ef::Philox rng{step}, same{step};
          EXPECT_TRUE(same_bits(
              ef::vocabulary_parallel_sample(all.hidden, all.head, communicator, all.params, rng),
              ef::sample(all.logits, all.params, same)));
          EXPECT_EQ(rng.position(), same.position());
          EXPECT_TRUE(same_bits(ef::vocabulary_parallel_sample(all.hidden, all.head, communicator,
                                                               all.params, generators),
                                ef::sample(all.logits, all.params, again)));
        }
        if (ranks > 1) return;  // the pool is of one rank
        EXPECT_TRUE(
            same_bits(ef::vocabulary_parallel_sample(threads, all.hidden, all.head, communicator,
                                                     all.params, ef::Philox{5}),
                      ef::sample(all.logits, all.params, ef::Philox{5})));
      });
  }
}

TEST(VocabularyChains, StatusesOfShardsAreThoseOfTheRow) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const std::vector<ef::SamplingParams> all{{},
                                            {.top_p = .9},
                                            {.min_p = .1},
                                            {.top_k = 3},
                                            {.temperature = 0},
                                            {.typical_p = .5},
                                            {.top_p = .5, .logit_bias = {{1, 2.f}}},
                                            {.token_mask = {0u, 0u}},
                                            {.min_p = .2, .token_mask = {0u, 1u << 7}},
                                            {.forced_tokens = {{0, 5}}}};
  for (int ranks : {1, 2, 3, 5, 50})  // of 50 ranks 10 have no token
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      for (std::size_t i = 0; i < all.size(); ++i)
        for (Index place : {-1, 0, 20, 39})
          for (float bad : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity, 1.f}) {
            auto row = logits_of_kind(0, 40, 5);
            if (bad == -infinity && place < 0) row.setConstant(bad);
            if (bad == -infinity && place == 20)
              for (Index t = 0; t < 20; ++t) row(t) = bad;  // a shard of nothing
            if (place >= 0) row(place) = bad;
            if (place == 39) row(0) = infinity;  // NaN of a later shard comes first
            const auto head = head_of(row);
            const ef::Tensor<float, 2> logits = ef::linear(one(), head);
            const Drawn expected = drawn_by_one(logits, all[i], 1);
            ASSERT_EQ(drawn_by_ranks(one(), head, communicator, all[i], 1), expected)
                << "set " << i << ", " << ranks << " ranks, " << bad << " at " << place;
            if (expected.status == Status::ok) continue;
            ASSERT_THROW(
                ef::vocabulary_parallel_sample(one(), head, communicator, all[i], ef::Philox{1}),
                std::invalid_argument);
          }
    });
}

TEST(VocabularyChains, ABadArgumentOfOneRankStopsAll) {
  const auto head = head_of(logits_of_kind(0, 40, 5));
  for (const ef::SamplingParams& bad :
       {ef::SamplingParams{.temperature = -1}, ef::SamplingParams{.logit_bias = {{40, 1.f}}}}) {
    std::atomic<int> refused = 0, stopped = 0;
    EXPECT_THROW(ef::ThreadCommunicator::run(3,
                                             [&](ef::ThreadCommunicator& communicator) {
                                               const bool is_bad = communicator.rank() == 1;
                                               try {
                                                 drawn_by_ranks(one(), head, communicator,
                                                                is_bad ? bad : ef::SamplingParams{},
                                                                1);
                                               } catch (const std::invalid_argument&) {
                                                 ++refused;
                                                 throw;
                                               } catch (const ef::CommunicatorError&) {
                                                 ++stopped;
                                                 throw;
                                               }
                                             }),
                 std::exception);
    EXPECT_EQ(refused, 1);
    EXPECT_EQ(stopped, 2);
  }
}

TEST(VocabularyChains, SecondCallsAllocateNothing) {
  const Rows all = rows_of_logits(12, 9000);
  ef::SelfCommunicator communicator;
  ef::Tensor<std::int32_t, 1> ids(12);
  ef::Workspace workspace;
  const auto call = [&] {
    ef::vocabulary_parallel_sample_into(kDevice, ids, all.hidden, all.head, communicator,
                                        all.params, ef::Philox{1}, {}, workspace);
  };
  call();
  EXPECT_EQ(count_allocations(call), 0);
}

/// Bytes that a rank holds after the gathers of one draw.
std::size_t bytes_of_draw(const ef::Tensor<float, 1>& logits, const ef::SamplingParams& params,
                          int ranks) {
  std::size_t bytes = 0;
  const auto head = head_of(logits);
  ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
    CountingCommunicator counting{communicator};
    drawn_by_ranks(one(), head, counting, params, 1);
    if (communicator.rank() == 0) bytes = counting.bytes;
  });
  return bytes;
}

TEST(VocabularyChains, SendLittle) {
  constexpr Index vocab = 20000;
  constexpr std::size_t whole = vocab * sizeof(float);
  const auto normal = logits_of_kind(1, vocab, 1), peaked = logits_of_kind(3, vocab, 1),
             flat = logits_of_kind(2, vocab, 1);
  for (int ranks : {2, 3}) {
    const std::size_t world = static_cast<std::size_t>(ranks);
    // the largest logits, sums of weights, a token
    for (const auto* logits : {&normal, &peaked, &flat}) {
      EXPECT_EQ(bytes_of_draw(*logits, {}, ranks), world * (32 + 16 + 4));
      EXPECT_EQ(bytes_of_draw(*logits, {.temperature = .7}, ranks), world * (32 + 16 + 4));
      EXPECT_EQ(bytes_of_draw(*logits, {.top_k = 50, .top_p = .9}, ranks), world * (32 + 50 * 8));
      EXPECT_EQ(bytes_of_draw(*logits, {.temperature = 0}, ranks), world * (32 + 8));
    }
    EXPECT_LT(bytes_of_draw(normal, {.min_p = .05}, ranks), whole / 50);
    EXPECT_LT(bytes_of_draw(normal, {.top_p = .9}, ranks), whole / 20);
    EXPECT_LT(bytes_of_draw(flat, {.top_p = .9}, ranks), whole / 8);
    EXPECT_LT(bytes_of_draw(normal, {.top_n_sigma = 1}, ranks), whole / 50);
    EXPECT_LT(bytes_of_draw(normal, {.epsilon_cutoff = 3e-4}, ranks), whole / 20);
    EXPECT_LT(bytes_of_draw(normal, {.eta_cutoff = 3e-4}, ranks), whole / 6);
    EXPECT_LT(bytes_of_draw(normal, {.mirostat = 2, .mirostat_mu = 9}, ranks), whole / 20);
    EXPECT_LT(bytes_of_draw(peaked, {.top_p = .9}, ranks), whole / 20);
    EXPECT_LT(bytes_of_draw(flat, {.min_p = .5}, ranks), whole / 50);  // keeps all: no list
  }
}

}  // namespace
}  // namespace eigenformer_test
