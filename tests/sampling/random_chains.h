/// \file
/// Random chains of sampling: every stage, with parameters that ask for few or many of them.
#pragma once

#include "sampling_support.h"

namespace eigenformer_test {

using Generator = std::mt19937_64;

inline double between(Generator& random, double least, double most) {
  return std::uniform_real_distribution<double>(least, most)(random);
}
inline Index below(Generator& random, Index end) {
  return static_cast<Index>(random() % static_cast<std::uint64_t>(end));
}
inline std::int32_t token_of(Generator& random, Index vocab) {
  return static_cast<std::int32_t>(below(random, vocab));
}

inline std::vector<std::int32_t> tokens_of(Generator& random, Index count, Index vocab) {
  std::vector<std::int32_t> tokens;
  for (Index i = 0; i < count; ++i) tokens.push_back(token_of(random, vocab));
  return tokens;
}

/// Every stage, those that change logits in one random order and the filters in another.
inline ef::SamplingOrder random_order(Generator& random) {
  ef::SamplingOrder order = ef::kHuggingFaceOrder;
  std::shuffle(order.begin(), order.begin() + 11, random);
  std::shuffle(order.begin() + 11, order.begin() + 22, random);
  return order;
}

inline ef::SamplingParams random_filters(Generator& random) {
  ef::SamplingParams p{.order = random_order(random)};
  const auto often = [&](int of) { return random() % static_cast<unsigned>(of) == 0; };
  if (often(2)) p.temperature = between(random, .3, 2);
  if (often(4)) p.dynatemp_range = between(random, .1, 2);
  if (often(2)) p.dynatemp_exponent = between(random, .2, 2);
  if (often(4)) p.top_k = 1 + below(random, 60);
  if (often(4)) p.top_k_ties = ef::TopKTies::keep_all;
  if (often(4)) p.top_p = between(random, 0, 1);
  if (often(4)) p.min_p = between(random, 0, .3);
  if (often(4)) p.typical_p = between(random, .1, 1);
  if (often(4)) p.top_n_sigma = between(random, .1, 3);
  if (often(4)) p.xtc_probability = 1;
  if (often(2)) p.xtc_threshold = between(random, .01, .4);
  if (often(4)) p.epsilon_cutoff = between(random, 0, .1);
  if (often(4)) p.eta_cutoff = between(random, 0, .3);
  if (often(4)) p.top_h = between(random, .05, 1);
  if (often(4)) p.mirostat = 1 + static_cast<int>(below(random, 2));
  p.mirostat_mu = between(random, .5, 8);
  if (often(3)) p.min_tokens_to_keep = 1 + below(random, 5);
  return p;
}

inline void set_random_processors(Generator& random, ef::SamplingParams& p, Index vocab) {
  const auto often = [&](int of) { return random() % static_cast<unsigned>(of) == 0; };
  const Index words = (std::min)(vocab, Index{1} + below(random, 12));  // few: they repeat
  p.prompt_tokens = tokens_of(random, below(random, 30), words);
  p.output_tokens = tokens_of(random, below(random, 30), words);
  if (often(2)) p.repetition_penalty = between(random, .8, 1.5);
  if (often(3)) p.frequency_penalty = between(random, -.2, .5);
  if (often(3)) p.presence_penalty = between(random, -.2, .5);
  if (often(3)) p.penalty_window = below(random, 40);
  p.penalize_log_probabilities = often(3);
  if (often(2)) p.dry_multiplier = between(random, .1, 1);
  p.dry_allowed_length = below(random, 4);
  if (often(3)) p.dry_window = below(random, 40);
  for (Index i = below(random, 3); i > 0; --i)
    p.dry_breakers.push_back(tokens_of(random, 1 + below(random, 3), words));
  if (often(3)) p.no_repeat_ngram = 2 + below(random, 3);
  for (Index i = below(random, 3); i > 0; --i)
    p.bad_words.push_back(tokens_of(random, 1 + below(random, 3), words));
  for (Index i = below(random, 4); i > 0; --i)
    p.sequence_bias.push_back({tokens_of(random, 1 + below(random, 3), words),
                               static_cast<float>(between(random, -2, 2))});
  if (often(3))
    p.logit_bias = std::vector<ef::LogitBias>{{token_of(random, vocab), 1.5f}, {0, -.25f}};
  if (often(3)) p.min_tokens = below(random, 40);
  p.stop_tokens = {token_of(random, vocab)};
  if (often(8))
    p.forced_tokens = {
        {p.output_tokens.size() == 0 ? Index{0} : Index{3}, token_of(random, vocab)}};
  if (often(3)) {
    p.guidance_row = 1;
    p.guidance_scale = between(random, .5, 3);
  }
  if (often(3)) {
    std::vector<std::uint32_t> mask(static_cast<std::size_t>((vocab + 31) / 32));
    for (std::uint32_t& word : mask) word = static_cast<std::uint32_t>(random()) | 1u << 13;
    p.token_mask = std::move(mask);
  }
}

/// The probabilities of all rows are those of each alone, on every ISA and on threads.
inline void expect_same_in_all_ways(const ef::Tensor<float, 2>& logits,
                                    const std::vector<ef::SamplingParams>& params) {
  const Index rows = logits.dimension(0), vocab = logits.dimension(1);
  ef::Tensor<float, 2> expected(rows, vocab), alone(1, vocab);
  std::vector<ef::SampleStatus> statuses(static_cast<std::size_t>(rows));
  ef::sampling_probabilities_into(Eigen::DefaultDevice{}, expected, logits, params, statuses);
  for (Index r = 0; r < rows; ++r) {
    const ef::TensorView<const float, 2> row(logits.data() + r * vocab, 1, vocab);
    std::vector<ef::SampleStatus> one(1);
    ef::sampling_probabilities_into(Eigen::DefaultDevice{}, alone, row,
                                    params[static_cast<std::size_t>(r)], one);
    EXPECT_EQ(std::memcmp(alone.data(), expected.data() + r * vocab,
                          static_cast<std::size_t>(vocab) * sizeof(float)),
              0)
        << r;
  }
  auto actual = poisoned_tensor<float, 2>({rows, vocab});
  for_each_isa([&](auto tag) {
    ef::sampling_probabilities_into(on(tag), actual, logits, params, statuses);
    EXPECT_TRUE(same_bits(actual, expected)) << tag.name;
  });
  Threads threads(3);
  ef::sampling_probabilities_into(threads.device, actual, logits, params, statuses);
  EXPECT_TRUE(same_bits(actual, expected));
}

}  // namespace eigenformer_test
