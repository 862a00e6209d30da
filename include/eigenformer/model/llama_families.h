/// \file
/// Families of config.json that are Llama's decoder with a difference: Granite, Qwen, SmolLM 3,
/// OLMo 2, and those with experts. families.h has the others, and the table of their names.
#pragma once

#include <algorithm>
#include <cstddef>

#include "family_parts.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

class LlamaFamilies : public FamilyParts {
 public:
  using FamilyParts::FamilyParts;

 protected:
  void llama() {
    shape();
    rope();
    tied(false);
    activation("hidden_act", "silu");
    m_.qkv_bias = m_.output_bias = json_.boolean("attention_bias", false);
    m_.form.feed_forward_bias = json_.boolean("mlp_bias", false);
    if (m_.family == "mistral") window(json_.integer("sliding_window", 0));
  }
  void granite() {
    llama();
    m_.form.embedding_scale = static_cast<float>(json_.number("embedding_multiplier", 1));
    m_.form.residual_scale = static_cast<float>(json_.number("residual_multiplier", 1));
    m_.form.attention_scale = static_cast<float>(json_.number("attention_multiplier", 1));
    const double scaling = json_.number("logits_scaling", 1);
    if (scaling == 0) json_.refuse("logits_scaling", "is 0");
    m_.form.logit_scale = static_cast<float>(1 / scaling);
  }
  void qwen_windows() {
    if (!json_.boolean("use_sliding_window", false)) return;
    const Index from = json_.integer("max_window_layers", m_.shape.layers);
    windows(sliding_layers([from](Index l) { return l >= from; }),
            json_.integer("sliding_window", 0));
  }
  void qwen2() {
    llama();
    m_.qkv_bias = true;
    m_.output_bias = false;
    qwen_windows();
  }
  void qwen3() {
    llama();
    m_.form.query_key_norm = QueryKeyNorm::head;
    qwen_windows();
  }
  void smollm3() {
    llama();
    tied(true);
    qwen_windows();
    const auto turns = json_.integers("no_rope_layers");
    const Index interval = json_.integer("no_rope_layer_interval", 4);
    if (interval < 1) json_.refuse("no_rope_layer_interval", "is not positive");
    auto& layers = layer_forms();
    if (!turns.empty() && turns.size() != layers.size())
      json_.refuse("no_rope_layers", "has not as many entries as there are layers");
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const bool turned =
          turns.empty() ? (static_cast<Index>(l) + 1) % interval != 0 : turns[l] != 0;
      layers[l].rope = turned ? 0 : -1;
    }
  }
  void olmo2() {
    llama();
    m_.form.placement = NormPlacement::after;
    m_.form.query_key_norm = QueryKeyNorm::row;
    m_.names.after_attention_norm = "post_attention_layernorm";
    m_.names.after_feed_forward_norm = "post_feedforward_layernorm";
  }

  // ---- mixtures of experts ----------------------------------------------------------------------

  void mixtral() {
    llama();
    window(json_.integer("sliding_window", 0));
    experts("num_local_experts", 2, m_.shape.hidden);
    m_.form.experts.routing.normalise = true;
    ModelNames& n = m_.names;
    n.router = "block_sparse_moe.gate";
    n.experts = "block_sparse_moe.experts.";
    n.expert_gate = "w1";
    n.expert_up = "w3";
    n.expert_down = "w2";
  }
  void qwen2_moe() {
    llama();
    m_.qkv_bias = json_.boolean("qkv_bias", true);
    m_.output_bias = false;
    if (json_.boolean("use_sliding_window", false)) {
      const Index most = json_.integer("max_window_layers", 28);
      windows(sliding_layers([most](Index l) { return l % 2 == 0 && l < most; }),
              json_.integer("sliding_window", 4096));
    }
    qwen_experts(4, 1408);
    m_.form.experts.shared_hidden = json_.integer("shared_expert_intermediate_size", 5632);
    m_.form.experts.shared_gate = m_.form.experts.shared_hidden > 0;
  }
  void qwen3_moe() {
    llama();
    m_.form.query_key_norm = QueryKeyNorm::head;
    if (json_.boolean("use_sliding_window", false)) window(json_.integer("sliding_window", 4096));
    qwen_experts(8, 768);
  }
  /// GLM-4.5: sigmoids with a bias of the choice, an expert of all tokens, first layers without.
  void glm4_moe() {
    shape();
    rope(RopeLayout::half_split, 0.5);
    tied(false);
    activation("hidden_act", "silu");
    m_.qkv_bias = json_.boolean("attention_bias", false);
    if (json_.boolean("use_qk_norm", false)) m_.form.query_key_norm = QueryKeyNorm::head;
    own_keys_ = {"n_group", "topk_group", "routed_scaling_factor", "n_shared_experts",
                 "first_k_dense_replace"};
    const Index hidden = json_.integer("moe_intermediate_size", 1408),
                dense = json_.integer("first_k_dense_replace", 1),
                shared = json_.integer("n_shared_experts", 1);
    // before they are multiplied
    if (hidden < 1 || hidden > (Index{1} << 30))
      json_.refuse("moe_intermediate_size", "is out of range");
    if (shared < 0 || shared > 1024) json_.refuse("n_shared_experts", "is not within 0 to 1024");
    experts("n_routed_experts", 8, hidden);
    DecoderExperts& e = m_.form.experts;
    e.shared_hidden = hidden * shared;
    e.routing = {.scores = ExpertScores::sigmoid,
                 .normalise = json_.boolean("norm_topk_prob", true),
                 .scale = static_cast<float>(json_.number("routed_scaling_factor", 1)),
                 .groups = json_.integer("n_group", 1),
                 .kept_groups = json_.integer("topk_group", 1)};
    for (Index l = 0; l < (std::min)(dense, m_.shape.layers); ++l)
      layer_forms()[static_cast<std::size_t>(l)].dense = true;
    m_.router_correction = true;
    m_.further_layers = json_.integer("num_nextn_predict_layers", 0);
    if (m_.further_layers < 0 || m_.further_layers > 16)
      json_.refuse("num_nextn_predict_layers", "is not within 0 to 16");
    m_.names.shared_gate_proj = "mlp.shared_experts.gate_proj";
    m_.names.shared_up_proj = "mlp.shared_experts.up_proj";
    m_.names.shared_down_proj = "mlp.shared_experts.down_proj";
  }
  void gpt_oss() {
    llama();
    m_.qkv_bias = m_.output_bias = json_.boolean("attention_bias", true);
    m_.form.feed_forward_bias = true;
    m_.form.sinks = true;
    windows(sliding_layers([](Index l) { return l % 2 == 0; }),
            json_.integer("sliding_window", 128));
    experts("num_local_experts", 4, m_.shape.hidden);
    m_.form.experts.routing.scores = ExpertScores::softmax_of_chosen;
    m_.form.activation = DecoderActivation::clamped_swiglu;
    m_.form.clamped_swiglu = {static_cast<float>(json_.number("swiglu_alpha", 1.702)),
                              static_cast<float>(json_.number("swiglu_limit", 7))};
    m_.turned_experts = m_.router_bias = true;
    m_.names.router = "mlp.router";
  }
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
