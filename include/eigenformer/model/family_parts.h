/// \file
/// What families of config.json share: the shape, rotations, windows, activations, experts.
/// families.h says which family has what.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "config.h"
#include "json_object.h"
#include "rope_config.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// What stands for sizes that a file leaves out; 0: nothing does, or other sizes do.
struct UsualShape {
  Index vocabulary = 0, heads = 0, kv_heads = 0, head_dim = 0, positions = 2048;
  double epsilon = 1e-5;
};

/// A ModelConfig that is being filled from a config.json.
class FamilyParts {
 public:
  FamilyParts(const JsonObject& json, const ModelConfigOptions& options)
      : json_(json), options_(options) {}

 protected:
  void shape(std::string_view epsilon = "rms_norm_eps", const UsualShape& usual = {}) {
    const auto size = [&](std::string_view key, Index otherwise) {
      return otherwise > 0 ? json_.integer(key, otherwise) : json_.integer(key);
    };
    const auto or_else = [](Index usually, Index otherwise) {
      return usually > 0 ? usually : otherwise;
    };
    DecoderConfig& s = m_.shape;
    s.vocabulary = size("vocab_size", usual.vocabulary);
    s.features = json_.integer("hidden_size");
    s.layers = json_.integer("num_hidden_layers");
    s.heads = size("num_attention_heads", usual.heads);
    s.kv_heads = json_.integer("num_key_value_heads", or_else(usual.kv_heads, s.heads));
    if (s.heads <= 0) json_.refuse("num_attention_heads", "is not positive");
    s.head_dim = json_.integer("head_dim", or_else(usual.head_dim, s.features / s.heads));
    sizes_are_small();
    s.hidden = json_.integer("intermediate_size", 4 * s.features);
    s.epsilon = static_cast<float>(json_.number(epsilon, usual.epsilon));
    m_.positions = json_.integer("max_position_embeddings", usual.positions);
    layer_count();
  }
  /// Before anything is computed of them.
  void sizes_are_small() {
    const DecoderConfig& s = m_.shape;
    const auto within = [&](const char* key, Index size) {
      if (size < 0 || size > (std::numeric_limits<std::int32_t>::max)())
        json_.refuse(key, "is not within 1 to 2^31 - 1");
    };
    within("hidden_size", s.features);
    within("num_attention_heads", s.heads);
    within("num_key_value_heads", s.kv_heads);
    within("head_dim", s.head_dim);
  }
  /// Before anything is made for each layer.
  void layer_count() {
    if (m_.shape.layers < 1 || m_.shape.layers > 100000)
      json_.refuse("num_hidden_layers", "is not within 1 to 100000");
  }
  RopeContext rope_context(double base = 10000, double partial = 1) const {
    const double positions = static_cast<double>(m_.positions);
    return {m_.shape.head_dim,
            json_.number("rope_theta", base),
            json_.number("partial_rotary_factor", partial),
            positions,
            json_.number("original_max_position_embeddings", positions),
            options_.length > 0 ? static_cast<double>(options_.length) : positions};
  }
  void rope(RopeLayout layout = RopeLayout::half_split, double partial = 1) {
    m_.form.ropes.assign(1, rope_of_model(json_, rope_context(10000, partial)));
    m_.form.ropes[0].layout = layout;
  }
  void tied(bool otherwise) { m_.tied_head = json_.boolean("tie_word_embeddings", otherwise); }
  void activation(std::string_view key, std::string_view otherwise) {
    const std::string name = json_.text(key, otherwise);
    if (name == "silu" || name == "swish")
      m_.form.activation = DecoderActivation::silu;
    else if (name == "gelu")
      m_.form.activation = DecoderActivation::gelu;
    else if (name == "gelu_new" || name == "gelu_pytorch_tanh" || name == "gelu_fast")
      m_.form.activation = DecoderActivation::gelu_tanh;
    else if (name == "relu")
      m_.form.activation = DecoderActivation::relu;
    else
      json_.refuse(key, "is " + printable(name) + ", which is not supported");
  }
  std::vector<DecoderLayerForm>& layer_forms() {
    m_.form.layers.resize(static_cast<std::size_t>(m_.shape.layers));
    return m_.form.layers;
  }
  void window(Index w) {
    if (w > 0)
      for (DecoderLayerForm& layer : layer_forms()) layer.window = w;
  }
  /// is_sliding(layer), from `layer_types` where the file has them.
  template <typename Sliding>
  std::vector<bool> sliding_layers(Sliding&& is_sliding) const {
    std::vector<bool> sliding(static_cast<std::size_t>(m_.shape.layers));
    const auto types = json_.texts("layer_types");
    if (!types.empty() && types.size() != sliding.size())
      json_.refuse("layer_types", "has not as many entries as there are layers");
    for (std::size_t l = 0; l < sliding.size(); ++l) {
      if (types.empty())
        sliding[l] = is_sliding(static_cast<Index>(l));
      else if (types[l] == "sliding_attention")
        sliding[l] = true;
      else if (types[l] != "full_attention")
        json_.refuse("layer_types", "has " + printable(types[l]) + ", which is not supported");
    }
    return sliding;
  }
  /// Windows on those layers.
  void windows(const std::vector<bool>& sliding, Index w) {
    for (std::size_t l = 0; l < sliding.size(); ++l)
      if (sliding[l]) layer_forms()[l].window = w;
  }
  void refuse_if(std::string_view key, std::string_view why) const {
    if (json_.boolean(key, false)) json_.refuse(key, why);
  }
  void layer_norm() { m_.form.norm = DecoderNorm::layer; }
  void plain_feed_forward(std::string up, std::string down) {
    m_.form.gated = false;
    m_.names.up = std::move(up);
    m_.names.down = std::move(down);
  }
  void all_biases(bool biases) {
    m_.qkv_bias = m_.output_bias = m_.form.feed_forward_bias = biases;
  }
  void experts(std::string_view count, Index chosen, Index hidden) {
    DecoderExperts& e = m_.form.experts;
    e.count = json_.integer(count);
    e.chosen = json_.integer("num_experts_per_tok", chosen);
    e.hidden = hidden;
    if (e.count <= 0) json_.refuse(count, "is not positive");
  }
  /// Experts in every n-th layer, but in those that are named.
  void qwen_experts(Index chosen, Index hidden) {
    own_keys_ = {"decoder_sparse_step", "mlp_only_layers"};
    const Index step = json_.integer("decoder_sparse_step", 1);
    if (step < 1) json_.refuse("decoder_sparse_step", "is not positive");
    // transformers 5 calls them local, older files do not
    experts(json_.has("num_experts") ? "num_experts" : "num_local_experts", chosen,
            json_.integer("moe_intermediate_size", hidden));
    m_.form.experts.routing.normalise = json_.boolean("norm_topk_prob", false);
    std::vector<bool> dense(static_cast<std::size_t>(m_.shape.layers));
    for (std::size_t l = 0; l < dense.size(); ++l)
      dense[l] = (static_cast<Index>(l) + 1) % step != 0;
    for (const auto l : json_.integers("mlp_only_layers"))
      if (l >= 0 && l < m_.shape.layers) dense[static_cast<std::size_t>(l)] = true;
    for (std::size_t l = 0; l < dense.size(); ++l)
      if (dense[l]) layer_forms()[l].dense = true;
  }
  /// What files may say of experts and this family does not read: refused, so that nothing is
  /// passed over, unless it says what is done anyway. A bias of a router's choice is a tensor,
  /// which ModelTensors refuses.
  void refuse_other_experts() const {
    struct Usual {
      std::string_view key;
      double value;
      std::string_view what;
    };
    constexpr Usual usuals[]{
        {"n_group", 1, "experts in groups"},
        {"topk_group", 1, "experts in groups"},
        {"routed_scaling_factor", 1, "factors of experts"},
        {"n_shared_experts", 0, "experts of all tokens"},
        {"num_shared_experts", 0, "experts of all tokens"},
        {"moe_num_shared_experts", 0, "experts of all tokens"},
        {"first_k_dense_replace", 0, "first layers without experts"},
        {"moe_layer_start_index", 0, "first layers without experts"},
        {"moe_layer_interval", 1, "experts in some layers"},
        {"moe_layer_freq", 1, "experts in some layers"},
        {"decoder_sparse_step", 1, "experts in some layers"},
    };
    const auto reads = [&](std::string_view key) {
      return std::find(own_keys_.begin(), own_keys_.end(), key) != own_keys_.end();
    };
    for (const Usual& usual : usuals)
      for (const double value : json_.numbers(usual.key))
        if (value != usual.value && !reads(usual.key))
          json_.refuse(usual.key, "is not " + std::to_string(static_cast<int>(usual.value)) + ": " +
                                      std::string(usual.what) +
                                      " are not supported in this family");
    if (!reads("mlp_only_layers") && !json_.integers("mlp_only_layers").empty())
      json_.refuse("mlp_only_layers",
                   "has entries: experts in some layers are not supported in this family");
    const auto one_of = [&](std::string_view key, std::string_view usual) {
      const std::string text = json_.text(key, usual);
      if (text != usual)
        json_.refuse(key, "is " + printable(text) + ", which is not supported in this family");
    };
    const bool sigmoid = m_.form.experts.routing.scores == ExpertScores::sigmoid;
    one_of("scoring_func", sigmoid ? "sigmoid" : "softmax");
    one_of("topk_method", m_.router_correction ? "noaux_tc" : "greedy");
  }

  const JsonObject& json_;
  const ModelConfigOptions& options_;
  ModelConfig m_;
  std::vector<std::string_view> own_keys_;  // of experts, which the family reads
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
