/// \file
/// A small decoder of any form with random tensors, which the tests of CPUs and of GPUs share.
#pragma once

#include <eigenformer/reference/decoder.h>

#include <list>

#include "decoder_support.h"

namespace eigenformer_test::forms {

inline constexpr Index kVocabulary = 29, kFeatures = 16, kLayers = 3, kHeads = 4, kKvHeads = 2,
                       kHeadDim = 6, kHidden = 20, kLength = 11;
inline constexpr ef::DecoderConfig kShape{.vocabulary = kVocabulary,
                                          .features = kFeatures,
                                          .layers = kLayers,
                                          .heads = kHeads,
                                          .kv_heads = kKvHeads,
                                          .head_dim = kHeadDim,
                                          .hidden = kHidden};

/// Random tensors for everything that a form may have.
class RandomDecoder {
 public:
  RandomDecoder(const ef::DecoderForm& form, bool biases, unsigned seed) : seed_(seed) {
    const Index q = kHeads * kHeadDim, kv = kKvHeads * kHeadDim;
    for (Index l = 0; l < kLayers; ++l) {
      ef::DecoderLayerViews<float> v;
      matrix(v.query, q, kFeatures);
      matrix(v.key, kv, kFeatures);
      matrix(v.value, kv, kFeatures);
      matrix(v.output, kFeatures, q);
      feed_forward(v, form, form.hidden(kShape, l), biases);
      vector(v.attention_norm, kFeatures, 1);
      vector(v.feed_forward_norm, kFeatures, 1);
      vector(v.after_attention_norm, kFeatures, 1);
      vector(v.after_feed_forward_norm, kFeatures, 1);
      if (form.norm == ef::DecoderNorm::layer) {
        vector(v.attention_norm_bias, kFeatures, 0);
        vector(v.feed_forward_norm_bias, kFeatures, 0);
      }
      vector(v.query_norm, form.query_key_norm_weights(kShape, kHeads), 1);
      vector(v.key_norm, form.query_key_norm_weights(kShape, kKvHeads), 1);
      if (form.query_key_norm == ef::QueryKeyNorm::layer_head && biases) {
        vector(v.query_norm_bias, kHeads * kHeadDim, 0);
        vector(v.key_norm_bias, kKvHeads * kHeadDim, 0);
      }
      if (biases) {
        vector(v.query_bias, q, 0);
        vector(v.key_bias, kv, 0);
        vector(v.value_bias, kv, 0);
        vector(v.output_bias, kFeatures, 0);
      }
      experts(v, form, l, biases);
      vector(v.sinks, kHeads, 0);
      tensors.layers.push_back(v);
    }
    matrix(tensors.embedding, kVocabulary, kFeatures);
    matrix(tensors.head, kVocabulary, kFeatures);
    vector(tensors.norm, kFeatures, 1);
    if (form.norm == ef::DecoderNorm::layer) vector(tensors.norm_bias, kFeatures, 0);
    if (biases) vector(tensors.head_bias, kVocabulary, 0);
    if (form.positions > 0) matrix(tensors.positions, form.positions, kFeatures);
  }

  /// The same packed on a device.
  template <typename T, typename D, typename C = ef::SelfCommunicator>
  std::shared_ptr<ef::PackedDecoderWeights<T>> packed(const D& device, const ef::DecoderForm& form,
                                                      ef::WeightFormat format,
                                                      const C& communicator = {}) const {
    auto p = std::make_shared<ef::PackedDecoderWeights<T>>(kShape, format, form);
    for (Index l = 0; l < kLayers; ++l) {
      p->pack_layer(device, l, tensors.layers[static_cast<std::size_t>(l)], communicator);
      for (const auto& expert : tensors.experts[static_cast<std::size_t>(l)])
        p->pack_layer(device, l, expert, communicator);
    }
    p->pack_head(device, *tensors.norm, *tensors.head, communicator);
    if (tensors.norm_bias) p->set_norm_bias(device, *tensors.norm_bias);
    if (tensors.head_bias) p->set_head_bias(device, *tensors.head_bias);
    if (tensors.positions) p->set_positions(device, *tensors.positions);
    p->set_embedding(*tensors.embedding, nullptr);
    if (ef::memory_of(device).backend != ef::host_memory.backend)
      p->own_embedding(device, ef::WeightFormat::activation);
    return p;
  }

  ef::reference::DecoderTensors tensors;

 private:
  void feed_forward(ef::DecoderLayerViews<float>& v, const ef::DecoderForm& form, Index hidden,
                    bool biases) {
    if (hidden == 0) return;
    if (form.gated) matrix(v.gate, hidden, kFeatures);
    matrix(v.up, hidden, kFeatures);
    matrix(v.down, kFeatures, hidden);
    if (!biases) return;
    vector(v.down_bias, kFeatures, 0);
    if (form.feed_forward_bias && form.gated) vector(v.gate_bias, hidden, 0);
    if (form.feed_forward_bias) vector(v.up_bias, hidden, 0);
  }
  void experts(ef::DecoderLayerViews<float>& v, const ef::DecoderForm& form, Index l, bool biases) {
    tensors.experts.emplace_back();
    if (!form.has_experts(l)) return;
    const ef::DecoderExperts& e = form.experts;
    matrix(v.router, e.count, kFeatures);
    if (biases) vector(v.router_bias, e.count, 0);
    if (e.routing.scores == ef::ExpertScores::sigmoid) vector(v.router_correction, e.count, 0);
    if (e.shared_gate) matrix(v.shared_gate, 1, kFeatures);
    for (Index i = 0; i < e.count; ++i) {
      ef::DecoderLayerViews<float>& one = tensors.experts.back().emplace_back();
      one.expert = i;
      feed_forward(one, form, e.hidden, biases);
    }
  }

  float* fill(Index size, float mean, double spread) {
    values_.push_back(random_tensor<float, 1>({size}, seed_++, spread));
    for (Index i = 0; i < size; ++i) values_.back()(i) += mean;
    return values_.back().data();
  }
  void matrix(std::optional<ef::TensorView<const float, 2>>& to, Index rows, Index columns) {
    to.emplace(fill(rows * columns, 0, 0.3), rows, columns);
  }
  void vector(std::optional<ef::TensorView<const float, 1>>& to, Index size, float mean) {
    to.emplace(fill(size, mean, 0.3), size);
  }

  unsigned seed_;
  std::list<ef::Tensor<float, 1>> values_;
};

inline std::vector<std::int32_t> some_ids() {
  std::vector<std::int32_t> ids(kLength);
  for (Index i = 0; i < kLength; ++i)
    ids[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i * 7 % kVocabulary);
  return ids;
}

/// Logits of all positions, the tokens in chunks of these lengths in pages of 4, each chunk beside
/// a token of another sequence.
template <typename T, typename D>
ef::Tensor<float, 2> logits_in_chunks(ef::Decoder<T, D>& model, const D& device,
                                      const std::vector<Index>& chunks) {
  ef::PagedKvCache<T> cache({.layers = kLayers,
                             .kv_heads = kKvHeads,
                             .head_dim = kHeadDim,
                             .page_size = 4,
                             .page_count = 32},
                            ef::memory_of(device));
  const std::vector<ef::SequenceId> sequences{cache.add_sequence(), cache.add_sequence()};
  const auto ids = some_ids();
  ef::Tensor<float, 2> all(kLength, kVocabulary);
  Index begin = 0;
  for (const Index n : chunks) {
    std::vector<std::int32_t> tokens(ids.data() + begin, ids.data() + begin + n);
    tokens.push_back(3);
    std::vector<Index> wanted;
    for (Index i = 0; i < n; ++i) wanted.push_back(i);
    const std::vector<Index> offsets{0, n, n + 1};
    const auto logits = model.step({tokens, offsets, wanted}, cache, sequences);
    std::copy_n(logits.data(), logits.size(), all.data() + begin * kVocabulary);
    begin += n;
  }
  return all;
}

}  // namespace eigenformer_test::forms
