/// \file
/// The arithmetic of symmetric INT8 on one line of numbers, shared by quantization, by products
/// with int8 weights and by the KV caches:
///
///   scale = max|w| / 127 (1 where all are zero)      q = clamp(round_half_to_even(w / scale), -127, 127)
///
/// One pass finds the maximum; NaN and infinity are found in it for the price of a multiply-add in
/// the shadow of the loads.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>

#include "../../problem/quantization.h"
#include "../backend.h"
#include "../simd/transpose.h"
#include "copy.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename C>
struct Magnitude {
  C largest;    // max|w| over the numbers that are not NaN
  bool finite;  // neither NaN nor infinity among them
};

/// Fetches what a stream will come to: arithmetic between the loads keeps few of them in flight.
template <typename T>
EIGENFORMER_INLINE void prefetch_ahead(const T* line) {
  simd::prefetch_after<3>(line, 8192);
}

/// The running maximum over vectors, in four chains that hide each other's latency.
template <typename V>
class MagnitudeChains {
 public:
  using scalar = typename V::scalar;
  static constexpr int chains = 4;
  static constexpr Index step = chains * V::lanes;

  template <typename T>
  EIGENFORMER_INLINE void add_step(const T* line) {
    for (int i = 0; i < chains; ++i) {
      prefetch_ahead(line + i * V::lanes);
      add(i, V::load(line + i * V::lanes));
    }
  }
  template <typename T>
  EIGENFORMER_INLINE void add_rest(const T* line, Index count) {
    for_each_vector<V>(0, count, [&](Index at, auto part) { add(0, load<V>(line + at, part)); });
  }
  EIGENFORMER_INLINE Magnitude<scalar> result() const {
    const V all = (residue_[0] + residue_[1]) + (residue_[2] + residue_[3]);
    return {
        reduce_max(maximum(maximum(largest_[0], largest_[1]), maximum(largest_[2], largest_[3]))),
        is_nan(all).bits() == 0};
  }

 private:
  EIGENFORMER_INLINE void add(int i, V w) {
    largest_[i] = maximum(abs(w), largest_[i]);  // in this order a NaN leaves the maximum
    residue_[i] = fma(w, V::zero(), residue_[i]);
  }
  V largest_[chains] = {V::zero(), V::zero(), V::zero(), V::zero()};
  // w * 0 is 0, or NaN for good where w is not finite
  V residue_[chains] = {V::zero(), V::zero(), V::zero(), V::zero()};
};

/// A loop of its own, of whole steps, which fetches ahead.
template <typename Isa, typename T>
Magnitude<compute_type<T>> magnitude(const T* line, Index count) {
  using Chains = MagnitudeChains<simd::Vec<compute_type<T>, Isa>>;
  Chains chains;
  Index at = 0;
  for (; at + Chains::step <= count; at += Chains::step) chains.add_step(line + at);
  chains.add_rest(line + at, count - at);
  return chains.result();
}

/// Never 0: where max|w| is so small that the quotient rounds to 0, the smallest float serves.
/// Infinite only for doubles past float's range. Steps, here and below: the largest value, 7 for
/// INT4.
template <int Steps = 127, typename C>
float int8_scale(C largest) {
  if (largest == C(0)) return 1.0f;
  const float scale = static_cast<float>(largest / C(Steps));
  return scale > 0.0f ? scale : std::numeric_limits<float>::denorm_min();
}

/// w / scale, correctly rounded: w * (1 / scale) alone would round 127.5 and its like the other
/// way. For scales away from the ends of float's range the quotient comes from the correctly
/// rounded reciprocal and two corrections by its exact remainder, which gives the bits of a
/// division (Markstein, "Computation of elementary functions on the IBM RISC System/6000
/// processor", 1990); elsewhere, and in double, it is a division.
template <typename V>
struct CorrectedQuotient {
  static constexpr float lowest = 0x1p-60f, highest = 0x1p60f;
  static constexpr bool possible = isa::kHasFma && sizeof(typename V::scalar) == 4;
  V minus_scale, reciprocal;

  CorrectedQuotient(V scale, V its_reciprocal)
      : minus_scale(V::zero() - scale), reciprocal(its_reciprocal) {}
  EIGENFORMER_INLINE V operator()(V w) const {
    V q = w * reciprocal;
    q = fma(fma(q, minus_scale, w), reciprocal, q);
    return fma(fma(q, minus_scale, w), reciprocal, q);
  }
};
template <typename V>
struct DividedQuotient {
  V scale;
  EIGENFORMER_INLINE V operator()(V w) const { return w / scale; }
};

/// f(quotient), of the kind that suits the scale.
template <typename V, typename F>
EIGENFORMER_INLINE void with_quotient(float scale, F&& f) {
  using C = typename V::scalar;
  if constexpr (CorrectedQuotient<V>::possible)
    if (std::abs(scale) > CorrectedQuotient<V>::lowest &&
        std::abs(scale) < CorrectedQuotient<V>::highest)
      return f(CorrectedQuotient<V>(V::set1(C(scale)), V::set1(C(1) / C(scale))));
  f(DividedQuotient<V>{V::set1(static_cast<C>(scale))});
}

/// The values of a vector of numbers, still as numbers. Only denormal scales need the clamp: a
/// maximum of 190 denormals has a scale of one.
template <typename V, typename Quotient>
EIGENFORMER_INLINE V int8_values(const Quotient& quotient, V w) {
  return minimum(V::set1(127), maximum(V::set1(-127), round(quotient(w))));
}

/// `count` values; Streaming stores around the caches, where `to` is aligned to a vector's bytes of
/// int8.
template <bool Streaming, typename V, typename Quotient, typename T>
EIGENFORMER_INLINE void quantize_with(const Quotient& quotient, const T* line, Index count,
                                      std::int8_t* to) {
  for_each_vector<V>(0, count, [&](Index at, auto part) {
    const V values = int8_values(quotient, load<V>(line + at, part));
    if constexpr (Streaming && std::is_same_v<decltype(part), WholeVector>)
      values.store_streaming(to + at);
    else
      store(values, to + at, part);
  });
}

template <typename Isa, bool Streaming = false, typename T>
void quantize_line(const T* line, Index count, float scale, std::int8_t* to) {
  using V = simd::Vec<compute_type<T>, Isa>;
  with_quotient<V>(
      scale, [&](const auto& quotient) { quantize_with<Streaming, V>(quotient, line, count, to); });
}

/// quantize_line of a line that is in cache, and the magnitude of the next one, which comes from
/// memory: in one loop, so that memory never waits for arithmetic.
template <typename Isa, bool Streaming, typename T>
Magnitude<compute_type<T>> quantize_and_measure(const T* line, Index count, float scale,
                                                std::int8_t* to, const T* next) {
  using V = simd::Vec<compute_type<T>, Isa>;
  constexpr Index step = MagnitudeChains<V>::step;
  MagnitudeChains<V> chains;
  const Index whole = count / step * step;
  with_quotient<V>(scale, [&](const auto& quotient) {
    for (Index at = 0; at < whole; at += step) {
      chains.add_step(next + at);
      quantize_with<Streaming, V>(quotient, line + at, step, to + at);
    }
  });
  quantize_line<Isa>(line + whole, count - whole, scale, to + whole);
  chains.add_rest(next + whole, count - whole);
  return chains.result();
}

/// Lanes that have a scale: int8_scale is finite.
template <typename V>
EIGENFORMER_INLINE auto has_scale(V x, V steps) {
  // From 0x1.ffffffp127 on, a double rounds to an infinite float.
  if constexpr (sizeof(typename V::scalar) == sizeof(float))
    return less_equal(abs(x), V::set1((std::numeric_limits<float>::max)()));
  else
    return less(abs(x) / steps, V::set1(0x1.ffffffp127));
}

template <typename Isa, typename T>
bool all_quantizable(const T* x, Index count, int largest_value) {
  using V = simd::Vec<compute_type<T>, Isa>;
  const V steps = V::set1(static_cast<compute_type<T>>(largest_value));
  auto good = has_scale(V::zero(), steps);
  Index i = 0;
  for (; i + V::lanes <= count; i += V::lanes) good = good & has_scale(V::load(x + i), steps);
  if (i < count)
    good = good & has_scale(V::load_partial(x + i, static_cast<int>(count - i)), steps);
  return good.bits() == (1u << V::lanes) - 1u;
}

template <typename D, typename Isa, typename T>
Index execute(const Backend<D, Isa>&, const problem::FirstNotQuantizable<T>& p) {
  if (all_quantizable<Isa>(p.numbers, p.count, p.steps)) return -1;
  Index at = 0;
  while (all_quantizable<Isa>(p.numbers + at, 1, p.steps)) ++at;
  return at;
}

/// Whether a line of this many numbers starts with a vector of whole groups, which scales_of_groups
/// takes.
template <typename V>
constexpr bool has_vector_of_groups(Index count, Index group) {
  return sizeof(typename V::scalar) == sizeof(float) && V::lanes * group <= count &&
         group % (2 * V::lanes) == 0;
}

/// The scales of V::lanes groups, their maxima reduced and divided together; false where a number
/// has no scale (NaN or infinity).
template <int Steps, typename V, typename T>
bool scales_of_groups(const T* line, Index group, V& scales) {
  V largest[V::lanes], residues[2] = {V::zero(), V::zero()};
  for (int g = 0; g < V::lanes; ++g) {
    const T* own = line + g * group;
    V most[2] = {V::zero(), V::zero()};
    for (Index i = 0; i < group; i += 2 * V::lanes)
      for (int half_step = 0; half_step < 2; ++half_step) {
        prefetch_ahead(own + i + half_step * V::lanes);
        const V w = V::load(own + i + half_step * V::lanes);
        most[half_step] = maximum(abs(w), most[half_step]);
        residues[half_step] = fma(w, V::zero(), residues[half_step]);
      }
    largest[g] = maximum(most[0], most[1]);
  }
  if (is_nan(residues[0] + residues[1]).bits() != 0) return false;
  simd::transpose(largest);
  V most = largest[0];
  for (int i = 1; i < V::lanes; ++i) most = maximum(most, largest[i]);
  const V least = V::set1(std::numeric_limits<typename V::scalar>::denorm_min());
  // as int8_scale
  scales = select(equal(most, V::zero()), V::set1(1), maximum(most / V::set1(Steps), least));
  return true;
}

/// Scales of a line cut into groups; false as above.
template <typename Isa, int Steps = 127, typename T>
bool group_scales(const T* line, Index count, Index group, float* scales) {
  using V = simd::Vec<compute_type<T>, Isa>;
  Index at = 0;
  if constexpr (sizeof(typename V::scalar) == sizeof(float))
    for (V found; has_vector_of_groups<V>(count - at, group);
         at += V::lanes * group, scales += V::lanes) {
      if (!scales_of_groups<Steps>(line + at, group, found)) return false;
      found.store(scales);
    }
  for (; at < count; at += group, ++scales) {
    const auto found = magnitude<Isa>(line + at, (std::min)(group, count - at));
    *scales = int8_scale<Steps>(found.largest);
    if (!found.finite || !std::isfinite(*scales)) return false;
  }
  return true;
}

/// Scales and values of a line cut into groups, in one read: values while their group is in L1.
/// False as above; then only some are written.
template <typename Isa, bool Streaming, typename T>
bool quantize_line_in_groups(const T* line, Index count, Index group, float* scales,
                             std::int8_t* to) {
  using V = simd::Vec<compute_type<T>, Isa>;
  using Quotient = CorrectedQuotient<V>;
  Index at = 0;
  if constexpr (Quotient::possible) {
    alignas(64) float reciprocals[V::lanes];
    for (V found; has_vector_of_groups<V>(count - at, group);
         at += V::lanes * group, scales += V::lanes) {
      if (!scales_of_groups<127>(line + at, group, found)) return false;
      const auto in_range =
          less(V::set1(Quotient::lowest), found) & less(found, V::set1(Quotient::highest));
      if (in_range.bits() != (std::uint32_t{1} << V::lanes) - 1) break;  // the rest one by one
      found.store(scales);
      (V::set1(1) / found).store(reciprocals);
      for (int g = 0; g < V::lanes; ++g)
        quantize_with<Streaming, V>(Quotient(V::set1(scales[g]), V::set1(reciprocals[g])),
                                    line + at + g * group, group, to + at + g * group);
    }
  }
  for (; at < count; at += group, ++scales) {
    const Index n = (std::min)(group, count - at);
    if (!group_scales<Isa>(line + at, n, group, scales)) return false;
    quantize_line<Isa, Streaming>(line + at, n, *scales, to + at);
  }
  return true;
}

/// scales[row][group] of a (rows, columns) matrix cut into groups along the row; false where a
/// number is not quantizable.
template <typename D, typename Isa, typename T>
bool group_scales(const Backend<D, Isa>& on, const T* matrix, Index rows, Index columns,
                  Index group, float* scales) {
  const Index groups = (columns + group - 1) / group;
  std::atomic<bool> quantizable{true};
  parallel_for(on, rows, Cost{columns, kPackCycles}, [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r)
      if (!group_scales<Isa>(matrix + r * columns, columns, group, scales + r * groups))
        return quantizable.store(false, std::memory_order_relaxed);
  });
  return quantizable.load(std::memory_order_relaxed);
}

/// The scale of a token: NaN where the token holds NaN or infinity, and then all its values are 0,
/// so that the damage shows in its own outputs (all NaN) and nowhere else.
template <typename Isa, typename T>
float activation_scale(const T* line, Index count) {
  const auto found = magnitude<Isa>(line, count);
  const float scale = int8_scale(found.largest);
  return found.finite && std::isfinite(scale) ? scale : std::numeric_limits<float>::quiet_NaN();
}

template <typename Isa, bool Streaming = false, typename T>
void quantize_activation_line(const T* line, Index count, float scale, std::int8_t* to) {
  if (std::isnan(scale))
    std::fill_n(to, count, std::int8_t{0});
  else
    quantize_line<Isa, Streaming>(line, count, scale, to);
}

/// Values back to numbers: one multiplication in T's compute type, one rounding to T.
template <typename Isa, typename T>
void dequantize_line(const std::int8_t* values, Index count, float scale, T* to) {
  using V = simd::Vec<compute_type<T>, Isa>;
  scale_line(values, V::set1(static_cast<compute_type<T>>(scale)), to, count);
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
