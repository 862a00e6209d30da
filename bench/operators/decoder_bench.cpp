// Llama-shaped decoders, float, INT8 and INT4: decode of one token, prefill of 256, and a server's
// ragged step; a small one too, where waking threads could cost more than they bring. Limits: the
// weights' bytes, the products' flops.
#include <eigenformer/decoder.h>

#include <tuple>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

using Eigen::Index;

constexpr ef::DecoderConfig kLarge{.vocabulary = 8192,
                                   .features = 512,
                                   .layers = 4,
                                   .heads = 8,
                                   .kv_heads = 4,
                                   .head_dim = 64,
                                   .hidden = 1408};
constexpr ef::DecoderConfig kSmall{.vocabulary = 256,
                                   .features = 128,
                                   .layers = 4,
                                   .heads = 4,
                                   .kv_heads = 4,
                                   .head_dim = 32,
                                   .hidden = 384};

/// A decoder with a cache, which is cut back after each call.
template <typename D>
struct Dense {
  Dense(std::shared_ptr<ef::DecoderWeights> weights, const D& device,
        const ef::WeightStorage& storage, Index tokens)
      : model(std::move(weights), device), ids(1, tokens) {
    model.pack(storage);
    for (Index t = 0; t < tokens; ++t)
      ids(0, t) = static_cast<std::int32_t>(t * 31 % model.config().vocabulary);
  }
  void operator()() {
    cache.truncate(0);
    model.prefill(ids, cache);
  }
  ef::Decoder<float, D> model;
  ef::KvCache<float> cache;
  ef::Tensor<std::int32_t, 2> ids;
};

/// The same over pages: a chunk of 64 tokens of one sequence beside 15 sequences of 64 positions
/// that decode.
template <typename D>
struct Ragged {
  static constexpr Index kTokens = 64 + 15;
  Ragged(std::shared_ptr<ef::DecoderWeights> weights, const D& device,
         const ef::WeightStorage& storage, Index)
      : model(std::move(weights), device),
        cache({.layers = model.config().layers,
               .kv_heads = model.config().kv_heads,
               .head_dim = model.config().head_dim,
               .page_size = 16,
               .page_count = 16 * 8}) {
    model.pack(storage);
    for (Index t = 0; t < kTokens; ++t) tokens.push_back(static_cast<std::int32_t>(t * 31 % 256));
    for (int i = 0; i < 16; ++i) {
      sequences.push_back(cache.add_sequence());
      offsets.push_back(i == 0 ? 0 : 63 + i);
      logits_of.push_back(63 + i);
      const std::vector<Index> prompt{0, 64};
      model.step(ef::StepRows{std::span(tokens).first(64), prompt, {}}, cache,
                 std::span(&sequences.back(), 1));
    }
    offsets.push_back(kTokens);
  }
  void operator()() {
    model.step_into(logits, ef::StepRows{tokens, offsets, logits_of}, cache, sequences);
    for (const ef::SequenceId sequence : sequences) cache.truncate(sequence, 64);
  }
  ef::Decoder<float, D> model;
  ef::PagedKvCache<float> cache;
  std::vector<std::int32_t> tokens;
  std::vector<Index> offsets, logits_of;
  std::vector<ef::SequenceId> sequences;
  ef::Tensor<float, 2> logits;
};

/// How linear layers are stored: bytes of a weight, of one of the head.
struct Format {
  const char* name;
  ef::WeightStorage storage;
  double bytes, head_bytes;
  bench::Peak peak;
};

/// A row that computes `tokens` and the logits of `wanted` of them.
template <template <typename> typename Served>
void add_row(bench::Suite& suite, const std::string& name,
             std::shared_ptr<ef::DecoderWeights> weights, Index tokens, Index wanted,
             const Format& format) {
  const ef::DecoderConfig& config = weights->config();
  const double head = static_cast<double>(config.vocabulary * config.features),
               layers = static_cast<double>(weights->parameter_count()) - 2 * head;
  const double flops =
      2 * (layers * static_cast<double>(tokens) + head * static_cast<double>(wanted));
  auto& row = suite.row(
      name + " " + format.name,
      bench::Limit::product(flops, layers * format.bytes + head * format.head_bytes, format.peak));
  // Each device of a row needs one of its own.
  using Both = std::tuple<std::unique_ptr<Served<Eigen::DefaultDevice>>,
                          std::unique_ptr<Served<Eigen::ThreadPoolDevice>>>;
  auto both = std::make_shared<Both>();
  row.ours([=, storage = format.storage](const auto& device) {
    using D = std::remove_cvref_t<decltype(device)>;
    auto& served = std::get<std::unique_ptr<Served<D>>>(*both);
    if (!served) served = std::make_unique<Served<D>>(weights, device, storage, tokens);
    (*served)();
  });
}

void decoder_cases(bench::Suite& suite) {
  const auto large = std::make_shared<ef::DecoderWeights>(kLarge, 1);
  const auto small_one = std::make_shared<ef::DecoderWeights>(kSmall, 1);
  using enum ef::WeightFormat;
  const Format formats[] = {{"float", activation, 4, 4, bench::Peak::float_fma},
                            {"int8", int8, 1, 1, bench::Peak::int8},
                            // by 32, with a scale and a minimum of 4 bytes; the head in INT8
                            {"int4", int4, 0.75, 1, bench::Peak::int8}};
  for (const Format& format : formats) {
    add_row<Dense>(suite, "decoder decode 1", large, 1, 1, format);
    add_row<Dense>(suite, "decoder prefill 256", large, 256, 1, format);
    add_row<Ragged>(suite, "decoder step 64 + 15 x 1", large, 64 + 15, 16, format);
    for (const Index tokens : {1, 8, 64})
      add_row<Dense>(suite, "small decoder prefill " + std::to_string(tokens), small_one, tokens, 1,
                     format);
  }
}

}  // namespace

EIGENFORMER_BENCHMARK(decoder_cases)
