// Laws: equal to the plain decoder; gradients equal finite differences; a row of logits has the
// same bits alone, in a batch, in chunks, token by token, on any number of threads and ranks,
// through either cache; INT8 stays close; a small text is learned.
#include <eigenformer/decoder.h>

#include <eigenformer/reference/decoder.h>
#include <eigenformer/sampling.h>
#include <eigenformer/training.h>
#include <numbers>

#include "decoder_support.h"

using namespace eigenformer_test;

namespace {

ef::DecoderConfig config_of(ef::RopeLayout layout) {
  ef::DecoderConfig config = kConfig;
  config.rope_layout = layout;
  return config;
}

ef::Tensor<std::int32_t, 2> random_ids(Index batch, Index length, unsigned seed) {
  std::mt19937 generator(seed);
  ef::Tensor<std::int32_t, 2> ids(batch, length);
  for (Index i = 0; i < ids.size(); ++i)
    ids.data()[i] =
        static_cast<std::int32_t>(generator() % static_cast<unsigned>(kConfig.vocabulary));
  return ids;
}

std::vector<std::int32_t> row_of(const ef::Tensor<std::int32_t, 2>& ids, Index b, Index length) {
  return {ids.data() + b * ids.dimension(1), ids.data() + b * ids.dimension(1) + length};
}

ef::Tensor<float, 2> row(const ef::Tensor<float, 2>& x, Index r) {
  ef::Tensor<float, 2> result(1, x.dimension(1));
  std::copy_n(x.data() + r * x.dimension(1), x.dimension(1), result.data());
  return result;
}

// Box-Muller of numbers 2 i and 2 i + 1 of a stream of their own, whatever a sampler of the same
// seed draws.
TEST(DecoderWeights, InitialValuesAreOfTheStreamOfInitialisation) {
  const ef::DecoderWeights weights(kConfig, 5);
  const auto& tensors = weights.tensors();
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    if (tensors[t].rows == 1) continue;
    const ef::Philox random(5, t);
    const auto uniform = [&](std::uint32_t index) {
      return random.uniform(0, index, ef::Philox::Purpose::initialisation);
    };
    const auto normal = [&](std::uint32_t i) {
      return std::sqrt(-2.0 * std::log(uniform(2 * i))) *
             std::cos(2.0 * std::numbers::pi * uniform(2 * i + 1));
    };
    const auto values = weights.matrix(t);
    const double scale = values.data()[0] / normal(0);
    EXPECT_GT(scale, 0.0);
    EXPECT_LE(scale, 0.0200001);
    for (std::uint32_t i = 1; i < tensors[t].size(); ++i)
      ASSERT_NEAR(values.data()[i], scale * normal(i), 1e-7) << tensors[t].name << " " << i;
  }
}

TEST(Decoder, ForwardEqualsThePlainDecoder) {
  for (auto layout : {ef::RopeLayout::half_split, ef::RopeLayout::interleaved}) {
    auto weights = make_weights(config_of(layout));
    ef::Decoder<float> model(weights, kOneThread);
    const auto ids = random_ids(2, 9, 1);
    const auto logits = model.forward<double>(ids);
    const auto narrow = model.forward<float>(ids);
    const auto bfloat = model.forward<ef::bfloat16>(ids);
    for (Index b = 0; b < 2; ++b) {
      const auto expected = ef::reference::decoder(*weights, row_of(ids, b, 9));
      const ef::TensorView<const double, 2> mine(logits.data() + b * 9 * 37, 9, 37);
      const ef::TensorView<const float, 2> mine_float(narrow.data() + b * 9 * 37, 9, 37);
      const ef::TensorView<const ef::bfloat16, 2> mine_bfloat(bfloat.data() + b * 9 * 37, 9, 37);
      EXPECT_LT(relative_error(mine, expected), 1e-6);  // rotation tables are float
      EXPECT_LT(relative_error(mine_float, expected), 2e-5);
      EXPECT_LT(relative_error(mine_bfloat, expected), 5e-2);
    }
  }
}

// d(sum of logits * direction)/d(weight) by central differences in double.
TEST(Decoder, GradientsEqualFiniteDifferences) {
  auto weights = make_weights();
  ef::Decoder<float> model(weights, kOneThread);
  const auto ids = random_ids(2, 7, 2);
  const auto direction = random_tensor<double, 2>({14, kConfig.vocabulary}, 3);
  const auto objective = [&] {
    const auto logits = model.forward<double>(ids);
    double sum = 0;
    for (Index i = 0; i < logits.size(); ++i) sum += logits.data()[i] * direction.data()[i];
    return sum;
  };
  objective();
  std::vector<ef::Parameter> parameters = model.parameters();
  for (auto& parameter : parameters) parameter.gradient.setZero();
  model.backward<double>(direction);
  std::mt19937 generator(4);
  for (std::size_t p = 0; p < parameters.size(); ++p) {
    for (int sample = 0; sample < 6; ++sample) {
      const Index at =
          static_cast<Index>(generator() % static_cast<unsigned>(parameters[p].value.size()));
      float& weight = parameters[p].value(at);
      const float before = weight;
      const double gradient = static_cast<double>(parameters[p].gradient(at));
      weight = before + 1e-3f;
      const float high = weight;
      const double up = objective();
      weight = before - 1e-3f;
      const float low = weight;
      const double down = objective();
      weight = before;
      const double slope = (up - down) / (static_cast<double>(high) - static_cast<double>(low));
      EXPECT_NEAR(gradient, slope, 2e-3 * (1.0 + std::fabs(slope)))
          << weights->tensors()[p].name << '[' << at << ']';
    }
  }
}

/// Gradients of all parameters for the gradient of the logits in `direction`.
template <typename Compute>
std::vector<ef::Tensor<double, 2>> gradients_in(ef::DecoderWeights& weights,
                                                ef::Decoder<float>& model,
                                                const ef::Tensor<std::int32_t, 2>& ids,
                                                const ef::Tensor<double, 2>& direction) {
  for (ef::Parameter& parameter : weights.parameters()) parameter.gradient.setZero();
  model.forward<Compute>(ids);
  ef::Tensor<Compute, 2> narrow(direction.dimensions());
  for (Index i = 0; i < narrow.size(); ++i)
    narrow.data()[i] = static_cast<Compute>(direction.data()[i]);
  model.backward<Compute>(narrow);
  std::vector<ef::Tensor<double, 2>> result;
  for (std::size_t t = 0; t < weights.tensors().size(); ++t)
    result.push_back(to_double(weights.gradient_matrix(t)));
  return result;
}

/// Row by row, so that one row of a wrong size in a large matrix shows.
TEST(Decoder, GradientsInEveryScalarEqualThoseInDouble) {
  auto weights = make_weights();
  ef::Decoder<float> model(weights, kOneThread);
  const auto ids = random_ids(2, 40, 2);
  const auto direction = random_tensor<double, 2>({80, kConfig.vocabulary}, 3);
  const auto expected = gradients_in<double>(*weights, model, ids, direction);
  const auto compare = [&](const std::vector<ef::Tensor<double, 2>>& actual, double allowed) {
    for (std::size_t t = 0; t < expected.size(); ++t)
      for (Index r = 0; r < expected[t].dimension(0); ++r) {
        const Index columns = expected[t].dimension(1);
        const ef::TensorView<const double, 2> mine(actual[t].data() + r * columns, 1, columns);
        const ef::TensorView<const double, 2> wanted(expected[t].data() + r * columns, 1, columns);
        EXPECT_LT(relative_error(mine, wanted), allowed) << weights->tensors()[t].name << ' ' << r;
      }
  };
  compare(gradients_in<float>(*weights, model, ids, direction), 1e-4);
  compare(gradients_in<ef::half>(*weights, model, ids, direction), 0.05);
  compare(gradients_in<ef::bfloat16>(*weights, model, ids, direction), 0.3);
}

TEST(Decoder, SameBitsWholeInChunksTokenByTokenAndInABatch) {
  auto weights = make_weights();
  ef::Decoder<float> model(weights, kOneThread);
  const auto ids = random_ids(3, 70, 6);
  for (bool int8 : {false, true}) {
    if (int8) model.quantize();
    ef::KvCache<float> whole;
    const auto expected = model.prefill(ids, whole);
    if (!int8) {  // training's forward runs the same operators on unpacked weights
      ef::Decoder<float> trained(weights, kOneThread);
      const auto all = trained.forward<float>(ids);
      for (Index b = 0; b < 3; ++b) EXPECT_TRUE(same_bits(row(expected, b), row(all, b * 70 + 69)));
    }
    ef::KvCache<float> chunked;
    ef::Tensor<float, 2> logits;
    for (Index start = 0, n = 1; start < 70; start += n, n = std::min<Index>(2 * n, 70 - start)) {
      ef::Tensor<std::int32_t, 2> chunk =
          ids.slice(Eigen::array<Index, 2>{0, start}, Eigen::array<Index, 2>{3, n});
      logits = model.prefill(chunk, chunked);
      if (start + n >= 70) break;
    }
    EXPECT_TRUE(same_bits(expected, logits));
    for (Index b = 0; b < 3; ++b) {
      ef::KvCache<float> alone;
      ef::Tensor<std::int32_t, 1> token(1);
      for (Index t = 0; t < 70; ++t) {
        token(0) = ids(b, t);
        logits = model.decode(token, alone);
      }
      EXPECT_TRUE(same_bits(row(expected, b), logits)) << "sequence " << b;
    }
  }
}

TEST(Decoder, PagedCacheServesRaggedPromptsWithTheSameBits) {
  auto weights = make_weights();
  ef::Decoder<float> model(weights, kOneThread);
  auto ids = random_ids(3, 20, 7);
  const std::vector<Index> lengths{20, 1, 11};
  for (Index b = 0; b < 3; ++b)
    for (Index t = lengths[static_cast<std::size_t>(b)]; t < 20; ++t)
      ids(b, t) = -7;  // nobody's ids
  ef::PagedKvCache<float> cache({.layers = kConfig.layers,
                                 .kv_heads = kConfig.kv_heads,
                                 .head_dim = kConfig.head_dim,
                                 .page_size = 5,
                                 .page_count = 30});
  std::vector<ef::SequenceId> sequences;
  for (int b = 0; b < 3; ++b) sequences.push_back(cache.add_sequence());
  auto logits = model.prefill(ids, lengths, cache, sequences);
  ef::Tensor<std::int32_t, 1> next(3);
  next.setValues({3, 1, 4});
  const auto after = model.decode(next, cache, sequences);
  for (Index b = 0; b < 3; ++b) {
    ef::KvCache<float> alone;
    ef::Tensor<std::int32_t, 2> prompt(1, lengths[static_cast<std::size_t>(b)]);
    for (Index t = 0; t < prompt.size(); ++t) prompt(0, t) = ids(b, t);
    EXPECT_TRUE(same_bits(row(logits, b), model.prefill(prompt, alone)));
    ef::Tensor<std::int32_t, 1> token(1);
    token(0) = next(b);
    EXPECT_TRUE(same_bits(row(after, b), model.decode(token, alone)));
  }
}

TEST(Decoder, SameBitsOnThreadsAndRanks) {
  auto weights = make_weights();
  const auto ids = random_ids(2, 33, 8);
  for (bool int8 : {false, true}) {
    ef::Decoder<float> model(weights, kOneThread);
    if (int8) model.quantize();
    ef::KvCache<float> cache;
    const auto expected = model.prefill(ids, cache);
    for (int count : {1, 2, 3}) {
      Threads threads(count);
      ef::Decoder<float, Eigen::ThreadPoolDevice> threaded(weights, threads.device);
      if (int8) threaded.quantize();
      ef::KvCache<float> other;
      EXPECT_TRUE(same_bits(expected, threaded.prefill(ids, other)));
      ef::ThreadCommunicator::run(count, [&](auto& communicator) {
        ef::Decoder<float, Eigen::DefaultDevice, std::remove_reference_t<decltype(communicator)>>
            rank(weights, kOneThread, communicator);
        if (int8) rank.quantize();
        ef::KvCache<float> own;
        const auto logits = rank.prefill(ids, own);
        EXPECT_TRUE(same_bits(expected, logits));
      });
    }
  }
}

TEST(Decoder, Int8StaysCloseAndIsSmaller) {
  auto weights = make_weights();
  ef::Decoder<float> model(weights, kOneThread);
  const auto ids = random_ids(4, 16, 9);
  ef::KvCache<float> a, b;
  model.pack();
  const std::size_t bytes = model.weight_bytes();
  const auto exact = model.prefill(ids, a);
  model.quantize();
  EXPECT_LT(model.weight_bytes(), bytes / 2);
  const auto int8 = model.prefill(ids, b);
  EXPECT_LT(relative_error(int8, to_double(exact)), 0.05);
  double squares = 0;
  for (Index i = 0; i < exact.size(); ++i)
    squares += static_cast<double>(exact.data()[i]) * static_cast<double>(exact.data()[i]);
  const double size = std::sqrt(squares / static_cast<double>(exact.size()));
  for (Index c = 0; c < exact.dimension(1); ++c)  // one channel with a wrong scale shows here
    for (Index r = 0; r < 4; ++r) EXPECT_NEAR(int8(r, c), exact(r, c), 0.2 * size) << r << ' ' << c;
}

TEST(Decoder, ReleasesItsMasterWeights) {
  for (bool int8 : {false, true}) {
    auto weights = make_weights();
    const std::weak_ptr<ef::DecoderWeights> watched = weights;
    ef::Decoder<float> model(weights, kOneThread);
    weights.reset();
    const auto ids = random_ids(2, 16, 9);
    ef::KvCache<float> a, b;
    if (int8) model.quantize();
    const auto before = model.prefill(ids, a);
    const std::size_t bytes = model.weight_bytes();
    model.release_master_weights();
    EXPECT_TRUE(watched.expired());
    const auto after = model.prefill(ids, b);
    if (int8) {  // of the embedding 1 byte per number and 4 per token stay
      const auto table = static_cast<std::size_t>(kConfig.vocabulary * kConfig.features);
      EXPECT_EQ(model.weight_bytes(),
                bytes - 3 * table + 4 * static_cast<std::size_t>(kConfig.vocabulary));
      EXPECT_LT(relative_error(after, to_double(before)), 0.05);
      EXPECT_FALSE(same_bits(before, after));
    } else {
      EXPECT_EQ(model.weight_bytes(), bytes);
      EXPECT_TRUE(same_bits(before, after));
    }
    EXPECT_THROW(model.forward<float>(ids), std::logic_error);
    EXPECT_THROW(model.parameters(), std::logic_error);
    EXPECT_THROW(model.pack(), std::logic_error);
    EXPECT_THROW(model.quantize(), std::logic_error);
    EXPECT_THROW(model.release_master_weights(), std::logic_error);
    ef::Tensor<std::int32_t, 2> unknown(1, 1);
    unknown(0, 0) = static_cast<std::int32_t>(kConfig.vocabulary);
    ef::KvCache<float> empty;
    EXPECT_THROW(model.prefill(unknown, empty), std::invalid_argument);
    EXPECT_EQ(empty.length(0), 0);
    ef::KvCache<float> again;
    EXPECT_TRUE(same_bits(after, model.prefill(ids, again)));  // refusals changed nothing
  }
}

template <typename T>
double inference_error(const std::shared_ptr<ef::DecoderWeights>& weights) {
  ef::Decoder<T> model(weights, kOneThread);
  const auto ids = random_ids(1, 9, 12);
  const auto expected = ef::reference::decoder(*weights, row_of(ids, 0, 9));
  ef::KvCache<T> cache;
  const auto logits = model.prefill(ids, cache);
  return relative_error(
      logits, to_double(ef::TensorView<const double, 2>(expected.data() + 8 * 37, 1, 37)));
}

TEST(Decoder, InferenceInEveryScalarEqualsThePlainDecoder) {
  auto weights = make_weights();
  EXPECT_LT(inference_error<double>(weights), 1e-6);  // rotation tables and logits are float
  EXPECT_LT(inference_error<float>(weights), 2e-5);
  EXPECT_LT(inference_error<ef::half>(weights), 1e-2);
  EXPECT_LT(inference_error<ef::bfloat16>(weights), 5e-2);
}

TEST(Decoder, LearnsAndRepacksAfterTraining) {
  auto weights = std::make_shared<ef::DecoderWeights>(kConfig, 1);
  ef::Decoder<float> model(weights, kOneThread);
  const auto ids = random_ids(1, 24, 10);
  struct Batch {
    ef::Tensor<std::int32_t, 2> inputs;
    ef::Tensor<std::int32_t, 1> targets;
  };
  Batch batch{ids.slice(Eigen::array<Index, 2>{0, 0}, Eigen::array<Index, 2>{1, 23}),
              ef::Tensor<std::int32_t, 1>(23)};
  for (Index t = 0; t < 23; ++t) batch.targets(t) = ids(0, t + 1);
  ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-2f});
  const std::vector<Batch> epoch{batch};
  const double first = ef::train_step_with_grad_accumulation(model, optimizer, epoch, 1);
  double loss = first;
  for (int step = 0; step < 60; ++step)
    loss = ef::train_step_with_grad_accumulation<ef::bfloat16>(model, optimizer, epoch, 1);
  EXPECT_NEAR(first, std::log(37.0), 0.5);
  EXPECT_LT(loss, 0.2);
  ef::KvCache<float> cache;  // packed after training without being asked
  const auto logits = model.prefill(batch.inputs, cache);
  EXPECT_EQ(ef::greedy_sample(logits)(0), ids(0, 23));
}

TEST(Decoder, RefusesWithTheArgumentNamed) {
  ef::DecoderConfig config = kConfig;
  config.kv_heads = 3;
  expect_throws<std::invalid_argument>([&] { ef::DecoderWeights{config}; },
                                       {"Decoder: heads is 4, expected a multiple of kv_heads, 3"});
  config = kConfig;
  config.head_dim = 5;
  expect_throws<std::invalid_argument>([&] { ef::DecoderWeights{config}; }, {"head_dim is 5"});
  config = kConfig;
  config.hidden = 0;
  expect_throws<std::invalid_argument>([&] { ef::DecoderWeights{config}; }, {"hidden is 0"});
  ef::Decoder<float> model(make_weights(), kOneThread);
  ef::KvCache<float> cache;
  auto ids = random_ids(1, 3, 11);
  ids(0, 1) = 37;
  EXPECT_THROW(model.prefill(ids, cache), std::invalid_argument);
  EXPECT_EQ(cache.length(0), 0);
  ef::Tensor<float, 2> gradient(5, 37);
  gradient.setZero();
  EXPECT_THROW(model.backward<float>(gradient), std::invalid_argument);
}

}  // namespace
