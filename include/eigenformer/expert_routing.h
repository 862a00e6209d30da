/// \file
/// Which experts a token goes through and how much each counts, from the logits of a router, and
/// the order of tokens by expert in which experts work (expert_feed_forward.h):
///
///   softmax             s = softmax(logits); the k largest        (Shazeer et al., 2017; Mixtral, Qwen 2 and 3)
///   softmax_of_chosen   the k largest logits; s = softmax(those)  (gpt-oss)
///   sigmoid             s = 1 / (1 + e^-logits); the k largest    (DeepSeek-AI, "DeepSeek-V3", 2024)
///
///   weight = scale * s, or scale * s / sum of the k               {.normalise = true}; of sigmoids the sum is 1e-20 more
///
/// So k sigmoids that are all 0 have weights of 0. A normalised softmax is computed as that of the
/// chosen logits, which it equals: it has no sum of 0 but of logits of -infinity alone, which a
/// bias may choose; their weights are 0, too.
///
/// With a bias (experts) the k largest of s + bias are chosen (of logits + bias with
/// softmax_of_chosen; NaN counts as -infinity), and the bias has no part in the weights: DeepSeek
/// V3's balance without a loss. With {.groups = g, .kept_groups = n} an expert is chosen only from
/// the n best groups of experts / g neighbours, a group being as good as its two best experts
/// together.
///
/// The best expert comes first; equals come by lowest index, and so do groups.
///
/// logits is (tokens, experts) of float, double, bfloat16 or half; ids (tokens, k) of int32;
/// weights (tokens, k) of float, double where the logits are; bias of float. A token whose logits
/// hold NaN or +infinity, or are all -infinity, gets the experts 0 to k - 1 and weights of NaN, and
/// disturbs no other. A token's result depends on its logits alone.
///
/// Throws std::invalid_argument for k outside 1 to experts, more than 2048 experts, more than 64
/// groups, groups that do not divide the experts or have fewer than two, kept groups with fewer
/// than k experts, a scale that is not finite and shapes that disagree. Outputs must not overlap
/// inputs. Nothing is allocated after the first call at a size.
///
/// Cost: an exponential for each expert and a comparison for most: 8 of 128 experts take 0.3 us for
/// one token, 0.6 us for each of 512 (one thread of Zen 5).
#pragma once

#include <cmath>
#include <limits>

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "cpu/expert_routing.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

inline void require_expert_routing(std::string_view name, Index experts, Index chosen,
                                   const ExpertRoutingOptions& options) {
  using problem::kMostExpertGroups;
  using problem::kMostExperts;
  require_that(experts >= 1 && experts <= kMostExperts, name, "logits are of ", experts,
               " experts, expected 1 to ", kMostExperts);
  require_that(chosen >= 1 && chosen <= experts, name, "k is ", chosen, ", expected 1 to ", experts,
               ", the experts");
  require_that(std::isfinite(options.scale), name, "scale is ", options.scale,
               ", expected a finite number");
  const Index groups = options.groups, kept = options.kept_groups;
  require_that(groups >= 1 && groups <= kMostExpertGroups && experts % groups == 0, name,
               "groups is ", groups, ", expected 1 to ", kMostExpertGroups, " that divide ",
               experts, " experts");
  if (groups == 1) return;
  require_that(experts / groups >= 2, name, "groups is ", groups,
               ", expected two experts at least in each");
  require_that(kept >= 1 && kept <= groups, name, "kept_groups is ", kept, ", expected 1 to ",
               groups);
  require_that(chosen <= kept * (experts / groups), name, "k is ", chosen,
               ", the groups kept have ", kept * (experts / groups), " experts");
}

template <Device D, typename Ids, typename Weights, typename Logits>
void route(const D& device, Ids& ids, Weights& weights, const Logits& logits, const float* bias,
           const ExpertRoutingOptions& options, Workspace& workspace) {
  constexpr auto name = "expert_routing";
  const auto from = input_view<2>(logits);
  auto chosen = output_view<2>(ids);
  auto parts = output_view<2>(weights);
  using T = scalar_of<decltype(from)>;
  require_floating_scalars<decltype(from)>();
  static_assert(std::is_same_v<scalar_of<Ids>, std::int32_t> &&
                    std::is_same_v<scalar_of<Weights>, compute_type<T>>,
                "eigenformer: ids of experts are std::int32_t, and their weights float, or double "
                "where the logits are double");
  checked_size(name, "logits", from);
  checked_size(name, "ids", chosen);
  require_same_shape(name, "ids", chosen, "weights", parts);
  require_that(chosen.dimension(0) == from.dimension(0), name, "ids has ", chosen.dimension(0),
               " rows, logits has ", from.dimension(0));
  require_expert_routing(name, from.dimension(1), chosen.dimension(1), options);
  run(device,
      problem::ExpertRouting<T>{from.data(), bias, chosen.data(), parts.data(), from.dimension(0),
                                from.dimension(1), chosen.dimension(1), options},
      workspace);
}

}  // namespace detail

/// k is the number of columns of ids and weights.
template <Device D, typename Ids, typename Weights, typename Logits>
void expert_routing_into(const D& device, Ids&& ids, Weights&& weights, const Logits& logits,
                         const ExpertRoutingOptions& options = {},
                         Workspace& workspace = thread_workspace()) {
  detail::route(device, ids, weights, logits, nullptr, options, workspace);
}
/// With a bias (experts), memory of the device as all tensors are.
template <Device D, typename Ids, typename Weights, typename Logits, RowMajorTensor Bias>
void expert_routing_into(const D& device, Ids&& ids, Weights&& weights, const Logits& logits,
                         const Bias& bias, const ExpertRoutingOptions& options = {},
                         Workspace& workspace = thread_workspace()) {
  static_assert(std::is_same_v<scalar_of<Bias>, float>,
                "eigenformer: the bias of a router's choice is float");
  const auto view = input_view<1>(bias);
  const Index experts = input_view<2>(logits).dimension(1);
  detail::require_that(view.dimension(0) == experts, "expert_routing", "bias has ",
                       view.dimension(0), " elements, logits are of ", experts, " experts");
  detail::route(device, ids, weights, logits, view.data(), options, workspace);
}

template <typename T>
struct ExpertRoutingResult {
  Tensor<std::int32_t, 2> ids;  ///< (tokens, k)
  Tensor<T, 2> weights;         ///< (tokens, k)
};

///   auto [ids, weights] = ef::expert_routing(logits, 8, {.normalise = true});
template <CpuDevice D, typename Logits>
auto expert_routing(const D& device, const Logits& logits, Index k,
                    const ExpertRoutingOptions& options = {}) {
  constexpr auto name = "expert_routing";
  const auto from = input_view<2>(logits);
  detail::require_expert_routing(name, from.dimension(1), k, options);
  const Eigen::DSizes<Index, 2> sizes(from.dimension(0), k);
  using T = compute_type<scalar_of<Logits>>;
  ExpertRoutingResult<T> result{detail::make_tensor<std::int32_t, 2>(name, "ids", sizes),
                                detail::make_tensor<T, 2>(name, "weights", sizes)};
  expert_routing_into(device, result.ids, result.weights, logits, options);
  return result;
}
template <typename Logits>
  requires(!Device<Logits>)
auto expert_routing(const Logits& logits, Index k, const ExpertRoutingOptions& options = {}) {
  return expert_routing(Eigen::DefaultDevice{}, logits, k, options);
}

// ---- order by expert ----------------------------------------------------------------------------

/// The pairs of tokens and their experts, ids (tokens, k), in the order of experts; those of one
/// expert stay in the order of tokens. Pair p is ids[p / k, p % k].
///
///   offsets[e]   where expert e's pairs begin, (experts + 1); the last is their number
///   order[i]     the pair that stands at i, (tokens * k): its token is order[i] / k
///   places[p]    where pair p stands, (tokens, k)
///
/// All are int32. Throws std::invalid_argument for shapes that disagree, for more than 2^31 - 1
/// pairs and for an id that is no expert, before anything is written: one pass over the ids. On a
/// GPU ids are not looked at before the launch: an id that is no expert gets the place -1, and
/// offsets end before it. Cost: two passes over the ids; on a GPU each expert's block makes them.
template <Device D, typename Offsets, typename Order, typename Places, typename Ids>
void expert_order_into(const D& device, Offsets&& offsets, Order&& order, Places&& places,
                       const Ids& ids, Workspace& workspace = thread_workspace()) {
  constexpr auto name = "expert_order";
  const auto from = input_view<2>(ids);
  auto first = output_view<1>(offsets);
  auto pairs = output_view<1>(order);
  auto to = output_view<2>(places);
  static_assert(std::is_same_v<scalar_of<Ids>, std::int32_t> &&
                    std::is_same_v<scalar_of<Offsets>, std::int32_t> &&
                    std::is_same_v<scalar_of<Order>, std::int32_t> &&
                    std::is_same_v<scalar_of<Places>, std::int32_t>,
                "eigenformer: ids, offsets, order and places are std::int32_t");
  const Index count = detail::checked_size(name, "ids", from), experts = first.dimension(0) - 1;
  detail::require_that(count <= (std::numeric_limits<std::int32_t>::max)(), name, "ids has ", count,
                       " elements, expected at most 2147483647");
  detail::require_that(experts >= 1 && experts <= problem::kMostExperts, name, "offsets has ",
                       first.dimension(0), " elements, expected 2 to ", problem::kMostExperts + 1);
  detail::require_that(pairs.dimension(0) == count, name, "order has ", pairs.dimension(0),
                       " elements, ids has ", count);
  detail::require_same_shape(name, "places", to, "ids", from);
  if constexpr (detail::host_readable<D>)
    for (Index p = 0; p < count; ++p)
      detail::require_that(from.data()[p] >= 0 && from.data()[p] < experts, name, "id ",
                           from.data()[p], " of pair ", p, " is no expert, expected 0 <= id < ",
                           experts);
  detail::run(
      device,
      problem::ExpertOrder{from.data(), first.data(), pairs.data(), to.data(), count, experts},
      workspace);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
