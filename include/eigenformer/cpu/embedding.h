/// \file
/// CPU kernels of embedding: rows copied (and converted) from a table; bytes read and written, no
/// arithmetic. A row of a packed weight is a column of its panel, a unit of 4 bytes from each of
/// its lines, which move whole: no more than that panel, of which the head's product in the same
/// step reads all. Backward adds rows of grad_y to rows of grad_table in the order of tokens, each
/// thread a range of columns, so that equal ids meet in one fixed order.
#pragma once

#include "../core/rows.h"
#include "../problem/embedding.h"
#include "backend.h"
#include "linear/pack.h"
#include "vector/copy.h"
#include "vector/quantize_line.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename D, typename Isa, typename Y, typename T, typename Id>
void execute(const Backend<D, Isa>& on, const problem::Embedding<Y, T, Id>& p) {
  parallel_for(on, p.tokens, Cost{p.features}, [&](Index first, Index last, int) {
    for (Index token = first; token < last; ++token) {
      const T* row = p.table + static_cast<Index>(p.ids[token]) * p.features;
      Y* y = p.y + token * p.features;
      copy_line<Isa>(row, y, p.features);
    }
  });
}

template <typename D, typename Isa, typename Y, typename Id>
void execute(const Backend<D, Isa>& on, const problem::Int8Embedding<Y, Id>& p) {
  parallel_for(on, p.tokens, Cost{p.features}, [&](Index first, Index last, int) {
    for (Index token = first; token < last; ++token) {
      const Index id = static_cast<Index>(p.ids[token]);
      dequantize_line<Isa>(p.table + id * p.features, p.features, p.scales[id],
                           p.y + token * p.features);
    }
  });
}

template <typename D, typename Isa, typename Y, typename S, typename Id>
void execute(const Backend<D, Isa>& on, const problem::PackedEmbedding<Y, S, Id>& p) {
  using Dot = tile::Dot<S, S, Isa>;
  constexpr Index kChunk = 256;  // a multiple of every group size but the whole depth
  constexpr double kStridedCycles = 4;
  require_layout(Isa{}, p.table, "embedding");
  const Index depth = p.table.columns,
              panel_size = tile::packed_steps<S>(Isa{}, depth) * tile::panel_step<Dot>;
  const ScaleGroups groups(depth, p.table.group);
  parallel_for(on, p.tokens, Cost{depth, kStridedCycles}, [&](Index first, Index last, int) {
    alignas(64) S row[kChunk];
    for (Index token = first; token < last; ++token) {
      const Index id = static_cast<Index>(p.ids[token]), panel = id / Dot::columns,
                  column = id % Dot::columns;
      Y* y = p.y + token * depth;
      for (Index k = 0; k < depth; k += kChunk, y += kChunk) {
        const Index count = (std::min)(kChunk, depth - k);
        tile::unpack_column<Dot>(p.table.data + panel * panel_size, column, k, count, row);
        if constexpr (std::is_same_v<S, std::int8_t>) {
          for (Index at = 0; at < count; at += groups.each) {
            const Index group = (k + at) / groups.each,
                        own = (panel * groups.count + group) * Dot::columns + column;
            dequantize_line<Isa>(row + at, (std::min)(groups.each, count - at),
                                 p.table.half_scales != nullptr
                                     ? static_cast<float>(p.table.half_scales[own])
                                     : p.table.scales[own],
                                 y + at);
          }
        } else {
          copy_line<Isa>(row, y, count);
        }
      }
    }
  });
}

template <typename D, typename Isa, typename G, typename GY, typename Id>
void execute(const Backend<D, Isa>& on, const problem::EmbeddingBackward<G, GY, Id>& p) {
  using V = simd::Vec<typename problem::EmbeddingBackward<G, GY, Id>::compute, Isa>;
  constexpr Index kColumns = 64;  // of float four cache lines: threads share few of them
  const Index blocks = (p.features + kColumns - 1) / kColumns;
  parallel_for(on, blocks, Cost{p.tokens * kColumns},
               [&](Index first_block, Index last_block, int) {
                 const Index first = first_block * kColumns,
                             last = (std::min)(last_block * kColumns, p.features);
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
