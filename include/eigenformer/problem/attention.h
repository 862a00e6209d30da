/// \file
/// What attention asks for, forward and backward.
#pragma once

#include "../core/rows.h"
#include "kv_source.h"
#include "visibility.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

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

/// A checked request: pointers and sizes only. TQ is the scalar of queries and output, TKV the
/// stored one of keys and values.
template <typename TQ, typename TKV>
struct Attention {
  using Compute = compute_type<TQ>;
  const TQ* queries = nullptr;  // (rows, heads, head_dim)
  TQ* output = nullptr;         // (rows, heads, value_dim)
  // row (sequence, head) starts at lse_begin + head * lse_head_stride; nullptr where not wanted
  Compute* log_sum_exp = nullptr;
  Index lse_head_stride = 0;
  Index batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  KvSource<TKV> source;
  const AttentionSequence* sequences = nullptr;  // (batch)
  Visibility visibility;
  Compute scale = 1, softcap = 0;       // softcap 0: none
  const float* alibi_slopes = nullptr;  // (heads) or nullptr
  const float* sinks = nullptr;         // (heads) or nullptr

  Index group() const { return kv_heads > 0 ? heads / kv_heads : 0; }
};

/// `forward` carries queries, keys, values and options; its output and log_sum_exp are not used.
template <typename T>
struct AttentionBackward {
  using Compute = compute_type<T>;
  Attention<T, T> forward;
  const T* grad_output = nullptr;  // (rows, heads, value_dim)
  T* grad_queries = nullptr;       // (rows, heads, head_dim)
  T* grad_keys = nullptr;          // (key rows, kv_heads, head_dim), laid out like the keys
  T* grad_values = nullptr;        // (key rows, kv_heads, value_dim), laid out like the values
  Index key_rows = 0;              // rows of a dense sequence, padding included; 0 where packed
  float* grad_sinks = nullptr;     // (heads) or nullptr
};

}  // namespace problem
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
