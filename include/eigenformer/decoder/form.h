/// \file
/// What decoders of other families do differently from Llama, for inference: norms, biases, blocks
/// side by side, rotations and windows by layer, caps and scales. DecoderConfig says how large a
/// decoder is, DecoderForm what it computes; a form of defaults is Llama's.
///
///   ef::DecoderForm gemma2;
///   gemma2.placement = ef::NormPlacement::both;
///   gemma2.activation = ef::DecoderActivation::gelu_tanh;
///   gemma2.logit_softcap = 30;
///   auto packed = std::make_shared<ef::PackedDecoderWeights<float>>(
///       config, ef::WeightFormat::int8, gemma2);
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../activation/clamped_swiglu.h"
#include "../expert_routing.h"
#include "../rope.h"
#include "config.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

enum class DecoderNorm {
  rms,    ///< RMSNorm
  layer,  ///< LayerNorm
};

/// Of the norms of attention and feed-forward.
enum class NormPlacement {
  before,  ///< x + f(norm(x)): Llama
  after,   ///< x + norm(f(x)): OLMo 2
  both,    ///< x + norm(f(norm(x))): Gemma 2
};

enum class DecoderBlocks {
  sequential,            ///< x += attention, then x += feed-forward of that: Llama
  parallel,              ///< x += attention + feed-forward, each with a norm of its own: GPT-NeoX
  parallel_shared_norm,  ///< the same with one norm: Falcon 7B, Phi-2, Cohere
};

/// Norm of queries and keys before they turn.
enum class QueryKeyNorm {
  none,
  head,        ///< RMSNorm of every head, with weights (head_dim): Qwen 3, Gemma 3
  row,         ///< RMSNorm of all heads of a token together: OLMo 2
  layer_head,  ///< LayerNorm of every head, with weights and biases of its own: Cohere, StableLM
};

enum class DecoderActivation {
  silu,
  gelu,
  gelu_tanh,
  relu,
  clamped_swiglu,  ///< of experts: activation.h; gpt-oss
};

/// Experts in the place of a feed-forward, gated as the form's and of its activation.
struct DecoderExperts {
  Index count = 0;   ///< of a layer; 0: there are none
  Index chosen = 0;  ///< that a token goes through
  Index hidden = 0;  ///< width of each
  ExpertRoutingOptions routing = {};
  Index shared_hidden = 0;   ///< width of an expert that all tokens go through; 0: there is none
  bool shared_gate = false;  ///< it counts by the sigmoid of a product of its own: Qwen 2
};

/// One layer's part of a form.
struct DecoderLayerForm {
  Index window = 0;    ///< most recent positions that a token sees, its own included; 0: all
  int rope = 0;        ///< which of DecoderForm::ropes turns queries and keys; -1: none does
  bool dense = false;  ///< has a feed-forward where others have experts
};

struct DecoderForm {
  DecoderNorm norm = DecoderNorm::rms;
  NormPlacement placement = NormPlacement::before;
  DecoderBlocks blocks = DecoderBlocks::sequential;
  QueryKeyNorm query_key_norm = QueryKeyNorm::none;
  DecoderActivation activation = DecoderActivation::silu;
  bool gated = true;               ///< down(f(gate x) * up x); else down(f(up x))
  bool feed_forward_bias = false;  ///< of gate and up, or of up alone
  DecoderExperts experts = {};
  ClampedSwigluOptions clamped_swiglu = {};
  bool sinks = false;  ///< attention has a sink of each head
  /// One per head: ALiBi, attention of position p to j gets slope * (j - p) (ef::alibi_slopes);
  /// none: there is none
  std::vector<float> alibi_slopes = {};
  Index positions = 0;          ///< rows of a table of learned positions (GPT-2); 0: there is none
  float attention_scale = 0;    ///< 0: 1 / sqrt(head_dim)
  float attention_softcap = 0;  ///< 0: none
  float embedding_scale = 1;
  float residual_scale = 1;  ///< of what attention and feed-forward add
  float logit_scale = 1;
  float logit_softcap = 0;               ///< 0: none
  std::vector<RopeOptions> ropes;        ///< none: one of DecoderConfig's base and layout
  std::vector<DecoderLayerForm> layers;  ///< one per layer, or none: all of the defaults

  DecoderLayerForm layer(Index l) const {
    return layers.empty() ? DecoderLayerForm{} : layers[static_cast<std::size_t>(l)];
  }
  bool has_experts(Index l) const { return experts.count > 0 && !layer(l).dense; }
  /// Width of what is no expert of a choice: a feed-forward, or the experts' shared one.
  Index hidden(const DecoderConfig& config, Index l) const {
    return has_experts(l) ? experts.shared_hidden : config.hidden;
  }
  /// Whether an expert's gate, up and their product are one product of matrices.
  bool fuses_experts() const { return activation != DecoderActivation::clamped_swiglu; }
  /// Whether gate, up and their product are one product of matrices.
  bool fuses_gates() const {
    return gated && activation == DecoderActivation::silu && !feed_forward_bias;
  }
  /// Weights of the norm of this many heads of queries or keys.
  Index query_key_norm_weights(const DecoderConfig& config, Index heads) const {
    const bool of_all =
        query_key_norm == QueryKeyNorm::row || query_key_norm == QueryKeyNorm::layer_head;
    return of_all ? heads * config.head_dim : config.head_dim;
  }
  /// Whether a norm of this many weights and biases has what it needs: LayerNorm both.
  bool has_all_of(Index norm_weights, Index norm_biases) const {
    return norm_weights > 0 && (norm == DecoderNorm::rms || norm_biases > 0);
  }
  bool norm_before() const { return placement != NormPlacement::after; }
  bool norm_after() const { return placement != NormPlacement::before; }
  bool parallel() const { return blocks != DecoderBlocks::sequential; }
  bool shares_norm() const { return blocks == DecoderBlocks::parallel_shared_norm; }

  /// Throws std::invalid_argument where no decoder of this form and shape can be.
  void validate(const DecoderConfig& config) const {
    constexpr auto name = "Decoder";
    const auto finite = [&](float value, const char* what) {
      detail::require_that(std::isfinite(value), name, what, " is ", value,
                           ", expected a finite number");
    };
    finite(attention_scale, "attention_scale");
    finite(embedding_scale, "embedding_scale");
    finite(residual_scale, "residual_scale");
    finite(logit_scale, "logit_scale");
    const auto cap = [&](float value, const char* what) {
      detail::require_that(std::isfinite(value) && value >= 0, name, what, " is ", value,
                           ", expected 0 (none) or a positive number");
    };
    cap(attention_softcap, "attention_softcap");
    cap(logit_softcap, "logit_softcap");
    detail::require_that(!parallel() || placement == NormPlacement::before, name,
                         "blocks side by side have their norms before them, expected "
                         "NormPlacement::before");
    detail::require_that(!gated || activation != DecoderActivation::relu, name,
                         "a gated ReLU is not among the activations");
    detail::require_that(gated || activation != DecoderActivation::clamped_swiglu, name,
                         "a clamped SwiGLU is gated, the form is not");
    if (activation == DecoderActivation::clamped_swiglu)
      detail::require_clamped_swiglu("clamped_swiglu", clamped_swiglu);
    validate_experts();
    detail::require_that(
        alibi_slopes.empty() || static_cast<Index>(alibi_slopes.size()) == config.heads, name,
        "alibi_slopes has ", alibi_slopes.size(), " elements, expected ", config.heads,
        " (heads) or none");
    for (const float slope : alibi_slopes) finite(slope, "a slope of ALiBi");
    detail::require_that(positions >= 0 && positions <= (std::numeric_limits<std::int32_t>::max)(),
                         name, "positions is ", positions, ", expected 0 (no table) to 2^31 - 1");
    detail::require_that(layers.empty() || static_cast<Index>(layers.size()) == config.layers, name,
                         "the form has ", layers.size(), " layers, the configuration says ",
                         config.layers);
    const int choices = ropes.empty() ? 1 : static_cast<int>(ropes.size());
    for (std::size_t l = 0; l < layers.size(); ++l) {
      detail::require_that(layers[l].window >= 0, name, "window of layer ", l, " is ",
                           layers[l].window, ", expected 0 (none) or more");
      detail::require_that(layers[l].rope >= -1 && layers[l].rope < choices, name, "rope of layer ",
                           l, " is ", layers[l].rope, ", expected -1 (none) to ", choices - 1);
    }
    for (const RopeOptions& options : ropes)
      detail::rope_rotary_dim(name, config.head_dim, options);
  }

 private:
  void validate_experts() const {
    constexpr auto name = "Decoder";
    const DecoderExperts& e = experts;
    detail::require_that(e.count >= 0, name, "experts.count is ", e.count,
                         ", expected 0 (none) or more");
    if (e.count == 0) return;
    detail::require_expert_routing(name, e.count, e.chosen, e.routing);
    detail::require_that(gated, name, "experts are gated units, the form is not gated");
    constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
    detail::require_that(e.hidden > 0 && e.hidden <= most, name, "experts.hidden is ", e.hidden,
                         ", expected 1 to 2^31 - 1");
    detail::require_that(e.shared_hidden >= 0 && e.shared_hidden <= most, name,
                         "experts.shared_hidden is ", e.shared_hidden, ", expected 0 to 2^31 - 1");
    detail::require_that(e.shared_hidden > 0 || !e.shared_gate, name,
                         "experts have a shared_gate and no shared expert");
  }
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
