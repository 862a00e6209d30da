/// \file
/// INT8 keys with a scale for each channel: q . (stored * scales) = (q * scales) . stored, so queries
/// take the scales, one multiplication per element, rounded to their scalar, and the kernel is that
/// of any other INT8 keys. Costs a copy of the queries.
#pragma once

#include "../../core/workspace.h"
#include "../../problem/attention.h"
#include "../backend.h"
#include "../vector/copy.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// The same problem without such scales; its queries live in the frame.
template <typename D, typename Isa, typename Problem>
Problem take_channel_scales(const Backend<D, Isa>& on, const Problem& p, Workspace::Frame& frame) {
  using T = std::remove_cvref_t<decltype(*p.queries)>;
  using V = simd::Vec<compute_type<T>, Isa>;
  const problem::AttentionSequence& last = p.sequences[p.batch - 1];
  const Index rows = last.query_begin + last.tensor_rows, row = p.heads * p.head_dim;
  T* const queries = frame.take<T>(detail::checked_product(rows, row, "attention", "queries"));
  parallel_for(on, rows, Cost{row, kMoveCycles}, [&](Index first, Index end, int) {
    for (Index r = first; r < end; ++r)
      for (Index h = 0; h < p.heads; ++h) {
        const T* const from = p.query(r, h);
        const float* const scales = p.source.key_channel_scales + h / p.group() * p.head_dim;
        T* const to = queries + r * row + h * p.head_dim;
        for_each_vector<V>(0, p.head_dim, [&](Index at, auto part) {
          store(load<V>(from + at, part) * load<V>(scales + at, part), to + at, part);
        });
      }
  });
  Problem result = p;
  result.queries = queries;
  result.query_strides = {row, p.head_dim};
  result.source.key_channel_scales = nullptr;
  return result;
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
