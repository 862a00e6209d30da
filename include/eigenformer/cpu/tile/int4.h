/// \file
/// Dots of four-bit weights: those of int8 with another way to load a step. The low halves of the
/// bytes are the weights of one vector of columns, the high halves those of the vector beside it,
/// so that one load serves two and a step needs no shuffle:
///
///   weights      [panel][step][pair of vectors][column of the vector][k of the step]   a byte: two weights
///
/// Weights are u = 0 to 15, the unsigned side of instructions that multiply unsigned by signed.
/// What u stands for is put right once per group of k: 8 times the sum of its activations is taken
/// off its sums, or a minimum times that sum is added (product.h).
///
/// 48 tokens by 4096 x 4096 weights in groups of 64, on one thread of Zen 5: 85 ms in plain C++
/// (INT8 in groups 125), 6.7 with AVX2 (7.9), 3.5 with AVX-VNNI (3.4), 3.4 with AVX-512 (7.3), 2.0
/// with its VNNI (2.0), these two when they had tiles of 12 rows. NEON was not measured.
#pragma once

#include "../../core/int4.h"
#include "generic.h"
#if defined(EIGENFORMER_ISA_AVX512)
#include "avx512.h"
#elif defined(EIGENFORMER_ISA_AVX2)
#include "avx2.h"
#endif
#if defined(EIGENFORMER_ISA_NEON)
#include "neon.h"
#endif

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace tile {

/// What differs from the dot of int8: weights<Half>(p) loads those of the even vector of a pair
/// (0) or of the odd one (1), `fragment` are bytes for each.
template <typename Int8>
struct Int4Dot : Int8 {
  using Stored = int4;
  static constexpr int fragment = Int8::fragment / 2;
  static constexpr bool unsigned_weights = true;
  static_assert(Int8::vectors % 2 == 0, "vectors share their bytes by two");
};

struct Int4Generic : Int4Dot<Int8Generic> {
  struct Fragment {
    std::int8_t v[4 * lanes];
  };

  static EIGENFORMER_INLINE Accumulator minus(std::int32_t offset) {
    Accumulator sums;
    std::fill(sums.v, sums.v + lanes, -offset);
    return sums;
  }
  template <int Half>
  static EIGENFORMER_INLINE Fragment weights(const int4* p) {
    Fragment result;
    for (int i = 0; i < 4 * lanes; ++i)
      result.v[i] = static_cast<std::int8_t>((static_cast<unsigned>(p[i]) >> (4 * Half)) & 15u);
    return result;
  }
  static EIGENFORMER_INLINE Accumulator multiply_add(const Accumulator& sum, const Fragment& weight,
                                                     const Factor& x) {
    return Int8Generic::multiply_add(sum, Int8Generic::Fragment{weight.v}, x);
  }
};

#if defined(EIGENFORMER_ISA_AVX2)
struct Int4Avx2Base : Int4Dot<UnsignedAvx2Base> {
  template <int Half>
  static EIGENFORMER_INLINE Fragment weights(const int4* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_and_si256(Half == 0 ? raw : _mm256_srli_epi16(raw, 4), _mm256_set1_epi8(15))};
  }
};

/// vpmaddubsw of unsigned weights needs no signs, where int8 takes two instructions more.
struct Int4Avx2 : Int4Avx2Base {
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Fragment weight, Factor x) {
    const __m256i pairs = _mm256_maddubs_epi16(weight.v, x.v);
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
  }
};
#endif

#if defined(EIGENFORMER_ISA_AVX_VNNI)
struct Int4AvxVnni : Int4Avx2Base {
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Fragment weight, Factor x) {
    return {_mm256_dpbusd_avx_epi32(sum.v, weight.v, x.v)};
  }
};
#endif

#if defined(EIGENFORMER_ISA_AVX512)
/// Half as many rows as int8's have: a group's end then meets float sums in registers and does not
/// wait for memory. Sums of groups of 32, symmetric (with minimums), of one thread of Zen 5, in
/// GOP/s: 96 tokens 690 -> 785 (650 -> 715), 16 tokens 725 -> 780 (655 -> 690), of a peak of 1058.
struct Int4Avx512Base : Int4Dot<UnsignedAvx512Base> {
  static constexpr int rows = 6;
  static constexpr bool keeps_float_sums = true;

  template <int Half>
  static EIGENFORMER_INLINE Fragment weights(const int4* p) {
    const __m512i raw = _mm512_loadu_si512(p);
    return {_mm512_and_si512(Half == 0 ? raw : _mm512_srli_epi16(raw, 4), _mm512_set1_epi8(15))};
  }
};

struct Int4Avx512 : Int4Avx512Base {
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Fragment weight, Factor x) {
    const __m512i pairs = _mm512_maddubs_epi16(weight.v, x.v);
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
  }
};
#endif

#if defined(EIGENFORMER_ISA_AVX512_VNNI)
struct Int4Avx512Vnni : Int4Avx512Base {
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Fragment weight, Factor x) {
    return {_mm512_dpbusd_epi32(sum.v, weight.v, x.v)};
  }
};
#endif

#if defined(EIGENFORMER_ISA_NEON)
template <typename Int8>
struct Int4NeonDot : Int4Dot<Int8> {
  static EIGENFORMER_INLINE Int8NeonBase::Accumulator minus(std::int32_t offset) {
    return {vdupq_n_s32(-offset)};
  }
  /// As int8: 0 to 15 is positive.
  template <int Half>
  static EIGENFORMER_INLINE int8x16_t values(const int4* p) {
    const uint8x16_t raw = vld1q_u8(reinterpret_cast<const std::uint8_t*>(p));
    return vreinterpretq_s8_u8(Half == 0 ? vandq_u8(raw, vdupq_n_u8(15)) : vshrq_n_u8(raw, 4));
  }
};

struct Int4Neon : Int4NeonDot<Int8Neon> {
  template <int Half>
  static EIGENFORMER_INLINE Fragment weights(const int4* p) {
    return {arrange(values<Half>(p))};
  }
};
#endif

#if defined(EIGENFORMER_ISA_NEON_DOTPROD)
struct Int4NeonDotprod : Int4NeonDot<Int8NeonDotprod> {
  template <int Half>
  static EIGENFORMER_INLINE Fragment weights(const int4* p) {
    return {values<Half>(p)};
  }
};
#endif

template <typename Dot>
inline constexpr bool is_int4 = std::is_same_v<typename Dot::Stored, int4>;

/// The weights of vector V of a step at p.
template <typename Dot, int V>
EIGENFORMER_INLINE auto step_weights(const typename Dot::Stored* p) {
  if constexpr (is_int4<Dot>)
    return Dot::template weights<V % 2>(p + (V - V % 2) * Dot::fragment);
  else
    return Dot::weights(p + V * Dot::fragment);
}

/// int8 values of one step, vector by vector, into the bytes of its panel.
template <typename Dot>
EIGENFORMER_INLINE void join_nibbles(const std::uint8_t* values, int4* to) {
  constexpr int bytes = 2 * Dot::fragment;  // of a vector's values
  for (int pair = 0; pair < Dot::vectors / 2; ++pair, values += 2 * bytes, to += bytes)
    for (int i = 0; i < bytes; ++i) to[i] = static_cast<int4>(values[i] | values[bytes + i] << 4);
}

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
