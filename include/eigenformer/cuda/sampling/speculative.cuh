/// \file
/// CUDA kernel of speculative verification: rejection sampling along a drafted chain, one block per
/// row, as in cpu/sampling/speculative.h and with its sums, so that it keeps the same tokens. The
/// threads look at the drafts all at once, two numbers each; what the last token is drawn from is
/// read three times (a look for what is no probability, the sum, of which the run that the draw
/// falls into once more), two distributions at a refusal: of sizeof(T) * vocab bytes each, all but
/// the first out of L2. A launch of few rows waits for memory and adds 1002 sums of runs in a chain
/// (vocabulary 128256): some 30 microseconds per row and multiprocessor are expected, from 132 rows
/// on about a third of the bandwidth.
#pragma once

#include <limits>

#include "../../problem/sampling.h"
#include "../../problem/sampling_rules.h"
#include "../launch.cuh"
#include "../stage.cuh"
#include "order.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

using problem::status_of_probability;

/// The first i below `end` of which is(i); else `end`. For every thread.
template <typename Block, typename Is>
EIGENFORMER_DEVICE Index first_of(Block& block, const OrderedSums<Block>& sums, Index end, Is is) {
  Index first = end;
  for (Index i = block.thread(); i < first; i += block.size())
    if (is(i)) first = i;
  return reduce_block(block, sums.firsts, first, Smaller{});
}

/// The status of the first number that is no probability; ok where all are.
template <typename Block, typename P>
EIGENFORMER_DEVICE SampleStatus status_of_all_probabilities(Block& block,
                                                            const OrderedSums<Block>& sums,
                                                            const P* numbers, Index count) {
  const Index bad = first_of(block, sums, count, [&](Index t) {
    return status_of_probability(static_cast<double>(numbers[t])) != SampleStatus::ok;
  });
  return bad == count ? SampleStatus::ok : status_of_probability(static_cast<double>(numbers[bad]));
}

template <typename Draft, typename Target>
struct SpeculativeKernel {
  static constexpr int kThreads = kRowThreads;
  problem::Speculative<Draft, Target> p;  // generators and lengths on the device

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto sums = ordered_sums(block);
    for (Index r = block.index(); r < p.batch; r += block.count()) {
      std::int32_t* const tokens = p.tokens + r * (p.drafts + 1);
      const Chain chain{p.draft_tokens + r * p.drafts, p.draft + r * p.drafts * p.vocab,
                        p.target + r * (p.drafts + 1) * p.vocab};
      Index place = 0;
      std::int32_t last = -1;
      const SampleStatus status = verify(block, sums, chain, r, place, last);
      const Index accepted = status == SampleStatus::ok ? place : -1;
      for (Index i = block.thread(); i <= p.drafts; i += block.size())
        tokens[i] = i < accepted ? chain.tokens[i] : i == accepted ? last : -1;
      if (block.thread() == 0) {
        p.accepted[r] = static_cast<std::int32_t>(accepted < 0 ? 0 : accepted);
        p.statuses[r] = status;
      }
    }
  }

 private:
  struct Chain {
    const std::int32_t* tokens;  // (drafts)
    const Draft* draft;          // (drafts, vocab)
    const Target* target;        // (drafts + 1, vocab)
  };

  /// What the two numbers of a draft say.
  struct Verdict {
    bool accepted;
    SampleStatus status;
  };
  EIGENFORMER_DEVICE Verdict verdict(const Chain& chain, Index r, Index i) const {
    const Index at = i * p.vocab + chain.tokens[i];
    const double target = static_cast<double>(chain.target[at]),
                 draft = static_cast<double>(chain.draft[at]);
    SampleStatus status = status_of_probability(target);
    if (status == SampleStatus::ok) status = status_of_probability(draft);
    const bool accepted =
        status == SampleStatus::ok && p.uniform(r, i, Philox::Purpose::acceptance) * draft < target;
    return {accepted, status};
  }

  /// `place`: the drafts accepted, and where `last` comes. A draft that is no token ends the chain.
  template <typename Block>
  EIGENFORMER_DEVICE SampleStatus verify(Block& block, const OrderedSums<Block>& sums,
                                         const Chain& chain, Index r, Index& place,
                                         std::int32_t& last) const {
    const Index given = p.draft_lengths == nullptr ? p.drafts : p.draft_lengths[r];
    const Index length = first_of(block, sums, given, [&](Index i) {
      return chain.tokens[i] < 0 || chain.tokens[i] >= p.vocab;
    });
    place = first_of(block, sums, length, [&](Index i) { return !verdict(chain, r, i).accepted; });
    if (place < length)
      if (const SampleStatus status = verdict(chain, r, place).status; status != SampleStatus::ok)
        return status;
    const Target* const target = chain.target + place * p.vocab;
    const Draft* const draft = place < length ? chain.draft + place * p.vocab : nullptr;
    SampleStatus status = status_of_all_probabilities(block, sums, target, p.vocab);
    if (status == SampleStatus::ok && draft != nullptr)
      status = status_of_all_probabilities(block, sums, draft, p.vocab);
    if (status != SampleStatus::ok) return status;
    const double u = p.uniform(r, 0, Philox::Purpose::last_token);
    // Without a residual the two distributions are one up to rounding: then from the target.
    for (bool residual = draft != nullptr;; residual = false) {
      const auto weight = [&](Index t) {
        const double own = static_cast<double>(target[t]),
                     other = residual ? static_cast<double>(draft[t]) : 0.0;
        return own > other ? own - other : 0.0;
      };
      last = draw_in_order(block, sums, p.vocab, u,
                           WeightsOneByOne<decltype(weight)>{p.vocab, weight});
      if (last != -1 || !residual) break;
    }
    if (last >= 0) return SampleStatus::ok;
    return last == -1 ? SampleStatus::no_token : SampleStatus::positive_infinity;
  }
};

template <typename D, typename Draft, typename Target>
void execute(const Backend<D>& on, const problem::Speculative<Draft, Target>& p) {
  if (p.batch == 0) return;
  constexpr auto name = "verify_speculative";
  using Kernel = SpeculativeKernel<Draft, Target>;
  const std::size_t rows = static_cast<std::size_t>(p.batch);
  Kernel kernel{p};
  const auto [generators, lengths] =
      stage(on, name, std::span(p.generators, p.generators_stride == 0 ? 1 : rows),
            std::span(p.draft_lengths, p.draft_lengths == nullptr ? 0 : rows));
  kernel.p.generators = generators;
  kernel.p.draft_lengths = lengths;
  launch_rows(on, name, p.batch, kOrderedSumsBytes, kernel);
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
