// A random attention case of any shape with NaN in all memory that must not be read, its reference,
// and the option sets to sweep.
#pragma once

#include <eigenformer/attention.h>
#include <eigenformer/reference/attention.h>

#include "compare.h"

namespace eigenformer_test {

struct AttentionShape {
  Index batch, queries, keys, heads, kv_heads, head_dim, value_dim;
};

template <typename T>
struct AttentionCase {
  AttentionShape shape;
  // query_lengths: what the operator must find out, or was told
  std::vector<Index> key_lengths, query_lengths;
  ef::Tensor<T, 4> q, k, v;

  AttentionCase(const AttentionShape& s, std::vector<Index> lengths, unsigned seed = 1,
                std::vector<Index> ragged = {})
      : shape(s),
        key_lengths(std::move(lengths)),
        query_lengths(std::move(ragged)),
        q(random_tensor<T, 4>({s.batch, s.queries, s.heads, s.head_dim}, seed)),
        k(random_tensor<T, 4>({s.batch, s.keys, s.kv_heads, s.head_dim}, seed + 1)),
        v(random_tensor<T, 4>({s.batch, s.keys, s.kv_heads, s.value_dim}, seed + 2)) {
    if (query_lengths.empty())
      for (const Index length : key_lengths)
        query_lengths.push_back(s.queries == s.keys ? length : s.queries);
    poison();
  }

  void poison() {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    for (Index b = 0; b < shape.batch; ++b) {
      for (Index i = query_lengths[static_cast<std::size_t>(b)]; i < shape.queries; ++i)
        for (Index x = 0; x < shape.heads * shape.head_dim; ++x) (&q(b, i, 0, 0))[x] = nan;
      for (Index j = key_lengths[static_cast<std::size_t>(b)]; j < shape.keys; ++j) {
        for (Index x = 0; x < shape.kv_heads * shape.head_dim; ++x) (&k(b, j, 0, 0))[x] = nan;
        for (Index x = 0; x < shape.kv_heads * shape.value_dim; ++x) (&v(b, j, 0, 0))[x] = nan;
      }
    }
  }

  ef::reference::AttentionResult reference(const ef::AttentionOptions& options) const {
    return ef::reference::attention(to_double(q), to_double(k), to_double(v), key_lengths,
                                    query_lengths, options);
  }
};

/// Slopes and sinks live here as long as the options.
struct NamedOptions {
  std::string name;
  ef::AttentionOptions options;
};

inline const std::vector<float>& test_slopes() {
  static const std::vector<float> slopes{0.5f, 0.25f, 0.125f, 0.0625f, 0.4f, 0.2f, 0.1f, 0.05f};
  return slopes;
}
inline const std::vector<float>& test_sinks() {
  static const std::vector<float> sinks{0.5f, -1.0f, 2.0f,  -std::numeric_limits<float>::infinity(),
                                        0.0f, 1.5f,  -3.0f, 4.0f};
  return sinks;
}

/// Every option alone, and together where they interact; for up to 8 heads.
inline std::vector<NamedOptions> option_sweep(Index heads) {
  const std::span<const float> slopes(test_slopes().data(), static_cast<std::size_t>(heads));
  const std::span<const float> sinks(test_sinks().data(), static_cast<std::size_t>(heads));
  return {{"plain", {}},
          {"causal", {.causal = true}},
          {"window 1", {.causal = true, .window = 1}},
          {"window 5", {.causal = true, .window = 5}},
          {"window 70", {.causal = true, .window = 70}},
          {"softcap", {.softcap = 2.0f}},
          {"scale", {.scale = 0.25f}},
          {"scale 0", {.causal = true, .scale = 0.0f}},
          {"negative scale", {.causal = true, .scale = -0.5f}},
          {"alibi", {.causal = true, .alibi_slopes = slopes}},
          {"alibi both ways", {.alibi_slopes = slopes}},
          {"sinks", {.sinks = sinks}},
          {"prefix", {.causal = true, .prefix_length = 9}},
          {"prefix and window", {.causal = true, .window = 3, .prefix_length = 66}},
          {"all",
           {.causal = true,
            .window = 20,
            .softcap = 3.0f,
            .scale = 0.3f,
            .alibi_slopes = slopes,
            .sinks = sinks,
            .prefix_length = 4}}};
}

/// Integer scores times `scale`, exact in every scalar: k is (0 to 10 eighths, noise, noise), q (1,
/// 0, 0), so that keys tie and differ.
template <typename T, typename Case>
void set_exact_scores(Case& c) {
  for (Index r = 0; r < c.q.size() / 3; ++r) {
    c.q.data()[3 * r] = static_cast<T>(1.0f);
    c.q.data()[3 * r + 1] = c.q.data()[3 * r + 2] = static_cast<T>(0.0f);
  }
  for (Index j = 0; j < c.k.size() / 3; ++j)
    c.k.data()[3 * j] = static_cast<T>(static_cast<float>(j * 7 % 11) / 8);
}

}  // namespace eigenformer_test
