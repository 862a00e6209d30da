// The metadata of a GGUF file as a configuration: what it has no word for is what llama.cpp takes
// it to be, and what would change the model and is not understood is refused.
#include <eigenformer/model/gguf_families.h>

#include <cmath>

#include "compare.h"
#include "gguf_writer.h"
#include "model_files.h"

using namespace eigenformer_test;

namespace {

/// The configuration of a file of so many layers that has no tensor but the embedding.
ef::ModelConfig config_of(const std::string& architecture, std::uint32_t layers,
                          const nlohmann::json& more) {
  GgufWriter writer;
  writer.text("general.architecture", architecture);
  const auto key = [&](const std::string& name) { return architecture + "." + name; };
  writer.integer(key("block_count"), layers);
  writer.integer(key("embedding_length"), 16);
  writer.integer(key("attention.head_count"), 2);
  writer.integer(key("attention.key_length"), 4);
  writer.integer(key("feed_forward_length"), 24);
  for (const auto& [name, value] : more.items()) writer.value(key(name), value);
  writer.tensor("token_embd.weight", {32, 16}, std::vector<float>(32 * 16));
  const Folder folder;
  return ef::gguf_model_config(ef::Gguf(folder.write("m.gguf", writer.file())));
}
/// Of each layer: w where it has a window, r where it turns by the first rotation, s by another.
std::string layers_of(const ef::ModelConfig& config) {
  std::string text;
  for (Index l = 0; l < config.shape.layers; ++l) {
    const ef::DecoderLayerForm layer = config.form.layer(l);
    text += (layer.window > 0 ? "w" : "") +
            std::string(layer.rope < 0   ? ""
                        : layer.rope > 0 ? "s"
                                         : "r") +
            " ";
  }
  return text;
}

TEST(GgufFamilies, LayersAreWhatLlamaCppTakesThemToBe) {
  const nlohmann::json window{{"attention.sliding_window", {"uint32", 8}}};
  const auto layers = [](const char* architecture, std::uint32_t count,
                         const nlohmann::json& more) {
    return layers_of(config_of(architecture, count, more));
  };
  EXPECT_EQ(layers("smollm3", 5, {}), "r r r  r ");
  EXPECT_EQ(layers("gemma2", 4, {}), "wr r wr r ");  // 4096 is understood
  EXPECT_EQ(layers("gemma3", 7, window), "ws ws ws ws ws r ws ");
  EXPECT_EQ(layers("gemma3", 2, {}), "r r ");
  EXPECT_EQ(layers("cohere2", 5, window), "wr wr wr  wr ");
  EXPECT_EQ(layers("olmo2", 5, window), "ws ws ws r ws ");
  EXPECT_EQ(layers("qwen3", 2, window), "wr wr ");
  auto pattern = window;
  pattern["attention.sliding_window_pattern"] = {"bools", {false, true, false}};
  EXPECT_EQ(layers("olmo2", 3, pattern), "r ws r ");
  const float scale = config_of("gemma3", 62, window).form.attention_scale;
  EXPECT_FLOAT_EQ(scale, 1 / std::sqrt(8.0f));  // 16 features over 2 heads
  EXPECT_EQ(config_of("gemma3", 34, window).form.attention_scale, 0);
  EXPECT_EQ(config_of("gemma2", 2, {}).form.attention_softcap, 50);
}

TEST(GgufFamilies, WhatIsNotUnderstoodIsRefused) {
  const auto refused = [](const char* architecture, const nlohmann::json& more,
                          const std::vector<std::string>& words) {
    expect_throws<ef::ModelFileError>([&] { config_of(architecture, 3, more); }, words);
  };
  refused("mamba", {}, {"m.gguf", "general.architecture", "mamba"});
  const nlohmann::json some{"uint32", 8}, none{"uint32", 0};
  refused("llama", {{"expert_count", some}}, {"llama.expert_used_count", "missing"});
  refused("gemma", {{"expert_count", some}}, {"gemma.expert_count"});
  refused(
      "qwen3moe",
      {{"expert_count", some}, {"expert_used_count", some}, {"expert_gating_func", {"uint32", 2}}},
      {"qwen3moe.expert_gating_func"});
  refused("qwen2moe",
          {{"expert_count", some},
           {"expert_used_count", some},
           {"expert_weights_norm", {"bool", true}}},
          {"qwen2moe.expert_weights_norm"});
  refused("llama", {{"attention.clamp_kqv", {"float32", 8}}}, {"llama.attention.clamp_kqv"});
  config_of("llama", 3, {{"attention.clamp_kqv", {"float32", 0}}, {"nextn_predict_layers", none}});
  refused("glm4", {{"nextn_predict_layers", some}}, {"glm4.nextn_predict_layers"});
  refused("llama", {{"attention.causal", {"bool", false}}}, {"attention.causal"});
  refused("llama", {{"attention.value_length", some}}, {"attention.value_length"});
  refused("llama", {{"rope.dimension_count", {"uint32", 5}}}, {"rope.dimension_count"});
  refused("llama", {{"rope.scaling.type", {"string", "wave"}}}, {"rope.scaling.type", "wave"});
  refused("phi3", {{"rope.scaling.type", {"string", "longrope"}}}, {"rope_factors_short.weight"});
  refused(
      "llama",
      {{"rope.scaling.type", {"string", "yarn"}}, {"rope.scaling.yarn_ext_factor", {"float32", 2}}},
      {"yarn_ext_factor"});
  refused("gemma2", {{"rope.freq_base_swa", some}}, {"gemma2.rope.freq_base_swa"});
  refused("cohere2", {}, {"cohere2.attention.sliding_window"});
  refused("olmo2",
          {{"attention.sliding_window", some},
           {"attention.sliding_window_pattern", {"bools", {true, false}}}},
          {"sliding_window_pattern", "each layer"});
  refused("falcon", {{"tensor_data_layout", {"string", "other"}}}, {"falcon.tensor_data_layout"});
  refused("granite", {{"rope.scaling.finetuned", {"bool", false}}}, {"finetuned"});
  refused("stablelm", {{"use_parallel_residual", {"bool", false}}}, {"use_parallel_residual"});
}

}  // namespace
