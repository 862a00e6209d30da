/// \file
/// Dots of floating weights, written once over `simd::Vec` for every ISA. The meaning of every
/// member is in generic.h. Included after the ISAs' own headers, whose `shape` and `widen_pairs` it
/// picks by tag.
#pragma once

#include "generic.h"
#if defined(EIGENFORMER_ISA_AVX2)
#include "avx2.h"
#endif
#if defined(EIGENFORMER_ISA_AVX512)
#include "avx512.h"
#endif
#if defined(EIGENFORMER_ISA_NEON)
#include "neon.h"
#endif

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace tile {

/// Float or double weights, widened activations.
template <typename T, typename Isa>
struct Plain {
  using V = simd::Vec<T, Isa>;
  using Stored = T;
  using Unit = T;
  using Sum = T;
  using Accumulator = V;
  using Fragment = V;
  using Factor = V;
  static constexpr int rows = shape<T>(Isa{}).rows, vectors = shape<T>(Isa{}).vectors,
                       columns = vectors * V::lanes;
  static constexpr int step = 1, units = 1, fragment = V::lanes;

  static EIGENFORMER_INLINE V zero() { return V::zero(); }
  static EIGENFORMER_INLINE V load(const T* p) { return V::load(p); }
  static EIGENFORMER_INLINE void store(T* p, V sums) { sums.store(p); }
  static EIGENFORMER_INLINE V weights(const T* p) { return V::load(p); }
  template <int Rows>
  static EIGENFORMER_INLINE V factor(const T* p) {
    return V::set1(*p);
  }
  static EIGENFORMER_INLINE V multiply_add(V sum, V weight, V activation) {
    return fma(weight, activation, sum);
  }
};

/// bfloat16 or half weights, float activations and float arithmetic. A step is two k; half keeps
/// them one vector after the other.
template <typename T, typename Isa>
struct Widening {
  using V = simd::Vec<float, Isa>;
  using Stored = T;
  using Unit = float;
  using Sum = float;
  using Accumulator = V;
  using Fragment = Pair<V>;
  using Factor = Pair<V>;
  static constexpr int rows = shape<float>(Isa{}).rows, vectors = shape<float>(Isa{}).vectors,
                       columns = vectors * V::lanes;
  static constexpr int step = 2, units = 2, fragment = 2 * V::lanes;

  static EIGENFORMER_INLINE V zero() { return V::zero(); }
  static EIGENFORMER_INLINE V load(const float* p) { return V::load(p); }
  static EIGENFORMER_INLINE void store(float* p, V sums) { sums.store(p); }
  static EIGENFORMER_INLINE Fragment weights(const T* p) {
    if constexpr (std::is_same_v<T, half>)
      return {V::load(p), V::load(p + V::lanes)};
    else
      return widen_pairs<Isa>(Isa{}, p);
  }
  template <int Rows>
  static EIGENFORMER_INLINE Factor factor(const float* p) {
    return {V::set1(p[0]), V::set1(p[Rows])};
  }
  static EIGENFORMER_INLINE V multiply_add(V sum, const Fragment& weight,
                                           const Factor& activation) {
    return fma(weight.odd, activation.odd, fma(weight.even, activation.even, sum));
  }
};

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
