/// \file
/// CPU kernels of a divided vocabulary: what a rank answers about its shard. The shard of a row is
/// a row of its own to the parts of sampling (sampling/row.h), but for the band, which is that of
/// all shards. Sums are in double, in the order of the shard's tokens; who asks allows for the
/// rounding of any order. A question reads the shard at most once, and the blocks of 128 that hold
/// no token in play not at all.
#pragma once

#include "../problem/vocabulary_shard.h"
#include "sampling/log_probabilities.h"
#include "sampling/sampling.h"
#include "vocabulary_keys.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

static_assert(problem::ShardLimits::block == SamplingBlock::size &&
              problem::ShardLimits::few(4095) == 4095 && KeptLimits::least_vocab == 4096 &&
              problem::ShardLimits::few(80000) == KeptLimits::most(80000));

/// For each worker scratch of changes, which are made in the shard itself.
template <typename C, typename On>
LogitChanges<C>* take_changes_of_workers(const On& on, const SamplingNeeds& needs,
                                         Workspace::Frame& frame) {
  auto* const changes = frame.take<LogitChanges<C>>(worker_count(on));
  for (int w = 0; w < worker_count(on); ++w)
    changes[w] = take_changes<C>(frame, (std::max)(needs.changes, Index{0}), 0, nullptr);
  return changes;
}

/// What adjust_logits does to the tokens of a shard, for stages that look at single tokens.
template <typename C>
void adjust_shard(C* logits, const ShardRange& shard, const problem::RowParams& params,
                  LogitChanges<C>& changes) {
  int bias_stages = 0;
  for (const SamplingStage stage : params.order)
    adjust_tokens(logits, shard, params, stage, bias_stages, changes);
}

/// The maxima of the blocks; the largest of them and whether there is a NaN in `answer`.
template <typename Isa, typename T>
void scan_shard(const T* logits, Index size, compute_type<T>* most, double* answer) {
  compute_type<T> hi;
  const bool nan =
      scan_maxima<Isa, SamplingBlock::size>(logits, size, most, hi) == SampleStatus::nan;
  answer[0] = nan ? 0.0 : static_cast<double>(hi);
  answer[1] = nan ? 1.0 : 0.0;
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::ScanShard<T>& p) {
  using C = compute_type<T>;
  const auto& all = p.shard;
  const Index size = all.shard.size();
  Workspace::Frame frame(on.workspace);
  const SamplingNeeds needs(p.params, p.params_stride, all.rows, size);
  auto* const changes = take_changes_of_workers<C>(on, needs, frame);
  parallel_for(on, all.rows, Cost{size}, [&](Index first, Index last, int worker) {
    for (Index r = first; r < last; ++r) {
      const T* const given = p.given + r * size;
      C *const logits = all.logits + r * size, *const most = all.block_max + r * all.blocks;
      const problem::RowParams& params = p.params[r * p.params_stride];
      double* const answer = p.answers + 4 * r;
      scan_shard<Isa>(given, size, most, answer);
      std::copy(answer, answer + 2, answer + 2);
      if (static_cast<const void*>(given) != static_cast<const void*>(logits))
        convert_line<simd::Vec<C, Isa>>(given, logits, size);
      if (!adjusts_logits(params) || problem::looks_at_all_logits(params)) continue;
      adjust_shard(logits, all.shard, params, changes[worker]);
      scan_shard<Isa>(logits, size, most, answer + 2);
    }
  });
}

template <typename T, typename C>
void change_shard(const problem::ChangeShard<T>& p, const problem::ShardChange& change, C* logits,
                  LogitChanges<C>& changes) {
  const problem::RowParams& params = p.params[change.row * p.params_stride];
  const Index size = p.shard.shard.size();
  const SamplingStage* const order = params.order.data();
  auto bias_stages =
      static_cast<int>(std::count(order, order + change.begin, SamplingStage::logit_bias));
  for (const SamplingStage* stage = order + change.begin; stage != order + change.end; ++stage) {
    if (*stage == SamplingStage::guidance)
      apply_guidance(logits, size, p.given + params.guidance_row * size, params.guidance_scale,
                     change.log_sum, change.log_sum_without);
    if (*stage == SamplingStage::penalties && params.log_probability_penalties)
      subtract(logits, size, change.log_sum);
    if (*stage == SamplingStage::function)
      p.function(change.row, p.shard.shard.begin, {logits, static_cast<std::size_t>(size)});
    adjust_tokens(logits, p.shard.shard, params, *stage, bias_stages, changes);
  }
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::ChangeShard<T>& p) {
  using C = compute_type<T>;
  const auto& all = p.shard;
  const Index size = all.shard.size();
  Workspace::Frame frame(on.workspace);
  const SamplingNeeds needs(p.params, p.params_stride, all.rows, size);
  auto* const changes = take_changes_of_workers<C>(on, needs, frame);
  parallel_for(on, p.count, Cost{size}, [&](Index first, Index last, int worker) {
    for (Index i = first; i < last; ++i) {
      const Index r = p.changes[i].row;
      C* const logits = all.logits + r * size;
      change_shard(p, p.changes[i], logits, changes[worker]);
      scan_shard<Isa>(logits, size, all.block_max + r * all.blocks, p.answers + 2 * i);
    }
  });
}

template <typename D, typename Isa, typename C>
void execute(const Backend<D, Isa>&, const problem::NarrowToWeight<C>& p) {
  const auto end_at = [&](double weight) {
    SamplingRow<C> numbers{nullptr, p.vocab, nullptr, p.row.band, p.row.inverse_temperature};
    keep_min_p<Isa>(numbers, weight);
    return numbers.band;
  };
  p.row.sure = end_at(p.least * (1 + p.error)).lo;
  p.row.band = end_at(p.least * (1 - p.error));
}

template <typename D, typename Isa, typename C>
void execute(const Backend<D, Isa>&, const problem::NarrowToDeviations<C>& p) {
  SamplingRow<C> numbers{nullptr, p.vocab, nullptr, p.row.band, p.row.inverse_temperature};
  narrow_to_deviations(numbers, p.deviations, p.variance);
  p.row.band = numbers.band;
  p.row.sure = p.row.band.lo;
}

/// The shard of row r as a row.
template <typename C>
SamplingRow<C> row_of_shard(const problem::ShardLogits<C>& p, const problem::ShardRow<C>& whole,
                            Index r) {
  const Index size = p.shard.size();
  SamplingRow<C> row{p.logits + r * size, size, p.block_max + r * p.blocks, whole.band,
                     whole.inverse_temperature};
  row.band.lo_end = std::clamp<Index>(whole.band.lo_end - p.shard.begin, 0, size);
  row.band.hi_begin = std::clamp<Index>(whole.band.hi_begin - p.shard.begin, 0, size);
  return row;
}

/// The sum of the weights, that of every block in `sums`, and of weight * (logit - best) /
/// temperature.
template <typename Isa, typename C>
void sum_shard(const SamplingRow<C>& row, double* sums, double* answer) {
  std::fill(sums, sums + row.blocks(), 0.0);
  const WeightSums all = weight_sums<Isa>(row, [&](Index block, double sum) { sums[block] = sum; });
  answer[0] = all.total, answer[1] = all.moment;
}

/// The sum of the weights by floats, and that of every block in `sums`.
template <typename Isa>
void weigh_shard(const SamplingRow<float>& row, double* sums, double* answer,
                 const SamplingScratch<float>& scratch) {
  using V = simd::Vec<float, Isa>;
  if (!FusedWeights<V>::serves(row)) return;
  const FusedWeights<V> weights(row);
  WeighedRow<float>& weighed = *scratch.weighed;
  RowWeighing<Isa, float>{row, weights}(weighed);
  for (Index block = 0; block < row.blocks(); ++block) {
    alignas(64) double lanes[V::lanes] = {};
    add_lanes(V::load(weighed.lanes + block * WeighedRow<float>::most_lanes), lanes);
    for (int half = V::lanes / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    sums[block] = lanes[0] * weights.unit;
  }
  answer[0] = weighed.total_above * weights.unit;
  answer[1] = weights.error_of(weighed.total_above, row.vocab) * weights.unit;
}

template <typename Isa, typename C>
void sum_deviations(const SamplingRow<C>& row, double* answer) {
  const double best = static_cast<double>(row.band.hi);
  double count = 0, sum = 0, squares = 0;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const C* x) {
    double block_sum = 0, block_squares = 0;
    const BlockBits members = member_bits<Isa>(x, block, row.band, row.band.lo);
    members.for_each([&](Index j) {
      const double d = static_cast<double>(x[j]) - best;
      block_sum += d;
      block_squares += d * d;
    });
    count += members.count();
    sum += block_sum;
    squares += block_squares;
  });
  answer[0] = count, answer[1] = sum, answer[2] = squares;
}

/// The answer of row r, 0 before.
template <typename Isa, typename C>
void answer_question(const problem::AskShard<C>& p, Index r, const SamplingScratch<C>* scratch,
                     double* answer) {
  const problem::ShardRow<C>& asked = p.rows[r];
  const SamplingRow<C> row = row_of_shard(p.shard, asked, r);
  switch (asked.question) {
    case problem::ShardQuestion::count:
      answer[0] = static_cast<double>(count_members<Isa>(row));
      answer[1] = static_cast<double>(count_members<Isa>(row, asked.sure));
      return;
    case problem::ShardQuestion::weights:
      return sum_shard<Isa>(row, p.shard.block_sum + r * p.shard.blocks, answer);
    case problem::ShardQuestion::masses:
      if constexpr (std::is_same_v<C, float>)
        weigh_shard<Isa>(row, p.shard.block_sum + r * p.shard.blocks, answer, *scratch);
      return;
    case problem::ShardQuestion::deviations:
      return sum_deviations<Isa>(row, answer);
    case problem::ShardQuestion::bins:
      return bin_distances<Isa>(row, asked, answer);
    case problem::ShardQuestion::bounds:
      return bound_keys<Isa>(row, asked, answer);
    case problem::ShardQuestion::keys:
      return bin_keys<Isa>(row, asked, answer);
    case problem::ShardQuestion::listed:
      return list_keys<Isa>(row, asked, answer);
    case problem::ShardQuestion::extent:
      return extent_of_keys<Isa>(row, asked, p.shard.shard.begin, answer);
    case problem::ShardQuestion::best:
      return best_of_shard<Isa>(row, asked.most, answer, *scratch);
    case problem::ShardQuestion::place:
      if (asked.nth > 0)
        answer[0] = static_cast<double>(p.shard.shard.begin + 1 +
                                        nth_equal<Isa>(row, asked.value, asked.nth));
      return;
    default:
      return;
  }
}

template <typename D, typename Isa, typename C>
void execute(const Backend<D, Isa>& on, const problem::AskShard<C>& p) {
  const Index size = p.shard.shard.size();
  const bool needs_scratch = std::any_of(p.rows, p.rows + p.shard.rows, [](const auto& row) {
    return row.question == problem::ShardQuestion::best ||
           row.question == problem::ShardQuestion::masses;
  });
  Workspace::Frame frame(on.workspace);
  const SamplingScratch<C>* const scratches =
      needs_scratch ? take_sampling_scratch<C>(frame, worker_count(on), size, {}) : nullptr;
  parallel_for(on, p.shard.rows, Cost{size, kExpCycles}, [&](Index first, Index last, int worker) {
    for (Index r = first; r < last; ++r) {
      double* const answer = p.answers + p.begin[r];
      std::fill(answer, p.answers + p.begin[r + 1], 0.0);
      answer_question<Isa>(p, r, needs_scratch ? scratches + worker : nullptr, answer);
    }
  });
}

/// Calls f(token of the shard, logit) for every token in play, in order.
template <typename Isa, typename C, typename F>
void for_each_in_play(const SamplingRow<C>& row, F&& f) {
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const C* x) {
    member_bits<Isa>(x, block, row.band, row.band.lo).for_each([&](Index j) {
      f(block * SamplingBlock::size + j, x[j]);
    });
  });
}

template <typename D, typename Isa, typename C>
void execute(const Backend<D, Isa>& on, const problem::PickFromShard<C>& p) {
  using Candidate = problem::ShardCandidate<C>;
  const Index size = p.shard.shard.size();
  if (p.shard.rows == 0 || size == 0) return;
  Workspace::Frame frame(on.workspace);
  const auto* const scratches = take_sampling_scratch<C>(frame, worker_count(on), size, {});
  parallel_for(on, p.shard.rows, Cost{size}, [&](Index first, Index last, int worker) {
    for (Index r = first; r < last; ++r) {
      const problem::ShardRow<C>& asked = p.rows[r];
      if (asked.pick == problem::ShardPick::none) continue;
      SamplingRow<C> row = row_of_shard(p.shard, asked, r);
      Candidate* out = p.candidates + p.begin[r];
      Candidate* const end = out + p.count[r];
      const bool best = asked.pick == problem::ShardPick::best;
      if (best) keep_top_k<Isa>(row, asked.most, TopKTies::lowest_index, scratches[worker]);
      const double hi = static_cast<double>(row.band.hi), scale = row.inverse_temperature;
      for_each_in_play<Isa>(row, [&](Index token, C logit) {
        if (best ||
            problem::ShardBins::distance(static_cast<double>(logit), hi, scale) < asked.reach)
          *out++ = {logit, static_cast<typename Candidate::Token>(p.shard.shard.begin + token)};
      });
      std::fill(out, end, Candidate{-std::numeric_limits<C>::infinity(), Candidate::kNone});
    }
  });
}

template <typename D, typename Isa, typename C>
void execute(const Backend<D, Isa>& on, const problem::DrawFromShard<C>& p) {
  parallel_for(on, p.shard.rows, Cost{p.shard.blocks}, [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r) {
      p.tokens[r] = p.kOpen;
      if (!p.asked[r]) continue;
      const problem::ShardRow<C>& asked = p.rows[r];
      const SamplingRow<C> row = row_of_shard(p.shard, asked, r);
      const BlockFound found =
          find_block(p.shard.block_sum + r * p.shard.blocks, p.shard.blocks, asked.target);
      const Index token = found.block < 0 ? -1
                                          : draw_in_block<Isa>(row, found, asked.target,
                                                               asked.margin, asked.before == 0);
      if (token >= 0) p.tokens[r] = static_cast<std::int32_t>(p.shard.shard.begin + token);
    }
  });
}

/// The sum of the weights in play below 1, and the number of those that are 1.
template <typename Isa, typename T>
void sum_below_one(const SamplingRow<T>& row, double* answer) {
  alignas(64) double weights[SamplingBlock::size];
  answer[0] = answer[1] = 0;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const auto* x) {
    member_weights<Isa>(x, block, row.band, row.inverse_temperature, weights);
    for (double& weight : weights)
      if (weight == 1.0) answer[1] += 1, weight = 0;
    answer[0] += block_sum(weights);
  });
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::ScoreShard<T>& p) {
  using C = compute_type<T>;
  using Token = typename problem::ShardCandidate<C>::Token;
  const ShardRange& shard = p.shard.shard;
  const Index size = shard.size();
  std::fill(p.answers, p.answers + 4 * p.shard.rows, 0.0);
  if (p.shard.rows == 0 || size == 0) return;
  Workspace::Frame frame(on.workspace);
  const auto* const scratches = take_sampling_scratch<C>(frame, worker_count(on), size, {});
  std::int32_t* const ids = frame.take<std::int32_t>(worker_count(on) * p.best);
  const Cost cost{2 * size, kExpCycles};
  parallel_for(on, p.shard.rows, cost, [&](Index first, Index last, int worker) {
    for (Index r = first; r < last; ++r) {
      if (!p.asked[r]) continue;
      const SamplingRow<C> row = row_of_shard(p.shard, p.rows[r], r);
      sum_below_one<Isa>(row, p.answers + 4 * r + 2);
      if (p.given_best == nullptr) continue;
      SamplingRow<T> given{p.given + r * size, size, scratches[worker].block_max, {}, 1.0};
      scan_row<Isa>(given);
      SamplingRow<T> weighed = given;
      weighed.band.hi = static_cast<C>(p.given_best[r]);
      sum_below_one<Isa>(weighed, p.answers + 4 * r);
      if (p.best == 0) continue;
      std::int32_t* const tokens = ids + worker * p.best;
      best_tokens<Isa>(given, p.best, tokens, scratches[worker]);
      for (Index i = 0; i < p.best; ++i) {
        const Index token = tokens[i];
        const C logit = row.band.contains(row.logits[token], token)
                            ? row.logits[token]
                            : -std::numeric_limits<C>::infinity();
        p.scores[r * p.best + i] = {static_cast<C>(given.logits[token]), logit,
                                    static_cast<Token>(shard.begin + token)};
      }
    }
  });
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::RankInShard<T>& p) {
  using C = compute_type<T>;
  parallel_for(on, p.rows, Cost{p.size, kReadCycles}, [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r) {
      const T* const given = p.given + r * p.size;
      const C logit = static_cast<C>(p.logits[r]);
      Index above = 0;
      for (Index i = 0; i < p.size; ++i) above += static_cast<C>(given[i]) > logit;
      p.answers[r] = static_cast<double>(above);
    }
  });
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::ScoreTokens<T>& p) {
  const auto& sampling = p.sampling;
  for_each_distribution(
      on, sampling, [&](Index r, const auto& row, SampleStatus status, const auto& scratch) {
        const bool draws = sampling.generators != nullptr && status == SampleStatus::ok;
        const std::int32_t id = draws ? draw_token<Isa>(row, sampling.uniform(r), scratch) : -1;
        sampling.finish(r, id, status);
        if (status != SampleStatus::ok) return;
        const double log_total = log_sum_weights<Isa>(row);
        if (draws) p.drawn[r] = log_probability(row, id, log_total);
        for (Index i = r * p.count; i < (r + 1) * p.count; ++i)
          p.scores[i] = log_probability(row, p.tokens[i], log_total);
      });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
