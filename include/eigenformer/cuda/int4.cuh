/// \file
/// CUDA kernels of INT4 quantization by groups, into plain values or into packed rows: one warp per
/// group, two reads of it, the second out of L1, and its values, scale and minimum written. A lane
/// has a byte of a packed row, whose two numbers lie 8 apart. Bound by bandwidth, of which half is
/// expected, not measured yet. The numbers are those of cpu/vector/quantize_int4.h, bit for bit;
/// the scale of a group that holds NaN or infinity is NaN, its values are 0 (packed symmetric ones
/// stand for 0 too). Where scales are of least squares, each lane reads the whole group for a
/// candidate of its own, out of L1 as is expected, not measured yet.
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
  int least = -kInt4Steps;  // symmetric values

  /// -7 to 7, or 0 to 15 above the minimum.
  template <typename C>
  EIGENFORMER_DEVICE int value(C x) const {
    if (scale != scale) return 0;
    const C number = above ? x - static_cast<C>(minimum) : x,
            steps = std::rint(number / static_cast<C>(scale)),
            low = static_cast<C>(above ? 0 : least), high = static_cast<C>(above ? 15 : kInt4Steps);
    return static_cast<int>(steps > low ? (steps < high ? steps : high) : low);
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

/// One candidate of least squares for a group (problem/quantization.h): how much of the numbers its
/// values explain, and the scale and minimum that fit them.
template <typename C>
struct Int4Candidate {
  C explained, scale, minimum;

  template <typename T>
  EIGENFORMER_DEVICE static Int4Candidate of(const T* line, Index count, const Int4Group& group,
                                             int candidate) {
    const C inverse = C(1) / static_cast<C>(group.scale),
            step = inverse * problem::Int4Candidates<C>::at(candidate, group.above),
            least = static_cast<C>(group.minimum), low = group.above ? C(0) : C(-8),
            high = group.above ? C(15) : C(7), n = static_cast<C>(count);
    C total = 0, q_sum = 0, squares = 0, products = 0;
    for (Index k = 0; k < count; ++k) {
      const C z = static_cast<C>(line[k]) - least, steps = std::rint(z * step),
              q = steps > low ? (steps < high ? steps : high) : low;
      total += z;
      q_sum += q;
      squares += q * q;  // exact, as the variance
      products = std::fma(q, z, products);
    }
    const C crossed = q_sum * total,
            covariance = group.above ? std::fma(n, products, -crossed) : products,
            variance = group.above ? n * squares - q_sum * q_sum : squares,
            scale = covariance / variance;
    return {variance > C(0) ? covariance * covariance / variance : C(0), scale,
            group.above ? least + std::fma(-scale, q_sum, total) / n : C(0)};
  }
};

/// A group of extremes as one of least squares.
template <typename C, typename Block, typename T>
EIGENFORMER_DEVICE Int4Group fitted(Block& block, const T* line, Index count, Int4Group group) {
  using Candidates = problem::Int4Candidates<C>;
  static_assert(Candidates::kAbove <= kWarp && Candidates::kSymmetric <= kWarp);
  group.least = -kInt4Steps - 1;
  if (!(group.scale >= Candidates::kLeastScale && group.scale <= Candidates::kLargestScale))
    return group;
  const bool takes_part = block.lane() < Candidates::count(group.above);
  const int lane = static_cast<int>(block.lane());
  const C own = takes_part ? Int4Candidate<C>::of(line, count, group, lane).explained : C(0),
          most = reduce_warp(block, own, LargerOrNan{});
  const int best = reduce_warp(block, takes_part && own == most ? lane : kWarp, Smaller{});
  if (!(most > C(0))) return group;
  const auto found = Int4Candidate<C>::of(line, count, group, best);
  group.scale = static_cast<float>(found.scale);
  if (group.above) group.minimum = static_cast<float>(found.minimum) + 0.0f;
  return group;
}

/// The group of `count` numbers as a warp finds it for `fit`.
template <typename C, typename Block, typename T>
EIGENFORMER_DEVICE Int4Group int4_group(Block& block, const T* line, Index count, bool above,
                                        Int4Fit fit) {
  const Int4Group found = int4_group<C>(block, line, count, above);
  return fit == Int4Fit::extremes ? found : fitted<C>(block, line, count, found);
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
      const Int4Group group =
          int4_group<C>(block, p.weights + from, count, p.minimums != nullptr, p.fit);
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
  Int4Fit fit;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    for_each_warp(block, rows * groups, [&](Index at) {
      const Index row = at / groups, column = at % groups * group,
                  count = group < columns - column ? group : columns - column;
      const T* const line = weights + row * columns + column;
      const Int4Group own = int4_group<C>(block, line, count, minimums != nullptr, fit);
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
