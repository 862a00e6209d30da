/// \file
/// Part of tensor_parallel.h, which includes it: a rank's rows of a weight, as a view and packed.
#pragma once

#include <string_view>
#include <type_traits>

#include "../communicator.h"
#include "../core/check.h"
#include "../core/device.h"
#include "../core/rows.h"
#include "../linear.h"
#include "../problem/tensor_parallel.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// A view, no copy, of the rows [begin, end) of a weight (out, in), or of the elements of a bias
/// (out), that belong to a rank; as const as its argument. Throws std::invalid_argument for a rank
/// outside [0, world_size) or world_size < 1.
///
///   auto shard = ef::column_shard(weight, rank, world_size);
template <typename Weight>
  requires(!std::same_as<std::remove_cvref_t<Weight>, Int4View>)
auto column_shard(Weight&& weight, int rank, int world_size) {
  constexpr int kRank = rank_of<Weight> == 1 ? 1 : 2;
  static_assert(std::is_lvalue_reference_v<Weight> || !detail::owns_its_elements<Weight>,
                "eigenformer: column_shard returns a view, and this tensor ends with the "
                "expression. Give it a name first.");
  const auto full = input_view<kRank>(weight);
  detail::checked_size("column_shard", "weight", full);
  auto sizes = detail::sizes_of<kRank>(full);
  const ShardRange rows = shard_range(sizes[0], rank, world_size);
  const Index begin = rows.begin * (kRank == 1 ? 1 : sizes[kRank - 1]);
  sizes[0] = rows.size();
  if constexpr (RowMajorTensor<Weight>)
    return TensorView<std::remove_pointer_t<decltype(weight.data())>, kRank>(weight.data() + begin,
                                                                             sizes);
  else
    return full;
}

/// The same of four-bit values, with their scales.
inline Int4View column_shard(const Int4View& weight, int rank, int world_size) {
  const ShardRange rows = shard_range(weight.dimension(0), rank, world_size);
  return detail::rows_of(weight, rows.begin, rows.size());
}

/// One rank's rows of a weight, packed.
template <typename T>
struct PackedColumnShard {
  PackedWeight<T> weight;  ///< rows shard_range(out_features, rank, world_size)
  Index out_features = 0;  ///< of the full weight
  Index in_features = 0;
  int rank = 0, world_size = 1;
};

/// Packs this rank's rows of a full weight (out, in), once. T is float, bfloat16, std::int8_t or
/// ef::int4; scales belong to rows, so dividing the weight changes no bit. Sends nothing. Throws
/// what pack_weight throws.
///
///   const auto shard = ef::pack_column_shard<Eigen::bfloat16>(weight, communicator);
///   auto y = ef::column_parallel_linear(input, shard, communicator, bias);
template <typename T, Device D, typename Weight, Communicator C>
  requires(!std::same_as<Weight, Int4View>)
PackedColumnShard<T> pack_column_shard(const D& device, const Weight& weight, const C& communicator,
                                       const PackingOptions<T>& options = {}) {
  const auto full = input_view<2>(weight);
  const int rank = communicator.rank(), ranks = communicator.size();
  return {pack_weight<T>(device, column_shard(full, rank, ranks), options), full.dimension(0),
          full.dimension(1), rank, ranks};
}
template <typename T, Device D, std::same_as<Int4View> Weight, Communicator C>
  requires std::same_as<T, int4>
PackedColumnShard<T> pack_column_shard(const D& device, const Weight& weight, const C& communicator,
                                       const PackingOptions<T>& options = {}) {
  const int rank = communicator.rank(), ranks = communicator.size();
  return {pack_weight<T>(device, column_shard(weight, rank, ranks), options), weight.dimension(0),
          weight.dimension(1), rank, ranks};
}
template <typename T, typename Weight, Communicator C>
  requires(!Device<Weight>)
PackedColumnShard<T> pack_column_shard(const Weight& weight, const C& communicator,
                                       const PackingOptions<T>& options = {}) {
  return pack_column_shard<T>(Eigen::DefaultDevice{}, weight, communicator, options);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
