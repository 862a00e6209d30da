/// \file
/// What config.json says of a model, family by family (its `model_type`), as Hugging Face's
/// transformers reads it:
///
///   llama (1 to 3.3), mistral, granite, qwen2, qwen3, gemma, gemma2, gemma3_text, phi (1 and 2),
///   phi3 (and 4), smollm3, olmo2, starcoder2, stablelm, glm, glm4, cohere, cohere2, falcon, gpt2,
///   gpt_neox; with experts mixtral, qwen2_moe, qwen3_moe, glm4_moe (GLM-4.5), gpt_oss (bfloat16 or
///   MXFP4); gemma3 and mistral3, of which the decoder is read and what sees images is not
///
/// Others, and what of these is not supported (tokens that see later ones, weights that GPTQ, AWQ
/// and their like have quantized, what a family does not read of experts), are refused by name and
/// reason with ModelFileError.
#pragma once

#include <cmath>
#include <filesystem>
#include <functional>
#include <map>
#include <string>

#include "../causal_mask.h"
#include "llama_families.h"
#include "mapped_file.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

/// Fills a ModelConfig from a config.json.
class FamilyReader : public LlamaFamilies {
 public:
  using LlamaFamilies::LlamaFamilies;

  ModelConfig read() {
    m_.family = json_.text("model_type");
    using Family = void (FamilyReader::*)();
    static const std::map<std::string, Family, std::less<>> families{
        {"llama", &FamilyReader::llama},         {"mistral", &FamilyReader::llama},
        {"granite", &FamilyReader::granite},     {"qwen2", &FamilyReader::qwen2},
        {"qwen3", &FamilyReader::qwen3},         {"mixtral", &FamilyReader::mixtral},
        {"qwen2_moe", &FamilyReader::qwen2_moe}, {"qwen3_moe", &FamilyReader::qwen3_moe},
        {"glm4_moe", &FamilyReader::glm4_moe},   {"gpt_oss", &FamilyReader::gpt_oss},
        {"gemma", &FamilyReader::gemma},         {"gemma2", &FamilyReader::gemma2},
        {"gemma3_text", &FamilyReader::gemma3},  {"phi", &FamilyReader::phi},
        {"phi3", &FamilyReader::phi3},           {"smollm3", &FamilyReader::smollm3},
        {"olmo2", &FamilyReader::olmo2},         {"starcoder2", &FamilyReader::starcoder2},
        {"stablelm", &FamilyReader::stablelm},   {"glm", &FamilyReader::glm},
        {"glm4", &FamilyReader::glm4},           {"cohere", &FamilyReader::cohere},
        {"cohere2", &FamilyReader::cohere2},     {"falcon", &FamilyReader::falcon},
        {"gpt2", &FamilyReader::gpt2},           {"gpt_neox", &FamilyReader::gpt_neox}};
    const auto family = families.find(m_.family);
    if (family == families.end())
      json_.refuse("model_type", "is " + printable(m_.family) + ", which is not supported");
    (this->*family->second)();
    refuse_other_experts();
    validate();
    return m_;
  }

 private:
  // ---- the families that are not Llama's (llama_families.h) -------------------------------------

  void gemma() {
    // The decoder's part of a model of text and images says only what is unusual.
    constexpr UsualShape gemma3{.vocabulary = 262208,
                                .heads = 8,
                                .kv_heads = 4,
                                .head_dim = 256,
                                .positions = 131072,
                                .epsilon = 1e-6};
    shape("rms_norm_eps", m_.family == "gemma3_text" ? gemma3 : UsualShape{});
    rope();
    tied(true);
    activation(json_.has("hidden_activation") ? "hidden_activation" : "hidden_act",
               "gelu_pytorch_tanh");
    // Files say "gelu" and mean its tanh form, which is what Gemma was trained with.
    if (m_.family == "gemma") m_.form.activation = DecoderActivation::gelu_tanh;
    m_.norm_plus_one = true;
    m_.qkv_bias = m_.output_bias = json_.boolean("attention_bias", false);
    m_.form.embedding_scale = static_cast<float>(std::sqrt(static_cast<double>(m_.shape.features)));
  }
  void gemma2() {
    gemma();
    m_.form.placement = NormPlacement::both;
    m_.names.after_attention_norm = "post_attention_layernorm";
    m_.names.feed_forward_norm = "pre_feedforward_layernorm";
    m_.names.after_feed_forward_norm = "post_feedforward_layernorm";
    const double scalar = json_.number("query_pre_attn_scalar", 256);
    if (!(scalar > 0)) json_.refuse("query_pre_attn_scalar", "is not positive");
    m_.form.attention_scale = static_cast<float>(1 / std::sqrt(scalar));
    const bool second = m_.family == "gemma2";
    m_.form.attention_softcap =
        static_cast<float>(json_.number("attn_logit_softcapping", second ? 50 : 0));
    m_.form.logit_softcap =
        static_cast<float>(json_.number("final_logit_softcapping", second ? 30 : 0));
    const Index pattern = json_.integer("sliding_window_pattern",
                                        json_.integer("_sliding_window_pattern", second ? 2 : 6));
    if (pattern < 1) json_.refuse("sliding_window_pattern", "is not positive");
    windows(sliding_layers([pattern](Index l) { return (l + 1) % pattern != 0; }),
            json_.integer("sliding_window", 4096));
  }
  void gemma3() {
    refuse_if("use_bidirectional_attention",
              "is true: tokens that see later ones are not supported");
    gemma2();
    m_.form.query_key_norm = QueryKeyNorm::head;
    // Windowed layers turn by a rotation of their own.
    if (json_.has("rope_parameters")) {
      const JsonObject both = json_.object("rope_parameters");
      m_.form.ropes = {rope_of(both.object("full_attention"), rope_context()),
                       rope_of(both.object("sliding_attention"), rope_context())};
    } else {
      RopeContext context = rope_context(1000000);
      m_.form.ropes = {rope_of_model(json_, context), {}};
      m_.form.ropes[1].base = static_cast<float>(json_.number("rope_local_base_freq", 10000));
    }
    for (DecoderLayerForm& layer : layer_forms()) layer.rope = layer.window > 0 ? 1 : 0;
  }
  void phi() {
    shape("layer_norm_eps");
    layer_norm();
    rope(RopeLayout::half_split, 0.5);
    tied(false);
    activation("hidden_act", "gelu_new");
    if (json_.boolean("qk_layernorm", false)) head_norms("layernorm", HeadNormLayout::shared);
    m_.form.blocks = DecoderBlocks::parallel_shared_norm;
    all_biases(true);
    m_.norm_bias = m_.head_bias = true;
    m_.names.norm = "model.final_layernorm";
    m_.names.output = "self_attn.dense";
    plain_feed_forward("mlp.fc1", "mlp.fc2");
  }
  void phi3() {
    shape();
    rope();
    tied(false);
    activation("hidden_act", "silu");
    m_.qkv_layout = QkvLayout::stacked;
    m_.fused_gate_up = true;
    window(json_.integer("sliding_window", 0));
  }
  void starcoder2() {
    shape("norm_epsilon");
    layer_norm();
    rope();
    tied(true);
    activation("hidden_act", "gelu_pytorch_tanh");
    all_biases(json_.boolean("use_bias", true));
    m_.norm_bias = true;
    plain_feed_forward("mlp.c_fc", "mlp.c_proj");
    window(json_.integer("sliding_window", 0));
  }
  void stablelm() {
    shape("layer_norm_eps");
    layer_norm();
    rope(RopeLayout::half_split, 0.25);
    tied(false);
    activation("hidden_act", "silu");
    if (json_.boolean("qk_layernorm", false)) head_norms("layernorm", HeadNormLayout::apart);
    m_.qkv_bias = json_.boolean("use_qkv_bias", false);
    m_.norm_bias = true;
    if (json_.boolean("use_parallel_residual", false))
      m_.form.blocks = DecoderBlocks::parallel_shared_norm;
  }
  /// LayerNorm of queries and keys, in tensors q_... and k_...
  void head_norms(const std::string& name, HeadNormLayout layout) {
    m_.form.query_key_norm = QueryKeyNorm::layer_head;
    m_.head_norm_layout = layout;
    m_.names.query_norm = "self_attn.q_" + name;
    m_.names.key_norm = "self_attn.k_" + name;
  }
  void glm() {
    shape();
    rope(RopeLayout::interleaved, 0.5);
    tied(false);
    activation("hidden_act", "silu");
    m_.qkv_bias = json_.boolean("attention_bias", true);
    m_.fused_gate_up = true;
  }
  void glm4() {
    glm();
    m_.form.placement = NormPlacement::both;
    m_.names.after_attention_norm = "post_self_attn_layernorm";
    m_.names.after_feed_forward_norm = "post_mlp_layernorm";
  }
  void cohere() {
    shape("layer_norm_eps");
    layer_norm();
    rope(RopeLayout::interleaved);
    tied(true);
    activation("hidden_act", "silu");
    if (json_.boolean("use_qk_norm", false)) head_norms("norm", HeadNormLayout::stacked);
    m_.form.blocks = DecoderBlocks::parallel_shared_norm;
    m_.form.logit_scale = static_cast<float>(json_.number("logit_scale", 0.0625));
    m_.qkv_bias = m_.output_bias = json_.boolean("attention_bias", false);
  }
  void cohere2() {
    cohere();
    const Index pattern = json_.integer("sliding_window_pattern", 4);
    if (pattern < 1) json_.refuse("sliding_window_pattern", "is not positive");
    windows(sliding_layers([pattern](Index l) { return (l + 1) % pattern != 0; }),
            json_.integer("sliding_window", 4096));
    for (DecoderLayerForm& layer : layer_forms()) layer.rope = layer.window > 0 ? 0 : -1;
  }
  void falcon() {
    shape("layer_norm_epsilon");
    layer_norm();
    tied(true);
    activation("activation", "gelu");
    if (json_.boolean("alibi", false))
      alibi();
    else
      rope();
    m_.shape.hidden = json_.integer("ffn_hidden_size", 4 * m_.shape.features);
    all_biases(json_.boolean("bias", false));
    m_.norm_bias = true;
    m_.qkv_layout = QkvLayout::by_group;
    ModelNames& n = m_.names;
    n.embedding = "transformer.word_embeddings";
    n.layer = "transformer.h.";
    n.norm = "transformer.ln_f";
    n.qkv = "self_attention.query_key_value";
    n.output = "self_attention.dense";
    plain_feed_forward("mlp.dense_h_to_4h", "mlp.dense_4h_to_h");
    if (json_.boolean("new_decoder_architecture", false)) {
      m_.shape.kv_heads = json_.integer("num_kv_heads", m_.shape.heads);
      if (json_.integer("num_ln_in_parallel_attn", 2) == 2) {
        m_.form.blocks = DecoderBlocks::parallel;
        n.attention_norm = "ln_attn";
        n.feed_forward_norm = "ln_mlp";
      } else {
        m_.form.blocks = DecoderBlocks::parallel_shared_norm;
      }
      return;
    }
    m_.shape.kv_heads = json_.boolean("multi_query", true) ? 1 : m_.shape.heads;
    if (m_.shape.kv_heads > 1) m_.qkv_layout = QkvLayout::by_head;
    if (json_.boolean("parallel_attn", true)) m_.form.blocks = DecoderBlocks::parallel_shared_norm;
  }
  /// Scaled as the scores are. (transformers rounds slopes, as here, and also their products with
  /// positions to bfloat16; its "eager" attention adds them twice.)
  void alibi() {
    if (m_.shape.heads > 65536)  // before slopes are made for each
      json_.refuse("num_attention_heads", "is not within 1 to 65536");
    const float scale = 1 / std::sqrt(static_cast<float>(m_.shape.head_dim));
    for (const float slope : alibi_slopes(m_.shape.heads))
      m_.form.alibi_slopes.push_back(static_cast<float>(bfloat16(slope)) * scale);
    for (DecoderLayerForm& layer : layer_forms()) layer.rope = -1;
  }
  void gpt2() {
    DecoderConfig& s = m_.shape;
    s.vocabulary = json_.integer("vocab_size");
    s.features = json_.integer("n_embd");
    s.layers = json_.integer("n_layer");
    s.heads = s.kv_heads = json_.integer("n_head");
    if (s.heads <= 0) json_.refuse("n_head", "is not positive");
    s.head_dim = s.features / s.heads;
    sizes_are_small();
    s.hidden = json_.integer("n_inner", 4 * s.features);
    s.epsilon = static_cast<float>(json_.number("layer_norm_epsilon", 1e-5));
    m_.positions = m_.form.positions = json_.integer("n_positions", 1024);
    layer_count();
    layer_norm();
    tied(true);
    activation("activation_function", "gelu_new");
    refuse_if("scale_attn_by_inverse_layer_idx", "is true, which is not supported");
    if (!json_.boolean("scale_attn_weights", true)) m_.form.attention_scale = 1;
    for (DecoderLayerForm& layer : layer_forms()) layer.rope = -1;
    m_.qkv_layout = QkvLayout::stacked;
    m_.transposed = true;
    all_biases(true);
    m_.norm_bias = true;
    ModelNames& n = m_.names;
    n.embedding = "transformer.wte";
    n.positions = "transformer.wpe";
    n.layer = "transformer.h.";
    n.norm = "transformer.ln_f";
    n.attention_norm = "ln_1";
    n.feed_forward_norm = "ln_2";
    n.qkv = "attn.c_attn";
    n.output = "attn.c_proj";
    plain_feed_forward("mlp.c_fc", "mlp.c_proj");
  }
  void gpt_neox() {
    shape("layer_norm_eps");
    layer_norm();
    rope(RopeLayout::half_split, json_.number("rotary_pct", 0.25));
    if (json_.has("rotary_emb_base") && !json_.has("rope_parameters"))
      m_.form.ropes[0].base = static_cast<float>(json_.number("rotary_emb_base"));
    tied(false);
    activation("hidden_act", "gelu");
    all_biases(true);
    m_.qkv_bias = m_.output_bias = json_.boolean("attention_bias", true);
    m_.norm_bias = true;
    if (json_.boolean("use_parallel_residual", true)) m_.form.blocks = DecoderBlocks::parallel;
    m_.qkv_layout = QkvLayout::by_head;
    ModelNames& n = m_.names;
    n.embedding = "gpt_neox.embed_in";
    n.layer = "gpt_neox.layers.";
    n.norm = "gpt_neox.final_layer_norm";
    n.head = "embed_out";
    n.qkv = "attention.query_key_value";
    n.output = "attention.dense";
    plain_feed_forward("mlp.dense_h_to_4h", "mlp.dense_4h_to_h");
  }

  // ---- the rest ---------------------------------------------------------------------------------

  void validate() {
    try {
      m_.shape.validate();
      m_.form.validate(m_.shape);
    } catch (const std::invalid_argument& error) {
      json_.refuse("", error.what());
    }
  }
};

}  // namespace detail

/// The configuration in the text of a config.json; `file` is named in messages. Throws
/// ModelFileError.
inline ModelConfig parse_model_config(std::string_view text, std::string_view file,
                                      const ModelConfigOptions& options = {}) {
  const nlohmann::json document = detail::parse_json(text, file);
  detail::JsonObject json(document, file);
  if (json.has("quantization_config")) {
    const auto how = json.object("quantization_config");
    const std::string method = how.text("quant_method", "");
    if (method != "mxfp4")
      how.refuse("quant_method", "is " + detail::printable(method) + ", which is not supported");
  }
  // Models of text and images keep the decoder's part apart.
  const std::string type = json.text("model_type", "");
  if ((type == "gemma3" || type == "mistral3") && json.has("text_config")) {
    const detail::JsonObject inner = json.object("text_config");
    return detail::FamilyReader(inner, options).read();
  }
  return detail::FamilyReader(json, options).read();
}

/// The same of a file.
inline ModelConfig read_model_config(const std::filesystem::path& path,
                                     const ModelConfigOptions& options = {}) {
  const MappedFile file(path);
  return parse_model_config(file.text(), file.name(), options);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
