// Log-probabilities of a divided head are those of the whole row, bit for bit: of drawn tokens, of
// the best, of given ones.
#include <eigenformer/linear.h>

#include "allocation_count.h"
#include "vocabulary_support.h"

namespace eigenformer_test {
namespace {

using Status = ef::SampleStatus;

void expect_same(const ef::SamplesWithLogProbabilities& a, const ef::SamplesWithLogProbabilities& b,
                 const std::string& what) {
  EXPECT_TRUE(same_bits(a.ids, b.ids)) << what;
  EXPECT_TRUE(same_bits(a.log_probabilities, b.log_probabilities)) << what;
  EXPECT_TRUE(same_bits(a.processed_log_probabilities, b.processed_log_probabilities)) << what;
  EXPECT_TRUE(same_bits(a.ranks, b.ranks)) << what;
  EXPECT_TRUE(same_bits(a.best_ids, b.best_ids)) << what;
  EXPECT_TRUE(same_bits(a.best_log_probabilities, b.best_log_probabilities)) << what;
  EXPECT_TRUE(same_bits(a.best_processed_log_probabilities, b.best_processed_log_probabilities))
      << what;
  EXPECT_EQ(a.statuses, b.statuses) << what;
}

template <typename T>
void check_rows_of_one(Index vocab, int rows, std::initializer_list<int> worlds) {
  ef::Tensor<T, 2> hidden(1, 1);
  hidden.setConstant(T(1));
  for (int ranks : worlds)
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      ef::Philox random{static_cast<std::uint64_t>(7 * vocab + ranks)};
      for (int row = 0; row < rows; ++row) {
        const auto head = head_of(logits_of_kind<T>(row, vocab, row + ranks));
        const ef::Tensor<T, 2> logits = ef::linear(hidden, head);
        ef::SamplingParams params = random_chain(vocab, random);
        const std::string what = "vocabulary " + std::to_string(vocab) + ", " +
                                 std::to_string(ranks) + " ranks, row " + std::to_string(row);
        const ef::LogProbabilityOptions options{.best = row % 3 * 4};
        const auto seed = static_cast<std::uint64_t>(row);
        expect_same(ef::vocabulary_parallel_sample_with_log_probabilities(
                        hidden, head, communicator, params, ef::Philox{seed}, options),
                    ef::sample_with_log_probabilities(logits, params, ef::Philox{seed}, options),
                    what);
        params.xtc_probability = row % 2;
        const std::vector<std::int32_t> tokens{
            static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab))};
        ef::Tensor<float, 1> given(1), processed(1), given_whole(1), processed_whole(1);
        std::vector<Status> statuses(1), statuses_whole(1);
        const Eigen::DefaultDevice device;
        ef::vocabulary_parallel_log_probabilities_of_into(device, given, hidden, head, communicator,
                                                          tokens);
        ef::log_probabilities_of_into(device, given_whole, logits, tokens);
        EXPECT_TRUE(same_bits(given, given_whole)) << what;
        ef::vocabulary_parallel_log_probabilities_of_into(device, processed, hidden, head,
                                                          communicator, tokens, params, statuses);
        ef::log_probabilities_of_into(device, processed_whole, logits, tokens, params,
                                      statuses_whole);
        EXPECT_TRUE(same_bits(processed, processed_whole)) << what;
        EXPECT_EQ(statuses, statuses_whole) << what;
      }
    });
}

TEST(VocabularyScores, AreThoseOfOneRank) {
  check_rows_of_one<float>(5, 60, {1, 2, 7});
  check_rows_of_one<float>(203, 300, {1, 2, 3, 5});
  check_rows_of_one<float>(5003, 100, {1, 2, 3, 5});
  check_rows_of_one<Eigen::bfloat16>(5003, 40, {2, 3});
  check_rows_of_one<double>(700, 40, {2, 3});
}

TEST(VocabularyScores, OfBadRowsAndOfNoToken) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  ef::Tensor<float, 2> hidden(3, 1), head(30, 1);
  head.setConstant(.25f);
  head(7, 0) = 2;
  hidden(0, 0) = 1, hidden(1, 0) = std::numeric_limits<float>::quiet_NaN(), hidden(2, 0) = infinity;
  const ef::Tensor<float, 2> logits = ef::linear(hidden, head);
  const std::vector<std::int32_t> tokens{7, -1, 3};
  for (int ranks : {1, 2, 3, 40})
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      expect_same(
          ef::vocabulary_parallel_sample_with_log_probabilities(
              hidden, head, communicator, ef::SamplingParams{}, ef::Philox{4}, {.best = 40}),
          ef::sample_with_log_probabilities(logits, ef::SamplingParams{}, ef::Philox{4},
                                            {.best = 40}),
          std::to_string(ranks));
      ef::Tensor<float, 1> scores(3), expected(3);
      std::vector<Status> statuses(3), expected_statuses(3);
      const Eigen::DefaultDevice device;
      ef::vocabulary_parallel_log_probabilities_of_into(device, scores, hidden, head, communicator,
                                                        tokens, ef::SamplingParams{}, statuses);
      ef::log_probabilities_of_into(device, expected, logits, tokens, ef::SamplingParams{},
                                    expected_statuses);
      EXPECT_TRUE(same_bits(scores, expected));
      EXPECT_EQ(statuses, expected_statuses);
      EXPECT_THROW(ef::vocabulary_parallel_log_probabilities_of(hidden, head, communicator, tokens),
                   std::invalid_argument);
      expect_throws<std::invalid_argument>(
          [&] {
            ef::vocabulary_parallel_log_probabilities_of(hidden, head, communicator,
                                                         std::vector<std::int32_t>{1, 30, 2});
          },
          {"vocabulary_parallel_log_probabilities_of", "tokens[1] is 30"});
      expect_throws<std::invalid_argument>(
          [&] {
            ef::vocabulary_parallel_sample_with_log_probabilities(
                hidden, head, communicator, ef::SamplingParams{}, ef::Philox{4}, {.best = -1});
          },
          {"vocabulary_parallel_sample_with_log_probabilities", "best is -1"});
    });
}

TEST(VocabularyScores, SecondCallsAllocateNothingAndSendLittle) {
  constexpr Index vocab = 20000;
  ef::Tensor<float, 2> hidden(1, 1);
  hidden.setConstant(1);
  const auto head = head_of(logits_of_kind(1, vocab, 1));
  const std::vector<ef::SamplingParams> all{{}, {.top_k = 9, .top_p = .9}, {.min_p = .1}};
  const std::vector<std::int32_t> tokens{77};
  const Eigen::DefaultDevice device;
  ef::ThreadCommunicator::run(2, [&](ef::ThreadCommunicator& communicator) {
    CountingCommunicator counting{communicator};
    ef::SamplesWithLogProbabilities result;
    ef::Tensor<float, 1> scores(1);
    ef::Workspace workspace;
    const auto call = [&] {
      for (const auto& params : all) {
        ef::vocabulary_parallel_sample_with_log_probabilities_into(
            device, result, hidden, head, counting, params, ef::Philox{1}, {.best = 5}, workspace);
        ef::vocabulary_parallel_log_probabilities_of_into(device, scores, hidden, head, counting,
                                                          tokens, params, {}, workspace);
      }
    };
    call();
    EXPECT_LT(counting.bytes, 6 * vocab * sizeof(float) / 50);
    communicator.barrier();
    EXPECT_EQ(count_allocations(call), 0);
    communicator.barrier();
  });
}

}  // namespace
}  // namespace eigenformer_test
