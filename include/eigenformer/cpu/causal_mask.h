/// \file
/// CPU kernel of the causal mask. A row is at most four runs of one value, so the kernel fills runs: one streaming write of
/// batch * queries * keys * sizeof(T) bytes and no arithmetic on elements. Packed documents are compared key by key.
#pragma once

#include <limits>

#include "../core/device.h"
#include "../core/visibility.h"
#include "simd/simd.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// A checked request: pointers and sizes only.
template <typename T>
struct CausalMaskProblem {
  T* mask;  // (batch, query_length, key_length)
  Index batch, query_length, key_length, query_offset;
  Visibility visibility;
  const std::int32_t* segment_ids;  // (key_length) of sequence 0, nullptr where there is one document
  Index segment_stride;             // from one sequence of the batch to the next, 0 where shared

  EIGENFORMER_HOST_DEVICE constexpr bool visible(Index b, Index i, Index j) const {
    const Index position = query_offset + i;
    if (!visibility.visible(position, j)) return false;
    if (segment_ids == nullptr) return true;
    const std::int32_t* ids = segment_ids + b * segment_stride;
    return position >= 0 && position < key_length && ids[position] == ids[j];
  }
};

namespace cpu {

template <typename Isa, typename T>
void fill_run(T* begin, T* end, T value) {
  using V = simd::Vec<compute_type<T>, Isa>;
  const V wide = V::set1(static_cast<compute_type<T>>(value));
  for (; end - begin >= V::lanes; begin += V::lanes) wide.store(begin);
  wide.store_partial(begin, static_cast<int>(end - begin));
}

template <typename Isa, typename T>
void causal_mask_row(const CausalMaskProblem<T>& p, Index b, Index i, T* row) {
  const T open = T(0), blocked = -std::numeric_limits<T>::infinity();
  if (p.segment_ids != nullptr) {
    for (Index j = 0; j < p.key_length; ++j) row[j] = p.visible(b, i, j) ? open : blocked;
    return;
  }
  const Index prefix = std::min(p.visibility.prefix, p.key_length);
  const KeyRange keys = p.visibility.keys(p.query_offset + i, p.key_length);
  const Index begin = std::clamp(keys.begin, prefix, p.key_length), end = std::clamp(keys.end, begin, p.key_length);
  fill_run<Isa>(row, row + prefix, open);
  fill_run<Isa>(row + prefix, row + begin, blocked);
  fill_run<Isa>(row + begin, row + end, open);
  fill_run<Isa>(row + end, row + p.key_length, blocked);
}

template <typename Isa, CpuDevice D, typename T>
void causal_mask(Isa, const D& device, const CausalMaskProblem<T>& p) {
  const Index grain = 1 + 16384 / (p.key_length + 1);  // a task writes at least 16k elements: less does not pay for waking a thread
  parallel_for(device, p.batch * p.query_length, grain, [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r)
      causal_mask_row<Isa>(p, r / p.query_length, r % p.query_length, p.mask + r * p.key_length);
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
