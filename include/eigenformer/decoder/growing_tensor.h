/// \file
/// Activations that a decoder keeps from step to step, in the memory of its device; token ids.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "../core/packed_array.h"
#include "../core/rows.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Ids are in [0, vocabulary): a GPU could not say so.
inline void require_ids(std::string_view name, std::span<const std::int32_t> ids,
                        Index vocabulary) {
  for (std::size_t t = 0; t < ids.size(); ++t)
    require_that(ids[t] >= 0 && ids[t] < vocabulary, name, "id ", ids[t], " at position ", t,
                 " is outside the vocabulary, expected 0 <= id < ", vocabulary);
}

/// Its memory grows and does not shrink: shapes up to one seen before allocate nothing.
template <typename T, int Rank>
class GrowingTensor {
 public:
  /// Its shape from now on, its elements whatever was there.
  TensorView<T, Rank> reshape(const Memory& memory, const Eigen::DSizes<Index, Rank>& sizes) {
    elements_.resize(
        checked_size("Decoder", "activations", TensorView<const T, Rank>(nullptr, sizes)), memory);
    sizes_ = sizes;
    return view();
  }
  TensorView<T, Rank> view() { return {elements_.data(), sizes_}; }
  TensorView<const T, Rank> view() const { return {elements_.data(), sizes_}; }

 private:
  PackedArray<T> elements_;
  Eigen::DSizes<Index, Rank> sizes_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
