/// \file
/// Small decoders that the tests and the fuzzer of files of packed weights share.
#pragma once

#include <cstring>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include <eigenformer/decoder/packed_weights.h>

namespace eigenformer_test {

namespace ef = eigenformer;

inline constexpr ef::DecoderConfig kPackedConfig{.vocabulary = 37,
                                                 .features = 40,
                                                 .layers = 2,
                                                 .heads = 4,
                                                 .kv_heads = 2,
                                                 .head_dim = 10,
                                                 .hidden = 48};

/// Forms that have, together, every array that a layer may have.
inline std::vector<ef::DecoderForm> packed_forms() {
  ef::DecoderForm gpt2, gemma;
  gpt2.norm = ef::DecoderNorm::layer;
  gpt2.activation = ef::DecoderActivation::gelu;
  gpt2.gated = false;
  gpt2.feed_forward_bias = true;
  gpt2.positions = 16;
  gpt2.query_key_norm = ef::QueryKeyNorm::layer_head;
  gemma.placement = ef::NormPlacement::both;
  gemma.query_key_norm = ef::QueryKeyNorm::head;
  gemma.activation = ef::DecoderActivation::gelu_tanh;
  gemma.sinks = true;
  ef::DecoderForm experts, gpt_oss;
  experts.experts = {
      .count = 3, .chosen = 2, .hidden = 24, .shared_hidden = 40, .shared_gate = true};
  experts.layers = {{.dense = true}, {}};
  gpt_oss.experts = {.count = 4, .chosen = 2, .hidden = 32};
  gpt_oss.activation = ef::DecoderActivation::clamped_swiglu;
  gpt_oss.feed_forward_bias = true;
  return {{}, gpt2, gemma, experts, gpt_oss};
}

/// Packs a layer's experts, out of numbers of its feed-forward, and leaves in `views` what belongs
/// to all of them.
template <typename T>
void pack_experts(ef::PackedDecoderWeights<T>& packed, ef::Index l,
                  ef::DecoderLayerViews<float>& views) {
  const ef::DecoderConfig& c = packed.config();
  const ef::DecoderExperts& experts = packed.form().experts;
  const float *const gate = views.gate->data(), *const up = views.up->data(),
                     *const down = views.down->data();
  const auto rows = [](auto& to, const float* from, ef::Index count, ef::Index columns) {
    to.emplace(from, count, columns);
  };
  const bool biases = packed.form().feed_forward_bias;
  for (ef::Index e = 0; e < experts.count; ++e) {
    ef::DecoderLayerViews<float> one;
    one.expert = e;
    rows(one.gate, gate + e, experts.hidden, c.features);
    rows(one.up, up + e, experts.hidden, c.features);
    rows(one.down, down + e, c.features, experts.hidden);
    if (biases) {
      one.gate_bias.emplace(gate + 5 * e, experts.hidden);
      one.up_bias.emplace(up + 5 * e, experts.hidden);
      one.down_bias.emplace(down + 5 * e, c.features);
    }
    packed.pack_layer(Eigen::DefaultDevice{}, l, one, ef::SelfCommunicator{});
  }
  views.gate.reset(), views.up.reset(), views.down.reset();
  if (experts.shared_hidden > 0) {
    rows(views.gate, gate, experts.shared_hidden, c.features);
    rows(views.up, up, experts.shared_hidden, c.features);
    rows(views.down, down, c.features, experts.shared_hidden);
  }
  rows(views.router, up, experts.count, c.features);
  if (experts.shared_gate) rows(views.shared_gate, down, 1, c.features);
  views.router_bias.emplace(gate, experts.count);
  if (experts.shared_gate) views.router_correction.emplace(up, experts.count);
}

/// All that a form asks for, of numbers that differ.
template <typename T>
std::shared_ptr<ef::PackedDecoderWeights<T>> packed_model(const ef::DecoderConfig& c,
                                                          const ef::WeightStorage& storage,
                                                          const ef::DecoderForm& form) {
  const Eigen::DefaultDevice here;
  const ef::SelfCommunicator alone;
  const auto masters = std::make_shared<const ef::DecoderWeights>(c, 3);
  const std::vector<float> row = [] {
    std::vector<float> values(4096);
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = 0.5f + static_cast<float>(i * 37 % 101) / 128;
    return values;
  }();
  const auto some = [&](ef::Index size) {
    return ef::TensorView<const float, 1>(row.data() + size % 7, size);
  };
  auto packed = std::make_shared<ef::PackedDecoderWeights<T>>(c, storage, form);
  const ef::Index q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  for (ef::Index l = 0; l < c.layers; ++l) {
    auto views = masters->views(l);
    if (!form.gated) views.gate.reset();
    if (form.norm == ef::DecoderNorm::layer) {
      views.attention_norm_bias.emplace(some(c.features));
      views.feed_forward_norm_bias.emplace(some(c.features));
      views.query_bias.emplace(some(q));
      views.key_bias.emplace(some(kv));
      views.value_bias.emplace(some(kv));
      views.output_bias.emplace(some(c.features));
      views.up_bias.emplace(some(c.hidden));
      views.down_bias.emplace(some(c.features));
    }
    if (form.norm_after()) {
      views.after_attention_norm.emplace(some(c.features));
      views.after_feed_forward_norm.emplace(some(c.features));
    }
    if (form.query_key_norm != ef::QueryKeyNorm::none) {
      views.query_norm.emplace(some(form.query_key_norm_weights(c, c.heads)));
      views.key_norm.emplace(some(form.query_key_norm_weights(c, c.kv_heads)));
    }
    if (form.query_key_norm == ef::QueryKeyNorm::layer_head) {
      views.query_norm_bias.emplace(some(q));
      views.key_norm_bias.emplace(some(kv));
    }
    if (form.sinks) views.sinks.emplace(some(c.heads));
    if (form.has_experts(l)) pack_experts(*packed, l, views);
    packed->pack_layer(here, l, views, alone);
  }
  packed->pack_head(here, masters->vector(masters->norm()), masters->matrix(masters->head()),
                    alone);
  if (form.norm == ef::DecoderNorm::layer) {
    packed->set_norm_bias(here, some(c.features));
    packed->set_head_bias(here, some(c.vocabulary));
  }
  if (form.positions > 0) {
    std::vector<float> table(static_cast<std::size_t>(form.positions * c.features));
    for (std::size_t i = 0; i < table.size(); ++i) table[i] = row[i % row.size()];
    packed->set_positions(here,
                          ef::TensorView<const float, 2>(table.data(), form.positions, c.features));
  }
  packed->set_embedding(masters->matrix(masters->embedding()), masters);
  if (storage.format == ef::WeightFormat::int8 || storage.format == ef::WeightFormat::int4)
    packed->own_embedding(here);
  return packed;
}

/// Bytes as a map of a file has them: at the beginning of a page, and no byte more.
class Page {
 public:
  explicit Page(std::string_view text) : block_(text.size() + 4096), size_(text.size()) {
    // From the end of the block backwards, so that the address sanitizer sees what lies behind it.
    if (size_ > 0) std::memcpy(begin(), text.data(), size_);
  }
  std::span<const std::byte> bytes() const { return {begin(), size_}; }

 private:
  std::byte* begin() const { return block_.data() + (block_.size() - size_) / 64 * 64; }
  ef::detail::MemoryBlock block_;
  std::size_t size_;
};

}  // namespace eigenformer_test
