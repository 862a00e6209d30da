/// \file
/// What parallel layers share: their shapes, the product of a rank's part, the gather of all parts.
#pragma once

#include <algorithm>
#include <concepts>
#include <span>
#include <string_view>
#include <utility>

#include "../core/dispatch.h"
#include "../core/workspace.h"
#include "../cpu/tensor_parallel.h"
#include "pack.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

template <typename W>
inline constexpr bool is_packed_shard = false;
template <typename T>
inline constexpr bool is_packed_shard<PackedColumnShard<T>> = true;

/// (tokens, features) of a tensor of rank 2 or 3.
template <typename X>
auto token_rows(std::string_view name, const X& x) {
  constexpr int kRank = rank_of<X> == 2 ? 2 : 3;
  const auto view = input_view<kRank>(x);
  checked_size(name, "input", view);
  Index tokens = 1;
  for (int d = 0; d + 1 < kRank; ++d) tokens *= view.dimension(static_cast<std::size_t>(d));
  return TensorView<const scalar_of<decltype(view)>, 2>(view.data(), tokens,
                                                        view.dimension(kRank - 1));
}

/// Stands for the bias where there is none.
struct NoBias {};

/// A checked layer: where this rank stands in it.
struct ParallelShape {
  Index tokens, in, out;
  ShardRange columns;  // output features of this rank
};

template <typename Weight, typename C, typename Bias = NoBias>
ParallelShape parallel_shape(std::string_view name, Index tokens, const Weight& weight,
                             const C& communicator, const Bias& bias = {}) {
  ParallelShape shape{tokens, 0, 0, {}};
  if constexpr (is_packed_shard<Weight>) {
    shape.in = weight.in_features;
    shape.out = weight.out_features;
    require_that(weight.rank == communicator.rank() && weight.world_size == communicator.size(),
                 name, "weight was packed for rank ", weight.rank, " of ", weight.world_size,
                 ", the communicator is rank ", communicator.rank(), " of ", communicator.size());
  } else {
    const auto full = input_view<2>(weight);
    checked_size(name, "weight", full);
    shape.out = full.dimension(0);
    shape.in = full.dimension(1);
  }
  if constexpr (!std::same_as<Bias, NoBias>)
    require_that(input_view<1>(bias).dimension(0) == shape.out, name, "bias has ",
                 input_view<1>(bias).dimension(0), " elements, weight has ", shape.out, " rows");
  checked_product(checked_product(tokens, (std::max)(shape.out, shape.in), name, "output"),
                  Index{sizeof(double)}, name, "output");
  shape.columns = shard_range(shape.out, communicator.rank(), communicator.size());
  return shape;
}

/// Element type of the layer's output: what linear returns for the same arguments.
template <typename X, typename Weight>
struct layer_result {
  using type = scalar_of<decltype(linear(std::declval<const TensorView<const X, 2>&>(),
                                         std::declval<const Weight&>()))>;
};
template <typename X, typename T>
struct layer_result<X, PackedColumnShard<T>> : layer_result<X, PackedWeight<T>> {};

/// y (tokens, columns of this rank) = x times this rank's rows of the weight + bias.
template <Device D, typename T, typename X, typename Weight, typename C, typename Bias = NoBias>
void shard_product(const D& device, T* y, const X& x, const Weight& weight,
                   const ParallelShape& shape, const C& communicator, Workspace& workspace,
                   const Bias& bias = {}) {
  TensorView<T, 2> output(y, shape.tokens, shape.columns.size());
  if (output.size() == 0) return;
  const int rank = communicator.rank(), ranks = communicator.size();
  const auto multiply = [&](const auto& rows, const auto& end) {
    linear_into(device, output, x, rows, end, workspace);
  };
  const auto multiply_by = [&](const auto& rows) {
    if constexpr (std::same_as<Bias, NoBias>)
      multiply(rows, Epilogue{});
    else
      multiply(rows, column_shard(bias, rank, ranks));
  };
  if constexpr (is_packed_shard<Weight>)
    multiply_by(weight.weight);
  else
    multiply_by(column_shard(weight, rank, ranks));
}

/// Whether a communicator moves memory of a device: the host's, unless it has a member
/// kReaches<D> that says so.
template <typename C, typename D>
inline constexpr bool reaches = host_readable<D> || requires { requires C::template kReaches<D>; };

/// whole (tokens, features) on every rank. Each rank gives its part (tokens, shard of the features)
/// as produce(place), which may write to `place` or have the part elsewhere, and returns where it
/// is.
template <typename T, Device D, typename C, typename Produce>
void gather_features(const D& device, T* whole, Index tokens, Index features, C& communicator,
                     Workspace& workspace, Produce&& produce) {
  static_assert(reaches<C, D>,
                "eigenformer: this communicator moves memory of the host, and the parts of a layer "
                "on a GPU are none");
  const int ranks = communicator.size();
  Workspace::Frame frame(workspace);
  auto tensors = tensor_frame(device, workspace);
  const std::span<Index> counts(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  for (int r = 0; r < ranks; ++r)
    counts[static_cast<std::size_t>(r)] = tokens * shard_range(features, r, ranks).size();
  const ShardRange own = shard_range(features, communicator.rank(), ranks);
  const bool in_order = tokens == 1 || ranks == 1;  // then the gathered parts are the rows
  T* const parts = in_order ? whole : tensors.template take<T>(tokens * features);
  const T* part = produce(parts + tokens * own.begin);
  communicator.all_gather(std::span<const T>(part, static_cast<std::size_t>(tokens * own.size())),
                          std::span<T>(parts, static_cast<std::size_t>(tokens * features)),
                          std::span<const Index>(counts));
  if (!in_order) detail::run(device, problem::Interleave<T>{parts, whole, tokens, features, ranks});
}

/// y (tokens, out) on every rank from x (tokens, in) on every rank.
template <Device D, typename T, typename X, typename Weight, typename C, typename Bias>
void gathered_product(const D& device, T* y, const X& x, const Weight& weight,
                      const ParallelShape& shape, C& communicator, Workspace& workspace,
                      const Bias& bias) {
  gather_features(device, y, shape.tokens, shape.out, communicator, workspace, [&](T* place) {
    shard_product(device, place, x, weight, shape, communicator, workspace, bias);
    return static_cast<const T*>(place);
  });
}

template <typename Y, typename X>
void require_output(std::string_view name, const Y& output, const X& input, Index features) {
  static_assert(rank_of<Y> == rank_of<X>,
                "eigenformer: output and input must have the same rank, 2 or 3");
  bool same = output.dimension(rank_of<Y> - 1) == features;
  for (std::size_t d = 0; d + 1 < rank_of<Y>; ++d)
    same = same && output.dimension(d) == input.dimension(d);
  require_that(same, name, "output has shape ", shape_text(output), ", input has shape ",
               shape_text(input), " and ", features, " output features are expected");
}

template <typename Weight, typename X>
auto parallel_output(const X& input, Index features) {
  constexpr int kRank = rank_of<X> == 2 ? 2 : 3;
  auto sizes = sizes_of<kRank>(input);
  sizes[kRank - 1] = features;
  return make_tensor<typename layer_result<scalar_of<X>, Weight>::type, kRank>("parallel_linear",
                                                                               "output", sizes);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
