/// \file
/// CPU kernels of a nucleus in divided rows. A shard is sampled, weighed once in float with the
/// logits of an interval gathered, and searched again only where the floats leave the end open.
#pragma once

#include "../problem/vocabulary_nucleus.h"
#include "vocabulary_shard.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename Isa>
void sample_shard(const SamplingRow<float>& row, const problem::ShardNucleus& nucleus,
                  double* answer, const SamplingScratch<float>& scratch) {
  if (!FusedWeights<simd::Vec<float, Isa>>::serves(row)) return;
  const NucleusSample<Isa> sample(row, scratch.candidates);
  for (Index at = 0; at < nucleus.most_ends; at += 8) {
    float ends[8];
    double masses[8];
    std::copy_n(nucleus.ends + at, 8, ends);
    sample.below(ends, masses);
    std::copy_n(masses, 8, answer + at);
  }
  answer[nucleus.most_ends] = static_cast<double>(sample.count);
}

template <typename Isa>
void weigh_interval(const SamplingRow<float>& row, const problem::ShardNucleus& nucleus,
                    double* answer, float* listed, Index room,
                    const SamplingScratch<float>& scratch) {
  using Weights = FusedWeights<simd::Vec<float, Isa>>;
  const CandidateInterval<simd::Vec<float, Isa>, Weights> interval{Weights(row)};
  WeighedRow<float>& sums = *scratch.weighed;
  const ByLogit apart{nucleus.lo, nucleus.hi};
  RowWeighing<Isa, float, ByLogit>{row, interval.weights, apart, scratch.candidates}(sums);
  const double inside = interval.sum(sums.gathered, sums.count);
  answer[0] = sums.total_above + inside, answer[1] = sums.total_rest - inside;
  answer[2] = inside;
  answer[3] = static_cast<double>(sums.count);
  if (sums.count <= room) std::copy_n(sums.gathered, sums.count, listed);
}

template <typename D, typename Isa>
void execute(const Backend<D, Isa>& on, const problem::AskNucleus& p) {
  using Question = problem::NucleusQuestion;
  const Index size = p.shard.shard.size();
  Workspace::Frame frame(on.workspace);
  const auto* const scratches = take_sampling_scratch<float>(frame, worker_count(on), size, {});
  const Cost cost{size, kWeightCycles};
  parallel_for(on, p.shard.rows, cost, [&](Index first, Index last, int worker) {
    for (Index r = first; r < last; ++r) {
      const problem::ShardNucleus& nucleus = p.nuclei[r];
      const SamplingRow<float> row = row_of_shard(p.shard, p.rows[r], r);
      double* const answer = p.answers + p.begin[r];
      std::fill(answer, p.answers + p.begin[r + 1], 0.0);
      if (nucleus.question == Question::sample)
        sample_shard<Isa>(row, nucleus, answer, scratches[worker]);
      if (nucleus.question == Question::interval)
        weigh_interval<Isa>(row, nucleus, answer, p.listed + r * p.room, p.room, scratches[worker]);
      if (nucleus.question == Question::exact) {
        const ExactSums sums = exact_sums<Isa>(row, nucleus.lo);
        answer[0] = sums.total, answer[1] = sums.above;
      }
    }
  });
}

inline void end_nucleus(const problem::EndNucleus& p) {
  PrefixEnd<float> end;
  p.end.certain = tells_end_of_prefix(
      p.listed, p.count, p.above, p.p * p.total, p.error,
      candidate_weights<float>(static_cast<double>(p.row.band.hi), p.row.inverse_temperature), end);
  p.end.value = end.value;
  p.end.taken = end.taken;
}

template <typename D, typename Isa>
void execute(const Backend<D, Isa>&, const problem::EndNucleus& p) {
  end_nucleus(p);
}

template <typename D, typename Isa>
void execute(const Backend<D, Isa>&, const problem::NarrowNucleus& p) {
  using Weights = FusedWeights<simd::Vec<float, Isa>>;
  const SamplingRow<float> row{nullptr, p.vocab, nullptr, p.row.band, p.row.inverse_temperature};
  const CandidateInterval<simd::Vec<float, Isa>, Weights> interval{Weights(row)};
  const double unit = interval.weights.unit, total = p.sums.above + p.sums.rest;
  double above = p.sums.above - p.sums.inside;
  if (p.hi < std::numeric_limits<float>::infinity() && p.lo > std::numeric_limits<float>::lowest())
    p.count = narrow_by_ends(interval, p.listed, p.count, p.lo, p.hi, p.p * total, above);
  p.count = interval.narrow(p.listed, p.count, p.p * total, above);
  if (p.count == 0) return;
  above *= unit;
  const double all = total * unit,
               error = interval.weights.error_of_share(above, all - above, p.p, p.vocab) +
                       26 * 0x1p-24 * p.sums.inside * unit;  // additions of what lies inside
  end_nucleus({p.row, p.p, above, all, error, p.listed, p.count, p.end});
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
