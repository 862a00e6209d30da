// Laws: a step that throws, whatever throws and wherever, leaves the cache as it was; a cache that
// does not fit the model is refused; a step of a known shape allocates no tensor either, which
// counting operator new cannot see: Eigen takes its memory from malloc.
#include <new>
#define EIGEN_RUNTIME_NO_MALLOC
#define eigen_assert(condition)               \
  do {                                        \
    if (!(condition)) throw std::bad_alloc(); \
  } while (false)
#include <eigenformer/decoder.h>

#include <array>
#include <thread>

#include "compare.h"
#include "failing_allocations.h"

using namespace eigenformer_test;

namespace {

// Attention needs more scratch than the product before it.
constexpr ef::DecoderConfig kConfig{.vocabulary = 11,
                                    .features = 4,
                                    .layers = 2,
                                    .heads = 2,
                                    .kv_heads = 1,
                                    .head_dim = 64,
                                    .hidden = 8};
const Eigen::DefaultDevice kOneThread;
constexpr ef::PagedKvConfig kPages{
    .layers = 2, .kv_heads = 1, .head_dim = 64, .page_size = 4, .page_count = 20};

/// While it lives, Eigen's tensors get no memory.
struct NoTensorMemory {
  NoTensorMemory() { Eigen::internal::set_is_malloc_allowed(false); }
  ~NoTensorMemory() { Eigen::internal::set_is_malloc_allowed(true); }
};

struct Prompt {
  explicit Prompt(Index count) : offsets{0, count}, last{count - 1} {
    for (Index i = 0; i < count; ++i) tokens.push_back(static_cast<std::int32_t>(i * 3 % 11));
  }
  ef::StepRows rows() const { return {tokens, offsets, last}; }
  ef::Tensor<std::int32_t, 2> ids(Index batch) const {
    ef::Tensor<std::int32_t, 2> ids(batch, offsets[1]);
    for (Index i = 0; i < ids.size(); ++i)
      ids.data()[i] = tokens[static_cast<std::size_t>(i % offsets[1])];
    return ids;
  }
  std::vector<std::int32_t> tokens;
  std::vector<Index> offsets, last;
};

/// In a thread of its own, whose workspace is empty.
template <typename F>
void with_fresh_workspace(F&& f) {
  std::thread(f).join();
}

TEST(DecoderStepFailures, MemoryThatRunsOutAnywhereChangesNoCache) {
  ef::Decoder<float> model(std::make_shared<ef::DecoderWeights>(kConfig, 5), kOneThread);
  model.pack();
  const Prompt first(3), next(5);
  ef::PagedKvCache<float> cache(kPages);
  const ef::SequenceId id = cache.add_sequence();
  const std::span<const ef::SequenceId> ids(&id, 1);
  model.step(first.rows(), cache, ids);
  cache.reserve(id, 30);
  const Index pages = cache.pages_free();
  ef::Tensor<float, 2> logits;
  with_fresh_workspace([&] {
    const int failures =
        with_failing_allocations([&] { model.step_into(logits, next.rows(), cache, ids); },
                                 [&] {
                                   for (const Index layer : {0, 1})
                                     EXPECT_EQ(cache.length(id, layer), 3) << layer;
                                   EXPECT_EQ(cache.pages_free(), pages);
                                   EXPECT_EQ(cache.capacity(id), 32);  // pages of 4 positions
                                 });
    EXPECT_GT(failures, 3);
  });
  ef::PagedKvCache<float> other(kPages);
  const ef::SequenceId same = other.add_sequence();
  const std::span<const ef::SequenceId> same_ids(&same, 1);
  model.step(first.rows(), other, same_ids);
  EXPECT_TRUE(same_bits(logits, model.step(next.rows(), other, same_ids)));
}

TEST(DecoderStepFailures, ADenseCacheTakesAnotherBatchAfterAFailedFirstStep) {
  ef::Decoder<float> model(std::make_shared<ef::DecoderWeights>(kConfig, 5), kOneThread);
  model.pack();
  ef::KvCache<float> cache;
  with_fresh_workspace([&] {
    with_failing_allocations([&] { model.prefill(Prompt(5).ids(3), cache); },
                             [&] {
                               EXPECT_EQ(cache.length(0), 0);
                               EXPECT_EQ(cache.source(0).batch, 0);
                             });
  });
  EXPECT_EQ(cache.length(1), 5);
}

// Its first update would have taken the place of positions that the others still need.
TEST(DecoderStepFailures, AWindowThatAStepWouldOutgrowIsRefusedUnchanged) {
  ef::Decoder<float> model(std::make_shared<ef::DecoderWeights>(kConfig, 5), kOneThread);
  model.pack();
  ef::KvCache<float> cache({.window = 4, .chunk = 1});  // two pages of 64
  model.prefill(Prompt(120).ids(1), cache);
  const auto before = cache.keys(0);
  expect_throws<std::invalid_argument>([&] { model.prefill(Prompt(20).ids(1), cache); },
                                       {"layer 0", "positions 0 to 63", "position 120"});
  EXPECT_TRUE(same_bits(cache.keys(0), before));
  model.prefill(Prompt(8).ids(1), cache);
  EXPECT_EQ(cache.length(1), 128);
}

// The logits are the only tensor of a step.
TEST(DecoderStepFailures, LogitsThatGetNoMemoryAreNotFreedTwice) {
  ef::Decoder<float> model(std::make_shared<ef::DecoderWeights>(kConfig, 5), kOneThread);
  ef::PagedKvCache<float> cache(kPages);
  const ef::SequenceId id = cache.add_sequence();
  const std::span<const ef::SequenceId> ids(&id, 1);
  const Prompt prompt(3);
  ef::StepRows more = prompt.rows();
  const std::array<Index, 2> two{0, 2};
  more.logits_of = two;
  ef::Tensor<float, 2> logits;
  model.step_into(logits, prompt.rows(), cache, ids);
  {
    const NoTensorMemory none;
    EXPECT_THROW(model.step_into(logits, more, cache, ids), std::bad_alloc);
  }
  EXPECT_EQ(cache.length(id), 3);
  model.step_into(logits, more, cache, ids);
  EXPECT_EQ(cache.length(id), 6);
  const NoTensorMemory none;
  EXPECT_NO_THROW(model.step_into(logits, more, cache, ids));
}

template <typename T>
void expect_no_tensors() {
  ef::Decoder<T> model(std::make_shared<ef::DecoderWeights>(kConfig, 5), kOneThread);
  ef::PagedKvCache<T> cache(kPages);
  const ef::SequenceId id = cache.add_sequence();
  const Prompt prompt(3);
  ef::Tensor<float, 2> logits;
  for (int i = 0; i < 2; ++i) model.step_into(logits, prompt.rows(), cache, std::span(&id, 1));
  const NoTensorMemory none;
  EXPECT_NO_THROW(model.step_into(logits, prompt.rows(), cache, std::span(&id, 1)));
}

TEST(DecoderStepFailures, AStepOfAKnownShapeMakesNoTensor) {
  expect_no_tensors<ef::half>();
  expect_no_tensors<float>();
}

TEST(DecoderStepFailures, RefusesCachesThatDoNotFit) {
  ef::Decoder<float> model(std::make_shared<ef::DecoderWeights>(kConfig, 5), kOneThread);
  const Prompt prompt(2);
  const auto refuses = [&](const ef::PagedKvConfig& config, const char* expected) {
    ef::PagedKvCache<float> cache(config);
    const ef::SequenceId id = cache.add_sequence();
    expect_throws<std::invalid_argument>(
        [&] { model.step(prompt.rows(), cache, std::span(&id, 1)); },
        {"Decoder::step", "the cache has", expected});
  };
  for (const Index layers : {1, 3}) {  // of too many, some would stay empty: every length 0
    auto config = kPages;
    config.layers = layers;
    refuses(config, "layers, the model has 2");
  }
  auto config = kPages;
  config.head_dim = 32;
  refuses(config, "1 heads of 32, the model has 1 of 64");

  ef::PagedKvCache<float> uneven(kPages);
  const ef::SequenceId id = uneven.add_sequence();
  uneven.append(id, 0, random_tensor<float, 3>({1, 1, 64}, 1),
                random_tensor<float, 3>({1, 1, 64}, 2));
  expect_throws<std::invalid_argument>(
      [&] { model.step(prompt.rows(), uneven, std::span(&id, 1)); },
      {"1 positions in layer 0", "and 0 in another"});
  ef::KvCache<float> dense;
  const auto row = random_tensor<float, 4>({1, 1, 1, 64}, 1);
  update_kv_cache(dense, row, row, 1);
  EXPECT_THROW(model.prefill(prompt.ids(1), dense), std::invalid_argument);
}

TEST(DecoderStepFailures, RefusesPlansAndIdsThatSayTheImpossible) {
  ef::Decoder<float> model(std::make_shared<ef::DecoderWeights>(kConfig, 5), kOneThread);
  ef::PagedKvCache<float> cache(kPages);
  const std::vector<ef::SequenceId> ids{cache.add_sequence(), cache.add_sequence()};
  ef::StepPlan plan;
  plan.requests = {1, 2};
  plan.offsets = {0, 3, 3};
  plan.positions = {0, 0};
  plan.tokens = {1, 2, 3};
  plan.wants_token = {1, 1};  // the second would get the first one's logits
  expect_throws<std::invalid_argument>([&] { model.step(plan, cache, ids); },
                                       {"row 1 wants a token"});
  ef::KvCache<float> dense;
  const std::int32_t one = 1;
  for (const Index columns : {Index{4}, Index{1} << 62, Index{-1}})
    EXPECT_THROW(
        model.prefill(ef::TensorView<const std::int32_t, 2>(&one, Index{1} << 62, columns), dense),
        std::invalid_argument);
}

TEST(DecoderStepFailures, InferenceAmidATrainingStepDoesNotHideWhatFollows) {
  auto weights = std::make_shared<ef::DecoderWeights>(kConfig, 5);
  ef::Decoder<float> model(weights, kOneThread);
  ef::Sgd optimizer(model.parameters(), {.learning_rate = 0.5f});
  const auto ids = Prompt(4).ids(1);
  const auto logits = [&](ef::Decoder<float>& decoder) {
    ef::KvCache<float> cache;
    return decoder.prefill(ids, cache);
  };
  ef::Tensor<float, 2> gradient = model.forward<float>(ids);
  logits(model);
  gradient.setConstant(1);
  model.backward<float>(gradient);
  optimizer.step();
  ef::Decoder<float> fresh(weights, kOneThread);
  EXPECT_TRUE(same_bits(logits(model), logits(fresh)));
}

TEST(DecoderStepFailures, PackedWeightsThatWereMovedFromAreNotComplete) {
  const auto masters = std::make_shared<const ef::DecoderWeights>(kConfig, 5);
  const auto& m = *masters;
  const ef::SelfCommunicator self;
  ef::PackedDecoderWeights<float> packed(kConfig);
  packed.set_embedding(m.matrix(m.embedding()), masters);
  for (Index l = 0; l < kConfig.layers; ++l) {
    const auto& w = m.layer(l);
    packed.pack_layer(kOneThread, l,
                      ef::DecoderLayerViews<float>{
                          m.vector(w.attention_norm), m.matrix(w.query), m.matrix(w.key),
                          m.matrix(w.value), m.matrix(w.output), m.vector(w.feed_forward_norm),
                          m.matrix(w.gate), m.matrix(w.up), m.matrix(w.down)},
                      self);
  }
  packed.pack_head(kOneThread, m.vector(m.norm()), m.matrix(m.head()), self);
  const ef::PackedDecoderWeights<float> moved(std::move(packed));
  EXPECT_NO_THROW(moved.require_complete());
  EXPECT_THROW(packed.require_complete(), std::logic_error);
}

}  // namespace
