/// \file
/// CPU kernels of experts: the linear layer's product (linear/parts.h), in which the experts that
/// have few rows go side by side, so that one token's or a few tokens' weights are one stream that
/// threads share, and many tokens' tiles are packed together. A row has the bits of that layer.
/// Rows of tokens are first copied side by side, those of some experts at a time. Scratch is that
/// of the worst way in which so many tokens may be routed, so that no later call takes more. The
/// sums: one pass over the results.
#pragma once

#include <algorithm>
#include <new>

#include "../core/workspace.h"
#include "../problem/expert_feed_forward.h"
#include "backend.h"
#include "linear/layer.h"
#include "vector/copy.h"
#include "vector/functions.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// What expert e is asked for, whose rows of x begin at `rows`.
template <typename Y, typename X, typename S, bool Gated, typename E>
auto layer_of_expert(const problem::ExpertLinear<Y, X, S, Gated, E>& p, Index e, const X* rows) {
  E epilogue = p.epilogue;
  if (epilogue.bias != nullptr) epilogue.bias += e * p.bias_size();
  return problem::PackedLinear<Y, X, S, Gated, E>{p.y + p.offsets[e] * p.out,
                                                  rows,
                                                  p.weights[e],
                                                  p.offsets[e + 1] - p.offsets[e],
                                                  p.in,
                                                  p.out,
                                                  epilogue};
}

/// Where those experts end, from `first` on, that are multiplied together: as many as have `most`
/// rows at most, one at least.
template <typename Problem>
Index end_of_batch(const Problem& p, Index first, Index most) {
  Index end = first + 1;
  while (end < p.experts && p.offsets[end + 1] - p.offsets[first] <= most) ++end;
  return end;
}

/// Experts [first, end), whose rows of x begin at `rows`. Scratch: see products.
template <typename Layer, typename D, typename Isa, typename Problem, typename X>
void multiply_experts(const Backend<D, Isa>& on, const Problem& p, const Layer& layer, Index first,
                      Index end, const X* rows, Index scratch_rows) {
  using Product = decltype(layer.make(layer_of_expert(p, first, rows)));
  Workspace::Frame frame(on.workspace);
  auto* const all = frame.take<Product>(scratch_rows);  // each has a row or more
  Index count = 0;
  for (Index e = first; e < end; ++e) {
    const Index before = p.offsets[e] - p.offsets[first];
    if (p.offsets[e + 1] > p.offsets[e])
      ::new (static_cast<void*>(all + count++))
          Product(layer.make(layer_of_expert(p, e, rows + before * p.in)));
  }
  if (count > 0) products<typename Layer::Dot>(on, all, count, scratch_rows);
}

/// In batches, each of whose rows are copied side by side where there is an order.
template <typename Layer, typename D, typename Isa, typename Problem, typename X>
void multiply_experts(const Backend<D, Isa>& on, const Problem& p, const Layer& layer, const X* x) {
  using Weights = decltype(layer.make(layer_of_expert(p, 0, x)).weights);
  constexpr Index most = block_rows<typename Layer::Dot, is_packed<Weights>>();
  // one expert may have all tokens, or more where a token names it twice
  Index longest = (std::min)(p.pairs, (std::max)(most, p.tokens)), end = 0;
  for (Index e = 0; e < p.experts; ++e)
    longest = std::max<Index>(longest, p.offsets[e + 1] - p.offsets[e]);
  const Index scratch_rows =
      Tiles<typename Layer::Dot>::padded_rows_of_parts((std::min)(p.pairs, most));
  const Index chosen = p.order == nullptr ? 1 : p.pairs / p.tokens;
  Workspace::Frame frame(on.workspace);
  X* const gathered = frame.take<X>(p.order == nullptr ? 0 : longest * p.in);
  for (Index e = 0; e < p.experts; e = end) {
    end = end_of_batch(p, e, most);
    const Index first = p.offsets[e];
    if (p.order != nullptr)
      parallel_for(
          on, p.offsets[end] - first, Cost{p.in, kMoveCycles}, [&](Index begin, Index last, int) {
            for (Index i = begin; i < last; ++i)
              copy_line<Isa>(x + p.order[first + i] / chosen * p.in, gathered + i * p.in, p.in);
          });
    multiply_experts(on, p, layer, e, end, p.order == nullptr ? x + first * p.in : gathered,
                     scratch_rows);
  }
}

template <typename D, typename Isa, typename Y, typename X, typename S, bool Gated, typename E>
void execute(const Backend<D, Isa>& on, const problem::ExpertLinear<Y, X, S, Gated, E>& p) {
  if (p.pairs == 0) return;
  require_layout(Isa{}, p.weights[0], "expert_linear");  // and those of all are of one layout
  with_packed_product<Isa>(layer_of_expert(p, 0, p.x),
                           [&](const auto& layer) { multiply_experts(on, p, layer, p.x); });
}

template <typename D, typename Isa, typename Y, typename X, typename W>
void execute(const Backend<D, Isa>& on, const problem::ExpertCombine<Y, X, W>& p) {
  using C = typename problem::ExpertCombine<Y, X, W>::compute;
  using V = simd::Vec<C, Isa>;
  parallel_for(on, p.tokens, Cost{p.features * p.chosen, kPackCycles},
               [&](Index begin, Index end, int) {
                 for (Index t = begin; t < end; ++t) {
                   const std::int32_t* const places = p.places + t * p.chosen;
                   const W* const weights = p.weights + t * p.chosen;
                   V gate = V::set1(1);
                   if (p.shared_gate != nullptr)
                     gate = sigmoid(V::set1(static_cast<C>(p.shared_gate[t])));
                   for_each_vector<V>(0, p.features, [&](Index at, auto part) {
                     V sum = V::zero();
                     for (Index j = 0; j < p.chosen; ++j)
                       sum = fma(V::set1(static_cast<C>(weights[j])),
                                 cpu::load<V>(p.x + places[j] * p.features + at, part), sum);
                     if (p.shared != nullptr)
                       sum = fma(gate, cpu::load<V>(p.shared + t * p.features + at, part), sum);
                     store(sum, p.y + t * p.features + at, part);
                   });
                 }
               });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
