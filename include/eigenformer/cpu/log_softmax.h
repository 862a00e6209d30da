/// \file
/// CPU kernel of log-softmax: a row is scanned for the maxima of its blocks of 128, its weights are
/// summed, and the differences are written: three reads of a row, of which the first comes from
/// memory where the row fits the second-level cache.
///
/// The weights of narrow rows are computed in float (relative error below 1.2e-7, most of it
/// rounding, which cancels in a sum) and added in 16 lanes, 8 to a lane, then in double: the same
/// additions on every ISA. Only in the block of the greatest they are doubles, and that one is left
/// out: log1p takes the rest. Measured on Zen 5, 128256 floats: 38 us, of which one pass of float
/// exponentials is 10; with weights in double 187.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../core/workspace.h"
#include "../problem/log_softmax.h"
#include "backend.h"
#include "sampling/log_probabilities.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// The sum of exp(x - best) over a block.
template <typename V, typename T>
double sum_block_exponentials(const T* x, V best) {
  constexpr int lanes = 16, ways = lanes / V::lanes;
  static_assert(lanes % V::lanes == 0);
  V sums[ways];
  for (V& sum : sums) sum = V::zero();
  for (Index i = 0; i < SamplingBlock::size; i += lanes)
    for (int k = 0; k < ways; ++k)
      sums[k] = sums[k] + simd::exp(V::load(x + i + k * V::lanes) - best);
  alignas(64) float each[lanes];
  for (int k = 0; k < ways; ++k) sums[k].store(each + k * V::lanes);
  double total[lanes / 2];
  for (int k = 0; k < lanes / 2; ++k)
    total[k] = static_cast<double>(each[k]) + static_cast<double>(each[k + lanes / 2]);
  return ((total[0] + total[4]) + (total[2] + total[6])) +
         ((total[1] + total[5]) + (total[3] + total[7]));
}

/// The weights of the block that holds the greatest, but for that one.
inline double sum_beside_best(const float* x, double best) {
  double sum = 0;
  bool left_out = false;
  for (Index j = 0; j < SamplingBlock::size; ++j) {
    const double own = static_cast<double>(x[j]);
    if (own == best && !left_out)
      left_out = true;
    else
      sum += token_weight(own, best, 1.0);
  }
  return sum;
}

/// The log of the sum of exp(x - max x) over a scanned row. `sums` is scratch, (blocks).
template <typename Isa, typename T>
double log_sum_exponentials(const SamplingRow<T>& row, double* sums) {
  using C = compute_type<T>;
  if constexpr (std::is_same_v<C, double>) {
    return log_sum_weights<Isa>(row);
  } else {
    using V = simd::Vec<float, Isa>;
    const V best = V::set1(row.band.hi);
    const float least = row.band.hi - 104.0f;  // below, exp is 0
    const Index full = row.vocab / SamplingBlock::size, blocks = row.blocks(),
                with_best =
                    std::find(row.block_max, row.block_max + blocks, row.band.hi) - row.block_max;
    const RowSlices slices(blocks);
    std::fill(sums, sums + blocks, 0.0);
    for_slices(row.pool, slices, blocks, kExpCycles, [&](Index first, Index last) {
      alignas(64) float x[SamplingBlock::size];
      for (Index block = slices.begin(first); block < slices.begin(last); ++block) {
        if (row.block_max[block] < least) continue;
        const bool has_best = block == with_best;
        if (has_best || block == full) load_block<Isa>(row.logits, row.vocab, block, x);
        sums[block] = has_best ? sum_beside_best(x, static_cast<double>(row.band.hi))
                      : block == full
                          ? sum_block_exponentials(x, best)
                          : sum_block_exponentials(row.logits + block * SamplingBlock::size, best);
      }
    });
    double rest = 0;
    for (Index block = 0; block < blocks; ++block) rest += sums[block];
    return std::log1p(rest);
  }
}

/// Writes the logits less `best` and `log_sum`, blocks [begin, end). By blocks of a size that the
/// compiler knows: then it makes vectors of the doubles.
template <typename Isa, typename Y, typename T>
void write_differences(const SamplingRow<T>& row, Y* y, Index begin, Index end, double best,
                       double log_sum) {
  alignas(64) compute_type<T> from[SamplingBlock::size];
  alignas(64) Y to[SamplingBlock::size];
  for (Index block = begin; block < end; ++block) {
    const Index at = block * SamplingBlock::size;
    load_block<Isa>(row.logits, row.vocab, block, from);
    for (Index j = 0; j < SamplingBlock::size; ++j)
      to[j] = static_cast<Y>((static_cast<double>(from[j]) - best) - log_sum);
    eigenformer::detail::copy_elements(to, y + at, (std::min)(SamplingBlock::size, row.vocab - at));
  }
}

template <typename Isa, typename Y, typename T>
void log_softmax_row(SamplingRow<T> row, Y* y, double* sums) {
  if (scan_row<Isa>(row) != SampleStatus::ok) {
    std::fill(y, y + row.vocab, std::numeric_limits<Y>::quiet_NaN());
    return;
  }
  const double best = static_cast<double>(row.band.hi),
               log_sum = log_sum_exponentials<Isa>(row, sums);
  const RowSlices slices(row.blocks());
  for_slices(row.pool, slices, row.blocks(), kMoveCycles, [&](Index first, Index last) {
    write_differences<Isa>(row, y, slices.begin(first), slices.begin(last), best, log_sum);
  });
}

template <typename D, typename Isa, typename Y, typename T>
void execute(const Backend<D, Isa>& on, const problem::LogSoftmax<Y, T>& p) {
  if (p.rows == 0) return;
  using C = compute_type<T>;
  Workspace::Frame frame(on.workspace);
  const Index blocks = (p.columns + SamplingBlock::size - 1) / SamplingBlock::size,
              count = detail::checked_product(worker_count(on), blocks, "log_softmax", "scratch");
  C* const maxima = frame.take<C>(count);
  double* const sums = frame.take<double>(count);
  const Eigen::ThreadPoolDevice* const pool = pool_of_rows(on.device, p.rows, p.columns);
  const Cost cost{p.columns, kExpCycles};
  for_rows(on, pool, p.rows, cost, [&](Index first, Index last, int worker) {
    for (Index r = first; r < last; ++r) {
      const Index columns = p.columns;
      log_softmax_row<Isa>(
          SamplingRow<T>{
              p.x + r * columns, columns, maxima + worker * blocks, {}, 1.0, nullptr, pool},
          p.y + r * columns, sums + worker * blocks);
    }
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
