/// \file
/// CUDA kernel of the chains that most calls ask for, temperature, top-k, top-p and min-p in any
/// order and a draw: one block per row, that reads it once where top-k leaves a list
/// (best_list.cuh) on which all other steps work.
#pragma once

#include <algorithm>

#include "best_list.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Whether DrawKernel runs all stages of the parameters.
inline bool is_common_chain(const problem::RowParams& params) {
  return std::all_of(params.order.begin(), params.order.end(), [&](SamplingStage stage) {
    switch (stage) {
      case SamplingStage::none:
      case SamplingStage::top_k:
        return true;
      case SamplingStage::temperature:
        return params.dynatemp_range == 0;
      case SamplingStage::top_p:
      case SamplingStage::min_p:
        return params.min_tokens_to_keep == 1;
      default:
        return false;
    }
  });
}

template <typename T>
struct DrawKernel {
  using C = compute_type<T>;
  static constexpr int kThreads = kDrawThreads;
  problem::Sampling<T> p;  // params and generators on the device

  static constexpr std::size_t shared() {
    return sampling_arrays_bytes<C, kThreads>() + best_list_bytes<C>();
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto arrays = sampling_arrays<C, kThreads>(block);
    const auto list = best_list<C>(block);
    for (Index r = block.index(); r < p.batch; r += block.count()) {
      SamplingRow<T> row{p.logits + r * p.vocab, nullptr, p.vocab, {}, 1.0};
      GroupMaxima<T> most;
      const SampleStatus status = scan_groups(block, arrays, row, most);
      std::int32_t id = -1;
      if (status == SampleStatus::ok) {
        const Index listed = filter(block, arrays, list, row, most, p.params_of(r));
        id = listed > 0 ? draw_listed(block, arrays, list, row, listed, p.uniform(r))
                        : draw_in_order(block, arrays.sums, p.vocab, p.uniform(r), weights_of(row));
      }
      if (block.thread() == 0) p.finish(r, id, status);
      block.barrier();  // the next row's scratch
    }
  }

 private:
  /// The tokens in play are the first of the list, as many as it returns; those of the row's band
  /// where that is 0.
  template <typename Block, typename Arrays, typename List>
  EIGENFORMER_DEVICE EIGENFORMER_INLINE Index filter(Block& block, const Arrays& arrays,
                                                     const List& list, SamplingRow<T>& row,
                                                     const GroupMaxima<T>& most,
                                                     const problem::RowParams& params) const {
    Index listed = 0;
    bool filtered = false;  // the row
    for (const SamplingStage stage : params.order) {
      if (stage == SamplingStage::none) continue;
      if (stage == SamplingStage::temperature && params.temperature != 0.0) {
        row.inverse_temperature = problem::inverse_temperature(params.temperature);
        continue;
      }
      const bool is_top_k = stage == SamplingStage::top_k;
      if (is_top_k && params.top_k >= p.vocab) continue;
      if (listed == 0 && !filtered && (is_top_k || stage == SamplingStage::temperature)) {
        listed = list_best(block, arrays, list, row, most, is_top_k ? params.top_k : 1,
                           is_top_k ? params.top_k_ties : TopKTies::lowest_index);
        if (listed > 0) continue;
      }
      if (listed > 0)
        listed = filter_list(block, arrays, list, row, listed, stage, params);
      else
        filter_row(block, arrays, row, stage, params);
      filtered = true;
    }
    return listed;
  }

  template <typename Block, typename Arrays, typename List>
  EIGENFORMER_DEVICE EIGENFORMER_INLINE Index filter_list(Block& block, const Arrays& arrays,
                                                          const List& list,
                                                          const SamplingRow<T>& row, Index listed,
                                                          SamplingStage stage,
                                                          const problem::RowParams& params) const {
    if (stage == SamplingStage::top_p)
      return listed_top_p(block, arrays, list, row, listed, params.top_p);
    if (stage == SamplingStage::min_p)
      return listed_min_p(block, arrays, list, row, listed, params.min_p);
    return 1;  // of temperature 0, or the list was one of it
  }

  template <typename Block, typename Arrays>
  EIGENFORMER_DEVICE EIGENFORMER_INLINE void filter_row(Block& block, const Arrays& arrays,
                                                        SamplingRow<T>& row, SamplingStage stage,
                                                        const problem::RowParams& params) const {
    if (stage == SamplingStage::temperature) set_temperature(block, arrays, row, 0.0);
    if (stage == SamplingStage::top_k)
      keep_top_k(block, arrays, row, params.top_k, params.top_k_ties);
    if (stage == SamplingStage::top_p) keep_top_p(block, arrays, row, params.top_p);
    if (stage == SamplingStage::min_p) keep_min_p(block, arrays, row, params.min_p);
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
