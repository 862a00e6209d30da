// Forms of other families: logits equal the plain decoder in double for random weights, part by
// part and together; the same bits whole, in chunks, token by token and beside others; refuses what
// cannot be.
#include "allocations.h"
#include "named_forms.h"
#include "random_decoder.h"

using namespace eigenformer_test;
using namespace eigenformer_test::forms;

namespace {

/// A batch of one sequence.
ef::Tensor<std::int32_t, 2> as_batch(const std::vector<std::int32_t>& ids) {
  ef::Tensor<std::int32_t, 2> batch(1, static_cast<Index>(ids.size()));
  std::copy(ids.begin(), ids.end(), batch.data());
  return batch;
}

void expect_equals_reference(const ef::DecoderForm& form, bool biases, unsigned seed) {
  const RandomDecoder random(form, biases, seed);
  const auto ids = some_ids();
  const auto expected = ef::reference::decoder(kShape, form, random.tensors, ids);
  ef::Decoder<float> model(random.packed<float>(kOneThread, form, ef::WeightFormat::activation),
                           kOneThread);
  const auto whole = logits_in_chunks(model, kOneThread, {kLength});
  EXPECT_LT(relative_error(whole, expected), 1e-5);
  EXPECT_TRUE(same_bits(logits_in_chunks(model, kOneThread, {3, 1, 5, 2}), whole));
  EXPECT_TRUE(
      same_bits(logits_in_chunks(model, kOneThread, std::vector<Index>(kLength, 1)), whole));
  ef::KvCache<float> cache;
  const auto last = model.prefill(as_batch(ids), cache);
  EXPECT_TRUE(same_bits(last, ef::TensorView<const float, 2>(
                                  whole.data() + (kLength - 1) * kVocabulary, 1, kVocabulary)));
  ef::Decoder<float> rounded(random.packed<float>(kOneThread, form, ef::WeightFormat::int8),
                             kOneThread);
  EXPECT_LT(relative_error(logits_in_chunks(rounded, kOneThread, {kLength}), expected), 0.1);
}

TEST(DecoderForms, BiasesOfAllLayers) {
  ef::DecoderForm form;
  expect_equals_reference(form, true, 10);
  form.feed_forward_bias = true;
  expect_equals_reference(form, true, 15);
}

TEST(DecoderForms, Gemma) {
  ef::DecoderForm form = gemma_form();
  form.ropes.resize(2);
  form.ropes[1].base = 1e6f;
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

TEST(DecoderForms, LayerNormsOfEveryHead) {
  ef::DecoderForm form;
  form.query_key_norm = ef::QueryKeyNorm::layer_head;
  expect_equals_reference(form, true, 35);
  form.layers.assign(kLayers, {.rope = -1});
  expect_equals_reference(form, false, 36);  // without biases
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

TEST(DecoderForms, Alibi) {
  ef::DecoderForm form;
  form.alibi_slopes = {.5f, .25f, -.125f, .0625f};
  form.layers.assign(kLayers, {.window = 5, .rope = -1});
  form.layers[1] = {};
  form.attention_softcap = 2;
  expect_equals_reference(form, false, 75);
}

TEST(DecoderForms, Experts) {
  ef::DecoderForm form;
  form.experts = {.count = 6, .chosen = 2, .hidden = 9, .routing = {.normalise = true}};
  expect_equals_reference(form, false, 100);
  // A shared expert with a gate, and a layer without experts.
  form.experts.shared_hidden = 7;
  form.experts.shared_gate = true;
  form.experts.routing.normalise = false;
  form.layers = {{}, {.dense = true}, {}};
  expect_equals_reference(form, false, 110);
  form.experts.shared_gate = false;
  form.experts.routing = {
      .scores = ef::ExpertScores::sigmoid, .scale = 2, .groups = 3, .kept_groups = 2};
  form.activation = ef::DecoderActivation::gelu_tanh;
  expect_equals_reference(form, true, 120);
}

TEST(DecoderForms, ExpertsWithBiasesAndClamps) {
  ef::DecoderForm form;
  form.experts = {.count = 4,
                  .chosen = 3,
                  .hidden = 10,
                  .routing = {.scores = ef::ExpertScores::softmax_of_chosen}};
  form.activation = ef::DecoderActivation::clamped_swiglu;
  form.clamped_swiglu = {.alpha = 1.5f, .limit = 0.8f};
  form.feed_forward_bias = true;
  form.sinks = true;
  expect_equals_reference(form, true, 130);
}

TEST(DecoderForms, StepsOfExpertsAllocateNothing) {
  ef::DecoderForm form;
  form.experts = {.count = 5, .chosen = 2, .hidden = 9, .shared_hidden = 7, .shared_gate = true};
  const RandomDecoder random(form, false, 150);
  for (const auto format :
       {ef::WeightFormat::activation, ef::WeightFormat::int8, ef::WeightFormat::int4}) {
    ef::Decoder<float> model(random.packed<float>(kOneThread, form, format), kOneThread);
    ef::PagedKvCache<float> cache({.layers = kLayers,
                                   .kv_heads = kKvHeads,
                                   .head_dim = kHeadDim,
                                   .page_size = 16,
                                   .page_count = 32});
    const std::array sequences{cache.add_sequence()};
    const std::array<Index, 2> offsets{0, 2};
    const std::array<Index, 1> last{1};
    ef::Tensor<float, 2> logits(1, kVocabulary);
    const auto step = [&](std::array<std::int32_t, 2> tokens) {
      model.step_into(logits, ef::StepRows{tokens, offsets, last}, cache, sequences);
    };
    step({3, 4});
    step({8, 9});
    EXPECT_EQ(count_allocations([&] { step({17, 2}); }), 0);  // other experts than before
  }
}

TEST(DecoderForms, RanksAndThreadsHaveTheBitsOfOne) {
  ef::DecoderForm form;
  form.experts = {.count = 5, .chosen = 2, .hidden = 9, .shared_hidden = 7, .shared_gate = true};
  const RandomDecoder random(form, false, 160);
  const auto ids = as_batch(some_ids());
  for (const auto format :
       {ef::WeightFormat::activation, ef::WeightFormat::int8, ef::WeightFormat::int4}) {
    ef::Decoder<float> model(random.packed<float>(kOneThread, form, format), kOneThread);
    ef::KvCache<float> cache;
    const auto expected = model.prefill(ids, cache);
    Threads threads(3);
    ef::Decoder<float, Eigen::ThreadPoolDevice> threaded(
        random.packed<float>(threads.device, form, format), threads.device);
    ef::KvCache<float> other;
    EXPECT_TRUE(same_bits(threaded.prefill(ids, other), expected));
    ef::ThreadCommunicator::run(2, [&](auto& communicator) {
      ef::Decoder<float, Eigen::DefaultDevice, std::remove_reference_t<decltype(communicator)>>
          rank(random.packed<float>(kOneThread, form, format, communicator), kOneThread,
               communicator);
      ef::KvCache<float> own;
      EXPECT_TRUE(same_bits(rank.prefill(ids, own), expected));
    });
  }
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
  refused([](Form& f) { f.alibi_slopes = {1}; }, {"alibi_slopes has 1 elements", "4 (heads)"});
  refused([](Form& f) { f.alibi_slopes.assign(4, NAN); }, {"slope of ALiBi is nan"});
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
  refused([](Form& f) { f.experts = {.count = 4, .chosen = 5, .hidden = 3}; }, {"k is 5"});
  refused([](Form& f) { f.experts = {.count = 4, .chosen = 2}; }, {"experts.hidden is 0"});
  refused([](Form& f) { f.experts.count = -1; }, {"experts.count is -1"});
  refused([](Form& f) { f.experts = {.count = 4, .chosen = 1, .hidden = 3, .shared_gate = true}; },
          {"shared_gate", "no shared expert"});
  refused(
      [](Form& f) {
        f.gated = false;
        f.experts = {.count = 4, .chosen = 1, .hidden = 3};
      },
      {"not gated"});

  const ef::SelfCommunicator alone;
  const RandomDecoder random({}, false, 80);
  ef::PackedDecoderWeights<float> weights(kShape);
  auto part = random.tensors.layers[0];
  part.key.reset();
  expect_throws<std::invalid_argument>([&] { weights.pack_layer(kOneThread, 0, part, alone); },
                                       {"query, key and value"});
  part = random.tensors.layers[0];
  part.key_norm_bias = part.key_norm;
  expect_throws<std::invalid_argument>([&] { weights.pack_layer(kOneThread, 0, part, alone); },
                                       {"no query_norm_bias"});
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
  rest.expert = 0;
  expect_throws<std::invalid_argument>([&] { weights.pack_layer(kOneThread, 1, rest, alone); },
                                       {"expert is 0, layer 1 has 0"});

  // One expert of one layer is missing.
  ef::DecoderForm form;
  form.experts = {.count = 3, .chosen = 1, .hidden = 5};
  const RandomDecoder mixed(form, false, 140);
  const auto all = mixed.packed<float>(kOneThread, form, ef::WeightFormat::activation);
  all->require_complete();
  ef::PackedDecoderWeights<float> some(kShape, ef::WeightFormat::activation, form);
  for (Index l = 0; l < kLayers; ++l) {
    some.pack_layer(kOneThread, l, mixed.tensors.layers[static_cast<std::size_t>(l)], alone);
    for (const auto& expert : mixed.tensors.experts[static_cast<std::size_t>(l)])
      if (l != 1 || expert.expert != 1) some.pack_layer(kOneThread, l, expert, alone);
  }
  some.pack_head(kOneThread, *mixed.tensors.norm, *mixed.tensors.head, alone);
  some.set_embedding(*mixed.tensors.embedding, nullptr);
  expect_throws<std::logic_error>([&] { some.require_complete(); }, {"was not packed"});
}

TEST(DecoderForms, PositionsEndWithTheirTable) {
  ef::DecoderForm form;
  form.positions = 4;
  const RandomDecoder random(form, false, 90);
  ef::Decoder<float> model(random.packed<float>(kOneThread, form, ef::WeightFormat::activation),
                           kOneThread);
  ef::KvCache<float> cache;
  const auto ids = some_ids();
  expect_throws<std::invalid_argument>([&] { model.prefill(as_batch(ids), cache); },
                                       {"position 4", "the model has 4"});
  EXPECT_EQ(cache.length(0), 0);
}

}  // namespace
