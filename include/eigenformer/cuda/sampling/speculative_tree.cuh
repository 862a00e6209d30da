/// \file
/// CUDA kernel of the verification of token trees, one block per row, as in
/// cpu/sampling/speculative_tree.h and with its sums, so that it keeps the same tokens. All threads
/// walk the nodes together: a child that is accepted costs two numbers and their latency. A refusal
/// passes over what is left of target and draft (doubles in scratch, out of L2) and sums both in
/// token order; the last token is drawn as in verify_speculative. Each of these passes is expected
/// to cost what its are: 30 microseconds per row and multiprocessor for a vocabulary of 128256.
#pragma once

#include <limits>

#include "../../core/token_weight.h"
#include "../../problem/speculative_tree.h"
#include "speculative.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename Draft, typename Target>
struct SpeculativeTreeKernel {
  static constexpr int kThreads = kRowThreads;
  problem::SpeculativeTree<Draft, Target> p;  // generators on the device
  double* left = nullptr;                     // (blocks, 2, vocab), or 1 where drafts are certain
  Index left_stride = 0;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto sums = ordered_sums(block);
    for (Index r = block.index(); r < p.batch; r += block.count()) {
      std::int32_t* const tokens = p.tokens + r * (p.nodes + 1);
      std::int32_t* const nodes = p.accepted_nodes + r * p.nodes;
      for (Index i = block.thread(); i <= p.nodes; i += block.size()) {
        tokens[i] = -1;
        if (i < p.nodes) nodes[i] = -1;
      }
      block.barrier();
      Index depth = 0;
      const SampleStatus status = verify(block, sums, r, tokens, nodes, depth);
      block.barrier();
      if (status != SampleStatus::ok)
        for (Index i = block.thread(); i <= depth; i += block.size()) {
          tokens[i] = -1;
          if (i < depth) nodes[i] = -1;
        }
      if (block.thread() == 0) {
        p.accepted[r] = static_cast<std::int32_t>(status == SampleStatus::ok ? depth : 0);
        p.statuses[r] = status;
      }
      block.barrier();  // the next row's scratch
    }
  }

 private:
  /// A place of the tree, and what its children that were refused have left of it.
  struct Place {
    const Target* target;
    const Draft* draft;
    double *target_left, *draft_left;
    Index refused = 0;
    double target_mass = 1, draft_mass = 1;
  };

  template <typename Block>
  EIGENFORMER_DEVICE Place place_after(Block& block, Index r, Index node) const {
    const Index row = (r * (p.nodes + 1) + node + 1) * p.vocab;
    double* const own = left + block.index() * left_stride;
    return {p.target + row, p.draft == nullptr ? nullptr : p.draft + row, own, own + p.vocab};
  }

  template <typename Block>
  EIGENFORMER_DEVICE double sum_of(Block& block, const OrderedSums<Block>& sums,
                                   const double* numbers) const {
    const auto weight = [&](Index t) { return numbers[t]; };
    return sum_in_order(block, sums, p.vocab, WeightsOneByOne<decltype(weight)>{p.vocab, weight});
  }

  template <typename Block, typename Numbers>
  EIGENFORMER_DEVICE std::int32_t draw(Block& block, const OrderedSums<Block>& sums, double u,
                                       const Numbers* numbers) const {
    const auto weight = [&](Index t) { return static_cast<double>(numbers[t]); };
    return draw_in_order(block, sums, p.vocab, u,
                         WeightsOneByOne<decltype(weight)>{p.vocab, weight});
  }

  template <typename Block>
  EIGENFORMER_DEVICE SampleStatus refuse(Block& block, const OrderedSums<Block>& sums, Place& at,
                                         std::int32_t token) const {
    const bool first = at.refused++ == 0;
    if (first) {
      SampleStatus status = status_of_all_probabilities(block, sums, at.target, p.vocab);
      if (status == SampleStatus::ok)
        status = status_of_all_probabilities(block, sums, at.draft, p.vocab);
      if (status != SampleStatus::ok) return status;
    }
    const double scale = 1 / at.target_mass, share = 1 / at.draft_mass;
    block.barrier();  // all have read what is left of the token
    for (Index t = block.thread(); t < p.vocab; t += block.size()) {
      const double own = first ? static_cast<double>(at.target[t]) : at.target_left[t],
                   other = first ? static_cast<double>(at.draft[t]) : at.draft_left[t];
      const double less = detail::multiply_add(own, scale, -(other * share));
      at.target_left[t] = less > 0 ? less : 0.0;
      at.draft_left[t] = t == token && !p.with_replacement ? 0.0 : other;
    }
    block.barrier();
    return SampleStatus::ok;
  }

  template <typename Block>
  EIGENFORMER_DEVICE SampleStatus try_child(Block& block, const OrderedSums<Block>& sums, Place& at,
                                            std::int32_t token, double u, bool& accepted) const {
    const double target = static_cast<double>(at.target[token]),
                 draft = at.draft == nullptr ? 1.0 : static_cast<double>(at.draft[token]);
    accepted = false;
    SampleStatus status = status_of_probability(target);
    if (status == SampleStatus::ok) status = status_of_probability(draft);
    if (status != SampleStatus::ok) return status;
    if (at.draft == nullptr) {
      accepted = u * at.target_mass < target;
      at.target_mass -= target;
      ++at.refused;
      return SampleStatus::ok;
    }
    double own = target;
    if (at.refused > 0) {
      at.target_mass = sum_of(block, sums, at.target_left);
      if (!p.with_replacement) at.draft_mass = sum_of(block, sums, at.draft_left);
      if (at.target_mass == 0 || at.draft_mass == 0) return SampleStatus::ok;
      own = at.target_left[token] / at.target_mass;
    }
    accepted = u * (draft / at.draft_mass) < own;
    return accepted ? SampleStatus::ok : refuse(block, sums, at, token);
  }

  /// The walk, and the token after it.
  template <typename Block>
  EIGENFORMER_DEVICE SampleStatus verify(Block& block, const OrderedSums<Block>& sums, Index r,
                                         std::int32_t* tokens, std::int32_t* nodes,
                                         Index& depth) const {
    const std::int32_t* const drafted = p.draft_tokens + r * p.nodes;
    const std::int32_t* const parents = p.parents + r * p.parents_stride;
    Place at = place_after(block, r, -1);
    Index node = -1;
    for (Index i = 0; i < p.nodes; ++i) {
      if (!p.is_child(drafted, parents, node, i)) continue;
      bool accepted = false;
      const SampleStatus status = try_child(block, sums, at, drafted[i],
                                            p.uniform(r, i, Philox::Purpose::acceptance), accepted);
      if (status != SampleStatus::ok) return status;
      if (!accepted) continue;
      if (block.thread() == 0) {
        tokens[depth] = drafted[i];
        nodes[depth] = static_cast<std::int32_t>(i);
      }
      ++depth;
      node = i;
      at = place_after(block, r, i);
    }
    if (at.draft == nullptr || at.refused == 0) {
      const SampleStatus status = status_of_all_probabilities(block, sums, at.target, p.vocab);
      if (status != SampleStatus::ok) return status;
    }
    if (at.draft == nullptr && at.refused > 0) leave_out(block, at, drafted, parents, node);
    const double u = p.uniform(r, 0, Philox::Purpose::last_token);
    std::int32_t last = -1;
    if (at.refused > 0) last = draw(block, sums, u, at.target_left);
    if (last == -1) last = draw(block, sums, u, at.target);
    if (block.thread() == 0) tokens[depth] = last;
    if (last >= 0) return SampleStatus::ok;
    return last == -1 ? SampleStatus::no_token : SampleStatus::positive_infinity;
  }

  /// The target without the certain drafts that were refused.
  template <typename Block>
  EIGENFORMER_DEVICE void leave_out(Block& block, const Place& at, const std::int32_t* drafted,
                                    const std::int32_t* parents, Index node) const {
    for (Index t = block.thread(); t < p.vocab; t += block.size())
      at.target_left[t] = static_cast<double>(at.target[t]);
    block.barrier();
    for (Index i = node + 1 + block.thread(); i < p.nodes; i += block.size())
      if (p.is_child(drafted, parents, node, i)) at.target_left[drafted[i]] = 0;
    block.barrier();
  }
};

template <typename D, typename Draft, typename Target>
void execute(const Backend<D>& on, const problem::SpeculativeTree<Draft, Target>& p) {
  if (p.batch == 0) return;
  constexpr auto name = "verify_speculative_tree";
  using Kernel = SpeculativeTreeKernel<Draft, Target>;
  Kernel kernel{p};
  std::tie(kernel.p.generators) = stage(
      on, name,
      std::span(p.generators, p.generators_stride == 0 ? 1 : static_cast<std::size_t>(p.batch)));
  constexpr Index most = 132;  // an H100 has as many multiprocessors
  const Index blocks = p.batch < most ? p.batch : most;
  kernel.left_stride = (p.draft == nullptr ? 1 : 2) * p.vocab;
  with_scratch<double>(on, name, {blocks * kernel.left_stride}, [&](double* left) {
    kernel.left = left;
    launch(on, name, blocks, Kernel::kThreads, kOrderedSumsBytes, kernel);
  });
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
