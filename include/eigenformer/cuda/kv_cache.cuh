/// \file
/// CUDA kernels of the KV caches: copies, one read and one write of every element, converted on the
/// way where storage differs. Into dense buffers one thread takes 16 bytes; into pages and out of
/// them a warp takes a row of one head, which are consecutive on both sides, and finds its page
/// once. INT8 reads a new row twice (largest magnitude, then quotients), the second time out of L1.
/// The limit is bandwidth, of which an H200 gave a quarter to 8192 tokens of 8 heads of 128 in
/// bfloat16 (65 us; INT8 111 us); a step of one sequence is a launch and the copy of its arguments.
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

/// Keys or values on their way into a dense buffer; `width` elements stand side by side.
template <typename T, typename Storage>
struct KvBufferRows {
  const T* from;
  Storage* to;
  problem::HeadStrides strides;  // of new rows
  Index width, row;              // row = kv_heads * the width of a head
  Index sequence_stride;         // of the buffer

  template <int N>
  EIGENFORMER_DEVICE void copy(WidthOf<N>, Index token, Index sequence, Index position,
                               Index column) const {
    if (column >= row) return;
    copy_pack<N>(from + token * strides.token + column / width * strides.head + column % width,
                 to + sequence * sequence_stride + position * row + column);
  }
  template <int N>
  bool packs_fit() const {
    return cuda::packs_fit<N>(from, strides.token) && cuda::packs_fit<N>(from, strides.head) &&
           cuda::packs_fit<N>(to, sequence_stride) && width % N == 0;
  }
};

template <typename T, typename Storage>
KvBufferRows<T, Storage> buffer_rows(const T* from, const Storage* to,
                                     const problem::HeadStrides& strides, Index heads, Index width,
                                     Index sequence_stride) {
  const Index row = heads * width;
  if (strides.head == width)  // a row is one piece
    return {from, const_cast<Storage*>(to), {strides.token, row}, row, row, sequence_stride};
  return {from, const_cast<Storage*>(to), strides, width, row, sequence_stride};
}

template <typename T, typename Storage>
struct KvAppendBody {
  KvBufferRows<T, Storage> keys, values;
  const Index* positions;
  Index tokens_each, capacity;

  template <int N>
  EIGENFORMER_DEVICE void operator()(WidthOf<N>, Index token, Index column) const {
    const Index sequence = token / tokens_each, first = positions[sequence],
                place = token % tokens_each;
    if (first < 0 || first >= capacity - place) return;  // whose sum may overflow
    keys.copy(WidthOf<N>{}, token, sequence, first + place, column);
    values.copy(WidthOf<N>{}, token, sequence, first + place, column);
  }
};

template <typename D, typename T, typename Storage>
void execute(const Backend<D>& on, const problem::KvBufferAppend<T, Storage>& p) {
  const KvSource<Storage>& to = p.target;
  const auto keys =
      buffer_rows(p.new_keys, to.keys, p.key_strides, to.kv_heads, to.head_dim, to.sequence_stride);
  const auto values = buffer_rows(p.new_values, to.values, p.value_strides, to.kv_heads,
                                  to.value_width(), to.value_sequence_stride);
  constexpr int width = pack_width<T, Storage>;
  const bool fit = keys.template packs_fit<width>() && values.template packs_fit<width>();
  launch_for_each_pack<width>(
      on, "append_kv_into", p.tokens, (std::max)(keys.row, values.row), fit,
      KvAppendBody<T, Storage>{keys, values, p.positions, p.tokens_each, p.capacity});
}

/// Rows (token, head, keys or values), each by a warp.
template <typename T, typename Storage>
struct KvAppendKernel {
  using C = compute_type<T>;
  static constexpr int kThreads = kKvThreads;
  const T* new_keys;
  const T* new_values;
  problem::HeadStrides key_strides, value_strides;
  Index tokens, tokens_each;
  const Index* offsets;    // (batch + 1) or nullptr
  const Index* positions;  // (batch)
  KvRows<Storage> to;
  problem::KeyRange left_out;

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
    const Index b = sequence_of(token),
                width = values ? to.source.value_width() : to.source.head_dim;
    if (positions[b] < 0) return;  // all lanes of the warp, or none
    const Index first = offsets == nullptr ? b * tokens_each : offsets[b],
                j = positions[b] + token - first;
    if (j >= left_out.begin && j < left_out.end) return;  // the whole warp again
    const problem::HeadStrides& strides = values ? value_strides : key_strides;
    const T* const from =
        (values ? new_values : new_keys) + token * strides.token + h * strides.head;
    Storage* const row = to.row(values, b, h, j);
    if constexpr (std::is_same_v<Storage, std::int8_t>) {
      const float own = int8_scale(reduce_warp(
          block, magnitude<C, kInt8WarpWidth>(from, width, block.lane(), kWarp), LargerOrNan{}));
      const float* const channels = values ? nullptr : to.source.key_channel_scales;
      const bool bad = own != own;
      if (block.lane() == 0) *to.scale(values, b, h, j) = channels == nullptr || bad ? own : 1.0f;
      if (channels == nullptr)
        quantize_line<C, kInt8WarpWidth>(from, row, width, own, block.lane(), kWarp);
      else
        quantize_line<C, kInt8WarpWidth>(from, row, width, channels + h * width, bad, block.lane(),
                                         kWarp);
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
  launch_warps(
      on, name, 2 * p.tokens * p.target.kv_heads,
      KvAppendKernel<T, Storage>{p.new_keys, p.new_values, p.key_strides, p.value_strides, p.tokens,
                                 p.tokens_each, offsets, positions, to, p.left_out});
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
    const Index width = values ? s.value_width() : s.head_dim;
    for_each_warp(block, s.batch * length * s.kv_heads, [&](Index at) {
      const Index h = at % s.kv_heads, j = at / s.kv_heads % length, b = at / s.kv_heads / length;
      const Storage* const row = from.row(values, b, h, j);
      T* const to = output + at * width;
      if constexpr (std::is_same_v<Storage, std::int8_t>) {
        const C scale = static_cast<C>(*from.scale(values, b, h, j));
        const float* const channels =
            values || s.key_channel_scales == nullptr ? nullptr : s.key_channel_scales + h * width;
        for_each_pack_of_line(
            WidthOf<kInt8WarpWidth>{}, block.lane(), kWarp, width,
            [&]<int N>(WidthOf<N>, Index d) {
              auto numbers = load_pack<C, N>(row + d);
              for (int i = 0; i < N; ++i)
                numbers[i] *= channels == nullptr ? scale : scale * static_cast<C>(channels[d + i]);
              store_pack<N>(numbers, to + d);
            },
            row, static_cast<const T*>(to));
      } else {
        copy_line(row, to, width, block.lane());
      }
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
