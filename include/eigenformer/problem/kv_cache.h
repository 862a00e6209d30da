/// \file
/// What a KV cache asks for: rows to append, rows to read.
#pragma once

#include <algorithm>
#include <cstddef>

#include "../core/heads_view.h"
#include "../core/rows.h"
#include "kv_source.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// A checked request to append: pointers and sizes only. `target` says where rows lie; its memory
/// is the cache's, and writable.
template <typename T, typename Storage>
struct KvAppend {
  const T* new_keys;    // (tokens, kv_heads, head_dim), sequence after sequence
  const T* new_values;  // (tokens, kv_heads, value_dim)
  HeadStrides key_strides, value_strides;
  Index tokens;          // of all sequences
  Index tokens_each;     // of one sequence, where offsets is nullptr
  const Index* offsets;  // (batch + 1) first token of each sequence, or nullptr
  // (batch) where a sequence's first token goes; negative leaves the sequence out
  const Index* positions;
  Index capacity;  // positions that a sequence of the target has room for
  KvSource<Storage> target;
  KeyRange left_out = {0, 0};  // positions that are not written

  EIGENFORMER_INLINE Index sequence_of(Index token) const {
    if (offsets == nullptr) return token / tokens_each;
    return std::upper_bound(offsets, offsets + target.batch + 1, token) - offsets - 1;
  }
  EIGENFORMER_INLINE Index first_token(Index b) const {
    return offsets == nullptr ? b * tokens_each : offsets[b];
  }

  // KvSource is what readers get, so its pointers are const; whoever appends owns the memory behind
  // them.
  EIGENFORMER_INLINE Storage* key_slot(Index b, Index h, Index j) const {
    return const_cast<Storage*>(target.key_row(b, h, j));
  }
  EIGENFORMER_INLINE Storage* value_slot(Index b, Index h, Index j) const {
    return const_cast<Storage*>(target.value_row(b, h, j));
  }
  EIGENFORMER_INLINE float* key_scale_slot(Index b, Index h, Index j) const {
    return const_cast<float*>(target.key_scale_row(b, h, j));
  }
  EIGENFORMER_INLINE float* value_scale_slot(Index b, Index h, Index j) const {
    return const_cast<float*>(target.value_scale_row(b, h, j));
  }
};

/// Into the caller's own dense buffers. `positions` is memory of the backend: for the CPU the host
/// has checked them, on a GPU what lies past the capacity is left out.
template <typename T, typename Storage>
struct KvBufferAppend : KvAppend<T, Storage> {};

/// A checked request to read the first `length` positions of every sequence of `source` into
/// (batch, length, kv_heads, head_dim), of values value_dim.
template <typename T, typename Storage>
struct KvRead {
  KvSource<Storage> source;
  Index length;
  bool values;  // else keys
  T* output;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
