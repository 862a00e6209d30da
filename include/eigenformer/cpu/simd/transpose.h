/// \file
/// `transpose(rows)`: lanes x lanes elements in registers, rows become columns. Packing keys for
/// attention is made of it; a decode step transposes every key once, so shuffles rather than scalar
/// stores decide whether it runs at memory speed.
#pragma once

#include "simd.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace simd {

template <typename V>
EIGENFORMER_INLINE void transpose(V (&rows)[V::lanes]) {
  for (int i = 0; i < V::lanes; ++i)
    for (int j = i + 1; j < V::lanes; ++j) std::swap(rows[i].v[j], rows[j].v[i]);
}

#if defined(EIGENFORMER_ISA_AVX2)
EIGENFORMER_INLINE void transpose(vec<float, isa::avx2> (&rows)[8]) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {  // two rows side by side: a0 b0 a1 b1 | a4 b4 a5 b5
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {  // four rows: one column per half
      quads[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0x44);
      quads[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}
#endif

#if defined(EIGENFORMER_ISA_AVX512)
EIGENFORMER_INLINE void transpose(vec<float, isa::avx512> (&rows)[16]) {
  // Zero-masked forms under a full mask: see avx512.h.
  constexpr __mmask16 all = 0xffff;
  __m512 pairs[16], quads[16], halves[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_maskz_unpacklo_ps(all, rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_maskz_unpackhi_ps(all, rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      // quads[4g + c]: columns c, c + 4, c + 8, c + 12 of rows 4g to 4g + 3
      quads[i + 2 * k] = _mm512_maskz_shuffle_ps(all, pairs[i + k], pairs[i + k + 2], 0x44);
      quads[i + 2 * k + 1] = _mm512_maskz_shuffle_ps(all, pairs[i + k], pairs[i + k + 2], 0xee);
    }
  for (int c = 0; c < 4; ++c)
    for (int g = 0; g < 2; ++g) {  // eight rows: columns c, c + 8 and c + 4, c + 12
      halves[8 * g + c] =
          _mm512_maskz_shuffle_f32x4(all, quads[8 * g + c], quads[8 * g + 4 + c], 0x88);
      halves[8 * g + 4 + c] =
          _mm512_maskz_shuffle_f32x4(all, quads[8 * g + c], quads[8 * g + 4 + c], 0xdd);
    }
  for (int c = 0; c < 8; ++c) {
    rows[c].v = _mm512_maskz_shuffle_f32x4(all, halves[c], halves[8 + c], 0x88);
    rows[c + 8].v = _mm512_maskz_shuffle_f32x4(all, halves[c], halves[8 + c], 0xdd);
  }
}
#endif

#if defined(EIGENFORMER_ISA_NEON)
EIGENFORMER_INLINE void transpose(vec<float, isa::neon> (&rows)[4]) {
  const auto pair = [](float32x4_t v) { return vreinterpretq_f64_f32(v); };
  const float64x2_t even01 = pair(vtrn1q_f32(rows[0].v, rows[1].v)),
                    odd01 = pair(vtrn2q_f32(rows[0].v, rows[1].v));  // a0 b0 a2 b2
  const float64x2_t even23 = pair(vtrn1q_f32(rows[2].v, rows[3].v)),
                    odd23 = pair(vtrn2q_f32(rows[2].v, rows[3].v));
  rows[0].v = vreinterpretq_f32_f64(vtrn1q_f64(even01, even23));
  rows[1].v = vreinterpretq_f32_f64(vtrn1q_f64(odd01, odd23));
  rows[2].v = vreinterpretq_f32_f64(vtrn2q_f64(even01, even23));
  rows[3].v = vreinterpretq_f32_f64(vtrn2q_f64(odd01, odd23));
}
#endif

/// Units of 32 bits (a float, a pair of bfloat16, four int8) that load_units makes columns of: as
/// many as take the fewest shuffles. 0: there is no load_units.
template <typename V>
inline constexpr int kUnitsAtOnce = 0;

#if defined(EIGENFORMER_ISA_AVX2)
template <>
inline constexpr int kUnitsAtOnce<vec<float, isa::avx2>> = 4;

/// to[u] = unit u after element `at` of each row. Halves of rows are put side by side by loads.
template <typename T>
EIGENFORMER_INLINE void load_units(const T* const* rows, Index at, vec<float, isa::avx2> (&to)[4]) {
  const auto load = [&](int i) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(rows[i] + at));
  };
  __m256 two[4];  // rows i and i + 4
  for (int i = 0; i < 4; ++i)
    two[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(load(i)), load(i + 4), 1);
  const __m256 a = _mm256_unpacklo_ps(two[0], two[1]), b = _mm256_unpackhi_ps(two[0], two[1]),
               c = _mm256_unpacklo_ps(two[2], two[3]), d = _mm256_unpackhi_ps(two[2], two[3]);
  to[0].v = _mm256_shuffle_ps(a, c, 0x44);
  to[1].v = _mm256_shuffle_ps(a, c, 0xee);
  to[2].v = _mm256_shuffle_ps(b, d, 0x44);
  to[3].v = _mm256_shuffle_ps(b, d, 0xee);
}

/// Pairs of bfloat16 as floats.
EIGENFORMER_INLINE vec<float, isa::avx2> first_of_pairs(vec<float, isa::avx2> pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs.v), 16))};
}
EIGENFORMER_INLINE vec<float, isa::avx2> second_of_pairs(vec<float, isa::avx2> pairs) {
  return {_mm256_and_ps(pairs.v,
                        _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
#endif

#if defined(EIGENFORMER_ISA_AVX512)
template <>
inline constexpr int kUnitsAtOnce<vec<float, isa::avx512>> = 8;

template <typename T>
EIGENFORMER_INLINE void load_units(const T* const* rows, Index at,
                                   vec<float, isa::avx512> (&to)[8]) {
  constexpr __mmask16 all = 0xffff;
  const auto load = [&](int i) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(rows[i] + at));
  };
  __m512 quads[2][4];  // columns c and c + 4 of rows 8g to 8g + 3, then of 8g + 4 to 8g + 7
  for (int g = 0; g < 2; ++g) {
    __m512 two[4];  // rows i and i + 4
    for (int i = 0; i < 4; ++i)
      two[i] = _mm512_maskz_insertf32x8(all, _mm512_castps256_ps512(load(8 * g + i)),
                                        load(8 * g + i + 4), 1);
    const __m512 a = _mm512_maskz_unpacklo_ps(all, two[0], two[1]),
                 b = _mm512_maskz_unpackhi_ps(all, two[0], two[1]),
                 c = _mm512_maskz_unpacklo_ps(all, two[2], two[3]),
                 d = _mm512_maskz_unpackhi_ps(all, two[2], two[3]);
    quads[g][0] = _mm512_maskz_shuffle_ps(all, a, c, 0x44);
    quads[g][1] = _mm512_maskz_shuffle_ps(all, a, c, 0xee);
    quads[g][2] = _mm512_maskz_shuffle_ps(all, b, d, 0x44);
    quads[g][3] = _mm512_maskz_shuffle_ps(all, b, d, 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    to[c].v = _mm512_maskz_shuffle_f32x4(all, quads[0][c], quads[1][c], 0x88);
    to[c + 4].v = _mm512_maskz_shuffle_f32x4(all, quads[0][c], quads[1][c], 0xdd);
  }
}

EIGENFORMER_INLINE vec<float, isa::avx512> first_of_pairs(vec<float, isa::avx512> pairs) {
  return {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, _mm512_castps_si512(pairs.v), 16))};
}
EIGENFORMER_INLINE vec<float, isa::avx512> second_of_pairs(vec<float, isa::avx512> pairs) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs.v),
                                               _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
#endif

#if defined(EIGENFORMER_ISA_AVX512)
/// Pairs of elements of two rows of 32 bfloat16, or of the first n, as shuffles make them;
/// order_pairs puts sums of their products in order.
EIGENFORMER_INLINE void join_pairs(const bfloat16* even, const bfloat16* odd, Index n,
                                   vec<float, isa::avx512> (&to)[2]) {
  const auto load = [&](const bfloat16* from) {
    return n >= 32 ? _mm512_loadu_si512(from)
                   : _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, from);
  };
  const __m512i a = load(even), b = load(odd);
  to[0].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
  to[1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
}
EIGENFORMER_INLINE void order_pairs(vec<float, isa::avx512> (&sums)[2]) {
  constexpr __mmask16 all = 0xffff;
  const __m512 a = _mm512_maskz_shuffle_f32x4(all, sums[0].v, sums[1].v, 0x44),
               b = _mm512_maskz_shuffle_f32x4(all, sums[0].v, sums[1].v, 0xee);
  sums[0].v = _mm512_maskz_shuffle_f32x4(all, a, a, 0xd8);
  sums[1].v = _mm512_maskz_shuffle_f32x4(all, b, b, 0xd8);
}
#endif

}  // namespace simd
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
