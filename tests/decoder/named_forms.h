/// \file
/// Forms of decoders as families have them.
#pragma once

#include <vector>

#include <eigenformer/rope/frequencies.h>

#include "random_decoder.h"

namespace eigenformer_test::forms {

struct NamedForm {
  const char* name;
  ef::DecoderForm form;
  bool biases = false;
};

/// Gemma's, but for its two rotations.
inline ef::DecoderForm gemma_form() {
  ef::DecoderForm form;
  form.placement = ef::NormPlacement::both;
  form.activation = ef::DecoderActivation::gelu_tanh;
  form.query_key_norm = ef::QueryKeyNorm::head;
  form.attention_scale = 0.3f;
  form.attention_softcap = 2;
  form.logit_softcap = 3;
  form.embedding_scale = 4;
  form.layers = {{.window = 4}, {.rope = 1}, {.window = 3, .rope = -1}};
  return form;
}

/// Together they have every member of a form, every rotation and every activation.
inline std::vector<NamedForm> forms_of_families() {
  const auto layer_norm = [] {
    ef::DecoderForm form;
    form.norm = ef::DecoderNorm::layer;
    form.gated = false;
    form.feed_forward_bias = true;
    return form;
  };
  ef::DecoderForm gemma = gemma_form();
  gemma.ropes = {{}, ef::llama3_rope(6, 10000, {.trained_length = 16})};
  ef::DecoderForm olmo2;
  olmo2.placement = ef::NormPlacement::after;
  olmo2.query_key_norm = ef::QueryKeyNorm::row;
  olmo2.ropes = {ef::ntk_rope(6, 10000, 2, 8, 16)};
  ef::DecoderForm falcon_alibi = layer_norm();
  falcon_alibi.alibi_slopes = {.25f, .5f, .0625f, -.125f};
  falcon_alibi.layers.assign(kLayers, {.rope = -1});
  ef::DecoderForm granite;
  granite.residual_scale = 0.5f;
  granite.logit_scale = 0.25f;
  granite.activation = ef::DecoderActivation::gelu;
  ef::DecoderForm gpt_neox = layer_norm();
  gpt_neox.activation = ef::DecoderActivation::gelu;
  gpt_neox.blocks = ef::DecoderBlocks::parallel;
  gpt_neox.ropes = {{.rotary_dim = 4}};
  ef::DecoderForm cohere;
  cohere.norm = ef::DecoderNorm::layer;
  cohere.blocks = ef::DecoderBlocks::parallel_shared_norm;
  cohere.logit_scale = 0.0625f;
  cohere.ropes = {{.layout = ef::RopeLayout::interleaved}};
  cohere.layers = {{.window = 4}, {.rope = -1}, {.window = 4}};
  ef::DecoderForm phi = layer_norm();
  phi.blocks = ef::DecoderBlocks::parallel_shared_norm;
  phi.activation = ef::DecoderActivation::gelu_tanh;
  phi.query_key_norm = ef::QueryKeyNorm::layer_head;
  phi.ropes = {ef::longrope(
      4, 10000,
      {.factor = 2,
       .trained_length = 8,
       .length = 16,
       .short_factors = ef::Values<double>::owned(2, [](std::size_t) { return 1.0; }),
       .long_factors = ef::Values<double>::owned(2, [](std::size_t i) { return 1.5 + i; })})};
  ef::DecoderForm gpt2 = layer_norm();
  gpt2.activation = ef::DecoderActivation::relu;
  gpt2.positions = kLength;
  gpt2.layers.assign(kLayers, {.rope = -1});
  ef::DecoderForm gpt_oss;
  gpt_oss.sinks = true;
  gpt_oss.ropes = {ef::yarn_rope(6, 10000, {.factor = 4, .trained_length = 8})};
  gpt_oss.layers = {{.window = 3}, {}, {.window = 3}};
  gpt_oss.experts = {.count = 4,
                     .chosen = 2,
                     .hidden = 10,
                     .routing = {.scores = ef::ExpertScores::softmax_of_chosen}};
  gpt_oss.activation = ef::DecoderActivation::clamped_swiglu;
  gpt_oss.feed_forward_bias = true;
  ef::DecoderForm qwen2_moe;
  qwen2_moe.experts = {
      .count = 5, .chosen = 2, .hidden = 9, .shared_hidden = 7, .shared_gate = true};
  qwen2_moe.layers = {{}, {.dense = true}, {}};
  ef::DecoderForm biases;
  biases.feed_forward_bias = true;
  ef::DecoderForm plain = layer_norm();
  return {{"gemma", gemma},         {"olmo2", olmo2},
          {"granite", granite},     {"gpt_neox", gpt_neox, true},
          {"cohere", cohere},       {"phi", phi, true},
          {"gpt2", gpt2, true},     {"gpt_oss", gpt_oss, true},
          {"qwen2_moe", qwen2_moe}, {"biases", biases, true},
          {"plain", plain},         {"falcon_alibi", falcon_alibi, true}};
}

}  // namespace eigenformer_test::forms
