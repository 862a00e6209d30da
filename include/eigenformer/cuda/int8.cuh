/// \file
/// The arithmetic of symmetric INT8 in kernels, that of cpu/vector/quantize_line.h bit for bit.
/// The host could not throw in time: the scale of numbers that have none is NaN, their values 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "collectives.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// The scale of numbers whose largest magnitude this is: NaN where it is infinite or NaN.
template <typename C>
EIGENFORMER_HOST_DEVICE float int8_scale(C largest) {
  using Limits = std::numeric_limits<float>;
  if (largest == C(0)) return 1.0f;
  const float scale = static_cast<float>(largest / C(127));
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

/// The largest magnitude of a line, this one of `threads`: NaN where one is NaN.
template <typename C, typename T>
EIGENFORMER_DEVICE C magnitude(const T* line, Index count, Index thread, Index threads) {
  C largest = 0;
  for (Index j = thread; j < count; j += threads)
    largest = LargerOrNan{}(largest, std::fabs(static_cast<C>(line[j])));
  return largest;
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
