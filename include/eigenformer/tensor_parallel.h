/// \file
/// Linear layers whose weight is divided among ranks (Shoeybi et al., "Megatron-LM", 2019), and a
/// language-model head that draws tokens without gathering its logits.
///
///   column_parallel_linear      y = x W^T + b; rank r computes the output features shard_range(out, r, world_size), and y is
///                               gathered on every rank, or kept in parts with {.gather_output = false}
///   row_parallel_linear         the same y from an x that is kept in parts: its features are divided by shard_range(in, ...)
///   vocabulary_parallel_greedy  tokens from hidden states and a (vocab, hidden) head: see
///                               tensor_parallel/vocabulary.h
///   vocabulary_parallel_sample, vocabulary_parallel_top_k_sample
///                               the same with any parameters: tensor_parallel/vocabulary_sample.h
///   vocabulary_parallel_sample_with_log_probabilities, vocabulary_parallel_log_probabilities_of
///                               and scores: tensor_parallel/vocabulary_log_probabilities.h
///   vocabulary_parallel_sampling_probabilities, vocabulary_parallel_verify_speculative,
///   vocabulary_parallel_verify_speculative_tree
///                               speculation: tensor_parallel/vocabulary_speculative.h
///   vocabulary_parallel_top_k, vocabulary_parallel_beam_search_step
///                               the best of divided rows: tensor_parallel/vocabulary_top_k.h
///   vocabulary_parallel_log_softmax
///                               tensor_parallel/vocabulary_log_softmax.h
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
/// overlap inputs. The _into forms allocate nothing after the first call at a size, those that draw
/// or score once they have met rows that leave as many candidates. Cost per rank: 1 / world_size of
/// the product, and a gather of the output (for rows: of the input too); of the vocabulary's
/// operators their manuals say what travels instead.
#pragma once

#include "tensor_parallel/pack.h"
#include "tensor_parallel/product.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct ColumnParallelOptions {
  /// false: this rank's output features only, (batch, seq, shard), and nothing is sent
  bool gather_output = true;
};

namespace detail {

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
  auto frame = detail::tensor_frame(device, workspace);
  T* const x = frame.template take<T>(shape.tokens * shape.in);
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
#include "tensor_parallel/vocabulary_log_probabilities.h"
#include "tensor_parallel/vocabulary_log_softmax.h"
#include "tensor_parallel/vocabulary_sample.h"
#include "tensor_parallel/vocabulary_speculative.h"
#include "tensor_parallel/vocabulary_top_k.h"
