/// \file
/// Forward and backward of a decoder for training, put together from the public operators.
/// Activations are of type Compute, weights and their gradients are float. The forward pass keeps
/// what the backward pass reads: about (10 features + 3 hidden) elements per token and layer.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "../activation.h"
#include "../attention.h"
#include "../embedding.h"
#include "../linear.h"
#include "../normalization.h"
#include "../parallel_region.h"
#include "growing_tensor.h"
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
    GrowingTensor<Compute, 2> input, attention_input;
    // (batch, length, heads, head_dim), rotated
    GrowingTensor<Compute, 4> query, key, value, attended;
    GrowingTensor<compute_type<Compute>, 3> log_sum_exp;   // (batch, heads, length)
    GrowingTensor<Compute, 2> middle, feed_forward_input;  // (tokens, features)
    GrowingTensor<Compute, 2> gate, up, gated;             // (tokens, hidden)
  };
  std::vector<std::int32_t> ids;  // (batch, length)
  std::vector<Index> lengths, positions;
  std::vector<Layer> layers;
  GrowingTensor<Compute, 2> last, normalised;  // (tokens, features)
  GrowingTensor<Compute, 2> logits;            // of a GPU

  // Scratch of both passes, kept so that a step of the same shape allocates nothing but its logits.
  GrowingTensor<Compute, 2> x_gradient, branch, part;                    // (tokens, features)
  GrowingTensor<Compute, 2> gated_gradient, gate_gradient, up_gradient;  // (tokens, hidden)
  GrowingTensor<Compute, 4> attended_gradient, query_gradient, key_gradient, value_gradient;
};

/// The two passes over one batch; holds references for the time of a call.
template <typename Compute, Device D>
class DecoderPass {
 public:
  using Matrix = GrowingTensor<Compute, 2>;
  using Heads = GrowingTensor<Compute, 4>;

  DecoderPass(const D& device, DecoderWeights& weights, DecoderTape<Compute>& tape,
              OperatorProfile* profile)
      : device_(device),
        weights_(weights),
        config_(weights.config()),
        tape_(tape),
        profile_(profile) {
    static_assert(CpuDevice<D> || !std::is_same_v<Compute, double>,
                  "eigenformer: double, which serves to check gradients, trains on a CPU");
    require_memory("Decoder", "the table of master weights", weights.memory(), memory_of(device));
  }

  /// ids (batch, length) -> logits (batch * length, vocabulary)
  ModelTensor<D, Compute, 2> forward(const TensorView<const std::int32_t, 2>& ids) {
    const ParallelRegion region(device_);
    const Index batch = ids.dimension(0), length = ids.dimension(1), tokens = batch * length;
    const std::span flat(ids.data(), static_cast<std::size_t>(tokens));
    require_ids("Decoder::forward", flat, config_.vocabulary);
    tape_.ids.assign(flat.begin(), flat.end());
    tape_.lengths.assign(static_cast<std::size_t>(batch), length);
    tape_.positions.resize(static_cast<std::size_t>(tokens));
    for (Index t = 0; t < tokens; ++t) tape_.positions[static_cast<std::size_t>(t)] = t % length;
    tape_.layers.resize(static_cast<std::size_t>(config_.layers));

    const auto x = reshape(tape_.layers.front().input, tokens, config_.features);
    timed("embedding",
          [&] { embedding_into(device_, x, token_ids(), weights_matrix(weights_.embedding())); });
    for (std::size_t l = 0; l < tape_.layers.size(); ++l)
      forward_layer(weights_.layer(static_cast<Index>(l)), tape_.layers[l],
                    l + 1 < tape_.layers.size() ? tape_.layers[l + 1].input : tape_.last, batch,
                    length);
    const auto last = norm(tape_.normalised, tape_.last.view(), weights_.norm());
    if constexpr (CpuDevice<D>) {
      Tensor<Compute, 2> logits(tokens, config_.vocabulary);
      project_into(logits, last, weights_.head());
      return logits;
    } else {
      return project(tape_.logits, last, weights_.head());
    }
  }

  /// gradient of the logits -> adds to the gradients of the weights
  void backward(const TensorView<const Compute, 2>& logits_gradient) {
    const auto normalised = tape_.normalised.view();
    require_that(logits_gradient.dimension(0) == normalised.dimension(0) &&
                     logits_gradient.dimension(1) == config_.vocabulary,
                 "Decoder::backward", "logits_gradient has shape ", shape_text(logits_gradient),
                 ", expected (", normalised.dimension(0), ", ", config_.vocabulary,
                 "), that of the last forward");
    const ParallelRegion region(device_);
    const auto gradient_of_normalised =
        project_backward(tape_.branch, logits_gradient, normalised, weights_.head());
    norm_backward(tape_.x_gradient, gradient_of_normalised, tape_.last.view(), weights_.norm());
    for (Index l = config_.layers - 1; l >= 0; --l)
      backward_layer(weights_.layer(l), tape_.layers[static_cast<std::size_t>(l)]);
    timed("embedding", [&] {
      embedding_backward_into(device_, gradient(weights_.embedding()), tape_.x_gradient.view(),
                              token_ids());
    });
  }

 private:
  using Layer = typename DecoderTape<Compute>::Layer;
  using View = TensorView<Compute, 2>;

  // t.input -> next
  void forward_layer(const DecoderWeights::Layer& w, Layer& t, Matrix& next, Index batch,
                     Index length) {
    const DecoderConfig& c = config_;
    const auto input = t.input.view();
    const auto normal = norm(t.attention_input, input, w.attention_norm);
    const auto query = project_heads(t.query, normal, w.query, batch, length, c.heads);
    const auto key = project_heads(t.key, normal, w.key, batch, length, c.kv_heads);
    const auto value = project_heads(t.value, normal, w.value, batch, length, c.kv_heads);
    rotate(query);
    rotate(key);
    const auto attended = reshape(t.attended, sizes_of<4>(query));
    auto log_sum_exp =
        t.log_sum_exp.reshape(memory_of(device_), Eigen::DSizes<Index, 3>(batch, c.heads, length));
    timed("attention", [&] {
      batched_attention_with_padding_into(device_, attended, query, key, value, tape_.lengths,
                                          {.causal = true, .log_sum_exp = log_sum_exp});
    });
    const auto middle = join(t.middle, input, project(tape_.branch, as_rows(attended), w.output));
    const auto normal_middle = norm(t.feed_forward_input, middle, w.feed_forward_norm);
    const auto gate = project(t.gate, normal_middle, w.gate),
               up = project(t.up, normal_middle, w.up), gated = reshape(t.gated, sizes_of<2>(gate));
    timed("activation", [&] { swiglu_into(device_, gated, gate, up); });
    join(next, middle, project(tape_.branch, gated, w.down));
  }

  // tape_.x_gradient is that of the layer's output on entry and that of its input on return.
  void backward_layer(const DecoderWeights::Layer& w, Layer& t) {
    Matrix &branch = tape_.branch, &part = tape_.part, &x_gradient = tape_.x_gradient;
    const auto feed_forward_input = t.feed_forward_input.view();
    const auto gate = t.gate.view(), up = t.up.view();
    const auto gated =
        project_backward(tape_.gated_gradient, x_gradient.view(), t.gated.view(), w.down);
    const auto gate_gradient = reshape(tape_.gate_gradient, sizes_of<2>(gate)),
               up_gradient = reshape(tape_.up_gradient, sizes_of<2>(up));
    timed("activation",
          [&] { swiglu_backward_into(device_, gate_gradient, up_gradient, gated, gate, up); });
    project_backward(branch, gate_gradient, feed_forward_input, w.gate);
    add(branch, project_backward(part, up_gradient, feed_forward_input, w.up));
    add(x_gradient, norm_backward(part, branch.view(), t.middle.view(), w.feed_forward_norm));
    attention_backward_layer(w, t);
    const auto attention_input = t.attention_input.view();
    project_backward(branch, as_rows(tape_.query_gradient.view()), attention_input, w.query);
    add(branch, project_backward(part, as_rows(tape_.key_gradient.view()), attention_input, w.key));
    add(branch,
        project_backward(part, as_rows(tape_.value_gradient.view()), attention_input, w.value));
    add(x_gradient, norm_backward(part, branch.view(), t.input.view(), w.attention_norm));
  }

  // From the gradient of the residual stream to those of the unrotated queries, keys and values.
  void attention_backward_layer(const DecoderWeights::Layer& w, Layer& t) {
    const auto query = t.query.view(), key = t.key.view(), value = t.value.view(),
               attended = t.attended.view();
    const auto sizes = sizes_of<4>(query), kv_sizes = sizes_of<4>(key);
    const auto attended_gradient = reshape(tape_.attended_gradient, sizes),
               query_gradient = reshape(tape_.query_gradient, sizes),
               key_gradient = reshape(tape_.key_gradient, kv_sizes),
               value_gradient = reshape(tape_.value_gradient, kv_sizes);
    project_backward_into(as_rows(attended_gradient), tape_.x_gradient.view(), as_rows(attended),
                          w.output);
    timed("attention", [&] {
      attention_backward_into(device_, query_gradient, key_gradient, value_gradient,
                              attended_gradient, query, key, value, attended, t.log_sum_exp.view(),
                              tape_.lengths, {.causal = true});
    });
    rotate_backward(query_gradient);
    rotate_backward(key_gradient);
  }

  // ---- one call of a public operator each, charged to its name; what is written is returned ----
  View project(Matrix& y, const View& x, std::size_t weight) {
    const auto view = reshape(y, x.dimension(0), weights_.tensors()[weight].rows);
    project_into(view, x, weight);
    return view;
  }
  template <typename Y>
  void project_into(Y&& y, const View& x, std::size_t weight) {
    timed("linear", [&] { linear_into(device_, y, x, weights_matrix(weight)); });
  }
  TensorView<Compute, 4> project_heads(Heads& y, const View& x, std::size_t weight, Index batch,
                                       Index length, Index count) {
    const auto view = reshape(y, Eigen::DSizes<Index, 4>(batch, length, count, config_.head_dim));
    project_into(as_rows(view), x, weight);
    return view;
  }
  template <typename G>
  View project_backward(Matrix& x_gradient, const G& y_gradient, const View& x,
                        std::size_t weight) {
    const auto view = reshape(x_gradient, sizes_of<2>(x));
    project_backward_into(view, y_gradient, x, weight);
    return view;
  }
  template <typename G>
  void project_backward_into(const View& x_gradient, const G& y_gradient, const View& x,
                             std::size_t weight) {
    timed("linear", [&] {
      add_weight_gradient(gradient(weight), y_gradient, x);
      linear_backward_input_into(device_, x_gradient, y_gradient, weights_matrix(weight));
    });
  }
  // Gradients of parameters are float; in double, which serves to check gradients, one is rounded
  // once.
  template <typename G>
  void add_weight_gradient(TensorView<float, 2> total, const G& y_gradient, const View& x) {
    if constexpr (std::is_same_v<Compute, double>) {
      Tensor<double, 2> wide = total.template cast<double>();
      linear_backward_weight_into(device_, wide, y_gradient, x);
      total = wide.template cast<float>();
    } else {
      linear_backward_weight_into(device_, total, y_gradient, x);
    }
  }
  View norm(Matrix& y, const View& x, std::size_t weight) {
    const auto view = reshape(y, sizes_of<2>(x));
    timed("normalization", [&] {
      rms_norm_into(device_, view, x, weights_vector(weight), {.epsilon = config_.epsilon});
    });
    return view;
  }
  View norm_backward(Matrix& x_gradient, const View& y_gradient, const View& x,
                     std::size_t weight) {
    const auto view = reshape(x_gradient, sizes_of<2>(x));
    timed("normalization", [&] {
      rms_norm_backward_into(device_, view, weights_.gradient_vector(weight), y_gradient, x,
                             weights_vector(weight), {.epsilon = config_.epsilon});
    });
    return view;
  }
  void rotate(const TensorView<Compute, 4>& x) {
    timed("rope", [&] { rope_into(device_, x, x, tape_.positions, rope_options()); });
  }
  void rotate_backward(const TensorView<Compute, 4>& x) {
    timed("rope", [&] { rope_backward_into(device_, x, x, tape_.positions, rope_options()); });
  }
  View join(Matrix& y, const View& x, const View& branch) {
    const auto view = reshape(y, sizes_of<2>(x));
    timed("activation", [&] { residual_add_into(device_, view, x, branch); });
    return view;
  }
  void add(Matrix& x, const View& branch) { join(x, x.view(), branch); }

  // ---- views ------------------------------------------------------------------------------------
  View reshape(Matrix& x, Index rows, Index columns) const {
    return x.reshape(memory_of(device_), Eigen::DSizes<Index, 2>(rows, columns));
  }
  View reshape(Matrix& x, const Eigen::DSizes<Index, 2>& sizes) const {
    return x.reshape(memory_of(device_), sizes);
  }
  TensorView<Compute, 4> reshape(Heads& x, const Eigen::DSizes<Index, 4>& sizes) const {
    return x.reshape(memory_of(device_), sizes);
  }
  // (batch, length, heads, head_dim) -> (tokens, heads * head_dim)
  static View as_rows(const TensorView<Compute, 4>& x) {
    return {x.data(), x.dimension(0) * x.dimension(1), x.dimension(2) * x.dimension(3)};
  }
  std::span<const std::int32_t> token_ids() const {
    return staged(device_, "Decoder", std::span<const std::int32_t>(tape_.ids));
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
