/// \file
/// Attention of bfloat16 with heads of 128: a prompt, bound by products of tiles, and a step of a
/// batch over a cache, bound by the bytes of the cache.
#pragma once

#include <eigenformer/attention.h>
#include <eigenformer/kv_cache.h>

#include <memory>

#include "rows.h"

namespace gpu_day {
namespace attention {

using T = ef::bfloat16;
constexpr Index kWidth = 128;

Row prefill(Index tokens, Index heads, Index kv_heads) {
  const double pairs = 0.5 * static_cast<double>(tokens * tokens);
  const double rows = static_cast<double>(tokens) * kWidth;
  return {"attention",
          "prefill " + std::to_string(tokens) + " tokens, " + std::to_string(heads) + "/" +
              std::to_string(kv_heads) + " heads, causal bfloat16",
          2 * rows * static_cast<double>(2 * heads + 2 * kv_heads),
          4 * pairs * kWidth * static_cast<double>(heads),
          Peak::bfloat16,
          [=](Memory& memory) -> Call {
            auto output = memory.tensor<T>(Index{1}, tokens, heads, kWidth);
            auto query = memory.tensor<T>(Index{1}, tokens, heads, kWidth);
            auto key = memory.tensor<T>(Index{1}, tokens, kv_heads, kWidth);
            auto value = memory.tensor<T>(Index{1}, tokens, kv_heads, kWidth);
            return [=, &memory] {
              const std::vector<Index> lengths{tokens};
              ef::batched_attention_with_padding_into(memory.device(), output, query, key, value,
                                                      lengths, {.causal = true});
            };
          }};
}

template <typename Storage>
Row decode(const char* storage, Index batch, Index length) {
  constexpr Index heads = 32, kv_heads = 8;
  return {"attention",
          "decode " + std::to_string(batch) + " x " + std::to_string(length) +
              " keys, 32/8 heads, " + storage + " cache",
          2.0 * static_cast<double>(batch * length * kv_heads * kWidth) * sizeof(Storage),
          0,
          Peak::none,
          [=](Memory& memory) -> Call {
            const auto& device = memory.device();
            auto cache = std::make_shared<ef::KvCache<T, Storage>>(ef::memory_of(device));
            auto rows = memory.tensor<T>(batch, length, kv_heads, kWidth);
            ef::update_kv_cache(device, *cache, rows, rows, 0);
            auto output = memory.tensor<T>(batch, Index{1}, heads, kWidth);
            auto query = memory.tensor<T>(batch, Index{1}, heads, kWidth);
            return [=, &memory] {
              ef::attention_with_kv_cache_into(memory.device(), output, query, *cache, 0);
            };
          }};
}

}  // namespace attention

inline void add_attention_rows(Rows& rows) {
  using namespace attention;
  rows.push_back(decode<T>("bfloat16", 64, 4096));
  rows.push_back(decode<std::int8_t>("int8", 64, 4096));
  rows.push_back(decode<T>("bfloat16", 1, 32768));
  rows.push_back(prefill(2048, 32, 8));
  rows.push_back(prefill(8192, 32, 8));
}

}  // namespace gpu_day
