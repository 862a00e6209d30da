/// \file
/// A model as its files describe it: shape and form of the decoder, what its tensors are called and
/// how they lie.
///
///   ef::ModelConfig config = ef::read_model_config("folder/config.json");
///   config.family;          // "llama"
///   config.shape.features;  // 2048
///
/// model/families.h says what each family of config.json means.
#pragma once

#include <string>

#include "../decoder/config.h"
#include "../decoder/form.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// How queries, keys and values lie in the files.
enum class QkvLayout {
  apart,     ///< three tensors
  stacked,   ///< one: all queries, all keys, all values (Phi-3)
  by_head,   ///< one: query, key and value of the first head, then of the next (GPT-NeoX)
  by_group,  ///< one: queries of the first KV head, its key, its value, then the next (Falcon)
};

/// How the files hold norms of queries and keys in LayerNorm (QueryKeyNorm::layer_head).
enum class HeadNormLayout {
  stacked,  ///< one tensor, (heads, head_dim): Cohere
  apart,    ///< one tensor for each head, (head_dim): StableLM
  shared,   ///< one for all heads, (head_dim), with a bias: Phi
};

/// Names of tensors without ".weight" and ".bias". Those of a layer follow `layer`, the layer's
/// number and a dot.
struct ModelNames {
  std::string embedding = "model.embed_tokens";
  std::string positions = {};
  std::string norm = "model.norm";
  std::string head = "lm_head";
  std::string layer = "model.layers.";
  std::string attention_norm = "input_layernorm";
  std::string feed_forward_norm = "post_attention_layernorm";
  std::string after_attention_norm = {};
  std::string after_feed_forward_norm = {};
  std::string query = "self_attn.q_proj";
  std::string key = "self_attn.k_proj";
  std::string value = "self_attn.v_proj";
  std::string qkv = "self_attn.qkv_proj";  ///< where they are one tensor
  std::string query_norm = "self_attn.q_norm";
  std::string key_norm = "self_attn.k_norm";
  std::string output = "self_attn.o_proj";
  std::string sinks = "self_attn.sinks";  ///< the whole name
  std::string gate = "mlp.gate_proj";
  std::string up = "mlp.up_proj";
  std::string gate_up = "mlp.gate_up_proj";  ///< where they are one tensor
  std::string down = "mlp.down_proj";
  // Of layers with experts. Each expert's tensors follow `experts`, its number and a dot, or those
  // of all are one: experts.gate_up_proj and experts.down_proj (transformers 5).
  std::string router = "mlp.gate";
  std::string router_correction = "mlp.gate.e_score_correction_bias";  ///< the whole name
  std::string experts = "mlp.experts.";
  std::string expert_gate = "gate_proj";
  std::string expert_up = "up_proj";
  std::string expert_down = "down_proj";
  /// Where gates, ups and downs of all experts are a tensor each, (experts, out, in): GGUF.
  std::string all_gates = {}, all_ups = {}, all_downs = {};
  std::string shared_gate_proj = "mlp.shared_expert.gate_proj";
  std::string shared_up_proj = "mlp.shared_expert.up_proj";
  std::string shared_down_proj = "mlp.shared_expert.down_proj";
  std::string shared_gate = "mlp.shared_expert_gate";
};

struct ModelConfig {
  std::string family;  ///< model_type of config.json, general.architecture of a GGUF file
  DecoderConfig shape;
  DecoderForm form;
  ModelNames names;
  QkvLayout qkv_layout = QkvLayout::apart;
  HeadNormLayout head_norm_layout = HeadNormLayout::stacked;
  bool fused_gate_up = false;   ///< gate and up are one tensor, one below the other
  bool transposed = false;      ///< matrices are (in, out): GPT-2
  bool turned_experts = false;  ///< experts are (in, out), gate and up column by column: gpt-oss
  bool router_bias = false;
  bool router_correction = false;  ///< routers have a bias of their choice
  bool norm_plus_one = false;      ///< norms multiply by 1 + w: Gemma
  bool tied_head = false;          ///< the head is the embedding
  bool norm_bias = false;          ///< norms have biases
  bool qkv_bias = false;
  bool output_bias = false;
  bool head_bias = false;
  Index positions = 0;       ///< that the model was made for
  Index further_layers = 0;  ///< behind the decoder's, for tokens further ahead: not read
};

struct ModelConfigOptions {
  /// Positions that will be served, for rotations that depend on it; 0: those the model was made
  /// for.
  Index length = 0;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
