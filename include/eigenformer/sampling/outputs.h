/// \file
/// Part of sampling.h, which includes it: log-probabilities beside the draw, and speculative verification.
#pragma once

#include "../sampling.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

// ---- log-probabilities -------------------------------------------------------------------------------------------------------

struct LogProbabilityOptions {
  Index best = 0;  ///< number of best tokens reported for a row; at most vocab are
};

/// What sample_with_log_probabilities returns. "Raw" is the log-softmax of the logits as given, before penalties, temperature and
/// filters; "processed" the log of the probability drawn with, -infinity for a token filtered out.
struct SamplesWithLogProbabilities {
  Tensor<std::int32_t, 1> ids;                   ///< (batch)
  Tensor<float, 1> log_probabilities;            ///< (batch) raw, of the drawn token
  Tensor<float, 1> processed_log_probabilities;  ///< (batch) processed, of the drawn token
  Tensor<std::int32_t, 1>
      ranks;  ///< (batch) 1 + the number of tokens whose raw logit is larger than the drawn one's
  Tensor<std::int32_t, 2>
      best_ids;  ///< (batch, best) the tokens of largest raw logit, best first, equals by index
  Tensor<float, 2> best_log_probabilities;            ///< (batch, best) raw
  Tensor<float, 2> best_processed_log_probabilities;  ///< (batch, best) processed
};

namespace detail {

template <CpuDevice D, typename Logits>
SamplesWithLogProbabilities sample_with_log_probabilities(const D& device, const Logits& logits,
                                                          const SamplingParamsView& params,
                                                          const Generators& rng,
                                                          const LogProbabilityOptions& options) {
  constexpr auto name = "sample_with_log_probabilities";
  const auto view = input_view<2>(logits);
  const Index batch = view.dimension(0);
  require_that(options.best >= 0, name, "best is ", options.best, ", expected 0 or more");
  const Index best = (std::min)(options.best, static_cast<Index>(view.dimension(1)));
  std::vector<SampleStatus> statuses(static_cast<std::size_t>(batch));
  auto problem = sampling_problem(name, view, params, nullptr, statuses.data());
  set_generators(name, problem, rng);
  SamplesWithLogProbabilities result{Tensor<std::int32_t, 1>(batch),
                                     Tensor<float, 1>(batch),
                                     Tensor<float, 1>(batch),
                                     Tensor<std::int32_t, 1>(batch),
                                     Tensor<std::int32_t, 2>(batch, best),
                                     Tensor<float, 2>(batch, best),
                                     Tensor<float, 2>(batch, best)};
  problem.ids = result.ids.data();
  const LogProbabilityOutputs outputs{result.log_probabilities.data(),
                                      result.processed_log_probabilities.data(),
                                      result.ranks.data(),
                                      best,
                                      result.best_ids.data(),
                                      result.best_log_probabilities.data(),
                                      result.best_processed_log_probabilities.data()};
  cpu::sample_with_log_probabilities(isa::best{}, device, problem, outputs, thread_workspace());
  require_good_rows(name, statuses);
  rng.advance();
  return result;
}

}  // namespace detail

/// Draws what sample draws and reports log-probabilities and ranks. Throws like sample. Costs one more read of the logits and one
/// exponential a token.
template <CpuDevice D, typename Logits>
SamplesWithLogProbabilities sample_with_log_probabilities(
    const D& device, const Logits& logits, const SamplingParams& params, Generators rng,
    const LogProbabilityOptions& options = {}) {
  return detail::sample_with_log_probabilities(device, logits, params, rng, options);
}
template <CpuDevice D, typename Logits>
SamplesWithLogProbabilities sample_with_log_probabilities(
    const D& device, const Logits& logits, const RowSamplingParams& params, Generators rng,
    const LogProbabilityOptions& options = {}) {
  return detail::sample_with_log_probabilities(device, logits, params, rng, options);
}
template <typename Logits>
  requires(!Device<Logits>)
SamplesWithLogProbabilities sample_with_log_probabilities(
    const Logits& logits, const SamplingParams& params, Generators rng,
    const LogProbabilityOptions& options = {}) {
  return detail::sample_with_log_probabilities(Eigen::DefaultDevice{}, logits, params, rng,
                                               options);
}
template <typename Logits>
  requires(!Device<Logits>)
SamplesWithLogProbabilities sample_with_log_probabilities(
    const Logits& logits, const RowSamplingParams& params, Generators rng,
    const LogProbabilityOptions& options = {}) {
  return detail::sample_with_log_probabilities(Eigen::DefaultDevice{}, logits, params, rng,
                                               options);
}

// ---- speculative verification ------------------------------------------------------------------------------------------------

struct SpeculativeOptions {
  std::span<const Index> draft_lengths =
      {};  ///< (batch) drafted tokens of each row, from 0 to n; empty: n for all
};

struct SpeculativeResult {
  Tensor<std::int32_t, 1> accepted_counts;  ///< (batch) drafts accepted, 0 to n
  Tensor<std::int32_t, 2>
      tokens;  ///< (batch, n + 1) the accepted drafts, then one token more, then -1
};

/// Turns drafted tokens into tokens of the target distribution, each row for itself. With q = draft and p = target probabilities,
/// draft i is accepted where u_i q(token) < p(token). At the first refusal the next token is drawn from max(0, p - q), normalised
/// (from p where that is zero: p equals q up to rounding); after the last draft from the target's next distribution. The tokens
/// then follow the target's distribution exactly, whatever the drafts' (Leviathan et al., 2023, appendix A.1), provided that each
/// draft was drawn from the very q given here and that p holds the target's temperature and filters (sampling_probabilities).
///
///   draft_tokens          (batch, n) int32
///   draft_probabilities   (batch, n, vocab) float, double, bfloat16 or half; rows sum to 1
///   target_probabilities  (batch, n + 1, vocab) likewise; of a row of draft_lengths[r] = m the first m + 1 are read
///
/// Random numbers: index i of (position, row) for draft i, index m for the last token. Advances each generator by one. Throws
/// std::invalid_argument for shapes, tokens or lengths out of range, and, naming the row, for a distribution that was read and
/// holds NaN, infinity or a negative number or sums to 0.
template <CpuDevice D, typename Tokens, typename Draft, typename Target>
SpeculativeResult verify_speculative(const D& device, const Tokens& draft_tokens,
                                     const Draft& draft_probabilities,
                                     const Target& target_probabilities, Generators rng,
                                     const SpeculativeOptions& options = {}) {
  constexpr auto name = "verify_speculative";
  const auto tokens = input_view<2>(draft_tokens);
  const auto draft = input_view<3>(draft_probabilities);
  const auto target = input_view<3>(target_probabilities);
  static_assert(std::is_same_v<scalar_of<Tokens>, std::int32_t>,
                "eigenformer: token ids are std::int32_t");
  static_assert(FloatingScalar<scalar_of<Draft>> && FloatingScalar<scalar_of<Target>>,
                "eigenformer: probabilities are float, double, Eigen::bfloat16 or Eigen::half");
  const Index batch = tokens.dimension(0), drafts = tokens.dimension(1),
              vocab = target.dimension(2);
  detail::check_sampling_shape(name, vocab);
  require_that(
      draft.dimension(0) == batch && draft.dimension(1) == drafts && draft.dimension(2) == vocab,
      name, "draft_probabilities has shape ", detail::shape_text(draft), ", expected (", batch,
      ", ", drafts, ", ", vocab, ")");
  require_that(target.dimension(0) == batch && target.dimension(1) == drafts + 1, name,
               "target_probabilities has shape ", detail::shape_text(target), ", expected (", batch,
               ", ", drafts + 1, ", vocab)");
  const auto lengths = options.draft_lengths;
  require_that(lengths.empty() || static_cast<Index>(lengths.size()) == batch, name,
               "draft_lengths has ", lengths.size(), " elements, expected ", batch);
  for (Index r = 0; r < batch; ++r) {
    const Index length = lengths.empty() ? drafts : lengths[static_cast<std::size_t>(r)];
    require_that(length >= 0 && length <= drafts, name, "draft_lengths[", r, "] is ", length,
                 ", expected 0 to ", drafts);
    for (Index i = 0; i < length; ++i)
      require_that(tokens(r, i) >= 0 && tokens(r, i) < vocab, name, "draft_tokens(", r, ", ", i,
                   ") is ", tokens(r, i), ", expected a token in [0, ", vocab, ")");
  }
  detail::check_generators(name, rng, batch);
  SpeculativeResult result{Tensor<std::int32_t, 1>(batch),
                           Tensor<std::int32_t, 2>(batch, drafts + 1)};
  cpu::verify_speculative(
      device, SpeculativeProblem<scalar_of<Draft>, scalar_of<Target>>{
                  tokens.data(), draft.data(), target.data(), batch, drafts, vocab,
                  lengths.empty() ? nullptr : lengths.data(), rng.data(), rng.per_row() ? 1 : 0,
                  result.accepted_counts.data(), result.tokens.data()});
  for (Index r = 0; r < batch; ++r)
    require_that(result.accepted_counts(r) >= 0, name, "row ", r,
                 " holds a probability that is NaN, infinite or negative, or sums to 0");
  rng.advance();
  return result;
}

template <typename Tokens, typename Draft, typename Target>
  requires(!Device<Tokens>)
SpeculativeResult verify_speculative(const Tokens& draft_tokens, const Draft& draft_probabilities,
                                     const Target& target_probabilities, Generators rng,
                                     const SpeculativeOptions& options = {}) {
  return verify_speculative(Eigen::DefaultDevice{}, draft_tokens, draft_probabilities,
                            target_probabilities, rng, options);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
