// KV cache: what one decode step appends to 4096 positions and more. Limit: read the new rows,
// write them. Peer: the notebook's concatenation in Eigen, which copies the whole cache; and the
// read that attention does, for scale.
#include <eigenformer/kv_cache.h>

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
EIGENFORMER_BENCHMARK(prefill_case)
