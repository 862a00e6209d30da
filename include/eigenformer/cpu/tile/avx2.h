/// \file
/// Register tiles for AVX2 and AVX-VNNI: 6 x 2 vectors of 8 columns in 12 of the 16 registers. The
/// meaning of every member is in generic.h.
#pragma once

#include <immintrin.h>

#include "generic.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace tile {

template <typename T>
  requires std::same_as<T, float>
constexpr Shape shape(isa::avx2) {
  return {6, 2};
}

template <typename Isa, typename V = simd::Vec<float, Isa>>
  requires std::same_as<V, simd::vec<float, isa::avx2>>
EIGENFORMER_INLINE Pair<V> widen_pairs(isa::avx2, const bfloat16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i odd = _mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  return {V{_mm256_castsi256_ps(_mm256_slli_epi32(raw, 16))}, V{_mm256_castsi256_ps(odd)}};
}

/// What the dots of int8 have in common.
struct Int8Avx2Base {
  static constexpr int lanes = 8;
  using Stored = std::int8_t;
  using Unit = std::uint32_t;
  using Sum = std::int32_t;
  struct Accumulator {
    __m256i v;
  };
  static constexpr int rows = 6, vectors = 2, columns = vectors * lanes, step = 4,
                       fragment = 4 * lanes;

  static EIGENFORMER_INLINE Accumulator zero() { return {_mm256_setzero_si256()}; }
  static EIGENFORMER_INLINE Accumulator load(const std::int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static EIGENFORMER_INLINE void store(std::int32_t* p, Accumulator sums) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), sums.v);
  }
  static EIGENFORMER_INLINE simd::vec<float, isa::avx2> to_float(Accumulator sums) {
    return {_mm256_cvtepi32_ps(sums.v)};
  }
  static EIGENFORMER_INLINE __m256i raw(const std::int8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
};

/// What dots whose weights are the unsigned side (generic.h) have in common.
struct UnsignedAvx2Base : Int8Avx2Base {
  struct Fragment {
    __m256i v;
  };
  using Factor = Fragment;
  static constexpr int units = 1;
  static constexpr bool unsigned_weights = true;

  /// As UnsignedAvx512Base's, for the same reason.
  static EIGENFORMER_INLINE Accumulator minus(std::int32_t offset) {
    return {_mm256_sub_epi32(_mm256_setzero_si256(), _mm256_set1_epi32(offset))};
  }
  template <int Rows>
  static EIGENFORMER_INLINE Factor factor(const Unit* p) {
    return {_mm256_set1_epi32(static_cast<int>(*p))};
  }
};

/// |w| by x with the sign of w, vpmaddubsw and vpmaddwd. Pairs of products fit int16 because
/// quantized activations are never -128: at most 2 * 128 * 127 = 32512, weights of -128 included.
/// As fast as widening both to int16 for 6 rows, 1.4 times for one (Zen 5), with half the
/// activations to read.
struct Int8Avx2 : Int8Avx2Base {
  struct Fragment {
    __m256i signs, magnitudes;
  };
  struct Factor {
    __m256i v;
  };
  static constexpr int units = 1;
  static constexpr bool unsigned_weights = false;

  static EIGENFORMER_INLINE Fragment weights(const std::int8_t* p) {
    return {raw(p), _mm256_abs_epi8(raw(p))};
  }
  template <int Rows>
  static EIGENFORMER_INLINE Factor factor(const Unit* p) {
    return {_mm256_set1_epi32(static_cast<int>(*p))};
  }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, const Fragment& weight,
                                                     Factor x) {
    const __m256i pairs =
        _mm256_maddubs_epi16(weight.magnitudes, _mm256_sign_epi8(x.v, weight.signs));
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
  }
};

/// What the line dots have in common.
struct LineDotAvx2Base {
  static constexpr int lanes = 8, width = 32;
  struct Accumulator {
    __m256i v;
  };

  static EIGENFORMER_INLINE Accumulator zero() { return {_mm256_setzero_si256()}; }
  /// Lane i: the total of v[i].
  static EIGENFORMER_INLINE __m256i totals(const __m256i (&v)[lanes]) {
    const auto four = [](const __m256i* x) {
      return _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
    };
    const __m256i low = four(v), high = four(v + 4);
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                            _mm256_permute2x128_si256(low, high, 0x31));
  }
  static EIGENFORMER_INLINE void totals(const Accumulator (&from)[lanes], std::int32_t* sums) {
    __m256i v[lanes];
    unroll<lanes>([&](auto i) { v[i] = from[i].v; });
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), totals(v));
  }
};

/// Both widened to int16, activations beforehand: two multiplications and two additions for 32 k,
/// where signs and magnitudes take four instructions and a load more.
struct LineDotAvx2 : LineDotAvx2Base {
  static constexpr bool unsigned_weights = false;
  using Activation = std::int16_t;
  struct Weights {
    __m256i low, high;
  };

  static EIGENFORMER_INLINE Weights weights(const std::int8_t* p) {
    const auto half = [](const std::int8_t* from) {
      return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    };
    return {half(p), half(p + 16)};
  }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, const Weights& w,
                                                     const Activation* x) {
    const auto* at = reinterpret_cast<const __m256i*>(x);
    return {
        _mm256_add_epi32(_mm256_add_epi32(sum.v, _mm256_madd_epi16(w.low, _mm256_loadu_si256(at))),
                         _mm256_madd_epi16(w.high, _mm256_loadu_si256(at + 1)))};
  }
};

#if defined(EIGENFORMER_ISA_AVX_VNNI)
struct LineDotAvxVnni : LineDotAvx2Base {
  static constexpr bool unsigned_weights = true;
  using Activation = std::int8_t;
  using Weights = __m256i;

  static EIGENFORMER_INLINE Weights weights(const std::int8_t* p) {
    return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                            _mm256_set1_epi8(-128));
  }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Weights w,
                                                     const Activation* x) {
    return {
        _mm256_dpbusd_avx_epi32(sum.v, w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
  }
};

/// vpdpbusd.
struct Int8AvxVnni : UnsignedAvx2Base {
  static EIGENFORMER_INLINE Fragment weights(const std::int8_t* p) { return {raw(p)}; }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Fragment weight, Factor x) {
    return {_mm256_dpbusd_avx_epi32(sum.v, weight.v, x.v)};
  }
};
#endif

constexpr int transpose_size(isa::avx2) { return 8; }

template <typename Unit>
  requires(sizeof(Unit) == 4)
void transpose(isa::avx2, const void* from, Index from_bytes, int rows, int count, Unit* to,
               Index to_stride) {
  const auto first = [](int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  };
  const auto row = [&](int r) {
    return reinterpret_cast<const int*>(static_cast<const std::byte*>(from) + r * from_bytes);
  };
  const __m256i loaded = first(count);
  __m256 in[8], out[8];
  unroll<8>([&](auto r) {
    in[r] =
        r < rows ? _mm256_castsi256_ps(_mm256_maskload_epi32(row(r), loaded)) : _mm256_setzero_ps();
  });
  unroll<4>([&](auto i) {  // pairs of rows interleaved
    out[2 * i] = _mm256_unpacklo_ps(in[2 * i], in[2 * i + 1]);
    out[2 * i + 1] = _mm256_unpackhi_ps(in[2 * i], in[2 * i + 1]);
  });
  unroll<2>([&](auto part) {  // four rows: columns 0 to 3 of each 128-bit half
    constexpr int h = 4 * part.value;
    in[h + 0] = _mm256_shuffle_ps(out[h], out[h + 2], 0x44);
    in[h + 1] = _mm256_shuffle_ps(out[h], out[h + 2], 0xee);
    in[h + 2] = _mm256_shuffle_ps(out[h + 1], out[h + 3], 0x44);
    in[h + 3] = _mm256_shuffle_ps(out[h + 1], out[h + 3], 0xee);
  });
  unroll<4>([&](auto i) {
    out[i] = _mm256_permute2f128_ps(in[i], in[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(in[i], in[i + 4], 0x31);
  });
  const __m256i stored = first(rows);
  unroll<8>([&](auto u) {
    if (u < count)
      _mm256_maskstore_epi32(reinterpret_cast<int*>(to + u * to_stride), stored,
                             _mm256_castps_si256(out[u]));
  });
}

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
