/// \file
/// CUDA kernel of INT8 quantization by row or group: one block per scale, one pass for the largest
/// magnitude and one that divides, rounds and writes: two reads and a quarter of a write, the
/// second read out of L2 for rows that fit. The numbers are those of the CPU kernel, bit for bit.
/// A group of 32 leaves most threads of its block idle.
#pragma once

#include "../problem/quantization.h"
#include "block.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// The larger one; NaN where one is NaN, so that a row with a bad weight is seen.
struct LargestOrNan {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a != a || b != b ? a + b : (a > b ? a : b);
  }
};

template <typename T>
struct QuantizeBody {
  problem::Quantize<T> p;
  Index groups;  // of a row

  __device__ void operator()(Index at) const {  // at: of the scale
    using C = compute_type<T>;
    const Index column = at % groups * p.group, begin = at / groups * p.columns + column;
    const Index count = p.group < p.columns - column ? p.group : p.columns - column;
    const T* weights = p.weights + begin;
    C largest = 0;
    for (Index j = threadIdx.x; j < count; j += kRowThreads)
      largest = LargestOrNan{}(largest, static_cast<C>(fabs(static_cast<C>(weights[j]))));
    largest = reduce_block(largest, LargestOrNan{});
    float scale = largest == C(0) ? 1.0f : static_cast<float>(largest / C(127));
    if (scale == 0.0f) scale = 1.40129846e-45f;  // the smallest float, as on the CPU
    // infinite or NaN: the host could not throw in time, so the scale says it
    const bool bad = !(scale < 3.402823466e+38f);
    if (threadIdx.x == 0) p.scales[at] = bad ? __int_as_float(0x7fc00000) : scale;
    for (Index j = threadIdx.x; j < count; j += kRowThreads) {
      const C quotient = rint(static_cast<C>(weights[j]) / static_cast<C>(scale));
      p.values[begin + j] =
          bad ? std::int8_t{0}
              : static_cast<std::int8_t>(
                    quotient < C(-127) ? C(-127) : (quotient > C(127) ? C(127) : quotient));
    }
  }
};

/// Rows, or groups, with NaN or infinity get the scale NaN and zeros.
template <typename T>
bool execute(const Backend& on, const problem::Quantize<T>& p) {
  const Index groups = p.group == 0 ? 1 : p.groups();  // a row without columns has a scale, 1
  launch_rows(on.device, "quantize_weights_int8", p.rows * groups, QuantizeBody<T>{p, groups});
  return true;
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
