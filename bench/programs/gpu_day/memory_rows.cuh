/// \file
/// Caches, embedding, masks, quantization: what moves memory and little else.
#pragma once

#include <eigenformer/causal_mask.h>
#include <eigenformer/embedding.h>
#include <eigenformer/kv_cache.h>
#include <eigenformer/quantization.h>

#include <memory>

#include "rows.h"

namespace gpu_day {
namespace memory {

using T = ef::bfloat16;

/// Appends to a cache that is as long before each call.
template <typename Storage>
Prepare append(Index batch, Index tokens, Index before) {
  return [=](Memory& memory) -> Call {
    constexpr Index heads = 8, width = 128;
    const auto& device = memory.device();
    auto cache = std::make_shared<ef::KvCache<T, Storage>>(ef::memory_of(device));
    cache->reserve(1, batch, before + tokens, heads, width);
    if (before > 0) {
      auto rows = memory.tensor<T>(batch, before, heads, width);
      ef::update_kv_cache(device, *cache, rows, rows, 0);
    }
    auto keys = memory.tensor<T>(batch, tokens, heads, width);
    auto values = memory.tensor<T>(batch, tokens, heads, width);
    return [=, &memory] {
      cache->truncate(before);
      ef::update_kv_cache(memory.device(), *cache, keys, values, 0);
    };
  };
}

}  // namespace memory

inline void add_memory_rows(Rows& rows) {
  using namespace memory;
  constexpr double row = 2.0 * 8 * 128;  // keys and values of a token, in elements
  rows.push_back({"kv_cache", "update_kv_cache 4 x 2048 tokens bfloat16", 8192 * row * 4, 0,
                  Peak::none, append<T>(4, 2048, 0)});
  rows.push_back({"kv_cache", "update_kv_cache 4 x 2048 tokens int8", 8192 * row * 3, 0, Peak::none,
                  append<std::int8_t>(4, 2048, 0)});
  rows.push_back({"kv_cache", "update_kv_cache 64 x 1 token bfloat16", 64 * row * 4, 0, Peak::none,
                  append<T>(64, 1, 512)});
  rows.push_back({"embedding", "embedding 4096 tokens x 4096 bfloat16", mega(64), 0, Peak::none,
                  [](Memory& memory) -> Call {
                    auto table = memory.tensor<T>(Index{65536}, Index{4096});
                    auto y = memory.tensor<T>(Index{4096}, Index{4096});
                    auto ids = memory.ids(4096, 65536);
                    return [=, &memory] { ef::embedding_into(memory.device(), y, ids, table); };
                  }});
  rows.push_back({"embedding", "embedding_backward 4096 tokens x 4096 bfloat16", mega(32 + 128), 0,
                  Peak::none, [](Memory& memory) -> Call {
                    auto gradient = memory.tensor<float>(Index{65536}, Index{4096});
                    auto grad_y = memory.tensor<T>(Index{4096}, Index{4096});
                    auto ids = memory.ids(4096, 65536);
                    return [=, &memory] {
                      ef::embedding_backward_into(memory.device(), gradient, grad_y, ids);
                    };
                  }});
  rows.push_back({"causal_mask", "causal_mask 8 x 2048 x 2048 bfloat16", mega(64), 0, Peak::none,
                  [](Memory& memory) -> Call {
                    auto mask = memory.tensor<T>(Index{8}, Index{2048}, Index{2048});
                    return [=, &memory] { ef::causal_mask_into(memory.device(), mask); };
                  }});
  rows.push_back({"quantization", "quantize_weights_int8_per_channel 4096 x 4096 bfloat16",
                  mega(48), 0, Peak::none, [](Memory& memory) -> Call {
                    auto weights = memory.tensor<T>(Index{4096}, Index{4096});
                    auto values = memory.tensor<std::int8_t>(Index{4096}, Index{4096});
                    auto scales = memory.tensor<float>(Index{4096});
                    return [=, &memory] {
                      ef::quantize_weights_int8_per_channel_into(memory.device(), values, scales,
                                                                 weights);
                    };
                  }});
  rows.push_back({"quantization", "dequantize 4096 x 4096 bfloat16", mega(48), 0, Peak::none,
                  [](Memory& memory) -> Call {
                    auto weights = memory.tensor<T>(Index{4096}, Index{4096});
                    auto values = memory.tensor<std::int8_t>(Index{4096}, Index{4096});
                    auto scales = memory.tensor<float>(Index{4096});
                    return [=, &memory] {
                      ef::dequantize_into(memory.device(), weights, values, scales);
                    };
                  }});
}

}  // namespace gpu_day
