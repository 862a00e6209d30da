/// \file
/// The decoder's forward pass in plain loops and double: what the tests and a doubting user compare
/// with.
#pragma once

#include <cmath>
#include <vector>

#include "../decoder/weights.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

namespace detail {

using Rows = std::vector<std::vector<double>>;

inline Rows project(const Rows& x, const TensorView<const float, 2>& w) {
  Rows y(x.size(), std::vector<double>(static_cast<std::size_t>(w.dimension(0))));
  for (std::size_t t = 0; t < x.size(); ++t)
    for (Index o = 0; o < w.dimension(0); ++o)
      for (Index i = 0; i < w.dimension(1); ++i)
        y[t][static_cast<std::size_t>(o)] +=
            x[t][static_cast<std::size_t>(i)] * static_cast<double>(w(o, i));
  return y;
}

inline Rows norm(const Rows& x, const TensorView<const float, 1>& w, double epsilon) {
  Rows y = x;
  for (auto& row : y) {
    double square = 0;
    for (double value : row) square += value * value;
    const double inverse = 1.0 / std::sqrt(square / static_cast<double>(row.size()) + epsilon);
    for (std::size_t i = 0; i < row.size(); ++i)
      row[i] *= inverse * static_cast<double>(w(static_cast<Index>(i)));
  }
  return y;
}

inline void rotate(Rows& x, Index heads, const DecoderConfig& c) {
  const Index half = c.head_dim / 2;
  for (std::size_t t = 0; t < x.size(); ++t)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < half; ++i) {
        const double angle = static_cast<double>(t) * std::pow(static_cast<double>(c.rope_base),
                                                               -2.0 * static_cast<double>(i) /
                                                                   static_cast<double>(c.head_dim));
        const bool split = c.rope_layout == RopeLayout::half_split;
        const auto a = static_cast<std::size_t>(h * c.head_dim + (split ? i : 2 * i)),
                   b = static_cast<std::size_t>(h * c.head_dim + (split ? i + half : 2 * i + 1));
        const double first = x[t][a], second = x[t][b];
        x[t][a] = first * std::cos(angle) - second * std::sin(angle);
        x[t][b] = first * std::sin(angle) + second * std::cos(angle);
      }
}

inline Rows attend(const Rows& q, const Rows& k, const Rows& v, const DecoderConfig& c) {
  Rows out(q.size(), std::vector<double>(static_cast<std::size_t>(c.heads * c.head_dim)));
  for (std::size_t t = 0; t < q.size(); ++t)
    for (Index h = 0; h < c.heads; ++h) {
      const Index kv = h / (c.heads / c.kv_heads);
      std::vector<double> weight(t + 1);
      double largest = -1e300, total = 0;
      for (std::size_t s = 0; s <= t; ++s) {
        for (Index i = 0; i < c.head_dim; ++i)
          weight[s] += q[t][static_cast<std::size_t>(h * c.head_dim + i)] *
                       k[s][static_cast<std::size_t>(kv * c.head_dim + i)];
        weight[s] /= std::sqrt(static_cast<double>(c.head_dim));
        largest = (std::max)(largest, weight[s]);
      }
      for (double& w : weight) total += w = std::exp(w - largest);
      for (std::size_t s = 0; s <= t; ++s)
        for (Index i = 0; i < c.head_dim; ++i)
          out[t][static_cast<std::size_t>(h * c.head_dim + i)] +=
              weight[s] / total * v[s][static_cast<std::size_t>(kv * c.head_dim + i)];
    }
  return out;
}

inline void add(Rows& x, const Rows& branch) {
  for (std::size_t t = 0; t < x.size(); ++t)
    for (std::size_t i = 0; i < x[t].size(); ++i) x[t][i] += branch[t][i];
}

}  // namespace detail

/// ids of one sequence -> logits (length, vocabulary)
inline Tensor<double, 2> decoder(const DecoderWeights& weights,
                                 const std::vector<std::int32_t>& ids) {
  using namespace detail;
  const DecoderConfig& c = weights.config();
  const double epsilon = static_cast<double>(c.epsilon);
  Rows x;
  for (std::int32_t id : ids) {
    x.emplace_back();
    for (Index i = 0; i < c.features; ++i)
      x.back().push_back(static_cast<double>(weights.matrix(weights.embedding())(id, i)));
  }
  for (Index l = 0; l < c.layers; ++l) {
    const DecoderWeights::Layer& w = weights.layer(l);
    const Rows n = norm(x, weights.vector(w.attention_norm), epsilon);
    Rows q = project(n, weights.matrix(w.query)), k = project(n, weights.matrix(w.key));
    rotate(q, c.heads, c);
    rotate(k, c.kv_heads, c);
    add(x, project(attend(q, k, project(n, weights.matrix(w.value)), c), weights.matrix(w.output)));
    const Rows m = norm(x, weights.vector(w.feed_forward_norm), epsilon);
    Rows gate = project(m, weights.matrix(w.gate));
    const Rows up = project(m, weights.matrix(w.up));
    for (std::size_t t = 0; t < gate.size(); ++t)
      for (std::size_t i = 0; i < gate[t].size(); ++i)
        gate[t][i] *= up[t][i] / (1.0 + std::exp(-gate[t][i]));
    add(x, project(gate, weights.matrix(w.down)));
  }
  const Rows logits =
      project(norm(x, weights.vector(weights.norm()), epsilon), weights.matrix(weights.head()));
  Tensor<double, 2> result(static_cast<Index>(ids.size()), c.vocabulary);
  for (Index t = 0; t < result.dimension(0); ++t)
    for (Index o = 0; o < c.vocabulary; ++o)
      result(t, o) = logits[static_cast<std::size_t>(t)][static_cast<std::size_t>(o)];
  return result;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
