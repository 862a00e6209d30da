/// \file
/// Every array of packed weights, in one order, with the size that the configuration says: for
/// files of them (model/packed_file.h).
#pragma once

#include "packed_weights.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Calls, of weights that may be const, for each part
///
///   visit.vector(array, size)             PackedArray<float>, empty or of this size
///   visit.numbers(list, size)             std::vector<float>, empty or of this size
///   visit.matrix(matrix, out, in)         PackedMatrix, with or without outputs
///   visit.gated(matrix, out, in)          PackedGatedMatrix
///   visit.experts(experts, count, hidden, in, fused)   PackedExperts, all or none of them
///   visit.embedding(table, owner, rows, columns)
struct PackedParts {
  template <typename Weights, typename Visit>
  static void all(Weights& weights, Visit& visit) {
    const DecoderConfig& c = weights.config_;
    Index l = 0;
    for (auto& layer : weights.layers_) one_layer(layer, c, weights.form_, l++, visit);
    visit.matrix(weights.head_, c.vocabulary, c.features);
    norm(weights.norm_, c, visit);
    visit.vector(weights.head_bias_, c.vocabulary);
    visit.vector(weights.positions_, weights.form_.positions * c.features);
    visit.embedding(weights.embedding_, weights.owner_, c.vocabulary, c.features);
  }

 private:
  template <typename Norm, typename Visit>
  static void norm(Norm& norm, const DecoderConfig& c, Visit& visit) {
    visit.vector(norm.weight, c.features);
    visit.vector(norm.bias, c.features);
  }
  template <typename Layer, typename Visit>
  static void one_layer(Layer& layer, const DecoderConfig& c, const DecoderForm& form, Index l,
                        Visit& visit) {
    const Index d = c.features, q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim,
                hidden = form.hidden(c, l), up = form.gated ? 2 * hidden : hidden;
    norm(layer.attention_norm, c, visit);
    norm(layer.feed_forward_norm, c, visit);
    norm(layer.after_attention_norm, c, visit);
    norm(layer.after_feed_forward_norm, c, visit);
    const Index query_weights = form.query_key_norm_weights(c, c.heads),
                key_weights = form.query_key_norm_weights(c, c.kv_heads);
    visit.vector(layer.query_norm.weight, query_weights);
    visit.vector(layer.key_norm.weight, key_weights);
    if (form.query_key_norm == QueryKeyNorm::layer_head) {
      visit.vector(layer.query_norm.bias, query_weights);
      visit.vector(layer.key_norm.bias, key_weights);
    }
    visit.matrix(layer.qkv, q + 2 * kv, d);
    visit.matrix(layer.output, d, q);
    visit.gated(layer.gate_up, hidden, d);
    visit.matrix(layer.up, up, d);
    visit.matrix(layer.down, d, hidden);
    visit.vector(layer.qkv_bias, q + 2 * kv);
    visit.vector(layer.output_bias, d);
    visit.vector(layer.up_bias, up);
    visit.vector(layer.down_bias, d);
    visit.numbers(layer.sinks, c.heads);
    if (!form.has_experts(l)) return;
    const DecoderExperts& experts = form.experts;
    visit.matrix(layer.router, experts.count, d);
    visit.vector(layer.router_bias, experts.count);
    visit.vector(layer.router_correction, experts.count);
    visit.matrix(layer.shared_gate, 1, d);
    visit.experts(layer.experts, experts.count, experts.hidden, d, form.fuses_experts());
    visit.vector(layer.expert_up_bias, experts.count * 2 * experts.hidden);
    visit.vector(layer.expert_down_bias, experts.count * d);
  }
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
