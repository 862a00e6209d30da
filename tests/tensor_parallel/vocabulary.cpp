// Sampling of a divided head is sampling of the whole one, bit for bit.
#include <eigenformer/linear.h>

#include "allocation_count.h"
#include "tensor_parallel_cases.h"

namespace eigenformer_test {
namespace {

using Stage = ef::SamplingStage;

constexpr Index kRows = 6, kVocab = 203;

std::vector<ef::SamplingParams> decided_by_few() {
  static const std::vector<std::int32_t> prompt{3, 3, 77, 150, 202}, output{5, 77, 5, 101, 0};
  static const std::vector<std::uint32_t> mask(7, 0xA5A5A5A5u);
  std::vector<ef::SamplingParams> all{
      {.temperature = .8, .top_k = 7, .top_p = .9, .min_p = .01},
      {.top_k = 12, .typical_p = .8},
      {.temperature = 0},
      {.temperature = 0, .repetition_penalty = 1.5},
      {.top_k = 5, .repetition_penalty = 1.4, .frequency_penalty = .2, .presence_penalty = .3},
      {.top_k = 5, .repetition_penalty = .6, .presence_penalty = -2},
      {.top_k = 4, .logit_bias = {{9, 3.f}, {200, -std::numeric_limits<float>::infinity()}}},
      {.top_k = 9, .top_p = .95}};
  for (auto& params : all) {
    params.prompt_tokens = prompt;
    params.output_tokens = output;
  }
  all.back().token_mask = mask;
  all[0].xtc_probability = .7;
  all[0].xtc_threshold = .05;
  all[1].no_repeat_ngram = 2;
  all[1].dry_multiplier = .8;
  all[4].min_tokens = 9;
  all[4].stop_tokens = {1, 2};
  return all;
}

TEST(VocabularyParallel, SamplesWhatOneRankSamples) {
  const auto hidden = random_tensor<float, 2>({kRows, 24}, 4);
  auto head = random_tensor<float, 2>({kVocab, 24}, 5, .5);
  for (Index i = 0; i < 24; ++i) head(150, i) = head(9, i) = head(3, i);  // ties across ranks
  const ef::Tensor<float, 2> logits = ef::linear(hidden, head);
  const auto sets = decided_by_few();
  for (int ranks : {1, 2, 3, 7})
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& communicator) {
      const auto shard = ef::pack_column_shard<float>(head, communicator);
      for (std::size_t i = 0; i < sets.size(); ++i)
        for (std::uint64_t seed = 0; seed < 6; ++seed) {
          ef::Philox rng{seed}, same{seed};
          const auto expected = ef::sample(logits, sets[i], same);
          EXPECT_TRUE(same_bits(
              ef::vocabulary_parallel_sample(hidden, head, communicator, sets[i], rng), expected))
              << "set " << i << ", " << ranks << " ranks";
          EXPECT_EQ(rng.position(), 1u);
        }
      std::vector<ef::SamplingParams> rows(sets.begin(), sets.begin() + kRows);
      std::vector<ef::Philox> generators(kRows, ef::Philox{3}), again = generators;
      EXPECT_TRUE(
          same_bits(ef::vocabulary_parallel_sample(hidden, shard, communicator, rows, generators),
                    ef::sample(logits, rows, again)));
    });
}

TEST(VocabularyParallel, StatusesAreThoseOfOneRank) {
  auto hidden = random_tensor<float, 2>({4, 1}, 4);
  hidden.setConstant(1);
  hidden(1, 0) = std::numeric_limits<float>::quiet_NaN();
  auto head = random_tensor<float, 2>({50, 1}, 5);
  std::vector<ef::SamplingParams> rows(4, {.top_k = 3});
  rows[2].token_mask = {0u, 0u};
  ef::Tensor<std::int32_t, 1> expected(4);
  std::vector<ef::SampleStatus> expected_statuses(4);
  const Eigen::DefaultDevice device;
  const ef::Tensor<float, 2> logits = ef::linear(hidden, head);
  ef::sample_into(device, expected, logits, rows, ef::Philox{1}, expected_statuses);
  ef::ThreadCommunicator::run(3, [&](ef::ThreadCommunicator& communicator) {
    ef::Tensor<std::int32_t, 1> ids(4);
    std::vector<ef::SampleStatus> statuses(4);
    ef::vocabulary_parallel_sample_into(device, ids, hidden, head, communicator, rows,
                                        ef::Philox{1}, statuses);
    EXPECT_TRUE(same_bits(ids, expected));
    EXPECT_EQ(statuses, expected_statuses);
    EXPECT_THROW(ef::vocabulary_parallel_sample(hidden, head, communicator, rows, ef::Philox{1}),
                 std::invalid_argument);
  });
}

TEST(VocabularyParallel, SecondCallsAllocateNothing) {
  const auto hidden = random_tensor<float, 2>({kRows, 24}, 4),
             head = random_tensor<float, 2>({kVocab, 24}, 5);
  const auto sets = decided_by_few();
  ef::SelfCommunicator communicator;
  ef::Tensor<std::int32_t, 1> ids(kRows);
  ef::Workspace workspace;
  const auto call = [&] {
    for (const auto& params : sets)
      ef::vocabulary_parallel_sample_into(Eigen::DefaultDevice{}, ids, hidden, head, communicator,
                                          params, ef::Philox{1}, {}, workspace);
  };
  call();
  EXPECT_EQ(count_allocations(call), 0);
}

}  // namespace
}  // namespace eigenformer_test
