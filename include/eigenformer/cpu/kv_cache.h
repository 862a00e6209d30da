/// \file
/// CPU kernels of the KV caches: append rows to pages or to a dense buffer, and read them back.
/// Both are copies, one read and one write of every new element, converted on the way where storage
/// differs; INT8 reads a row twice (largest magnitude, then quotients), the second time out of L1.
/// No row depends on another: results do not depend on threads or on the batch.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "../core/device.h"
#include "../core/kv_source.h"
#include "../core/rows.h"
#include "simd/simd.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// A checked request to append: pointers and sizes only. `target` says where rows lie; its memory
/// is the cache's, and writable.
template <typename T, typename Storage>
struct KvAppendProblem {
  const T* new_keys;     // (tokens, kv_heads, head_dim), sequence after sequence
  const T* new_values;   // the same
  Index tokens;          // of all sequences
  Index tokens_each;     // of one sequence, where offsets is nullptr
  const Index* offsets;  // (batch + 1) first token of each sequence, or nullptr
  const Index*
      positions;  // (batch) where a sequence's first token goes; negative leaves the sequence out
  // positions a sequence of the target has room for. The host has checked them for the CPU; on a
  // GPU
  Index capacity;
  // `positions` is device memory, and what lies past the capacity is left out.
  KvSource<Storage> target;

  Index sequence_of(Index token) const {
    if (offsets == nullptr) return token / tokens_each;
    return std::upper_bound(offsets, offsets + target.batch + 1, token) - offsets - 1;
  }
  Index first_token(Index b) const { return offsets == nullptr ? b * tokens_each : offsets[b]; }

  // KvSource is what readers get, so its pointers are const; whoever appends owns the memory behind
  // them.
  Storage* key_slot(Index b, Index h, Index j) const {
    return const_cast<Storage*>(target.key_row(b, h, j));
  }
  Storage* value_slot(Index b, Index h, Index j) const {
    return const_cast<Storage*>(target.value_row(b, h, j));
  }
  float* key_scale_slot(Index b, Index h, Index j) const {
    return scale_slot(b, h, j, target.key_scale_offset);
  }
  float* value_scale_slot(Index b, Index h, Index j) const {
    return scale_slot(b, h, j, target.value_scale_offset);
  }

 private:
  float* scale_slot(Index b, Index h, Index j, std::size_t offset) const {
    const std::byte* page =
        target.pages[target.tables[b][j / target.page_size]] + target.layer_offset + offset;
    return const_cast<float*>(reinterpret_cast<const float*>(page)) + h * target.page_size +
           j % target.page_size;
  }
};

/// A checked request to read the first `length` positions of every sequence of `source` into
/// (batch, length, kv_heads, head_dim).
template <typename T, typename Storage>
struct KvReadProblem {
  KvSource<Storage> source;
  Index length;
  bool values;  // else keys
  T* output;
};

namespace cpu {

/// Rows of a task: at least 32k elements (128 KiB of float): less does not pay for waking a thread.
inline Index kv_grain(Index kv_heads, Index head_dim) {
  return 1 + 32768 / (kv_heads * head_dim + 1);
}

template <typename Isa, typename From, typename To>
void copy_row(const From* from, To* to, Index count) {
  if constexpr (std::is_same_v<From, To>) {
    if (count > 0)
      std::memcpy(static_cast<void*>(to), from, static_cast<std::size_t>(count) * sizeof(To));
  } else {
    using V = simd::Vec<common_compute_type<From, To>, Isa>;
    Index i = 0;
    for (; i + V::lanes <= count; i += V::lanes) V::load(from + i).store(to + i);
    if (i < count)
      V::load_partial(from + i, static_cast<int>(count - i))
          .store_partial(to + i, static_cast<int>(count - i));
  }
}

/// q = round_half_to_even(x / scale) in [-127, 127]; returns scale = max|x| / 127, 1 where that is
/// zero. x is finite.
template <typename Isa, typename T>
float quantize_row(const T* x, std::int8_t* q, Index count) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  const auto for_each_part = [count](auto&& body) {
    for (Index i = 0; i < count; i += V::lanes)
      body(i, static_cast<int>(std::min<Index>(V::lanes, count - i)));
  };
  V largest = V::zero();
  for_each_part(
      [&](Index i, int n) { largest = maximum(largest, abs(V::load_partial(x + i, n))); });
  float scale = static_cast<float>(reduce_max(largest) / C(127));
  if (scale == 0.0f) scale = 1.0f;
  const V divisor = V::set1(static_cast<C>(scale)), high = V::set1(C(127)), low = V::set1(C(-127));
  for_each_part([&](Index i, int n) {
    const V quotient = round(V::load_partial(x + i, n) / divisor);
    maximum(low, minimum(high, quotient)).store_partial(q + i, n);
  });
  return scale;
}

/// Every magnitude is at most the largest float: no NaN, no infinity, and a scale that float can
/// hold.
template <typename Isa, typename T>
bool all_quantizable(const T* x, Index count) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  const V limit = V::set1(static_cast<C>((std::numeric_limits<float>::max)()));
  auto good = less_equal(V::zero(), limit);
  Index i = 0;
  for (; i + V::lanes <= count; i += V::lanes) good = good & less_equal(abs(V::load(x + i)), limit);
  if (i < count)
    good = good & less_equal(abs(V::load_partial(x + i, static_cast<int>(count - i))), limit);
  return good.bits() == (1u << V::lanes) - 1u;
}

template <typename Isa, typename T, typename Storage>
void append_kv_row(const KvAppendProblem<T, Storage>& p, Index token, Index b, Index h, Index j) {
  const Index d = p.target.head_dim, at = (token * p.target.kv_heads + h) * d;
  if constexpr (std::is_same_v<Storage, std::int8_t>) {
    *p.key_scale_slot(b, h, j) = quantize_row<Isa>(p.new_keys + at, p.key_slot(b, h, j), d);
    *p.value_scale_slot(b, h, j) = quantize_row<Isa>(p.new_values + at, p.value_slot(b, h, j), d);
  } else {
    copy_row<Isa>(p.new_keys + at, p.key_slot(b, h, j), d);
    copy_row<Isa>(p.new_values + at, p.value_slot(b, h, j), d);
  }
}

template <typename Isa, CpuDevice D, typename T, typename Storage>
void append_kv(Isa, const D& device, const KvAppendProblem<T, Storage>& p) {
  parallel_for(device, p.tokens, kv_grain(p.target.kv_heads, p.target.head_dim),
               [&](Index first, Index last, int) {
                 for (Index token = first; token < last; ++token) {
                   const Index b = p.sequence_of(token);
                   if (p.positions[b] < 0) continue;
                   const Index j = p.positions[b] + token - p.first_token(b);
                   for (Index h = 0; h < p.target.kv_heads; ++h)
                     append_kv_row<Isa>(p, token, b, h, j);
                 }
               });
}

template <typename Isa, typename T>
void dequantize_row(const std::int8_t* q, float scale, T* x, Index count) {
  using V = simd::Vec<compute_type<T>, Isa>;
  const V factor = V::set1(static_cast<compute_type<T>>(scale));
  for (Index i = 0; i < count; i += V::lanes) {
    const int n = static_cast<int>(std::min<Index>(V::lanes, count - i));
    (V::load_partial(q + i, n) * factor).store_partial(x + i, n);
  }
}

template <typename Isa, CpuDevice D, typename T, typename Storage>
void read_kv(Isa, const D& device, const KvReadProblem<T, Storage>& p) {
  const KvSource<Storage>& s = p.source;
  parallel_for(device, s.batch * p.length, kv_grain(s.kv_heads, s.head_dim),
               [&](Index first, Index last, int) {
                 for (Index row = first; row < last; ++row) {
                   const Index b = row / p.length, j = row % p.length;
                   for (Index h = 0; h < s.kv_heads; ++h) {
                     T* output = p.output + (row * s.kv_heads + h) * s.head_dim;
                     const Storage* stored = p.values ? s.value_row(b, h, j) : s.key_row(b, h, j);
                     if constexpr (std::is_same_v<Storage, std::int8_t>)
                       dequantize_row<Isa>(stored,
                                           p.values ? s.value_scale(b, h, j) : s.key_scale(b, h, j),
                                           output, s.head_dim);
                     else
                       copy_row<Isa>(stored, output, s.head_dim);
                   }
                 }
               });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
