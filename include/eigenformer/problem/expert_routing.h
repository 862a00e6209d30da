/// \file
/// What the routing of tokens to experts asks for, and the order of tokens by expert.
#pragma once

#include <cstdint>

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

/// What the logits of a router become.
enum class ExpertScores {
  softmax,            ///< over all experts: Mixtral, Qwen
  softmax_of_chosen,  ///< over those that were chosen: gpt-oss
  sigmoid,            ///< of each expert by itself: DeepSeek V3
};

struct ExpertRoutingOptions {
  ExpertScores scores = ExpertScores::softmax;
  bool normalise = false;  ///< weights of a token add up to 1 (norm_topk_prob)
  float scale = 1;         ///< of all weights (routed_scaling_factor)
  Index groups = 1;        ///< neighbours in so many groups of one size (n_group) ...
  Index kept_groups = 1;   ///< ... of which the best are chosen from (topk_group)
};

namespace problem {

inline constexpr Index kMostExperts = 2048, kMostExpertGroups = 64;

/// A checked request: pointers, sizes and rules.
template <typename T>
struct ExpertRouting {
  using compute = compute_type<T>;
  const T* logits;    // (tokens, experts)
  const float* bias;  // (experts), added to scores for the choice alone, or nullptr
  std::int32_t* ids;  // (tokens, chosen)
  compute* weights;   // (tokens, chosen)
  Index tokens, experts, chosen;
  ExpertRoutingOptions options;

  /// Whether experts are chosen by their scores: else by their logits, whose order is the same and
  /// which do not round to equals.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool chooses_by_score() const {
    return bias != nullptr || options.groups > 1;
  }
  /// Whether weights are the softmax of the chosen logits, which that of all becomes where it is
  /// normalised: so computed it has no sum of 0.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool weighs_by_logit() const {
    return options.scores == ExpertScores::softmax_of_chosen ||
           (options.scores == ExpertScores::softmax && options.normalise);
  }
};

/// The pairs (token, expert) in the order of experts, those of one expert in the order of tokens.
struct ExpertOrder {
  const std::int32_t* ids;  // (pairs)
  std::int32_t* offsets;    // (experts + 1): where the pairs of an expert begin
  std::int32_t* order;      // (pairs): which pair stands there
  std::int32_t* places;     // (pairs): where a pair stands; -1 where its id is no expert
  Index pairs, experts;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
