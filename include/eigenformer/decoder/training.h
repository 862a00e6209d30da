/// \file
/// Forward and backward of a decoder for training, put together from the public operators.
/// Activations are of type Compute, weights and their gradients are float. The forward pass keeps
/// what the backward pass reads: about (10 features + 3 hidden) elements per token and layer.
#pragma once

#include <vector>

#include "../activation.h"
#include "../attention.h"
#include "../embedding.h"
#include "../linear.h"
#include "../normalization.h"
#include "../parallel_region.h"
#include "profile.h"
#include "weights.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// What one forward pass leaves for the backward pass.
template <typename Compute>
struct DecoderTape {
  struct Layer {
    // (tokens, features): residual stream, and normalised
    Tensor<Compute, 2> input, attention_input;
    Tensor<Compute, 4> query, key, value, attended;  // (batch, length, heads, head_dim), rotated
    Tensor<compute_type<Compute>, 3> log_sum_exp;    // (batch, heads, length)
    Tensor<Compute, 2> middle, feed_forward_input;   // (tokens, features)
    Tensor<Compute, 2> gate, up, gated;              // (tokens, hidden)
  };
  Tensor<std::int32_t, 2> ids;  // (batch, length)
  std::vector<Index> lengths, positions;
  std::vector<Layer> layers;
  Tensor<Compute, 2> last, normalised;  // (tokens, features)

  // Scratch of both passes, kept so that a step of the same shape allocates nothing but its logits.
  Tensor<Compute, 2> stream, branch, part;                        // (tokens, features)
  Tensor<Compute, 2> gated_gradient, gate_gradient, up_gradient;  // (tokens, hidden)
  Tensor<Compute, 4> attended_gradient, query_gradient, key_gradient, value_gradient;
};

template <typename T, int Rank>
TensorView<T, 2> as_rows(Tensor<T, Rank>& x, Index columns) {
  return {x.data(), columns == 0 ? 0 : x.size() / columns, columns};
}

/// The two passes over one batch; holds references for the time of a call.
template <typename Compute, CpuDevice D>
class DecoderPass {
 public:
  DecoderPass(const D& device, DecoderWeights& weights, DecoderTape<Compute>& tape,
              OperatorProfile* profile)
      : device_(device),
        weights_(weights),
        config_(weights.config()),
        tape_(tape),
        profile_(profile) {}

  /// ids (batch, length) -> logits (batch * length, vocabulary)
  Tensor<Compute, 2> forward(const TensorView<const std::int32_t, 2>& ids) {
    const ParallelRegion region(device_);
    const Index batch = ids.dimension(0), length = ids.dimension(1), tokens = batch * length;
    tape_.ids = ids;
    tape_.lengths.assign(static_cast<std::size_t>(batch), length);
    tape_.positions.resize(static_cast<std::size_t>(tokens));
    for (Index t = 0; t < tokens; ++t) tape_.positions[static_cast<std::size_t>(t)] = t % length;
    tape_.layers.resize(static_cast<std::size_t>(config_.layers));

    Tensor<Compute, 2>& x = tape_.stream;
    x.resize(tokens, config_.features);
    const TensorView<const std::int32_t, 1> flat(ids.data(), tokens);
    timed("embedding",
          [&] { embedding_into(device_, x, flat, weights_matrix(weights_.embedding())); });
    for (Index l = 0; l < config_.layers; ++l)
      forward_layer(weights_.layer(l), tape_.layers[static_cast<std::size_t>(l)], x, batch, length);
    tape_.last = x;
    norm(tape_.normalised, tape_.last, weights_.norm());
    Tensor<Compute, 2> logits;
    project(logits, tape_.normalised, weights_.head());
    return logits;
  }

  /// gradient of the logits -> adds to the gradients of the weights
  void backward(const Tensor<Compute, 2>& logits_gradient) {
    require_that(logits_gradient.dimension(0) == tape_.normalised.dimension(0) &&
                     logits_gradient.dimension(1) == config_.vocabulary,
                 "Decoder::backward", "logits_gradient has shape ", shape_text(logits_gradient),
                 ", expected (", tape_.normalised.dimension(0), ", ", config_.vocabulary,
                 "), that of the last forward");
    const ParallelRegion region(device_);
    Tensor<Compute, 2>& x_gradient = tape_.stream;
    project_backward(tape_.branch, logits_gradient, tape_.normalised, weights_.head());
    x_gradient.resize(tape_.last.dimensions());
    norm_backward(x_gradient, tape_.branch, tape_.last, weights_.norm());
    for (Index l = config_.layers - 1; l >= 0; --l)
      backward_layer(weights_.layer(l), tape_.layers[static_cast<std::size_t>(l)], x_gradient);
    const TensorView<const std::int32_t, 1> flat(tape_.ids.data(), tape_.ids.size());
    timed("embedding", [&] {
      embedding_backward_into(device_, gradient(weights_.embedding()), x_gradient, flat);
    });
  }

 private:
  using Layer = typename DecoderTape<Compute>::Layer;

  void forward_layer(const DecoderWeights::Layer& w, Layer& t, Tensor<Compute, 2>& x, Index batch,
                     Index length) {
    t.input = x;
    norm(t.attention_input, t.input, w.attention_norm);
    project_heads(t.query, t.attention_input, w.query, batch, length, config_.heads);
    project_heads(t.key, t.attention_input, w.key, batch, length, config_.kv_heads);
    project_heads(t.value, t.attention_input, w.value, batch, length, config_.kv_heads);
    rotate(t.query);
    rotate(t.key);
    t.attended.resize(t.query.dimensions());
    t.log_sum_exp.resize(batch, config_.heads, length);
    timed("attention", [&] {
      batched_attention_with_padding_into(device_, t.attended, t.query, t.key, t.value,
                                          tape_.lengths,
                                          {.causal = true, .log_sum_exp = t.log_sum_exp});
    });
    project(tape_.branch, as_rows(t.attended, config_.heads * config_.head_dim), w.output);
    join(x, tape_.branch);
    t.middle = x;
    norm(t.feed_forward_input, t.middle, w.feed_forward_norm);
    project(t.gate, t.feed_forward_input, w.gate);
    project(t.up, t.feed_forward_input, w.up);
    t.gated.resize(t.gate.dimensions());
    timed("activation", [&] { swiglu_into(device_, t.gated, t.gate, t.up); });
    project(tape_.branch, t.gated, w.down);
    join(x, tape_.branch);
  }

  // x_gradient is that of the layer's output on entry and that of its input on return.
  void backward_layer(const DecoderWeights::Layer& w, Layer& t, Tensor<Compute, 2>& x_gradient) {
    Tensor<Compute, 2>&branch = tape_.branch, &part = tape_.part;
    project_backward(tape_.gated_gradient, x_gradient, t.gated, w.down);
    tape_.gate_gradient.resize(t.gate.dimensions());
    tape_.up_gradient.resize(t.up.dimensions());
    timed("activation", [&] {
      swiglu_backward_into(device_, tape_.gate_gradient, tape_.up_gradient, tape_.gated_gradient,
                           t.gate, t.up);
    });
    project_backward(branch, tape_.gate_gradient, t.feed_forward_input, w.gate);
    project_backward(part, tape_.up_gradient, t.feed_forward_input, w.up);
    join(branch, part);
    norm_backward(part, branch, t.middle, w.feed_forward_norm);
    join(x_gradient, part);
    attention_backward_layer(w, t, x_gradient);
    project_backward(branch, as_rows(tape_.query_gradient, config_.heads * config_.head_dim),
                     t.attention_input, w.query);
    project_backward(part, as_rows(tape_.key_gradient, config_.kv_heads * config_.head_dim),
                     t.attention_input, w.key);
    join(branch, part);
    project_backward(part, as_rows(tape_.value_gradient, config_.kv_heads * config_.head_dim),
                     t.attention_input, w.value);
    join(branch, part);
    norm_backward(part, branch, t.input, w.attention_norm);
    join(x_gradient, part);
  }

  // From the gradient of the residual stream to those of the unrotated queries, keys and values.
  void attention_backward_layer(const DecoderWeights::Layer& w, Layer& t,
                                const Tensor<Compute, 2>& x_gradient) {
    tape_.attended_gradient.resize(t.attended.dimensions());
    tape_.query_gradient.resize(t.query.dimensions());
    tape_.key_gradient.resize(t.key.dimensions());
    tape_.value_gradient.resize(t.value.dimensions());
    auto attended_rows = as_rows(tape_.attended_gradient, config_.heads * config_.head_dim);
    project_backward_into(attended_rows, x_gradient,
                          as_rows(t.attended, config_.heads * config_.head_dim), w.output);
    timed("attention", [&] {
      attention_backward_into(device_, tape_.query_gradient, tape_.key_gradient,
                              tape_.value_gradient, tape_.attended_gradient, t.query, t.key,
                              t.value, t.attended, t.log_sum_exp, tape_.lengths, {.causal = true});
    });
    rotate_backward(tape_.query_gradient);
    rotate_backward(tape_.key_gradient);
  }

  // ---- one call of a public operator each, charged to its name ----------------------------------
  template <typename X>
  void project(Tensor<Compute, 2>& y, const X& x, std::size_t weight) {
    y.resize(x.dimension(0), weights_.tensors()[weight].rows);
    timed("linear", [&] { linear_into(device_, y, x, weights_matrix(weight)); });
  }
  template <typename G, typename X>
  void project_backward(Tensor<Compute, 2>& x_gradient, const G& y_gradient, const X& x,
                        std::size_t weight) {
    x_gradient.resize(x.dimension(0), x.dimension(1));
    project_backward_into(x_gradient, y_gradient, x, weight);
  }
  template <typename GX, typename G, typename X>
  void project_backward_into(GX& x_gradient, const G& y_gradient, const X& x, std::size_t weight) {
    timed("linear", [&] {
      add_weight_gradient(gradient(weight), y_gradient, x);
      linear_backward_input_into(device_, x_gradient, y_gradient, weights_matrix(weight));
    });
  }
  // Gradients of parameters are float; in double, which serves to check gradients, one is rounded
  // once.
  template <typename G, typename X>
  void add_weight_gradient(TensorView<float, 2> total, const G& y_gradient, const X& x) {
    if constexpr (std::is_same_v<Compute, double>) {
      Tensor<double, 2> wide = total.template cast<double>();
      linear_backward_weight_into(device_, wide, y_gradient, x);
      total = wide.template cast<float>();
    } else {
      linear_backward_weight_into(device_, total, y_gradient, x);
    }
  }
  void project_heads(Tensor<Compute, 4>& y, const Tensor<Compute, 2>& x, std::size_t weight,
                     Index batch, Index length, Index count) {
    y.resize(batch, length, count, config_.head_dim);
    auto rows = as_rows(y, count * config_.head_dim);
    timed("linear", [&] { linear_into(device_, rows, x, weights_matrix(weight)); });
  }
  void norm(Tensor<Compute, 2>& y, const Tensor<Compute, 2>& x, std::size_t weight) {
    y.resize(x.dimensions());
    timed("normalization", [&] {
      rms_norm_into(device_, y, x, weights_vector(weight), {.epsilon = config_.epsilon});
    });
  }
  void norm_backward(Tensor<Compute, 2>& x_gradient, const Tensor<Compute, 2>& y_gradient,
                     const Tensor<Compute, 2>& x, std::size_t weight) {
    x_gradient.resize(x.dimensions());
    timed("normalization", [&] {
      rms_norm_backward_into(device_, x_gradient, weights_.gradient_vector(weight), y_gradient, x,
                             weights_vector(weight), {.epsilon = config_.epsilon});
    });
  }
  void rotate(Tensor<Compute, 4>& x) {
    timed("rope", [&] { rope_into(device_, x, x, tape_.positions, rope_options()); });
  }
  void rotate_backward(Tensor<Compute, 4>& x) {
    timed("rope", [&] { rope_backward_into(device_, x, x, tape_.positions, rope_options()); });
  }
  void join(Tensor<Compute, 2>& x, const Tensor<Compute, 2>& branch) {
    timed("activation", [&] { residual_add_into(device_, x, x, branch); });
  }

  RopeOptions rope_options() const {
    return {.base = config_.rope_base, .layout = config_.rope_layout};
  }
  TensorView<const float, 2> weights_matrix(std::size_t t) const {
    return std::as_const(weights_).matrix(t);
  }
  TensorView<const float, 1> weights_vector(std::size_t t) const {
    return std::as_const(weights_).vector(t);
  }
  TensorView<float, 2> gradient(std::size_t t) { return weights_.gradient_matrix(t); }

  template <typename Call>
  decltype(auto) timed(std::string_view name, Call&& call) {
    return OperatorProfile::timed(profile_, name, std::forward<Call>(call));
  }

  const D& device_;
  DecoderWeights& weights_;
  const DecoderConfig& config_;
  DecoderTape<Compute>& tape_;
  OperatorProfile* profile_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
