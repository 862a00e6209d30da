/// \file
/// The last phase of attention's backward pass: gradients of keys and values.
#pragma once

#include <algorithm>

#include "call.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename Isa, typename T>
class BackwardKeys {
  using Call = BackwardCall<Isa, T>;
  using C = compute_type<T>;
  using Panels = typename Call::Panels;
  using V = typename Panels::V;
  using Band = AttentionBand;
  using Memory = BandMemory<C>;
  static constexpr Index kBlock = kAttentionKeyBlock;
  static constexpr int kPanel = Panels::kPanel, kRows = Call::kRows;

 public:
  explicit BackwardKeys(const Call& call) : on_(call) {}

  /// What the pairs of key block n with a band add to its gradients.
  void add_to_keys(const Band& band, const Memory& m, const TaskMemory<C>& task, Index n) const {
    const Index begin = n * kBlock;
    const Index* const end = m.blocks + band.blocks;
    const Index* const at = std::lower_bound<const Index*>(m.blocks, end, begin);
    if (at == end || *at != begin) return;
    const Index local = at - m.blocks, tiles = (on_.rows(band) + kRows - 1) / kRows;
    const PanelRange* const panels = m.panels + local * (on_.shape.rows / kRows);
    for (int p = 0; p < Panels::kPanels; ++p) {
      Index first = tiles, last = -1;
      for (Index t = 0; t < tiles; ++t)
        if (panels[t].begin <= p && p < panels[t].end) {
          first = (std::min)(first, t);
          last = t;
        }
      if (last < 0) continue;
      const Index top = first * kRows, count = (last + 1 - first) * kRows;
      const Index width = on_.shape.width, value_width = on_.shape.value_width;
      C *const values = task.grad_values + begin * value_width, *const keys =
                                                                    task.grad_keys + begin * width;
      if constexpr (Call::kPairs) {
        add_pairs(on_.row_pairs(m.weight_pairs, local, top, p), m.grad_output_across, top, count,
                  value_width, values + p * kPanel * value_width);
        add_pairs(on_.row_pairs(m.grad_pairs, local, top, p), m.queries_across, top, count, width,
                  keys + p * kPanel * width);
      } else {
        add_products(on_.pairs(m.weights, local, top, p), m.grad_output + top * kPanel, count,
                     value_width, values + p * kPanel * kPanel);
        add_products(on_.pairs(m.grads, local, top, p), m.queries + top * kPanel, count, width,
                     keys + p * kPanel * kPanel);
      }
    }
  }

  void store_keys(const Band& band, const TaskMemory<C>& task, Index n) const {
    const Index begin = n * kBlock, count = (std::min)(kBlock, band.sequence->key_length - begin);
    if constexpr (Call::kPairs) {
      for (Index j = 0; j < count; j += Panels::lanes) {
        Call::Pairs::store_keys(task.grad_keys + begin * on_.shape.width, on_.shape.width, j, count,
                                on_.f.scale, on_.f.head_dim,
                                [&](Index i) { return on_.key_gradient(band, begin + i); });
        Call::Pairs::store_keys(task.grad_values + begin * on_.shape.value_width,
                                on_.shape.value_width, j, count, C(1), on_.f.value_dim,
                                [&](Index i) { return on_.value_gradient(band, begin + i); });
      }
      return;
    }
    for (Index j = 0; j < count; ++j) {
      Panels::store_row(task.grad_keys + begin * on_.shape.width, j, Panels::kBlockStride, C(1),
                        on_.f.head_dim, on_.key_gradient(band, begin + j));
      Panels::store_row(task.grad_values + begin * on_.shape.value_width, j, Panels::kBlockStride,
                        C(1), on_.f.value_dim, on_.value_gradient(band, begin + j));
    }
  }

  /// sums (heads): of this sequence.
  void add_sinks(const Band& band, const Memory& m, double* sums) const {
    for (Index r = 0; r < on_.rows(band); ++r) sums[on_.head(band, r)] += m.sink_terms[r];
  }

 private:
  /// to (width, panel), transposed, += `count` rows from `top` on of a matrix by pairs of these.
  void add_pairs(const std::uint32_t* pairs, const std::uint32_t* matrix, Index top, Index count,
                 Index width, C* to) const {
    Call::Pairs::add_transposed(matrix, width, on_.shape.rows, top, count,
                                reinterpret_cast<const bfloat16*>(pairs), to);
  }

  /// to (width panels of 64 rows) += a^T * matrix, `count` rows of both.
  void add_products(const C* a, const C* matrix, Index count, Index width, C* to) const {
    for (Index c = 0; c < width; c += kPanel)
      Panels::for_column_tiles([&](auto tile, int column) {
        V sum[decltype(tile)::value][2];
        Panels::clear(sum);
        Panels::multiply_transposed(a + column, matrix + c / kPanel * on_.shape.stride, count, sum);
        Panels::add(sum, to + c * kBlock + column * kPanel);
      });
  }

  const Call& on_;
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
