/// \file
/// The arithmetic of INT4 on groups of one line of numbers (quantization.h has the formulas).
/// Symmetric groups have INT8's scale with 7 steps (quantize_line.h); those with a minimum:
///
///   scale = max / 15 - min / 15 (1 where that is 0)      u = clamp(round_half_to_even((w - min) / scale), 0, 15)
///
/// fit_int4.h makes the errors smaller.
#pragma once

#include "fit_int4.h"
#include "quantize_line.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

constexpr int kInt4Steps = 7;

/// Scales and minimums of a line cut into groups; false where a number is not quantizable.
template <typename Isa, typename T>
bool group_ranges(const T* line, Index count, Index group, float* scales, float* minimums) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  for (Index first = 0; first < count; first += group, ++scales, ++minimums) {
    const T* own = line + first;
    V least = V::set1(static_cast<C>(own[0])), most = least, residue = V::zero();
    const auto add = [&](V w) {
      least = minimum(w, least);
      most = maximum(w, most);
      residue = fma(w, V::zero(), residue);
    };
    const Index n = (std::min)(group, count - first);
    Index at = 0;
    for (; at + V::lanes <= n; at += V::lanes) add(V::load(own + at));
    for (; at < n; ++at) add(V::set1(static_cast<C>(own[at])));
    const C low = reduce_min(least), high = reduce_max(most);
    const float scale = static_cast<float>(high / C(15) - low / C(15));
    *minimums = static_cast<float>(low) + 0.0f;  // -0 is 0, whichever lane came first
    *scales = scale == 0.0f ? 1.0f : scale;
    if (is_nan(residue).bits() != 0 || !std::isfinite(scale) || !std::isfinite(*minimums))
      return false;
  }
  return true;
}

/// u of one group.
template <typename Isa, typename T>
void quantize_above(const T* line, Index count, float scale, float minimum_weight,
                    std::int8_t* to) {
  using V = simd::Vec<compute_type<T>, Isa>;
  const V low = V::set1(static_cast<compute_type<T>>(minimum_weight));
  with_quotient<V>(scale, [&](const auto& quotient) {
    for_each_vector<V>(0, count, [&](Index at, auto part) {
      const V steps = round(quotient(load<V>(line + at, part) - low));
      store(minimum(V::set1(15), maximum(V::set1(0), steps)), to + at, part);
    });
  });
}

/// q of one symmetric group: from -8 on where the scale is a fitted one.
template <typename Isa, typename T>
void quantize_symmetric(const T* line, Index count, float scale, int least, std::int8_t* to) {
  using V = simd::Vec<compute_type<T>, Isa>;
  const V low = V::set1(static_cast<compute_type<T>>(least));
  with_quotient<V>(scale, [&](const auto& quotient) {
    for_each_vector<V>(0, count, [&](Index at, auto part) {
      const V steps = round(quotient(load<V>(line + at, part)));
      store(minimum(V::set1(kInt4Steps), maximum(low, steps)), to + at, part);
    });
  });
}

/// f(first, count, group) for the groups of [k, k + n) of a line; k is a multiple of the group.
template <typename F>
void for_each_group(Index k, Index n, Index group, F&& f) {
  for (Index at = 0; at < n; at += group) f(at, (std::min)(group, n - at), (k + at) / group);
}

/// How a row's groups are quantized: minimums are nullptr where they are symmetric.
struct Int4Groups {
  float* scales;
  float* minimums;
  Index group, count;  // inputs of a group, groups of a row
  Int4Fit fit;

  Int4Groups of_row(Index row) const {
    return {scales + row * count, minimums == nullptr ? nullptr : minimums + row * count, group,
            count, fit};
  }
};

/// Finds what quantizes a row; false where a number is not quantizable.
template <typename Isa, typename T>
bool find_int4_groups(const T* row, Index columns, const Int4Groups& own) {
  const bool above = own.minimums != nullptr;
  if (!(above ? group_ranges<Isa>(row, columns, own.group, own.scales, own.minimums)
              : group_scales<Isa, kInt4Steps>(row, columns, own.group, own.scales)))
    return false;
  if (own.fit == Int4Fit::extremes) return true;
  if (above)
    fit_int4_groups<Isa, true>(row, columns, own.group, own.scales, own.minimums);
  else
    fit_int4_groups<Isa, false>(row, columns, own.group, own.scales, own.minimums);
  return true;
}

/// Finds what quantizes a (rows, columns) matrix; false where a number is not quantizable.
template <typename D, typename Isa, typename T>
bool find_int4_groups(const Backend<D, Isa>& on, const T* matrix, Index rows, Index columns,
                      const Int4Groups& groups) {
  std::atomic<bool> quantizable{true};
  const auto cycles = groups.fit == Int4Fit::extremes ? kPackCycles : kFitCycles;
  parallel_for(on, rows, Cost{columns, cycles}, [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r)
      if (!find_int4_groups<Isa>(matrix + r * columns, columns, groups.of_row(r)))
        return quantizable.store(false, std::memory_order_relaxed);
  });
  return quantizable.load(std::memory_order_relaxed);
}

/// Values of [k, k + n) of a row, as quantization.h gives them: -7 to 7 (-8 where the scale is a
/// fitted one), or 0 to 15 above a minimum.
template <typename Isa, typename T>
void quantize_int4_line(const T* row, Index k, Index n, const Int4Groups& own, std::int8_t* to) {
  for_each_group(k, n, own.group, [&](Index at, Index count, Index g) {
    if (own.minimums == nullptr)
      quantize_symmetric<Isa>(row + k + at, count, own.scales[g],
                              own.fit == Int4Fit::extremes ? -kInt4Steps : -kInt4Steps - 1,
                              to + at);
    else
      quantize_above<Isa>(row + k + at, count, own.scales[g], own.minimums[g], to + at);
  });
}

/// Back to numbers, one fused multiply-add in T's compute type and one rounding to T.
template <typename Isa, typename T>
void dequantize_above(const std::int8_t* values, Index count, float scale, float minimum_weight,
                      T* to) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  const V factor = V::set1(static_cast<C>(scale)), low = V::set1(static_cast<C>(minimum_weight));
  for_each_vector<V>(0, count, [&](Index at, auto part) {
    store(simd::fused_multiply_add(load<V>(values + at, part), factor, low), to + at, part);
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
