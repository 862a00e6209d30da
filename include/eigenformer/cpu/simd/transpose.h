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

}  // namespace simd
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
