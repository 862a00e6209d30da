/// \file
/// `vec<float, isa::avx512>`: 16 floats in a zmm register (AVX-512 F, BW, DQ, VL). The meaning of
/// every member is in generic.h.
#pragma once

#include <immintrin.h>

#include "generic.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace simd {

template <>
struct vec<float, isa::avx512> {
  static constexpr int lanes = 16;
  using scalar = float;

  struct mask {
    __mmask16 m;
    EIGENFORMER_INLINE std::uint32_t bits() const { return m; }
    friend EIGENFORMER_INLINE mask operator&(mask a, mask b) {
      return {static_cast<__mmask16>(a.m & b.m)};
    }
    friend EIGENFORMER_INLINE mask operator|(mask a, mask b) {
      return {static_cast<__mmask16>(a.m | b.m)};
    }
  };

  __m512 v;

  static EIGENFORMER_INLINE vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static EIGENFORMER_INLINE vec zero() { return {_mm512_setzero_ps()}; }

  static EIGENFORMER_INLINE vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static EIGENFORMER_INLINE vec load(const bfloat16* p) {
    return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static EIGENFORMER_INLINE vec load(const half* p) {
    return {_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static EIGENFORMER_INLINE vec load(const std::int8_t* p) {
    return {_mm512_maskz_cvtepi32_ps(
        kAll,
        _mm512_maskz_cvtepi8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static EIGENFORMER_INLINE vec load_partial(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(first(n), p)};
  }
  static EIGENFORMER_INLINE vec load_partial(const bfloat16* p, int n) {
    return from_bfloat16(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static EIGENFORMER_INLINE vec load_partial(const half* p, int n) {
    return {_mm512_maskz_cvtph_ps(kAll, _mm256_maskz_loadu_epi16(first(n), p))};
  }
  static EIGENFORMER_INLINE vec load_partial(const std::int8_t* p, int n) {
    return {_mm512_maskz_cvtepi32_ps(
        kAll, _mm512_maskz_cvtepi8_epi32(kAll, _mm_maskz_loadu_epi8(first(n), p)))};
  }

  static EIGENFORMER_INLINE vec load_difference(const std::int32_t* p, std::int32_t d) {
    return {_mm512_maskz_cvtepi32_ps(
        kAll, _mm512_sub_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(d)))};
  }

  EIGENFORMER_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  EIGENFORMER_INLINE void store(bfloat16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16());
  }
  EIGENFORMER_INLINE void store(half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(kAll, v, _MM_FROUND_TO_NEAREST_INT));
  }
  /// Integral values in [-128, 127].
  EIGENFORMER_INLINE void store(std::int8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm512_maskz_cvtsepi32_epi8(kAll, _mm512_maskz_cvtps_epi32(kAll, v)));
  }
  EIGENFORMER_INLINE void store_partial(float* p, int n) const {
    _mm512_mask_storeu_ps(p, first(n), v);
  }
  EIGENFORMER_INLINE void store_partial(bfloat16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first(n), to_bfloat16());
  }
  EIGENFORMER_INLINE void store_partial(half* p, int n) const {
    _mm256_mask_storeu_epi16(p, first(n),
                             _mm512_maskz_cvtps_ph(kAll, v, _MM_FROUND_TO_NEAREST_INT));
  }
  EIGENFORMER_INLINE void store_partial(std::int8_t* p, int n) const {
    _mm_mask_storeu_epi8(p, first(n),
                         _mm512_maskz_cvtsepi32_epi8(kAll, _mm512_maskz_cvtps_epi32(kAll, v)));
  }

  EIGENFORMER_INLINE void store_streaming(float* p) const { _mm512_stream_ps(p, v); }
  EIGENFORMER_INLINE void store_streaming(bfloat16* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bfloat16());
  }
  EIGENFORMER_INLINE void store_streaming(half* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(kAll, v, _MM_FROUND_TO_NEAREST_INT));
  }
  EIGENFORMER_INLINE void store_streaming(std::int8_t* p) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p),
                     _mm512_maskz_cvtsepi32_epi8(kAll, _mm512_maskz_cvtps_epi32(kAll, v)));
  }
  static EIGENFORMER_INLINE void fence_streaming() { _mm_sfence(); }

  friend EIGENFORMER_INLINE vec operator+(vec a, vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec operator-(vec a, vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec operator*(vec a, vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec operator/(vec a, vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec fma(vec a, vec b, vec c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  friend EIGENFORMER_INLINE vec minimum(vec a, vec b) {
    return {_mm512_maskz_min_ps(kAll, a.v, b.v)};
  }
  friend EIGENFORMER_INLINE vec maximum(vec a, vec b) {
    return {_mm512_maskz_max_ps(kAll, a.v, b.v)};
  }
  friend EIGENFORMER_INLINE vec abs(vec a) { return {_mm512_abs_ps(a.v)}; }
  friend EIGENFORMER_INLINE vec sqrt(vec a) { return {_mm512_maskz_sqrt_ps(kAll, a.v)}; }
  friend EIGENFORMER_INLINE vec round(vec a) {
    return {_mm512_maskz_roundscale_ps(kAll, a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  friend EIGENFORMER_INLINE mask less(vec a, vec b) {
    return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
  }
  friend EIGENFORMER_INLINE mask less_equal(vec a, vec b) {
    return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)};
  }
  friend EIGENFORMER_INLINE mask equal(vec a, vec b) {
    return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)};
  }
  friend EIGENFORMER_INLINE mask is_nan(vec a) {
    return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)};
  }
  friend EIGENFORMER_INLINE mask unordered(vec a, vec b) {
    return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q)};
  }
  friend EIGENFORMER_INLINE vec select(mask m, vec a, vec b) {
    return {_mm512_mask_blend_ps(m.m, b.v, a.v)};
  }
  friend EIGENFORMER_INLINE vec scale_exponent(vec a, vec n) {
    return {_mm512_maskz_scalef_ps(kAll, a.v, n.v)};
  }
  friend EIGENFORMER_INLINE vec power_of_two(vec n) {
    const __m512i biased =
        _mm512_add_epi32(_mm512_maskz_cvtps_epi32(kAll, n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, biased, 23))};
  }
  friend EIGENFORMER_INLINE vec swap_pairs(vec a) {
    return {_mm512_maskz_permute_ps(kAll, a.v, 0xb1)};
  }
  static EIGENFORMER_INLINE mask mask_of(std::uint32_t bits) {
    return {static_cast<__mmask16>(bits)};
  }
  friend EIGENFORMER_INLINE int store_selected(vec a, mask m, float* p) {
    // the form that stores to memory takes ten times as long on AMD's Zen 4
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m.m, a.v));
    return std::popcount(static_cast<std::uint32_t>(m.m));
  }

  friend EIGENFORMER_INLINE void add_lanes(vec a, double* sums) {
    const auto add = [sums](int at, __m256 half) {
      _mm512_storeu_pd(
          sums + at, _mm512_add_pd(_mm512_loadu_pd(sums + at), _mm512_maskz_cvtps_pd(0xff, half)));
    };
    add(0, _mm512_maskz_extractf32x8_ps(0xff, a.v, 0));
    add(8, _mm512_maskz_extractf32x8_ps(0xff, a.v, 1));
  }

  friend EIGENFORMER_INLINE float reduce_add(vec a) {
    const __m256 s8 = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, a.v, 0),
                                    _mm512_maskz_extractf32x8_ps(0xff, a.v, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  friend EIGENFORMER_INLINE float reduce_max(vec a) {
    const __m256 s8 = _mm256_max_ps(_mm512_maskz_extractf32x8_ps(0xff, a.v, 0),
                                    _mm512_maskz_extractf32x8_ps(0xff, a.v, 1));
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  friend EIGENFORMER_INLINE float reduce_min(vec a) {
    const __m256 s8 = _mm256_min_ps(_mm512_maskz_extractf32x8_ps(0xff, a.v, 0),
                                    _mm512_maskz_extractf32x8_ps(0xff, a.v, 1));
    __m128 s = _mm_min_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    s = _mm_min_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_min_ss(s, _mm_movehdup_ps(s)));
  }

 private:
  // The plain intrinsics of GCC 12 read an undefined register, which -Wall reports in the user's
  // build (GCC bug 105593). Zero-masked forms under a full mask are the same instructions.
  static constexpr __mmask16 kAll = 0xffff;
  static EIGENFORMER_INLINE __mmask16 first(int n) {
    return static_cast<__mmask16>((1u << n) - 1u);
  }
  static EIGENFORMER_INLINE vec from_bfloat16(__m256i raw) {
    return {_mm512_castsi512_ps(
        _mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, raw), 16))};
  }
  // Round to nearest even by integer arithmetic: the same bits on every ISA (vcvtneps2bf16 flushes
  // denormals). A NaN stays a NaN.
  EIGENFORMER_INLINE __m256i to_bfloat16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd =
        _mm512_and_si512(_mm512_maskz_srli_epi32(kAll, bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_maskz_cvtepi32_epi16(
        kAll, _mm512_maskz_srli_epi32(kAll, _mm512_mask_blend_epi32(nan, rounded, quiet), 16));
  }
};

}  // namespace simd
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
