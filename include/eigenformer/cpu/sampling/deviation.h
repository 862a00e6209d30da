/// \file
/// The standard deviation of logits by sums in float with a bound on their error, for top-n-sigma:
/// one pass instead of two in double, 9 us instead of 105 for 128256 tokens.
#pragma once

#include <optional>

#include "moments.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Sums over tokens in play of u and u^2, u a logit's distance from `middle`.
template <typename V>
struct DeviationSums {
  static constexpr int blocks_at_once = 16;  // after which floats are added to doubles
  // additions in a row, and the roundings of u, of u^2 and its sum
  static constexpr double error =
      (SamplingBlock::size / V::lanes / 2 + blocks_at_once + 1 + 3) * 0x1p-24;

  LaneTotals<V> first, square;
  Index count = 0;
  V some_first = V::zero(), some_square = V::zero();
  int blocks = 0;

  EIGENFORMER_INLINE void add(const float* x, V middle) {
    const V lowest = V::set1(std::numeric_limits<float>::lowest());
    V u_sums[2] = {V::zero(), V::zero()}, square_sums[2] = {V::zero(), V::zero()};
    BlockBits in_play;
    EIGENFORMER_UNROLL
    for (Index i = 0; i < SamplingBlock::size; i += 2 * V::lanes)
      for (int k = 0; k < 2; ++k) {
        const V v = V::load(x + i + k * V::lanes);
        const auto is_in = less_equal(lowest, v);
        in_play.add(i + k * V::lanes, is_in.bits());
        const V u = select(is_in, v - middle, V::zero());
        u_sums[k] = u_sums[k] + u;
        square_sums[k] = fma(u, u, square_sums[k]);
      }
    count += in_play.count();
    some_first = some_first + (u_sums[0] + u_sums[1]);
    some_square = some_square + (square_sums[0] + square_sums[1]);
    if (++blocks == blocks_at_once) flush();
  }
  void flush() {
    first.add(some_first), square.add(some_square);
    some_first = some_square = V::zero();
    blocks = 0;
  }
};

/// The mean of the tokens in play of the first block that has any.
template <typename Isa, typename T>
float mean_of_some(const SamplingRow<T>& row) {
  alignas(64) float buffer[SamplingBlock::size];
  for (Index block = 0; block < row.blocks(); ++block) {
    const float* const x = in_play_logits<Isa>(row, block, buffer);
    double sum = 0;
    int count = 0;
    for (Index j = 0; j < SamplingBlock::size; ++j)
      if (x[j] >= std::numeric_limits<float>::lowest()) sum += static_cast<double>(x[j]), ++count;
    if (count > 0) return static_cast<float>(sum / count);
  }
  return row.band.hi;
}

/// The standard deviation of the logits in play.
template <typename Isa, typename T>
Bounded deviation_of_logits(const SamplingRow<T>& row) {
  using Sums = DeviationSums<simd::Vec<float, Isa>>;
  const auto middle = simd::Vec<float, Isa>::set1(mean_of_some<Isa>(row));
  const RowSlices slices(row.blocks());
  Sums sums[RowSlices::most];
  for_slices_in_play<Isa>(row, 3 * kReadCycles, [&](Index first, Index last) {
    alignas(64) float buffer[SamplingBlock::size];
    for (Index s = first; s < last; ++s) {
      for_each_block_index<Isa>(
          row, slices.begin(s), slices.begin(s + 1), row.band.lo,
          [&](Index block) { sums[s].add(in_play_logits<Isa>(row, block, buffer), middle); });
      sums[s].flush();
    }
  });
  double first = 0, square = 0, count = 0;
  for (Index s = 0; s < slices.count(); ++s) {
    first += sums[s].first.sum();
    square += sums[s].square.sum();
    count += static_cast<double>(sums[s].count);
  }
  // the mean is wrong by `error` of the root of the mean square, by Cauchy and Schwarz
  const double mean = first / count, mean_square = square / count,
               variance = mean_square - mean * mean,
               error = 3.1 * (Sums::error * mean_square + 1e-37),
               least = std::sqrt((std::max)(variance - error, 0.0)),
               most = std::sqrt(variance + error);
  return {(least + most) / 2, (most - least) / 2 + 1e-14 * most};
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
