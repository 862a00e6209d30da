/// \file
/// Linear layers whose weight is divided among ranks (Shoeybi et al., "Megatron-LM", 2019), and a
/// language-model head that draws tokens without gathering its logits.
///
///   column_parallel_linear      y = x W^T + b; rank r computes the output features shard_range(out, r, world_size), and y is
///                               gathered on every rank, or kept in parts with {.gather_output = false}
///   row_parallel_linear         the same y from an x that is kept in parts: its features are divided by shard_range(in, ...)
///   vocabulary_parallel_greedy, vocabulary_parallel_top_k_sample
///                               tokens from hidden states and a (vocab, hidden) head: see
///                               tensor_parallel/vocabulary.h
///
/// Shapes: x (batch, seq, in) or (tokens, in); W (out, in), the full weight on every rank, or this
/// rank's rows of it packed once (`pack_column_shard`); b (out), the full bias on every rank; y
/// (batch, seq, out) or (tokens, out). Nothing needs to divide: the first out % world_size ranks
/// get one feature more, and ranks beyond `out` get none.
///
/// Bits: every result equals ef::linear on the full weight, bit for bit, for every world size, on
/// every rank. A row-parallel layer that adds partial products (the textbook's all-reduce) cannot
/// keep that promise: its rounding depends on where the features were cut. This one gathers the
/// parts of x and divides the output features instead: the same arithmetic and the same weight
/// bytes per rank, tokens * (in + out) elements received where an all-reduce moves
/// tokens * 2 * out, and no order of summation left to chance.
///
/// Every rank calls, with the same shapes. Bad arguments throw std::invalid_argument before
/// anything is sent; a rank that fails is a CommunicatorError on the others. Outputs must not
/// overlap inputs. The _into forms allocate nothing after the first call at a size. Cost per rank:
/// 1 / world_size of the product, and a gather of the output (for rows: of the input too).
#pragma once

#include <span>
#include <string_view>

#include "communicator.h"
#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "cpu/tensor_parallel.h"
#include "linear.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct ColumnParallelOptions {
  /// false: this rank's output features only, (batch, seq, shard), and nothing is sent
  bool gather_output = true;
};

/// A view, no copy, of the rows [begin, end) of a weight (out, in), or of the elements of a bias
/// (out), that belong to a rank; as const as its argument. Throws std::invalid_argument for a rank
/// outside [0, world_size) or world_size < 1.
///
///   auto shard = ef::column_shard(weight, rank, world_size);
template <typename Weight>
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

/// One rank's rows of a weight, packed.
template <typename T>
struct PackedColumnShard {
  PackedWeight<T> weight;  ///< rows shard_range(out_features, rank, world_size)
  Index out_features = 0;  ///< of the full weight
  Index in_features = 0;
  int rank = 0, world_size = 1;
};

/// Packs this rank's rows of a full weight (out, in), once. T is float, bfloat16 or std::int8_t;
/// INT8 scales belong to rows, so dividing the weight changes no bit. Sends nothing. Throws what
/// pack_weight throws.
///
///   const auto shard = ef::pack_column_shard<Eigen::bfloat16>(weight, communicator);
///   auto y = ef::column_parallel_linear(input, shard, communicator, bias);
template <typename T, Device D, typename Weight, Communicator C>
PackedColumnShard<T> pack_column_shard(const D& device, const Weight& weight,
                                       const C& communicator) {
  const auto full = input_view<2>(weight);
  const int rank = communicator.rank(), ranks = communicator.size();
  return {pack_weight<T>(device, column_shard(full, rank, ranks)), full.dimension(0),
          full.dimension(1), rank, ranks};
}
template <typename T, typename Weight, Communicator C>
  requires(!Device<Weight>)
PackedColumnShard<T> pack_column_shard(const Weight& weight, const C& communicator) {
  return pack_column_shard<T>(Eigen::DefaultDevice{}, weight, communicator);
}

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

/// whole (tokens, features) on every rank. Each rank gives its part (tokens, shard of the features)
/// as produce(place), which may write to `place` or have the part elsewhere, and returns where it
/// is.
template <typename T, Device D, typename C, typename Produce>
void gather_features(const D& device, T* whole, Index tokens, Index features, C& communicator,
                     Workspace& workspace, Produce&& produce) {
  const int ranks = communicator.size();
  Workspace::Frame frame(workspace);
  const std::span<Index> counts(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  for (int r = 0; r < ranks; ++r)
    counts[static_cast<std::size_t>(r)] = tokens * shard_range(features, r, ranks).size();
  const ShardRange own = shard_range(features, communicator.rank(), ranks);
  const bool in_order = tokens == 1 || ranks == 1;  // then the gathered parts are the rows
  T* const parts = in_order ? whole : frame.take<T>(tokens * features);
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

/// A column-parallel layer ends with a bias, or options, or first the one and then the other.
template <typename End>
inline constexpr bool is_bias = !std::same_as<End, ColumnParallelOptions>;
template <typename End>
decltype(auto) bias_of(const End& end) {
  if constexpr (is_bias<End>)
    return (end);
  else
    return NoBias{};
}
template <typename End>
bool gathers(const End& end, const ColumnParallelOptions& options) {
  if constexpr (is_bias<End>)
    return options.gather_output;
  else
    return end.gather_output;
}

}  // namespace detail

/// y (batch, seq, out), the same on every rank, from the same input on every rank. `weight` is the
/// full (out, in) tensor or a PackedColumnShard; a bias, where there is one, the full (out) one.
/// With {.gather_output = false} the result is (batch, seq, shard) and nothing is sent. The _into
/// forms allocate nothing after the first call at a size.
///
///   ef::Tensor<float, 3> y = ef::column_parallel_linear(input, weight, communicator);
///   ef::Tensor<float, 3> y = ef::column_parallel_linear(input, weight, communicator, bias);
///   auto part = ef::column_parallel_linear(input, weight, communicator, bias, {.gather_output = false});
///   auto part = ef::column_parallel_linear(input, weight, communicator, {.gather_output = false});
template <Device D, typename Output, typename Input, typename Weight, Communicator C,
          typename BiasOrOptions = ColumnParallelOptions>
void column_parallel_linear_into(const D& device, Output&& output, const Input& input,
                                 const Weight& weight, C& communicator,
                                 const BiasOrOptions& end = {},
                                 const ColumnParallelOptions& options = {},
                                 Workspace& workspace = thread_workspace()) {
  constexpr auto name = "column_parallel_linear";
  const auto& bias = detail::bias_of(end);
  const bool gather = detail::gathers(end, options);
  const auto x = detail::token_rows(name, input);
  const auto shape = detail::parallel_shape(name, x.dimension(0), weight, communicator, bias);
  detail::require_that(shape.in == x.dimension(1), name, "weight has ", shape.in,
                       " columns, input has ", x.dimension(1), " features");
  auto y = output_view<rank_of<Input>>(output);
  detail::require_output(name, y, input, gather ? shape.out : shape.columns.size());
  if (gather)
    detail::gathered_product(device, y.data(), x, weight, shape, communicator, workspace, bias);
  else
    detail::shard_product(device, y.data(), x, weight, shape, communicator, workspace, bias);
}
template <CpuDevice D, typename Input, typename Weight, Communicator C,
          typename BiasOrOptions = ColumnParallelOptions>
auto column_parallel_linear(const D& device, const Input& input, const Weight& weight,
                            C& communicator, const BiasOrOptions& end = {},
                            const ColumnParallelOptions& options = {}) {
  constexpr auto name = "column_parallel_linear";
  const auto shape = detail::parallel_shape(name, detail::token_rows(name, input).dimension(0),
                                            weight, communicator, detail::bias_of(end));
  auto output = detail::parallel_output<Weight>(
      input, detail::gathers(end, options) ? shape.out : shape.columns.size());
  column_parallel_linear_into(device, output, input, weight, communicator, end, options);
  return output;
}
template <typename Input, typename Weight, Communicator C,
          typename BiasOrOptions = ColumnParallelOptions>
  requires(!Device<Input>)
auto column_parallel_linear(const Input& input, const Weight& weight, C& communicator,
                            const BiasOrOptions& end = {},
                            const ColumnParallelOptions& options = {}) {
  return column_parallel_linear(Eigen::DefaultDevice{}, input, weight, communicator, end, options);
}

/// y (batch, seq, out), the same on every rank, from this rank's features of the input, (batch,
/// seq, shard of in): what column_parallel_linear with {.gather_output = false} gives, after any
/// function of single elements. The bias is added once.
///
///   auto hidden = ef::column_parallel_linear(input, up, communicator, {.gather_output = false});
///   ef::Tensor<float, 3> y = ef::row_parallel_linear(hidden, down, communicator, bias);
template <Device D, typename Output, typename Input, typename Weight, Communicator C,
          typename Bias = detail::NoBias>
void row_parallel_linear_into(const D& device, Output&& output, const Input& input_shard,
                              const Weight& weight, C& communicator, const Bias& bias = {},
                              Workspace& workspace = thread_workspace()) {
  constexpr auto name = "row_parallel_linear";
  using T = scalar_of<Input>;
  const auto part = detail::token_rows(name, input_shard);
  const auto shape = detail::parallel_shape(name, part.dimension(0), weight, communicator, bias);
  const ShardRange own = shard_range(shape.in, communicator.rank(), communicator.size());
  detail::require_that(part.dimension(1) == own.size(), name, "input has ", part.dimension(1),
                       " features, rank ", communicator.rank(), " of ", communicator.size(),
                       " has ", own.size(), " of the weight's ", shape.in, " columns");
  auto y = output_view<rank_of<Input>>(output);
  detail::require_output(name, y, input_shard, shape.out);
  if (communicator.size() == 1)
    return detail::shard_product(device, y.data(), part, weight, shape, communicator, workspace,
                                 bias);
  Workspace::Frame frame(workspace);
  T* const x = frame.take<T>(shape.tokens * shape.in);
  detail::gather_features(device, x, shape.tokens, shape.in, communicator, workspace,
                          [&](T*) { return part.data(); });
  detail::gathered_product(device, y.data(), TensorView<const T, 2>(x, shape.tokens, shape.in),
                           weight, shape, communicator, workspace, bias);
}
template <CpuDevice D, typename Input, typename Weight, Communicator C,
          typename Bias = detail::NoBias>
auto row_parallel_linear(const D& device, const Input& input_shard, const Weight& weight,
                         C& communicator, const Bias& bias = {}) {
  constexpr auto name = "row_parallel_linear";
  const auto shape = detail::parallel_shape(
      name, detail::token_rows(name, input_shard).dimension(0), weight, communicator, bias);
  auto output = detail::parallel_output<Weight>(input_shard, shape.out);
  row_parallel_linear_into(device, output, input_shard, weight, communicator, bias);
  return output;
}
template <typename Input, typename Weight, Communicator C, typename Bias = detail::NoBias>
  requires(!Device<Input>)
auto row_parallel_linear(const Input& input_shard, const Weight& weight, C& communicator,
                         const Bias& bias = {}) {
  return row_parallel_linear(Eigen::DefaultDevice{}, input_shard, weight, communicator, bias);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer

#include "tensor_parallel/fused.h"
#include "tensor_parallel/vocabulary.h"
