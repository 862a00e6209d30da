/// \file
/// CPU kernels of embedding: rows copied (and converted) from a table; bytes read and written, no
/// arithmetic. Backward adds rows of grad_y to rows of grad_table in the order of tokens, each
/// thread a range of columns, so that equal ids meet in one fixed order.
#pragma once

#include <cstring>

#include "../core/device.h"
#include "../core/rows.h"
#include "vector_loop.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// A checked request: pointers and sizes only; ids are in [0, vocab).
template <typename Y, typename T, typename Id>
struct EmbeddingProblem {
  using compute = common_compute_type<Y, T>;
  Y* y;            // (tokens, features)
  const Id* ids;   // (tokens)
  const T* table;  // (vocab, features)
  Index tokens, features;
};

template <typename G, typename GY, typename Id>
struct EmbeddingBackwardProblem {
  using compute = common_compute_type<G, GY>;
  G* grad_table;     // (vocab, features), added to
  const GY* grad_y;  // (tokens, features)
  const Id* ids;     // (tokens)
  Index tokens, features;
};

namespace cpu {

template <typename Isa, CpuDevice D, typename Y, typename T, typename Id>
void embedding(Isa, const D& device, const EmbeddingProblem<Y, T, Id>& p) {
  using V = simd::Vec<typename EmbeddingProblem<Y, T, Id>::compute, Isa>;
  parallel_for(device, p.tokens, rows_per_task(p.features), [&](Index first, Index last, int) {
    for (Index token = first; token < last; ++token) {
      const T* row = p.table + static_cast<Index>(p.ids[token]) * p.features;
      Y* y = p.y + token * p.features;
      if constexpr (std::is_same_v<Y, T>) {
        if (p.features > 0)
          std::memcpy(static_cast<void*>(y), row, static_cast<std::size_t>(p.features) * sizeof(T));
      } else {
        for_each_vector<V>(0, p.features, [&](Index at, auto part) {
          store(load<V>(row + at, part), y + at, part);
        });
      }
    }
  });
}

template <typename Isa, CpuDevice D, typename G, typename GY, typename Id>
void embedding_backward(Isa, const D& device, const EmbeddingBackwardProblem<G, GY, Id>& p) {
  using V = simd::Vec<typename EmbeddingBackwardProblem<G, GY, Id>::compute, Isa>;
  const Index grain = std::max<Index>(
      64, rows_per_task(p.tokens));  // 64 floats are four cache lines: threads share few of them
  parallel_for(device, p.features, grain, [&](Index first, Index last, int) {
    for (Index token = 0; token < p.tokens; ++token) {
      G* row = p.grad_table + static_cast<Index>(p.ids[token]) * p.features;
      const GY* grad_y = p.grad_y + token * p.features;
      for_each_vector<V>(first, last, [&](Index at, auto part) {
        store(load<V>(row + at, part) + load<V>(grad_y + at, part), row + at, part);
      });
    }
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
