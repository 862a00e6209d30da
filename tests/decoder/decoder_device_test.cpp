// The decoder on a GPU: the plain decoder's logits and greedy tokens; a row has the same bits
// prefilled whole, in chunks, token by token, in a batch and through either cache; a scheduler's
// plans are such steps; logits may stay on the device, and such a step can be captured, or go
// through a step graph; memory of another device is refused with nothing changed; a step of a known
// shape allocates nothing; forms of other families are those of the CPU. (CPUs: decoder_test.cpp.)
#include <eigenformer/decoder.h>
#include <eigenformer/reference/decoder.h>
#include <eigenformer/sampling.h>
#include <eigenformer/scheduler.h>
#include <eigenformer/step_graph.h>

#include <cstring>
#include <map>
#include <span>

#include "device.h"
#include "greedy_server.h"
#include "named_forms.h"
#include "random_decoder.h"

using namespace eigenformer_test;

namespace {

using Ids = std::vector<std::int32_t>;

/// One layer, where two would show no more and take the emulator twice the time.
ef::DecoderConfig one_layer() {
  ef::DecoderConfig config = kConfig;
  config.layers = 1;
  return config;
}

template <typename T = float, typename B>
auto model_on(const B& bench, const std::shared_ptr<ef::DecoderWeights>& weights) {
  return std::make_unique<ef::Decoder<T, std::remove_cvref_t<decltype(bench.device)>>>(
      weights, bench.device);
}

Ids random_ids(Index count, unsigned seed) {
  std::mt19937 generator(seed);
  Ids ids(static_cast<std::size_t>(count));
  for (auto& id : ids) id = static_cast<std::int32_t>(generator() % kConfig.vocabulary);
  return ids;
}

ef::Tensor<std::int32_t, 2> as_batch(std::span<const std::int32_t> ids) {
  ef::Tensor<std::int32_t, 2> batch(1, static_cast<Index>(ids.size()));
  std::copy(ids.begin(), ids.end(), batch.data());
  return batch;
}

template <typename B>
ef::PagedKvCache<float> make_pages(const B& bench, Index layers = kConfig.layers,
                                   Index page_size = 5, Index page_count = 40) {
  return ef::PagedKvCache<float>({.layers = layers,
                                  .kv_heads = kConfig.kv_heads,
                                  .head_dim = kConfig.head_dim,
                                  .page_size = page_size,
                                  .page_count = page_count},
                                 ef::memory_of(bench.device));
}

ef::Tensor<float, 2> row(const ef::Tensor<float, 2>& x, Index r) {
  ef::Tensor<float, 2> result(1, x.dimension(1));
  std::copy_n(x.data() + r * x.dimension(1), x.dimension(1), result.data());
  return result;
}
ef::Tensor<double, 2> expected_row(const ef::DecoderWeights& weights, const Ids& text) {
  const auto all = ef::reference::decoder(weights, text);
  const Index classes = all.dimension(1), last = all.dimension(0) - 1;
  return ef::TensorView<const double, 2>(all.data() + last * classes, 1, classes);
}
std::int32_t best_of(const ef::Tensor<double, 2>& logits) {
  return static_cast<std::int32_t>(std::max_element(logits.data(), logits.data() + logits.size()) -
                                   logits.data());
}

// 19 tokens, and chunks of 4 and of 14 of them, cross tiles of 8 and of 16.
template <typename T>
void check_prefill_and_decode(const ef::DecoderConfig& config, double allowed) {
  const auto weights = make_weights(config);
  const Ids text = random_ids(19, 1);
  const auto expected = expected_row(*weights, text);
  for_each_gpu([&](const auto& bench) {
    auto model = model_on<T>(bench, weights);  // masters of the host: packing copies them
    ef::KvCache<T> whole(ef::memory_of(bench.device)), chunks(ef::memory_of(bench.device));
    const auto logits = model->prefill(as_batch(text), whole);
    EXPECT_LT(relative_error(logits, expected), allowed);
    const auto all = std::span(text);
    model->prefill(as_batch(all.first(4)), chunks);
    model->prefill(as_batch(all.subspan(4, 14)), chunks);
    ef::Tensor<std::int32_t, 1> last(1);
    last(0) = text.back();
    EXPECT_TRUE(same_bits(model->decode(last, chunks), logits));
    Ids longer = text;
    auto next = logits;
    for (int step = 0; step < 2; ++step) {
      const auto token = ef::greedy_sample(next);
      if (std::is_same_v<T, float>) {
        EXPECT_EQ(token(0), best_of(expected_row(*weights, longer)));
      }
      longer.push_back(token(0));
      next = model->decode(token, whole);
      EXPECT_LT(relative_error(next, expected_row(*weights, longer)), allowed) << step;
    }
    EXPECT_EQ(whole.length(config.layers - 1), 21);
  });
}

TEST(DecoderOnDevice, PrefillsAndDecodesAsThePlainDecoder) {
  check_prefill_and_decode<float>(kConfig, 2e-5);
#if !defined(__CUDACC__)  // nvcc takes minutes for another scalar
  check_prefill_and_decode<ef::bfloat16>(one_layer(), 5e-2);
#endif
}

// Two texts in ragged steps, with a row that has no token, and each alone.
TEST(DecoderOnDevice, RaggedRowsHaveTheBitsTheyHaveAlone) {
  const auto weights = make_weights();
  const std::vector<Ids> texts{random_ids(10, 2), random_ids(6, 3)};
  for_each_gpu([&](const auto& bench) {
    for (const bool int8 : {false, true}) {
      auto model = model_on(bench, weights);
      if (int8) {
        model->quantize();
        model->release_master_weights();  // the embedding is INT8 then
      }
      auto pages = make_pages(bench);
      const std::vector<ef::SequenceId> both{pages.add_sequence(), pages.add_sequence()};
      const std::vector<std::vector<Index>> steps{{4, 0}, {5, 5}, {1, 1}};
      std::vector<Index> done{0, 0};
      ef::Tensor<float, 2> logits;
      for (const auto& counts : steps) {
        Ids tokens;
        std::vector<Index> offsets{0}, wanted;
        for (std::size_t i = 0; i < 2; ++i) {
          for (Index t = 0; t < counts[i]; ++t)
            tokens.push_back(texts[i][static_cast<std::size_t>(done[i]++)]);
          offsets.push_back(static_cast<Index>(tokens.size()));
          if (counts[i] > 0) wanted.push_back(offsets.back() - 1);
        }
        logits = model->step(ef::StepRows{tokens, offsets, wanted}, pages, both);
      }
      for (std::size_t i = 0; i < 2; ++i) {
        ef::KvCache<float> alone(ef::memory_of(bench.device));
        const auto expected = model->prefill(as_batch(texts[i]), alone);
        EXPECT_TRUE(same_bits(row(logits, static_cast<Index>(i)), expected)) << i << int8;
        EXPECT_LT(relative_error(expected, expected_row(*weights, texts[i])), int8 ? 0.1 : 2e-5);
      }
    }
  });
}

TEST(DecoderOnDevice, SchedulersPlansGiveTheTextsOfEachRequestAlone) {
  const auto weights = make_weights(one_layer());
  for_each_gpu([&](const auto& bench) {
    auto model = model_on(bench, weights);
    const ef::StepSchedulerOptions options{.max_batch_size = 2,
                                           .max_seq_length = 24,
                                           .token_budget = 6,
                                           .prefill_chunk = 5,
                                           .page_size = 4,
                                           .page_count = 3};
    ef::StepScheduler scheduler(options);
    auto pages = make_pages(bench, 1, options.page_size, options.page_count);
    std::map<ef::RequestTicket, Ids> prompts;
    for (unsigned r = 0; r < 3; ++r) {
      const Ids prompt = random_ids(7 - 2 * static_cast<Index>(r), 20 + r);
      prompts[scheduler.submit(prompt, {.max_new_tokens = 2})] = prompt;
    }
    serve_greedily(scheduler, pages, [&](const auto& plan, auto& cache, const auto& sequences) {
      return model->step(plan, cache, sequences);
    });
    for (const auto& [ticket, prompt] : prompts) {
      Ids text = prompt;
      ef::KvCache<float> own(ef::memory_of(bench.device));
      auto next = ef::greedy_sample(model->prefill(as_batch(prompt), own));
      for (int i = 0; i < 2; ++i) {
        text.push_back(next(0));
        if (i == 0) next = ef::greedy_sample(model->decode(next, own));
      }
      EXPECT_EQ(scheduler.take_finished(ticket).tokens, text);
    }
  });
}

/// One token of each of two sequences whose prompts the cache holds.
struct Decoding {
  const Ids tokens{3, 30};
  const std::vector<Index> offsets{0, 1, 2}, wanted{1, 0};
  ef::StepRows rows() const { return {tokens, offsets, wanted}; }

  template <typename Model, typename Pages>
  static std::vector<ef::SequenceId> prompt(Model& model, Pages& pages) {
    const std::vector<ef::SequenceId> both{pages.add_sequence(), pages.add_sequence()};
    const Ids tokens = random_ids(11, 5);
    const std::vector<Index> offsets{0, 4, 11};
    model.step(ef::StepRows{tokens, offsets, {}}, pages, both);
    return both;
  }
};

// In a graph a step is its launches and the copies of what it reads of the host.
TEST(DecoderOnDevice, StepsAllocateNothingLeaveLogitsThereAndAreCaptured) {
  const auto weights = make_weights();
  const Decoding step;
  for_each_gpu([&](const auto& bench) {
    auto model = model_on(bench, weights);
    auto pages = make_pages(bench), other = make_pages(bench);
    const auto both = Decoding::prompt(*model, pages), same = Decoding::prompt(*model, other);
    const auto expected = model->step(step.rows(), pages, both);
#if defined(EIGENFORMER_TEST_BLOCKS)
    const auto before = emulated::DeviceMemory::instance().allocations();
    model->step(step.rows(), pages, both);
    EXPECT_EQ(emulated::DeviceMemory::instance().allocations(), before);
#endif
    auto logits = on_device(bench, poisoned_tensor<float, 2>({2, kConfig.vocabulary}));
    const ef::Tensor<float, 2> wrong(1, kConfig.vocabulary);
    auto one_row = on_device(bench, wrong);
    expect_throws<std::invalid_argument>(
        [&] { model->step_into(one_row.view(), step.rows(), other, same); },
        {"Decoder::step", "logits has shape (1, 37)", "(2, 37)"});
    if constexpr (requires { bench.device.stream().begin_capture(); }) {
      auto& stream = bench.device.stream();
      stream.begin_capture();
      model->step_into(logits.view(), step.rows(), other, same);
      const auto graph = stream.end_capture();
      EXPECT_GT(graph.size(), 10u);
      stream.replay(graph);
      EXPECT_TRUE(same_bits(logits.host(), expected));
      stream.replay(graph);  // appends the same keys at the same positions
      EXPECT_TRUE(same_bits(logits.host(), expected));
    } else {
      model->step_into(logits.view(), step.rows(), other, same);
      EXPECT_TRUE(same_bits(logits.host(), expected));
    }
  });
}

/// The sequences that step s has, and how many tokens each brings: two decode, a third comes with
/// its prompt, the first leaves.
std::vector<std::pair<std::size_t, Index>> rows_of_step(int s) {
  if (s < 3) return {{0, 1}, {1, 1}};
  if (s == 3) return {{2, 3}, {1, 1}, {0, 1}};
  if (s < 6) return {{0, 1}, {1, 1}, {2, 1}};
  return {{2, 1}, {1, 1}};
}

// Pages of 2 positions: there is a new one every other step. Plain steps run once, in order: their
// bits do not depend on the schedule.
TEST(DecoderOnDevice, StepsThroughAGraphHaveTheBitsOfPlainSteps) {
  const auto weights = make_weights(one_layer());
  std::vector<ef::Tensor<float, 2>> expected;
  for_each_gpu([&](const auto& bench) {
    auto model = model_on(bench, weights);
    model->pack();
    auto pages = make_pages(bench, 1, 2), other = make_pages(bench, 1, 2);
    std::vector<ef::SequenceId> plain, same;
    for (int i = 0; i < 3; ++i) {
      plain.push_back(pages.add_sequence());
      same.push_back(other.add_sequence());
    }
    auto logits = on_device(bench, poisoned_tensor<float, 2>({3, kConfig.vocabulary}));
    ef::StepGraph graph(bench.device);
    Ids last{3, 30, 17};
    for (int s = 0; s < 10; ++s) {
      Ids tokens;
      std::vector<Index> offsets{0}, wanted;
      std::vector<ef::SequenceId> sequences, graphs;
      const auto rows = rows_of_step(s);
      for (const auto& [i, count] : rows) {
        for (Index t = 0; t < count; ++t) tokens.push_back((last[i] + 7 * t) % kConfig.vocabulary);
        offsets.push_back(static_cast<Index>(tokens.size()));
        wanted.push_back(offsets.back() - 1);
        sequences.push_back(plain[i]);
        graphs.push_back(same[i]);
      }
      const ef::StepRows step{tokens, offsets, wanted};
      const auto at = static_cast<std::size_t>(s);
      if (expected.size() == at) expected.push_back(model->step(step, pages, sequences));
      const auto count = static_cast<Index>(rows.size());
#if defined(EIGENFORMER_TEST_BLOCKS)
      const auto before = emulated::DeviceMemory::instance().allocations();
#endif
      graph.run([&] {
        model->step_into(ef::TensorView<float, 2>(logits.view().data(), count, kConfig.vocabulary),
                         step, other, graphs);
      });
#if defined(EIGENFORMER_TEST_BLOCKS)
      if (s > 1 && rows_of_step(s - 2) == rows) {
        EXPECT_EQ(emulated::DeviceMemory::instance().allocations(), before) << s;
      }
#endif
      std::fill(tokens.begin(), tokens.end(), -1);  // the host's arrays are free at once
      const auto got = logits.host();
      for (Index r = 0; r < count; ++r)
        ASSERT_TRUE(same_bits(row(got, r), row(expected[at], r))) << s << r;
      const auto drawn = ef::greedy_sample(expected[at]);
      for (Index r = 0; r < count; ++r) last[rows[static_cast<std::size_t>(r)].first] = drawn(r);
    }
    // A page that a fork shares must be copied first, which the host waits for.
    other.fork(same[2]);
    const Index length = other.length(same[2]);
    expect_throws<ef::DeviceError>(
        [&] {
          graph.run([&] {
            const std::vector<Index> offsets{0, 1}, wanted;
            const Ids token{1};
            model->step_into(ef::TensorView<float, 2>(logits.view().data(), 0, kConfig.vocabulary),
                             ef::StepRows{token, offsets, wanted}, other, std::span(&same[2], 1));
          });
        },
        {"captur"});
    EXPECT_EQ(other.length(same[2]), length);
  });
}

TEST(DecoderOnDevice, RefusesMemoryOfAnotherDevice) {
  const auto weights = make_weights();
  for_each_gpu([&](const auto& bench) {
    using D = std::remove_cvref_t<decltype(bench.device)>;
    auto model = model_on(bench, weights);
    ef::KvCache<float> on_host;
    const Ids text = random_ids(3, 6);
    expect_throws<std::invalid_argument>([&] { model->prefill(as_batch(text), on_host); },
                                         {"the cache lies in memory of cpu"});
    EXPECT_EQ(on_host.length(0), 0);
    Ids foreign = text;
    foreign[1] = 37;
    ef::KvCache<float> cache(ef::memory_of(bench.device));
    expect_throws<std::invalid_argument>([&] { model->prefill(as_batch(foreign), cache); },
                                         {"Decoder::step", "id 37", "position 1"});
    EXPECT_EQ(cache.length(0), 0);
    const auto packed = std::make_shared<ef::PackedDecoderWeights<float>>(kConfig);
    packed->pack(bench.device, std::shared_ptr<const ef::DecoderWeights>(weights),
                 ef::SelfCommunicator());
    const ef::DecoderWeights& masters = *weights;
    packed->set_embedding(masters.matrix(masters.embedding()), weights);
    expect_throws<std::invalid_argument>([&] { ef::Decoder<float, D>(packed, bench.device); },
                                         {"the embedding lies in memory of cpu"});
    packed->own_embedding(bench.device);
    ef::Decoder<float, D> served(packed, bench.device);
    ef::KvCache<float> other(ef::memory_of(bench.device));
    const auto logits = served.prefill(as_batch(text), other);
    EXPECT_TRUE(same_bits(logits, model->prefill(as_batch(text), cache)));
    EXPECT_EQ(served.weight_bytes(), model->weight_bytes());
    // A table in blocks, here of a number each, is read by CPUs alone; its copy is numbers.
    const auto decode = [](int, std::span<const std::byte> blocks, std::span<float> values) {
      std::memcpy(values.data(), blocks.data(), blocks.size());
    };
    const auto table = masters.matrix(masters.embedding());
    packed->set_embedding({reinterpret_cast<const std::byte*>(table.data()), table.dimension(0),
                           table.dimension(1), 1, sizeof(float), 0, decode},
                          weights);
    expect_throws<std::invalid_argument>([&] { ef::Decoder<float, D>(packed, bench.device); },
                                         {"the embedding lies in memory of cpu"});
    packed->own_embedding(bench.device);
    ef::Decoder<float, D> decoded(packed, bench.device);
    ef::KvCache<float> third(ef::memory_of(bench.device));
    EXPECT_TRUE(same_bits(decoded.prefill(as_batch(text), third), logits));
  });
}

// ---- forms of other families --------------------------------------------------------------------

/// Logits of a form are the CPU's, the same bits in ragged chunks and whole.
template <typename T>
void check_form(const forms::NamedForm& named, ef::WeightFormat format, double allowed) {
  SCOPED_TRACE(named.name);
  const forms::RandomDecoder random(named.form, named.biases, 100);
  ef::Decoder<T> here(random.packed<T>(kOneThread, named.form, format), kOneThread);
  const auto expected = to_double(forms::logits_in_chunks(here, kOneThread, {forms::kLength}));
  for_each_gpu([&](const auto& bench) {
    using D = std::remove_cvref_t<decltype(bench.device)>;
    ef::Decoder<T, D> there(random.packed<T>(bench.device, named.form, format), bench.device);
    const auto logits = forms::logits_in_chunks(there, bench.device, {6, 1, 4});
    EXPECT_LT(relative_error(logits, expected), allowed);
    if (format != ef::WeightFormat::activation || !std::is_same_v<T, float>) return;
    const auto whole = forms::logits_in_chunks(there, bench.device, {forms::kLength});
    EXPECT_TRUE(same_bits(whole, logits));
  });
}

TEST(DecoderOnDevice, FormsOfFamiliesAreThoseOfTheCpu) {
  for (const forms::NamedForm& named : forms::forms_of_families()) {
    check_form<float>(named, ef::WeightFormat::activation, 1e-5);
    check_form<float>(named, ef::WeightFormat::int8, 1e-2);
    check_form<float>(named, ef::WeightFormat::int4, 1e-2);
#if !defined(__CUDACC__)  // nvcc takes minutes for another scalar
    check_form<ef::bfloat16>(named, ef::WeightFormat::activation, 2e-2);
#endif
  }
}

// Matrices of four formats, and a head of INT8 by groups that is the embedding too.
TEST(DecoderOnDevice, MixedFormatsAreThoseOfTheCpu) {
  const ef::DecoderForm form;
  const forms::RandomDecoder random(form, false, 200);
  const auto packed = [&](const auto& device) {
    const auto p = random.packed<float>(device, form, ef::WeightFormat::bfloat16);
    const ef::SelfCommunicator alone;
    p->pack_layer(device, 1, random.tensors.layers[1], ef::WeightFormat::half, alone);
    const Int4Layer values(random.tensors.layers[2], 32);
    p->pack_layer(device, 2, values.views, ef::WeightFormat::as_stored, alone);
    p->pack_head(device, *random.tensors.norm, *random.tensors.head, {ef::WeightFormat::int8, 32},
                 alone);
    p->tie_embedding();
    return p;
  };
  ef::Decoder<float> here(packed(kOneThread), kOneThread);
  const auto expected = to_double(forms::logits_in_chunks(here, kOneThread, {forms::kLength}));
  for_each_gpu([&](const auto& bench) {
    using D = std::remove_cvref_t<decltype(bench.device)>;
    ef::Decoder<float, D> there(packed(bench.device), bench.device);
    const auto logits = forms::logits_in_chunks(there, bench.device, {6, 1, 4});
    EXPECT_LT(relative_error(logits, expected), 1e-2);
    EXPECT_TRUE(same_bits(forms::logits_in_chunks(there, bench.device, {forms::kLength}), logits));
  });
}

}  // namespace
