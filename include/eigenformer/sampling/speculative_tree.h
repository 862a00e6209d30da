/// \file
/// Part of sampling.h, which includes it: speculative verification of token trees (Miao et al.,
/// "SpecInfer", 2024; siblings drawn without replacement: Jeon et al., "Recursive Speculative
/// Decoding", 2024).
#pragma once

#include "speculative.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct SpeculativeTreeOptions {
  /// true: siblings were drawn one by one from the whole draft distribution, and may be equal;
  /// false: each from what its earlier siblings left of it, renormalised
  bool with_replacement = false;
};

struct SpeculativeTreeResult {
  Tensor<std::int32_t, 1> accepted_counts;  ///< (batch) nodes accepted, 0 to n
  /// (batch, n + 1) the tokens of the accepted nodes, from the root on, one token more, then -1
  Tensor<std::int32_t, 2> tokens;
  Tensor<std::int32_t, 2> nodes;       ///< (batch, n) the accepted nodes, then -1
  std::vector<SampleStatus> statuses;  ///< (batch); where not ok, nothing is accepted and all is -1
};

/// The same in memory of the caller's, which on a GPU is device memory.
struct SpeculativeTreeViews {
  TensorView<std::int32_t, 1> accepted_counts;
  TensorView<std::int32_t, 2> tokens, nodes;
  std::span<SampleStatus> statuses;
};

namespace detail {

/// In place of draft probabilities.
struct CertainDrafts {};

template <Device D, typename Tokens, typename Parents>
void check_tree(std::string_view name, const Tokens& tokens, const Parents& parents, Index vocab) {
  const Index batch = tokens.dimension(0), nodes = tokens.dimension(1);
  constexpr bool shared = rank_of<Parents> == 1;
  const auto n = parents.dimension(rank_of<Parents> - 1);
  require_that(n == nodes && (shared || parents.dimension(0) == batch), name, "parents has shape ",
               shape_text(parents), ", expected (", nodes, ") or (", batch, ", ", nodes, ")");
  if constexpr (host_readable<D>) {
    for (Index i = 0; i < parents.size(); ++i)
      require_that(parents.data()[i] >= -1 && parents.data()[i] < i % nodes, name,
                   "parents of row ", i / nodes, ": that of node ", i % nodes, " is ",
                   parents.data()[i], ", expected an earlier node, or -1 for the root");
    for (Index i = 0; i < tokens.size(); ++i)
      require_that(tokens.data()[i] >= -1 && tokens.data()[i] < vocab, name, "draft_tokens(",
                   i / nodes, ", ", i % nodes, ") is ", tokens.data()[i],
                   ", expected a token in [0, ", vocab, "), or -1 for none");
  }
}

template <typename Draft, typename Target>
using tree_draft_scalar =
    std::conditional_t<std::is_same_v<Draft, CertainDrafts>, scalar_of<Target>, scalar_of<Draft>>;

/// Checks a call whose probabilities have `columns` tokens of the vocabulary; returns those of the
/// drafts, nullptr where they are certain.
template <Device D, typename Tokens, typename Parents, typename Draft, typename Target>
auto checked_tree(std::string_view name, const Tokens& tokens, const Parents& parents,
                  const Draft& draft_probabilities, const Target& target, Index columns,
                  Index vocab, const Generators& rng) {
  static_assert(rank_of<Parents> == 1 || rank_of<Parents> == 2,
                "eigenformer: parents are a tensor of std::int32_t, (nodes) or (batch, nodes)");
  static_assert(std::is_same_v<scalar_of<Tokens>, std::int32_t> &&
                    std::is_same_v<scalar_of<Parents>, std::int32_t>,
                "eigenformer: token ids and parents are std::int32_t");
  const Index batch = tokens.dimension(0), nodes = tokens.dimension(1);
  checked_size(name, "draft_tokens", tokens);
  checked_size(name, "parents", parents);
  checked_size(name, "target_probabilities", target,
               (std::max)(sizeof(scalar_of<Target>), sizeof(std::int32_t)));
  check_sampling_shape(name, "target_probabilities", vocab);
  require_that(static_cast<std::uint64_t>(nodes) <= Philox::kIndices, name, "draft_tokens has ",
               nodes, " columns, expected at most ", Philox::kIndices);
  const auto of_places = [&](std::string_view argument, const auto& view) {
    static_assert(FloatingScalar<scalar_of<decltype(view)>>,
                  "eigenformer: probabilities are float, double, Eigen::bfloat16 or Eigen::half");
    require_that(view.dimension(0) == batch && view.dimension(1) == nodes + 1 &&
                     view.dimension(2) == columns,
                 name, argument, " has shape ", shape_text(view), ", expected (", batch, ", ",
                 nodes + 1, ", ", columns, ")");
  };
  of_places("target_probabilities", target);
  const tree_draft_scalar<Draft, Target>* draft = nullptr;
  if constexpr (!std::is_same_v<Draft, CertainDrafts>) {
    const auto view = input_view<3>(draft_probabilities);
    of_places("draft_probabilities", view);
    draft = view.data();
  }
  check_tree<D>(name, tokens, parents, vocab);
  check_generators(name, "draft_tokens", rng, batch);
  return draft;
}

/// views(batch, nodes), after all other checks, is where the results go.
template <Device D, typename Tokens, typename Parents, typename Draft, typename Target,
          typename Views>
void verify_speculative_tree_into(const D& device, const Tokens& draft_tokens, const Parents& tree,
                                  const Draft& draft_probabilities,
                                  const Target& target_probabilities, Generators& rng,
                                  const SpeculativeTreeOptions& options, Workspace& workspace,
                                  Views&& views) {
  constexpr auto name = "verify_speculative_tree";
  const auto tokens = input_view<2>(draft_tokens);
  const auto parents = input_view<rank_of<Parents>>(tree);
  const auto target = input_view<3>(target_probabilities);
  const Index batch = tokens.dimension(0), nodes = tokens.dimension(1), vocab = target.dimension(2);
  const auto* const draft =
      checked_tree<D>(name, tokens, parents, draft_probabilities, target, vocab, vocab, rng);
  SpeculativeTreeViews out = views(batch, nodes);
  detail::run(
      device,
      problem::SpeculativeTree<tree_draft_scalar<Draft, Target>, scalar_of<Target>>{
          tokens.data(), parents.data(), rank_of<Parents> == 1 ? 0 : nodes, draft, target.data(),
          batch, nodes, vocab, options.with_replacement, rng.data(), rng.per_row() ? 1 : 0,
          out.accepted_counts.data(), out.tokens.data(), out.nodes.data(), out.statuses.data()},
      workspace);
  rng.advance();
}

template <Device D, typename Tokens, typename Parents, typename Draft, typename Target>
void verify_speculative_tree_into(const D& device, SpeculativeTreeResult& result,
                                  const Tokens& tokens, const Parents& parents, const Draft& draft,
                                  const Target& target, Generators& rng,
                                  const SpeculativeTreeOptions& options, Workspace& workspace) {
  verify_speculative_tree_into(device, tokens, parents, draft, target, rng, options, workspace,
                               [&](Index batch, Index nodes) {
                                 result.accepted_counts.resize(batch);
                                 result.tokens.resize(batch, nodes + 1);
                                 result.nodes.resize(batch, nodes);
                                 result.statuses.resize(static_cast<std::size_t>(batch));
                                 return SpeculativeTreeViews{output_view<1>(result.accepted_counts),
                                                             output_view<2>(result.tokens),
                                                             output_view<2>(result.nodes),
                                                             result.statuses};
                               });
}
template <Device D, typename Tokens, typename Parents, typename Draft, typename Target>
void verify_speculative_tree_into(const D& device, const SpeculativeTreeViews& result,
                                  const Tokens& tokens, const Parents& parents, const Draft& draft,
                                  const Target& target, Generators& rng,
                                  const SpeculativeTreeOptions& options, Workspace& workspace) {
  verify_speculative_tree_into(
      device, tokens, parents, draft, target, rng, options, workspace,
      [&](Index batch, Index nodes) {
        const bool fits =
            result.accepted_counts.size() == batch && result.tokens.dimension(0) == batch &&
            result.tokens.dimension(1) == nodes + 1 && result.nodes.dimension(0) == batch &&
            result.nodes.dimension(1) == nodes &&
            static_cast<Index>(result.statuses.size()) == batch;
        require_that(fits, "verify_speculative_tree", "the results have ",
                     result.accepted_counts.size(), " counts, tokens of shape ",
                     shape_text(result.tokens), ", nodes of shape ", shape_text(result.nodes),
                     " and ", result.statuses.size(), " statuses, expected ", batch, ", (", batch,
                     ", ", nodes + 1, "), (", batch, ", ", nodes, ") and ", batch);
        return result;
      });
}

}  // namespace detail

/// Turns a drafted tree of n nodes into tokens of the target distribution, each row for itself:
/// verify_speculative with several drafts for each place, of which one may be accepted. The walk
/// begins at the root; at each place, with p its target and q its draft distribution, its children
/// are tried in their order (multi-round rejection sampling):
///
///   child i is accepted where u_i q(token) < p(token), and the walk goes on from it;
///   refused, it leaves p = max(0, p - q), normalised, to the siblings after it, and where
///   siblings were drawn without replacement q without its token, normalised
///
/// and at the end one token is drawn from what is left of p (from all of it where nothing is left,
/// but for rounding; siblings are no longer tried then). A sibling equal to an earlier one is none,
/// but with replacement. The tokens then follow the target's distribution exactly, whatever the
/// drafts', provided that each child was drawn from the very q that it meets here: for siblings
/// without replacement, from q given that they are not the earlier ones (sample with a token_mask
/// or a logit_bias of -infinity for those). A tree that is a chain gives the tokens of
/// verify_speculative.
///
/// Without draft_probabilities the drafts are certain: chosen by a rule that has no chance in it
/// (the k best tokens of a drafter, n-grams of the prompt). q is then 1 at the child's token, which
/// is the best that can be done for such drafts: p(token) is the chance to go on with it.
///
///   draft_tokens          (batch, n) int32; a node of -1 is none, and neither are those below it
///   parents               (batch, n) int32, or (n) for all rows: an earlier node, -1 for the root
///   draft_probabilities   (batch, n + 1, vocab) float, double, bfloat16 or half: row 0 is what
///                         children of the root were drawn from, row i + 1 those of node i (not
///                         read where there are none)
///   target_probabilities  (batch, n + 1, vocab) likewise: of the token after the root (row 0),
///                         after node i (row i + 1)
///
/// result.nodes says which rows of a cache to keep. Statuses, checks, random numbers (node i is
/// accepted or refused by index i) and forms are those of verify_speculative. On a GPU tokens and
/// parents are device memory, and one out of range is none. The _into forms allocate nothing after
/// the first call at a size.
///
///   auto result = ef::verify_speculative_tree(tokens, parents, draft, target, rng);
///   auto result = ef::verify_speculative_tree(tokens, parents, target, rng);
template <Device D, typename Result, typename Tokens, typename Parents, typename Draft,
          typename Target>
void verify_speculative_tree_into(const D& device, Result&& result, const Tokens& draft_tokens,
                                  const Parents& parents, const Draft& draft_probabilities,
                                  const Target& target_probabilities, Generators rng,
                                  const SpeculativeTreeOptions& options = {},
                                  Workspace& workspace = thread_workspace()) {
  detail::verify_speculative_tree_into(device, result, draft_tokens, parents, draft_probabilities,
                                       target_probabilities, rng, options, workspace);
}
template <Device D, typename Result, typename Tokens, typename Parents, typename Target>
void verify_speculative_tree_into(const D& device, Result&& result, const Tokens& draft_tokens,
                                  const Parents& parents, const Target& target_probabilities,
                                  Generators rng, Workspace& workspace = thread_workspace()) {
  detail::verify_speculative_tree_into(device, result, draft_tokens, parents,
                                       detail::CertainDrafts{}, target_probabilities, rng, {},
                                       workspace);
}
template <CpuDevice D, typename Tokens, typename Parents, typename Draft, typename Target>
SpeculativeTreeResult verify_speculative_tree(const D& device, const Tokens& draft_tokens,
                                              const Parents& parents,
                                              const Draft& draft_probabilities,
                                              const Target& target_probabilities, Generators rng,
                                              const SpeculativeTreeOptions& options = {}) {
  SpeculativeTreeResult result;
  verify_speculative_tree_into(device, result, draft_tokens, parents, draft_probabilities,
                               target_probabilities, rng, options);
  return result;
}
template <CpuDevice D, typename Tokens, typename Parents, typename Target>
SpeculativeTreeResult verify_speculative_tree(const D& device, const Tokens& draft_tokens,
                                              const Parents& parents,
                                              const Target& target_probabilities, Generators rng) {
  SpeculativeTreeResult result;
  verify_speculative_tree_into(device, result, draft_tokens, parents, target_probabilities, rng);
  return result;
}
template <typename Tokens, typename Parents, typename Draft, typename Target>
  requires(!Device<Tokens>)
SpeculativeTreeResult verify_speculative_tree(const Tokens& draft_tokens, const Parents& parents,
                                              const Draft& draft_probabilities,
                                              const Target& target_probabilities, Generators rng,
                                              const SpeculativeTreeOptions& options = {}) {
  return verify_speculative_tree(Eigen::DefaultDevice{}, draft_tokens, parents, draft_probabilities,
                                 target_probabilities, rng, options);
}
template <typename Tokens, typename Parents, typename Target>
  requires(!Device<Tokens>)
SpeculativeTreeResult verify_speculative_tree(const Tokens& draft_tokens, const Parents& parents,
                                              const Target& target_probabilities, Generators rng) {
  return verify_speculative_tree(Eigen::DefaultDevice{}, draft_tokens, parents,
                                 target_probabilities, rng);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
