/// \file
/// The decoder's forward pass in plain loops and double, in every form: what the tests and a
/// doubting user compare with.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "../decoder/packed_layer.h"
#include "../decoder/weights.h"
#include "activation.h"
#include "expert_routing.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// The tensors of a decoder where they lie.
struct DecoderTensors {
  using Vector = std::optional<TensorView<const float, 1>>;
  using Matrix = std::optional<TensorView<const float, 2>>;
  std::vector<DecoderLayerViews<float>> layers;
  std::vector<std::vector<DecoderLayerViews<float>>> experts;  ///< of each layer
  Matrix embedding, positions, head;
  Vector norm, norm_bias, head_bias;
};

namespace detail {

using Row = std::vector<double>;
using Rows = std::vector<Row>;
using Vector = DecoderTensors::Vector;
using Matrix = DecoderTensors::Matrix;

inline double at(const Vector& x, std::size_t i, double otherwise) {
  return x ? static_cast<double>((*x)(static_cast<Index>(i))) : otherwise;
}

inline Rows project(const Rows& x, const Matrix& w, const Vector& bias = {}) {
  Rows y(x.size(), Row(static_cast<std::size_t>(w->dimension(0))));
  for (std::size_t t = 0; t < x.size(); ++t)
    for (std::size_t o = 0; o < y[t].size(); ++o) {
      y[t][o] = at(bias, o, 0);
      for (std::size_t i = 0; i < x[t].size(); ++i)
        y[t][o] +=
            x[t][i] * static_cast<double>((*w)(static_cast<Index>(o), static_cast<Index>(i)));
    }
  return y;
}

/// Of every group of `width` elements: all of a row, or each head.
inline void normalize(Row& row, std::size_t width, DecoderNorm kind, double epsilon,
                      const Vector& weight, const Vector& bias) {
  for (std::size_t begin = 0; begin < row.size(); begin += width) {
    double mean = 0, square = 0;
    if (kind == DecoderNorm::layer)
      for (std::size_t i = 0; i < width; ++i) mean += row[begin + i] / static_cast<double>(width);
    for (std::size_t i = 0; i < width; ++i)
      square += (row[begin + i] - mean) * (row[begin + i] - mean) / static_cast<double>(width);
    const double inverse = 1 / std::sqrt(square + epsilon);
    const bool whole = weight && weight->dimension(0) > static_cast<Index>(width);
    for (std::size_t i = 0; i < width; ++i) {
      const std::size_t w = whole ? begin + i : i;
      row[begin + i] = (row[begin + i] - mean) * inverse * at(weight, w, 1) + at(bias, w, 0);
    }
  }
}
inline Rows normalized(Rows x, const DecoderConfig& c, DecoderNorm kind, const Vector& weight,
                       const Vector& bias = {}) {
  for (Row& row : x) normalize(row, row.size(), kind, static_cast<double>(c.epsilon), weight, bias);
  return x;
}

inline void rotate(Rows& x, Index heads, const DecoderConfig& c, const RopeOptions& o) {
  const auto given = static_cast<Index>(o.frequencies.size());
  const Index dim = o.rotary_dim != 0 ? o.rotary_dim : given > 0 ? 2 * given : c.head_dim;
  for (std::size_t t = 0; t < x.size(); ++t)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < dim / 2; ++i) {
        const double frequency =
            given > 0 ? o.frequencies[static_cast<std::size_t>(i)]
                      : std::pow(static_cast<double>(o.base),
                                 -2.0 * static_cast<double>(i) / static_cast<double>(dim));
        const double angle = static_cast<double>(t) * static_cast<double>(o.scale) * frequency,
                     factor = static_cast<double>(o.attention_factor);
        const bool split = o.layout == RopeLayout::half_split;
        const auto a = static_cast<std::size_t>(h * c.head_dim + (split ? i : 2 * i)),
                   b = static_cast<std::size_t>(h * c.head_dim + (split ? i + dim / 2 : 2 * i + 1));
        const double first = x[t][a], second = x[t][b];
        x[t][a] = (first * std::cos(angle) - second * std::sin(angle)) * factor;
        x[t][b] = (first * std::sin(angle) + second * std::cos(angle)) * factor;
      }
}

inline Rows attend(const Rows& q, const Rows& k, const Rows& v, const DecoderConfig& c,
                   const DecoderForm& form, Index window, const Vector& sinks) {
  Rows out(q.size(), Row(static_cast<std::size_t>(c.heads * c.head_dim)));
  const double scale = form.attention_scale != 0 ? static_cast<double>(form.attention_scale)
                                                 : 1 / std::sqrt(static_cast<double>(c.head_dim));
  for (std::size_t t = 0; t < q.size(); ++t)
    for (Index h = 0; h < c.heads; ++h) {
      const Index kv = h / (c.heads / c.kv_heads);
      const std::size_t first = window > 0 && t + 1 > static_cast<std::size_t>(window)
                                    ? t + 1 - static_cast<std::size_t>(window)
                                    : 0;
      Row weight(t + 1);
      double largest = sinks ? at(sinks, static_cast<std::size_t>(h), 0) : -1e300, total = 0;
      for (std::size_t s = first; s <= t; ++s) {
        for (Index i = 0; i < c.head_dim; ++i)
          weight[s] += q[t][static_cast<std::size_t>(h * c.head_dim + i)] *
                       k[s][static_cast<std::size_t>(kv * c.head_dim + i)];
        weight[s] = softcap(weight[s] * scale, {.cap = form.attention_softcap});
        if (!form.alibi_slopes.empty())
          weight[s] -= static_cast<double>(form.alibi_slopes[static_cast<std::size_t>(h)]) *
                       static_cast<double>(t - s);
        largest = (std::max)(largest, weight[s]);
      }
      if (sinks) total = std::exp(at(sinks, static_cast<std::size_t>(h), 0) - largest);
      for (std::size_t s = first; s <= t; ++s) total += weight[s] = std::exp(weight[s] - largest);
      for (std::size_t s = first; s <= t; ++s)
        for (Index i = 0; i < c.head_dim; ++i)
          out[t][static_cast<std::size_t>(h * c.head_dim + i)] +=
              weight[s] / total * v[s][static_cast<std::size_t>(kv * c.head_dim + i)];
    }
  return out;
}

inline double activate(double x, DecoderActivation activation) {
  switch (activation) {
    case DecoderActivation::silu:
      return silu(x);
    case DecoderActivation::gelu:
      return gelu(x);
    case DecoderActivation::gelu_tanh:
      return gelu(x, {.approximation = GeluApproximation::tanh});
    case DecoderActivation::relu:
    case DecoderActivation::clamped_swiglu:
      break;
  }
  return relu(x);
}
inline double unit(double gate, double up, const DecoderForm& form) {
  if (form.activation != DecoderActivation::clamped_swiglu)
    return activate(gate, form.activation) * up;
  return clamped_swiglu(gate, up, form.clamped_swiglu);
}

inline Rows feed_forward(const Rows& x, const DecoderLayerViews<float>& w,
                         const DecoderForm& form) {
  Rows hidden = project(x, w.up, w.up_bias);
  const Rows gate = form.gated ? project(x, w.gate, w.gate_bias) : hidden;
  for (std::size_t t = 0; t < x.size(); ++t)
    for (std::size_t i = 0; i < hidden[t].size(); ++i)
      hidden[t][i] =
          form.gated ? unit(gate[t][i], hidden[t][i], form) : activate(gate[t][i], form.activation);
  return project(hidden, w.down, w.down_bias);
}

/// The experts of each token, one after the other, then the one that all tokens go through.
inline Rows mixture(const Rows& x, const DecoderLayerViews<float>& w,
                    const std::vector<DecoderLayerViews<float>>& experts, const DecoderForm& form) {
  const DecoderExperts& e = form.experts;
  const Rows logits = project(x, w.router, w.router_bias);
  Rows y(x.size(), Row(x.front().size()));
  const Row correction = [&] {
    Row values;
    for (std::size_t i = 0; w.router_correction && i < experts.size(); ++i)
      values.push_back(at(w.router_correction, i, 0));
    return values;
  }();
  const auto add_row = [](Row& to, const Row& from, double by) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += by * from[i];
  };
  for (std::size_t t = 0; t < x.size(); ++t) {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(e.chosen));
    Row weights(ids.size());
    expert_routing(logits[t].data(), e.count, e.chosen, correction, e.routing, ids.data(),
                   weights.data());
    for (std::size_t j = 0; j < ids.size(); ++j)
      add_row(y[t], feed_forward({x[t]}, experts[static_cast<std::size_t>(ids[j])], form)[0],
              weights[j]);
    if (e.shared_hidden == 0) continue;
    const double by = e.shared_gate ? 1 / (1 + std::exp(-project({x[t]}, w.shared_gate)[0][0])) : 1;
    add_row(y[t], feed_forward({x[t]}, w, form)[0], by);
  }
  return y;
}

inline void add(Rows& x, const Rows& branch, double scale) {
  for (std::size_t t = 0; t < x.size(); ++t)
    for (std::size_t i = 0; i < x[t].size(); ++i) x[t][i] += scale * branch[t][i];
}

inline void layer(Rows& x, const DecoderConfig& c, const DecoderForm& form,
                  const DecoderLayerForm& l, const DecoderLayerViews<float>& w,
                  const std::vector<DecoderLayerViews<float>>& experts) {
  const auto feed_forward_of = [&](const Rows& rows) {
    return experts.empty() ? feed_forward(rows, w, form) : mixture(rows, w, experts, form);
  };
  const Rows n =
      form.norm_before() ? normalized(x, c, form.norm, w.attention_norm, w.attention_norm_bias) : x;
  Rows q = project(n, w.query, w.query_bias), k = project(n, w.key, w.key_bias);
  if (form.query_key_norm != QueryKeyNorm::none)
    for (std::size_t t = 0; t < x.size(); ++t) {
      const bool row = form.query_key_norm == QueryKeyNorm::row;
      const auto width = static_cast<std::size_t>(c.head_dim);
      const double epsilon = static_cast<double>(c.epsilon);
      const DecoderNorm kind =
          form.query_key_norm == QueryKeyNorm::layer_head ? DecoderNorm::layer : DecoderNorm::rms;
      normalize(q[t], row ? q[t].size() : width, kind, epsilon, w.query_norm, w.query_norm_bias);
      normalize(k[t], row ? k[t].size() : width, kind, epsilon, w.key_norm, w.key_norm_bias);
    }
  RopeOptions plain;
  plain.base = c.rope_base;
  plain.layout = c.rope_layout;
  if (l.rope >= 0) {
    const RopeOptions& rope =
        form.ropes.empty() ? plain : form.ropes[static_cast<std::size_t>(l.rope)];
    rotate(q, c.heads, c, rope);
    rotate(k, c.kv_heads, c, rope);
  }
  const double scale = static_cast<double>(form.residual_scale);
  Rows branch = project(attend(q, k, project(n, w.value, w.value_bias), c, form, l.window,
                               form.sinks ? w.sinks : Vector{}),
                        w.output, w.output_bias);
  if (form.parallel()) {
    const Rows m = form.shares_norm()
                       ? n
                       : normalized(x, c, form.norm, w.feed_forward_norm, w.feed_forward_norm_bias);
    add(branch, feed_forward_of(m), 1);
    return add(x, branch, scale);
  }
  if (form.norm_after()) branch = normalized(branch, c, form.norm, w.after_attention_norm);
  add(x, branch, scale);
  const Rows m = form.norm_before()
                     ? normalized(x, c, form.norm, w.feed_forward_norm, w.feed_forward_norm_bias)
                     : x;
  branch = feed_forward_of(m);
  if (form.norm_after()) branch = normalized(branch, c, form.norm, w.after_feed_forward_norm);
  add(x, branch, scale);
}

}  // namespace detail

/// ids of one sequence -> logits (length, vocabulary)
inline Tensor<double, 2> decoder(const DecoderConfig& config, const DecoderForm& form,
                                 const DecoderTensors& tensors,
                                 const std::vector<std::int32_t>& ids) {
  using namespace detail;
  Rows x;
  for (std::size_t t = 0; t < ids.size(); ++t) {
    x.emplace_back();
    for (Index i = 0; i < config.features; ++i) {
      double value = static_cast<double>((*tensors.embedding)(ids[t], i)) *
                     static_cast<double>(form.embedding_scale);
      if (form.positions > 0)
        value += static_cast<double>((*tensors.positions)(static_cast<Index>(t), i));
      x.back().push_back(value);
    }
  }
  for (Index l = 0; l < config.layers; ++l)
    layer(x, config, form, form.layer(l), tensors.layers[static_cast<std::size_t>(l)],
          form.has_experts(l) ? tensors.experts[static_cast<std::size_t>(l)]
                              : std::vector<DecoderLayerViews<float>>{});
  const Rows logits = project(normalized(x, config, form.norm, tensors.norm, tensors.norm_bias),
                              tensors.head, tensors.head_bias);
  Tensor<double, 2> result(static_cast<Index>(ids.size()), config.vocabulary);
  for (Index t = 0; t < result.dimension(0); ++t)
    for (Index o = 0; o < config.vocabulary; ++o)
      result(t, o) = softcap(logits[static_cast<std::size_t>(t)][static_cast<std::size_t>(o)],
                             {.cap = form.logit_softcap, .scale = form.logit_scale});
  return result;
}

/// The same of master weights, whose form is Llama's.
inline Tensor<double, 2> decoder(const DecoderWeights& weights,
                                 const std::vector<std::int32_t>& ids) {
  DecoderTensors tensors;
  for (Index l = 0; l < weights.config().layers; ++l) tensors.layers.push_back(weights.views(l));
  tensors.embedding.emplace(weights.matrix(weights.embedding()));
  tensors.head.emplace(weights.matrix(weights.head()));
  tensors.norm.emplace(weights.vector(weights.norm()));
  return decoder(weights.config(), {}, tensors, ids);
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
