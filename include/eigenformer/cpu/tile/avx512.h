/// \file
/// Register tiles for AVX-512: 12 x 2 vectors of 16 columns in 24 of the 32 registers; VNNI and
/// BF16 dots for the tags that have them. The meaning of every member is in generic.h.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>

#include "../simd/transpose.h"
#include "avx2.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace tile {

// Zero-masked forms under a full mask: see simd/avx512.h.
template <typename T>
  requires std::same_as<T, float>
constexpr Shape shape(isa::avx512) {
  return {12, 2};
}

template <typename Stored>
  requires(std::same_as<Stored, bfloat16> || std::same_as<Stored, std::int8_t>)
constexpr int step_multiple(isa::avx512) {
  return 16;
}

template <typename Isa, typename V = simd::Vec<float, Isa>>
  requires std::same_as<V, simd::vec<float, isa::avx512>>
EIGENFORMER_INLINE Pair<V> widen_pairs(isa::avx512, const bfloat16* p) {
  const __m512i raw = _mm512_loadu_si512(p);
  const __m512i odd = _mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return {V{_mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, raw, 16))},
          V{_mm512_castsi512_ps(odd)}};
}

#if defined(EIGENFORMER_ISA_AVX512_BF16)
/// For what vdpbf16ps and tdpbf16ps multiply: denormals, which these take as zero, may be zero.
EIGENFORMER_INLINE void store_for_pairs(isa::avx512_bf16, simd::vec<float, isa::avx512> x,
                                        bfloat16* to) {
  const __m256bh rounded = _mm512_maskz_cvtneps_pbh(0xffff, x.v);
  std::memcpy(static_cast<void*>(to), &rounded, sizeof(rounded));
}

/// bfloat16 weights and activations by vdpbf16ps, which adds the products of a pair to a float sum
/// and takes denormals as zero.
struct Bfloat16Avx512 {
  using V = simd::vec<float, isa::avx512>;
  using Stored = bfloat16;
  using Unit = std::uint32_t;
  using Sum = float;
  using Accumulator = V;
  struct Fragment {
    __m512i v;
  };
  using Factor = Fragment;
  static constexpr int rows = 12, vectors = 2, columns = vectors * V::lanes, step = 2, units = 1,
                       fragment = 2 * V::lanes;

  static EIGENFORMER_INLINE V zero() { return V::zero(); }
  static EIGENFORMER_INLINE V load(const float* p) { return V::load(p); }
  static EIGENFORMER_INLINE void store(float* p, V sums) { sums.store(p); }
  static EIGENFORMER_INLINE Fragment weights(const bfloat16* p) { return {_mm512_loadu_si512(p)}; }
  /// A unit of each of 16 columns, as it is stored.
  static constexpr bool kTakesUnits = true;
  static EIGENFORMER_INLINE Fragment weights(V of) { return {_mm512_castps_si512(of.v)}; }
  template <int Rows>
  static EIGENFORMER_INLINE Factor factor(const Unit* p) {
    return {_mm512_set1_epi32(static_cast<int>(*p))};
  }
  static EIGENFORMER_INLINE V multiply_add(V sum, Fragment weight, Factor x) {
#if defined(__clang__)  // clang 16 overflows its stack on the intrinsic in a loop
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(weight.v), "v"(x.v));
    return sum;
#else
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(weight.v),
                             reinterpret_cast<__m512bh>(x.v))};
#endif
  }
};
#endif

/// What the dots of int8 have in common.
struct Int8Avx512Base {
  static constexpr int lanes = 16;
  using Stored = std::int8_t;
  using Unit = std::uint32_t;
  using Sum = std::int32_t;
  struct Accumulator {
    __m512i v;
  };
  static constexpr int rows = 12, vectors = 2, columns = vectors * lanes, step = 4,
                       fragment = 4 * lanes;

  static EIGENFORMER_INLINE Accumulator zero() { return {_mm512_setzero_si512()}; }
  static EIGENFORMER_INLINE Accumulator load(const std::int32_t* p) {
    return {_mm512_loadu_si512(p)};
  }
  static EIGENFORMER_INLINE void store(std::int32_t* p, Accumulator sums) {
    _mm512_storeu_si512(p, sums.v);
  }
  static EIGENFORMER_INLINE simd::vec<float, isa::avx512> to_float(Accumulator sums) {
    return {_mm512_maskz_cvtepi32_ps(0xffff, sums.v)};
  }
};

/// Widened to int16, vpmaddwd: AVX-512 has no vpsignb, which AVX2's way needs.
struct Int8Avx512 : Int8Avx512Base {
  struct Fragment {
    __m512i even, odd;
  };
  using Factor = Fragment;
  static constexpr int units = 2;
  static constexpr bool unsigned_weights = false;

  static EIGENFORMER_INLINE Fragment weights(const std::int8_t* p) {
    const __m512i raw = _mm512_loadu_si512(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(raw, 8), 8), _mm512_srai_epi16(raw, 8)};
  }
  template <int Rows>
  static EIGENFORMER_INLINE Factor factor(const Unit* p) {
    return {_mm512_set1_epi32(static_cast<int>(p[0])),
            _mm512_set1_epi32(static_cast<int>(p[Rows]))};
  }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, const Fragment& weight,
                                                     const Factor& x) {
    const __m512i products = _mm512_add_epi32(_mm512_madd_epi16(weight.even, x.even),
                                              _mm512_madd_epi16(weight.odd, x.odd));
    return {_mm512_add_epi32(sum.v, products)};
  }
};

/// What dots whose weights are the unsigned side (generic.h) have in common.
struct UnsignedAvx512Base : Int8Avx512Base {
  struct Fragment {
    __m512i v;
  };
  using Factor = Fragment;
  static constexpr int units = 1;
  static constexpr bool unsigned_weights = true;

  /// Not a broadcast of -offset, from which g++ 12 keeps the sums of a full tile of int4 in memory.
  static EIGENFORMER_INLINE Accumulator minus(std::int32_t offset) {
    return {_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_set1_epi32(offset))};
  }
  template <int Rows>
  static EIGENFORMER_INLINE Factor factor(const Unit* p) {
    return {_mm512_set1_epi32(static_cast<int>(*p))};
  }
};

#if defined(EIGENFORMER_ISA_AVX512_VNNI)
/// vpdpbusd. Sums may wrap on the way; modulo 2^32 the end is exact.
struct Int8Avx512Vnni : UnsignedAvx512Base {
  static EIGENFORMER_INLINE Fragment weights(const std::int8_t* p) {
    return {_mm512_loadu_si512(p)};
  }
  /// A unit of each of 16 columns, as it is stored.
  static constexpr bool kTakesUnits = true;
  static EIGENFORMER_INLINE Fragment weights(simd::vec<float, isa::avx512> of) {
    return {_mm512_xor_si512(_mm512_castps_si512(of.v), _mm512_set1_epi8(-128))};
  }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Fragment weight, Factor x) {
    return {_mm512_dpbusd_epi32(sum.v, weight.v, x.v)};
  }
};
#endif

/// What the line dots have in common: halves are added, and summed up as AVX2's.
struct LineDotAvx512Base {
  static constexpr int lanes = 16, width = 64;
  struct Accumulator {
    __m512i v;
  };

  static EIGENFORMER_INLINE Accumulator zero() { return {_mm512_setzero_si512()}; }
  static EIGENFORMER_INLINE void totals(const Accumulator (&from)[lanes], std::int32_t* sums) {
    unroll<2>([&](auto part) {
      __m256i v[8];
      unroll<8>([&](auto i) {
        const __m512i sum = from[8 * part + i].v;
        v[i] = _mm256_add_epi32(_mm512_castsi512_si256(sum),
                                _mm512_maskz_extracti64x4_epi64(0xf, sum, 1));
      });
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8 * part), LineDotAvx2Base::totals(v));
    });
  }
};

struct LineDotAvx512 : LineDotAvx512Base {
  static constexpr bool unsigned_weights = false;
  using Activation = std::int16_t;
  struct Weights {
    __m512i low, high;
  };

  static EIGENFORMER_INLINE Weights weights(const std::int8_t* p) {
    const auto half = [](const std::int8_t* from) {
      return _mm512_maskz_cvtepi8_epi16(0xffffffffu,
                                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    };
    return {half(p), half(p + 32)};
  }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, const Weights& w,
                                                     const Activation* x) {
    return {
        _mm512_add_epi32(_mm512_add_epi32(sum.v, _mm512_madd_epi16(w.low, _mm512_loadu_si512(x))),
                         _mm512_madd_epi16(w.high, _mm512_loadu_si512(x + 32)))};
  }
};

#if defined(EIGENFORMER_ISA_AVX512_VNNI)
struct LineDotAvx512Vnni : LineDotAvx512Base {
  static constexpr bool unsigned_weights = true;
  using Activation = std::int8_t;
  using Weights = __m512i;

  static EIGENFORMER_INLINE Weights weights(const std::int8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
  }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Weights w,
                                                     const Activation* x) {
    return {_mm512_dpbusd_epi32(sum.v, w, _mm512_loadu_si512(x))};
  }
};
#endif

EIGENFORMER_INLINE void store_pairs(isa::avx512, simd::vec<float, isa::avx512> even,
                                    simd::vec<float, isa::avx512> odd, int n, std::uint32_t* to) {
  std::uint16_t rounded[2][16];
  even.store(reinterpret_cast<bfloat16*>(rounded[0]));
  odd.store(reinterpret_cast<bfloat16*>(rounded[1]));
  const auto widened = [&](int half) {
    return _mm512_maskz_cvtepu16_epi32(
        0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rounded[half])));
  };
  const __m512i pairs =
      _mm512_or_si512(widened(0), _mm512_maskz_slli_epi32(0xffff, widened(1), 16));
  _mm512_mask_storeu_epi32(to, static_cast<__mmask16>((1u << n) - 1u), pairs);
}

#if defined(EIGENFORMER_ISA_AVX512_BF16)
/// low[i], high[i] = bfloat16 of 16 floats each. For operands of products, which take denormals as
/// zero: the instruction rounds to nearest even, and denormals to zero.
EIGENFORMER_INLINE __m512i round_to_bfloat16(simd::vec<float, isa::avx512> low,
                                             simd::vec<float, isa::avx512> high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
}

/// 32 floats as bfloat16, one after the other.
EIGENFORMER_INLINE void store_rounded(isa::avx512_bf16, simd::vec<float, isa::avx512> low,
                                      simd::vec<float, isa::avx512> high, bfloat16* to) {
  _mm512_storeu_si512(to, round_to_bfloat16(low, high));
}

/// 16 pairs (even[i], odd[i]) of the same.
EIGENFORMER_INLINE void store_rounded_pairs(isa::avx512_bf16, simd::vec<float, isa::avx512> even,
                                            simd::vec<float, isa::avx512> odd, std::uint32_t* to) {
  alignas(64) static constexpr std::uint16_t order[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi16(0xffffffffu, _mm512_load_si512(order),
                                                         round_to_bfloat16(even, odd)));
}
#endif

/// 32 pairs take two shuffles; the loop of generic.h made a block of values for attention cost 9%
/// of a prefill (Zen 5, 2048 tokens, heads of 128), this 1%.
inline void join_pairs(isa::avx512, const bfloat16* even, const bfloat16* odd, Index count,
                       std::uint32_t* to) {
  alignas(64) static constexpr auto order = [] {
    std::array<std::uint16_t, 64> from{};
    for (std::size_t i = 0; i < 64; ++i) from[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * 32);
    return from;
  }();
  const __m512i low = _mm512_load_si512(order.data()), high = _mm512_load_si512(&order[32]);
  for (Index at = 0; at < count; at += 32) {
    const auto n = static_cast<int>((std::min)(Index{32}, count - at));
    const __mmask32 some = ~__mmask32{0} >> (32 - n);
    const __m512i e = _mm512_maskz_loadu_epi16(some, even + at),
                  o = _mm512_maskz_loadu_epi16(some, odd + at);
    _mm512_mask_storeu_epi32(to + at, static_cast<__mmask16>(some),
                             _mm512_permutex2var_epi16(e, low, o));
    _mm512_mask_storeu_epi32(to + at + 16, static_cast<__mmask16>(some >> 16),
                             _mm512_permutex2var_epi16(e, high, o));
  }
}

constexpr int transpose_size(isa::avx512) { return 16; }

template <typename Unit>
  requires(sizeof(Unit) == 4)
void transpose(isa::avx512, const void* from, Index from_bytes, int rows, int count, Unit* to,
               Index to_stride) {
  const auto first = [](int n) { return static_cast<__mmask16>((1u << n) - 1u); };
  const auto* bytes = static_cast<const std::byte*>(from);
  const __mmask16 loaded = first(count), stored = first(rows);
  simd::vec<float, isa::avx512> block[16];
  EIGENFORMER_UNROLL
  for (int r = 0; r < 16; ++r)
    block[r].v = _mm512_maskz_loadu_ps(r < rows ? loaded : __mmask16{0},
                                       r < rows ? bytes + r * from_bytes : bytes);
  simd::transpose(block);
  EIGENFORMER_UNROLL
  for (int u = 0; u < 16; ++u)
    if (u < count) _mm512_mask_storeu_ps(to + u * to_stride, stored, block[u].v);
}

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
