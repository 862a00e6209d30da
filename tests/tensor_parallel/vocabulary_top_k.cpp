// The best tokens of divided rows, their log-softmax, and beam search by them, are those of whole
// rows.
#include <eigenformer/log_softmax.h>

#include "allocation_count.h"
#include "vocabulary_support.h"

namespace eigenformer_test {
namespace {

using Status = ef::SampleStatus;
constexpr Eigen::DefaultDevice kDevice;

/// Rows of many kinds: ties, zeros of both signs, infinities, one with NaN.
template <typename T>
ef::Tensor<T, 2> rows_of_kinds(Index vocab) {
  constexpr Index rows = 10;
  ef::Tensor<T, 2> x(rows, vocab);
  for (Index r = 0; r < rows; ++r) {
    const auto row = logits_of_kind<T>(static_cast<int>(r), vocab, static_cast<int>(r));
    std::copy_n(row.data(), vocab, &x(r, 0));
  }
  for (Index i = 0; i < vocab; ++i) x(6, i) = i % 2 == 0 ? T(0) : T(-0.0f);
  x(8, vocab - 1) = std::numeric_limits<T>::infinity();
  x(9, vocab / 2) = std::numeric_limits<T>::quiet_NaN();
  return x;
}

template <typename T>
void check_top_k(Index vocab, std::initializer_list<int> worlds) {
  const auto x = rows_of_kinds<T>(vocab);
  const Index rows = x.dimension(0);
  for (Index k : {Index{0}, Index{1}, Index{5}, vocab / 2, vocab}) {
    if (k > vocab) continue;
    for (const ef::TopKOptions options :
         {ef::TopKOptions{}, ef::TopKOptions{.largest = false}, ef::TopKOptions{.sorted = false},
          ef::TopKOptions{.largest = false, .sorted = false}}) {
      ef::Tensor<T, 2> values(rows, k);
      ef::Tensor<std::int32_t, 2> ids(rows, k);
      std::vector<Status> statuses(static_cast<std::size_t>(rows));
      ef::top_k_into(kDevice, values, ids, x, options, statuses);
      for (int ranks : worlds)
        ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
          ef::Tensor<T, 2> best(rows, k);
          ef::Tensor<std::int32_t, 2> places(rows, k);
          std::vector<Status> ends(static_cast<std::size_t>(rows), Status::negative);
          ef::vocabulary_parallel_top_k_into(kDevice, best, places,
                                             shard_of(x, communicator.rank(), ranks), vocab,
                                             communicator, options, ends);
          ASSERT_TRUE(same_bits(best, values)) << vocab << ", " << k << " of " << ranks;
          ASSERT_TRUE(same_bits(places, ids)) << vocab << ", " << k << " of " << ranks;
          ASSERT_EQ(ends, statuses);
        });
    }
  }
}

TEST(VocabularyTopK, IsThatOfOneRank) {
  check_top_k<float>(1, {1, 2});
  check_top_k<float>(13, {1, 2, 3, 5, 15});  // of 15 ranks 2 have no token
  check_top_k<float>(1000, {1, 2, 3, 5});
  check_top_k<double>(257, {2, 3});
  check_top_k<Eigen::bfloat16>(300, {3});
}

TEST(VocabularyTopK, OfLogitsOfADividedHead) {
  const auto hidden = random_tensor<float, 2>({4, 16}, 1),
             head = random_tensor<float, 2>({50, 16}, 2);
  const auto expected = ef::top_k(ef::linear(hidden, head), 7);
  ef::ThreadCommunicator::run(3, [&](ef::ThreadCommunicator& communicator) {
    const auto logits =
        ef::column_parallel_linear(hidden, head, communicator, {.gather_output = false});
    const auto [values, ids] = ef::vocabulary_parallel_top_k(logits, 7, 50, communicator);
    EXPECT_TRUE(same_bits(values, expected.values));
    EXPECT_TRUE(same_bits(ids, expected.ids));
  });
}

TEST(VocabularyTopK, RefusesOnEveryRankAndAllocatesNothingMore) {
  const auto x = rows_of_kinds<float>(20);
  ef::ThreadCommunicator::run(3, [&](ef::ThreadCommunicator& communicator) {
    const auto own = shard_of(x, communicator.rank(), 3);
    constexpr auto name = "vocabulary_parallel_top_k";
    const auto refuses = [&](auto&& call, std::initializer_list<std::string> words) {
      expect_throws<std::invalid_argument>(call, words);
    };
    refuses([&] { ef::vocabulary_parallel_top_k(own, 21, 20, communicator); }, {name, "k is 21"});
    refuses([&] { ef::vocabulary_parallel_top_k(own, -1, 20, communicator); }, {name, "k is -1"});
    refuses([&] { ef::vocabulary_parallel_top_k(own, 2, 24, communicator); },
            {name, "x has", "of 24 tokens"});
    refuses([&] { ef::vocabulary_parallel_top_k(own, 2, 0, communicator); }, {name, "vocab is 0"});
    refuses([&] { ef::vocabulary_parallel_top_k(own, 2, 20, communicator); },
            {name, "row 9 of x holds NaN"});
    ef::Tensor<float, 2> values(10, 4);
    ef::Tensor<std::int32_t, 2> ids(10, 4), other(9, 4);
    refuses(
        [&] { ef::vocabulary_parallel_top_k_into(kDevice, values, other, own, 20, communicator); },
        {name, "ids has shape (9, 4)"});
    refuses(
        [&] {
          ef::vocabulary_parallel_top_k_into(kDevice, ef::Tensor<float, 2>(9, 4), other, own, 20,
                                             communicator);
        },
        {name, "values has 9 rows, x has 10"});
    std::vector<Status> few(9);
    refuses(
        [&] {
          ef::vocabulary_parallel_top_k_into(kDevice, values, ids, own, 20, communicator, {}, few);
        },
        {name, "statuses has 9 elements"});
    ef::Workspace workspace;
    const auto call = [&] {
      ef::vocabulary_parallel_top_k_into(kDevice, values, ids, own, 20, communicator, {}, {},
                                         workspace);
    };
    call();
    communicator.barrier();
    EXPECT_EQ(count_allocations(call), 0);
    communicator.barrier();
  });
}

template <typename Y, typename T>
void check_log_softmax(Index vocab, std::initializer_list<int> worlds) {
  auto x = rows_of_kinds<T>(vocab);
  if (vocab > 1) x.chip(7, 0).setConstant(-std::numeric_limits<T>::infinity());
  if (vocab > 9) x(0, vocab - 2) = x(0, 1) = T(9);  // the best twice, in two shards
  ef::Tensor<Y, 2> whole(x.dimension(0), vocab);
  ef::log_softmax_into(kDevice, whole, x);
  for (int ranks : worlds)
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      const auto own = shard_of(x, communicator.rank(), ranks);
      ef::Tensor<Y, 2> y(own.dimension(0), own.dimension(1));
      ef::vocabulary_parallel_log_softmax_into(kDevice, y, own, vocab, communicator);
      ASSERT_TRUE(same_bits(y, shard_of(whole, communicator.rank(), ranks)))
          << vocab << " of " << ranks;
    });
}

TEST(VocabularyLogSoftmax, IsThatOfOneRank) {
  check_log_softmax<float, float>(1, {1, 2});
  check_log_softmax<float, float>(13, {1, 2, 3, 5, 15});
  check_log_softmax<float, float>(1000, {1, 2, 3, 5});
  check_log_softmax<float, float>(20011, {2, 3});
  check_log_softmax<double, double>(700, {1, 2, 3, 5});
  check_log_softmax<float, double>(257, {3});
  check_log_softmax<float, Eigen::bfloat16>(900, {2, 5});
}

TEST(VocabularyLogSoftmax, InPlaceRefusesAndAllocatesNothingMore) {
  const auto x = rows_of_kinds<float>(500);
  const auto whole = ef::log_softmax(x);
  ef::ThreadCommunicator::run(3, [&](ef::ThreadCommunicator& communicator) {
    auto own = shard_of(x, communicator.rank(), 3);
    const auto again = own;
    ef::Workspace workspace;
    const auto call = [&] {
      ef::vocabulary_parallel_log_softmax_into(kDevice, own, own, 500, communicator, workspace);
    };
    call();
    EXPECT_TRUE(same_bits(own, shard_of(whole, communicator.rank(), 3)));
    communicator.barrier();
    EXPECT_EQ(count_allocations(call), 0);
    communicator.barrier();
    expect_throws<std::invalid_argument>(
        [&] { ef::vocabulary_parallel_log_softmax(again, 503, communicator); },
        {"vocabulary_parallel_log_softmax", "of 503 tokens"});
    ef::Tensor<float, 2> other(1, 1);
    expect_throws<std::invalid_argument>(
        [&] { ef::vocabulary_parallel_log_softmax_into(kDevice, other, again, 500, communicator); },
        {"vocabulary_parallel_log_softmax", "y has shape (1, 1)"});
  });
}

TEST(VocabularyBeamSearch, KeepsTheBeamsOfOneRank) {
  constexpr Index batch = 3, beams = 4, steps = 5;
  for (Index vocab : {3, 70})
    for (int ranks : {1, 2, 3, 5})
      ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
        const ef::BeamSearchOptions options{
            .beams = beams, .max_new_tokens = steps, .end_tokens = {2}};
        ef::BeamSearch search(batch, options), expected(batch, options);
        for (Index s = 0; s < steps && !expected.done(); ++s) {
          const auto logits = random_tensor<float, 2>({s == 0 ? batch : batch * beams, vocab},
                                                      static_cast<unsigned>(s));
          auto scores = ef::log_softmax(logits);
          expected.step(kDevice, scores);
          ef::vocabulary_parallel_beam_search_step(
              kDevice, search, shard_of(scores, communicator.rank(), ranks), vocab, communicator);
          ASSERT_TRUE(same_bits(search.tokens(), expected.tokens())) << vocab << " " << ranks;
          for (std::size_t i = 0; i < batch * beams; ++i) {
            ASSERT_EQ(search.parents()[i], expected.parents()[i]);
            ASSERT_EQ(search.scores()[i], expected.scores()[i]);
          }
        }
        for (Index b = 0; b < batch; ++b) {
          ASSERT_EQ(search.hypotheses(b).size(), expected.hypotheses(b).size());
          for (std::size_t i = 0; i < expected.hypotheses(b).size(); ++i)
            ASSERT_EQ(search.hypotheses(b)[i].tokens, expected.hypotheses(b)[i].tokens);
        }
        expect_throws<std::invalid_argument>(
            [&] {
              ef::vocabulary_parallel_beam_search_step(kDevice, search, ef::Tensor<float, 2>(1, 1),
                                                       vocab + 9 * ranks, communicator);
            },
            {"vocabulary_parallel_beam_search_step", "log_probabilities has 1 columns"});
      });
}

TEST(VocabularyBeamSearch, NanOfOneShardChangesNothingOnAnyRank) {
  ef::Tensor<float, 2> scores(2, 30);
  scores.setConstant(-1);
  scores(1, 29) = std::numeric_limits<float>::quiet_NaN();
  ef::ThreadCommunicator::run(3, [&](ef::ThreadCommunicator& communicator) {
    ef::BeamSearch search(2, {.beams = 2});
    expect_throws<std::invalid_argument>(
        [&] {
          ef::vocabulary_parallel_beam_search_step(
              kDevice, search, shard_of(scores, communicator.rank(), 3), 30, communicator);
        },
        {"row 1 holds NaN"});
    EXPECT_EQ(search.steps(), 0);
  });
}

}  // namespace
}  // namespace eigenformer_test
