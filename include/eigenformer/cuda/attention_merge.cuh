/// \file
/// CUDA kernel that merges partial results of attention: a warp for each row and head. Every lane
/// goes over the states' log_sum_exp of the row, which the warp reads as one word each; then over
/// the outputs, 16 bytes per lane where all begin at such multiples. One read of every output and
/// one write, an exponential for each pack and state: 80% of the bandwidth is expected from some
/// thousand rows on, not measured yet.
#pragma once

#include <cmath>
#include <limits>
#include <span>

#include "../problem/attention_merge.h"
#include "packs.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
struct MergeAttention {
  using C = compute_type<T>;
  static constexpr int kThreads = 256, kWidth = pack_width<T>;
  static constexpr C kInfinity = std::numeric_limits<C>::infinity();
  problem::AttentionMerge<T> p;  // its states on the device

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    for_each_warp(block, p.lines(), [&](Index line) { merge(block, line); });
  }

 private:
  template <typename Block>
  EIGENFORMER_DEVICE void merge(Block& block, Index line) const {
    const Index at = p.log_sum_exp_at(line), begin = line * p.width;
    bool fit = packs_fit<kWidth>(p.output + begin, 0);
    C maximum = -kInfinity, sum = 0;
    for (Index i = 0; i < p.count; ++i) {
      const C x = p.states[i].log_sum_exp[at];
      if (x > maximum || x != x) maximum = x;  // NaN stays
      fit = fit && packs_fit<kWidth>(p.states[i].output + begin, 0);
    }
    for (Index i = 0; i < p.count; ++i)
      if (p.states[i].log_sum_exp[at] != -kInfinity) sum += weight(i, at, maximum);
    const C half_of = C(0.5) / sum;
    for (Index d = block.lane() * kWidth; d < p.width; d += kWarp * kWidth) {
      if (fit && d + kWidth <= p.width)
        add<kWidth>(at, begin + d, maximum, half_of);
      else
        for (Index i = d; i < d + kWidth && i < p.width; ++i)
          add<1>(at, begin + i, maximum, half_of);
    }
    block.warp_barrier();  // log_sum_exp may be that of a state
    if (block.lane() == 0 && p.log_sum_exp != nullptr)
      p.log_sum_exp[at] = maximum == -kInfinity ? maximum : maximum + std::log(sum);
  }

  EIGENFORMER_DEVICE C weight(Index i, Index at, C maximum) const {
    return std::exp(p.states[i].log_sum_exp[at] - maximum);
  }

  template <int Width>
  EIGENFORMER_DEVICE void add(Index at, Index to, C maximum, C half_of) const {
    Pack<C, Width> sums{};
    for (Index k = 0; k < p.count; ++k) {
      if (p.states[k].log_sum_exp[at] == -kInfinity) continue;
      const C factor = weight(k, at, maximum) * half_of;
      const auto pack = load_pack<C, Width>(p.states[k].output + to);
      for (int i = 0; i < Width; ++i) sums[i] = std::fma(pack[i], factor, sums[i]);
    }
    for (int i = 0; i < Width; ++i) sums[i] = twice(sums[i]);
    store_pack(sums, p.output + to);
  }
  /// Rounding must not take the greatest numbers out of their range.
  EIGENFORMER_DEVICE static C twice(C half_sum) {
    constexpr C most = (std::numeric_limits<C>::max)() / 2;
    if (std::fabs(half_sum) < kInfinity)
      half_sum = half_sum > most ? most : (half_sum < -most ? -most : half_sum);
    return half_sum + half_sum;
  }
};

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::AttentionMerge<T>& p) {
  constexpr auto name = "merge_attention_states";
  auto on_device = p;
  std::tie(on_device.states) = stage(
      on, name,
      std::span<const problem::AttentionState<T>>(p.states, static_cast<std::size_t>(p.count)));
  launch_warps(on, name, p.lines(), MergeAttention<T>{on_device});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
