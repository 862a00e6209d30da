/// \file
/// Shards of weights that are packed together: several weights one below the other (queries, keys
/// and values of one product), and the two of a gated unit. The manual of the parallel layers is
/// tensor_parallel.h; these keep its promises.
///
///   auto qkv = ef::pack_stacked_column_shard<float>(device, std::array{query, key, value}, communicator);
///   ef::column_parallel_linear_into(device, y, x, qkv, communicator);   // (tokens, rows of all three), as of any shard
///   auto gate_up = ef::pack_gated_column_shard<float>(device, gate, up, communicator);
///   ef::column_parallel_gated_linear_into(device, h, x, gate_up, communicator, ef::Epilogue{}.silu());   // (tokens, out)
#pragma once

#include <span>
#include <vector>

#include "../tensor_parallel.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Packs this rank's rows of several weights (rows, in), views of one scalar or Int4View, that lie
/// one below the other, on a device. Nothing is copied before it is packed. Throws what
/// pack_stacked_weight throws.
template <typename T, Device D, typename Weights, Communicator C>
PackedColumnShard<T> pack_stacked_column_shard(const D& device, const Weights& weights,
                                               const C& communicator,
                                               const PackingOptions<T>& options = {}) {
  constexpr auto name = "pack_stacked_column_shard";
  const std::span views(weights);
  using View = std::remove_cvref_t<decltype(views[0])>;
  detail::require_that(!views.empty(), name, "weights is empty, expected one matrix at least");
  Index rows = 0;
  const Index columns = views[0].dimension(1);
  for (const auto& view : views) {  // on every rank, whichever rows it owns
    detail::checked_size(name, "weights", view);
    detail::require_that(view.dimension(1) == columns, name, "weights have ", columns, " and ",
                         view.dimension(1), " columns, expected as many");
    detail::require_that(detail::add_fits(rows, view.dimension(0), rows), name,
                         "the rows overflow");
  }
  const ShardRange own = shard_range(rows, communicator.rank(), communicator.size());
  std::vector<View> parts;
  Index begin = 0;  // of the view, in rows of the whole
  for (const auto& view : views) {
    const Index end = begin + view.dimension(0), first = (std::max)(begin, own.begin),
                last = (std::min)(end, own.end);
    parts.push_back(detail::rows_of(view, first - begin, (std::max)(Index{0}, last - first)));
    begin = end;
  }
  return {pack_stacked_weight<T>(device, parts, options), rows, columns, communicator.rank(),
          communicator.size()};
}

/// One rank's rows of both weights of a gated unit, packed together.
template <typename T>
struct PackedGatedColumnShard {
  PackedGatedWeight<T> weight;  ///< rows shard_range(out_features, rank, world_size) of each
  Index out_features = 0;       ///< of the full weights
  Index in_features = 0;
  int rank = 0, world_size = 1;
};

/// Packs this rank's rows of gate and up, both (out, in) and of one scalar, on a device.
template <typename T, Device D, typename Gate, typename Up, Communicator C>
  requires(!std::same_as<Gate, Int4View>)
PackedGatedColumnShard<T> pack_gated_column_shard(const D& device, const Gate& gate, const Up& up,
                                                  const C& communicator,
                                                  const PackingOptions<T>& options = {}) {
  const auto g = input_view<2>(gate);
  const auto u = input_view<2>(up);
  detail::require_same_shape("pack_gated_column_shard", "gate", g, "up", u);
  const int rank = communicator.rank(), ranks = communicator.size();
  return {pack_gated_weight<T>(device, column_shard(g, rank, ranks), column_shard(u, rank, ranks),
                               options),
          g.dimension(0), g.dimension(1), rank, ranks};
}

template <typename T, Device D, std::same_as<Int4View> Gate, std::same_as<Int4View> Up,
          Communicator C>
  requires std::same_as<T, int4>
PackedGatedColumnShard<T> pack_gated_column_shard(const D& device, const Gate& gate, const Up& up,
                                                  const C& communicator,
                                                  const PackingOptions<T>& options = {}) {
  const int rank = communicator.rank(), ranks = communicator.size();
  return {pack_gated_weight<T>(device, column_shard(gate, rank, ranks),
                               column_shard(up, rank, ranks), options),
          gate.dimension(0), gate.dimension(1), rank, ranks};
}

namespace detail {
template <typename T>
inline constexpr bool is_packed_shard<PackedGatedColumnShard<T>> = true;
}  // namespace detail

/// gated_linear_into over ranks: `output` (tokens, out) on every rank, from the same input (tokens,
/// in) on every rank, bit for bit that of the full weights. The epilogue has a function alone:
/// biases and residuals would have to be divided. Allocates nothing after the first call at a size.
template <Device D, typename Output, typename Input, typename T, Communicator C, typename E>
  requires detail::is_epilogue<E>
void column_parallel_gated_linear_into(const D& device, Output&& output, const Input& input,
                                       const PackedGatedColumnShard<T>& weight, C& communicator,
                                       const E& epilogue,
                                       Workspace& workspace = thread_workspace()) {
  constexpr auto name = "column_parallel_gated_linear";
  const auto x = detail::token_rows(name, input);
  const detail::ParallelShape shape =
      detail::parallel_shape(name, x.dimension(0), weight, communicator);
  detail::require_that(shape.in == x.dimension(1), name, "weight has ", shape.in,
                       " columns, input has ", x.dimension(1), " features");
  detail::require_that(epilogue.bias_size() == E::kNone && epilogue.residual_rows() == E::kNone,
                       name, "the epilogue has a bias or a residual, expected a function alone");
  auto y = output_view<rank_of<Input>>(output);
  detail::require_output(name, y, input, shape.out);
  using Y = scalar_of<Output>;
  detail::gather_features(device, y.data(), shape.tokens, shape.out, communicator, workspace,
                          [&](Y* place) {
                            TensorView<Y, 2> own(place, shape.tokens, shape.columns.size());
                            if (own.size() > 0)
                              gated_linear_into(device, own, x, weight.weight, epilogue, workspace);
                            return static_cast<const Y*>(place);
                          });
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
