/// \file
/// Part of sampling.h, which includes it: speculative verification.
#pragma once

#include "../core/dispatch.h"
#include "../sampling.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct SpeculativeOptions {
  LengthSpan draft_lengths = {};  ///< (batch) drafted tokens of each row, 0 to n; empty: n for all
};

struct SpeculativeResult {
  Tensor<std::int32_t, 1> accepted_counts;  ///< (batch) drafts accepted, 0 to n
  Tensor<std::int32_t, 2>
      tokens;  ///< (batch, n + 1) the accepted drafts, then one token more, then -1
  std::vector<SampleStatus>
      statuses;  ///< (batch); where not ok, nothing is accepted and every token is -1
};

/// The same in memory of the caller's, which on a GPU is device memory.
struct SpeculativeViews {
  TensorView<std::int32_t, 1> accepted_counts;
  TensorView<std::int32_t, 2> tokens;
  std::span<SampleStatus> statuses;
};

namespace detail {

template <Device D, typename Tokens>
void check_drafts(std::string_view name, const Tokens& tokens, const LengthSpan& lengths,
                  Index vocab) {
  const Index batch = tokens.dimension(0), drafts = tokens.dimension(1);
  require_that(lengths.empty() || lengths.size() == batch, name, "draft_lengths has ",
               lengths.size(), " elements, expected ", batch);
  for (Index r = 0; r < batch; ++r) {
    const Index length = lengths.empty() ? drafts : lengths[r];
    require_that(length >= 0 && length <= drafts, name, "draft_lengths[", r, "] is ", length,
                 ", expected 0 to ", drafts);
    if constexpr (host_readable<D>)
      for (Index i = 0; i < length; ++i)
        require_that(tokens(r, i) >= -1 && tokens(r, i) < vocab, name, "draft_tokens(", r, ", ", i,
                     ") is ", tokens(r, i), ", expected a token in [0, ", vocab,
                     "), or -1 for none");
  }
}

/// Checks a call whose probabilities have `columns` tokens of the vocabulary.
template <Device D, typename Tokens, typename Draft, typename Target>
void check_speculative(std::string_view name, const Tokens& tokens, const Draft& draft,
                       const Target& target, Index columns, Index vocab, const Generators& rng,
                       const SpeculativeOptions& options) {
  static_assert(std::is_same_v<scalar_of<Tokens>, std::int32_t>,
                "eigenformer: token ids are std::int32_t");
  static_assert(FloatingScalar<scalar_of<Draft>> && FloatingScalar<scalar_of<Target>>,
                "eigenformer: probabilities are float, double, Eigen::bfloat16 or Eigen::half");
  const Index batch = tokens.dimension(0), drafts = tokens.dimension(1);
  checked_size(name, "draft_tokens", tokens);
  checked_size(name, "draft_probabilities", draft);
  // Large enough also for the tokens that are written, (batch, n + 1) of int32.
  checked_size(name, "target_probabilities", target,
               (std::max)(sizeof(scalar_of<Target>), sizeof(std::int32_t)));
  check_sampling_shape(name, "target_probabilities", vocab);
  require_that(static_cast<std::uint64_t>(drafts) <= Philox::kIndices, name, "draft_tokens has ",
               drafts, " columns, expected at most ", Philox::kIndices);
  require_that(
      draft.dimension(0) == batch && draft.dimension(1) == drafts && draft.dimension(2) == columns,
      name, "draft_probabilities has shape ", shape_text(draft), ", expected (", batch, ", ",
      drafts, ", ", columns, ")");
  require_that(target.dimension(0) == batch && target.dimension(1) == drafts + 1, name,
               "target_probabilities has shape ", shape_text(target), ", expected (", batch, ", ",
               drafts + 1, ", ", columns, ")");
  check_drafts<D>(name, tokens, options.draft_lengths, vocab);
  check_generators(name, "draft_tokens", rng, batch);
}

/// views(batch, drafts), after all other checks, is where the results go.
template <Device D, typename Tokens, typename Draft, typename Target, typename Views>
void verify_speculative_into(std::string_view name, const D& device, const Tokens& draft_tokens,
                             const Draft& draft_probabilities, const Target& target_probabilities,
                             Generators& rng, const SpeculativeOptions& options, Views&& views) {
  const auto tokens = input_view<2>(draft_tokens);
  const auto draft = input_view<3>(draft_probabilities);
  const auto target = input_view<3>(target_probabilities);
  const Index batch = tokens.dimension(0), drafts = tokens.dimension(1),
              vocab = target.dimension(2);
  check_speculative<D>(name, tokens, draft, target, vocab, vocab, rng, options);
  const LengthSpan& lengths = options.draft_lengths;
  Workspace::Frame frame(thread_workspace());
  SpeculativeViews out = views(batch, drafts);
  detail::run(device, problem::Speculative<scalar_of<Draft>, scalar_of<Target>>{
                          tokens.data(), draft.data(), target.data(), batch, drafts, vocab,
                          lengths.empty() ? nullptr : indices(lengths, frame), rng.data(),
                          rng.per_row() ? 1 : 0, out.accepted_counts.data(), out.tokens.data(),
                          out.statuses.data()});
  rng.advance();
}

}  // namespace detail

/// Turns drafted tokens into tokens of the target distribution, each row for itself. With q = draft
/// and p = target probabilities, draft i is accepted where u_i q(token) < p(token). At the first
/// refusal the next token is drawn from max(0, p - q), normalised (from p where that is zero: p
/// equals q up to rounding); after the last draft from the target's next distribution. The tokens
/// then follow the target's distribution exactly, whatever the drafts' (Leviathan et al., 2023,
/// appendix A.1), provided that each draft was drawn from the very q given here and that p holds
/// the target's temperature and filters (sampling_probabilities).
///
///   draft_tokens          (batch, n) int32; -1, which sample_into writes where it has no token,
///                         ends the drafts of its row
///   draft_probabilities   (batch, n, vocab) float, double, bfloat16 or half; rows sum to 1
///   target_probabilities  (batch, n + 1, vocab) likewise; of a row of m drafts the first m + 1
///
/// A row in which a number that was read is NaN, infinite or negative, or whose last distribution
/// sums to 0, gets no token and its status in result.statuses (nan, positive_infinity, negative,
/// no_token), and the others are served. Read are, of each draft up to the first refusal, its two
/// probabilities, and the distributions that the last token is drawn from. Throws
/// std::invalid_argument for shapes, tokens or lengths out of range.
///
/// Random numbers: streams of their own (core/philox.h), so that drafter and verifier may be
/// generators of one seed; draft i of a row is accepted or refused by index i of (position, row).
/// Advances each generator by one.
///
/// The first _into form writes into a result of an earlier call, which is resized where its sizes
/// differ; it allocates nothing where they do not. The other writes into views, on any device: on a
/// GPU tokens, probabilities and results are device memory, and a draft out of range ends the
/// drafts of its row, as -1 does.
template <CpuDevice D, typename Tokens, typename Draft, typename Target>
void verify_speculative_into(const D& device, SpeculativeResult& result, const Tokens& draft_tokens,
                             const Draft& draft_probabilities, const Target& target_probabilities,
                             Generators rng, const SpeculativeOptions& options = {}) {
  detail::verify_speculative_into(
      "verify_speculative", device, draft_tokens, draft_probabilities, target_probabilities, rng,
      options, [&](Index batch, Index drafts) {
        result.accepted_counts.resize(batch);
        result.tokens.resize(batch, drafts + 1);
        result.statuses.resize(static_cast<std::size_t>(batch));
        return SpeculativeViews{output_view<1>(result.accepted_counts),
                                output_view<2>(result.tokens), result.statuses};
      });
}
template <Device D, typename Tokens, typename Draft, typename Target>
void verify_speculative_into(const D& device, const SpeculativeViews& result,
                             const Tokens& draft_tokens, const Draft& draft_probabilities,
                             const Target& target_probabilities, Generators rng,
                             const SpeculativeOptions& options = {}) {
  constexpr auto name = "verify_speculative";
  detail::verify_speculative_into(
      name, device, draft_tokens, draft_probabilities, target_probabilities, rng, options,
      [&](Index batch, Index drafts) {
        detail::require_that(
            result.accepted_counts.size() == batch && result.tokens.dimension(0) == batch &&
                result.tokens.dimension(1) == drafts + 1 &&
                static_cast<Index>(result.statuses.size()) == batch,
            name, "the results have ", result.accepted_counts.size(), " counts, tokens of shape ",
            detail::shape_text(result.tokens), " and ", result.statuses.size(),
            " statuses, expected ", batch, ", (", batch, ", ", drafts + 1, ") and ", batch);
        return result;
      });
}
template <CpuDevice D, typename Tokens, typename Draft, typename Target>
SpeculativeResult verify_speculative(const D& device, const Tokens& draft_tokens,
                                     const Draft& draft_probabilities,
                                     const Target& target_probabilities, Generators rng,
                                     const SpeculativeOptions& options = {}) {
  SpeculativeResult result;
  verify_speculative_into(device, result, draft_tokens, draft_probabilities, target_probabilities,
                          rng, options);
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
