/// \file
/// CPU kernel of the verification of token trees: one walk over the nodes of a row, which come
/// after their parents. A child that is accepted costs two numbers; one that is refused a pass over
/// what is left of target and draft (doubles, in scratch), or nothing where drafts are certain; the
/// last token three passes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../core/token_weight.h"
#include "../../core/workspace.h"
#include "../../problem/speculative_tree.h"
#include "speculative.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// A place of the tree, and what its children that were refused have left of it.
template <typename Draft, typename Target>
struct TreePlace {
  const Target* target;  // (vocab)
  const Draft* draft;    // (vocab), or nullptr
  // (vocab) each, once a child was refused: of the target less the drafts, and of the draft less
  // the tokens that are drawn
  double *target_left, *draft_left;
  Index refused = 0;       // children
  double target_mass = 1;  // of what is left; of certain drafts, of all but those refused
  double draft_mass = 1;
};

/// Takes the draft's distribution from what is left of the target, and the token from the draft's.
template <typename Isa, typename Draft, typename Target>
SampleStatus refuse_draft(TreePlace<Draft, Target>& at, std::int32_t token, Index vocab,
                          bool with_replacement) {
  if (at.refused++ == 0) {
    SampleStatus status = status_of_probabilities<Isa>(at.target, vocab);
    if (status == SampleStatus::ok) status = status_of_probabilities<Isa>(at.draft, vocab);
    if (status != SampleStatus::ok) return status;
    std::copy(at.target, at.target + vocab, at.target_left);
    std::copy(at.draft, at.draft + vocab, at.draft_left);
  }
  const double scale = 1 / at.target_mass, share = 1 / at.draft_mass;
  for (Index v = 0; v < vocab; ++v)  // fused by name: a compiler would, on one device of two
    at.target_left[v] = (std::max)(
        0.0, detail::multiply_add(at.target_left[v], scale, -(at.draft_left[v] * share)));
  if (!with_replacement) at.draft_left[token] = 0;
  return SampleStatus::ok;
}

/// Tries one child, with the random number u.
template <typename Isa, typename Draft, typename Target>
SampleStatus try_child(TreePlace<Draft, Target>& at, std::int32_t token, double u, Index vocab,
                       bool with_replacement, bool& accepted) {
  const double target = static_cast<double>(at.target[token]),
               draft = at.draft == nullptr ? 1.0 : static_cast<double>(at.draft[token]);
  accepted = false;
  for (const double read : {target, draft})
    if (const SampleStatus status = status_of_probability(read); status != SampleStatus::ok)
      return status;
  if (at.draft == nullptr) {
    accepted = u * at.target_mass < target;
    at.target_mass -= target;
    ++at.refused;
    return SampleStatus::ok;
  }
  double left = target;
  if (at.refused > 0) {
    at.target_mass = sum_in_blocks(vocab, [&](Index v) { return at.target_left[v]; });
    if (!with_replacement)
      at.draft_mass = sum_in_blocks(vocab, [&](Index v) { return at.draft_left[v]; });
    if (at.target_mass == 0 || at.draft_mass == 0) return SampleStatus::ok;
    left = at.target_left[token] / at.target_mass;
  }
  accepted = u * (draft / at.draft_mass) < left;
  return accepted ? SampleStatus::ok : refuse_draft<Isa>(at, token, vocab, with_replacement);
}

/// The token after the last node, from what is left of its place.
template <typename Isa, typename Draft, typename Target>
SampleStatus draw_after_tree(const TreePlace<Draft, Target>& at, double u, Index vocab,
                             std::int32_t& token) {
  token = -1;
  if (at.draft == nullptr || at.refused == 0)
    if (const SampleStatus status = status_of_probabilities<Isa>(at.target, vocab);
        status != SampleStatus::ok)
      return status;
  if (at.refused > 0)
    token = draw_from_weights(vocab, u, [&](Index v) { return at.target_left[v]; });
  // Nothing left: refused up to rounding only.
  if (token == -1)
    token = draw_from_weights(vocab, u, [&](Index v) { return static_cast<double>(at.target[v]); });
  if (token >= 0) return SampleStatus::ok;
  return token == -1 ? SampleStatus::no_token : SampleStatus::positive_infinity;
}

/// Verifies one row: writes the tokens and nodes that are accepted and one token more, and counts
/// the former. `left` is scratch, (vocab), or (2, vocab) where there are draft probabilities.
template <typename Isa, typename Draft, typename Target>
SampleStatus verify_tree_row(const problem::SpeculativeTree<Draft, Target>& p, Index r,
                             double* left) {
  const std::int32_t* const drafted = p.draft_tokens + r * p.nodes;
  const std::int32_t* const parents = p.parents + r * p.parents_stride;
  std::int32_t* const tokens = p.tokens + r * (p.nodes + 1);
  std::int32_t* const nodes = p.accepted_nodes + r * p.nodes;
  const auto place_after = [&](Index node) {
    const Index row = r * (p.nodes + 1) + node + 1;
    const Draft* const draft = p.draft == nullptr ? nullptr : p.draft + row * p.vocab;
    return TreePlace<Draft, Target>{p.target + row * p.vocab, draft, left, left + p.vocab};
  };
  auto at = place_after(-1);
  Index node = -1, depth = 0;
  for (Index i = 0; i < p.nodes; ++i) {
    if (!p.is_child(drafted, parents, node, i)) continue;
    bool accepted = false;
    const SampleStatus status =
        try_child<Isa>(at, drafted[i], p.uniform(r, i, Philox::Purpose::acceptance), p.vocab,
                       p.with_replacement, accepted);
    if (status != SampleStatus::ok) return status;
    if (!accepted) continue;
    tokens[depth] = drafted[i];
    nodes[depth++] = static_cast<std::int32_t>(i);
    at = place_after(node = i);
  }
  if (p.draft == nullptr && at.refused > 0) {
    std::copy(at.target, at.target + p.vocab, left);
    for (Index i = node + 1; i < p.nodes; ++i)
      if (p.is_child(drafted, parents, node, i)) left[drafted[i]] = 0;
  }
  p.accepted[r] = static_cast<std::int32_t>(depth);
  return draw_after_tree<Isa>(at, p.uniform(r, 0, Philox::Purpose::last_token), p.vocab,
                              tokens[depth]);
}

template <typename D, typename Isa, typename Draft, typename Target>
void execute(const Backend<D, Isa>& on, const problem::SpeculativeTree<Draft, Target>& p) {
  if (p.batch == 0) return;
  Workspace::Frame frame(on.workspace);
  const Index rows = p.draft == nullptr ? 1 : 2, size = rows * p.vocab;
  double* const left = frame.take<double>(
      detail::checked_product(worker_count(on), size, "verify_speculative_tree", "scratch"));
  parallel_for(on, p.batch, Cost{p.vocab, 3 * kComputeCycles},
               [&](Index first, Index last, int worker) {
                 for (Index r = first; r < last; ++r) {
                   std::int32_t* const tokens = p.tokens + r * (p.nodes + 1);
                   std::int32_t* const nodes = p.accepted_nodes + r * p.nodes;
                   std::fill(tokens, tokens + p.nodes + 1, -1);
                   std::fill(nodes, nodes + p.nodes, -1);
                   p.statuses[r] = verify_tree_row<Isa>(p, r, left + worker * size);
                   if (p.statuses[r] == SampleStatus::ok) continue;
                   p.accepted[r] = 0;
                   std::fill(tokens, tokens + p.nodes + 1, -1);
                   std::fill(nodes, nodes + p.nodes, -1);
                 }
               });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
