/// \file
/// CUDA kernels of INT4 quantization by groups, into plain values or into packed rows: one warp per
/// group, two reads of it, the second out of L1, and its values, scale and minimum written. A lane
/// has a byte of a packed row, whose two numbers lie 8 apart. Bound by bandwidth, of which half is
/// expected, not measured yet. The numbers are those of cpu/vector/quantize_int4.h, bit for bit;
/// the scale of a group that holds NaN or infinity is NaN, its values are 0 (packed symmetric ones
/// stand for 0 too).
///
/// A packed row: 16 inputs take 8 bytes, the first 8 the low halves, the others the high halves, so
/// that two masks and a shift make 16 values of 8 bytes. Rows begin at multiples of 16 bytes.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/int4.h"
#include "../problem/quantization.h"
#include "int8.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

constexpr int kInt4Steps = 7;

/// What quantizes a group; symmetric where `above` is false.
struct Int4Group {
  float scale, minimum;
  bool above;

  /// -7 to 7, or 0 to 15 above the minimum.
  template <typename C>
  EIGENFORMER_DEVICE int value(C x) const {
    if (scale != scale) return 0;
    if (!above) return int8_value<kInt4Steps>(x, scale);
    const C steps = std::rint((x - static_cast<C>(minimum)) / static_cast<C>(scale));
    return static_cast<int>(steps > C(0) ? (steps < C(15) ? steps : C(15)) : C(0));
  }
  /// What is stored.
  template <typename C>
  EIGENFORMER_DEVICE int stored(C x) const {
    return value(x) + (above ? 0 : 8);
  }
};

/// The group of `count` numbers, found by a warp.
template <typename C, typename Block, typename T>
EIGENFORMER_DEVICE Int4Group int4_group(Block& block, const T* line, Index count, bool above) {
  C high = above ? static_cast<C>(line[0]) : C(0), low = -high;  // low: the largest of -w
  for (Index j = block.lane(); j < count; j += kWarp) {
    const C w = static_cast<C>(line[j]);
    high = LargerOrNan{}(high, above ? w : std::fabs(w));
    if (above) low = LargerOrNan{}(low, -w);
  }
  high = reduce_warp(block, high, LargerOrNan{});
  if (!above) return {int8_scale(high, kInt4Steps), 0.0f, false};
  low = -reduce_warp(block, low, LargerOrNan{});
  using Limits = std::numeric_limits<float>;
  const float scale = static_cast<float>(high / C(15) - low / C(15)),
              minimum = static_cast<float>(low) + 0.0f;  // -0 is 0
  const bool good = scale <= (Limits::max)() && std::fabs(minimum) <= (Limits::max)();
  return {good ? (scale == 0.0f ? 1.0f : scale) : Limits::quiet_NaN(), good ? minimum : 0.0f, true};
}

/// Plain values (rows, columns).
template <typename T>
struct QuantizeInt4Kernel {
  using C = compute_type<T>;
  static constexpr int kThreads = 256;
  problem::QuantizeInt4<T> p;
  Index groups;  // of a row

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    for_each_warp(block, p.rows * groups, [&](Index at) {
      const Index column = at % groups * p.group, from = at / groups * p.columns + column,
                  count = p.group < p.columns - column ? p.group : p.columns - column;
      const Int4Group group = int4_group<C>(block, p.weights + from, count, p.minimums != nullptr);
      for (Index j = block.lane(); j < count; j += kWarp)
        p.values[from + j] =
            static_cast<std::int8_t>(group.value(static_cast<C>(p.weights[from + j])));
      if (block.lane() != 0) return;
      p.scales[at] = group.scale;
      if (p.minimums != nullptr) p.minimums[at] = group.minimum;
    });
  }
};

template <typename D, typename T>
bool execute(const Backend<D>& on, const problem::QuantizeInt4<T>& p) {
  const Index groups = (p.columns + p.group - 1) / p.group;
  launch_warps(on, "quantize_weights_int4", p.rows * groups, QuantizeInt4Kernel<T>{p, groups});
  return true;
}

/// Packed rows of `stride` bytes. Past the columns lies what stands for 0, or for the minimum,
/// which meets activations of 0.
template <typename T>
struct PackInt4Kernel {
  using C = compute_type<T>;
  static constexpr int kThreads = 256;
  const T* weights;
  int4* packed;
  float *scales, *minimums;  // (rows, groups), minimums or nullptr
  Index rows, columns, group, groups, stride;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    for_each_warp(block, rows * groups, [&](Index at) {
      const Index row = at / groups, column = at % groups * group,
                  count = group < columns - column ? group : columns - column;
      const T* const line = weights + row * columns + column;
      const Int4Group own = int4_group<C>(block, line, count, minimums != nullptr);
      const auto stored = [&](Index k) {
        return k < count ? own.stored(static_cast<C>(line[k])) : (own.above ? 0 : 8);
      };
      for (Index byte = block.lane(); byte < (count + 15) / 16 * 8; byte += kWarp) {
        const Index k = byte / 8 * 16 + byte % 8;
        packed[row * stride + column / 2 + byte] =
            static_cast<int4>(stored(k) | stored(k + 8) << 4);
      }
      if (block.lane() != 0) return;
      scales[at] = own.scale;
      if (minimums != nullptr) minimums[at] = own.minimum;
    });
  }
};

/// The same of values that are given.
struct PackInt4Body {
  const std::int8_t* values;
  int4* packed;
  Index columns, stride;
  int zero;  // what a value of 0 is stored as

  EIGENFORMER_DEVICE void operator()(Index at) const {
    const Index row = at / stride, byte = at % stride, k = byte / 8 * 16 + byte % 8;
    const auto stored = [&](Index i) {
      return i < columns ? values[row * columns + i] + zero : zero;
    };
    packed[at] = static_cast<int4>(stored(k) | stored(k + 8) << 4);
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
