/// \file
/// The arithmetic of symmetric INT8 on one line of numbers, shared by quantization and by products with int8 weights:
///
///   scale = max|w| / 127 (1 where all are zero)      q = clamp(round_half_to_even(w / scale), -127, 127)
///
/// One pass finds the maximum; NaN and infinity are found in it for the price of a multiply-add in the shadow of the loads.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>

#include "../core/device.h"
#include "simd/simd.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename C>
struct Magnitude {
  C largest;    // max|w| over the numbers that are not NaN
  bool finite;  // neither NaN nor infinity among them
};

template <typename Isa, typename T>
Magnitude<compute_type<T>> magnitude(const T* line, Index count) {
  using V = simd::Vec<compute_type<T>, Isa>;
  constexpr int chains = 4;
  V largest[chains], residue[chains];  // w * 0 is 0, or NaN where w is not finite, and stays NaN
  for (int i = 0; i < chains; ++i) largest[i] = residue[i] = V::zero();
  const auto add = [&](int i, V w) {
    largest[i] = max(abs(w), largest[i]);  // in this order a NaN leaves the maximum
    residue[i] = fma(w, V::zero(), residue[i]);
  };
  Index at = 0;
  for (; at + chains * V::lanes <= count; at += chains * V::lanes)
    for (int i = 0; i < chains; ++i) add(i, V::load(line + at + i * V::lanes));
  for (; at < count; at += V::lanes) add(0, V::load_partial(line + at, static_cast<int>(std::min<Index>(V::lanes, count - at))));
  const V all = (residue[0] + residue[1]) + (residue[2] + residue[3]);
  return {reduce_max(max(max(largest[0], largest[1]), max(largest[2], largest[3]))), is_nan(all).bits() == 0};
}

/// Never 0: where max|w| is so small that the quotient rounds to 0, the smallest float serves. Infinite only for doubles past
/// float's range.
template <typename C>
float int8_scale(C largest) {
  if (largest == C(0)) return 1.0f;
  const float scale = static_cast<float>(largest / C(127));
  return scale > 0.0f ? scale : std::numeric_limits<float>::denorm_min();
}

/// A true division: w * (1 / scale) would round 127.5 and its like the other way.
template <typename Isa, typename T>
void quantize_line(const T* line, Index count, float scale, std::int8_t* to) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  const V divisor = V::set1(static_cast<C>(scale)), limit = V::set1(C(127)), negative = V::set1(C(-127));
  const auto quantize = [&](V w) { return min(limit, max(negative, round(w / divisor))); };
  Index at = 0;
  for (; at + V::lanes <= count; at += V::lanes) quantize(V::load(line + at)).store(to + at);
  const int rest = static_cast<int>(count - at);
  if (rest > 0) quantize(V::load_partial(line + at, rest)).store_partial(to + at, rest);
}

/// The first number, in memory order, that has no int8 scale (NaN, infinity, a double past float's range), or count.
template <typename T>
Index first_not_quantizable(const T* numbers, Index count) {
  using C = compute_type<T>;
  for (Index i = 0; i < count; ++i) {
    const C w = static_cast<C>(numbers[i]);
    if (!std::isfinite(w) || !std::isfinite(int8_scale(std::abs(w)))) return i;
  }
  return count;
}

/// scales[row][group] of a (rows, columns) matrix cut into groups along the row; false where a number is not quantizable.
template <typename Isa, CpuDevice D, typename T>
bool group_scales(Isa, const D& device, const T* matrix, Index rows, Index columns, Index group, float* scales) {
  const Index groups = (columns + group - 1) / group;
  std::atomic<bool> quantizable{true};
  parallel_for(device, rows, 1 + 65536 / (columns + 1), [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r)
      for (Index g = 0; g < groups; ++g) {
        const auto found = magnitude<Isa>(matrix + r * columns + g * group, std::min(group, columns - g * group));
        const float scale = int8_scale(found.largest);
        scales[r * groups + g] = scale;
        if (!found.finite || !std::isfinite(scale)) quantizable.store(false, std::memory_order_relaxed);
      }
  });
  return quantizable.load(std::memory_order_relaxed);
}

/// The scale of a token: NaN where the token holds NaN or infinity, and then all its values are 0, so that the damage shows in its
/// own outputs (all NaN) and nowhere else.
template <typename Isa, typename T>
float activation_scale(const T* line, Index count) {
  const auto found = magnitude<Isa>(line, count);
  const float scale = int8_scale(found.largest);
  return found.finite && std::isfinite(scale) ? scale : std::numeric_limits<float>::quiet_NaN();
}

template <typename Isa, typename T>
void quantize_activation_line(const T* line, Index count, float scale, std::int8_t* to) {
  if (std::isnan(scale))
    std::fill_n(to, count, std::int8_t{0});
  else
    quantize_line<Isa>(line, count, scale, to);
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
