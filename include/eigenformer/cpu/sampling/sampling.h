/// \file
/// CPU kernels of sampling. A worker takes whole rows; where rows are few and long, threads share
/// the passes over each (slices.h). A row is scanned once (the maximum of every block of 128
/// tokens; one streaming read), filtered (filters.h), and drawn from by the inverse of its
/// cumulative distribution in token order. Greedy is the scan and one block. Top-k reads beyond the
/// scan only the blocks whose maximum reaches about the k-th largest block maximum; a draw without
/// top-k adds one exponential per token, in float where logits are (bulk.h).
#pragma once

#include "../../core/row_function.h"
#include "../../core/workspace.h"
#include "../../problem/sampling.h"
#include "../backend.h"
#include "filters.h"
#include "logits.h"
#include "stages.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// What rows need beside the scratch that all have.
struct SamplingNeeds {
  Index changes = -1;  // at most so many tokens that stages change; -1: no stage changes any

  SamplingNeeds() = default;
  SamplingNeeds(const problem::RowParams* params, Index stride, Index rows, Index vocab) {
    const Index sets = stride == 0 ? std::min<Index>(1, rows) : rows;
    for (Index i = 0; i < sets; ++i)
      if (adjusts_logits(params[i])) changes = (std::max)(changes, most_changes(params[i], vocab));
  }
};

/// The scratch of changes, of which the logits are in `logits`.
template <typename C>
LogitChanges<C> take_changes(Workspace::Frame& frame, Index capacity, Index blocks, C* logits) {
  return {frame.take<ChangedLogit<C>>(capacity),
          frame.take<std::int32_t>(LogitChanges<C>::places_for(capacity)),
          frame.take<std::int32_t>(blocks),
          logits,
          frame.take<std::int32_t>(capacity),
          capacity};
}

/// The scratch of `workers` workers for rows of `vocab` tokens.
template <typename C>
SamplingScratch<C>* take_sampling_scratch(Workspace::Frame& frame, int workers, Index vocab,
                                          const SamplingNeeds& needs) {
  auto* scratch = frame.take<SamplingScratch<C>>(workers);
  const Index blocks = (vocab + SamplingBlock::size - 1) / SamplingBlock::size;
  for (int w = 0; w < workers; ++w) {
    scratch[w].block_max = frame.take<C>(blocks);
    scratch[w].block_sum = frame.take<double>(blocks);
    scratch[w].candidates = frame.take<C>(vocab + 64 + RowSlices::most * RowSlices::slack);
    scratch[w].bin_sum = frame.take<double>(SelectionLimits::bins * SelectionLimits::ways);
    scratch[w].adjusted = nullptr;
    scratch[w].changes = nullptr;
    if (needs.changes >= 0) {
      scratch[w].adjusted = frame.take<C>(blocks * SamplingBlock::size);
      scratch[w].changes = frame.take<LogitChanges<C>>(1);
      *scratch[w].changes = take_changes(frame, needs.changes, blocks, scratch[w].adjusted);
    }
    const Index kept = KeptLimits::most(vocab) + SamplingBlock::size + 64;
    scratch[w].kept = frame.take<KeptTokens<C>>(1);
    scratch[w].kept_logits = frame.take<C>(kept);
    scratch[w].kept_max = frame.take<C>(kept / SamplingBlock::size + 1);
    scratch[w].vocab = vocab;
    scratch[w].kept_begin = frame.take<std::int32_t>(blocks + 1);
    scratch[w].weighed = frame.take<WeighedRow<C>>(1);
    *scratch[w].weighed = {};
    scratch[w].weighed->lanes = frame.take<C>(blocks * WeighedRow<C>::most_lanes);
    scratch[w].weighed->begin = frame.take<std::int32_t>(blocks + 1);
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
  const SamplingNeeds needs(p.params, p.params_stride, p.batch, p.vocab);
  const auto* scratches = take_sampling_scratch<C>(frame, worker_count(on), p.vocab, needs);
  const Eigen::ThreadPoolDevice* const pool = pool_of_rows(on.device, p.batch, p.vocab);
  for_rows(on, pool, p.batch, Cost{p.vocab}, [&](Index first, Index last, int worker) {
    const SamplingScratch<C>& scratch = scratches[worker];
    for (Index r = first; r < last; ++r) {
      const problem::RowParams& params = p.params_of(r);
      SamplingRow<T> row{p.logits + r * p.vocab, p.vocab, scratch.block_max, {}, 1.0};
      row.pool = pool;
      const bool in_scratch = adjusts_all_logits(params);
      SampleStatus status = adjusts_logits(params) && !in_scratch
                                ? change_logits<Isa>(p, r, row, *scratch.changes)
                                : scan_row<Isa>(row);
      if (status != SampleStatus::ok || !in_scratch) {
        if (status == SampleStatus::ok) apply_filters<Isa>(row, params, p.excludes(r), scratch);
        visit(r, row, status, scratch);
        continue;
      }
      adjust_logits<Isa>(p, r, scratch);
      SamplingRow<C> adjusted{scratch.adjusted, p.vocab, scratch.block_max, {}, 1.0};
      adjusted.pool = pool;
      status = scan_row<Isa>(adjusted);
      if (status == SampleStatus::ok) apply_filters<Isa>(adjusted, params, p.excludes(r), scratch);
      visit(r, adjusted, status, scratch);
    }
  });
}

/// The first block within which the running sum passes `target`, the last one that weighs anything
/// where none does.
inline BlockFound find_block(const double* sums, Index blocks, double target) {
  BlockFound found;
  double before = 0;
  for (Index b = 0; b < blocks; ++b) {
    if (sums[b] == 0) continue;
    found = {b, before};
    if ((before += sums[b]) > target) break;
  }
  return found;
}

/// The token of a block at which the running sum of weights, in token order, passes `target`, where
/// the difference of the two may be wrong by `error`; -1 where it is not the same for all of those.
/// `first`: no other weights come before the row's.
template <typename Isa, typename T>
Index draw_in_block(const SamplingRow<T>& row, const BlockFound& found, double target, double error,
                    bool first = true) {
  alignas(64) compute_type<T> x[SamplingBlock::size];
  alignas(64) double weights[SamplingBlock::size];
  const auto* const logits = block_logits<Isa>(row, found.block, x);
  member_weights<Isa>(logits, found.block, row.band, row.inverse_temperature, weights);
  // rounding may leave the sum just below the target: then the last token of positive weight
  Index drawn = -1;
  double before = found.before, last = before;
  for (Index j = 0; j < SamplingBlock::size; ++j) {
    if (weights[j] == 0) continue;
    drawn = j;
    last = before;
    before += weights[j];
    if (before > target) break;
  }
  if (error > 0 && !(last + error < target && before > target + error)) {
    // 0 is the sum before the first token, without an error
    if (!(first && last == 0 && before > target + error)) return -1;
  }
  return found.block * SamplingBlock::size + drawn;
}

/// The token at which the running sum of weights, in token order, passes u times their total; u in
/// (0, 1).
template <typename Isa, typename T>
Index draw_place(const SamplingRow<T>& row, double u,
                 const SamplingScratch<compute_type<T>>& scratch) {
  if constexpr (std::is_same_v<compute_type<T>, float>) {
    using Weights = FusedWeights<simd::Vec<float, Isa>>;
    if (Weights::serves(row) && row.vocab >= KeptLimits::least_vocab) {
      const bool is_weighed = has_sums(row);
      const Weights weights(row, is_weighed ? row.weighed->reference : row.band.hi);
      if (!is_weighed) RowWeighing<Isa, T>{row, weights}(*scratch.weighed);
      double target, error;
      BlockFound found = WeighedSums<Isa>{*scratch.weighed, weights}.find(row.blocks(), row.vocab,
                                                                          u, target, error);
      found.before *= weights.unit;
      const Index place =
          draw_in_block<Isa>(row, found, target * weights.unit, error * weights.unit);
      if (place >= 0) return place;
    }
  }
  double* const sums = scratch.block_sum;
  const double target = u * sum_weights<Isa>(row, sums);
  return draw_in_block<Isa>(row, find_block(sums, row.blocks(), target), target, 0.0);
}

template <typename Isa, typename T>
std::int32_t draw_token(const SamplingRow<T>& row, double u,
                        const SamplingScratch<compute_type<T>>& scratch) {
  const Index place =
      row.kept == nullptr
          ? draw_place<Isa>(row, u, scratch)
          : token_at<Isa>(row, *row.kept, draw_place<Isa>(row.kept->row, u, scratch));
  return static_cast<std::int32_t>(place);
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::Sampling<T>& p) {
  for_each_distribution(
      on, p, [&](Index r, const auto& row, SampleStatus status, const auto& scratch) {
        p.finish(r, status == SampleStatus::ok ? draw_token<Isa>(row, p.uniform(r), scratch) : -1,
                 status);
      });
}

/// A stage of the caller's is a call for each row: no other code is compiled again for it.
template <typename D, typename Isa, typename Problem, typename Function>
void execute(const Backend<D, Isa>& on, const problem::WithLogitFunction<Problem, Function>& p) {
  Problem with = p.problem;
  const auto set = [&]<typename T>(problem::Sampling<T>& sampling) {
    sampling.function = {detail::row_function<compute_type<T>, Function>(), &p.function};
  };
  if constexpr (requires { with.sampling; })
    set(with.sampling);
  else
    set(with);
  execute(on, with);
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
  const Eigen::ThreadPoolDevice* const pool = pool_of_rows(on.device, p.batch, p.vocab);
  const Cost cost{p.vocab, kReadCycles};
  for_rows(on, pool, p.batch, cost, [&](Index first, Index last, int worker) {
    C* const most = maxima + worker * lines;
    for (Index r = first; r < last; ++r) {
      const T* const logits = p.logits + r * p.vocab;
      C hi;
      const SampleStatus status = scan_maxima<Isa, line>(logits, p.vocab, most, hi, pool);
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
