/// \file
/// Attention in plain loops and double: what the tests and a doubting user compare with.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "../attention/options.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

struct AttentionResult {
  Tensor<double, 4> output;       // (batch, rows, heads, value_dim)
  Tensor<double, 3> log_sum_exp;  // (batch, heads, rows)
};

/// Query i of sequence b, at position key_lengths[b] - query_lengths[b] + i, sees key j as far as
/// positions say.
inline bool attention_visible(const AttentionOptions& options, Index key_length, Index query_length,
                              Index i, Index j) {
  if (i >= query_length || j >= key_length) return false;
  if (j < options.prefix_length) return true;
  const Index distance = j - (key_length - query_length + i), window = options.window;
  if (options.causal && (distance > 0 || (window > 0 && distance <= -window))) return false;
  if (!options.causal && window > 0 && std::abs(distance) > window) return false;
  return (options.window_left < 0 || distance >= -options.window_left) &&
         (options.window_right < 0 || distance <= options.window_right);
}

/// Row i of sequence b and head h, where the query tensor has `rows` rows for each sequence.
struct AttentionRow {
  Index batch, head, i, rows, key_length, query_length;
  Index position() const { return key_length - query_length + i; }
  problem::ScoreRow score_row() const { return {batch, head, batch * rows + i, position()}; }
};

/// The element of a bias or mask.
template <typename T>
T attention_element(const ScoreView<T>& view, const AttentionRow& at, Index j) {
  return view.data()[at.batch * view.stride(0) + at.head * view.stride(1) + at.i * view.stride(2) +
                     j * view.stride(3)];
}

/// The row sees key j as positions, masks and bias say.
inline bool attention_sees(const AttentionOptions& options, const AttentionRow& at, Index j) {
  if (!attention_visible(options, at.key_length, at.query_length, at.i, j)) return false;
  if (options.mask.present() && attention_element(options.mask, at, j) == 0) return false;
  if (options.bit_mask.present()) {
    const Index first = options.bit_mask_first_keys.empty() ? at.key_length - at.query_length
                                                            : options.bit_mask_first_keys[at.batch];
    const std::uint64_t* const words =
        options.bit_mask.words() + (at.batch * at.rows + at.i) * options.bit_mask.words_per_row();
    if (j >= first && (words[(j - first) / 64] >> (j - first) % 64 & 1) == 0) return false;
  }
  return !options.bias.present() ||
         attention_element(options.bias, at, j) != -std::numeric_limits<float>::infinity();
}

inline double attention_scale(const AttentionOptions& options, Index head_dim) {
  return options.scale ? static_cast<double>(*options.scale)
                       : 1 / std::sqrt(static_cast<double>(std::max<Index>(1, head_dim)));
}

inline double attention_score(const AttentionOptions& options, const double* q, const double* k,
                              Index head_dim, const AttentionRow& at, Index j) {
  double score = 0;
  for (Index d = 0; d < head_dim; ++d) score += q[d] * k[d];
  score *= attention_scale(options, head_dim);
  if (options.softcap > 0) score = options.softcap * std::tanh(score / options.softcap);
  if (!options.alibi_slopes.empty())
    score += options.alibi_slopes[static_cast<std::size_t>(at.head)] *
             static_cast<double>(j - at.position());
  if (options.bias.present()) score += attention_element(options.bias, at, j);
  return score;
}

/// q (batch, rows, heads, head_dim), k (batch, keys, kv_heads, head_dim), v (batch, keys, kv_heads,
/// value_dim).
template <typename Function = problem::NoScoreFunction>
AttentionResult attention(const Tensor<double, 4>& q, const Tensor<double, 4>& k,
                          const Tensor<double, 4>& v, const std::vector<Index>& key_lengths,
                          const std::vector<Index>& query_lengths, const AttentionOptions& options,
                          const Function& function = {}) {
  const Index batch = q.dimension(0), rows = q.dimension(1), heads = q.dimension(2),
              head_dim = q.dimension(3);
  const Index keys = k.dimension(1), value_dim = v.dimension(3),
              group = heads == 0 ? 1 : heads / k.dimension(2);
  AttentionResult result{Tensor<double, 4>(batch, rows, heads, value_dim),
                         Tensor<double, 3>(batch, heads, rows)};
  result.output.setZero();
  result.log_sum_exp.setConstant(-std::numeric_limits<double>::infinity());
  std::vector<double> scores(static_cast<std::size_t>(keys));
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < rows; ++i) {
        const Index key_length = key_lengths[static_cast<std::size_t>(b)],
                    query_length = query_lengths[static_cast<std::size_t>(b)];
        const AttentionRow at{b, h, i, rows, key_length, query_length};
        const double sink = options.sinks.empty() ? -std::numeric_limits<double>::infinity()
                                                  : options.sinks[static_cast<std::size_t>(h)];
        double maximum = sink;
        bool any = false;
        for (Index j = 0; j < keys; ++j) {
          if (!attention_sees(options, at, j)) continue;
          any = true;
          scores[static_cast<std::size_t>(j)] =
              attention_score(options, &q(b, i, h, 0), &k(b, j, h / group, 0), head_dim, at, j);
          if constexpr (problem::is_score_function<Function>)
            scores[static_cast<std::size_t>(j)] =
                function(scores[static_cast<std::size_t>(j)], at.score_row().at(j));
          maximum = (std::max)(maximum, scores[static_cast<std::size_t>(j)]);
        }
        if (!any) continue;
        double sum = std::exp(sink - maximum);
        for (Index j = 0; j < keys; ++j) {
          if (!attention_sees(options, at, j)) continue;
          const double weight = std::exp(scores[static_cast<std::size_t>(j)] - maximum);
          sum += weight;
          for (Index d = 0; d < value_dim; ++d)
            result.output(b, i, h, d) += weight * v(b, j, h / group, d);
        }
        for (Index d = 0; d < value_dim; ++d) result.output(b, i, h, d) /= sum;
        result.log_sum_exp(b, h, i) = maximum + std::log(sum);
      }
  return result;
}

struct AttentionGradients {
  Tensor<double, 4> grad_q, grad_k, grad_v;
  std::vector<double> grad_sinks;  // (heads), zeros where there are none
};

/// The gradients of sum(grad_out * output), plus sum(grad_log_sum_exp * log_sum_exp) where given,
/// by the formulas of attention/backward.h; dP counts from the key with the greatest score, which
/// changes nothing but what is lost where a row has nearly all its weight on one key.
inline AttentionGradients attention_backward(const Tensor<double, 4>& grad_out,
                                             const Tensor<double, 4>& q, const Tensor<double, 4>& k,
                                             const Tensor<double, 4>& v,
                                             const std::vector<Index>& key_lengths,
                                             const std::vector<Index>& query_lengths,
                                             const AttentionOptions& options,
                                             const Tensor<double, 3>* grad_log_sum_exp = nullptr) {
  const Index rows = q.dimension(1), heads = q.dimension(2), head_dim = q.dimension(3),
              value_dim = v.dimension(3), group = heads == 0 ? 1 : heads / k.dimension(2);
  AttentionGradients g{q, k, v, std::vector<double>(static_cast<std::size_t>(heads), 0.0)};
  g.grad_q.setZero(), g.grad_k.setZero(), g.grad_v.setZero();
  const double scale = attention_scale(options, head_dim),
               infinity = std::numeric_limits<double>::infinity();
  struct Pair {
    Index key;
    double p, dp;  // p is the score at first
  };
  for (Index b = 0; b < q.dimension(0); ++b)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < rows; ++i) {
        const Index length = key_lengths[static_cast<std::size_t>(b)],
                    queries = query_lengths[static_cast<std::size_t>(b)];
        const AttentionRow at{b, h, i, rows, length, queries};
        std::vector<Pair> pairs;
        for (Index j = 0; j < length; ++j) {
          if (!attention_sees(options, at, j)) continue;
          double dp = 0;
          for (Index d = 0; d < value_dim; ++d) dp += grad_out(b, i, h, d) * v(b, j, h / group, d);
          pairs.push_back(
              {j, attention_score(options, &q(b, i, h, 0), &k(b, j, h / group, 0), head_dim, at, j),
               dp});
        }
        if (pairs.empty()) continue;
        const double sink =
            options.sinks.empty() ? -infinity : options.sinks[static_cast<std::size_t>(h)];
        double top = sink, top_dp = 0;
        for (const Pair& pair : pairs)
          if (pair.p > top) top = pair.p, top_dp = pair.dp;
        if (top == -infinity) continue;
        const double sink_weight = std::exp(sink - top);
        double sum = sink_weight, delta = -sink_weight * top_dp;
        for (Pair& pair : pairs) {
          pair.p = std::exp(pair.p - top);
          sum += pair.p;
          delta += pair.p * (pair.dp - top_dp);
        }
        delta /= sum;
        if (grad_log_sum_exp != nullptr) delta -= (*grad_log_sum_exp)(b, h, i);
        if (sink > -infinity)
          g.grad_sinks[static_cast<std::size_t>(h)] -= sink_weight / sum * (top_dp + delta);
        for (const auto& [j, weight, dp] : pairs) {
          double ds = weight / sum * (dp - top_dp - delta) * scale;
          if (options.softcap > 0) {
            double dot = 0;
            for (Index d = 0; d < head_dim; ++d) dot += q(b, i, h, d) * k(b, j, h / group, d);
            const double t = std::tanh(dot * scale / options.softcap);
            ds *= 1 - t * t;
          }
          for (Index d = 0; d < head_dim; ++d) {
            g.grad_q(b, i, h, d) += ds * k(b, j, h / group, d);
            g.grad_k(b, j, h / group, d) += ds * q(b, i, h, d);
          }
          for (Index d = 0; d < value_dim; ++d)
            g.grad_v(b, j, h / group, d) += weight / sum * grad_out(b, i, h, d);
        }
      }
  return g;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
