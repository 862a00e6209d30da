/// \file
/// What the tests of a divided vocabulary share: rows of many shapes and a rank's part of them,
/// chains of many stages, a communicator that counts what it gathers.
#pragma once

#include <eigenformer/tensor_parallel.h>

#include "compare.h"

namespace eigenformer_test {

/// Counts the bytes that every rank holds after all gathers.
struct CountingCommunicator {
  ef::ThreadCommunicator& under;
  std::size_t bytes = 0;

  int rank() const { return under.rank(); }
  int size() const { return under.size(); }
  template <typename Part, typename Whole, typename... Counts>
  void all_gather(const Part& part, Whole&& whole, Counts... counts) {
    bytes += std::span(whole).size_bytes();
    under.all_gather(part, whole, counts...);
  }
  template <typename Values>
  void all_reduce_sum(Values&& values) {
    under.all_reduce_sum(values);
  }
  template <typename Values>
  void broadcast(Values&& values, int root) {
    under.broadcast(values, root);
  }
  void barrier() { under.barrier(); }
};
static_assert(ef::Communicator<CountingCommunicator>);

/// The tokens of a rank, of (rows, vocab) or (batch, places, vocab).
template <typename T, int Rank>
ef::Tensor<T, Rank> shard_of(const ef::Tensor<T, Rank>& x, int rank, int ranks) {
  const auto own = ef::shard_range(x.dimension(Rank - 1), rank, ranks);
  Eigen::array<Index, Rank> begin{}, size;
  for (int d = 0; d < Rank; ++d) size[static_cast<std::size_t>(d)] = x.dimension(d);
  begin[Rank - 1] = own.begin;
  size[Rank - 1] = own.size();
  return x.slice(begin, size);
}

/// Logits of normal and peaked rows, flat ones, ones of few numbers, of -infinity and of equals.
template <typename T = float>
ef::Tensor<T, 1> logits_of_kind(int kind, Index vocab, int seed) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  ef::Tensor<float, 1> x = random_tensor<float, 1>({vocab}, static_cast<unsigned>(seed));
  const float scales[]{1, 3, .05f, 8, 2, 3, 0};
  for (Index i = 0; i < vocab; ++i) {
    float& logit = x(i);
    logit *= scales[kind % 7];
    if (kind % 7 == 4) logit = std::round(logit);
    if (kind % 7 == 5 && (i * 7 + seed) % 3 != 0) logit = none;
  }
  if (kind % 7 == 3) x(seed % vocab) = 30;
  return x.template cast<T>();
}

/// The head whose logits of the hidden state (1, 1) of 1 are these.
template <typename T>
ef::Tensor<T, 2> head_of(const ef::Tensor<T, 1>& logits) {
  ef::Tensor<T, 2> head(logits.size(), 1);
  std::copy_n(logits.data(), logits.size(), head.data());
  return head;
}

inline ef::SamplingOrder shuffled_filters(ef::Philox& random) {
  ef::SamplingOrder order = ef::kHuggingFaceOrder;
  const auto begin = std::find(order.begin(), order.end(), ef::SamplingStage::temperature),
             end = std::find(order.begin(), order.end(), ef::SamplingStage::none);
  std::shuffle(begin, end, random);
  return order;
}

/// Some filters, some of the stages that change logits, in an order of somebody's.
inline ef::SamplingParams random_chain(Index vocab, ef::Philox& random) {
  const auto one_in = [&](unsigned n) { return random() % n == 0; };
  const auto number = [&](double lo, double hi) { return lo + (hi - lo) * (random() * 0x1p-32); };
  const auto token = [&] {
    return static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab));
  };
  ef::SamplingParams p;
  if (!one_in(3)) p.temperature = one_in(12) ? 0 : number(.2, 2);
  if (one_in(4)) p.top_k = 1 + token() % 60;
  if (one_in(2)) p.top_p = number(.05, 1);
  if (one_in(3)) p.min_p = one_in(9) ? 1 : number(0, .2);
  if (one_in(9)) p.typical_p = number(.2, .95);
  if (one_in(9)) p.top_n_sigma = number(.5, 3);
  if (one_in(9)) p.epsilon_cutoff = number(0, .01);
  if (one_in(9)) p.eta_cutoff = number(0, .01);
  if (one_in(12)) p.top_h = number(.2, .9);
  if (one_in(9)) p.xtc_probability = .5, p.xtc_threshold = number(.01, .2);
  if (one_in(9)) p.mirostat = one_in(3) ? 1 : 2, p.mirostat_mu = number(1, 12);
  if (one_in(15)) p.dynatemp_range = .1;
  if (one_in(9)) p.min_tokens_to_keep = 1 + token() % 4;
  if (one_in(9)) p.top_k_ties = ef::TopKTies::keep_all;
  if (one_in(3)) p.order = one_in(2) ? ef::kVllmOrder : ef::kLlamaCppOrder;
  if (one_in(3)) p.order = shuffled_filters(random);
  if (one_in(3)) {
    p.repetition_penalty = number(.6, 1.6), p.frequency_penalty = number(0, .4);
    p.prompt_tokens = std::vector{token(), token(), token()};
    p.output_tokens = std::vector{token(), token(), token(), token()};
    if (one_in(9)) p.penalize_log_probabilities = true;
    if (one_in(2)) p.dry_multiplier = .8, p.no_repeat_ngram = 2;
  }
  if (one_in(5)) p.logit_bias = std::vector<ef::LogitBias>{{token(), 4.f}, {token(), -2.f}};
  if (one_in(9))
    p.token_mask =
        std::vector<std::uint32_t>(static_cast<std::size_t>((vocab + 31) / 32), 0xA5F00F5Au);
  if (one_in(40))
    p.forced_tokens =
        std::vector<ef::ForcedToken>{{static_cast<Index>(p.output_tokens.size()), token()}};
  return p;
}

}  // namespace eigenformer_test
