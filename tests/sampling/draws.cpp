// Draws follow the distribution and depend on seed, position and row only.
#include "sampling_support.h"

using namespace eigenformer_test;

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
  // Parameters by row: each row as if all had its own.
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

}  // namespace
