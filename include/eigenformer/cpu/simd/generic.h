/// \file
/// `vec<T, isa::generic>`: the vector every kernel is written with, in plain C++ that compilers
/// turn into whatever SIMD they have. The AVX2 and AVX-512 versions have the same members with the
/// same meaning:
///
///   lanes                      number of elements
///   zero() set1(x)             constants
///   load(p) store(p)           any alignment; p may point to T or to a narrower type, converted
///                              (bfloat16 and half round to nearest even)
///   load_partial(p, n)         first n elements, 0 <= n <= lanes, zeros beyond; never touches
///                              memory past p + n
///   store_partial(p, n)        first n elements
///   load_difference(p, d)      of float: int32 numbers less d, modulo 2^32, to nearest even
///   store_streaming(p)         store around the caches where the ISA can; p aligned to the bytes
///                              stored. A thread calls
///   fence_streaming()          after the last of them, before anybody else may read
///   + - * / fma(a,b,c)         fma is a * b + c, in one rounding where isa::kHasFma
///   minimum(a,b) maximum(a,b)  a < b ? a : b and a > b ? a : b: the second operand where either is
///                              NaN
///   abs sqrt round             round to nearest, ties to even
///   less less_equal equal      masks; false where either is NaN
///   is_nan(a) unordered(a,b)   unordered: a or b is NaN
///   select(m, a, b)            m ? a : b
///   m.bits()                   one bit per lane, lane 0 lowest
///   mask_of(bits)              the mask of bits; those past the lanes do not count
///   scale_exponent(a, n)       a * 2^n for integral n in [-160, 160]
///   power_of_two(n)            of float: 2^n for integral n in [-126, 127], 0 for -127, and some
///                              number for NaN
///   swap_pairs(a)              lanes 1, 0, 3, 2, ...
///   store_selected(a, m, p)    the lanes of m next to each other from p on; returns how many. May
///                              write all of p[0] to p[lanes - 1]
///   add_lanes(a, sums)         sums[i] += lane i, in double
///   reduce_add reduce_max reduce_min   over all lanes, in a fixed tree
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "../../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace simd {

template <typename T, typename Isa>
struct vec;

template <typename T>
struct vec<T, isa::generic> {
  static constexpr int lanes = 32 / static_cast<int>(sizeof(T));
  using scalar = T;

  struct mask {
    bool m[lanes];
    EIGENFORMER_INLINE std::uint32_t bits() const {
      std::uint32_t result = 0;
      EIGENFORMER_UNROLL
      for (int i = 0; i < lanes; ++i) result |= static_cast<std::uint32_t>(m[i]) << i;
      return result;
    }
    friend EIGENFORMER_INLINE mask operator&(mask a, mask b) {
      EIGENFORMER_UNROLL
      for (int i = 0; i < lanes; ++i) a.m[i] = a.m[i] && b.m[i];
      return a;
    }
    friend EIGENFORMER_INLINE mask operator|(mask a, mask b) {
      EIGENFORMER_UNROLL
      for (int i = 0; i < lanes; ++i) a.m[i] = a.m[i] || b.m[i];
      return a;
    }
  };

  T v[lanes];

  template <typename F>
  static EIGENFORMER_INLINE vec make(F&& f) {
    vec r;
    EIGENFORMER_UNROLL
    for (int i = 0; i < lanes; ++i) r.v[i] = f(i);
    return r;
  }
  template <typename F>
  static EIGENFORMER_INLINE mask make_mask(F&& f) {
    mask r;
    EIGENFORMER_UNROLL
    for (int i = 0; i < lanes; ++i) r.m[i] = f(i);
    return r;
  }

  static EIGENFORMER_INLINE vec set1(T x) {
    return make([&](int) { return x; });
  }
  static EIGENFORMER_INLINE vec zero() { return set1(T(0)); }

  template <typename S>
  static EIGENFORMER_INLINE vec load(const S* p) {
    return make([&](int i) { return static_cast<T>(p[i]); });
  }
  template <typename S>
  static EIGENFORMER_INLINE vec load_partial(const S* p, int n) {
    return make([&](int i) { return i < n ? static_cast<T>(p[i]) : T(0); });
  }
  static EIGENFORMER_INLINE vec load_difference(const std::int32_t* p, std::int32_t d) {
    return make([&](int i) {
      return static_cast<T>(static_cast<std::int32_t>(static_cast<std::uint32_t>(p[i]) -
                                                      static_cast<std::uint32_t>(d)));
    });
  }
  template <typename S>
  EIGENFORMER_INLINE void store(S* p) const {
    EIGENFORMER_UNROLL
    for (int i = 0; i < lanes; ++i) p[i] = static_cast<S>(v[i]);
  }
  template <typename S>
  EIGENFORMER_INLINE void store_partial(S* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = static_cast<S>(v[i]);
  }

  template <typename S>
  EIGENFORMER_INLINE void store_streaming(S* p) const {
    store(p);
  }
  static EIGENFORMER_INLINE void fence_streaming() {}

  friend EIGENFORMER_INLINE vec operator+(vec a, vec b) {
    return make([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend EIGENFORMER_INLINE vec operator-(vec a, vec b) {
    return make([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend EIGENFORMER_INLINE vec operator*(vec a, vec b) {
    return make([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend EIGENFORMER_INLINE vec operator/(vec a, vec b) {
    return make([&](int i) { return a.v[i] / b.v[i]; });
  }
  friend EIGENFORMER_INLINE vec fma(vec a, vec b, vec c) {
    return make([&](int i) {
      if constexpr (isa::kHasFma)
        return std::fma(a.v[i], b.v[i], c.v[i]);
      else
        return a.v[i] * b.v[i] + c.v[i];
    });
  }
  friend EIGENFORMER_INLINE vec minimum(vec a, vec b) {
    return make([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend EIGENFORMER_INLINE vec maximum(vec a, vec b) {
    return make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend EIGENFORMER_INLINE vec abs(vec a) {
    return make([&](int i) { return std::fabs(a.v[i]); });
  }
  friend EIGENFORMER_INLINE vec sqrt(vec a) {
    return make([&](int i) { return std::sqrt(a.v[i]); });
  }
  friend EIGENFORMER_INLINE vec round(vec a) {
    return make([&](int i) { return std::nearbyint(a.v[i]); });
  }
  friend EIGENFORMER_INLINE mask less(vec a, vec b) {
    return make_mask([&](int i) { return a.v[i] < b.v[i]; });
  }
  friend EIGENFORMER_INLINE mask less_equal(vec a, vec b) {
    return make_mask([&](int i) { return a.v[i] <= b.v[i]; });
  }
  friend EIGENFORMER_INLINE mask equal(vec a, vec b) {
    return make_mask([&](int i) { return a.v[i] == b.v[i]; });
  }
  friend EIGENFORMER_INLINE mask is_nan(vec a) {
    return make_mask([&](int i) { return a.v[i] != a.v[i]; });
  }
  friend EIGENFORMER_INLINE mask unordered(vec a, vec b) { return is_nan(a) | is_nan(b); }
  friend EIGENFORMER_INLINE vec select(mask m, vec a, vec b) {
    return make([&](int i) { return m.m[i] ? a.v[i] : b.v[i]; });
  }
  friend EIGENFORMER_INLINE vec scale_exponent(vec a, vec n) {
    return make([&](int i) {  // of a NaN no int can be made
      return std::ldexp(a.v[i], n.v[i] == n.v[i] ? static_cast<int>(n.v[i]) : 0);
    });
  }
  friend EIGENFORMER_INLINE vec power_of_two(vec n) {
    return make([&](int i) {
      const int exponent = n.v[i] == n.v[i] ? static_cast<int>(n.v[i]) : 0;
      return static_cast<T>(std::bit_cast<float>((exponent + 127) << 23));
    });
  }
  friend EIGENFORMER_INLINE vec swap_pairs(vec a) {
    return make([&](int i) { return a.v[i ^ 1]; });
  }

  static EIGENFORMER_INLINE mask mask_of(std::uint32_t bits) {
    return make_mask([&](int i) { return (bits >> i & 1u) != 0; });
  }
  friend EIGENFORMER_INLINE int store_selected(vec a, mask m, T* p) {
    int count = 0;
    for (int i = 0; i < lanes; ++i) {
      p[count] = a.v[i];
      count += m.m[i];
    }
    return count;
  }

  friend EIGENFORMER_INLINE void add_lanes(vec a, double* sums) {
    for (int i = 0; i < lanes; ++i) sums[i] += static_cast<double>(a.v[i]);
  }

  friend EIGENFORMER_INLINE T reduce_add(vec a) {
    for (int half = lanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
    return a.v[0];
  }
  friend EIGENFORMER_INLINE T reduce_max(vec a) {
    for (int half = lanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
    return a.v[0];
  }
  friend EIGENFORMER_INLINE T reduce_min(vec a) {
    for (int half = lanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) a.v[i] = a.v[i] < a.v[i + half] ? a.v[i] : a.v[i + half];
    return a.v[0];
  }
};

}  // namespace simd
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
