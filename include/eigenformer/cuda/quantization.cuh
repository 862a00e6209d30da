/// \file
/// CUDA kernel of INT8 quantization by row or group: one block per scale, one pass for the largest
/// magnitude and one that divides, rounds and writes: two reads and a quarter of a write, the
/// second read out of L2 for rows that fit. The numbers are those of the CPU kernel, bit for bit.
/// A group of 32 leaves most threads of its block idle.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../problem/quantization.h"
#include "collectives.cuh"
#include "launch.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
struct QuantizeKernel {
  using C = compute_type<T>;
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp;
  problem::Quantize<T> p;
  Index groups;  // of a row

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = block.template shared<C>(kWarps);
    for (Index at = block.index(); at < p.rows * groups; at += block.count())
      quantize(block, scratch, at);
  }

 private:
  template <typename Block, typename Scratch>
  EIGENFORMER_DEVICE void quantize(Block& block, const Scratch& scratch, Index at) const {
    const Index column = at % groups * p.group, begin = at / groups * p.columns + column;
    const Index count = p.group < p.columns - column ? p.group : p.columns - column;
    const T* weights = p.weights + begin;
    C largest = 0;
    for (Index j = block.thread(); j < count; j += block.size())
      largest = LargerOrNan{}(largest, std::fabs(static_cast<C>(weights[j])));
    largest = reduce_block(block, scratch, largest, LargerOrNan{});
    using Limits = std::numeric_limits<float>;
    float scale = largest == C(0) ? 1.0f : static_cast<float>(largest / C(127));
    if (scale == 0.0f) scale = Limits::denorm_min();  // as on the CPU
    // infinite or NaN: the host could not throw in time, so the scale says it
    const bool bad = !(scale <= (Limits::max)());
    if (block.thread() == 0) p.scales[at] = bad ? Limits::quiet_NaN() : scale;
    for (Index j = block.thread(); j < count; j += block.size()) {
      const C quotient = std::rint(static_cast<C>(weights[j]) / static_cast<C>(scale));
      p.values[begin + j] =
          bad ? std::int8_t{0}
              : static_cast<std::int8_t>(
                    quotient < C(-127) ? C(-127) : (quotient > C(127) ? C(127) : quotient));
    }
  }
};

/// Rows, or groups, with NaN or infinity get the scale NaN and zeros.
template <typename D, typename T>
bool execute(const Backend<D>& on, const problem::Quantize<T>& p) {
  using Kernel = QuantizeKernel<T>;
  const Index groups = p.group == 0 ? 1 : p.groups();  // a row without columns has a scale, 1
  launch_rows(on, "quantize_weights_int8", p.rows * groups,
              shared_bytes<typename Kernel::C>(Kernel::kWarps), Kernel{p, groups});
  return true;
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
