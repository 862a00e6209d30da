/// \file
/// What a causal mask asks for.
#pragma once

#include "visibility.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// A checked request: pointers and sizes only.
template <typename T>
struct CausalMask {
  T* mask;  // (batch, query_length, key_length)
  Index batch, query_length, key_length, query_offset;
  Visibility visibility;
  // (key_length) of sequence 0, nullptr where there is one document
  const std::int32_t* segment_ids;
  Index segment_stride;  // from one sequence of the batch to the next, 0 where shared

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr bool visible(Index b, Index i,
                                                                    Index j) const {
    const Index position = query_offset + i;
    if (!visibility.visible(position, j)) return false;
    if (segment_ids == nullptr) return true;
    const std::int32_t* ids = segment_ids + b * segment_stride;
    return position >= 0 && position < key_length && ids[position] == ids[j];
  }
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
