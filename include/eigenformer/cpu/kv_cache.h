/// \file
/// CPU kernels of the KV caches: append rows to pages or to a dense buffer, and read them back.
/// Both are copies, one read and one write of every new element, converted on the way where storage
/// differs; INT8 reads a row twice (largest magnitude, then quotients), the second time out of L1.
/// No row depends on another: results do not depend on threads or on the batch.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "../core/kv_source.h"
#include "../core/rows.h"
#include "../problem/kv_cache.h"
#include "backend.h"
#include "simd/simd.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

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

template <typename D, typename Isa, typename T>
Index execute(const Backend<D, Isa>&, const problem::FirstNotStorable<T>& p) {
  if (all_quantizable<Isa>(p.numbers, p.count)) return -1;
  Index at = 0;
  while (all_quantizable<Isa>(p.numbers + at, 1)) ++at;
  return at;
}

template <typename Isa, typename T, typename Storage>
void append_kv_row(const problem::KvAppend<T, Storage>& p, Index token, Index b, Index h, Index j) {
  const Index d = p.target.head_dim, at = (token * p.target.kv_heads + h) * d;
  if constexpr (std::is_same_v<Storage, std::int8_t>) {
    *p.key_scale_slot(b, h, j) = quantize_row<Isa>(p.new_keys + at, p.key_slot(b, h, j), d);
    *p.value_scale_slot(b, h, j) = quantize_row<Isa>(p.new_values + at, p.value_slot(b, h, j), d);
  } else {
    copy_row<Isa>(p.new_keys + at, p.key_slot(b, h, j), d);
    copy_row<Isa>(p.new_values + at, p.value_slot(b, h, j), d);
  }
}

template <typename D, typename Isa, typename T, typename Storage>
void execute(const Backend<D, Isa>& on, const problem::KvAppend<T, Storage>& p) {
  parallel_for(on, p.tokens, Cost{p.target.kv_heads * p.target.head_dim, kMoveCycles},
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

template <typename D, typename Isa, typename T, typename Storage>
void execute(const Backend<D, Isa>& on, const problem::KvRead<T, Storage>& p) {
  const KvSource<Storage>& s = p.source;
  parallel_for(on, s.batch * p.length, Cost{s.kv_heads * s.head_dim, kMoveCycles},
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
