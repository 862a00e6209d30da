/// \file
/// Tensor-parallel layers in plain loops, all ranks in turn on one thread: what the tests and a
/// doubting user compare with.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "../tensor_parallel.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// y (tokens, out): the shards of the weight's rows one after the other. `bias` may be empty.
inline Tensor<double, 2> column_parallel_linear(const Tensor<double, 2>& x,
                                                const Tensor<double, 2>& weight,
                                                const Tensor<double, 1>& bias, int world_size) {
  Tensor<double, 2> y(x.dimension(0), weight.dimension(0));
  for (int rank = 0; rank < world_size; ++rank) {
    const ShardRange rows = shard_range(weight.dimension(0), rank, world_size);
    for (Index t = 0; t < x.dimension(0); ++t)
      for (Index o = rows.begin; o < rows.end; ++o) {
        y(t, o) = bias.size() > 0 ? bias(o) : 0.0;
        for (Index i = 0; i < x.dimension(1); ++i) y(t, o) += x(t, i) * weight(o, i);
      }
  }
  return y;
}

/// y (tokens, out): the sum over ranks of products of their input features, the bias once.
inline Tensor<double, 2> row_parallel_linear(const Tensor<double, 2>& x,
                                             const Tensor<double, 2>& weight,
                                             const Tensor<double, 1>& bias, int world_size) {
  Tensor<double, 2> y(x.dimension(0), weight.dimension(0));
  for (Index t = 0; t < y.dimension(0); ++t)
    for (Index o = 0; o < y.dimension(1); ++o) {
      y(t, o) = bias.size() > 0 ? bias(o) : 0.0;
      for (int rank = 0; rank < world_size; ++rank) {
        const ShardRange features = shard_range(x.dimension(1), rank, world_size);
        for (Index i = features.begin; i < features.end; ++i) y(t, o) += x(t, i) * weight(o, i);
      }
    }
  return y;
}

/// Tokens of a row of logits, most likely first, lowest index first among equals.
template <typename T>
std::vector<Index> by_likelihood(const Tensor<T, 2>& logits, Index row) {
  std::vector<Index> order(static_cast<std::size_t>(logits.dimension(1)));
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](Index a, Index b) { return logits(row, a) > logits(row, b); });
  return order;
}

/// The token that u in (0, 1) draws from the k most likely of a row of logits.
template <typename T>
Index top_k_token(const Tensor<T, 2>& logits, Index row, Index k, double temperature, double u) {
  auto order = by_likelihood(logits, row);
  order.resize(static_cast<std::size_t>(std::min<Index>(k, logits.dimension(1))));
  const Index best = order[0];
  std::sort(order.begin(), order.end());  // the distribution is inverted in token order
  const auto weight = [&](Index token) {
    return std::exp(
        (static_cast<double>(logits(row, token)) - static_cast<double>(logits(row, best))) /
        temperature);
  };
  double total = 0, cumulative = 0;
  for (Index token : order) total += weight(token);
  for (Index token : order) {
    cumulative += weight(token);
    if (u * total < cumulative) return token;
  }
  return order.back();
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
