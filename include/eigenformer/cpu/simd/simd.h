/// \file
/// What kernels include: the vectors of every ISA this translation unit may use, `Vec<T, Isa>` that
/// picks one by tag, and exp.
#pragma once

#include "../../core/compiler.h"
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
namespace simd {

using eigenformer::detail::prefetch;
/// The line `bytes` after p.
template <int Level = 2, typename T>
EIGENFORMER_INLINE void prefetch_after(const T* p, Index bytes) {
  prefetch<Level>(reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(bytes));
}

namespace detail {

template <typename T, typename Isa>
vec<T, isa::generic> pick(isa::generic);
#if defined(EIGENFORMER_ISA_AVX2)
template <typename T, typename Isa>
  requires std::same_as<T, float>
vec<float, isa::avx2> pick(isa::avx2);
#endif
#if defined(EIGENFORMER_ISA_AVX512)
template <typename T, typename Isa>
  requires std::same_as<T, float>
vec<float, isa::avx512> pick(isa::avx512);
#endif
#if defined(EIGENFORMER_ISA_NEON)
template <typename T, typename Isa>
  requires std::same_as<T, float>
vec<float, isa::neon> pick(isa::neon);
#endif

}  // namespace detail

/// The vector of T that serves a tag: the tag's own, or that of the nearest tag it inherits from.
template <typename T, typename Isa>
using Vec = decltype(detail::pick<T, Isa>(Isa{}));

/// False for a tag whose vectors are those of the tag it inherits from.
template <typename Isa>
inline constexpr bool has_own_vectors = std::is_same_v<Vec<float, Isa>, vec<float, Isa>>;

/// a * b + c in one rounding on every ISA. Where the machine has no such instruction the library's
/// fma is slow: for what is done once a sum.
template <typename V>
EIGENFORMER_INLINE V fused_multiply_add(V a, V b, V c) {
  if constexpr (isa::kHasFma) {
    return fma(a, b, c);
  } else {
    typename V::scalar x[V::lanes], y[V::lanes], z[V::lanes];
    a.store(x), b.store(y), c.store(z);
    for (int i = 0; i < V::lanes; ++i) x[i] = std::fma(x[i], y[i], z[i]);
    return V::load(x);
  }
}

/// e^x. Relative error below 1.2e-7 (2 ulp) for float; exactly 0 at -infinity and below -103.98,
/// +infinity above 88.73, NaN for NaN. Cody-Waite reduction to |r| <= ln2 / 2, then the degree-6
/// polynomial of Cephes' expf; double calls std::exp lane by lane.
template <typename V>
EIGENFORMER_INLINE V exp(V x) {
  if constexpr (sizeof(typename V::scalar) == 8) {
    return V::make([&](int i) { return std::exp(x.v[i]); });
  } else {
    // in this order a NaN passes through
    x = minimum(V::set1(89.0f), maximum(V::set1(-104.0f), x));
    const V n = round(x * V::set1(1.44269504088896341f));
    V r = fma(n, V::set1(-0.693359375f), x);
    r = fma(n, V::set1(2.12194440e-4f), r);
    V p = V::set1(1.9875691500e-4f);
    p = fma(p, r, V::set1(1.3981999507e-3f));
    p = fma(p, r, V::set1(8.3334519073e-3f));
    p = fma(p, r, V::set1(4.1665795894e-2f));
    p = fma(p, r, V::set1(1.6666665459e-1f));
    p = fma(p, r, V::set1(5.0000001201e-1f));
    p = fma(p, r * r, r + V::set1(1.0f));
    return scale_exponent(p, n);
  }
}

/// e^x for x <= 0, in half the instructions of exp: weights relative to the greatest score. For
/// float the relative error is below 2.5e-7 + 7.5e-8 |x| (e^0 is 1), the result exactly 0 below
/// -87.7 and at -infinity, NaN for NaN. 2^(x log2 e) as 2^n times a polynomial of degree 5 of the
/// rest in [-1/2, 1/2], our own minimax fit with p(0) = 1 (error 9.2e-8); double calls std::exp
/// lane by lane.
template <typename V>
EIGENFORMER_INLINE V exp_of_nonpositive(V x) {
  if constexpr (sizeof(typename V::scalar) == 8) {
    return exp(x);
  } else {
    // in this order a NaN passes through
    const V y = maximum(V::set1(-127.0f), x * V::set1(1.44269504088896341f));
    const V n = round(y), f = y - n;
    V p = V::set1(1.3264727308355453e-3f);
    p = fma(p, f, V::set1(9.671514830942588e-3f));
    p = fma(p, f, V::set1(5.5507337634946634e-2f));
    p = fma(p, f, V::set1(2.4022242050990386e-1f));
    p = fma(p, f, V::set1(6.931469775756578e-1f));
    return fma(p, f, V::set1(1.0f)) * power_of_two(n);
  }
}

}  // namespace simd
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
