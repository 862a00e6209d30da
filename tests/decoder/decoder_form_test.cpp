// Forms of other families: logits equal the plain decoder in double for random weights, part by
// part and together; the same bits whole, in chunks, token by token and beside others; refuses what
// cannot be.
#include <eigenformer/reference/decoder.h>

#include <list>

#include "decoder_support.h"

using namespace eigenformer_test;

namespace {

constexpr Index kVocabulary = 29, kFeatures = 16, kLayers = 3, kHeads = 4, kKvHeads = 2,
                kHeadDim = 6, kHidden = 20, kLength = 11;
constexpr ef::DecoderConfig kShape{.vocabulary = kVocabulary,
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
    const bool row = form.query_key_norm == ef::QueryKeyNorm::row;
    for (Index l = 0; l < kLayers; ++l) {
      ef::DecoderLayerViews<float> v;
      matrix(v.query, q, kFeatures);
      matrix(v.key, kv, kFeatures);
      matrix(v.value, kv, kFeatures);
      matrix(v.output, kFeatures, q);
      if (form.gated) matrix(v.gate, kHidden, kFeatures);
      matrix(v.up, kHidden, kFeatures);
      matrix(v.down, kFeatures, kHidden);
      vector(v.attention_norm, kFeatures, 1);
      vector(v.feed_forward_norm, kFeatures, 1);
      vector(v.after_attention_norm, kFeatures, 1);
      vector(v.after_feed_forward_norm, kFeatures, 1);
      if (form.norm == ef::DecoderNorm::layer) {
        vector(v.attention_norm_bias, kFeatures, 0);
        vector(v.feed_forward_norm_bias, kFeatures, 0);
      }
      vector(v.query_norm, row ? q : kHeadDim, 1);
      vector(v.key_norm, row ? kv : kHeadDim, 1);
      if (biases) {
        vector(v.query_bias, q, 0);
        vector(v.key_bias, kv, 0);
        vector(v.value_bias, kv, 0);
        vector(v.output_bias, kFeatures, 0);
        vector(v.down_bias, kFeatures, 0);
        if (form.feed_forward_bias && form.gated) vector(v.gate_bias, kHidden, 0);
        if (form.feed_forward_bias) vector(v.up_bias, kHidden, 0);
      }
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

  template <typename T>
  std::shared_ptr<ef::PackedDecoderWeights<T>> packed(const ef::DecoderForm& form,
                                                      ef::WeightFormat format) const {
    auto p = std::make_shared<ef::PackedDecoderWeights<T>>(kShape, format, form);
    const ef::SelfCommunicator alone;
    for (Index l = 0; l < kLayers; ++l)
      p->pack_layer(kOneThread, l, tensors.layers[static_cast<std::size_t>(l)], alone);
    p->pack_head(kOneThread, *tensors.norm, *tensors.head, alone);
    if (tensors.norm_bias) p->set_norm_bias(kOneThread, *tensors.norm_bias);
    if (tensors.head_bias) p->set_head_bias(kOneThread, *tensors.head_bias);
    if (tensors.positions) p->set_positions(kOneThread, *tensors.positions);
    p->set_embedding(*tensors.embedding, nullptr);
    return p;
  }

  ef::reference::DecoderTensors tensors;

 private:
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

ef::Tensor<std::int32_t, 2> some_ids() {
  ef::Tensor<std::int32_t, 2> ids(1, kLength);
  for (Index i = 0; i < kLength; ++i) ids(0, i) = static_cast<std::int32_t>(i * 7 % kVocabulary);
  return ids;
}

/// Logits of all positions, the tokens in chunks of these lengths, beside another sequence.
template <typename T>
ef::Tensor<float, 2> logits_in_chunks(ef::Decoder<T>& model, const std::vector<Index>& chunks) {
  ef::PagedKvCache<T> cache({.layers = kLayers,
                             .kv_heads = kKvHeads,
                             .head_dim = kHeadDim,
                             .page_size = 4,
                             .page_count = 32});
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

void expect_equals_reference(const ef::DecoderForm& form, bool biases, unsigned seed) {
  const RandomDecoder random(form, biases, seed);
  const auto ids = some_ids();
  const auto expected =
      ef::reference::decoder(kShape, form, random.tensors, {ids.data(), ids.data() + kLength});
  ef::Decoder<float> model(random.packed<float>(form, ef::WeightFormat::activation), kOneThread);
  const auto whole = logits_in_chunks(model, {kLength});
  EXPECT_LT(relative_error(whole, expected), 1e-5);
  EXPECT_TRUE(same_bits(logits_in_chunks(model, {3, 1, 5, 2}), whole));
  EXPECT_TRUE(same_bits(logits_in_chunks(model, std::vector<Index>(kLength, 1)), whole));
  ef::KvCache<float> cache;
  const auto last = model.prefill(ids, cache);
  EXPECT_TRUE(same_bits(last, ef::TensorView<const float, 2>(
                                  whole.data() + (kLength - 1) * kVocabulary, 1, kVocabulary)));
  ef::Decoder<float> rounded(random.packed<float>(form, ef::WeightFormat::int8), kOneThread);
  EXPECT_LT(relative_error(logits_in_chunks(rounded, {kLength}), expected), 0.1);
}

TEST(DecoderForms, BiasesOfAllLayers) {
  ef::DecoderForm form;
  expect_equals_reference(form, true, 10);
  form.feed_forward_bias = true;
  expect_equals_reference(form, true, 15);
}

TEST(DecoderForms, Gemma) {
  ef::DecoderForm form;
  form.placement = ef::NormPlacement::both;
  form.activation = ef::DecoderActivation::gelu_tanh;
  form.query_key_norm = ef::QueryKeyNorm::head;
  form.attention_scale = 0.3f;
  form.attention_softcap = 2;
  form.logit_softcap = 3;
  form.embedding_scale = 4;
  form.ropes.resize(2);
  form.ropes[1].base = 1e6f;
  form.layers = {{.window = 4}, {.rope = 1}, {.window = 3, .rope = -1}};
  expect_equals_reference(form, false, 20);
}

TEST(DecoderForms, NormsAfterAndOfWholeRows) {
  ef::DecoderForm form;
  form.placement = ef::NormPlacement::after;
  form.query_key_norm = ef::QueryKeyNorm::row;
  form.residual_scale = 0.5f;
  form.logit_scale = 0.25f;
  expect_equals_reference(form, false, 30);
}

TEST(DecoderForms, BlocksSideBySide) {
  ef::DecoderForm form;
  form.norm = ef::DecoderNorm::layer;
  form.gated = false;
  form.activation = ef::DecoderActivation::gelu;
  form.feed_forward_bias = true;
  form.ropes.resize(1);
  form.ropes[0].rotary_dim = 4;
  form.blocks = ef::DecoderBlocks::parallel;
  expect_equals_reference(form, true, 40);
  form.blocks = ef::DecoderBlocks::parallel_shared_norm;
  expect_equals_reference(form, true, 50);
}

TEST(DecoderForms, LearnedPositionsAndPlainFeedForward) {
  ef::DecoderForm form;
  form.norm = ef::DecoderNorm::layer;
  form.gated = false;
  form.feed_forward_bias = true;
  form.positions = kLength + 1;
  form.layers.assign(kLayers, {.rope = -1});
  for (auto activation : {ef::DecoderActivation::gelu_tanh, ef::DecoderActivation::relu,
                          ef::DecoderActivation::silu}) {
    form.activation = activation;
    expect_equals_reference(form, true, 60);
  }
}

TEST(DecoderForms, Sinks) {
  ef::DecoderForm form;
  form.sinks = true;
  form.layers = {{.window = 3}, {}, {.window = 3}};
  expect_equals_reference(form, false, 70);
}

TEST(DecoderForms, RefuseWhatCannotBe) {
  const auto refused = [](auto&& change, const std::vector<std::string>& words) {
    ef::DecoderForm form;
    change(form);
    expect_throws<std::invalid_argument>(
        [&] {
          ef::PackedDecoderWeights<float> weights(kShape, ef::WeightFormat::activation, form);
        },
        words);
  };
  using Form = ef::DecoderForm;
  refused([](Form& f) { f.attention_softcap = -1; }, {"attention_softcap is -1"});
  refused([](Form& f) { f.logit_scale = NAN; }, {"logit_scale is nan"});
  refused([](Form& f) { f.layers.resize(2); }, {"2 layers", "says 3"});
  refused([](Form& f) { f.layers.assign(3, {.rope = 1}); }, {"rope of layer 0 is 1"});
  refused([](Form& f) { f.layers.assign(3, {.window = -2}); }, {"window of layer 0 is -2"});
  refused(
      [](Form& f) {
        f.blocks = ef::DecoderBlocks::parallel;
        f.placement = ef::NormPlacement::after;
      },
      {"NormPlacement::before"});
  refused([](Form& f) { f.ropes = {{.rotary_dim = 8}}; }, {"rotary_dim is 8"});
  refused([](Form& f) { f.activation = ef::DecoderActivation::relu; }, {"gated ReLU"});

  const ef::SelfCommunicator alone;
  const RandomDecoder random({}, false, 80);
  ef::PackedDecoderWeights<float> weights(kShape);
  auto part = random.tensors.layers[0];
  part.key.reset();
  expect_throws<std::invalid_argument>([&] { weights.pack_layer(kOneThread, 0, part, alone); },
                                       {"query, key and value"});
  part = random.tensors.layers[0];
  part.gate.reset();
  expect_throws<std::invalid_argument>([&] { weights.pack_layer(kOneThread, 0, part, alone); },
                                       {"gate and up"});
  part = random.tensors.layers[0];
  part.down.reset();
  for (Index l = 0; l < kLayers; ++l) weights.pack_layer(kOneThread, l, part, alone);
  weights.pack_head(kOneThread, *random.tensors.norm, *random.tensors.head, alone);
  weights.set_embedding(*random.tensors.embedding, nullptr);
  expect_throws<std::logic_error>([&] { weights.require_complete(); }, {"was not packed"});
  ef::DecoderLayerViews<float> rest;
  rest.down.emplace(*random.tensors.layers[0].down);
  for (Index l = 0; l < kLayers; ++l) weights.pack_layer(kOneThread, l, rest, alone);
  weights.require_complete();
}

TEST(DecoderForms, PositionsEndWithTheirTable) {
  ef::DecoderForm form;
  form.positions = 4;
  const RandomDecoder random(form, false, 90);
  ef::Decoder<float> model(random.packed<float>(form, ef::WeightFormat::activation), kOneThread);
  ef::KvCache<float> cache;
  const auto ids = some_ids();
  expect_throws<std::invalid_argument>([&] { model.prefill(ids, cache); },
                                       {"position 4", "the model has 4"});
  EXPECT_EQ(cache.length(0), 0);
}

}  // namespace
