/// \file
/// Four-bit panels as panels of floats, a chunk at a time: what W4A16 multiplies by.
#pragma once

#include "../backend.h"
#include "../tile/pack.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Four-bit weights in panels, a scale, and a minimum or none, for each `group` of k.
struct Int4Panels {
  const int4* data;
  const float* scales;  // [panel][group][column of the panel]
  Index group;
  const float* minimums;  // as the scales, or nullptr
};

/// The same where activations stay what they are.
struct WideInt4Panels : Int4Panels {};

/// k of [first, first + count) of one panel of Dot, a float dot: value * scale, or fma(scale,
/// value, minimum), to[k][column]. first is a multiple of 128. Panels of Dot are as wide as those
/// of the bytes or narrower, and those of a gated unit hold half of each.
template <bool Gated, typename Dot, typename Isa>
void widen_panel(Isa, const Int4Panels& weights, Index panel, Index depth, Index first, Index count,
                 float* to) {
  using Int4 = tile::DotOfInt4<Isa>;
  using V = simd::Vec<float, Isa>;
  constexpr int halves = Gated ? 2 : 1, width = Dot::columns / halves,
                wide = Int4::columns / halves,
                bytes = 2 * Int4::fragment;  // of a pair of vectors
  static_assert(wide % width == 0 && width % V::lanes == 0 && Int4::lanes % V::lanes == 0);
  const Index groups = (depth + weights.group - 1) / weights.group,
              panel_bytes = tile::packed_steps<int4>(Isa{}, depth) * tile::panel_step<Int4>;
  for (int c = 0; c < Dot::columns; c += V::lanes) {
    const Index row = panel * width + c % width, from = row / wide;
    const int column = static_cast<int>(c / width * wide + row % wide), v = column / Int4::lanes;
    const int4* const own = weights.data + from * panel_bytes + first / 4 * tile::panel_step<Int4> +
                            v / 2 * bytes + column % Int4::lanes * 4;
    for (Index k = 0; k < count; k += 4) {
      std::uint32_t words[V::lanes];
      std::memcpy(words, own + k / 4 * tile::panel_step<Int4>, sizeof(words));
      const Index at = (from * groups + (first + k) / weights.group) * Int4::columns + column;
      const V scale = V::load(weights.scales + at);
      for (int i = 0; i < 4 && k + i < count; ++i) {
        std::int32_t values[V::lanes];
        for (int j = 0; j < V::lanes; ++j)
          values[j] = static_cast<std::int32_t>(words[j] >> (8 * i + v % 2 * 4) & 15u);
        const V number = weights.minimums == nullptr
                             ? V::load_difference(values, 8) * scale
                             : simd::fused_multiply_add(V::load_difference(values, 0), scale,
                                                        V::load(weights.minimums + at));
        number.store(to + (k + i) * Dot::columns + c);
      }
    }
  }
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
