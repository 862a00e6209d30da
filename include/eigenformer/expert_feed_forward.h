/// \file
/// The feed-forward of a mixture of experts: every token goes through k experts, and their results
/// are added by weight (Shazeer et al., "Outrageously Large Neural Networks", 2017):
///
///   y[t] = sum over j of weights[t, j] * down_e (function(gate_e x[t]) * up_e x[t]),   e = ids[t, j]
///
///   auto [ids, weights] = ef::expert_routing(ef::linear(x, router), k);                       // expert_routing.h
///   ef::expert_feed_forward_into(device, y, x, ids, weights, gate_ups, downs, ef::Epilogue{}.silu());
///
/// x is (tokens, in), ids and weights (tokens, k), y (tokens, out), what lies between in x's
/// scalar. gate_ups and downs are spans of one PackedGatedWeight (hidden, in) and one PackedWeight
/// (out, hidden) per expert, all of one shape, scalar and layout. The call is these four, which a
/// model of another form puts together itself:
///
///   ef::expert_order_into(device, offsets, order, places, ids);                               // expert_routing.h
///   ef::expert_linear_into(device, h, x, gate_ups, offsets, order, ef::Epilogue{}.silu());    // h (tokens * k, hidden), by expert
///   ef::expert_linear_into(device, r, h, downs, offsets);                                     // r (tokens * k, out), by expert
///   ef::combine_experts_into(device, y, r, places, weights);                                  // y (tokens, out)
///   ef::combine_experts_into(device, y, r, places, weights, shared);                          // + shared[t]: an expert of all tokens
///   ef::combine_experts_into(device, y, r, places, weights, shared, gate);                    // + sigmoid(gate[t]) * shared[t]: Qwen 2
///
/// Scalars, weights and values of a product are those of linear.h, row by row to the bit. A sum is
/// one chain of multiply-adds over j in ascending order in float (double where one is double),
/// then the shared expert's: so a token's bits depend neither on the others nor on threads, and a
/// token that holds NaN harms no other. An epilogue has a function and a bias, (experts * out) of
/// one expert after the other (of gated weights 2 * out each, gate's then up's); no residual.
///
/// Throws std::invalid_argument for shapes that disagree, weights of different shapes, scalars or
/// layouts, offsets that do not rise from 0 to the pairs, and for an order or places out of range:
/// one pass over them on the host. On a GPU those are not looked at: offsets must be what
/// expert_order_into wrote; a place out of range gives NaN. Outputs must not overlap inputs.
/// Nothing is allocated after the first call at a size, whatever the routes of tokens that name no
/// expert twice.
///
/// Cost: for few tokens the weights of the experts that have some, read once; for many the
/// products. On a CPU the experts that have few rows (up to 192 together) are multiplied side by
/// side, their weights one stream that all threads share. Measured on Zen 5 beside the memory's own
/// read bandwidth, 8 of 128 experts of 2048 x 768 for each token, in an ef::ParallelRegion: one
/// token reads its weights at 100% of it on one thread and 97% on two (float), 95 and 90%
/// (bfloat16), 90 and 87% (INT8); on two threads 16 tokens take 1.94 to 2.0 times less, 512 tokens
/// 1.8 to 1.97 times. Scratch: the rows of all tokens, or up to 192 where there are fewer.
/// On a GPU nothing waits for the host: one launch for all experts, whose blocks look up in
/// `offsets` which expert's rows are theirs, in a grid for the worst case, of which the blocks that
/// find nothing end at once; the rows are put side by side before that, and tiles are chosen as if
/// one expert had all of them.
#pragma once

#include <limits>
#include <ranges>
#include <span>
#include <type_traits>

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "cpu/expert_feed_forward.h"
#include "expert_routing.h"
#include "linear.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename W>
inline constexpr bool is_packed_gated_weight = false;
template <typename S>
inline constexpr bool is_packed_gated_weight<PackedGatedWeight<S>> = true;

template <typename S>
const PackedWeight<S>& panels_owner(const PackedWeight<S>& weight) {
  return weight;
}
template <typename S>
const PackedWeight<S>& panels_owner(const PackedGatedWeight<S>& weight) {
  return weight.pair();
}

/// Offsets and order of experts as checked for a product: nullptr where x is by expert.
struct ExpertRows {
  const std::int32_t* offsets;
  const std::int32_t* order;
  Index experts, pairs;
};

template <Device D>
void require_expert_rows(std::string_view name, [[maybe_unused]] const ExpertRows& rows) {
  if constexpr (host_readable<D>) {
    bool rise = rows.offsets[0] == 0 && rows.offsets[rows.experts] == rows.pairs;
    for (Index e = 0; e < rows.experts; ++e) rise = rise && rows.offsets[e] <= rows.offsets[e + 1];
    require_that(rise, name, "offsets do not rise from 0 to ", rows.pairs, " rows");
    for (Index i = 0; rows.order != nullptr && i < rows.pairs; ++i)
      require_that(rows.order[i] >= 0 && rows.order[i] < rows.pairs, name, "order holds ",
                   rows.order[i], " at ", i, ", expected 0 to ", rows.pairs - 1);
  }
}

template <typename Weights>
void require_expert_weights(std::string_view name, const Weights& weights) {
  require_that(!weights.empty(), name, "weights is empty, expected one for each expert");
  for (const auto& weight : weights) {
    const auto& one = weights.front();
    const bool same = weight.rows() == one.rows() && weight.columns() == one.columns();
    if (!same)
      require_that(false, name, "weights have shapes (", one.rows(), ", ", one.columns(), ") and (",
                   weight.rows(), ", ", weight.columns(), "), expected one shape");
    const auto &own = panels_owner(weight), &first = panels_owner(one);
    require_that(own.layout() == first.layout() && own.group_size() == first.group_size() &&
                     (own.minimums() == nullptr) == (first.minimums() == nullptr) &&
                     own.quantizes_activations() == first.quantizes_activations(),
                 name, "weights are packed in different ways, expected one layout");
  }
}

template <Device D, typename Output, typename Input, typename Weights, typename E>
void expert_linear(const D& device, Output& y, const Input& x, const Weights& weights,
                   const ExpertRows& rows, const E& epilogue, Workspace& workspace) {
  constexpr std::string_view name = "expert_linear";
  const auto to = output_view<2>(y);
  const auto from = input_view<2>(x);
  const std::span all(weights);
  using Weight = std::remove_const_t<typename decltype(all)::element_type>;
  constexpr bool gated = is_packed_gated_weight<Weight>;
  using S = std::remove_const_t<std::remove_pointer_t<decltype(panels_owner(all[0]).data())>>;
  using X = scalar_of<Input>;
  using Y = scalar_of<Output>;
  require_packed_scalars<X, S>();
  require_expert_weights(name, all);
  const Index experts = static_cast<Index>(all.size()), tokens = from.dimension(0),
              out = all[0].rows();
  require_that(rows.experts == experts, name, "offsets are of ", rows.experts,
               " experts, there are weights of ", experts);
  const bool fit = rows.order == nullptr
                       ? tokens == rows.pairs
                       : rows.pairs == 0 || (tokens > 0 && rows.pairs % tokens == 0);
  require_that(fit, name, "x has ", tokens, " rows, there are ", rows.pairs, " pairs",
               rows.order == nullptr ? ": expected as many" : ": expected as many for each row");
  // the bias is that of all experts, and the rows those of the pairs
  checked_size(name, "x", from);
  require_that(epilogue.residual_rows() == E::kNone, name, "the epilogue has a residual");
  const Index bias = gated ? 2 * out : out;
  require_that(epilogue.bias_size() == E::kNone || epilogue.bias_size() == experts * bias, name,
               "bias has ", epilogue.bias_size(), " elements, expected ", bias, " for each of ",
               experts, " experts");
  require_linear(
      {name, "weight"}, to, TensorView<const X, 2>(from.data(), rows.pairs, from.dimension(1)),
      Epilogue<typename E::function, typename E::bias_scalar, typename E::residual_scalar>{}, out,
      all[0].columns(), gated ? 2 : 1);
  require_expert_rows<D>(name, rows);
  if (rows.pairs == 0) return;
  using Problem = problem::ExpertLinear<Y, X, S, gated, typename E::pointers>;
  Workspace::Frame frame(workspace);
  auto* const panels = frame.take<problem::PackedPanels<const S>>(experts);
  for (Index e = 0; e < experts; ++e)
    ::new (static_cast<void*>(panels + e))
        problem::PackedPanels<const S>(panels_owner(all[static_cast<std::size_t>(e)]).panels());
  run(device,
      Problem{to.data(), from.data(), rows.offsets, rows.order, panels, experts, rows.pairs, tokens,
              from.dimension(1), out, epilogue},
      workspace);
}

template <typename Offsets>
ExpertRows expert_rows(const Offsets& offsets, Index pairs) {
  static_assert(std::is_same_v<scalar_of<Offsets>, std::int32_t>,
                "eigenformer: offsets of experts are std::int32_t");
  const auto view = input_view<1>(offsets);
  require_that(view.dimension(0) >= 2, "expert_linear", "offsets has ", view.dimension(0),
               " elements, expected one more than there are experts");
  return {view.data(), nullptr, view.dimension(0) - 1, pairs};
}

/// Rows of what was not given: an empty tensor, which was, has no memory either.
inline constexpr Index kNotGiven = -1;

template <Device D, typename Y, typename X, typename Places, typename Weights, typename S>
void combine_experts(const D& device, Y& y, const X& x, const Places& places,
                     const Weights& weights, const S* shared, Index shared_rows,
                     Index shared_columns, const scalar_of<Weights>* gate, Index gates) {
  constexpr auto name = "combine_experts";
  const auto to = output_view<2>(y);
  const auto from = input_view<2>(x);
  const auto at = input_view<2>(places);
  const auto parts = input_view<2>(weights);
  using W = scalar_of<Weights>;
  static_assert(std::is_same_v<S, scalar_of<X>>,
                "eigenformer: the shared expert's results have the scalar of the others'");
  static_assert(std::is_same_v<scalar_of<Places>, std::int32_t>,
                "eigenformer: places of experts are std::int32_t");
  require_floating_scalars<decltype(to), decltype(from), decltype(parts)>();
  checked_size(name, "x", from);
  checked_size(name, "y", to);
  require_same_shape(name, "places", at, "weights", parts);
  require_that(at.dimension(0) == to.dimension(0), name, "places has ", at.dimension(0),
               " rows, y has ", to.dimension(0));
  require_that(to.dimension(1) == from.dimension(1), name, "y has ", to.dimension(1),
               " columns, x has ", from.dimension(1));
  require_that(shared_rows == kNotGiven ||
                   (shared_rows == to.dimension(0) && shared_columns == to.dimension(1)),
               name, "shared has shape (", shared_rows, ", ", shared_columns, "), y has shape ",
               shape_text(to));
  require_that(gates == kNotGiven || gates == to.dimension(0), name, "shared_gate has ", gates,
               " elements, y has ", to.dimension(0), " rows");
  if constexpr (host_readable<D>)
    for (Index p = 0; p < at.size(); ++p)
      require_that(at.data()[p] >= 0 && at.data()[p] < from.dimension(0), name, "places holds ",
                   at.data()[p], ", x has ", from.dimension(0), " rows");
  run(device, problem::ExpertCombine<scalar_of<Y>, scalar_of<X>, W>{
                  to.data(), from.data(), at.data(), parts.data(), shared, gate, to.dimension(0),
                  at.dimension(1), to.dimension(1), from.dimension(0)});
}

}  // namespace detail

/// y (pairs, out) from x (pairs, in), both by expert: rows [offsets[e], offsets[e + 1]) are e's.
template <Device D, typename Output, typename Input, typename Weights, RowMajorTensor Offsets,
          typename E = Epilogue<>>
  requires detail::is_epilogue<E>
void expert_linear_into(const D& device, Output&& y, const Input& x, const Weights& weights,
                        const Offsets& offsets, const E& epilogue = {},
                        Workspace& workspace = thread_workspace()) {
  const auto rows = detail::expert_rows(offsets, output_view<2>(y).dimension(0));
  detail::expert_linear(device, y, x, weights, rows, epilogue, workspace);
}
/// y (pairs, out), by expert, from x (tokens, in): row i is made from that of pair order[i].
template <Device D, typename Output, typename Input, typename Weights, RowMajorTensor Offsets,
          RowMajorTensor Order, typename E = Epilogue<>>
  requires detail::is_epilogue<E>
void expert_linear_into(const D& device, Output&& y, const Input& x, const Weights& weights,
                        const Offsets& offsets, const Order& order, const E& epilogue = {},
                        Workspace& workspace = thread_workspace()) {
  static_assert(std::is_same_v<scalar_of<Order>, std::int32_t>,
                "eigenformer: the order by expert is std::int32_t");
  const auto pairs = input_view<1>(order);
  auto rows = detail::expert_rows(offsets, pairs.dimension(0));
  static constexpr std::int32_t kNone = 0;  // of no pairs, an order without memory
  rows.order = pairs.data() != nullptr ? pairs.data() : &kNone;
  detail::expert_linear(device, y, x, weights, rows, epilogue, workspace);
}

/// y (tokens, features) from x (pairs, features).
template <Device D, typename Y, typename X, typename Places, typename Weights>
void combine_experts_into(const D& device, Y&& y, const X& x, const Places& places,
                          const Weights& weights) {
  detail::combine_experts(device, y, x, places, weights, static_cast<const scalar_of<X>*>(nullptr),
                          detail::kNotGiven, 0, nullptr, detail::kNotGiven);
}
template <Device D, typename Y, typename X, typename Places, typename Weights, typename Shared>
void combine_experts_into(const D& device, Y&& y, const X& x, const Places& places,
                          const Weights& weights, const Shared& shared) {
  const auto all = input_view<2>(shared);
  detail::combine_experts(device, y, x, places, weights, all.data(), all.dimension(0),
                          all.dimension(1), nullptr, detail::kNotGiven);
}
template <Device D, typename Y, typename X, typename Places, typename Weights, typename Shared,
          typename Gate>
void combine_experts_into(const D& device, Y&& y, const X& x, const Places& places,
                          const Weights& weights, const Shared& shared, const Gate& shared_gate) {
  static_assert(std::is_same_v<scalar_of<Gate>, scalar_of<Weights>>,
                "eigenformer: the shared expert's gate has the scalar of the weights");
  const auto all = input_view<2>(shared);
  const auto gate = input_view<1>(shared_gate);
  detail::combine_experts(device, y, x, places, weights, all.data(), all.dimension(0),
                          all.dimension(1), gate.data(), gate.dimension(0));
}

/// All of it, for experts that are gated units.
template <Device D, typename Y, typename X, typename Ids, typename Weights, typename GateUps,
          typename Downs, typename E>
  requires detail::is_epilogue<E>
void expert_feed_forward_into(const D& device, Y&& y, const X& x, const Ids& ids,
                              const Weights& weights, const GateUps& gate_ups, const Downs& downs,
                              const E& epilogue, Workspace& workspace = thread_workspace()) {
  constexpr auto name = "expert_feed_forward";
  const auto from = input_view<2>(x);
  const auto at = input_view<2>(ids);
  const std::span first(gate_ups);
  const std::span second(downs);
  detail::require_expert_weights(name, first);
  detail::require_expert_weights(name, second);
  detail::require_that(at.dimension(0) == from.dimension(0), name, "ids has ", at.dimension(0),
                       " rows, x has ", from.dimension(0));
  const Index pairs = detail::checked_size(name, "ids", at), hidden = first[0].rows(),
              out = second[0].rows(), experts = static_cast<Index>(first.size());
  using T = scalar_of<X>;
  detail::checked_size(name, "hidden", TensorView<const T, 2>(nullptr, pairs, hidden));
  detail::checked_size(name, "results", TensorView<const T, 2>(nullptr, pairs, out));
  auto frame = detail::tensor_frame(device, workspace);
  using Ints = TensorView<std::int32_t, 1>;
  Ints offsets(frame.template take<std::int32_t>(experts + 1), experts + 1);
  Ints order(frame.template take<std::int32_t>(pairs), pairs);
  TensorView<std::int32_t, 2> places(frame.template take<std::int32_t>(pairs), at.dimension(0),
                                     at.dimension(1));
  TensorView<T, 2> inner(frame.template take<T>(pairs * hidden), pairs, hidden),
      results(frame.template take<T>(pairs * out), pairs, out);
  expert_order_into(device, offsets, order, places, at, workspace);
  expert_linear_into(device, inner, from, first, offsets, order, epilogue, workspace);
  expert_linear_into(device, results, inner, second, offsets, Epilogue{}, workspace);
  combine_experts_into(device, y, results, places, weights);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
