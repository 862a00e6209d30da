/// \file
/// CPU kernel of the gradients of attention (after Dao et al., "FlashAttention", 2022). With P the
/// probabilities:
///
///   dP = grad_out V^T     D_i = sum over j of P_ij dP_ij     dS = P * (dP - D) * softcap'
///   dV = P^T grad_out     dQ = scale * dS K     dK = scale * dS^T Q
///   dsink = -sum over rows of P_sink D
///
/// A task is (sequence, KV head); it holds keys, values and their gradients as panels of float. A
/// band is 192 of its query rows, for which the pairs with all keys they see are held: 1.5 KiB per
/// key in float. Four phases for each band: its rows are loaded (and the task's keys, once); scores
/// and dP by key block, with weights relative to the block's maximum; by rows, these come together
/// to P and dS, and dQ; by key block, what the band adds to dK and dV. So no product is made twice,
/// every sum has one order, and each phase has items for many threads, which take them in order
/// from one counter: even one KV head of one sequence feeds all. Bands of several tasks are at work
/// together where threads are many and sequences short.
///
/// Neither a rounded log_sum_exp nor a rounded output takes part: maximum, sum and D come from the
/// very scores and dP that P and dS are made of, and what cancels cancels: dP counts from that of
/// the row's greatest score, so that a row with nearly all weight on one key keeps the precision of
/// the small rest. Rows whose scores are too large for their rounding take them once more in
/// double. A pair that is not seen has P = dS = 0, and no operand holds NaN or infinity: rows that
/// see such an element get NaN for all that they see, and others are not touched by it. Flops: 10 *
/// head_dim for each visible pair, those of two and a half forward passes; one exp per pair.
///
/// bfloat16 is multiplied in pairs where the instruction set does so (backward/pairs.h): P and dS
/// are rounded for the last three products, after maximum, sum and D are known. It holds half as
/// much again for each pair of a band, and less for its keys.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>

#include "../backend.h"
#include "backward/keys.h"
#include "backward/load.h"
#include "backward/rows.h"
#include "backward/scores.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Bands at work at a time, where there are several workers: two for each, or as many as stay in
/// cache, since a phase begins when the one before is done; within the memory that a call may hold.
inline constexpr double kBackwardCache = 8 << 20, kBackwardBytes = 64 << 20;

template <typename C>
Index bands_at_once(const BackwardShape& s, Index workers) {
  if (workers == 1) return 1;
  const double band = 2.0 * sizeof(C) * static_cast<double>(s.rows) * static_cast<double>(s.keys),
               task = sizeof(C) * static_cast<double>(s.keys) *
                      static_cast<double>(3 * s.width + 2 * s.value_width),
               bytes = band + task + 1;
  const double wanted = (std::max)(2.0 * static_cast<double>(workers), kBackwardCache / bytes);
  return static_cast<Index>(std::clamp(kBackwardBytes / bytes, 1.0, wanted));
}

/// All that is held during a call.
template <typename C>
struct BackwardMemory {
  BandMemory<C>* bands;  // (at_once)
  TaskMemory<C>* tasks;  // (at_once)
  Index at_once;
  double* grad_sinks;  // (batch, heads) or nullptr

  const BandMemory<C>& of_band(Index band) const { return bands[band % at_once]; }
  const TaskMemory<C>& of_task(const AttentionBand& band) const {
    return tasks[band.task % at_once];
  }
};

template <typename Isa, typename T, typename C>
void run_item(const BackwardCall<Isa, T>& call, const BackwardPlan& plan,
              const BackwardMemory<C>& memory, const BackwardItem& item) {
  const AttentionBand& band = plan.band(item.band);
  const BandMemory<C>& m = memory.of_band(item.band);
  const TaskMemory<C>& task = memory.of_task(band);
  const Index i = item.index, groups = plan.groups(band), key_blocks = plan.key_blocks(band);
  constexpr Index group = BackwardCall<Isa, T>::kGroup;
  switch (item.phase) {
    case BackwardPhase::load: {
      const BackwardLoad load(call);
      if (i < groups) return load.load_rows(band, m, i * group);
      if (i < groups + key_blocks) return load.load_keys(band, task, i - groups);
      return load.write_padding(band);
    }
    case BackwardPhase::scores:
      return BackwardScores(call).score(band, m, task, i);
    case BackwardPhase::rows:
      return BackwardRows(call).finish_rows(band, m, task, i * group);
    case BackwardPhase::keys:
      break;
  }
  const BackwardKeys keys(call);
  for (Index b = item.first_band; b <= item.band; ++b) {
    const AttentionBand& at_work = plan.band(b);
    if (at_work.task != band.task) continue;
    if (i < key_blocks)
      keys.add_to_keys(at_work, memory.of_band(b), task, i);
    else if (memory.grad_sinks != nullptr)
      keys.add_sinks(at_work, memory.of_band(b),
                     memory.grad_sinks + band.task / call.f.kv_heads * call.f.heads);
  }
  if (i < key_blocks && band.closes) keys.store_keys(band, task, i);
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::AttentionBackward<T>& p) {
  using C = compute_type<T>;
  using Call = BackwardCall<Isa, T>;
  using Panels = AttentionPanels<C, Isa>;
  const auto& f = p.forward;
  Workspace::Frame frame(on.workspace);
  const bool sinks = p.grad_sinks != nullptr && f.sinks != nullptr;
  BackwardMemory<C> memory{};
  if (sinks) {
    memory.grad_sinks = frame.take<double>(f.batch * f.heads);
    std::fill_n(memory.grad_sinks, f.batch * f.heads, 0.0);
  }
  if (f.batch * f.kv_heads > 0) {
    const Index workers = attention_workers(on, f, worker_count(on));
    auto shape = BackwardShape::of(f, Panels{}, Call::kGroup);
    const BackwardPlan plan(f, Call::kGroup, bands_at_once<C>(shape, workers), frame);
    shape.blocks = plan.most_blocks();
    memory.at_once = plan.at_once();
    memory.bands = frame.take<BandMemory<C>>(memory.at_once);
    memory.tasks = frame.take<TaskMemory<C>>(memory.at_once);
    for (Index i = 0; i < memory.at_once; ++i) {
      memory.bands[i] = take_band<C>(shape, f.softcap > 0, Call::kPairs, frame);
      if (i < f.batch * f.kv_heads) memory.tasks[i] = take_task<C>(shape, Call::kPairs, frame);
    }
    auto* const scratch = frame.take<BackwardScratch<C>>(workers);
    for (Index w = 0; w < workers; ++w)
      scratch[w] = take_backward_scratch<C>(shape, Call::kGroup, f.softcap > 0, f.head_dim,
                                            Call::kPairs, frame);
    std::atomic<Index> next{0}, done{0};
    parallel_for(on, workers, kWorthAThread, [&](Index begin, Index end, int) {
      for (Index w = begin; w < end; ++w) {
        const Call call(p, shape, scratch[w]);
        // Whoever waits waits for items that somebody has taken before.
        for (Index i = next.fetch_add(1); i < plan.items(); i = next.fetch_add(1)) {
          const BackwardItem item = plan.item(i);
          spin_until((std::chrono::nanoseconds::max)(),
                     [&] { return done.load(std::memory_order_acquire) >= item.before; });
          run_item(call, plan, memory, item);
          done.fetch_add(1, std::memory_order_release);
        }
      }
    });
  }
  if (p.grad_sinks == nullptr) return;
  for (Index h = 0; h < f.heads; ++h) {
    double sum = 0;
    if (sinks)
      for (Index b = 0; b < f.batch; ++b) sum += memory.grad_sinks[b * f.heads + h];
    p.grad_sinks[h] = static_cast<float>(sum);
  }
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
