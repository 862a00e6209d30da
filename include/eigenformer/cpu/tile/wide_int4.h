/// \file
/// Products of activations as they are and four-bit weights that are widened in registers: for a
/// few rows of activations, which would read widened weights from a cache no more often than they
/// were written there. A weight is value * scale, or fma(scale, value, minimum), and its product
/// joins the sum as that of a float weight does: the same bits.
///
/// One vector of 16 weights on AVX-512: a shift, a permutation that looks the number up, a
/// multiplication and, for each row, a multiply-add.
#pragma once

#include <cstring>

#include "pack.h"
#include "product.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace tile {

/// u - zero of one k for the columns of a vector: bits [shift, shift + 4) of 32 for each.
template <typename V>
struct NibbleNumbers {
  std::int32_t zero;

  explicit NibbleNumbers(int what_0_is) : zero(what_0_is) {}
  EIGENFORMER_INLINE V operator()(const int4* p, int shift) const {
    std::uint32_t words[V::lanes];
    std::memcpy(words, p, sizeof(words));
    std::int32_t values[V::lanes];
    for (int i = 0; i < V::lanes; ++i)
      values[i] = static_cast<std::int32_t>(words[i] >> shift & 15u);
    return V::load_difference(values, zero);
  }
};

#if defined(EIGENFORMER_ISA_AVX2)
template <>
struct NibbleNumbers<simd::vec<float, isa::avx2>> {
  using V = simd::vec<float, isa::avx2>;
  __m256i zero;

  explicit NibbleNumbers(int what_0_is) : zero(_mm256_set1_epi32(what_0_is)) {}
  EIGENFORMER_INLINE V operator()(const int4* p, int shift) const {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                  u = _mm256_and_si256(_mm256_srlv_epi32(raw, _mm256_set1_epi32(shift)),
                                       _mm256_set1_epi32(15));
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(u, zero))};
  }
};
#endif

#if defined(EIGENFORMER_ISA_AVX512)
/// The permutation takes the low four bits of each of its 32 and leaves the others.
template <>
struct NibbleNumbers<simd::vec<float, isa::avx512>> {
  using V = simd::vec<float, isa::avx512>;
  __m512 table;

  explicit NibbleNumbers(int what_0_is) {
    const __m512i u = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    table = _mm512_maskz_cvtepi32_ps(0xffff, _mm512_sub_epi32(u, _mm512_set1_epi32(what_0_is)));
  }
  EIGENFORMER_INLINE V operator()(const int4* p, int shift) const {
    const __m512i raw = _mm512_loadu_si512(p),
                  at = _mm512_maskz_srlv_epi32(0xffff, raw, _mm512_set1_epi32(shift));
    return {_mm512_maskz_permutexvar_ps(0xffff, at, table)};
  }
};
#endif

/// Rows of activations, packed for a float dot, and the first of the panels of bytes they meet.
struct WideOperands {
  const float* a;
  const int4* b;
  Index panel_stride;  // bytes from one panel to the next
};

/// sums[panel][row][column] over all of `depth`. HasMinimums: weights are fma(scale, value,
/// minimum), values from 0 on; else value * scale, values from -8 on.
template <typename Int4, typename V, int Rows, int Panels, bool HasMinimums>
EIGENFORMER_NOINLINE void wide_tile_product(WideOperands at, Index depth,
                                            const GroupFactors& groups, float* sums,
                                            Index sums_stride) {
  constexpr int vectors = Int4::vectors, all = vectors * Panels, lanes = V::lanes;
  static_assert(lanes == Int4::lanes);
  const NibbleNumbers<V> numbers(HasMinimums ? 0 : 8);
  V c[Rows][all];
  unroll<Rows>([&](auto r) { unroll<all>([&](auto v) { c[r][v] = V::zero(); }); });
  const auto factor = [&](const float* from, auto v) {
    return V::load(from + (v / vectors) * groups.panel_stride + (v % vectors) * lanes);
  };
  // up to 12% less for a token and weights out of DRAM (Zen 5)
  const auto fetch = [&](const float* from, auto v) {
    simd::prefetch_after<3>(from + (v / vectors) * groups.panel_stride + (v % vectors) * lanes,
                            kGroupsAhead * Int4::columns * Index{sizeof(float)});
  };
  const float *scales = groups.scales, *minimums = groups.minimums;
  for (Index k = 0; k < depth; k += 4 * groups.steps) {
    V scale[all];
    unroll<all>([&](auto v) {
      scale[v] = factor(scales, v);
      fetch(scales, v);
      if constexpr (HasMinimums) fetch(minimums, v);
    });
    const Index end = (std::min)(depth, k + 4 * groups.steps);
    for (Index first = k; first < end; first += 4, at.b += panel_step<Int4>) {
      if constexpr (Panels <= 2) simd::prefetch_after<3>(at.b, kPairBytes);
      const int count = static_cast<int>((std::min)(Index{4}, end - first));
      // A loop: where its body is written four times g++ 12 makes it a function and keeps c in
      // memory.
      for (int i = 0; i < count; ++i, at.a += Rows) {
        const auto weight = [&](auto v) {
          const V number = numbers(
              at.b + (v / vectors) * at.panel_stride + (v % vectors / 2) * (2 * Int4::fragment),
              8 * i + 4 * (v % 2));
          if constexpr (HasMinimums)
            return simd::fused_multiply_add(number, scale[v], factor(minimums, v));
          else
            return number * scale[v];
        };
        if constexpr (Panels > 1) {  // few rows: their numbers stay in registers
          V x[Rows];
          unroll<Rows>([&](auto r) { x[r] = V::set1(at.a[r]); });
          unroll<all>([&](auto v) {
            const V w = weight(v);
            unroll<Rows>([&](auto r) { c[r][v] = fma(w, x[r], c[r][v]); });
          });
        } else {
          V w[all];
          unroll<all>([&](auto v) { w[v] = weight(v); });
          unroll<Rows>([&](auto r) {
            const V x = V::set1(at.a[r]);
            unroll<all>([&](auto v) { c[r][v] = fma(w[v], x, c[r][v]); });
          });
        }
      }
    }
    scales += Int4::columns;
    if constexpr (HasMinimums) minimums += Int4::columns;
  }
  unroll<Rows>([&](auto r) {
    unroll<all>([&](auto v) {
      c[r][v].store(sums + (v / vectors) * sums_stride + r * Int4::columns + (v % vectors) * lanes);
    });
  });
}

/// The same for any number of panels, at a height known at run time. Dot is that of floats, as wide
/// as the bytes'.
template <typename Dot, typename Int4>
void wide_tile_products(int height, const WideOperands& at, Index depth, const GroupFactors& groups,
                        float* sums, Index sums_stride, Index panels) {
  with_height<Dot>(height, [&](auto rows) {
    for_each_flight<Dot, decltype(rows)::value>(panels, [&](auto flight, Index p) {
      using V = typename Dot::V;
      constexpr int kRows = decltype(rows)::value, kPanels = decltype(flight)::value;
      const WideOperands own{at.a, at.b + p * at.panel_stride, at.panel_stride};
      const auto multiply = groups.minimums != nullptr
                                ? wide_tile_product<Int4, V, kRows, kPanels, true>
                                : wide_tile_product<Int4, V, kRows, kPanels, false>;
      multiply(own, depth, groups.from_panel(p), sums + p * sums_stride, sums_stride);
    });
  });
}

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
