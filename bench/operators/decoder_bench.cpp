// A small Llama-shaped decoder: decode of one token and prefill of 256, float and INT8. Limits: the
// weights' bytes, the products' flops.
#include <eigenformer/decoder.h>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

using Eigen::Index;

// Both devices of a row need a decoder and a cache of their own; the cache is cut back after each
// call.
template <typename D>
struct Served {
  Served(std::shared_ptr<ef::DecoderWeights> weights, const D& device, bool int8)
      : model(std::move(weights), device) {
    if (int8) model.quantize();
  }
  ef::Decoder<float, D> model;
  ef::KvCache<float> cache;
};

void decoder_cases(bench::Suite& suite) {
  const ef::DecoderConfig config{.vocabulary = 8192,
                                 .features = 512,
                                 .layers = 4,
                                 .heads = 8,
                                 .kv_heads = 4,
                                 .head_dim = 64,
                                 .hidden = 1408};
  auto weights = std::make_shared<ef::DecoderWeights>(config, 1);
  const double parameters =
      static_cast<double>(weights->parameter_count() - config.vocabulary * config.features);
  for (const bool int8 : {false, true})
    for (const Index tokens : {1, 256}) {
      const double bytes = parameters * (int8 ? 1.0 : 4.0);
      const double flops = 2.0 * parameters * static_cast<double>(tokens) -
                           (tokens > 1 ? 2.0 * 8192 * 512 * static_cast<double>(tokens - 1) : 0.0);
      auto& row = suite.row(
          std::string("decoder ") + (tokens == 1 ? "decode 1" : "prefill 256") +
              (int8 ? " int8" : " float"),
          bench::Limit::product(flops, bytes, int8 ? bench::Peak::int8 : bench::Peak::float_fma));
      ef::Tensor<std::int32_t, 2> ids(1, tokens);
      for (Index t = 0; t < tokens; ++t)
        ids(0, t) = static_cast<std::int32_t>(t * 31 % config.vocabulary);
      auto one = std::make_shared<std::unique_ptr<Served<Eigen::DefaultDevice>>>();
      auto pool = std::make_shared<std::unique_ptr<Served<Eigen::ThreadPoolDevice>>>();
      row.ours([=](const auto& device) {
        using D = std::remove_cvref_t<decltype(device)>;
        auto& served = [&]() -> std::unique_ptr<Served<D>>& {
          if constexpr (std::is_same_v<D, Eigen::DefaultDevice>)
            return *one;
          else
            return *pool;
        }();
        if (!served) served = std::make_unique<Served<D>>(weights, device, int8);
        served->cache.truncate(0);
        served->model.prefill(ids, served->cache);
      });
    }
}

}  // namespace

EIGENFORMER_BENCHMARK(decoder_cases)
