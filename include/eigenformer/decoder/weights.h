/// \file
/// The float master weights of a decoder, and their gradients once training asks for them: two flat
/// arrays with a named view for every tensor, in the memory of the device that trains. Names and
/// shapes are those of Llama checkpoints, so that files can be exchanged.
#pragma once

#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include "../core/packed_array.h"
#include "../core/philox.h"
#include "../optimizer.h"
#include "config.h"
#include "layer_views.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// One tensor of a decoder: (rows, columns), rows 1 for the vectors of RMSNorm.
struct DecoderTensor {
  std::string name;
  Index rows, columns;
  std::size_t offset;
  Index size() const { return rows * columns; }
};

class DecoderWeights {
 public:
  /// The tensors of one layer, as indices into tensors().
  struct Layer {
    std::size_t attention_norm, query, key, value, output, feed_forward_norm, gate, up, down;
  };

  /// Weights from normal(0, 0.02), scaled down by sqrt(2 layers) where a branch joins the residual
  /// stream (Radford et al., "GPT-2", 2019); norms are one. The same seed gives the same weights on
  /// every machine up to the last bits of log and cos.
  explicit DecoderWeights(const DecoderConfig& config, std::uint64_t seed = 0,
                          const Memory& memory = host_memory)
      : config_(config), memory_(&memory) {
    config.validate();
    const Index q = config.heads * config.head_dim, kv = config.kv_heads * config.head_dim,
                d = config.features;
    embedding_ = add("model.embed_tokens.weight", config.vocabulary, d);
    for (Index l = 0; l < config.layers; ++l) {
      const std::string prefix = "model.layers." + std::to_string(l) + ".";
      Layer layer{};
      layer.attention_norm = add(prefix + "input_layernorm.weight", 1, d);
      layer.query = add(prefix + "self_attn.q_proj.weight", q, d);
      layer.key = add(prefix + "self_attn.k_proj.weight", kv, d);
      layer.value = add(prefix + "self_attn.v_proj.weight", kv, d);
      layer.output = add(prefix + "self_attn.o_proj.weight", d, q);
      layer.feed_forward_norm = add(prefix + "post_attention_layernorm.weight", 1, d);
      layer.gate = add(prefix + "mlp.gate_proj.weight", config.hidden, d);
      layer.up = add(prefix + "mlp.up_proj.weight", config.hidden, d);
      layer.down = add(prefix + "mlp.down_proj.weight", d, config.hidden);
      layers_.push_back(layer);
    }
    norm_ = add("model.norm.weight", 1, d);
    head_ = add("lm_head.weight", config.vocabulary, d);
    values_.resize(count_, memory);
    for (std::size_t t = 0; t < tensors_.size(); ++t) initialise(t, seed);
  }

  /// The same weights in another memory, such as ef::memory_of(device), or back in the host's.
  DecoderWeights(const DecoderWeights& weights, const Memory& memory)
      : config_(weights.config_),
        tensors_(weights.tensors_),
        layers_(weights.layers_),
        embedding_(weights.embedding_),
        norm_(weights.norm_),
        head_(weights.head_),
        count_(weights.count_),
        memory_(&memory) {
    values_.resize(count_, memory);
    detail::copy_bytes(memory, values_.data(), weights.memory(), weights.values_.data(),
                       static_cast<std::size_t>(count_) * sizeof(float));
  }

  const DecoderConfig& config() const { return config_; }
  const Memory& memory() const { return *memory_; }
  const std::vector<DecoderTensor>& tensors() const { return tensors_; }
  const Layer& layer(Index l) const { return layers_[static_cast<std::size_t>(l)]; }
  std::size_t embedding() const { return embedding_; }
  std::size_t norm() const { return norm_; }
  std::size_t head() const { return head_; }
  Index parameter_count() const { return count_; }

  /// (rows, columns)
  TensorView<const float, 2> matrix(std::size_t tensor) const {
    const DecoderTensor& t = tensors_[tensor];
    return {values_.data() + t.offset, t.rows, t.columns};
  }
  TensorView<float, 2> matrix(std::size_t tensor) {
    const DecoderTensor& t = tensors_[tensor];
    return {values_.data() + t.offset, t.rows, t.columns};
  }
  /// (rows * columns)
  TensorView<const float, 1> vector(std::size_t tensor) const {
    const DecoderTensor& t = tensors_[tensor];
    return {values_.data() + t.offset, t.size()};
  }

  /// Gradients, allocated and zeroed on first use.
  TensorView<float, 2> gradient_matrix(std::size_t tensor) {
    const DecoderTensor& t = tensors_[tensor];
    return {gradients() + t.offset, t.rows, t.columns};
  }
  TensorView<float, 1> gradient_vector(std::size_t tensor) {
    const DecoderTensor& t = tensors_[tensor];
    return {gradients() + t.offset, t.size()};
  }

  DecoderLayerViews<float> views(Index l) const {
    const Layer& w = layer(l);
    DecoderLayerViews<float> views;
    views.attention_norm.emplace(vector(w.attention_norm));
    views.query.emplace(matrix(w.query));
    views.key.emplace(matrix(w.key));
    views.value.emplace(matrix(w.value));
    views.output.emplace(matrix(w.output));
    views.feed_forward_norm.emplace(vector(w.feed_forward_norm));
    views.gate.emplace(matrix(w.gate));
    views.up.emplace(matrix(w.up));
    views.down.emplace(matrix(w.down));
    return views;
  }

  std::vector<Parameter> parameters() {
    std::vector<Parameter> result;
    result.reserve(tensors_.size());
    for (std::size_t t = 0; t < tensors_.size(); ++t)
      result.push_back(
          {TensorView<float, 1>(values_.data() + tensors_[t].offset, tensors_[t].size()),
           gradient_vector(t)});
    return result;
  }

 private:
  std::size_t add(std::string name, Index rows, Index columns) {
    const Index size = detail::checked_product(rows, columns, "Decoder", "weight");
    tensors_.push_back({std::move(name), rows, columns, static_cast<std::size_t>(count_)});
    detail::require_that(detail::add_fits(count_, size, count_), "Decoder",
                         "the weights together overflow");
    return tensors_.size() - 1;
  }

  bool joins_residual(std::size_t t) const {
    for (const Layer& layer : layers_)
      if (t == layer.output || t == layer.down) return true;
    return false;
  }

  void initialise(std::size_t t, std::uint64_t seed) {
    const DecoderTensor& tensor = tensors_[t];
    std::vector<float> out(static_cast<std::size_t>(tensor.size()), 1.0f);
    if (tensor.rows > 1) fill_normal(t, seed, out);
    memory_->copy_in(values_.data() + tensor.offset, out.data(), out.size() * sizeof(float));
  }
  void fill_normal(std::size_t t, std::uint64_t seed, std::vector<float>& out) const {
    const double deviation =
        0.02 / (joins_residual(t) ? std::sqrt(2.0 * static_cast<double>(config_.layers)) : 1.0);
    const Philox random(seed, t);
    const auto uniform = [&random](std::uint64_t number) {
      return random.uniform(static_cast<std::uint32_t>(number / Philox::kIndices),
                            static_cast<std::uint32_t>(number % Philox::kIndices),
                            Philox::Purpose::initialisation);
    };
    for (std::size_t i = 0; i < out.size(); ++i) {  // Box-Muller: two numbers for each element
      const auto number = 2 * static_cast<std::uint64_t>(i);
      const double radius = std::sqrt(-2.0 * std::log(uniform(number)));
      out[i] = static_cast<float>(deviation * radius *
                                  std::cos(2.0 * std::numbers::pi * uniform(number + 1)));
    }
  }

  float* gradients() {
    if (gradients_.size() == 0) {
      gradients_.resize(count_, *memory_);
      memory_->clear(gradients_.data(), static_cast<std::size_t>(count_) * sizeof(float));
    }
    return gradients_.data();
  }

  DecoderConfig config_;
  std::vector<DecoderTensor> tensors_;
  std::vector<Layer> layers_;
  std::size_t embedding_ = 0, norm_ = 0, head_ = 0;
  Index count_ = 0;
  const Memory* memory_;
  detail::PackedArray<float> values_, gradients_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
