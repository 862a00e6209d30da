/// \file
/// CPU kernels of the KV caches: append rows to pages or to a dense buffer, and read them back.
/// Both are copies, one read and one write of every new element, converted on the way where storage
/// differs; INT8 reads a row twice (largest magnitude, then quotients), the second time out of L1.
/// No row depends on another: results do not depend on threads or on the batch.
#pragma once

#include <cmath>

#include "../core/rows.h"
#include "../problem/kv_cache.h"
#include "../problem/kv_source.h"
#include "backend.h"
#include "vector/copy.h"
#include "vector/quantize_line.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Returns the scale. x is finite.
template <typename Isa, typename T>
float quantize_row(const T* x, std::int8_t* q, Index count) {
  const float scale = int8_scale(magnitude<Isa>(x, count).largest);
  quantize_line<Isa>(x, count, scale, q);
  return scale;
}

/// The same by the scale of each channel, with a scale of 1 for the row.
template <typename Isa, typename T>
float quantize_by_channel(const T* x, const float* scales, std::int8_t* q, Index count) {
  using V = simd::Vec<compute_type<T>, Isa>;
  for_each_vector<V>(0, count, [&](Index at, auto part) {
    const V scale = load<V>(scales + at, part);
    store(int8_values([&](V w) { return w / scale; }, load<V>(x + at, part)), q + at, part);
  });
  return 1;
}

/// The keys or the values of one token, head after head: its page is looked up once.
template <typename T, typename Storage>
struct KvToken {
  const T* from;
  Index from_step;  // to the next head
  Storage* to;
  Index to_step;
  float* scale;  // INT8 only
  Index scale_step, width;
  const float* channels;  // (heads, width) scales of INT8 keys by channel, or nullptr
};

/// Rows of neighbouring heads lie a page's rows apart, too far for the hardware to foresee: they
/// are asked for two heads ahead. A token of 8 sequences to 32 layers then takes 156 us instead of
/// 170 (float) and 86 instead of 98 (bfloat16) on Zen 3.
template <typename Isa, typename T, typename Storage>
void append_kv_token(const KvToken<T, Storage>& t, Index heads) {
  constexpr Index size = sizeof(Storage);
  for (Index h = 0; h < heads; ++h) {
    const T* const from = t.from + h * t.from_step;
    Storage* const to = t.to + h * t.to_step;
    if (h + 2 < heads)
      for (Index at = 0; at < t.width * size; at += 64)
        simd::prefetch_after<3>(to, 2 * t.to_step * size + at);
    if constexpr (std::is_same_v<Storage, std::int8_t>)
      t.scale[h * t.scale_step] =
          t.channels == nullptr
              ? quantize_row<Isa>(from, to, t.width)
              : quantize_by_channel<Isa>(from, t.channels + h * t.width, to, t.width);
    else
      copy_line<Isa>(from, to, t.width);
  }
}

template <typename Isa, typename T, typename Storage>
void append_kv_token(const problem::KvAppend<T, Storage>& p, Index token, Index b, Index j) {
  const KvSource<Storage>& to = p.target;
  const bool paged = to.tables != nullptr;
  const Index width = to.head_dim, value_width = to.value_width();
  float *key_scale = nullptr, *value_scale = nullptr;
  if constexpr (std::is_same_v<Storage, std::int8_t>) {
    key_scale = p.key_scale_slot(b, 0, j);
    value_scale = p.value_scale_slot(b, 0, j);
  }
  append_kv_token<Isa>(
      KvToken<T, Storage>{p.new_keys + token * p.key_strides.token, p.key_strides.head,
                          p.key_slot(b, 0, j), paged ? to.page_size * width : to.head_stride,
                          key_scale, to.page_size, width, to.key_channel_scales},
      to.kv_heads);
  append_kv_token<Isa>(
      KvToken<T, Storage>{p.new_values + token * p.value_strides.token, p.value_strides.head,
                          p.value_slot(b, 0, j),
                          paged ? to.page_size * value_width : to.value_head_stride, value_scale,
                          to.page_size, value_width, nullptr},
      to.kv_heads);
}

template <typename D, typename Isa, typename T, typename Storage>
void execute(const Backend<D, Isa>& on, const problem::KvAppend<T, Storage>& p) {
  if (p.target.kv_heads == 0) return;
  const Index row = p.target.kv_heads * (p.target.head_dim + p.target.value_width()) / 2;
  parallel_for(on, p.tokens, Cost{row, kMoveCycles}, [&](Index first, Index last, int) {
    for (Index token = first; token < last; ++token) {
      const Index b = p.sequence_of(token);
      if (p.positions[b] < 0) continue;
      const Index j = p.positions[b] + token - p.first_token(b);
      if (j < p.left_out.begin || j >= p.left_out.end) append_kv_token<Isa>(p, token, b, j);
    }
  });
}

template <typename Isa, typename T>
void read_int8_row(const problem::KvRead<T, std::int8_t>& p, Index b, Index h, Index j,
                   const std::int8_t* stored, T* output) {
  const KvSource<std::int8_t>& s = p.source;
  if (p.values)
    return dequantize_line<Isa>(stored, s.value_width(), s.value_scale(b, h, j), output);
  const float scale = s.key_scale(b, h, j);  // NaN: a row that a GPU could not quantize
  if (s.key_channel_scales == nullptr || std::isnan(scale))
    return dequantize_line<Isa>(stored, s.head_dim, scale, output);
  multiply_line<simd::Vec<compute_type<T>, Isa>>(stored, s.key_channel_scales + h * s.head_dim,
                                                 output, s.head_dim);
}

template <typename D, typename Isa, typename T, typename Storage>
void execute(const Backend<D, Isa>& on, const problem::KvRead<T, Storage>& p) {
  const KvSource<Storage>& s = p.source;
  const Index width = p.values ? s.value_width() : s.head_dim;
  parallel_for(on, s.batch * p.length, Cost{s.kv_heads * width, kMoveCycles},
               [&](Index first, Index last, int) {
                 for (Index row = first; row < last; ++row) {
                   const Index b = row / p.length, j = row % p.length;
                   for (Index h = 0; h < s.kv_heads; ++h) {
                     T* output = p.output + (row * s.kv_heads + h) * width;
                     const Storage* stored = p.values ? s.value_row(b, h, j) : s.key_row(b, h, j);
                     if constexpr (std::is_same_v<Storage, std::int8_t>)
                       read_int8_row<Isa>(p, b, h, j, stored, output);
                     else
                       copy_line<Isa>(stored, output, width);
                   }
                 }
               });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
