/// \file
/// CPU kernels of log-probabilities: beside the draw of sampling.h the log-softmax of the logits as
/// they came, of the drawn token and of the best n (one more scan of the row and one exponential a
/// token); and the log-probability of a given token.
#pragma once

#include "sampling.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Log of the sum of the weights in play, to a relative error of 1e-15 also where one token has
/// nearly all of it: log(1 + rest), where a token of weight 1, the best, is left out of the rest.
template <typename Isa, typename T>
double log_sum_weights(const SamplingRow<T>& row) {
  alignas(64) double weights[SamplingBlock::size];
  double rest = 0;
  bool best_left_out = false;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const auto* x) {
    member_weights<Isa>(x, block, row.band, row.inverse_temperature, weights);
    for (Index j = 0; j < SamplingBlock::size && !best_left_out; ++j)
      if (weights[j] == 1.0) {
        weights[j] = 0;
        best_left_out = true;
      }
    rest += block_sum(weights);
  });
  return std::log1p(rest);
}

/// Log of the probability of one token in a filtered distribution, from the log of the sum of its
/// weights.
template <typename T>
float log_probability(const SamplingRow<T>& row, Index token, double log_total) {
  const auto logit = logit_at(row, token);
  if (!row.band.contains(logit, token)) return -std::numeric_limits<float>::infinity();
  return static_cast<float>((static_cast<double>(logit) - static_cast<double>(row.band.hi)) *
                                row.inverse_temperature -
                            log_total);
}

/// Fills `ids` with the `count` tokens of largest logit, best first, equals by index. Leaves the
/// band closed around them.
template <typename Isa, typename T>
void best_tokens(SamplingRow<T>& row, Index count, std::int32_t* ids,
                 const SamplingScratch<compute_type<T>>& scratch) {
  // here a banned token counts: it is among the best of few
  row.band.lo = -std::numeric_limits<compute_type<T>>::infinity();
  keep_top_k<Isa>(row, count, TopKTies::lowest_index, scratch);
  Index n = 0;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const auto* x) {
    for (Index j = 0; j < SamplingBlock::size && block * SamplingBlock::size + j < row.vocab; ++j)
      if (row.band.contains(x[j], block * SamplingBlock::size + j))
        ids[n++] = static_cast<std::int32_t>(block * SamplingBlock::size + j);
  });
  std::sort(ids, ids + n, [&](std::int32_t a, std::int32_t b) {
    const auto xa = row.logits[a], xb = row.logits[b];
    return xa > xb || (xa == xb && a < b);
  });
}

template <typename Isa, typename T>
Index count_above(const SamplingRow<T>& row, compute_type<T> value) {
  Index above = 0;
  for_each_block<Isa>(row, value, [&](Index, const auto* x) {
    for (Index j = 0; j < SamplingBlock::size; ++j) above += x[j] > value;
  });
  return above;
}

/// The part of one row that looks at its raw logits. processed(token) is the log-probability in the
/// filtered distribution.
template <typename Isa, typename T, typename Processed>
void write_log_probabilities(SamplingRow<T> raw, Index r, std::int32_t id,
                             const problem::LogProbabilityOutputs& out,
                             const SamplingScratch<compute_type<T>>& scratch, Processed processed) {
  scan_row<Isa>(raw);
  const SamplingRow<T> all = raw;
  const double log_total = log_sum_weights<Isa>(all);
  out.raw[r] = log_probability(all, id, log_total);
  out.processed[r] = processed(id);
  out.rank[r] = static_cast<std::int32_t>(
      1 + count_above<Isa>(raw, static_cast<compute_type<T>>(raw.logits[id])));
  if (out.best == 0) return;
  best_tokens<Isa>(raw, out.best, out.best_ids + r * out.best, scratch);
  for (Index i = r * out.best; i < (r + 1) * out.best; ++i) {
    out.best_raw[i] = log_probability(all, out.best_ids[i], log_total);
    out.best_processed[i] = processed(out.best_ids[i]);
  }
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::SampleWithLogProbabilities<T>& request) {
  const auto& p = request.sampling;
  const auto& out = request.outputs;
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  for_each_distribution(
      on, p, [&](Index r, const auto& row, SampleStatus status, const auto& scratch) {
        if (status != SampleStatus::ok) {
          p.finish(r, -1, status);
          out.raw[r] = out.processed[r] = nan;
          out.rank[r] = -1;
          std::fill(out.best_ids + r * out.best, out.best_ids + (r + 1) * out.best, -1);
          std::fill(out.best_raw + r * out.best, out.best_raw + (r + 1) * out.best, nan);
          std::fill(out.best_processed + r * out.best, out.best_processed + (r + 1) * out.best,
                    nan);
          return;
        }
        const std::int32_t id = draw_token<Isa>(row, p.uniform(r), scratch);
        p.finish(r, id, status);
        const double log_total = log_sum_weights<Isa>(row);
        const SamplingRow<T> raw{p.logits + r * p.vocab, p.vocab, scratch.block_max, {}, 1.0};
        write_log_probabilities<Isa>(raw, r, id, out, scratch, [&](Index token) {
          return log_probability(row, token, log_total);
        });
      });
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::LogProbabilitiesOf<T>& request) {
  const auto& p = request.sampling;
  const std::int32_t* const tokens = request.tokens;
  float* const out = request.output;
  for_each_distribution(on, p, [&](Index r, const auto& row, SampleStatus status, const auto&) {
    if (tokens[r] < 0) {
      out[r] = 0;
      p.finish(r, -1, SampleStatus::ok);
      return;
    }
    out[r] = status == SampleStatus::ok ? log_probability(row, tokens[r], log_sum_weights<Isa>(row))
                                        : std::numeric_limits<float>::quiet_NaN();
    p.finish(r, -1, status);
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
