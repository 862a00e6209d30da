/// \file
/// `vec<float, isa::avx2>`: 8 floats in a ymm register (AVX2, FMA, F16C). The meaning of every
/// member is in generic.h.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstring>

#include "generic.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace simd {

/// For every set of 8 lanes the lanes in it, in order, a byte each.
inline constexpr std::array<std::uint64_t, 256> kSelectedLanes = [] {
  std::array<std::uint64_t, 256> lanes{};
  for (unsigned set = 0; set < 256; ++set)
    for (unsigned lane = 8; lane-- > 0;)
      if ((set >> lane & 1u) != 0) lanes[set] = lanes[set] << 8 | lane;
  return lanes;
}();

template <>
struct vec<float, isa::avx2> {
  static constexpr int lanes = 8;
  using scalar = float;

  struct mask {
    __m256 m;
    EIGENFORMER_INLINE std::uint32_t bits() const {
      return static_cast<std::uint32_t>(_mm256_movemask_ps(m));
    }
    friend EIGENFORMER_INLINE mask operator&(mask a, mask b) { return {_mm256_and_ps(a.m, b.m)}; }
    friend EIGENFORMER_INLINE mask operator|(mask a, mask b) { return {_mm256_or_ps(a.m, b.m)}; }
  };

  __m256 v;

  static EIGENFORMER_INLINE vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static EIGENFORMER_INLINE vec zero() { return {_mm256_setzero_ps()}; }

  // One conversion for each source type; the partial forms go through it, so that a tail has the
  // bits of the middle.
  static EIGENFORMER_INLINE vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static EIGENFORMER_INLINE vec load(const bfloat16* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
  }
  static EIGENFORMER_INLINE vec load(const half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static EIGENFORMER_INLINE vec load(const std::int8_t* p) {
    return {_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static EIGENFORMER_INLINE vec load_partial(const float* p, int n) {
    return {_mm256_maskload_ps(p, lane_mask(n))};
  }
  template <typename S>
  static EIGENFORMER_INLINE vec load_partial(const S* p, int n) {
    alignas(16) unsigned char buffer[lanes * sizeof(S)] = {};
    // p may be null where there is nothing
    if (n > 0) std::memcpy(buffer, p, static_cast<std::size_t>(n) * sizeof(S));
    return load(reinterpret_cast<const S*>(buffer));
  }

  static EIGENFORMER_INLINE vec load_difference(const std::int32_t* p, std::int32_t d) {
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi32(d)))};
  }

  EIGENFORMER_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  EIGENFORMER_INLINE void store(bfloat16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bfloat16());
  }
  EIGENFORMER_INLINE void store(half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  /// Integral values in [-128, 127].
  EIGENFORMER_INLINE void store(std::int8_t* p) const {
    const __m256i wide = _mm256_cvtps_epi32(v);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  EIGENFORMER_INLINE void store_partial(float* p, int n) const {
    _mm256_maskstore_ps(p, lane_mask(n), v);
  }
  template <typename S>
  EIGENFORMER_INLINE void store_partial(S* p, int n) const {
    alignas(16) unsigned char buffer[lanes * sizeof(S)];
    store(reinterpret_cast<S*>(buffer));
    if (n > 0) std::memcpy(static_cast<void*>(p), buffer, static_cast<std::size_t>(n) * sizeof(S));
  }

  EIGENFORMER_INLINE void store_streaming(float* p) const { _mm256_stream_ps(p, v); }
  EIGENFORMER_INLINE void store_streaming(bfloat16* p) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bfloat16());
  }
  EIGENFORMER_INLINE void store_streaming(half* p) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  EIGENFORMER_INLINE void store_streaming(std::int8_t* p) const {
#if defined(__x86_64__) || defined(_M_X64)
    alignas(8) long long bytes;
    store(reinterpret_cast<std::int8_t*>(&bytes));
    _mm_stream_si64(reinterpret_cast<long long*>(p), bytes);
#else  // 32 bits have no such instruction
    alignas(8) int halves[2];
    store(reinterpret_cast<std::int8_t*>(halves));
    _mm_stream_si32(reinterpret_cast<int*>(p), halves[0]);
    _mm_stream_si32(reinterpret_cast<int*>(p) + 1, halves[1]);
#endif
  }
  static EIGENFORMER_INLINE void fence_streaming() { _mm_sfence(); }

  friend EIGENFORMER_INLINE vec operator+(vec a, vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec operator-(vec a, vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec operator*(vec a, vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec operator/(vec a, vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec fma(vec a, vec b, vec c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
  }
  friend EIGENFORMER_INLINE vec minimum(vec a, vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec maximum(vec a, vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec abs(vec a) {
    return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)};
  }
  friend EIGENFORMER_INLINE vec sqrt(vec a) { return {_mm256_sqrt_ps(a.v)}; }
  friend EIGENFORMER_INLINE vec round(vec a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  friend EIGENFORMER_INLINE mask less(vec a, vec b) {
    return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)};
  }
  friend EIGENFORMER_INLINE mask less_equal(vec a, vec b) {
    return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)};
  }
  friend EIGENFORMER_INLINE mask equal(vec a, vec b) {
    return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)};
  }
  friend EIGENFORMER_INLINE mask is_nan(vec a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
  friend EIGENFORMER_INLINE mask unordered(vec a, vec b) {
    return {_mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)};
  }
  friend EIGENFORMER_INLINE vec select(mask m, vec a, vec b) {
    return {_mm256_blendv_ps(b.v, a.v, m.m)};
  }
  friend EIGENFORMER_INLINE vec swap_pairs(vec a) { return {_mm256_permute_ps(a.v, 0xb1)}; }
  friend EIGENFORMER_INLINE vec scale_exponent(vec a, vec n) {
    // Two factors, because 2^n alone leaves the range of float before a * 2^n does.
    const __m256i exponent = _mm256_cvtps_epi32(n.v);
    const __m256i first = _mm256_srai_epi32(exponent, 1);
    return a * from_exponents(first) * from_exponents(_mm256_sub_epi32(exponent, first));
  }
  friend EIGENFORMER_INLINE vec power_of_two(vec n) {
    return from_exponents(_mm256_cvtps_epi32(n.v));
  }
  static EIGENFORMER_INLINE mask mask_of(std::uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(
        _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane))};
  }
  friend EIGENFORMER_INLINE int store_selected(vec a, mask m, float* p) {
    const std::uint32_t bits = m.bits();
    const __m256i order = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kSelectedLanes[bits])));
    _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(a.v, order));
    return std::popcount(bits);
  }

  friend EIGENFORMER_INLINE void add_lanes(vec a, double* sums) {
    const auto add = [sums](int at, __m128 half) {
      _mm256_storeu_pd(sums + at, _mm256_add_pd(_mm256_loadu_pd(sums + at), _mm256_cvtps_pd(half)));
    };
    add(0, _mm256_castps256_ps128(a.v));
    add(4, _mm256_extractf128_ps(a.v, 1));
  }

  friend EIGENFORMER_INLINE float reduce_add(vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  friend EIGENFORMER_INLINE float reduce_max(vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  friend EIGENFORMER_INLINE float reduce_min(vec a) {
    __m128 s = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_min_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_min_ss(s, _mm_movehdup_ps(s)));
  }

 private:
  static EIGENFORMER_INLINE __m256i lane_mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static EIGENFORMER_INLINE vec from_exponents(__m256i n) {
    return {
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23))};
  }
  // Round to nearest even by integer arithmetic: the same bits on every ISA, denormals included. A
  // NaN stays a (quiet) NaN.
  EIGENFORMER_INLINE __m128i to_bfloat16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
};

}  // namespace simd
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
