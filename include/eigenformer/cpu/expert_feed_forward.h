/// \file
/// CPU kernels of experts: the linear layer's product (linear/linear.h) for one expert after the
/// other, over its own rows, so that a row has the bits of that layer; threads share each product.
/// Rows of tokens are first copied side by side, those of one expert at a time. The sums: one pass
/// over the results.
#pragma once

#include <algorithm>
#include <limits>

#include "../core/workspace.h"
#include "../problem/expert_feed_forward.h"
#include "backend.h"
#include "linear/layer.h"
#include "vector/copy.h"
#include "vector/functions.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename D, typename Isa, typename Y, typename X, typename S, bool Gated, typename E>
void execute(const Backend<D, Isa>& on, const problem::ExpertLinear<Y, X, S, Gated, E>& p) {
  if (p.pairs == 0) return;
  Index most = 0;
  for (Index e = 0; e < p.experts; ++e)
    most = std::max<Index>(most, p.offsets[e + 1] - p.offsets[e]);
  const Index chosen = p.order == nullptr ? 1 : p.pairs / p.tokens;
  Workspace::Frame frame(on.workspace);
  X* const gathered = frame.take<X>(p.order == nullptr ? 0 : most * p.in);
  for (Index e = 0; e < p.experts; ++e) {
    const Index first = p.offsets[e], count = p.offsets[e + 1] - first;
    if (count == 0) continue;
    const X* rows = p.x + first * p.in;
    if (p.order != nullptr) {
      parallel_for(on, count, Cost{p.in, kMoveCycles}, [&](Index begin, Index end, int) {
        for (Index i = begin; i < end; ++i)
          copy_line<Isa>(p.x + p.order[first + i] / chosen * p.in, gathered + i * p.in, p.in);
      });
      rows = gathered;
    }
    E epilogue = p.epilogue;
    if (epilogue.bias != nullptr) epilogue.bias += e * p.bias_size();
    execute(on, problem::PackedLinear<Y, X, S, Gated, E>{p.y + first * p.out, rows, p.weights[e],
                                                         count, p.in, p.out, epilogue});
  }
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
