/// \file
/// What attention asks for, forward and backward.
#pragma once

#include "../core/heads_view.h"
#include "../core/rows.h"
#include "kv_source.h"
#include "score_rule.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// One sequence of a request. Query i < query_rows stands at position first_position + i; rows from
/// query_rows on are padding.
struct AttentionSequence {
  Index query_begin;     // its first row in queries and output
  Index query_rows;      // rows that are queries
  Index tensor_rows;     // rows in the tensors, padding included
  Index key_sequence;    // its index in the KvSource
  Index key_begin;       // its first key there
  Index key_length;      // its keys
  Index first_position;  // may be negative: more queries than keys
  Index lse_begin;       // offset of head 0, row 0 in log_sum_exp
};

/// A checked request, pointers and sizes only: a rule of scores, and the queries and keys it is
/// for. TQ is the scalar of queries and output, TKV the stored one of keys and values, Function
/// that of scores (attention.h).
template <typename TQ, typename TKV, typename Function = NoScoreFunction>
struct Attention : ScoreRule<compute_type<TQ>> {
  static constexpr bool kUsesTiles =
      std::is_same_v<TKV, std::int8_t> ||
      (std::is_same_v<TQ, bfloat16> && std::is_same_v<TKV, bfloat16>);
  using Compute = compute_type<TQ>;
  Function function;            // first, so that {{}, function} has all other values by default
  const TQ* queries = nullptr;  // (rows, heads, head_dim)
  HeadStrides query_strides = {};
  TQ* output = nullptr;  // (rows, heads, value_dim)
  // row (sequence, head) starts at lse_begin + head * lse_head_stride; nullptr where not wanted
  Compute* log_sum_exp = nullptr;
  Index lse_head_stride = 0;
  Index batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  KvSource<TKV> source = {};
  const AttentionSequence* sequences = nullptr;  // (batch)
  const float* sinks = nullptr;                  // (heads) or nullptr

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE const TQ* query(Index row, Index head) const {
    return queries + row * query_strides.token + head * query_strides.head;
  }
  EIGENFORMER_INLINE Index group() const { return kv_heads > 0 ? heads / kv_heads : 0; }
};

/// `forward` carries queries, keys, values and options; its output and log_sum_exp are not used.
template <typename T>
struct AttentionBackward {
  static constexpr bool kUsesTiles = std::is_same_v<T, bfloat16>;
  using Compute = compute_type<T>;
  Attention<T, T> forward;
  const T* grad_output;                       // (rows, heads, value_dim)
  T *grad_queries, *grad_keys, *grad_values;  // of the shapes of queries, keys and values
  HeadStrides grad_query_strides, grad_key_strides, grad_value_strides;
  Index key_rows;     // rows of a dense sequence, padding included; 0 where packed
  float* grad_sinks;  // (heads) or nullptr
  // laid out like forward.log_sum_exp; nullptr where there is none
  const Compute* grad_log_sum_exp;

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE T* query_gradient(Index row, Index head) const {
    return grad_queries + row * grad_query_strides.token + head * grad_query_strides.head;
  }
  /// Of key j of a sequence.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE T* key_gradient(const AttentionSequence& s,
                                                             Index kv_head, Index j) const {
    return grad_keys + key_row(s, j) * grad_key_strides.token + kv_head * grad_key_strides.head;
  }
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE T* value_gradient(const AttentionSequence& s,
                                                               Index kv_head, Index j) const {
    return grad_values + key_row(s, j) * grad_value_strides.token +
           kv_head * grad_value_strides.head;
  }
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE Index key_row(const AttentionSequence& s,
                                                           Index j) const {
    return s.key_sequence * key_rows + s.key_begin + j;
  }
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
