/// \file
/// CUDA kernel of the append to dense buffers: one thread per element, one coalesced read and one
/// write of every new key and value.
#pragma once

#include "../problem/kv_cache.h"
#include "launch.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T, typename Storage>
struct KvAppendBody {
  const T* new_keys;
  const T* new_values;
  Storage* keys;
  Storage* values;
  const Index* positions;
  Index new_key_stride, new_value_stride;  // from token to token
  // row = kv_heads * head_dim, strides from sequence to sequence
  Index tokens_each, row, capacity, key_stride, value_stride;

  EIGENFORMER_DEVICE void operator()(Index at) const {
    const Index token = at / row, sequence = token / tokens_each;
    const Index first = positions[sequence], position = first + token % tokens_each;
    if (first < 0 || position >= capacity) return;
    const Index column = at % row;
    keys[sequence * key_stride + position * row + column] =
        static_cast<Storage>(new_keys[token * new_key_stride + column]);
    values[sequence * value_stride + position * row + column] =
        static_cast<Storage>(new_values[token * new_value_stride + column]);
  }
};

template <typename D, typename T, typename Storage>
void execute(const Backend<D>& on, const problem::KvBufferAppend<T, Storage>& p) {
  const KvSource<Storage>& to = p.target;
  const Index row = to.kv_heads * to.head_dim;
  launch_for_each(
      on, "append_kv_into", p.tokens * row,
      KvAppendBody<T, Storage>{p.new_keys, p.new_values, const_cast<Storage*>(to.keys),
                               const_cast<Storage*>(to.values), p.positions, p.key_stride,
                               p.value_stride, p.tokens_each, row, p.capacity, to.sequence_stride,
                               to.value_sequence_stride});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
