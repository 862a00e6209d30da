/// \file
/// `vec<float, isa::neon>`: 4 floats in a 128-bit register (Advanced SIMD of every aarch64;
/// conversions of half are part of it). The meaning of every member is in generic.h.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "generic.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace simd {

template <>
struct vec<float, isa::neon> {
  static constexpr int lanes = 4;
  using scalar = float;

  struct mask {
    uint32x4_t m;
    EIGENFORMER_INLINE std::uint32_t bits() const {
      constexpr std::uint32_t bit_of_lane[] = {1, 2, 4, 8};
      return vaddvq_u32(vandq_u32(m, vld1q_u32(bit_of_lane)));
    }
    friend EIGENFORMER_INLINE mask operator&(mask a, mask b) { return {vandq_u32(a.m, b.m)}; }
    friend EIGENFORMER_INLINE mask operator|(mask a, mask b) { return {vorrq_u32(a.m, b.m)}; }
  };

  float32x4_t v;

  static EIGENFORMER_INLINE vec set1(float x) { return {vdupq_n_f32(x)}; }
  static EIGENFORMER_INLINE vec zero() { return set1(0.0f); }

  // One conversion for each source type; the partial forms go through it, so that a tail has the
  // bits of the middle.
  static EIGENFORMER_INLINE vec load(const float* p) { return {vld1q_f32(p)}; }
  static EIGENFORMER_INLINE vec load(const bfloat16* p) {
    return {vreinterpretq_f32_u32(
        vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p)), 16))};
  }
  static EIGENFORMER_INLINE vec load(const half* p) {
    return {
        vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p))))};
  }
  static EIGENFORMER_INLINE vec load(const std::int8_t* p) {
    std::uint32_t four;  // no vector load is as short as 4 bytes
    std::memcpy(&four, p, sizeof(four));
    return {
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))))))};
  }
  template <typename S>
  static EIGENFORMER_INLINE vec load_partial(const S* p, int n) {
    if (n == lanes) return load(p);
    alignas(16) S buffer[lanes] = {};
    copy_first(p, n, buffer);
    return load(buffer);
  }

  static EIGENFORMER_INLINE vec load_difference(const std::int32_t* p, std::int32_t d) {
    return {vcvtq_f32_s32(vsubq_s32(vld1q_s32(p), vdupq_n_s32(d)))};
  }

  EIGENFORMER_INLINE void store(float* p) const { vst1q_f32(p, v); }
  EIGENFORMER_INLINE void store(bfloat16* p) const {
    vst1_u16(reinterpret_cast<std::uint16_t*>(p), to_bfloat16());
  }
  EIGENFORMER_INLINE void store(half* p) const {
    vst1_u16(reinterpret_cast<std::uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
  }
  /// Integral values in [-128, 127].
  EIGENFORMER_INLINE void store(std::int8_t* p) const {
    const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(v));
    const std::uint32_t four =
        vget_lane_u32(vreinterpret_u32_s8(vqmovn_s16(vcombine_s16(words, words))), 0);
    std::memcpy(p, &four, sizeof(four));
  }
  template <typename S>
  EIGENFORMER_INLINE void store_partial(S* p, int n) const {
    if (n == lanes) return store(p);
    alignas(16) S buffer[lanes];
    store(buffer);
    copy_first(buffer, n, p);
  }

  // Plain stores: arm_neon.h has no store around the caches, and the cores see a stream of full
  // lines by themselves.
  template <typename S>
  EIGENFORMER_INLINE void store_streaming(S* p) const {
    store(p);
  }
  static EIGENFORMER_INLINE void fence_streaming() {}

  friend EIGENFORMER_INLINE vec operator+(vec a, vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec operator-(vec a, vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec operator*(vec a, vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec operator/(vec a, vec b) { return {vdivq_f32(a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec fma(vec a, vec b, vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  // Compare and select: fmin returns a NaN whichever operand holds it, and fminnm neither.
  friend EIGENFORMER_INLINE vec minimum(vec a, vec b) { return select(less(a, b), a, b); }
  friend EIGENFORMER_INLINE vec maximum(vec a, vec b) { return select(less(b, a), a, b); }
  friend EIGENFORMER_INLINE vec abs(vec a) { return {vabsq_f32(a.v)}; }
  friend EIGENFORMER_INLINE vec sqrt(vec a) { return {vsqrtq_f32(a.v)}; }
  friend EIGENFORMER_INLINE vec round(vec a) { return {vrndnq_f32(a.v)}; }
  friend EIGENFORMER_INLINE mask less(vec a, vec b) { return {vcltq_f32(a.v, b.v)}; }
  friend EIGENFORMER_INLINE mask less_equal(vec a, vec b) { return {vcleq_f32(a.v, b.v)}; }
  friend EIGENFORMER_INLINE mask equal(vec a, vec b) { return {vceqq_f32(a.v, b.v)}; }
  friend EIGENFORMER_INLINE mask is_nan(vec a) { return {vmvnq_u32(vceqq_f32(a.v, a.v))}; }
  friend EIGENFORMER_INLINE mask unordered(vec a, vec b) { return is_nan(a) | is_nan(b); }
  friend EIGENFORMER_INLINE vec select(mask m, vec a, vec b) { return {vbslq_f32(m.m, a.v, b.v)}; }
  friend EIGENFORMER_INLINE vec swap_pairs(vec a) { return {vrev64q_f32(a.v)}; }
  static EIGENFORMER_INLINE mask mask_of(std::uint32_t bits) {
    constexpr std::uint32_t lane[] = {1, 2, 4, 8};
    return {vtstq_u32(vdupq_n_u32(bits), vld1q_u32(lane))};
  }
  friend EIGENFORMER_INLINE int store_selected(vec a, mask m, float* p) {
    const std::uint32_t bits = m.bits();
    float values[lanes];
    vst1q_f32(values, a.v);
    int count = 0;
    for (int i = 0; i < lanes; ++i) {
      p[count] = values[i];
      count += static_cast<int>(bits >> i & 1u);
    }
    return count;
  }
  friend EIGENFORMER_INLINE vec scale_exponent(vec a, vec n) {
    // Two factors, because 2^n alone leaves the range of float before a * 2^n does.
    const int32x4_t exponent = vcvtnq_s32_f32(n.v);
    const int32x4_t first = vshrq_n_s32(exponent, 1);
    return a * from_exponents(first) * from_exponents(vsubq_s32(exponent, first));
  }
  friend EIGENFORMER_INLINE vec power_of_two(vec n) { return from_exponents(vcvtnq_s32_f32(n.v)); }

  friend EIGENFORMER_INLINE void add_lanes(vec a, double* sums) {
    vst1q_f64(sums, vaddq_f64(vld1q_f64(sums), vcvt_f64_f32(vget_low_f32(a.v))));
    vst1q_f64(sums + 2, vaddq_f64(vld1q_f64(sums + 2), vcvt_high_f64_f32(a.v)));
  }

  // Lanes 0 and 2, 1 and 3, then the two results: the tree of generic.h.
  friend EIGENFORMER_INLINE float reduce_add(vec a) {
    return reduce(a, [](vec x, vec y) { return x + y; });
  }
  friend EIGENFORMER_INLINE float reduce_max(vec a) {
    return reduce(a, [](vec x, vec y) { return maximum(x, y); });
  }
  friend EIGENFORMER_INLINE float reduce_min(vec a) {
    return reduce(a, [](vec x, vec y) { return minimum(x, y); });
  }

 private:
  template <typename Combine>
  static EIGENFORMER_INLINE float reduce(vec a, Combine combine) {
    const vec pairs = combine(a, vec{vextq_f32(a.v, a.v, 2)});
    return vgetq_lane_f32(combine(pairs, vec{vrev64q_f32(pairs.v)}).v, 0);
  }
  /// The first n < lanes elements in copies of constant size: one of n bytes would be a call.
  template <typename S>
  static EIGENFORMER_INLINE void copy_first(const S* from, int n, S* to) {
    if ((n & 2) != 0) std::memcpy(static_cast<void*>(to), from, 2 * sizeof(S));
    if ((n & 1) != 0) std::memcpy(static_cast<void*>(to + (n & 2)), from + (n & 2), sizeof(S));
  }
  static EIGENFORMER_INLINE vec from_exponents(int32x4_t n) {
    return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23))};
  }
  // Round to nearest even by integer arithmetic: the same bits on every ISA, denormals included. A
  // NaN stays a (quiet) NaN.
  EIGENFORMER_INLINE uint16x4_t to_bfloat16() const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
  }
};

}  // namespace simd
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
