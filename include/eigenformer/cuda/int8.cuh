/// \file
/// The arithmetic of symmetric INT8 in kernels, that of cpu/vector/quantize_line.h bit for bit.
/// The host could not throw in time: the scale of numbers that have none is NaN, their values 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "collectives.cuh"
#include "packs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// The scale of numbers whose largest magnitude this is: NaN where it is infinite or NaN. Steps:
/// the largest value, 7 for INT4.
template <typename C>
EIGENFORMER_HOST_DEVICE float int8_scale(C largest, int steps = 127) {
  using Limits = std::numeric_limits<float>;
  if (largest == C(0)) return 1.0f;
  const float scale = static_cast<float>(largest / static_cast<C>(steps));
  if (scale == 0.0f) return Limits::denorm_min();  // the quotient rounds to 0
  return scale <= (Limits::max)() ? scale : Limits::quiet_NaN();
}

/// A number by such a scale. Only denormal scales need the clamp.
template <typename C>
EIGENFORMER_DEVICE std::int8_t int8_value(C x, float scale) {
  if (scale != scale) return 0;
  const C quotient = std::rint(x / static_cast<C>(scale));
  return static_cast<std::int8_t>(quotient < C(-127) ? C(-127)
                                                     : (quotient > C(127) ? C(127) : quotient));
}

/// Elements of a pack where a warp takes a line: divisions are the work, and lines of 128 elements
/// give all lanes some.
inline constexpr int kInt8WarpWidth = 4;

/// The largest magnitude of a line, this one of `threads`: NaN where one is NaN.
template <typename C, int Width = 0, typename T>
EIGENFORMER_DEVICE C magnitude(const T* line, Index count, Index thread, Index threads) {
  C largest = 0;
  for_each_pack_of_line(
      WidthOf<(Width > 0 ? Width : pack_width<T>)>{}, thread, threads, count,
      [&]<int N>(WidthOf<N>, Index j) {
        const auto numbers = load_pack<C, N>(line + j);
        for (int i = 0; i < N; ++i) largest = LargerOrNan{}(largest, std::fabs(numbers[i]));
      },
      line);
  return largest;
}

/// Values of a line by such a scale, those of this one of `threads`.
template <typename C, int Width = pack_width<std::int8_t>, typename T>
EIGENFORMER_DEVICE void quantize_line(const T* line, std::int8_t* values, Index count, float scale,
                                      Index thread, Index threads) {
  for_each_pack_of_line(
      WidthOf<Width>{}, thread, threads, count,
      [&]<int N>(WidthOf<N>, Index j) {
        const auto numbers = load_pack<C, N>(line + j);
        Pack<std::int8_t, N> results;
        for (int i = 0; i < N; ++i) results[i] = int8_value(numbers[i], scale);
        store_pack<N>(results, values + j);
      },
      line, static_cast<const std::int8_t*>(values));
}

/// The same by a scale for each of them; zeros where the line is bad.
template <typename C, int Width = pack_width<std::int8_t>, typename T>
EIGENFORMER_DEVICE void quantize_line(const T* line, std::int8_t* values, Index count,
                                      const float* scales, bool bad, Index thread, Index threads) {
  for_each_pack_of_line(
      WidthOf<Width>{}, thread, threads, count,
      [&]<int N>(WidthOf<N>, Index j) {
        const auto numbers = load_pack<C, N>(line + j);
        Pack<std::int8_t, N> results;
        for (int i = 0; i < N; ++i)
          results[i] = bad ? std::int8_t{0} : int8_value(numbers[i], scales[j + i]);
        store_pack<N>(results, values + j);
      },
      line, static_cast<const std::int8_t*>(values));
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
