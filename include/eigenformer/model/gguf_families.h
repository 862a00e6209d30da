/// \file
/// What the metadata of a GGUF file say of a model, by its general.architecture, as llama.cpp's
/// converter writes them:
///
///   llama (Llama 1 to 3.3, Mistral, SmolLM, Mixtral), granite, smollm3, qwen2, qwen3, gemma,
///   gemma2, gemma3, phi2, phi3 (and 4), olmo2 (and 3), starcoder2, stablelm, chatglm (GLM), glm4,
///   command-r (Cohere), cohere2, falcon, gpt2, gptneox; with experts qwen2moe, qwen3moe, gpt-oss
///
/// Others, keys of the architecture that nobody here asks for, and tensors that are no part of the
/// decoder are refused by name.
///
/// GGUF differs from config.json: rows of queries and keys of llama, granite and smollm3 lie
/// interleaved, fused ones lie one below the other whatever the family, Gemma's norms are stored as
/// 1 + w, GPT-2's matrices are (out, in), and biases and fused tensors are there or not without a
/// word in the metadata. What it has no word for is what llama.cpp takes it to be: gemma's scale of
/// attention follows from the number of layers, SmolLM 3 does not turn every fourth layer.
#pragma once

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "config.h"
#include "gguf.h"
#include "gguf_keys.h"
#include "gguf_rope.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

class GgufFamilyReader {
 public:
  GgufFamilyReader(const GgufMetadata& metadata, const StoredTensors& tensors,
                   const ModelConfigOptions& options)
      : keys_(metadata), tensors_(tensors), options_(options) {}

  ModelConfig read() {
    m_.family = keys_.architecture();
    using Family = void (GgufFamilyReader::*)();
    static const std::map<std::string, Family, std::less<>> families{
        {"llama", &GgufFamilyReader::llama},
        {"qwen2moe", &GgufFamilyReader::qwen2moe},
        {"qwen3moe", &GgufFamilyReader::qwen3moe},
        {"gpt-oss", &GgufFamilyReader::gpt_oss},
        {"granite", &GgufFamilyReader::granite},
        {"smollm3", &GgufFamilyReader::smollm3},
        {"qwen2", &GgufFamilyReader::plain},
        {"qwen3", &GgufFamilyReader::qwen3},
        {"gemma", &GgufFamilyReader::gemma},
        {"gemma2", &GgufFamilyReader::gemma2},
        {"gemma3", &GgufFamilyReader::gemma3},
        {"phi2", &GgufFamilyReader::phi2},
        {"phi3", &GgufFamilyReader::plain},
        {"olmo2", &GgufFamilyReader::olmo2},
        {"starcoder2", &GgufFamilyReader::starcoder2},
        {"stablelm", &GgufFamilyReader::stablelm},
        {"chatglm", &GgufFamilyReader::interleaved},
        {"glm4", &GgufFamilyReader::glm4},
        {"command-r", &GgufFamilyReader::command_r},
        {"cohere2", &GgufFamilyReader::cohere2},
        {"falcon", &GgufFamilyReader::falcon},
        {"gpt2", &GgufFamilyReader::gpt2},
        {"gptneox", &GgufFamilyReader::gptneox}};
    const auto family = families.find(m_.family);
    if (family == families.end())
      refuse("general.architecture", "is " + printable(m_.family) + ", which is not supported");
    refuse_what_is_not_computed();
    shape();
    names();
    what_tensors_say();
    (this->*family->second)();
    keys_.require_all_asked([&](auto key, auto why) { refuse(key, why); });
    try {
      m_.shape.validate();
      m_.form.validate(m_.shape);
    } catch (const std::invalid_argument& error) {
      refuse("general.architecture", error.what());
    }
    return m_;
  }

 private:
  // ---- what families share ----------------------------------------------------------------------

  [[noreturn]] void refuse(std::string_view part, std::string_view why) const {
    fail_model(tensors_.file(), part, why);
  }
  bool has(std::string_view tensor) const { return tensors_.find(tensor) != nullptr; }
  float number(std::string_view name, double otherwise) const {
    return static_cast<float>(keys_.number(name, otherwise));
  }
  /// A factor that some files leave out by writing 0.
  float factor(std::string_view name) const {
    const float value = number(name, 1);
    return value == 0 ? 1.0f : value;
  }

  void refuse_what_is_not_computed() const {
    if (!keys_.boolean("attention.causal", true))
      refuse(keys_.key("attention.causal"),
             "is false: tokens that see later ones are not supported");
  }

  void shape() {
    DecoderConfig& s = m_.shape;
    const StoredTensor& embedding = tensors_.at("token_embd.weight");
    s.vocabulary = embedding.rows();
    s.features = keys_.integer("embedding_length");
    s.layers = keys_.integer("block_count");
    if (s.layers < 1 || s.layers > 100000)  // before anything is made for each
      refuse(keys_.key("block_count"), "is not within 1 to 100000");
    s.heads = keys_.integer("attention.head_count");
    if (s.heads < 1) refuse(keys_.key("attention.head_count"), "is not positive");
    s.kv_heads = keys_.integer("attention.head_count_kv", s.heads);
    s.head_dim = keys_.integer("attention.key_length", s.features / s.heads);
    if (s.head_dim < 1 || s.head_dim > 65536)
      refuse(keys_.key("attention.key_length"), "is not within 1 to 65536");
    for (const char* const same :
         {"attention.value_length", "attention.key_length_swa", "attention.value_length_swa"})
      if (keys_.integer(same, s.head_dim) != s.head_dim)
        refuse(keys_.key(same), "differs from attention.key_length, which is not supported");
    s.hidden = keys_.integer("feed_forward_length");
    s.epsilon = number("attention.layer_norm_rms_epsilon", 1e-5);
    m_.positions = keys_.integer("context_length", 2048);
  }

  void names() {
    ModelNames& n = m_.names;
    n.embedding = "token_embd";
    n.positions = "position_embd";
    n.norm = "output_norm";
    n.head = "output";
    n.layer = "blk.";
    n.attention_norm = "attn_norm";
    n.feed_forward_norm = "ffn_norm";
    n.after_attention_norm = "post_attention_norm";
    n.after_feed_forward_norm = "post_ffw_norm";
    n.query = "attn_q";
    n.key = "attn_k";
    n.value = "attn_v";
    n.qkv = "attn_qkv";
    n.query_norm = "attn_q_norm";
    n.key_norm = "attn_k_norm";
    n.output = "attn_output";
    n.gate = "ffn_gate";
    n.up = "ffn_up";
    n.gate_up = "ffn_up";
    n.down = "ffn_down";
  }

  /// All layers are as the first: the loader refuses what is missing and what nobody reads.
  void what_tensors_say() {
    if (has("blk.0.attn_qkv.weight")) m_.qkv_layout = QkvLayout::stacked;
    m_.qkv_bias =
        has(m_.qkv_layout == QkvLayout::stacked ? "blk.0.attn_qkv.bias" : "blk.0.attn_q.bias");
    m_.output_bias = has("blk.0.attn_output.bias");
    m_.form.feed_forward_bias = has("blk.0.ffn_up.bias");
    m_.fused_gate_up = !has("blk.0.ffn_gate.weight");
    m_.tied_head = !has("output.weight");
    m_.head_bias = has("output.bias");
  }
  void layer_norm() {
    m_.form.norm = DecoderNorm::layer;
    m_.norm_bias = has("output_norm.bias");
    m_.shape.epsilon = number("attention.layer_norm_epsilon", 1e-5);
    if (has("blk.0.attn_q_norm.weight"))
      refuse("blk.0.attn_q_norm.weight", "norms of queries in LayerNorm are not supported in GGUF");
  }
  void plain_feed_forward(DecoderActivation activation) {
    m_.form.gated = m_.fused_gate_up = false;
    m_.form.activation = activation;
  }
  /// Norms before and after.
  void sandwich() { m_.form.placement = NormPlacement::both; }

  /// Windows on all layers but each `pattern`th, or on all where it is 0, unless the file says
  /// which; none where it has no window.
  void windows(Index pattern, Index otherwise = 0) {
    const Index window = keys_.integer("attention.sliding_window", otherwise);
    constexpr auto key = "attention.sliding_window_pattern";
    const std::vector<std::int64_t> list = keys_.list(key);
    if (list.empty()) pattern = keys_.integer(key, pattern);
    if (pattern < 0) refuse(keys_.key(key), "is negative");
    if (window == 0) return;
    const auto layers = static_cast<std::size_t>(m_.shape.layers);
    if (!list.empty() && list.size() != layers)
      refuse(keys_.key(key), "has not an element for each layer");
    m_.form.layers.resize(layers);
    for (std::size_t l = 0; l < layers; ++l) {
      const auto at = static_cast<Index>(l);
      if (list.empty() ? pattern == 0 || at % pattern < pattern - 1 : list[l] != 0)
        m_.form.layers[l].window = window;
    }
  }

  GgufRope rope_reader() const {
    const Index length = options_.length > 0 ? options_.length : m_.positions;
    return {keys_, tensors_, m_.shape.head_dim, m_.positions, length};
  }
  void rope(RopeLayout layout = RopeLayout::half_split) {
    const double base = keys_.number("rope.freq_base", 10000);
    if (keys_.number("rope.freq_base_swa", base) != base)
      refuse(keys_.key("rope.freq_base_swa"),
             "differs from rope.freq_base, which is not supported");
    m_.form.ropes = {rope_reader().scaled(base)};
    m_.form.ropes[0].layout = layout;
  }
  /// Layers with windows turn by frequencies of their own, which are not scaled.
  void rope_by_layer(double base_of_windows) {
    const GgufRope reader = rope_reader();
    m_.form.ropes = {reader.scaled(keys_.number("rope.freq_base", 10000)),
                     reader.plain(keys_.number("rope.freq_base_swa", base_of_windows))};
    for (DecoderLayerForm& layer : m_.form.layers) layer.rope = layer.window > 0 ? 1 : 0;
  }

  // ---- the families -----------------------------------------------------------------------------

  /// Of llama's form, with queries and keys as config.json has them.
  void plain() {
    windows(0);
    rope();
  }
  void interleaved() {
    windows(0);
    rope(RopeLayout::interleaved);
  }
  void llama() {
    interleaved();
    experts(m_.shape.hidden, true);  // Mixtral
  }
  void granite() {
    interleaved();
    m_.form.attention_scale = number("attention.scale", 0);
    m_.form.embedding_scale = factor("embedding_scale");
    m_.form.residual_scale = factor("residual_scale");
    m_.form.logit_scale = 1 / factor("logit_scale");
    if (!keys_.boolean("rope.scaling.finetuned", true))
      refuse(keys_.key("rope.scaling.finetuned"),
             "is false: Granite without rotation is not supported");
  }
  void smollm3() {
    interleaved();
    m_.form.layers.resize(static_cast<std::size_t>(m_.shape.layers));
    for (std::size_t l = 3; l < m_.form.layers.size(); l += 4) m_.form.layers[l].rope = -1;
  }
  void qwen3() {
    plain();
    m_.form.query_key_norm = QueryKeyNorm::head;
  }

  // ---- mixtures of experts ----------------------------------------------------------------------

  /// In layers that have a router. Their weights are normalised or not as llama.cpp does it for the
  /// family; files that say otherwise are refused.
  void experts(Index hidden, bool normalise, ExpertScores scores = ExpertScores::softmax) {
    DecoderExperts& e = m_.form.experts;
    e.count = keys_.integer("expert_count", 0);
    if (e.count <= 0) return;
    e.chosen = keys_.integer("expert_used_count");
    e.hidden = keys_.integer("expert_feed_forward_length", hidden);
    e.routing.scores = scores;
    e.routing.normalise = normalise;
    if (keys_.boolean("expert_weights_norm", normalise) != normalise)
      refuse(keys_.key("expert_weights_norm"), "is not what this architecture does");
    if (keys_.number("expert_weights_scale", 1) != 1)
      refuse(keys_.key("expert_weights_scale"), "is not 1, which is not supported");
    const std::int64_t function = scores == ExpertScores::softmax ? 1 : 3;
    if (keys_.integer("expert_gating_func", function) != function)
      refuse(keys_.key("expert_gating_func"), "is not what this architecture does");
    ModelNames& n = m_.names;
    n.router = "ffn_gate_inp";
    n.all_gates = "ffn_gate_exps";
    n.all_ups = "ffn_up_exps";
    n.all_downs = "ffn_down_exps";
    n.shared_gate_proj = "ffn_gate_shexp";
    n.shared_up_proj = "ffn_up_shexp";
    n.shared_down_proj = "ffn_down_shexp";
    n.shared_gate = "ffn_gate_inp_shexp";
    m_.router_bias = has("blk.0.ffn_gate_inp.bias");
    m_.form.feed_forward_bias = has("blk.0.ffn_up_exps.bias");
    m_.fused_gate_up = false;
    m_.form.layers.resize(static_cast<std::size_t>(m_.shape.layers));
    for (std::size_t l = 0; l < m_.form.layers.size(); ++l)
      m_.form.layers[l].dense = !has("blk." + std::to_string(l) + ".ffn_gate_inp.weight");
  }
  void qwen2moe() {
    plain();
    experts(m_.shape.hidden, false);
    DecoderExperts& e = m_.form.experts;
    e.shared_hidden = keys_.integer("expert_shared_feed_forward_length", m_.shape.hidden);
    e.shared_gate = e.shared_hidden > 0;
  }
  void qwen3moe() {
    qwen3();
    experts(m_.shape.hidden, true);
  }
  void gpt_oss() {
    windows(2);
    rope();
    experts(m_.shape.hidden, false, ExpertScores::softmax_of_chosen);
    m_.form.activation = DecoderActivation::clamped_swiglu;
    m_.form.clamped_swiglu = {1.702f, 7.0f};
    m_.form.sinks = true;
    m_.names.sinks = "attn_sinks.weight";
    m_.names.feed_forward_norm = "post_attention_norm";
  }

  // ---- others -----------------------------------------------------------------------------------

  void gemma_form() {
    m_.form.activation = DecoderActivation::gelu_tanh;
    m_.form.embedding_scale = static_cast<float>(std::sqrt(static_cast<double>(m_.shape.features)));
  }
  /// Of the largest, which is told by its layers: 1 / sqrt(features / heads).
  void gemma_scale(Index layers_of_largest) {
    if (m_.shape.layers == layers_of_largest)
      m_.form.attention_scale = static_cast<float>(
          1 / std::sqrt(static_cast<double>(m_.shape.features / m_.shape.heads)));
  }
  void gemma() {
    gemma_form();
    plain();
  }
  void gemma2() {
    gemma_form();
    gemma_scale(46);
    sandwich();
    windows(2, 4096);
    rope();
    m_.form.attention_softcap = number("attn_logit_softcapping", 50);
    m_.form.logit_softcap = number("final_logit_softcapping", 30);
  }
  void gemma3() {
    gemma_form();
    gemma_scale(62);
    sandwich();
    m_.form.query_key_norm = QueryKeyNorm::head;
    windows(6);
    rope_by_layer(10000);
    m_.form.logit_softcap = number("final_logit_softcapping", 0);
  }
  void phi2() {
    layer_norm();
    plain();
    plain_feed_forward(DecoderActivation::gelu_tanh);
    m_.form.blocks = DecoderBlocks::parallel_shared_norm;
  }
  void olmo2() {
    m_.form.placement = NormPlacement::after;
    m_.form.query_key_norm = QueryKeyNorm::row;
    windows(4);
    rope_by_layer(keys_.number("rope.freq_base", 10000));
  }
  void starcoder2() {
    layer_norm();
    plain();
    plain_feed_forward(DecoderActivation::gelu_tanh);
  }
  void stablelm() {
    layer_norm();
    plain();
    const bool parallel = !has("blk.0.ffn_norm.weight");
    if (keys_.boolean("use_parallel_residual", parallel) != parallel)
      refuse(keys_.key("use_parallel_residual"), "does not go with the tensors of the layers");
    if (parallel) m_.form.blocks = DecoderBlocks::parallel_shared_norm;
  }
  void glm4() {
    interleaved();
    sandwich();
  }
  void cohere() {
    layer_norm();
    m_.form.blocks = DecoderBlocks::parallel_shared_norm;
    m_.form.logit_scale = factor("logit_scale");
  }
  void command_r() {
    cohere();
    interleaved();
  }
  void cohere2() {
    cohere();
    windows(4);
    if (m_.form.layers.empty())
      refuse(keys_.key("attention.sliding_window"), "is missing or 0, expected a positive number");
    rope(RopeLayout::interleaved);
    for (DecoderLayerForm& layer : m_.form.layers) layer.rope = layer.window > 0 ? 0 : -1;
  }
  void falcon() {
    if (keys_.text("tensor_data_layout", "jploski") != "jploski")
      refuse(keys_.key("tensor_data_layout"), "is not jploski, which is not supported");
    layer_norm();
    plain();
    plain_feed_forward(DecoderActivation::gelu);
    m_.form.blocks = DecoderBlocks::parallel_shared_norm;
    if (!has("blk.0.attn_norm_2.weight")) return;
    m_.form.blocks = DecoderBlocks::parallel;
    m_.names.attention_norm = "attn_norm_2";
    m_.names.feed_forward_norm = "attn_norm";
  }
  void gpt2() {
    layer_norm();
    plain_feed_forward(DecoderActivation::gelu_tanh);
    m_.form.positions = tensors_.at("position_embd.weight").rows();
    m_.form.layers.assign(static_cast<std::size_t>(m_.shape.layers), {.rope = -1});
  }
  void gptneox() {
    layer_norm();
    plain();
    plain_feed_forward(DecoderActivation::gelu);
    if (keys_.boolean("use_parallel_residual", true)) m_.form.blocks = DecoderBlocks::parallel;
  }

  const GgufKeys keys_;
  const StoredTensors& tensors_;
  const ModelConfigOptions& options_;
  ModelConfig m_;
};

}  // namespace detail

/// The configuration in the metadata of a GGUF file, but for the tokens that end a text, which its
/// tokenizer knows. Throws ModelFileError.
inline ModelConfig gguf_model_config(const Gguf& file, const ModelConfigOptions& options = {}) {
  return detail::GgufFamilyReader(file.metadata(), file.tensors(), options).read();
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
