/// \file
/// CUDA kernels of the KV caches: copies, one read and one write of every element, converted on the
/// way where storage differs. Into dense buffers one thread takes 16 bytes; into pages and out of
/// them a warp takes a row of head_dim elements of one head, which are consecutive on both sides,
/// and finds its page once. INT8 reads a new row twice (largest magnitude, then quotients), the
/// second time out of L1. No flops to speak of: the limit is bandwidth, of which rows of 64 and
/// more elements, a thousand of them at least, should see more than half; a step of one sequence is
/// a launch and the copy of its arguments.
#pragma once

#include "../problem/kv_cache.h"
#include "int8.cuh"
#include "kv_rows.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

inline constexpr int kKvThreads = 128;  // of a block whose warps take a row each

/// A line of `from` as elements of `to`, this lane's.
template <typename From, typename To>
EIGENFORMER_DEVICE void copy_line(const From* from, To* to, Index count, Index lane) {
  for_each_pack_of_line(
      lane, kWarp, count, [&]<int N>(WidthOf<N>, Index d) { copy_pack<N>(from + d, to + d); }, from,
      static_cast<const To*>(to));
}

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

  template <int N>
  EIGENFORMER_DEVICE void operator()(WidthOf<N>, Index token, Index column) const {
    const Index sequence = token / tokens_each;
    const Index first = positions[sequence], position = first + token % tokens_each;
    if (first < 0 || position >= capacity) return;
    copy_pack<N>(new_keys + token * new_key_stride + column,
                 keys + sequence * key_stride + position * row + column);
    copy_pack<N>(new_values + token * new_value_stride + column,
                 values + sequence * value_stride + position * row + column);
  }
};

template <typename D, typename T, typename Storage>
void execute(const Backend<D>& on, const problem::KvBufferAppend<T, Storage>& p) {
  const KvSource<Storage>& to = p.target;
  const Index row = to.kv_heads * to.head_dim;
  constexpr int width = pack_width<T, Storage>;
  const bool fit = packs_fit<width>(p.new_keys, p.key_stride) && row % width == 0 &&
                   packs_fit<width>(p.new_values, p.value_stride) &&
                   packs_fit<width>(to.keys, to.sequence_stride) &&
                   packs_fit<width>(to.values, to.value_sequence_stride);
  launch_for_each_pack<width>(
      on, "append_kv_into", p.tokens, row, fit,
      KvAppendBody<T, Storage>{p.new_keys, p.new_values, const_cast<Storage*>(to.keys),
                               const_cast<Storage*>(to.values), p.positions, p.key_stride,
                               p.value_stride, p.tokens_each, row, p.capacity, to.sequence_stride,
                               to.value_sequence_stride});
}

/// Rows (token, head, keys or values), each by a warp.
template <typename T, typename Storage>
struct KvAppendKernel {
  using C = compute_type<T>;
  static constexpr int kThreads = kKvThreads;
  const T* new_keys;
  const T* new_values;
  Index key_stride, value_stride, tokens, tokens_each;
  const Index* offsets;    // (batch + 1) or nullptr
  const Index* positions;  // (batch)
  KvRows<Storage> to;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const Index heads = to.source.kv_heads;
    for_each_warp(block, 2 * tokens * heads,
                  [&](Index at) { append(block, at / (2 * heads), at / 2 % heads, at % 2 == 1); });
  }

 private:
  EIGENFORMER_DEVICE Index sequence_of(Index token) const {
    if (offsets == nullptr) return token / tokens_each;
    Index first = 0, last = to.source.batch;  // the last that begins at the token or before
    while (last - first > 1) {
      const Index middle = (first + last) / 2;
      (offsets[middle] <= token ? first : last) = middle;
    }
    return first;
  }

  template <typename Block>
  EIGENFORMER_DEVICE void append(Block& block, Index token, Index h, bool values) const {
    const Index b = sequence_of(token), width = to.source.head_dim;
    if (positions[b] < 0) return;  // all lanes of the warp, or none
    const Index first = offsets == nullptr ? b * tokens_each : offsets[b],
                j = positions[b] + token - first;
    const T* const from =
        (values ? new_values + token * value_stride : new_keys + token * key_stride) + h * width;
    Storage* const row = to.row(values, b, h, j);
    if constexpr (std::is_same_v<Storage, std::int8_t>) {
      const float scale = int8_scale(
          reduce_warp(block, magnitude<C>(from, width, block.lane(), kWarp), LargerOrNan{}));
      if (block.lane() == 0) *to.scale(values, b, h, j) = scale;
      quantize_line<C>(from, row, width, scale, block.lane(), kWarp);
    } else {
      copy_line(from, row, width, block.lane());
    }
  }
};

template <typename D, typename T, typename Storage>
void execute(const Backend<D>& on, const problem::KvAppend<T, Storage>& p) {
  constexpr auto name = "update_kv_cache";
  const auto batch = static_cast<std::size_t>(p.target.batch);
  if (p.tokens == 0 || p.target.kv_heads == 0 || batch == 0) return;
  const auto touched = [&](Index b) {
    const Index added = p.offsets == nullptr ? p.tokens_each : p.offsets[b + 1] - p.offsets[b];
    return p.positions[b] < 0 ? Positions{0, 0} : Positions{p.positions[b], p.positions[b] + added};
  };
  const auto [to, positions, offsets] =
      stage_rows(on, name, p.target, touched, std::span<const Index>(p.positions, batch),
                 std::span<const Index>(p.offsets, p.offsets == nullptr ? 0 : batch + 1));
  launch_warps(on, name, 2 * p.tokens * p.target.kv_heads,
               KvAppendKernel<T, Storage>{p.new_keys, p.new_values, p.key_stride, p.value_stride,
                                          p.tokens, p.tokens_each, offsets, positions, to});
}

/// Rows (sequence, position, head), each by a warp.
template <typename T, typename Storage>
struct KvReadKernel {
  using C = compute_type<T>;
  static constexpr int kThreads = kKvThreads;
  KvRows<Storage> from;
  Index length;
  bool values;
  T* output;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const KvSource<Storage>& s = from.source;
    for_each_warp(block, s.batch * length * s.kv_heads, [&](Index at) {
      const Index h = at % s.kv_heads, j = at / s.kv_heads % length, b = at / s.kv_heads / length;
      const Storage* const row = from.row(values, b, h, j);
      T* const to = output + at * s.head_dim;
      C scale = 1;
      if constexpr (std::is_same_v<Storage, std::int8_t>)
        scale = static_cast<C>(*from.scale(values, b, h, j));
      if constexpr (std::is_same_v<Storage, std::int8_t>)
        for_each_pack_of_line(
            block.lane(), kWarp, s.head_dim,
            [&]<int N>(WidthOf<N>, Index d) {
              auto numbers = load_pack<C, N>(row + d);
              for (int i = 0; i < N; ++i) numbers[i] *= scale;
              store_pack<N>(numbers, to + d);
            },
            row, static_cast<const T*>(to));
      else
        copy_line(row, to, s.head_dim, block.lane());
    });
  }
};

template <typename D, typename T, typename Storage>
void execute(const Backend<D>& on, const problem::KvRead<T, Storage>& p) {
  const KvSource<Storage>& s = p.source;
  const Index rows = s.batch * p.length * s.kv_heads;
  if (rows == 0) return;
  const auto [from] = stage_rows(on, "KvCache", s, [&](Index) { return Positions{0, p.length}; });
  launch_warps(on, "KvCache", rows, KvReadKernel<T, Storage>{from, p.length, p.values, p.output});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
