// Laws: a step gives every row the bits it has alone, whatever the rows beside it; a scheduler's
// plan is such a step; a step that throws leaves the cache as it was; a step of a known shape
// allocates nothing; weights packed from views of any scalar are those packed from masters.
#include <eigenformer/decoder.h>
#include <eigenformer/sampling.h>
#include <eigenformer/scheduler.h>

#include <map>

#include "allocation_count.h"
#include "decoder_support.h"
#include "greedy_server.h"

using namespace eigenformer_test;

namespace {

template <typename Storage = float>
ef::PagedKvCache<float, Storage> make_cache(Index page_size = 5, Index page_count = 60) {
  return ef::PagedKvCache<float, Storage>({.layers = kConfig.layers,
                                           .kv_heads = kConfig.kv_heads,
                                           .head_dim = kConfig.head_dim,
                                           .page_size = page_size,
                                           .page_count = page_count});
}

using Ids = std::vector<std::int32_t>;

Ids random_ids(Index count, unsigned seed) {
  std::mt19937 generator(seed);
  Ids ids(static_cast<std::size_t>(count));
  for (auto& id : ids) id = static_cast<std::int32_t>(generator() % kConfig.vocabulary);
  return ids;
}

/// Logits (tokens, vocabulary) after every token of a text, alone, one token at a time.
template <typename Model>
ef::Tensor<float, 2> alone(Model& model, const Ids& text) {
  ef::KvCache<float> cache;
  ef::Tensor<float, 2> all(static_cast<Index>(text.size()), kConfig.vocabulary);
  for (std::size_t t = 0; t < text.size(); ++t) {
    ef::Tensor<std::int32_t, 1> token(1);
    token(0) = text[t];
    const auto logits = model.decode(token, cache);
    std::copy_n(logits.data(), kConfig.vocabulary,
                all.data() + static_cast<Index>(t) * kConfig.vocabulary);
  }
  return all;
}

bool same_row(const ef::Tensor<float, 2>& a, Index r, const ef::Tensor<float, 2>& b, Index s) {
  const std::size_t bytes = static_cast<std::size_t>(kConfig.vocabulary) * sizeof(float);
  return std::memcmp(a.data() + r * kConfig.vocabulary, b.data() + s * kConfig.vocabulary, bytes) ==
         0;
}

// Three texts in steps that mix chunks and single tokens, some rows twice as long as others, one
// without a token, with the logits of every token wanted.
TEST(DecoderStep, RaggedRowsHaveTheBitsTheyHaveAlone) {
  auto weights = make_weights();
  for (const bool int8 : {false, true}) {
    ef::Decoder<float> model(weights, kOneThread);
    if (int8) model.quantize();
    const std::vector<Ids> texts{random_ids(23, 1), random_ids(9, 2), random_ids(40, 3)};
    std::vector<ef::Tensor<float, 2>> expected;
    for (const Ids& text : texts) expected.push_back(alone(model, text));
    auto cache = make_cache();
    std::vector<ef::SequenceId> sequences;
    for (std::size_t i = 0; i < texts.size(); ++i) sequences.push_back(cache.add_sequence());
    std::vector<Index> done(texts.size(), 0);
    const std::vector<std::vector<Index>> steps{
        {1, 9, 0}, {20, 0, 1}, {1, 0, 33}, {1, 0, 1}, {0, 0, 5}};
    for (const auto& counts : steps) {
      Ids tokens;
      std::vector<Index> offsets{0}, logits_of;
      for (std::size_t i = 0; i < texts.size(); ++i) {
        for (Index t = 0; t < counts[i]; ++t) {
          logits_of.push_back(static_cast<Index>(tokens.size()));
          tokens.push_back(texts[i][static_cast<std::size_t>(done[i] + t)]);
        }
        offsets.push_back(static_cast<Index>(tokens.size()));
      }
      const auto logits = model.step(ef::StepRows{tokens, offsets, logits_of}, cache, sequences);
      Index r = 0;
      for (std::size_t i = 0; i < texts.size(); ++i)
        for (Index t = 0; t < counts[i]; ++t)
          EXPECT_TRUE(same_row(logits, r++, expected[i], done[i]++)) << i << ' ' << done[i];
      ASSERT_EQ(r, logits.dimension(0));
    }
  }
}

// Greedy texts through a StepScheduler with few pages, chunks and preemption are those of each
// request alone.
TEST(DecoderStep, SchedulersPlansGiveTheTextsOfEachRequestAlone) {
  ef::Decoder<float> model(make_weights(), kOneThread);
  const ef::StepSchedulerOptions options{.max_batch_size = 3,
                                         .max_seq_length = 40,
                                         .token_budget = 8,
                                         .prefill_chunk = 5,
                                         .page_size = 4,
                                         .page_count = 9};
  ef::StepScheduler scheduler(options);
  auto cache = make_cache(options.page_size, options.page_count);
  std::map<ef::RequestTicket, Ids> prompts;
  for (unsigned r = 0; r < 6; ++r) {
    const Ids prompt = random_ids(3 + 4 * static_cast<Index>(r), 20 + r);
    prompts[scheduler.submit(prompt, {.max_new_tokens = 9})] = prompt;
  }
  ef::Tensor<float, 2> logits;
  serve_greedily(scheduler, cache,
                 [&](const auto& plan, auto& pages, const auto& sequences) -> const auto& {
                   model.step_into(logits, plan, pages, sequences);
                   return logits;
                 });
  EXPECT_GT(scheduler.statistics().preempted, 0);
  for (const auto& [ticket, prompt] : prompts) {
    Ids text = prompt;
    ef::KvCache<float> own;
    ef::Tensor<std::int32_t, 2> ids(1, static_cast<Index>(prompt.size()));
    std::copy(prompt.begin(), prompt.end(), ids.data());
    auto next = ef::greedy_sample(model.prefill(ids, own));
    for (int i = 0; i < 9; ++i) {
      text.push_back(next(0));
      next = ef::greedy_sample(model.decode(next, own));
    }
    EXPECT_EQ(scheduler.take_finished(ticket).tokens, text);
  }
}

// A forked sequence goes on from its prefix; int8 storage gives one text the same bits in chunks.
TEST(DecoderStep, GoesOnFromForksAndFromStoredInt8) {
  ef::Decoder<float> model(make_weights(), kOneThread);
  const Ids text = random_ids(17, 4);
  const auto expected = alone(model, text);
  auto cache = make_cache();
  const auto parent = cache.add_sequence();
  const std::vector<Index> prefix{0, 12}, rest{0, 5}, last_of_prefix{11}, last{4};
  model.step(ef::StepRows{std::span(text).first(12), prefix, last_of_prefix}, cache,
             std::span(&parent, 1));
  const auto child = cache.fork(parent);
  const auto logits =
      model.step(ef::StepRows{std::span(text).last(5), rest, last}, cache, std::span(&child, 1));
  EXPECT_TRUE(same_row(logits, 0, expected, 16));
  EXPECT_EQ(cache.length(parent), 12);

  auto stored = make_cache<std::int8_t>();
  const auto whole = stored.add_sequence(), chunked = stored.add_sequence();
  const std::vector<Index> all{0, 17}, last_of_all{16};
  const auto at_once =
      model.step(ef::StepRows{text, all, last_of_all}, stored, std::span(&whole, 1));
  model.step(ef::StepRows{std::span(text).first(12), prefix, {}}, stored, std::span(&chunked, 1));
  const auto after =
      model.step(ef::StepRows{std::span(text).last(5), rest, last}, stored, std::span(&chunked, 1));
  EXPECT_TRUE(same_row(at_once, 0, after, 0));
}

TEST(DecoderStep, AStepThatThrowsLeavesTheCacheAsItWas) {
  ef::Decoder<float> model(make_weights(), kOneThread);
  auto cache = make_cache(4, 3);  // 12 positions
  const auto a = cache.add_sequence(), b = cache.add_sequence();
  const Ids tokens = random_ids(10, 6);
  const std::vector<Index> offsets{0, 4, 10}, none;
  const std::vector<ef::SequenceId> both{a, b}, twice{a, a}, one{a};
  const auto step = [&](const Ids& ids, std::span<const Index> at, std::span<const Index> logits,
                        std::span<const ef::SequenceId> sequences) {
    model.step(ef::StepRows{ids, at, logits}, cache, sequences);
  };
  step(tokens, offsets, none, both);
  EXPECT_EQ(cache.pages_free(), 0);
  const auto keys = cache.keys(b, 1);
  EXPECT_THROW(step(tokens, offsets, none, both), std::length_error);  // no page is left
  expect_throws<std::invalid_argument>([&] { step(tokens, offsets, none, one); },
                                       {"Decoder::step", "sequences has 1", "offsets has 3"});
  EXPECT_THROW(step(tokens, offsets, none, twice), std::invalid_argument);
  Ids foreign = tokens;
  foreign[7] = 37;
  expect_throws<std::invalid_argument>([&] { step(foreign, offsets, none, both); },
                                       {"Decoder::step", "id 37", "position 7"});
  const std::vector<Index> falling{0, 6, 5}, beyond{10};
  EXPECT_THROW(step(tokens, falling, none, both), std::invalid_argument);
  expect_throws<std::invalid_argument>([&] { step(tokens, offsets, beyond, both); },
                                       {"logits_of holds 10"});
  ef::StepPlan plan;
  plan.requests = {1, 2};
  plan.offsets = {0, 1, 2};
  plan.positions = {4, 5};  // b holds 6
  plan.tokens = {1, 2};
  plan.wants_token = {1, 1};
  expect_throws<std::invalid_argument>([&] { model.step(plan, cache, both); },
                                       {"row 1 begins at position 5", "holds 6"});
  EXPECT_EQ(cache.length(a), 4);
  EXPECT_EQ(cache.length(b), 6);
  EXPECT_TRUE(same_bits(keys, cache.keys(b, 1)));
}

// Nor of a smaller one: a server's steps have another number of tokens each.
TEST(DecoderStep, AllocatesNothingAfterTheLargest) {
  auto weights = make_weights();
  for (const bool int8 : {false, true}) {
    ef::Decoder<float> model(weights, kOneThread);
    if (int8) model.quantize();
    auto cache = make_cache(16, 20);
    const std::vector<ef::SequenceId> sequences{cache.add_sequence(), cache.add_sequence()};
    const Ids tokens = random_ids(9, 7);
    ef::Tensor<float, 2> logits;
    for (const ef::SequenceId sequence : sequences) cache.reserve(sequence, 80);
    const auto step = [&](Index first, Index second) {
      const std::array<Index, 3> offsets{0, first, first + second};
      const std::array<Index, 2> logits_of{first - 1, first + second - 1};
      const auto own = std::span(tokens).first(static_cast<std::size_t>(first + second));
      model.step_into(logits, ef::StepRows{own, offsets, logits_of}, cache, sequences);
    };
    step(4, 5);
    step(1, 3);
    const long allocations = count_allocations([&] {
      for (const Index n : {1, 3, 5, 2, 4}) step(n, 1), step(1, n);
      step(4, 5);
    });
    EXPECT_EQ(allocations, 0);
  }
}

/// Views of masters converted to W, whose memory `kept` owns.
template <typename W>
struct Converted {
  std::map<std::size_t, ef::Tensor<W, 2>> kept;

  ef::TensorView<const W, 2> matrix(const ef::DecoderWeights& masters, std::size_t t) {
    const ef::Tensor<W, 2> copy = masters.matrix(t).cast<W>();
    return ef::input_view<2>(kept.emplace(t, copy).first->second);
  }
  ef::TensorView<const W, 1> vector(const ef::DecoderWeights& masters, std::size_t t) {
    const auto view = matrix(masters, t);
    return {view.data(), view.size()};
  }
};

template <typename W, typename D, typename C>
std::shared_ptr<ef::PackedDecoderWeights<float>> packed_from(const ef::DecoderWeights& masters,
                                                             Converted<W>& owner, const D& device,
                                                             C& communicator, bool int8) {
  auto packed = std::make_shared<ef::PackedDecoderWeights<float>>(
      kConfig, int8 ? ef::WeightFormat::int8 : ef::WeightFormat::activation);
  packed->set_embedding(owner.matrix(masters, masters.embedding()), nullptr);
  for (Index l = kConfig.layers - 1; l >= 0; --l) {  // in any order
    const auto& w = masters.layer(l);
    const ef::DecoderLayerViews<W> views{
        .attention_norm = owner.vector(masters, w.attention_norm),
        .query = owner.matrix(masters, w.query),
        .key = owner.matrix(masters, w.key),
        .value = owner.matrix(masters, w.value),
        .output = owner.matrix(masters, w.output),
        .feed_forward_norm = owner.vector(masters, w.feed_forward_norm),
        .gate = owner.matrix(masters, w.gate),
        .up = owner.matrix(masters, w.up),
        .down = owner.matrix(masters, w.down)};
    packed->pack_layer(device, l, views, communicator);
  }
  packed->pack_head(device, owner.vector(masters, masters.norm()),
                    owner.matrix(masters, masters.head()), communicator);
  return packed;
}

// Masters that bfloat16 holds exactly: then views of either scalar give the bits of the masters, on
// one rank and on three.
TEST(PackedDecoderWeights, FromViewsOfAnyScalarOnAnyRanks) {
  auto weights = make_weights();
  for (ef::Parameter& parameter : weights->parameters())
    for (Index i = 0; i < parameter.value.size(); ++i)
      parameter.value(i) = static_cast<float>(ef::bfloat16(parameter.value(i)));
  const Ids text = random_ids(12, 8);
  for (const bool int8 : {false, true}) {
    ef::Decoder<float> model(weights, kOneThread);
    if (int8) model.quantize();
    const auto expected = alone(model, text);
    const auto check = [&](auto scalar, const auto& device, auto& communicator) {
      Converted<decltype(scalar)> owner;
      const auto packed = packed_from(*weights, owner, device, communicator, int8);
      using D = std::remove_cvref_t<decltype(device)>;
      using C = std::remove_reference_t<decltype(communicator)>;
      ef::Decoder<float, D, C> served(packed, device, communicator);
      EXPECT_TRUE(same_bits(alone(served, text), expected));
      EXPECT_THROW(served.parameters(), std::logic_error);
      EXPECT_THROW(served.pack(), std::logic_error);
    };
    ef::SelfCommunicator self;
    Threads threads(2);
    check(float{}, kOneThread, self);
    check(ef::bfloat16{}, threads.device, self);
    ef::ThreadCommunicator::run(
        3, [&](auto& communicator) { check(ef::bfloat16{}, kOneThread, communicator); });
  }
}

TEST(PackedDecoderWeights, RefusesWhatDoesNotFit) {
  auto weights = make_weights();
  ef::SelfCommunicator self;
  Converted<float> owner;
  ef::PackedDecoderWeights<float> packed(kConfig);
  EXPECT_THROW(packed.require_complete(), std::logic_error);
  ef::Tensor<float, 2> table(37, 23);
  expect_throws<std::invalid_argument>(
      [&] { packed.set_embedding(ef::input_view<2>(table), nullptr); },
      {"embedding has shape (37, 23)", "(37, 24)"});
  const auto& w = weights->layer(0);
  const auto views = [&](std::size_t key) {
    return ef::DecoderLayerViews<float>{
        .attention_norm = owner.vector(*weights, w.attention_norm),
        .query = owner.matrix(*weights, w.query),
        .key = owner.matrix(*weights, key),
        .value = owner.matrix(*weights, w.value),
        .output = owner.matrix(*weights, w.output),
        .feed_forward_norm = owner.vector(*weights, w.feed_forward_norm),
        .gate = owner.matrix(*weights, w.gate),
        .up = owner.matrix(*weights, w.up),
        .down = owner.matrix(*weights, w.down)};
  };
  expect_throws<std::invalid_argument>(
      [&] { packed.pack_layer(kOneThread, 0, views(w.query), self); },
      {"key has shape (24, 24)", "(12, 24)"});
  expect_throws<std::invalid_argument>(
      [&] { packed.pack_layer(kOneThread, 2, views(w.key), self); }, {"layer is 2", "0 to 1"});
  EXPECT_THROW(ef::PackedDecoderWeights<double>(kConfig, ef::WeightFormat::int8),
               std::invalid_argument);
  EXPECT_THROW(
      ef::Decoder<float>(std::make_shared<ef::PackedDecoderWeights<float>>(kConfig), kOneThread),
      std::logic_error);
}

// Rows of one length over a KvCache are the step over pages; rows of several lengths are no batch.
TEST(DecoderStep, RowsOfOneLengthGoIntoAKvCacheToo) {
  ef::Decoder<float> model(make_weights(), kOneThread);
  const Ids tokens = random_ids(8, 4);
  const std::vector<Index> offsets{0, 4, 8}, wanted{7, 0};
  auto pages = make_cache();
  const std::vector<ef::SequenceId> sequences{pages.add_sequence(), pages.add_sequence()};
  ef::KvCache<float> cache;
  for (int step = 0; step < 2; ++step) {
    ef::Tensor<float, 2> logits;
    model.step_into(logits, ef::StepRows{tokens, offsets, wanted}, cache);
    EXPECT_TRUE(
        same_bits(logits, model.step(ef::StepRows{tokens, offsets, wanted}, pages, sequences)));
  }
  const std::vector<Index> uneven{0, 5, 8};
  ef::Tensor<float, 2> logits;
  expect_throws<std::invalid_argument>(
      [&] {
        model.step_into(logits, ef::StepRows{tokens, uneven, wanted}, cache);
      },
      {"Decoder::step", "row 1 has 3 tokens", "row 0 has 5"});
  EXPECT_EQ(cache.length(0), 8);
}

}  // namespace
