/// \file
/// From the arguments of an attention call to a checked problem::Attention: every refusal of
/// attention is here. Nothing is written before all checks have passed.
#pragma once

#include <algorithm>
#include <cmath>

#include "../core/device.h"
#include "../core/rows.h"
#include "../core/workspace.h"
#include "../cpu/attention/attention.h"
#include "options.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Rank of a dense argument; 4 where it is no tensor of rank 3 or 4, so that input_view explains.
template <typename X>
inline constexpr int dense_rank = rank_of<X> == 3 ? 3 : 4;

/// Views with strides have heads, so rank 4.
template <int Rank, typename X>
auto dense_input(const X& x) {
  if constexpr (Rank == 4)
    return heads_input<4>(x);
  else
    return input_view<Rank>(x);
}

/// (batch, rows, heads, width) of a rank-4 tensor; a rank-3 tensor (batch, rows, width) has one
/// head.
template <typename View>
std::array<Index, 4> attention_shape(const View& view) {
  if constexpr (rank_of<View> == 3)
    return {view.dimension(0), view.dimension(1), 1, view.dimension(2)};
  else
    return {view.dimension(0), view.dimension(1), view.dimension(2), view.dimension(3)};
}

/// How the rows of such a tensor follow each other.
template <typename View>
problem::HeadStrides attention_strides(const View& view) {
  if constexpr (rank_of<View> == 3)
    return {view.dimension(2), view.dimension(2)};
  else
    return strides_of(view);
}

inline void check_attention_heads(std::string_view name, Index heads, Index kv_heads) {
  require_that(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, name, "query has ", heads,
               " heads, expected a multiple of the ", kv_heads, " heads of key and value");
}

inline void check_attention_options(std::string_view name, const AttentionOptions& o, Index heads) {
  constexpr Index limit = (std::numeric_limits<Index>::max)() / 4;
  require_that(o.window >= 0 && o.window < limit, name, "window is ", o.window,
               ", expected 0 (none) or more, below 2^61");
  require_that(o.window_left >= -1 && o.window_left < limit && o.window_right >= -1 &&
                   o.window_right < limit,
               name, "window_left is ", o.window_left, " and window_right ", o.window_right,
               ", expected -1 (no limit) or more, below 2^61");
  require_that(o.window == 0 || (o.window_left == -1 && o.window_right == -1), name, "window is ",
               o.window, ", window_left ", o.window_left, " and window_right ", o.window_right,
               ", expected window or the other two");
  require_that(o.prefix_length >= 0 && o.prefix_length < limit, name, "prefix_length is ",
               o.prefix_length, ", expected 0 or more, below 2^61");
  require_that(o.softcap >= 0 && std::isfinite(o.softcap), name, "softcap is ", o.softcap,
               ", expected 0 (none) or a finite value above");
  require_that(std::isfinite(o.scale.value_or(0.0f)), name, "scale is ", o.scale.value_or(0.0f),
               ", expected a finite value, or none (1 / sqrt(head_dim))");
  const auto check_one_a_head = [&](std::string_view what, const auto& span) {
    require_that(span.empty() || static_cast<Index>(span.size()) == heads, name, what, " has ",
                 span.size(), " elements, expected ", heads, " (heads)");
  };
  check_one_a_head("alibi_slopes", o.alibi_slopes);
  check_one_a_head("sinks", o.sinks);
  check_one_a_head("sinks_gradient", o.sinks_gradient);
  for (const float slope : o.alibi_slopes)
    require_that(std::isfinite(slope), name, "alibi_slopes holds ", slope,
                 ", expected finite values");
  for (const float sink : o.sinks)
    require_that(sink < std::numeric_limits<float>::infinity(), name, "sinks holds ", sink,
                 ", expected finite values or -infinity");
}

inline problem::Visibility attention_visibility(const AttentionOptions& o) {
  auto v = problem::Visibility::of(o.causal, o.window, o.prefix_length);
  if (o.window_left >= 0) v.left = o.window_left;
  if (o.window_right >= 0 && !o.causal) v.right = o.window_right;
  if (o.window_left >= 0 || o.window_right >= 0) v.prefix = o.prefix_length;
  return v;
}

/// What options, a function of scores and widths say, everything but pointers and sequences.
template <typename TQ, typename TKV, typename Function = problem::NoScoreFunction>
auto attention_problem(const AttentionOptions& options, Index heads, Index kv_heads, Index head_dim,
                       Index value_dim, const Function& function = {}) {
  using C = compute_type<TQ>;
  if constexpr (problem::is_score_function<Function>)
    static_assert(std::is_invocable_r_v<C, const Function&, C, const ScorePosition&>,
                  "eigenformer: a function of scores takes a score (float, or double where it is "
                  "large or of double) and an ef::ScorePosition, and returns the new score");
  problem::Attention<TQ, TKV, Function> p{{}, function};
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.value_dim = value_dim;
  p.visibility = attention_visibility(options);
  p.scale = options.scale ? static_cast<C>(*options.scale)
                          : C(1) / std::sqrt(static_cast<C>(std::max<Index>(1, head_dim)));
  p.softcap = static_cast<C>(options.softcap);
  p.alibi_slopes = options.alibi_slopes.empty() ? nullptr : options.alibi_slopes.data();
  p.sinks = options.sinks.empty() ? nullptr : options.sinks.data();
  return p;
}

/// A bias or mask of a request whose query tensor has `rows` rows for each sequence or, packed, for
/// all.
template <typename T>
problem::ScoreTensor<T> score_tensor(std::string_view name, std::string_view what,
                                     const ScoreView<T>& view, Index batch, Index heads, Index rows,
                                     Index keys, bool packed) {
  if (!view.present()) return {};
  const auto& sizes = view.sizes();
  const auto fits = [&](std::size_t d, Index size) { return sizes[d] == 1 || sizes[d] == size; };
  require_that(
      fits(0, batch) && fits(1, heads) && fits(2, rows) && (sizes[3] == 1 || sizes[3] >= keys),
      name, what, " has shape (", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3],
      "), expected (", batch, ", ", heads, ", ", rows, ", ", keys,
      " or more), each of them or 1 (batch, heads, query rows, keys)");
  require_that(view.data() != nullptr || std::count(sizes.begin(), sizes.end(), 0) > 0, name, what,
               " has a null pointer and sizes of something");
  // rows of problems count on over the sequences
  return {view.data(), view.stride(0) - (packed ? 0 : rows * view.stride(2)), view.stride(1),
          view.stride(2), view.stride(3)};
}

inline problem::BitMask bit_mask(std::string_view name, const AttentionOptions& options,
                                 std::span<const problem::AttentionSequence> sequences, Index rows,
                                 Workspace::Frame& frame) {
  const BitMaskView& view = options.bit_mask;
  const Index batch = static_cast<Index>(sequences.size());
  require_that(options.bit_mask_first_keys.empty() ||
                   (view.present() && options.bit_mask_first_keys.size() == batch),
               name, "bit_mask_first_keys has ", options.bit_mask_first_keys.size(),
               " elements, expected ", view.present() ? batch : 0, " (batch), and a bit_mask");
  if (!view.present()) return {};
  require_that(view.rows() == rows, name, "bit_mask has ", view.rows(), " rows, expected ", rows,
               " (all query rows)");
  require_that(view.words() != nullptr || rows == 0 || view.words_per_row() == 0, name,
               "bit_mask has a null pointer and sizes of something");
  Index* const first_keys = frame.take<Index>(batch);
  for (Index b = 0; b < batch; ++b) {
    const problem::AttentionSequence& s = sequences[static_cast<std::size_t>(b)];
    const bool given = !options.bit_mask_first_keys.empty();
    first_keys[b] = given ? options.bit_mask_first_keys[b] : s.first_position;
    require_that(!given || first_keys[b] >= 0, name, "bit_mask_first_keys[", b, "] is ",
                 first_keys[b], ", expected 0 or more");
    require_that(
        s.query_rows == 0 || (s.key_length - first_keys[b] + 63) / 64 <= view.words_per_row(), name,
        "bit_mask has ", view.words_per_row(), " words per row, expected enough for ",
        s.key_length - first_keys[b], " keys from key ", first_keys[b], " of sequence ", b, " on");
  }
  return {view.words(), view.words_per_row(), first_keys};
}

/// Bias and masks join a problem that has its sequences. `rows`: of the query tensor, for each
/// sequence or, packed, for all.
template <typename Problem>
void attach_masks(std::string_view name, Problem& p, const AttentionOptions& options, Index rows,
                  bool packed, Workspace::Frame& frame) {
  Index keys = 0;
  for (Index b = 0; b < p.batch; ++b) keys = (std::max)(keys, p.sequences[b].key_length);
  if constexpr (problem::is_score_function<decltype(p.function)>)
    require_that(keys < (std::numeric_limits<std::int32_t>::max)(), name, "a sequence has ", keys,
                 " keys, expected fewer than 2^31 - 1 with a function of scores");
  p.bias = score_tensor(name, "bias", options.bias, p.batch, p.heads, rows, keys, packed);
  p.mask = score_tensor(name, "mask", options.mask, p.batch, p.heads, rows, keys, packed);
  p.bit_mask = bit_mask(name, options, {p.sequences, static_cast<std::size_t>(p.batch)},
                        packed ? rows : p.batch * rows, frame);
}

inline void check_query_lengths(std::string_view name, const AttentionOptions& options, Index batch,
                                Index rows) {
  if (options.query_lengths.empty()) return;
  require_that(options.query_lengths.size() == batch, name, "query_lengths has ",
               options.query_lengths.size(), " elements, expected ", batch, " (batch)");
  for (Index b = 0; b < batch; ++b)
    require_that(options.query_lengths[b] >= 0 && options.query_lengths[b] <= rows, name,
                 "query_lengths[", b, "] is ", options.query_lengths[b], ", expected 0 to ", rows,
                 " (query rows)");
}

/// Sequence b of tensors (batch, rows, heads, width), its queries the last ones of its keys.
inline problem::AttentionSequence aligned_sequence(Index b, Index rows, Index heads, Index queries,
                                                   Index key_length) {
  return {b * rows, queries, rows, b, 0, key_length, key_length - queries, b * heads * rows};
}

/// One scalar for all three, and no size that overflows.
template <typename Q, typename K, typename V>
void check_attention_tensors(std::string_view name, const Q& q, const K& k, const V& v) {
  static_assert(FloatingScalar<scalar_of<Q>>,
                "eigenformer: attention takes float, double, Eigen::bfloat16 or Eigen::half");
  static_assert(
      std::is_same_v<scalar_of<Q>, scalar_of<K>> && std::is_same_v<scalar_of<Q>, scalar_of<V>>,
      "eigenformer: query, key and value have one scalar type");
  checked_size(name, "query", q);
  checked_size(name, "key", k);
  checked_size(name, "value", v);
}

/// Dense q, k, v of rank 3 or 4 with lengths; output and log_sum_exp are left to the caller. The
/// sequences live in `frame`.
template <typename Q, typename K, typename V, typename Function = problem::NoScoreFunction>
auto dense_attention_problem(std::string_view name, const Q& q, const K& k, const V& v,
                             const LengthSpan& lengths, const AttentionOptions& options,
                             Workspace::Frame& frame, const Function& function = {}) {
  using T = scalar_of<Q>;
  check_attention_tensors(name, q, k, v);
  const auto [batch, rows, heads, head_dim] = attention_shape(q);
  const auto [k_batch, keys, kv_heads, k_dim] = attention_shape(k);
  const auto [v_batch, v_keys, v_heads, value_dim] = attention_shape(v);
  require_that(k_batch == batch && v_batch == batch, name, "query has batch ", batch, ", key ",
               k_batch, ", value ", v_batch);
  require_that(k_dim == head_dim, name, "key has shape ", shape_text(k), ", expected the width ",
               head_dim, " of query ", shape_text(q));
  require_that(v_keys == keys && v_heads == kv_heads, name, "value has shape ", shape_text(v),
               ", key has shape ", shape_text(k));
  check_attention_heads(name, heads, kv_heads);
  check_attention_options(name, options, heads);
  check_query_lengths(name, options, batch, rows);
  require_that(lengths.size() == batch, name, "seq_lengths has ", lengths.size(),
               " elements, expected ", batch, " (batch)");
  for (Index b = 0; b < batch; ++b)
    require_that(lengths[b] >= 0 && lengths[b] <= keys, name, "seq_lengths[", b, "] is ",
                 lengths[b], ", expected 0 to ", keys, " (key rows)");

  auto p = attention_problem<T, T>(options, heads, kv_heads, head_dim, value_dim, function);
  p.queries = q.data();
  p.query_strides = attention_strides(q);
  p.batch = batch;
  p.lse_head_stride = rows;
  auto* const sequences = frame.take<problem::AttentionSequence>(batch);
  for (Index b = 0; b < batch; ++b) {
    const Index queries = !options.query_lengths.empty() ? options.query_lengths[b]
                          : rows == keys                 ? lengths[b]
                                                         : rows;
    sequences[b] = aligned_sequence(b, rows, heads, queries, lengths[b]);
  }
  p.sequences = sequences;
  attach_masks(name, p, options, rows, false, frame);
  const auto key_strides = attention_strides(k), value_strides = attention_strides(v);
  p.source = KvSource<T>{.batch = batch,
                         .kv_heads = kv_heads,
                         .head_dim = head_dim,
                         .value_dim = value_dim,
                         .keys = k.data(),
                         .values = v.data(),
                         .sequence_stride = keys * key_strides.token,
                         .row_stride = key_strides.token,
                         .head_stride = key_strides.head,
                         .value_sequence_stride = keys * value_strides.token,
                         .value_row_stride = value_strides.token,
                         .value_head_stride = value_strides.head};
  return p;
}

inline void check_offsets(std::string_view name, std::string_view what, const LengthSpan& offsets,
                          Index batch, Index total) {
  require_that(offsets.size() == batch + 1, name, what, " has ", offsets.size(),
               " elements, expected ", batch + 1, " (sequences + 1)");
  require_that(offsets[0] == 0, name, what, " starts at ", offsets[0], ", expected 0");
  for (Index b = 0; b < batch; ++b)
    require_that(offsets[b] <= offsets[b + 1], name, what, " falls from ", offsets[b], " to ",
                 offsets[b + 1], " at ", b + 1, ", expected to rise or stay");
  require_that(offsets[batch] == total, name, what, " ends at ", offsets[batch], ", expected ",
               total, " (tokens)");
}

/// Packed q, k, v (tokens, heads, width) with offsets; output and log_sum_exp are left to the
/// caller.
template <typename Q, typename K, typename V, typename Function = problem::NoScoreFunction>
auto packed_attention_problem(std::string_view name, const Q& q, const K& k, const V& v,
                              const LengthSpan& q_offsets, const LengthSpan& kv_offsets,
                              const AttentionOptions& options, Workspace::Frame& frame,
                              const Function& function = {}) {
  using T = scalar_of<Q>;
  check_attention_tensors(name, q, k, v);
  const Index heads = q.dimension(1), head_dim = q.dimension(2), kv_heads = k.dimension(1),
              value_dim = v.dimension(2);
  require_that(k.dimension(2) == head_dim, name, "key has shape ", shape_text(k),
               ", expected the width ", head_dim, " of query ", shape_text(q));
  require_that(v.dimension(0) == k.dimension(0) && v.dimension(1) == kv_heads, name,
               "value has shape ", shape_text(v), ", key has shape ", shape_text(k));
  check_attention_heads(name, heads, kv_heads);
  check_attention_options(name, options, heads);
  require_that(options.query_lengths.empty(), name,
               "query_lengths is given, expected none: q_offsets say how long sequences are");
  require_that(q_offsets.size() >= 1, name, "q_offsets is empty, expected sequences + 1 elements");
  const Index batch = q_offsets.size() - 1;
  check_offsets(name, "q_offsets", q_offsets, batch, q.dimension(0));
  check_offsets(name, "kv_offsets", kv_offsets, batch, k.dimension(0));

  auto p = attention_problem<T, T>(options, heads, kv_heads, head_dim, value_dim, function);
  p.queries = q.data();
  p.query_strides = strides_of(q);
  p.batch = batch;
  p.lse_head_stride = q.dimension(0);
  auto* const sequences = frame.take<problem::AttentionSequence>(batch);
  for (Index b = 0; b < batch; ++b) {
    const Index queries = q_offsets[b + 1] - q_offsets[b], keys = kv_offsets[b + 1] - kv_offsets[b];
    sequences[b] = {q_offsets[b],  queries, queries,        0,
                    kv_offsets[b], keys,    keys - queries, q_offsets[b]};
  }
  p.sequences = sequences;
  attach_masks(name, p, options, q.dimension(0), true, frame);
  const auto key_strides = strides_of(k), value_strides = strides_of(v);
  p.source = KvSource<T>{.batch = 1,
                         .kv_heads = kv_heads,
                         .head_dim = head_dim,
                         .value_dim = value_dim,
                         .keys = k.data(),
                         .values = v.data(),
                         .row_stride = key_strides.token,
                         .head_stride = key_strides.head,
                         .value_row_stride = value_strides.token,
                         .value_head_stride = value_strides.head};
  return p;
}

template <typename T, typename S>
constexpr void require_cache_scalars() {
  static_assert(FloatingScalar<T>,
                "eigenformer: attention takes float, double, Eigen::bfloat16 or Eigen::half");
  static_assert(!std::is_same_v<S, double> || std::is_same_v<T, double>,
                "eigenformer: a cache of double serves queries of double");
}

/// The width of the output of queries of head_dim: that of the values, which a source need not say.
template <typename S>
Index cached_value_dim(const KvSource<S>& source, Index head_dim) {
  return source.value_dim < 0 ? head_dim : source.value_dim;
}

/// Queries of `heads` heads of head_dim find their keys in `source`.
template <typename S>
void require_cache_fits(std::string_view name, const KvSource<S>& source, Index head_dim,
                        Index heads, const AttentionOptions& options) {
  const Index batch = source.batch;
  require_that(source.head_dim == head_dim || batch == 0, name, "query has head_dim ", head_dim,
               ", the cache has ", source.head_dim);
  check_attention_heads(name, heads, batch == 0 ? heads : source.kv_heads);
  check_attention_options(name, options, heads);
  require_that(!std::is_same_v<S, std::int8_t> || source.tables != nullptr || batch == 0, name,
               "the cache holds int8 rows without scales");
  constexpr Index most = (std::numeric_limits<std::int32_t>::max)() / (127 * 128);
  require_that(!std::is_same_v<S, std::int8_t> || head_dim <= most, name, "head_dim is ", head_dim,
               ", sums of INT8 products fit 32 bits up to ", most);
  for (Index b = 0; b < batch; ++b)
    require_that(source.lengths[b] >= 0, name, "the cache has length ", source.lengths[b],
                 " for sequence ", b);
}

/// The queries of sequence b see nothing that the cache has given up.
template <typename Problem>
void require_keys_held(std::string_view name, const Problem& p, Index b) {
  if (p.source.gone == nullptr || p.sequences[b].query_rows == 0) return;
  const problem::KeyRange gone = p.source.gone[b];
  const Index first = p.sequences[b].first_position;
  require_that(
      gone.begin >= gone.end || (p.visibility.keys(first, p.source.lengths[b]).begin >= gone.end &&
                                 !p.visibility.visible(first, gone.begin)),
      name, "the cache has given up the positions ", gone.begin, " to ", gone.end - 1,
      " of sequence ", b, ", which the query at position ", first,
      " would see: give causal, window and prefix_length that leave them out");
}

/// Queries (batch, n, heads, head_dim) that are the last positions of the sequences of a KvSource.
template <typename Q, typename S, typename Function = problem::NoScoreFunction>
auto cached_attention_problem(std::string_view name, const Q& q, const KvSource<S>& source,
                              const AttentionOptions& options, Workspace::Frame& frame,
                              const Function& function = {}) {
  using T = scalar_of<Q>;
  require_cache_scalars<T, S>();
  checked_size(name, "query", q);
  const auto [batch, rows, heads, head_dim] = attention_shape(q);
  require_that(source.batch == batch, name, "query has batch ", batch, ", the cache has ",
               source.batch, " sequences");
  require_cache_fits(name, source, head_dim, heads, options);
  check_query_lengths(name, options, batch, rows);

  auto p = attention_problem<T, S>(options, heads, source.kv_heads, head_dim,
                                   cached_value_dim(source, head_dim), function);
  p.queries = q.data();
  p.query_strides = strides_of(q);
  p.batch = batch;
  p.lse_head_stride = rows;
  auto* const sequences = frame.take<problem::AttentionSequence>(batch);
  for (Index b = 0; b < batch; ++b) {
    const Index queries = options.query_lengths.empty() ? rows : options.query_lengths[b];
    sequences[b] = aligned_sequence(b, rows, heads, queries, source.lengths[b]);
  }
  p.sequences = sequences;
  attach_masks(name, p, options, rows, false, frame);
  p.source = source;
  for (Index b = 0; b < batch; ++b) require_keys_held(name, p, b);
  return p;
}

/// Queries (tokens, heads, head_dim), ragged: rows [q_offsets[b], q_offsets[b + 1]) are the last
/// positions of sequence b of a KvSource.
template <typename Q, typename S, typename Function = problem::NoScoreFunction>
auto ragged_attention_problem(std::string_view name, const Q& q, const KvSource<S>& source,
                              const LengthSpan& q_offsets, const AttentionOptions& options,
                              Workspace::Frame& frame, const Function& function = {}) {
  require_cache_scalars<scalar_of<Q>, S>();
  checked_size(name, "query", q);
  const Index heads = q.dimension(1), head_dim = q.dimension(2), batch = source.batch;
  require_cache_fits(name, source, head_dim, heads, options);
  require_that(options.query_lengths.empty(), name,
               "query_lengths is given, expected none: q_offsets say how long sequences are");
  check_offsets(name, "q_offsets", q_offsets, batch, q.dimension(0));

  auto p = attention_problem<scalar_of<Q>, S>(options, heads, source.kv_heads, head_dim,
                                              cached_value_dim(source, head_dim), function);
  p.queries = q.data();
  p.query_strides = strides_of(q);
  p.batch = batch;
  p.lse_head_stride = q.dimension(0);
  auto* const sequences = frame.take<problem::AttentionSequence>(batch);
  for (Index b = 0; b < batch; ++b) {
    const Index begin = q_offsets[b], queries = q_offsets[b + 1] - begin, keys = source.lengths[b];
    sequences[b] = {begin, queries, queries, b, 0, keys, keys - queries, begin};
  }
  p.sequences = sequences;
  attach_masks(name, p, options, q.dimension(0), true, frame);
  p.source = source;
  for (Index b = 0; b < batch; ++b) require_keys_held(name, p, b);
  return p;
}

/// The output must have the shape of `q` but for its last dimension.
template <typename Output, typename Q>
void require_attention_output(std::string_view name, std::string_view what, const Output& output,
                              const Q& q, Index value_dim) {
  checked_size(name, what, output);
  bool same = output.dimension(rank_of<Q> - 1) == value_dim;
  for (int d = 0; d < rank_of<Q> - 1; ++d)
    same = same && output.dimension(static_cast<std::size_t>(d)) ==
                       q.dimension(static_cast<std::size_t>(d));
  require_that(same, name, what, " has shape ", shape_text(output), ", expected that of query ",
               shape_text(q), " with a last dimension of ", value_dim);
}

/// The shape log_sum_exp has for a query tensor.
template <typename Q>
auto log_sum_exp_shape(const Q& q, bool packed) {
  if constexpr (rank_of<Q> == 4)
    return std::array<Index, 3>{q.dimension(0), q.dimension(2), q.dimension(1)};
  else
    return packed ? std::array<Index, 2>{q.dimension(1), q.dimension(0)}
                  : std::array<Index, 2>{q.dimension(0), q.dimension(1)};
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
