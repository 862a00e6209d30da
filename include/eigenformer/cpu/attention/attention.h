/// \file
/// CPU kernel of attention: tiles with an online softmax (Milakov and Gimelshein, "Online
/// normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022). A task is
/// (sequence, KV head, block of query positions); all heads of the group stand in one tile as rows
/// (position, head), so K and V are read and converted once for the group: a decode step reads each
/// byte of them once. Up to 8 rows read them where they lie (few_rows.h), those of several KV heads
/// in turn (heads.h). For each key block of 64: pack K transposed, V as rows, both as floats (INT8
/// keys and pairs of bfloat16 as such: int8_scores.h, pair_products.h); scores = Q K^T; online
/// softmax by row; sums = factor * sums + P V. Sums have three levels (a block, 16 blocks, all), so
/// that their errors do not grow with the number of keys. A row whose sums overflow, or whose
/// scores are too large for their rounding, goes over its keys once more, with scores and sums in
/// double. The 16 blocks are a fold: threads share those of a task where tasks are few. Flops: 4 *
/// rows * visible keys * head_dim; bytes: K and V once for each block of query rows; one exp per
/// score. The scores of a block are all that is ever held of the score matrix.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>

#include "../../core/workspace.h"
#include "../backend.h"
#include "heads.h"
#include "row.h"
#include "scratch.h"
#include "worker.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace cpu {

/// The tasks of a request, in order: of a sequence of few rows `together` KV heads at once.
template <typename Isa, typename Problem>
class AttentionTasks {
 public:
  AttentionTasks(const Problem& p, Index together, Workspace::Frame& frame)
      : p_(p),
        positions_(positions_per_block<Isa>(p)),
        together_(together),
        first_(frame.take<Index>(p.batch + 1)) {
    first_[0] = 0;
    for (Index b = 0; b < p.batch; ++b) {
      const problem::AttentionSequence& s = p.sequences[b];
      first_[b + 1] = first_[b] + blocks(s) * ((p.kv_heads + heads(s) - 1) / heads(s));
    }
  }

  Index count() const { return first_[p_.batch]; }
  AttentionTask operator[](Index task) const {
    const Index b = std::upper_bound(first_, first_ + p_.batch + 1, task) - first_ - 1;
    const problem::AttentionSequence& s = p_.sequences[b];
    const Index local = task - first_[b], first = local % blocks(s) * positions_,
                kv_head = local / blocks(s) * heads(s);
    return {&s, kv_head, (std::min)(heads(s), p_.kv_heads - kv_head), first,
            (std::min)(positions_, s.tensor_rows - first)};
  }

 private:
  Index blocks(const problem::AttentionSequence& s) const {
    return (s.tensor_rows + positions_ - 1) / positions_;
  }
  Index heads(const problem::AttentionSequence& s) const {
    return has_few_rows(p_, s) ? together_ : 1;
  }

  const Problem& p_;
  Index positions_, together_;
  Index* first_;
};

/// So many tasks for a worker leave none idle for long.
inline constexpr Index kTasksOfAWorker = 4;

/// KV heads of a task of few rows: as many as leave two tasks for every worker.
template <typename Backend, typename Problem>
Index heads_together(const Backend& on, const Problem& p, Index folds) {
  Index few = 0;
  for (Index b = 0; b < p.batch; ++b) few += has_few_rows(p, p.sequences[b]);
  if (few == 0 || p.kv_heads == 0) return 1;
  Index together = (std::min)(kHeadsTogether, p.kv_heads);
  if (const Index workers = worker_count(on); workers > 1)
    while (together > 1 && few * folds * ((p.kv_heads + together - 1) / together) < 2 * workers)
      together = (together + 1) / 2;
  return together;
}

/// body(index, worker's scratch) for every index, by whoever is free, from the last on: the last
/// block of a sequence sees the most keys, so what is left for the end is short.
template <typename Backend, typename Scratch, typename Body>
void for_each_task(const Backend& on, Index count, Index workers, Scratch* const* scratch,
                   Body&& body) {
  std::atomic<Index> left{count};
  parallel_for(on, workers, kWorthAThread, [&](Index begin, Index end, int) {
    for (Index w = begin; w < end; ++w)
      for (Index i; (i = left.fetch_sub(1, std::memory_order_relaxed) - 1) >= 0;)
        body(i, scratch[w]);
  });
}

/// Few tasks on many threads: each fold of a task by itself, then the folds of each put together.
/// As many tasks at a time as keep all workers busy: their states are all that is held.
template <typename D, typename Isa, typename TQ, typename TKV, typename Function, typename Tasks,
          typename Scratch>
void run_folds(const Backend<D, Isa>& on, const problem::Attention<TQ, TKV, Function>& p,
               const Tasks& tasks, Index together, Index folds, Index workers,
               Scratch* const* scratch, Workspace::Frame& frame) {
  using C = compute_type<TQ>;
  using Heads = AttentionHeads<Isa, TQ, TKV, Function>;
  using Tile = AttentionTile<C, Isa>;
  const Index most = (std::min)(tasks.count(), (kTasksOfAWorker * workers + folds - 1) / folds);
  Index positions = 0;
  for (Index t = 0; t < tasks.count(); ++t) positions = (std::max)(positions, tasks[t].count);
  auto* const states = frame.take<AttentionState<C>>(most * folds * together);
  for (Index i = 0; i < most * folds * together; ++i)
    states[i] =
        take_attention_state<Tile, C>(positions * p.group(), Tile::padded(p.value_dim), frame);
  for (Index first = 0; first < tasks.count(); first += most) {
    const Index count = (std::min)(most, tasks.count() - first);
    for_each_task(on, count * folds, workers, scratch, [&](Index i, const Scratch* s) {
      Heads(p, s).run_fold(tasks[first + i / folds], i % folds, states + i * together);
    });
    for_each_task(on, count, workers, scratch, [&](Index t, const Scratch* s) {
      Heads(p, s).finish_folds(tasks[first + t], states + t * folds * together, folds, together);
    });
  }
}

template <typename D, typename Isa, typename TQ, typename TKV, typename Function>
void execute(const Backend<D, Isa>& on, const problem::Attention<TQ, TKV, Function>& p) {
  using Scratch = AttentionScratch<compute_type<TQ>>;
  Workspace::Frame frame(on.workspace);
  Index longest = 0;
  for (Index b = 0; b < p.batch; ++b) longest = (std::max)(longest, p.sequences[b].key_length);
  const Index folds = (longest + kAttentionFold - 1) / kAttentionFold,
              together = heads_together(on, p, folds);
  const AttentionTasks<Isa, problem::Attention<TQ, TKV, Function>> tasks(p, together, frame);
  if (tasks.count() == 0) return;
  const bool split =
      folds > 1 && tasks.count() < kTasksOfAWorker * worker_count(on) && worker_count(on) > 1;
  const Index workers = attention_workers(on, p, split ? tasks.count() * folds : tasks.count());
  auto* const scratch = frame.take<Scratch*>(workers);
  const bool all_few = std::all_of(p.sequences, p.sequences + p.batch,
                                   [&](const auto& s) { return has_few_rows(p, s); });
  const Index rows = all_few ? 0 : positions_per_block<Isa>(p) * p.group();
  for (Index w = 0; w < workers; ++w) {
    scratch[w] = frame.take<Scratch>(together);
    for (Index h = 0; h < together; ++h)
      scratch[w][h] =
          take_attention_scratch<Isa>(p, (std::max)(h == 0 ? rows : 0, kAttentionFewRows), frame);
  }
  if (split && workers > 1)
    return run_folds(on, p, tasks, together, folds, workers, scratch, frame);
  for_each_task(on, tasks.count(), workers, scratch, [&](Index t, const Scratch* s) {
    AttentionHeads<Isa, TQ, TKV, Function>(p, s).run(tasks[t]);
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
