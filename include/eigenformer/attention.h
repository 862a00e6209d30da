/// \file
/// Attention over batches of sequences of different lengths, without ever building the score
/// matrix:
///
///   score[i, j] = scale * q_i . k_j                          scale 1 / sqrt(head_dim) unless given
///   score = softcap * tanh(score / softcap)                  where softcap > 0 (Gemma 2)
///   score += slope[head] * (j - p_i)                         where ALiBi slopes are given (Press et al., 2022)
///   score += bias[b, head, i, j]                             where a bias is given
///   score = function(score, position)                        where a function of scores is given
///   out_i = sum over visible j of exp(score[i, j]) v_j / (exp(sink[head]) + sum over visible j of exp(score[i, j]))
///   log_sum_exp_i = log of that denominator                  exp(sink) is there only where sinks are given (gpt-oss, 2025)
///
/// (Vaswani et al., "Attention Is All You Need", 2017; computed as in Dao et al., "FlashAttention",
/// 2022.) Shapes:
///
///   dense     q (batch, seq, heads, head_dim), k (batch, keys, kv_heads, head_dim), v (batch, keys, kv_heads, value_dim)
///             -> (batch, seq, heads, value_dim); or rank 3 (batch, seq, d_model): one head
///   packed    q (total_tokens, heads, head_dim), k and v (total_keys, kv_heads, width), sequences one after the other
///   cached    q (batch, n, heads, head_dim) against a KvCache, a PagedKvCache or any KvSource
///
/// Queries, keys and values of ranks 4 and 3 with heads may lie in one QKV projection
/// (ef::heads_of): they are read there, with the bits of a copy.
///
/// heads is a multiple of kv_heads (grouped-query attention, Ainslie et al., 2023); with group =
/// heads / kv_heads, query head h uses KV head h / group.
///
/// Positions. Sequence b has L_b keys, at positions 0 to L_b - 1, and n_b queries, aligned at the
/// end: query i stands at position p_i = L_b - n_b + i. Here n_b is
///   - query_lengths[b] where that option is given;
///   - otherwise, dense with as many query rows as key rows: L_b, so that p_i = i (self-attention
///     over a padded batch);
///   - otherwise all query rows: seq_lengths are lengths of keys (cross-attention, chunks against
///     longer keys).
/// Rows i >= n_b are padding. p_i may be negative (more queries than keys); under causal such a row
/// sees only the prefix, if any. Query i sees key j < L_b where what is given holds, or j <
/// prefix_length:
///   causal                        j <= p_i
///   window w > 0                  with causal the w most recent keys, j > p_i - w; else |j - p_i| <= w
///   window_left, window_right     p_i - window_left <= j <= p_i + window_right, -1: no limit
///
/// Masks hide some of these keys from a row and show no other. A mask that is false, a bias of
/// -infinity and a clear bit all hide a key, with the same bits as a window that says so (but that
/// sinks of a row that sees none of the first 1,024 keys may be rounded otherwise); any other bias,
/// -1e30 too, is added. Elements are found by the query's row and the key's position in its
/// sequence, in caches too (attention/masks.h); those of keys out of sight and of padding rows are
/// not used. A step that verifies a tree of n drafted tokens:
///
///   ef::attention_with_kv_cache_into(device, out, q, cache, layer, {.causal = true, .bit_mask = ancestors});   // (n, 1) words: bit j of row i: j is i or an ancestor
///
/// Keys before those of the queries are all seen there. Cost: a mask is read once for each query
/// position, or row where heads differ; key blocks that it hides from all rows that stand together
/// (128 or 256) cost nothing else.
///
/// A function of scores (score_mod of FlexAttention, Dong et al., 2024) is called for each key in
/// sight, and its result is the score. It is the last argument of a call, after the workspace of
/// the _into forms, and is compiled into the kernel:
///
///   auto score = [](auto s, const ef::ScorePosition& at) { return s * 0.5f + decay[at.query - at.key]; };
///   auto out = ef::batched_attention_with_padding(q4, k4, v4, seq_lengths, {.causal = true}, score);
///
/// It is given float, or double for double and for rows with large scores (Precision), in any order
/// and from many threads. It may be called for keys that a mask hides, whose result is dropped. Its
/// -infinity is a score like any other: hide keys by options. Such calls have no gradients. On CUDA
/// it is an object whose operator() is __host__ __device__.
///
/// Exact zeros. Padding rows and rows that see no key are exactly zero and have log_sum_exp
/// -infinity, sinks or not: positions and masks decide, not the values. Length 0 is legal, and so
/// are empty tensors. Keys and values at or past L_b, and query rows that are padding, are never
/// read into arithmetic: they may hold NaN. A key that a row does not see does not reach that row
/// whatever it holds.
///
/// Infinities. A row all of whose visible scores are -infinity is zero, its log_sum_exp is
/// -infinity (or the sink). A visible score of +infinity or NaN makes its row NaN and no other.
/// With softcap a score of +-infinity counts as +-softcap. Scores are numbers of the compute type:
/// one beyond its range is +-infinity, or NaN where its products overflow in both directions. The
/// query is scaled first: scale times each of its numbers must be in that range too (1e30 with a
/// scale of 1e9 is infinite in float, also where the score would fit).
///
/// Precision. Weights and averages are within 1e-5 in float, for any number of keys and scores up
/// to a million: a row whose greatest score is beyond 32 (1024 where queries or keys have 16 bits
/// or 8) takes its scores once more, in double (512 tokens, heads of 64, AVX2: 46 ms instead of
/// 5.5). Sums are made by blocks of 64 keys, 16 blocks, and all. An average of finite values is
/// finite however large they are.
///
/// Bits. A row is one fixed sum over key blocks of 64 at absolute positions: its bits do not depend
/// on the batch, the padding, the number of threads, or on whether the sequence came whole, in
/// chunks or token by token through a cache (for one stored type of K and V). bfloat16 and half are
/// converted to float; sums are float, or double for double. Where queries, keys and values are
/// bfloat16 and the CPU multiplies pairs of it (AVX512_BF16, AMX), it does: scores are scaled after
/// the products, whose sums must be in float's range, and weights are rounded to bfloat16, each by
/// at most 1/512 of itself. Numbers below 2^-126 count as 0 there.
/// On CUDA splits of 512 keys are merged in order, whether one block of threads walks over them or
/// blocks share them; where queries, keys and values are bfloat16, or half, of widths up to 256,
/// tensor cores multiply, for which weights are rounded to these 16 bits.
///
/// INT8 storage. On a CPU queries of float, bfloat16 and half are quantized as the keys are, by row
/// and head (kv_cache.h), so that a score is an exact integer times scales, with the same bits on
/// every instruction set; values are multiplied by weights in float. Each number of a query is off
/// by at most 1/254 of its row's greatest, a score by that times scale * the sum of |k_j|: what
/// storing the keys costs too. A row whose greatest score is beyond 1024 takes its scores from the
/// query as it is, as queries of double do. A query row that holds NaN or infinity is NaN. head_dim
/// is at most 132,104: sums fit 32 bits. On CUDA queries stay as they are.
///
/// Cost: 4 * head_dim flops and one exp for each visible (query, key) pair, whole key blocks that
/// nobody sees left out, so work follows the sum of length^2, half of it under causal, and length *
/// window with a window. K and V are read once for each 128 rows of a group's queries, or 256 with
/// AVX-512: a decode step reads the cache once. Memory beyond the output: about 270 KiB of scratch
/// per thread at head_dim 128, 440 with AVX-512 (70 or 145 more where a sequence has more than 1,024
/// keys; 30 more for INT8 storage, 105 for products of bfloat16); where threads share the keys of a
/// row, some 70 or 145 KiB more for 4 pieces a thread and for each 1,024 keys. The _into forms
/// allocate nothing after the first call at a size. The output may be the query tensor itself; other
/// overlaps are not allowed.
///
/// Results over parts of the keys are merged by attention/merge.h; attention/scores.h gives the
/// scores, to look at.
///
/// Everything throws std::invalid_argument for shapes that do not fit, shapes whose size in bytes
/// overflows (sizes of 0 left out), lengths outside [0, key rows], options out of range.
#pragma once

#include <algorithm>

#include "attention/backward.h"
#include "attention/merge.h"
#include "attention/problem.h"
#include "attention/scores.h"
#include "core/dispatch.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Output and log_sum_exp join a problem. False where there is nothing to do: a loop over 2^60 rows
/// without elements would take for ever.
template <typename Problem, typename Output, typename Q>
bool attach_output(std::string_view name, Problem& problem, Output& output, const Q& q, bool packed,
                   const AttentionOptions& options) {
  static_assert(std::is_same_v<scalar_of<Output>, scalar_of<Q>>,
                "eigenformer: output has the scalar type of query");
  require_attention_output(name, "output", output, q, problem.value_dim);
  problem.output = output.data();
  const auto lse_shape = log_sum_exp_shape(q, packed);
  problem.log_sum_exp = options.log_sum_exp.checked<typename Problem::Compute>(name, lse_shape);
  const bool no_rows = std::find(lse_shape.begin(), lse_shape.end(), Index{0}) != lse_shape.end();
  return output.size() > 0 || !(no_rows || problem.log_sum_exp == nullptr);
}

}  // namespace detail

/// Dense attention with padding, into `output` (the shape of q with v's width).
///
///   ef::batched_attention_with_padding_into(device, out, q4, k4, v4, seq_lengths, {.causal = true, .log_sum_exp = lse});
template <Device D, typename Output, typename Q, typename K, typename V,
          typename Function = problem::NoScoreFunction>
void batched_attention_with_padding_into(const D& device, Output&& output, const Q& query,
                                         const K& key, const V& value,
                                         const LengthSpan& seq_lengths,
                                         const AttentionOptions& options = {},
                                         Workspace& workspace = thread_workspace(),
                                         const Function& score = {}) {
  constexpr std::string_view name = "batched_attention_with_padding";
  constexpr int rank = detail::dense_rank<Q>;
  const auto q = detail::dense_input<rank>(query);
  const auto k = detail::dense_input<rank>(key);
  const auto v = detail::dense_input<rank>(value);
  auto out = output_view<rank>(output);
  Workspace::Frame frame(workspace);
  auto problem = detail::dense_attention_problem(name, q, k, v, seq_lengths, options, frame, score);
  if (detail::attach_output(name, problem, out, q, false, options))
    detail::run(device, problem, workspace);
}

template <CpuDevice D, typename Q, typename K, typename V,
          typename Function = problem::NoScoreFunction>
auto batched_attention_with_padding(const D& device, const Q& query, const K& key, const V& value,
                                    const LengthSpan& seq_lengths,
                                    const AttentionOptions& options = {},
                                    const Function& score = {}) {
  constexpr int rank = detail::dense_rank<Q>;
  auto sizes = detail::sizes_of<rank>(detail::dense_input<rank>(query));
  sizes[rank - 1] = detail::dense_input<rank>(value).dimension(rank - 1);
  auto output =
      detail::make_tensor<scalar_of<Q>, rank>("batched_attention_with_padding", "output", sizes);
  batched_attention_with_padding_into(device, output, query, key, value, seq_lengths, options,
                                      thread_workspace(), score);
  return output;
}

///   ef::Tensor<float, 3> out = ef::batched_attention_with_padding(query, key, value, seq_lengths);   // (batch, seq, d_model)
///   ef::Tensor<float, 4> o4 = ef::batched_attention_with_padding(q4, k4, v4, seq_lengths, {.causal = true});
template <typename Q, typename K, typename V, typename Function = problem::NoScoreFunction>
  requires(!Device<Q>)
auto batched_attention_with_padding(const Q& query, const K& key, const V& value,
                                    const LengthSpan& seq_lengths,
                                    const AttentionOptions& options = {},
                                    const Function& score = {}) {
  return batched_attention_with_padding(Eigen::DefaultDevice{}, query, key, value, seq_lengths,
                                        options, score);
}

/// Packed sequences: sequence b has query rows [q_offsets[b], q_offsets[b + 1]) and key rows
/// [kv_offsets[b], kv_offsets[b + 1]). Offsets start at 0, never fall and end at the number of
/// rows. Into `output` (total_tokens, heads, value_dim).
template <Device D, typename Output, typename Q, typename K, typename V,
          typename Function = problem::NoScoreFunction>
void variable_length_attention_into(const D& device, Output&& output, const Q& query, const K& key,
                                    const V& value, const LengthSpan& q_offsets,
                                    const LengthSpan& kv_offsets,
                                    const AttentionOptions& options = {},
                                    Workspace& workspace = thread_workspace(),
                                    const Function& score = {}) {
  constexpr std::string_view name = "variable_length_attention";
  const auto q = detail::heads_input<3>(query);
  const auto k = detail::heads_input<3>(key);
  const auto v = detail::heads_input<3>(value);
  auto out = output_view<3>(output);
  Workspace::Frame frame(workspace);
  auto problem =
      detail::packed_attention_problem(name, q, k, v, q_offsets, kv_offsets, options, frame, score);
  if (detail::attach_output(name, problem, out, q, true, options))
    detail::run(device, problem, workspace);
}

template <CpuDevice D, typename Q, typename K, typename V,
          typename Function = problem::NoScoreFunction>
auto variable_length_attention(const D& device, const Q& query, const K& key, const V& value,
                               const LengthSpan& q_offsets, const LengthSpan& kv_offsets,
                               const AttentionOptions& options = {}, const Function& score = {}) {
  auto sizes = detail::sizes_of<3>(detail::heads_input<3>(query));
  sizes[2] = detail::heads_input<3>(value).dimension(2);
  auto output = detail::make_tensor<scalar_of<Q>, 3>("variable_length_attention", "output", sizes);
  variable_length_attention_into(device, output, query, key, value, q_offsets, kv_offsets, options,
                                 thread_workspace(), score);
  return output;
}

///   ef::Tensor<float, 3> packed = ef::variable_length_attention(q, k, v, q_offsets, kv_offsets, {.causal = true});
template <typename Q, typename K, typename V, typename Function = problem::NoScoreFunction>
  requires(!Device<Q>)
auto variable_length_attention(const Q& query, const K& key, const V& value,
                               const LengthSpan& q_offsets, const LengthSpan& kv_offsets,
                               const AttentionOptions& options = {}, const Function& score = {}) {
  return variable_length_attention(Eigen::DefaultDevice{}, query, key, value, q_offsets, kv_offsets,
                                   options, score);
}

/// Queries (batch, n, heads, head_dim) against keys and values in any layout; they are the last
/// positions of their sequences and their own keys are already there. options.query_lengths mixes
/// prefill chunks and decode steps in one call. Into `output` (the shape of query with the width of
/// the values).
template <Device D, typename Output, typename Q, typename S,
          typename Function = problem::NoScoreFunction>
void attention_with_kv_source_into(const D& device, Output&& output, const Q& query,
                                   const KvSource<S>& source, const AttentionOptions& options = {},
                                   Workspace& workspace = thread_workspace(),
                                   const Function& score = {}) {
  constexpr std::string_view name = "attention_with_kv_cache";
  const auto q = detail::heads_input<4>(query);
  auto out = output_view<4>(output);
  Workspace::Frame frame(workspace);
  auto problem = detail::cached_attention_problem(name, q, source, options, frame, score);
  if (detail::attach_output(name, problem, out, q, false, options))
    detail::run(device, problem, workspace);
}

/// The same of packed queries (tokens, heads, head_dim), a chunk of each sequence as long as it
/// likes: rows [q_offsets[b], q_offsets[b + 1]) are the last positions of sequence b.
template <Device D, typename Output, typename Q, typename S,
          typename Function = problem::NoScoreFunction>
  requires(rank_of<Q> != 4)
void attention_with_kv_source_into(const D& device, Output&& output, const Q& query,
                                   const KvSource<S>& source, const LengthSpan& q_offsets,
                                   const AttentionOptions& options = {},
                                   Workspace& workspace = thread_workspace(),
                                   const Function& score = {}) {
  constexpr std::string_view name = "attention_with_kv_cache";
  const auto q = detail::heads_input<3>(query);
  auto out = output_view<3>(output);
  Workspace::Frame frame(workspace);
  auto problem =
      detail::ragged_attention_problem(name, q, source, q_offsets, options, frame, score);
  if (detail::attach_output(name, problem, out, q, true, options))
    detail::run(device, problem, workspace);
}

namespace detail {

template <int Rank, typename Q, typename S>
auto cached_output(const Q& query, const KvSource<S>& source) {
  auto sizes = sizes_of<Rank>(heads_input<Rank>(query));
  sizes[Rank - 1] = cached_value_dim(source, sizes[Rank - 1]);
  return make_tensor<scalar_of<Q>, Rank>("attention_with_kv_cache", "output", sizes);
}

}  // namespace detail

template <CpuDevice D, typename Q, typename S, typename Function = problem::NoScoreFunction>
auto attention_with_kv_source(const D& device, const Q& query, const KvSource<S>& source,
                              const AttentionOptions& options = {}, const Function& score = {}) {
  auto output = detail::cached_output<4>(query, source);
  attention_with_kv_source_into(device, output, query, source, options, thread_workspace(), score);
  return output;
}

template <CpuDevice D, typename Q, typename S, typename Function = problem::NoScoreFunction>
  requires(rank_of<Q> != 4)
auto attention_with_kv_source(const D& device, const Q& query, const KvSource<S>& source,
                              const LengthSpan& q_offsets, const AttentionOptions& options = {},
                              const Function& score = {}) {
  auto output = detail::cached_output<3>(query, source);
  attention_with_kv_source_into(device, output, query, source, q_offsets, options,
                                thread_workspace(), score);
  return output;
}
template <typename Q, typename S, typename Function = problem::NoScoreFunction>
  requires(!Device<Q>)
auto attention_with_kv_source(const Q& query, const KvSource<S>& source,
                              const AttentionOptions& options = {}, const Function& score = {}) {
  return attention_with_kv_source(Eigen::DefaultDevice{}, query, source, options, score);
}
template <typename Q, typename S, typename Function = problem::NoScoreFunction>
  requires(!Device<Q> && rank_of<Q> != 4)
auto attention_with_kv_source(const Q& query, const KvSource<S>& source,
                              const LengthSpan& q_offsets, const AttentionOptions& options = {},
                              const Function& score = {}) {
  return attention_with_kv_source(Eigen::DefaultDevice{}, query, source, q_offsets, options, score);
}

namespace detail {

/// Anything that says where the keys and values of a layer are: KvCache, PagedKvCache.
template <typename Cache>
concept KvCacheLike = requires(const Cache& cache, Index layer_idx) {
  cache.source(layer_idx).key_row(Index{}, Index{}, Index{});
};

template <Device D, KvCacheLike Cache>
auto source_for(const D& device, const Cache& cache, Index layer_idx) {
  if constexpr (requires { cache.memory(); })
    require_memory("attention_with_kv_cache", "the cache", cache.memory(), memory_of(device));
  return cache.source(layer_idx);
}

}  // namespace detail

/// Queries against layer `layer_idx` of a cache, into `output`. Throws what the cache throws for an
/// unknown layer, and std::invalid_argument where its pages lie in memory of another backend.
template <Device D, typename Output, typename Q, detail::KvCacheLike Cache,
          typename Function = problem::NoScoreFunction>
void attention_with_kv_cache_into(const D& device, Output&& output, const Q& query,
                                  const Cache& cache, Index layer_idx,
                                  const AttentionOptions& options = {},
                                  Workspace& workspace = thread_workspace(),
                                  const Function& score = {}) {
  attention_with_kv_source_into(device, output, query, detail::source_for(device, cache, layer_idx),
                                options, workspace, score);
}
template <CpuDevice D, typename Q, detail::KvCacheLike Cache,
          typename Function = problem::NoScoreFunction>
auto attention_with_kv_cache(const D& device, const Q& query, const Cache& cache, Index layer_idx,
                             const AttentionOptions& options = {}, const Function& score = {}) {
  return attention_with_kv_source(device, query, detail::source_for(device, cache, layer_idx),
                                  options, score);
}
///   ef::Tensor<float, 4> dec = ef::attention_with_kv_cache(q4, cache, layer_idx, {.causal = true});
template <typename Q, detail::KvCacheLike Cache, typename Function = problem::NoScoreFunction>
  requires(!Device<Q>)
auto attention_with_kv_cache(const Q& query, const Cache& cache, Index layer_idx,
                             const AttentionOptions& options = {}, const Function& score = {}) {
  return attention_with_kv_cache(Eigen::DefaultDevice{}, query, cache, layer_idx, options, score);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
