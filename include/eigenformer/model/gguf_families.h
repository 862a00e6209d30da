/// \file
/// What the metadata of a GGUF file say of a model, by its general.architecture: llama (Llama,
/// Mistral, SmolLM), qwen2, qwen3, gemma and phi3. Others are refused by name.
///
/// GGUF differs from config.json: rows of queries and keys of llama lie interleaved, Gemma's norms
/// are stored as 1 + w, and Llama 3's scaling of frequencies is a tensor, rope_freqs.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../rope/frequencies.h"
#include "config.h"
#include "dequantize.h"
#include "gguf.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

class GgufFamilyReader {
 public:
  explicit GgufFamilyReader(const Gguf& file) : meta_(file.metadata()), tensors_(file.tensors()) {}

  ModelConfig read() {
    m_.family = std::string(meta_.text("general.architecture"));
    constexpr std::string_view known[] = {"llama", "qwen2", "qwen3", "gemma", "phi3"};
    if (std::find(std::begin(known), std::end(known), m_.family) == std::end(known))
      refuse("general.architecture", "is " + printable(m_.family) + ", which is not supported");
    if (integer("expert_count", 0) > 0)
      refuse(key("expert_count"), "is not 0: mixtures of experts are not supported");
    shape();
    names();
    if (m_.family == "qwen2") m_.qkv_bias = true;
    if (m_.family == "qwen3") m_.form.query_key_norm = QueryKeyNorm::head;
    if (m_.family == "gemma") {
      m_.form.activation = DecoderActivation::gelu_tanh;
      m_.form.embedding_scale =
          static_cast<float>(std::sqrt(static_cast<double>(m_.shape.features)));
    }
    if (m_.family == "phi3") {
      m_.qkv_layout = QkvLayout::stacked;
      m_.fused_gate_up = true;
    }
    if (const Index window = integer("attention.sliding_window", 0); window > 0)
      m_.form.layers.assign(static_cast<std::size_t>(m_.shape.layers), {.window = window});
    m_.tied_head = tensors_.find("output.weight") == nullptr;
    rope();
    try {
      m_.shape.validate();
      m_.form.validate(m_.shape);
    } catch (const std::invalid_argument& error) {
      refuse("general.architecture", error.what());
    }
    return m_;
  }

 private:
  std::string key(std::string_view name) const { return m_.family + "." + std::string(name); }
  Index integer(std::string_view name) const {
    return static_cast<Index>(meta_.integer(key(name)));
  }
  Index integer(std::string_view name, Index otherwise) const {
    return meta_.contains(key(name)) ? integer(name) : otherwise;
  }
  double number(std::string_view name, double otherwise) const {
    return meta_.contains(key(name)) ? meta_.number(key(name)) : otherwise;
  }
  [[noreturn]] void refuse(std::string_view part, std::string_view why) const {
    fail_model(tensors_.file(), part, why);
  }

  void shape() {
    DecoderConfig& s = m_.shape;
    const StoredTensor& embedding = tensors_.at("token_embd.weight");
    s.vocabulary = embedding.rows();
    s.features = integer("embedding_length");
    s.layers = integer("block_count");
    if (s.layers < 1 || s.layers > 100000) refuse(key("block_count"), "is not within 1 to 100000");
    s.heads = integer("attention.head_count");
    if (s.heads < 1) refuse(key("attention.head_count"), "is not positive");
    s.kv_heads = integer("attention.head_count_kv", s.heads);
    s.head_dim = integer("attention.key_length", s.features / s.heads);
    if (integer("attention.value_length", s.head_dim) != s.head_dim)
      refuse(key("attention.value_length"), "differs from key_length, which is not supported");
    s.hidden = integer("feed_forward_length");
    s.epsilon = static_cast<float>(number("attention.layer_norm_rms_epsilon", 1e-5));
    m_.positions = integer("context_length", 2048);
  }

  void names() {
    ModelNames& n = m_.names;
    n.embedding = "token_embd";
    n.norm = "output_norm";
    n.head = "output";
    n.layer = "blk.";
    n.attention_norm = "attn_norm";
    n.feed_forward_norm = "ffn_norm";
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

  void rope() {
    const double base = number("rope.freq_base", 10000);
    const Index dim = integer("rope.dimension_count", m_.shape.head_dim);
    if (dim < 0 || dim > m_.shape.head_dim || dim % 2 != 0)
      refuse(key("rope.dimension_count"), "is not an even number of at most the heads' width");
    std::vector<float> factors(static_cast<std::size_t>(dim / 2), 1.0f);
    if (const StoredTensor* const stored = tensors_.find("rope_freqs.weight")) {
      if (stored->rows() * stored->columns() != dim / 2)
        refuse(stored->name, "has not an element for each pair of features that turns");
      dequantize_rows(*stored, 0, factors);
    }
    std::string type = "none";
    if (meta_.contains(key("rope.scaling.type")))
      type = std::string(meta_.text(key("rope.scaling.type")));
    const double factor = number("rope.scaling.factor", 1);
    if (type != "none" && type != "linear" && type != "yarn")
      refuse(key("rope.scaling.type"), "is " + printable(type) + ", which is not supported");
    if (tensors_.find("rope_factors_long.weight") != nullptr)
      refuse("rope_factors_long.weight", "LongRoPE in GGUF files is not supported");
    try {
      m_.form.ropes.resize(1);
      m_.form.ropes[0] =
          type == "yarn"
              ? yarn_rope(dim, base,
                          {.factor = factor,
                           .trained_length = number("rope.scaling.original_context_length",
                                                    static_cast<double>(m_.positions))})
              : rope_with("rope", dim, base, 1.0, [&](std::size_t i, double f) {
                  return f / static_cast<double>(factors[i]) / (type == "linear" ? factor : 1.0);
                });
      if (m_.family == "llama") m_.form.ropes[0].layout = RopeLayout::interleaved;
    } catch (const std::invalid_argument& error) {
      refuse(key("rope.freq_base"), error.what());
    }
  }

  const GgufMetadata& meta_;
  const StoredTensors& tensors_;
  ModelConfig m_;
};

}  // namespace detail

/// The configuration in the metadata of a GGUF file, but for the tokens that end a text, which its
/// tokenizer knows. Throws ModelFileError.
inline ModelConfig gguf_model_config(const Gguf& file) {
  return detail::GgufFamilyReader(file).read();
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
