/// \file
/// Scales and minimums of four-bit groups by least squares (Int4Fit): each candidate of
/// problem/quantization.h rounds the group in its way, z to q, and the scale (and minimum) that fit
/// these q best come from a linear regression of z on q. Of two candidates the better one is that
/// whose q explain more of z:
///
///   symmetric       scale = sum(q z) / sum(q q)                         explained = sum(q z)^2 / sum(q q)
///   with minimums   scale = c / v, minimum = mean(z) - scale mean(q)    explained = c^2 / v
///                   c = n sum(q z) - sum(q) sum(z), v = n sum(q q) - sum(q)^2
///
/// z are the group's numbers, less its smallest where there are minimums. Values are not kept:
/// numbers are rounded anew by the scale that was found.
/// (ggml's k-quants search in this way; the candidates and the code are our own.)
///
/// A lane has a group, and the sums of a group run over it in order: the bits are the same on every
/// ISA. About 8 instructions for each candidate and vector, all in L1.
#pragma once

#include <cmath>

#include "quantize_line.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

constexpr Index kFitCycles = 12;  // of a number

/// What a candidate's values say of V::lanes groups.
template <typename V>
struct Int4Sums {
  V q = V::zero(), squares = V::zero(), products = V::zero();

  EIGENFORMER_INLINE void add(V value, V z) {
    q = q + value;
    squares = fma(value, value, squares);  // exact: below 2^15
    products = simd::fused_multiply_add(value, z, products);
  }
};

/// How well values fit, and the scale they ask for as a fraction: `covariance` over `variance`.
template <typename V>
struct Int4Regression {
  V covariance, variance;

  template <bool HasMinimums>
  static EIGENFORMER_INLINE Int4Regression of(const Int4Sums<V>& sums, V total, V count) {
    if constexpr (!HasMinimums) return {sums.products, sums.squares};
    return {simd::fused_multiply_add(count, sums.products, V::zero() - sums.q * total),
            count * sums.squares - sums.q * sums.q};  // exact: below 2^22
  }
  /// 0 where all values are one.
  EIGENFORMER_INLINE V explained() const {
    return select(less(V::zero(), variance), covariance * covariance / variance, V::zero());
  }
};

/// V::lanes groups of `length` numbers or fewer, z[k][lane], zeros behind those of a lane; `count`
/// is how many each has. Scales start as those of the extremes. HasMinimums: z are above the least
/// number of their group, and `offset` is what the fitted minimum adds to it.
template <bool HasMinimums, typename V>
void fit_int4_lanes(const typename V::scalar* z, Index length, V count, V& scale, V& offset) {
  using C = typename V::scalar;
  using Candidates = problem::Int4Candidates<C>;
  const V low = V::set1(HasMinimums ? C(0) : C(-8)), high = V::set1(HasMinimums ? C(15) : C(7)),
          inverse = V::set1(1) / scale;
  V total = V::zero(), best = V::zero();
  for (Index k = 0; k < length; ++k) total = total + V::load(z + k * V::lanes);
  offset = V::zero();
  for (int j = 0; j < Candidates::count(HasMinimums); ++j) {
    const V step = inverse * V::set1(Candidates::at(j, HasMinimums));
    Int4Sums<V> sums;
    for (Index k = 0; k < length; ++k) {
      const V number = V::load(z + k * V::lanes);
      sums.add(minimum(high, maximum(low, round(number * step))), number);
    }
    const auto found = Int4Regression<V>::template of<HasMinimums>(sums, total, count);
    const V explained = found.explained(), own = found.covariance / found.variance;
    const auto better = less(best, explained);
    best = select(better, explained, best);
    scale = select(better, own, scale);
    if constexpr (HasMinimums)
      offset =
          select(better, simd::fused_multiply_add(V::zero() - own, sums.q, total) / count, offset);
  }
}

/// Replaces the scales of a line's groups, found from extremes, by those of least squares, and the
/// minimums too where groups have them.
template <typename Isa, bool HasMinimums, typename T>
void fit_int4_groups(const T* line, Index count, Index group, float* scales, float* minimums) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  using Candidates = problem::Int4Candidates<C>;
  constexpr Index longest = 128;
  alignas(64) C z[longest * V::lanes], counts[V::lanes], found[V::lanes], offsets[V::lanes];
  for (Index first = 0; first < count; first += V::lanes * group, scales += V::lanes) {
    const Index length = (std::min)(group, count - first),
                lanes = (std::min)(Index{V::lanes}, (count - first + group - 1) / group);
    std::fill_n(z, length * V::lanes, C(0));
    std::fill_n(counts, V::lanes, C(1));
    std::fill_n(found, V::lanes, C(1));
    for (Index lane = 0; lane < lanes; ++lane) {
      found[lane] = static_cast<C>(scales[lane]);
      if (scales[lane] < Candidates::kLeastScale || scales[lane] > Candidates::kLargestScale)
        continue;  // all its numbers are 0, and explain nothing
      const T* const own = line + first + lane * group;
      const Index n = (std::min)(group, count - first - lane * group);
      const C least = HasMinimums ? static_cast<C>(minimums[lane]) : C(0);
      counts[lane] = static_cast<C>(n);
      for (Index k = 0; k < n; ++k) z[k * V::lanes + lane] = static_cast<C>(own[k]) - least;
    }
    V scale = V::load(found), offset;
    fit_int4_lanes<HasMinimums>(z, length, V::load(counts), scale, offset);
    scale.store(found), offset.store(offsets);
    for (Index lane = 0; lane < lanes; ++lane) {
      scales[lane] = static_cast<float>(found[lane]);
      if constexpr (HasMinimums)
        minimums[lane] = static_cast<float>(static_cast<C>(minimums[lane]) + offsets[lane]) + 0.0f;
    }
    if constexpr (HasMinimums) minimums += V::lanes;
  }
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
