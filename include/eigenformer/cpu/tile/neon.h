/// \file
/// Register tiles for NEON, with and without sdot: 8 x 2 vectors of 4 columns for floats, 6 x 4 for
/// int8, in 16 and 24 of the 32 registers. The meaning of every member is in generic.h.
#pragma once

#include "../simd/transpose.h"
#include "generic.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace tile {

// 16 sums cover 4 units of 4 cycles latency and leave room for a step's 4 widened vectors of
// bfloat16 or half and its factors, where 6 x 4 would take 34 registers. By llvm-mca and g++ 12:
// 1.19 cycles per multiply-add with bfloat16 weights on a Cortex-A57, where 6 x 4 takes 1.24, and
// 0.34 against 0.37 on an Exynos M5; with float weights both take 1.04 and 0.34. An even number of
// vectors, so that the panel of a gated unit halves in whole ones.
template <typename T>
  requires std::same_as<T, float>
constexpr Shape shape(isa::neon) {
  return {8, 2};
}

template <typename Isa, typename V = simd::Vec<float, Isa>>
  requires std::same_as<V, simd::vec<float, isa::neon>>
EIGENFORMER_INLINE Pair<V> widen_pairs(isa::neon, const bfloat16* p) {
  const uint32x4_t raw =
      vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const std::uint16_t*>(p)));
  const uint32x4_t odd = vandq_u32(raw, vdupq_n_u32(0xffff0000u));
  return {V{vreinterpretq_f32_u32(vshlq_n_u32(raw, 16))}, V{vreinterpretq_f32_u32(odd)}};
}

/// A step is four k of four columns in 16 bytes, and its activations are one unit of four int8 as
/// they are. Nothing is widened, so 6 x 4 sums fit: 2.4 sdot a load, where 8 x 2 has 1.6.
struct Int8NeonBase {
  static constexpr int lanes = 4;
  using Stored = std::int8_t;
  using Unit = std::uint32_t;
  using Sum = std::int32_t;
  struct Accumulator {
    int32x4_t v;
  };
  struct Fragment {
    int8x16_t v;
  };
  using Factor = Fragment;
  static constexpr int rows = 6, vectors = 4, columns = vectors * lanes, step = 4, units = 1,
                       fragment = 4 * lanes;
  static constexpr bool unsigned_weights = false;

  static EIGENFORMER_INLINE Accumulator zero() { return {vdupq_n_s32(0)}; }
  static EIGENFORMER_INLINE Accumulator load(const std::int32_t* p) { return {vld1q_s32(p)}; }
  static EIGENFORMER_INLINE void store(std::int32_t* p, Accumulator sums) { vst1q_s32(p, sums.v); }
  static EIGENFORMER_INLINE simd::vec<float, isa::neon> to_float(Accumulator sums) {
    return {vcvtq_f32_s32(sums.v)};
  }
};

/// smull, smlal2, sadalp: 3 instructions for 16 products. An int16 holds two of them as long as
/// not both factors of both are -128: 2 * 128 * 128 = 32768 wraps, which made sums wrong in MLAS
/// (onnxruntime issue 31573). Quantized activations are within -127 to 127, so at most 2 * 128 *
/// 127 = 32512 arrives, whatever the weights are.
struct Int8Neon : Int8NeonBase {
  /// Even k in the low half, odd k in the high one, so that the two products which meet in an int16
  /// are of one column.
  static EIGENFORMER_INLINE int8x16_t arrange(int8x16_t quads) {
    return vuzp1q_s8(quads, vextq_s8(quads, quads, 1));
  }
  static EIGENFORMER_INLINE Fragment weights(const std::int8_t* p) {
    return {arrange(vld1q_s8(p))};
  }
  template <int Rows>
  static EIGENFORMER_INLINE Factor factor(const Unit* p) {
    return {arrange(vreinterpretq_s8_u32(vdupq_n_u32(*p)))};
  }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Fragment weight, Factor x) {
    const int16x8_t even = vmull_s8(vget_low_s8(weight.v), vget_low_s8(x.v));
    return {vpadalq_s16(sum.v, vmlal_high_s8(even, weight.v, x.v))};
  }
};

#if defined(EIGENFORMER_ISA_NEON_DOTPROD)
/// sdot adds four products of int8 to an int32, exactly for all values.
struct Int8NeonDotprod : Int8NeonBase {
  static EIGENFORMER_INLINE Fragment weights(const std::int8_t* p) { return {vld1q_s8(p)}; }
  template <int Rows>
  static EIGENFORMER_INLINE Factor factor(const Unit* p) {
    return {vreinterpretq_s8_u32(vdupq_n_u32(*p))};
  }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Fragment weight, Factor x) {
    return {vdotq_s32(sum.v, weight.v, x.v)};
  }
};
#endif

/// A line dot needs no order within its 16 k.
struct LineDotNeon {
  static constexpr int lanes = 4, width = 16;
  static constexpr bool unsigned_weights = false;
  using Activation = std::int8_t;
  using Weights = int8x16_t;
  struct Accumulator {
    int32x4_t v;
  };

  static EIGENFORMER_INLINE Accumulator zero() { return {vdupq_n_s32(0)}; }
  static EIGENFORMER_INLINE Weights weights(const std::int8_t* p) { return vld1q_s8(p); }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Weights w,
                                                     const Activation* p) {
    const int8x16_t x = vld1q_s8(p);
    return {vpadalq_s16(sum.v, vmlal_high_s8(vmull_s8(vget_low_s8(w), vget_low_s8(x)), w, x))};
  }
  static EIGENFORMER_INLINE void totals(const Accumulator (&from)[lanes], std::int32_t* sums) {
    vst1q_s32(sums, vpaddq_s32(vpaddq_s32(from[0].v, from[1].v), vpaddq_s32(from[2].v, from[3].v)));
  }
};

#if defined(EIGENFORMER_ISA_NEON_DOTPROD)
struct LineDotNeonDotprod : LineDotNeon {
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Weights w,
                                                     const Activation* x) {
    return {vdotq_s32(sum.v, w, vld1q_s8(x))};
  }
};
#endif

template <typename Unit>
  requires(sizeof(Unit) == 4)
void transpose(isa::neon, const void* from, Index from_bytes, int rows, int count, Unit* to,
               Index to_stride) {
  using V = simd::vec<float, isa::neon>;
  const auto* bytes = static_cast<const std::byte*>(from);
  for (int r = 0; r < rows; r += 4)
    for (int u = 0; u < count; u += 4) {
      const std::byte* const corner = bytes + r * from_bytes + u * 4;
      Unit* const target = to + u * to_stride + r;
      const int high = (std::min)(4, rows - r), wide = (std::min)(4, count - u);
      if (high < 4 || wide < 4) {
        transpose(isa::generic{}, corner, from_bytes, high, wide, target, to_stride);
        continue;
      }
      V block[4];  // moved, never computed with: any bits survive
      unroll<4>([&](auto i) {
        block[i].v = vreinterpretq_f32_u8(
            vld1q_u8(reinterpret_cast<const std::uint8_t*>(corner + i * from_bytes)));
      });
      simd::transpose(block);
      unroll<4>([&](auto i) {
        vst1q_u8(reinterpret_cast<std::uint8_t*>(target + i * to_stride),
                 vreinterpretq_u8_f32(block[i].v));
      });
    }
}

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
