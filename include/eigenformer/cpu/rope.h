/// \file
/// CPU kernel of rotary embedding: one pass over x, two fused multiply-adds per element. Cosines
/// and sines come from rows of a table, one row per token, shared by its heads; without a caller's
/// table each thread keeps the row of the token it is at. A table row is [cosines | sines]:
///   half_split   rotary_dim / 2 each: y[i] = x[i] c[i] - x[i + half] s[i],  y[i + half] = x[i + half] c[i] + x[i] s[i]
///   interleaved  rotary_dim each, every cosine twice and every sine as (-s, s): y = x * c + swap_pairs(x) * s
/// Both are the same products and sums in the same order.
#pragma once

#include <cstring>

#include "../core/rows.h"
#include "../problem/rope.h"
#include "backend.h"
#include "vector/copy.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename V, RopeLayout Layout, typename Y, typename X>
void rope_head(const typename V::scalar* row, V sign, Index rotary_dim, const X* x, Y* y) {
  if constexpr (Layout == RopeLayout::half_split) {
    const Index half = rotary_dim / 2;
    for_each_vector<V>(0, half, [&](Index at, auto part) {
      const V c = load<V>(row + at, part), s = sign * load<V>(row + half + at, part);
      const V a = load<V>(x + at, part), b = load<V>(x + half + at, part);
      store(fma(a, c, b * (V::zero() - s)), y + at, part);
      store(fma(b, c, a * s), y + half + at, part);
    });
  } else {
    for_each_vector<V>(0, rotary_dim, [&](Index at, auto part) {
      const V c = load<V>(row + at, part), s = sign * load<V>(row + rotary_dim + at, part);
      const V a = load<V>(x + at, part);
      store(fma(a, c, swap_pairs(a) * s), y + at, part);
    });
  }
}

template <typename V, RopeLayout Layout, typename Y, typename X>
void rope_token(const problem::Rope<Y, X>& p, Index token, const typename V::scalar* row) {
  const V sign = V::set1(p.inverse ? -1 : 1);
  const Index rotary_dim = p.angles.rotary_dim;
  for (Index head = 0; head < p.heads; ++head) {
    const X* x = p.x + token * p.x_strides.token + head * p.x_strides.head;
    Y* y = p.y + (token * p.heads + head) * p.head_dim;
    rope_head<V, Layout>(row, sign, rotary_dim, x, y);
    if (static_cast<const void*>(x) != static_cast<const void*>(y))
      convert_line<V>(x + rotary_dim, y + rotary_dim, p.head_dim - rotary_dim);
  }
}

template <typename D, typename Isa, typename Y, typename X>
void execute(const Backend<D, Isa>& on, const problem::Rope<Y, X>& p) {
  using C = typename problem::Rope<Y, X>::compute;
  using V = simd::Vec<C, Isa>;
  const Index row_size = p.angles.row_size();
  parallel_for(on, p.tokens, Cost{p.heads * p.head_dim}, [&](Index first, Index last, int worker) {
    for (Index token = first; token < last; ++token) {
      const C* row = p.table + (p.table == nullptr ? 0 : p.positions[token] * row_size);
      if (p.table == nullptr) {
        C* own = p.rows + worker * row_size;
        p.angles.write_row(static_cast<double>(p.positions[token]), own);
        row = own;
      }
      if (p.angles.layout == RopeLayout::half_split)
        rope_token<V, RopeLayout::half_split>(p, token, row);
      else
        rope_token<V, RopeLayout::interleaved>(p, token, row);
    }
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
