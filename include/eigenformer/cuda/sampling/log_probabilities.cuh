/// \file
/// Log-probabilities, ranks and best tokens of a row, by a block, as in
/// cpu/sampling/log_probabilities.h.
#pragma once

#include <cmath>

#include "filters.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Log of the sum of the weights in play: log(1 + rest), where the first of the best is left out of
/// the rest.
template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE double log_sum_weights(Block& block, const Arrays& arrays,
                                          const SamplingRow<T>& row) {
  const Index best = nth_equal(block, arrays, row, row.band.hi, 1);
  return std::log1p(sum_in_order(block, arrays.sums, row.vocab, [&](Index t, Index apart) {
    FourWeights four = row.weights(t, apart);
    for (int k = 0; k < FourWeights::kCount; ++k)
      if (t + k * apart == best) four.values[k] = 0;
    return four;
  }));
}

/// Log of the probability of one token in a filtered distribution, from the log of the sum of its
/// weights.
template <typename T>
EIGENFORMER_DEVICE float log_probability(const SamplingRow<T>& row, Index token, double log_total) {
  const auto logit = row.at(token);
  if (!row.band.contains(logit, token)) return -std::numeric_limits<float>::infinity();
  return static_cast<float>((static_cast<double>(logit) - static_cast<double>(row.band.hi)) *
                                row.inverse_temperature -
                            log_total);
}

/// put(place, token), by whatever thread, for the `count` tokens of largest logit, equals by index:
/// places in no order. -infinity is a logit like others.
template <typename Block, typename Arrays, typename T, typename Put>
EIGENFORMER_DEVICE void gather_best(Block& block, const Arrays& arrays, SamplingRow<T> row,
                                    Index count, Put put) {
  row.band.lo = -std::numeric_limits<compute_type<T>>::infinity();
  row.band.lo_end = row.vocab;
  keep_top_k(block, arrays, row, count, TopKTies::lowest_index);
  if (block.thread() == 0) arrays.place.store(0, 0);
  block.barrier();
  for_each_logit(block, row, [&](Index t, auto x) {
    if (row.band.contains(x, t)) put(static_cast<Index>(arrays.place.add(0, 1u)), t);
  });
  block.barrier();
}

/// What one row says of its distribution before the filters, `raw`, and after them, `row`, from
/// which `id` was drawn.
template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void write_log_probabilities(Block& block, const Arrays& arrays,
                                                const SamplingRow<T>& raw,
                                                const SamplingRow<T>& row, Index r, std::int32_t id,
                                                const problem::LogProbabilityOutputs& out) {
  const double log_processed = log_sum_weights(block, arrays, row),
               log_raw = log_sum_weights(block, arrays, raw);
  const auto own = raw.at(id);
  const Index above = count_tokens(block, arrays, raw, [&](Index, auto x) { return x > own; });
  if (block.thread() == 0) {
    out.raw[r] = log_probability(raw, id, log_raw);
    out.processed[r] = log_probability(row, id, log_processed);
    out.rank[r] = static_cast<std::int32_t>(1 + above);
  }
  if (out.best == 0) return;
  std::int32_t* const ids = out.best_ids + r * out.best;
  gather_best(block, arrays, raw, out.best,
              [&](Index place, Index token) { ids[place] = static_cast<std::int32_t>(token); });
  sort_block(block, ids, out.best, [&](std::int32_t a, std::int32_t b) {
    const auto xa = raw.at(a), xb = raw.at(b);
    return xa > xb || (xa == xb && a < b);
  });
  for (Index i = block.thread(); i < out.best; i += block.size()) {
    out.best_raw[r * out.best + i] = log_probability(raw, ids[i], log_raw);
    out.best_processed[r * out.best + i] = log_probability(row, ids[i], log_processed);
  }
}

/// A row that is not ok.
template <typename Block>
EIGENFORMER_DEVICE void write_no_log_probabilities(Block& block, Index r,
                                                   const problem::LogProbabilityOutputs& out) {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  if (block.thread() == 0) {
    out.raw[r] = out.processed[r] = nan;
    out.rank[r] = -1;
  }
  for (Index i = r * out.best + block.thread(); i < (r + 1) * out.best; i += block.size()) {
    out.best_ids[i] = -1;
    out.best_raw[i] = out.best_processed[i] = nan;
  }
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
