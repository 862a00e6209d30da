/// \file
/// What the verification of token trees asks for.
#pragma once

#include <cstdint>

#include "../core/philox.h"
#include "sampling_params.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// Multi-round rejection sampling along drafted trees. Place 0 is the root, place i + 1 node i.
template <typename Draft, typename Target>
struct SpeculativeTree {
  const std::int32_t* draft_tokens;  // (batch, nodes)
  const std::int32_t* parents;       // (batch, nodes), or (nodes) for all rows
  Index parents_stride;              // nodes, or 0
  const Draft* draft;                // (batch, nodes + 1, vocab), or nullptr: drafts are certain
  const Target* target;              // (batch, nodes + 1, vocab)
  Index batch, nodes, vocab;
  bool with_replacement;
  const Philox* generators;
  Index generators_stride;
  std::int32_t* accepted;        // (batch)
  std::int32_t* tokens;          // (batch, nodes + 1), -1 past the last
  std::int32_t* accepted_nodes;  // (batch, nodes), -1 past the last
  SampleStatus* statuses;        // (batch); where not ok nothing is accepted and every token is -1

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE double uniform(Index row, Index index,
                                                            Philox::Purpose purpose) const {
    const auto counter = static_cast<std::uint32_t>(index);
    return generators_stride == 0
               ? generators[0].uniform(static_cast<std::uint32_t>(row), counter, purpose)
               : generators[row].uniform(0, counter, purpose);
  }

  /// Whether node i is a child of `node` (-1: the root) that is tried: a token, and where siblings
  /// cannot be equal, not that of an earlier one.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool is_child(const std::int32_t* tokens_of_row,
                                                           const std::int32_t* parents_of_row,
                                                           Index node, Index i) const {
    const std::int32_t token = tokens_of_row[i];
    if (parents_of_row[i] != node || i <= node || token < 0 || token >= vocab) return false;
    if (draft != nullptr && with_replacement) return true;
    for (Index before = node + 1; before < i; ++before)
      if (parents_of_row[before] == node && tokens_of_row[before] == token) return false;
    return true;
  }
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
