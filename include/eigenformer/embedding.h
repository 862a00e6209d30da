/// \file
/// Embedding: the row of a table for each token id (Bengio et al., "A Neural Probabilistic Language
/// Model", 2003):
///
///   y[t, :] = table[ids[t], :]
///
/// ids is int32 or int64, (tokens) or (batch, seq), or a std::vector or std::span of (tokens);
/// table is (vocab, features); y is (tokens, features) or (batch, seq, features). The table is
/// float, double, bfloat16 or half, or INT8 with its scales, and y may be of another of them: each
/// element is rounded once. It may be an ef::PackedWeight (vocab, features) too, the head of a
/// model that has one tensor for both: a row costs a strided read of its panel on a CPU, and none
/// of a product's speed.
///
/// Throws std::invalid_argument for shapes that disagree and for an id outside [0, vocab), naming
/// the position, the id and vocab, before anything is written: one O(tokens) pass over the ids. y
/// must not overlap the table. On a GPU ids are device memory, which the host does not check: an id
/// outside [0, vocab) gives a row of NaN and no gradient. Cost: one read of the rows, one write of
/// y. The forms with a destination allocate nothing.
#pragma once

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "core/values.h"
#include "cpu/embedding.h"
#include "linear/packed_weight.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename Id>
concept TokenId = std::same_as<Id, std::int32_t> || std::same_as<Id, std::int64_t>;

/// A container of ids, a std::vector or a std::span say, is a tensor of rank 1.
template <typename Ids>
  requires(ContiguousRange<Ids> && TokenId<element_of<Ids>>)
auto ids_input(const Ids& ids) {
  return TensorView<const element_of<Ids>, 1>(std::ranges::data(ids),
                                              static_cast<Index>(std::ranges::size(ids)));
}
template <typename Ids>
auto ids_input(const Ids& ids) {
  static_assert(
      rank_of<Ids> == -1 || ((rank_of<Ids> == 1 || rank_of<Ids> == 2) && TokenId<scalar_of<Ids>>),
      "eigenformer: token ids are a tensor of int32 or int64, (tokens) or (batch, seq), or a "
      "std::vector or std::span of them");
  return input_view<rank_of<Ids>>(ids);
}

/// `rows` (ids..., features) belongs to `ids`, and every id is a row of `table`.
template <Device D, typename Ids, typename Rows, typename Table>
void require_embedding(std::string_view name, const Ids& ids, std::string_view rows_name,
                       const Rows& rows, std::string_view table_name, const Table& table) {
  constexpr int rank = rank_of<Ids>;
  checked_size(name, "ids", ids);
  checked_size(name, rows_name, rows);
  checked_size(name, table_name, table);
  bool same = rows.dimension(rank) == table.dimension(1);
  for (std::size_t d = 0; d < rank; ++d) same = same && rows.dimension(d) == ids.dimension(d);
  if (!same)
    require_that(false, name, rows_name, " has shape ", shape_text(rows), ", ids has shape ",
                 shape_text(ids), ", ", table_name, " has shape ", shape_text(table));
  [[maybe_unused]] const Index vocab = table.dimension(0);
  if constexpr (host_readable<D>)
    for (Index t = 0; t < ids.size(); ++t)
      require_that(ids.data()[t] >= 0 && static_cast<Index>(ids.data()[t]) < vocab, name, "id ",
                   ids.data()[t], " at position ", t,
                   " is outside the vocabulary, expected 0 <= id < ", vocab);
}

}  // namespace detail

/// y[t] = table[ids[t]].
template <Device D, typename Y, typename Ids, typename Table>
void embedding_into(const D& device, Y&& y, const Ids& ids, const Table& table) {
  const auto id_view = detail::ids_input(ids);
  const auto rows = input_view<2>(table);
  auto out = output_view<rank_of<decltype(id_view)> + 1>(y);
  detail::require_floating_scalars<decltype(out), decltype(rows)>();
  detail::require_embedding<D>("embedding", id_view, "y", out, "table", rows);
  using Problem = problem::Embedding<scalar_of<decltype(out)>, scalar_of<decltype(rows)>,
                                     scalar_of<decltype(id_view)>>;
  detail::run(device, Problem{out.data(), id_view.data(), rows.data(), id_view.size(),
                              rows.dimension(1), rows.dimension(0)});
}

/// y[t] = table[ids[t]] * scales[ids[t]] of an INT8 table (vocab, features) with one scale per row
/// (vocab): what quantize_weights_int8_per_channel makes.
template <Device D, typename Y, typename Ids, typename Table, typename Scales>
void embedding_into(const D& device, Y&& y, const Ids& ids, const Table& table,
                    const Scales& scales) {
  static_assert(
      std::is_same_v<scalar_of<Table>, std::int8_t> && std::is_same_v<scalar_of<Scales>, float>,
      "eigenformer: a table with scales is int8, and the scales are float");
  const auto id_view = detail::ids_input(ids);
  const auto rows = input_view<2>(table);
  const auto factors = input_view<1>(scales);
  auto out = output_view<rank_of<decltype(id_view)> + 1>(y);
  detail::require_floating_scalars<decltype(out)>();
  detail::require_embedding<D>("embedding", id_view, "y", out, "table", rows);
  detail::require_that(factors.size() == rows.dimension(0), "embedding", "scales has ",
                       factors.size(), " elements, table has ", rows.dimension(0), " rows");
  using Problem = problem::Int8Embedding<scalar_of<decltype(out)>, scalar_of<decltype(id_view)>>;
  detail::run(device, Problem{out.data(), id_view.data(), rows.data(), factors.data(),
                              id_view.size(), rows.dimension(1), rows.dimension(0)});
}

/// y[t] = row ids[t] of a packed weight (vocab, features), of INT8 times its scales. Throws
/// std::invalid_argument besides for one that was packed for other kernels.
template <Device D, typename Y, typename Ids, typename S>
void embedding_into(const D& device, Y&& y, const Ids& ids, const PackedWeight<S>& table) {
  static_assert(!std::is_same_v<S, int4>,
                "eigenformer: an embedding's rows come from floating or int8 weights, not int4");
  const auto id_view = detail::ids_input(ids);
  const TensorView<const S, 2> shape(table.data(), table.rows(), table.columns());
  auto out = output_view<rank_of<decltype(id_view)> + 1>(y);
  detail::require_floating_scalars<decltype(out)>();
  detail::require_embedding<D>("embedding", id_view, "y", out, "table", shape);
  using Problem =
      problem::PackedEmbedding<scalar_of<decltype(out)>, S, scalar_of<decltype(id_view)>>;
  detail::run(device, Problem{out.data(), id_view.data(), table.panels(), id_view.size()});
}

/// Returns the rows, (tokens, features) or (batch, seq, features), in the table's scalar.
template <CpuDevice D, typename Ids, typename Table>
auto embedding(const D& device, const Ids& ids, const Table& table) {
  const auto id_view = detail::ids_input(ids);
  const auto rows = input_view<2>(table);
  constexpr int rank = rank_of<decltype(id_view)>;
  Eigen::DSizes<Index, rank + 1> sizes;
  for (int d = 0; d < rank; ++d) sizes[d] = id_view.dimension(static_cast<std::size_t>(d));
  sizes[rank] = rows.dimension(1);
  auto y = detail::make_tensor<scalar_of<decltype(rows)>, rank + 1>("embedding", "result", sizes);
  embedding_into(device, y, ids, table);
  return y;
}
///   ef::Tensor<float, 2> hidden = ef::embedding(ids, table);
template <typename Ids, typename Table>
  requires(!Device<Ids>)
auto embedding(const Ids& ids, const Table& table) {
  return embedding(Eigen::DefaultDevice{}, ids, table);
}

/// grad_table[ids[t]] += grad_y[t] for t in order, whatever the threads; grad_table is float or
/// double. Rows of ids that do not occur are not touched.
template <Device D, typename G, typename GY, typename Ids>
void embedding_backward_into(const D& device, G&& grad_table, const GY& grad_y, const Ids& ids) {
  static_assert(std::is_same_v<scalar_of<G>, float> || std::is_same_v<scalar_of<G>, double>,
                "eigenformer: the gradient of a table is accumulated in float or double");
  const auto id_view = detail::ids_input(ids);
  auto rows = output_view<2>(grad_table);
  const auto gradient = input_view<rank_of<decltype(id_view)> + 1>(grad_y);
  detail::require_floating_scalars<decltype(gradient)>();
  detail::require_embedding<D>("embedding_backward", id_view, "grad_y", gradient, "grad_table",
                               rows);
  using Problem = problem::EmbeddingBackward<scalar_of<G>, scalar_of<decltype(gradient)>,
                                             scalar_of<decltype(id_view)>>;
  detail::run(device, Problem{rows.data(), gradient.data(), id_view.data(), id_view.size(),
                              rows.dimension(1), rows.dimension(0)});
}

/// The same, returned: the gradient of a table of `rows` rows, from 0.
template <CpuDevice D, typename GY, typename Ids>
auto embedding_backward(const D& device, const GY& grad_y, const Ids& ids, Index rows) {
  const auto gradient = input_view<rank_of<GY>>(grad_y);
  detail::require_that(rows >= 0, "embedding_backward", "rows is ", rows, ", expected 0 or more");
  auto grad_table = detail::make_tensor<compute_type<scalar_of<GY>>, 2>(
      "embedding_backward", "grad_table",
      Eigen::DSizes<Index, 2>(rows, gradient.dimension(rank_of<GY> - 1)));
  grad_table.setZero();
  embedding_backward_into(device, grad_table, grad_y, ids);
  return grad_table;
}
template <typename GY, typename Ids>
  requires(!Device<GY>)
auto embedding_backward(const GY& grad_y, const Ids& ids, Index rows) {
  return embedding_backward(Eigen::DefaultDevice{}, grad_y, ids, rows);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
