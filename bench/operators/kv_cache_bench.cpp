// KV cache: what one decode step appends to 4096 positions and more. Limit: read the new rows,
// write them. Peer: the notebook's concatenation in Eigen, which copies the whole cache; and the
// read that attention does, for scale.
#include <eigenformer/kv_cache.h>

#include <cstring>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

constexpr Eigen::Index kBatch = 8, kHeads = 8, kHeadDim = 128, kLength = 4096;

template <typename T>
ef::Tensor<T, 4> random_rows(Eigen::Index n) {
  ef::Tensor<float, 4> rows(kBatch, n, kHeads, kHeadDim);
  rows.setRandom();
  return rows.cast<T>();
}

/// Appends one token per call; rolls back to kLength every 1024, so that memory is touched for the
/// first time only here, untimed.
template <typename T, typename Storage>
void append_case(bench::Suite& suite, const std::string& name) {
  const auto token = std::make_shared<ef::Tensor<T, 4>>(random_rows<T>(1));
  const auto cache = std::make_shared<ef::KvCache<T, Storage>>();
  cache->reserve(kLength + 1024);
  const auto prompt = random_rows<T>(kLength);
  ef::update_kv_cache(*cache, prompt, prompt, 0);
  while (cache->length(0) < kLength + 1024) ef::update_kv_cache(*cache, *token, *token, 0);
  const double elements = 2.0 * static_cast<double>(token->size());
  auto& row = suite.row("update_kv_cache (8, 1, 8, 128) after 4096, " + name,
                        bench::Limit::copy_bytes(elements * sizeof(T), elements * sizeof(Storage)));
  row.ours([=](const auto& device) {
    if (cache->length(0) == kLength + 1024) cache->truncate(kLength);
    ef::update_kv_cache(device, *cache, *token, *token, 0);
  });
  if constexpr (std::is_same_v<T, Storage>) {
    const auto keys = std::make_shared<ef::Tensor<T, 4>>(prompt),
               values = std::make_shared<ef::Tensor<T, 4>>(prompt);
    row.peer("Eigen concatenate", [=](const auto& device) {
      for (const auto& old : {keys, values}) {
        ef::Tensor<T, 4> joined(kBatch, kLength + 1, kHeads, kHeadDim);
        joined.device(device) = old->concatenate(*token, 1);
      }
    });
    row.peer("Eigen slice of a preallocated tensor", [=](const auto& device) {
      const Eigen::array<Eigen::Index, 4> offsets{0, kLength - 1, 0, 0},
          extents{kBatch, 1, kHeads, kHeadDim};
      keys->slice(offsets, extents).device(device) = *token;
      values->slice(offsets, extents).device(device) = *token;
    });
  }
}

void append_cases(bench::Suite& suite) {
  append_case<float, float>(suite, "float");
  append_case<ef::bfloat16, ef::bfloat16>(suite, "bfloat16");
  append_case<float, ef::bfloat16>(suite, "float as bfloat16");
  append_case<float, std::int8_t>(suite, "float as INT8");
}

/// One token of one sequence to every layer of a model. Peer: copies of the same bytes to where
/// they would go.
void layers_case(bench::Suite& suite) {
  constexpr Eigen::Index kLayers = 32, kTokens = 1024;
  constexpr std::size_t kRow = static_cast<std::size_t>(kHeads * kHeadDim);
  struct Layers {
    ef::KvCache<float> cache;
    ef::Tensor<float, 4> token{1, 1, kHeads, kHeadDim};
    std::vector<float> memory = std::vector<float>(2 * kLayers * kTokens * kRow, 1.0f);
    std::size_t step = 0;
  };
  const auto x = std::make_shared<Layers>();
  x->token.setRandom();
  x->cache.reserve(kLayers, 1, kTokens, kHeads, kHeadDim);
  const auto append = [=](const auto& device) {
    if (x->cache.length(0) == kTokens) x->cache.truncate(0);
    for (Eigen::Index layer = 0; layer < kLayers; ++layer)
      ef::update_kv_cache(device, x->cache, x->token, x->token, layer);
  };
  for (Eigen::Index i = 0; i < kTokens; ++i) append(Eigen::DefaultDevice{});
  const double bytes = 2.0 * kLayers * static_cast<double>(kRow * sizeof(float));
  suite
      .row("update_kv_cache (1, 1, 8, 128) to each of 32 layers, float",
           bench::Limit::copy_bytes(bytes, bytes)
               .rotating_through(bytes * static_cast<double>(kTokens)))
      .ours(append)
      .peer_one_thread("memcpy", [=] {
        x->step = (x->step + 1) % kTokens;
        for (std::size_t part = 0; part < 2 * kLayers; ++part)
          std::memcpy(x->memory.data() + (part * kTokens + x->step) * kRow, x->token.data(),
                      kRow * sizeof(float));
      });
}

void prefill_case(bench::Suite& suite) {
  const auto prompt = std::make_shared<ef::Tensor<float, 4>>(random_rows<float>(512));
  const auto cache = std::make_shared<ef::KvCache<float>>();
  cache->reserve(512);
  const double bytes = 2.0 * static_cast<double>(prompt->size()) * sizeof(float);
  auto& row =
      suite.row("update_kv_cache (8, 512, 8, 128), float", bench::Limit::copy_bytes(bytes, bytes));
  row.ours([=](const auto& device) {
    cache->clear();
    ef::update_kv_cache(device, *cache, *prompt, *prompt, 0);
  });
  const auto keys = std::make_shared<ef::Tensor<float, 4>>(*prompt),
             values = std::make_shared<ef::Tensor<float, 4>>(*prompt);
  row.peer("Eigen copy", [=](const auto& device) {
    keys->device(device) = *prompt;
    values->device(device) = *prompt;
  });
}

}  // namespace

EIGENFORMER_BENCHMARK(append_cases)
EIGENFORMER_BENCHMARK(layers_case)
EIGENFORMER_BENCHMARK(prefill_case)
