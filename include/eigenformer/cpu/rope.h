/// \file
/// CPU kernel of rotary embedding: one pass over x, two fused multiply-adds an element. Cosines and
/// sines come from rows of a table, one row a token, shared by its heads; without a caller's table
/// each thread keeps the row of the token it is at. A table row is [cosines | sines]:
///   half_split   rotary_dim / 2 each: y[i] = x[i] c[i] - x[i + half] s[i],  y[i + half] = x[i + half] c[i] + x[i] s[i]
///   interleaved  rotary_dim each, every cosine twice and every sine as (-s, s): y = x * c + swap_pairs(x) * s
/// Both are the same products and sums in the same order.
#pragma once

#include <cmath>
#include <cstring>

#include "../core/device.h"
#include "../core/rows.h"
#include "../core/values.h"
#include "vector_loop.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

enum class RopeLayout {
  half_split,   ///< pairs (i, i + rotary_dim / 2): GPT-NeoX, Llama in Hugging Face's layout
  interleaved,  ///< pairs (2 i, 2 i + 1): the paper, GPT-J, Llama in Meta's layout
};

/// Cosines and sines of one position: what a row of a table holds. Angles are exact to double; C is
/// the type they are rounded to.
struct RopeAngles {
  const double* inverse_frequencies;  // (rotary_dim / 2)
  Index rotary_dim;
  RopeLayout layout;
  double scale;

  Index row_size() const { return layout == RopeLayout::half_split ? rotary_dim : 2 * rotary_dim; }

  template <typename C>
  void write_row(double position, C* row) const {
    for (Index i = 0; i < rotary_dim / 2; ++i) {
      const double angle = position * scale * inverse_frequencies[i];
      const C c = static_cast<C>(std::cos(angle)), s = static_cast<C>(std::sin(angle));
      if (layout == RopeLayout::half_split) {
        row[i] = c;
        row[i + rotary_dim / 2] = s;
      } else {
        row[2 * i] = row[2 * i + 1] = c;
        row[rotary_dim + 2 * i] = -s;
        row[rotary_dim + 2 * i + 1] = s;
      }
    }
  }
};

/// A checked request: pointers and sizes only.
template <typename Y, typename X>
struct RopeProblem {
  using compute = common_compute_type<Y, X>;
  Y* y;                         // (tokens, heads, head_dim)
  const X* x;                   // (tokens, heads, head_dim)
  const LengthSpan& positions;  // (tokens)
  Index tokens, heads, head_dim;
  RopeAngles angles;
  const compute* table;  // (positions, angles.row_size()), nullptr where rows are computed
  compute* rows;         // (workers, angles.row_size()) scratch where they are
  bool inverse;          // rotates back: the gradient
};

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
void rope_token(const RopeProblem<Y, X>& p, Index token, const typename V::scalar* row) {
  const V sign = V::set1(p.inverse ? -1 : 1);
  const Index rotary_dim = p.angles.rotary_dim;
  for (Index head = token * p.heads; head < (token + 1) * p.heads; ++head) {
    const X* x = p.x + head * p.head_dim;
    Y* y = p.y + head * p.head_dim;
    rope_head<V, Layout>(row, sign, rotary_dim, x, y);
    if (static_cast<const void*>(x) != static_cast<const void*>(y))
      for_each_vector<V>(rotary_dim, p.head_dim,
                         [&](Index at, auto part) { store(load<V>(x + at, part), y + at, part); });
  }
}

template <typename Isa, CpuDevice D, typename Y, typename X>
void rope(Isa, const D& device, const RopeProblem<Y, X>& p) {
  using C = typename RopeProblem<Y, X>::compute;
  using V = simd::Vec<C, Isa>;
  const Index row_size = p.angles.row_size();
  parallel_for(device, p.tokens, rows_per_task(p.heads * p.head_dim),
               [&](Index first, Index last, int worker) {
                 for (Index token = first; token < last; ++token) {
                   const C* row =
                       p.table + (p.table == nullptr ? 0 : p.positions[token] * row_size);
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
