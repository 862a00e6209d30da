/// \file
/// The scores that attention works with, for looking at: (batch, heads, seq, keys), at one of the
/// four stages of ONNX's Attention (qk_matmul_output_mode):
///
///   scaled         0   scale * q_i . k_j
///   capped         1   softcap * tanh(score / softcap), where there is a softcap
///   masked         2   ALiBi and bias added; -infinity where row i does not see key j
///   probabilities  3   their softmax, sinks in the denominator; 0 where row i does not see key j
///
///   ef::Tensor<float, 4> p = ef::attention_scores(q, k, seq_lengths, ef::AttentionScoreStage::probabilities, {.causal = true});
///
/// q (batch, seq, heads, head_dim) and k (batch, keys, kv_heads, head_dim), or rank 3 with one head
/// and scores (batch, seq, keys). Options, lengths, positions and refusals are those of
/// batched_attention_with_padding; log_sum_exp in the options is ignored. Scores are of the compute
/// type: float, or double for double.
///
/// Padding rows, and keys at or past the length, are not read: -infinity in the stages 0 to 2, 0 in
/// stage 3. In the stages 0 and 1 every other pair has its score, whether it is visible or not. A
/// row that sees no key, or whose visible scores are all -infinity, has probabilities of 0; one
/// with a visible score of +infinity or NaN has NaN at every score but -infinity.
///
/// Scores are computed in double and rounded once: probabilities times V are attention's output
/// within its tolerance. A function of scores, the last argument as in attention's calls, takes
/// part from stage 2 on. Bits depend on nothing but the row and its keys. Scores must not overlap
/// query or key. Cost: 2 * head_dim flops a score (twice for probabilities on CUDA), all of them in
/// double, and the memory of the whole score matrix: this is for inspection. The _into form
/// allocates nothing after the first call at a size.
#pragma once

#include "../core/dispatch.h"
#include "../cpu/attention/scores.h"
#include "problem.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

enum class AttentionScoreStage { scaled, capped, masked, probabilities };

namespace detail {

/// A request without what comes after the first stage, or the second.
template <typename T, typename Function>
problem::Attention<T, T> products_of(const problem::Attention<T, T, Function>& p,
                                     AttentionScoreStage stage) {
  problem::Attention<T, T> products{};
  products.scale = p.scale;
  if (stage == AttentionScoreStage::capped) products.softcap = p.softcap;
  products.queries = p.queries;
  products.query_strides = p.query_strides;
  products.batch = p.batch;
  products.heads = p.heads;
  products.kv_heads = p.kv_heads;
  products.head_dim = p.head_dim;
  products.source = p.source;
  products.sequences = p.sequences;
  return products;
}

}  // namespace detail

/// Into `scores`.
template <Device D, typename Scores, typename Q, typename K,
          typename Function = problem::NoScoreFunction>
void attention_scores_into(const D& device, Scores&& scores, const Q& query, const K& key,
                           const LengthSpan& seq_lengths, AttentionScoreStage stage,
                           const AttentionOptions& options = {},
                           Workspace& workspace = thread_workspace(), const Function& score = {}) {
  constexpr std::string_view name = "attention_scores";
  constexpr int rank = detail::dense_rank<Q>;
  using T = scalar_of<Q>;
  static_assert(std::is_same_v<scalar_of<Scores>, compute_type<T>>,
                "eigenformer: scores are of the compute type, float or for double double");
  const auto q = detail::dense_input<rank>(query);
  const auto k = detail::dense_input<rank>(key);
  auto out = output_view<rank>(scores);
  Workspace::Frame frame(workspace);
  const auto forward =
      detail::dense_attention_problem(name, q, k, k, seq_lengths, options, frame, score);
  const auto [batch, rows, heads, width] = detail::attention_shape(q);
  const Index keys = k.dimension(1);
  detail::checked_size(name, "scores", out);
  const auto [out_batch, out_heads, out_rows, out_keys] =
      rank == 3 ? std::array<Index, 4>{out.dimension(0), 1, out.dimension(1), out.dimension(2)}
                : std::array<Index, 4>{out.dimension(0), out.dimension(1), out.dimension(2),
                                       out.dimension(rank - 1)};
  detail::require_that(
      out_batch == batch && out_heads == heads && out_rows == rows && out_keys == keys, name,
      "scores has shape ", detail::shape_text(out), ", expected (", batch, ", ",
      rank == 3 ? "" : std::to_string(heads) + ", ", rows, ", ", keys, ")");
  if (out.size() == 0) return;
  const bool all = stage == AttentionScoreStage::probabilities;
  if (all || stage == AttentionScoreStage::masked)
    return detail::run(device,
                       problem::AttentionScores<T, Function>{forward, out.data(), rows, keys, all},
                       workspace);
  detail::run(device,
              problem::AttentionScores<T>{detail::products_of(forward, stage), out.data(), rows,
                                          keys, false},
              workspace);
}

template <CpuDevice D, typename Q, typename K, typename Function = problem::NoScoreFunction>
auto attention_scores(const D& device, const Q& query, const K& key, const LengthSpan& seq_lengths,
                      AttentionScoreStage stage, const AttentionOptions& options = {},
                      const Function& score = {}) {
  constexpr int rank = detail::dense_rank<Q>;
  const auto q = detail::dense_input<rank>(query);
  Eigen::DSizes<Index, rank> sizes;
  sizes[0] = q.dimension(0);
  if constexpr (rank == 4) sizes[1] = q.dimension(2);
  sizes[rank - 2] = q.dimension(1);
  sizes[rank - 1] = detail::dense_input<rank>(key).dimension(1);
  auto scores =
      detail::make_tensor<compute_type<scalar_of<Q>>, rank>("attention_scores", "scores", sizes);
  attention_scores_into(device, scores, query, key, seq_lengths, stage, options, thread_workspace(),
                        score);
  return scores;
}
template <typename Q, typename K, typename Function = problem::NoScoreFunction>
  requires(!Device<Q>)
auto attention_scores(const Q& query, const K& key, const LengthSpan& seq_lengths,
                      AttentionScoreStage stage, const AttentionOptions& options = {},
                      const Function& score = {}) {
  return attention_scores(Eigen::DefaultDevice{}, query, key, seq_lengths, stage, options, score);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
