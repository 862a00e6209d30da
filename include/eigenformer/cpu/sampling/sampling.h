/// \file
/// CPU kernels of sampling. A worker takes whole rows. Each row is scanned once (the maximum of
/// every block of 128 tokens; one streaming read), filtered (filters.h), and drawn from by
/// the inverse of its cumulative distribution in token order. Greedy is the scan and one block.
/// Top-k reads beyond the scan only the blocks whose maximum reaches the k-th largest block
/// maximum; a draw without top-k adds one exponential per token in double, about 1 ns each.
#pragma once

#include "../../core/workspace.h"
#include "../../problem/sampling.h"
#include "../backend.h"
#include "filters.h"
#include "logits.h"
#include "stages.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename T>
struct SamplingNeeds {
  bool adjusted = false, penalties = false;
  explicit SamplingNeeds(const problem::Sampling<T>& p) {
    const Index sets = p.params_stride == 0 ? std::min<Index>(1, p.batch) : p.batch;
    for (Index i = 0; i < sets; ++i) {
      adjusted = adjusted || adjusts_logits(p.params[i]);
      penalties = penalties || has_penalties(p.params[i]);
    }
  }
};

/// The scratch of `workers` workers for rows of `vocab` tokens.
template <typename C>
SamplingScratch<C>* take_sampling_scratch(Workspace::Frame& frame, int workers, Index vocab,
                                          bool adjusted, bool penalties) {
  auto* scratch = frame.take<SamplingScratch<C>>(workers);
  const Index blocks = (vocab + SamplingBlock::size - 1) / SamplingBlock::size;
  for (int w = 0; w < workers; ++w) {
    scratch[w].block_max = frame.take<C>(blocks);
    scratch[w].block_sum = frame.take<double>(blocks);
    scratch[w].candidates = frame.take<C>(vocab);
    scratch[w].bin_sum = frame.take<double>(SelectionLimits::bins * SelectionLimits::ways);
    scratch[w].adjusted = adjusted ? frame.take<C>(vocab) : nullptr;
    scratch[w].counts = penalties ? frame.take<std::int32_t>(vocab) : nullptr;
  }
  return scratch;
}

/// Calls visit(r, row, status, scratch) for every row of the batch, `row` filtered where the status
/// is ok.
template <typename D, typename Isa, typename T, typename Visit>
void for_each_distribution(const Backend<D, Isa>& on, const problem::Sampling<T>& p, Visit visit) {
  if (p.batch == 0) return;  // no scratch for a vocabulary that has no row
  using C = compute_type<T>;
  Workspace::Frame frame(on.workspace);
  const SamplingNeeds<T> needs(p);
  const auto* scratches =
      take_sampling_scratch<C>(frame, worker_count(on), p.vocab, needs.adjusted, needs.penalties);
  parallel_for(on, p.batch, Cost{p.vocab}, [&](Index first, Index last, int worker) {
    const SamplingScratch<C>& scratch = scratches[worker];
    for (Index r = first; r < last; ++r) {
      const problem::RowParams& params = p.params_of(r);
      SamplingRow<T> row{p.logits + r * p.vocab, p.vocab, scratch.block_max, {}, 1.0};
      SampleStatus status = scan_row<Isa>(row);
      if (status != SampleStatus::ok || !adjusts_logits(params)) {
        if (status == SampleStatus::ok) apply_filters<Isa>(row, params, p.excludes(r), scratch);
        visit(r, row, status, scratch);
        continue;
      }
      adjust_logits<Isa>(p, r, scratch);
      SamplingRow<C> adjusted{scratch.adjusted, p.vocab, scratch.block_max, {}, 1.0};
      status = scan_row<Isa>(adjusted);
      if (status == SampleStatus::ok) apply_filters<Isa>(adjusted, params, p.excludes(r), scratch);
      visit(r, adjusted, status, scratch);
    }
  });
}

/// The token at which the running sum of weights, in token order, passes u times their total. u in
/// (0, 1).
template <typename Isa, typename T>
std::int32_t draw_token(const SamplingRow<T>& row, double u,
                        const SamplingScratch<compute_type<T>>& scratch) {
  const double target = u * sum_weights<Isa>(row, scratch.block_sum);
  double before = 0;
  Index block = -1;
  for (Index b = 0; b < row.blocks(); ++b) {
    if (scratch.block_sum[b] == 0) continue;
    if (block >= 0) before += scratch.block_sum[block];
    block = b;
    if (before + scratch.block_sum[b] > target) break;
  }
  alignas(64) compute_type<T> x[SamplingBlock::size];
  alignas(64) double weights[SamplingBlock::size];
  load_block<Isa>(row.logits, row.vocab, block, x);
  member_weights<Isa>(x, block, row.band, row.inverse_temperature, weights);
  // rounding may leave the sum just below the target: then the last token of positive weight
  Index drawn = -1;
  for (Index j = 0; j < SamplingBlock::size; ++j) {
    if (weights[j] == 0) continue;
    drawn = j;
    before += weights[j];
    if (before > target) break;
  }
  return static_cast<std::int32_t>(block * SamplingBlock::size + drawn);
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::Sampling<T>& p) {
  for_each_distribution(
      on, p, [&](Index r, const auto& row, SampleStatus status, const auto& scratch) {
        p.finish(r, status == SampleStatus::ok ? draw_token<Isa>(row, p.uniform(r), scratch) : -1,
                 status);
      });
}

/// Greedy scans in lines of 1024 tokens, an eighth of the reductions of a block, and looks for the
/// token in one of them.
template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::GreedySampling<T>& p) {
  if (p.batch == 0) return;
  using C = compute_type<T>;
  constexpr Index line = 8 * SamplingBlock::size;
  Workspace::Frame frame(on.workspace);
  const Index lines = (p.vocab + line - 1) / line;
  C* maxima =
      frame.take<C>(detail::checked_product(worker_count(on), lines, "greedy_sample", "scratch"));
  parallel_for(on, p.batch, Cost{p.vocab, kReadCycles}, [&](Index first, Index last, int worker) {
    C* const most = maxima + worker * lines;
    for (Index r = first; r < last; ++r) {
      const T* const logits = p.logits + r * p.vocab;
      C hi;
      const SampleStatus status = scan_maxima<Isa, line>(logits, p.vocab, most, hi);
      Index token = -1;
      if (status == SampleStatus::ok)
        token =
            find_equal<Isa>(logits, (std::find(most, most + lines, hi) - most) * line, p.vocab, hi);
      p.finish(r, static_cast<std::int32_t>(token), status);
    }
  });
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::SamplingProbabilities<T>& request) {
  const auto& p = request.sampling;
  for_each_distribution(
      on, p, [&](Index r, const auto& row, SampleStatus status, const auto& scratch) {
        float* out = request.probabilities + r * p.vocab;
        std::fill(out, out + p.vocab, 0.0f);
        p.finish(r, -1, status);
        if (status != SampleStatus::ok) return;
        const double total = sum_weights<Isa>(row, scratch.block_sum);
        alignas(64) double weights[SamplingBlock::size];
        for_each_block<Isa>(row, row.band.lo, [&](Index block, const auto* x) {
          member_weights<Isa>(x, block, row.band, row.inverse_temperature, weights);
          const Index begin = block * SamplingBlock::size,
                      count = (std::min)(SamplingBlock::size, p.vocab - begin);
          for (Index j = 0; j < count; ++j) out[begin + j] = static_cast<float>(weights[j] / total);
        });
      });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
