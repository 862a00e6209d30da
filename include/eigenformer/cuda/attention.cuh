/// \file
/// CUDA kernels of attention forward. For one 16-bit scalar of queries, keys and values: tiles on
/// the tensor cores (attention_tiles.cuh), and warps of their own where no sequence has more than 16
/// rows for a KV head and there are no masks (attention_steps.cuh). For all others the kernel here: a block of 64 threads
/// per query row and head, online softmax (Milakov and Gimelshein, "Online normalizer calculation
/// for softmax", 2018) over key blocks of 64 at absolute positions, in splits of 512 keys that are
/// merged in order (attention_call.cuh), so that the bits of a row depend on nothing but what it
/// sees. Where rows and heads do not fill the device, a block has one split only.
///
/// Of a key block a thread takes the score of one key, then some columns of a quarter of the
/// values, 16 bytes at a time where they are aligned: sums of 64 keys in the compute type, of all
/// blocks in double. A split whose greatest score is so large that its rounding would show goes
/// over its keys once more with scores in double.
///
/// Masks and biases are read by the thread of the key, neighbours side by side; the kernel that
/// knows them has a third more registers than the one without.
///
/// 4 * head_dim flops a visible pair. Every row reads its keys and values itself, once: queries of
/// one group and neighbouring rows find them in L2, so that decoding (one row a sequence) reads
/// them from memory about once and should see half of the bandwidth with splits to fill the device,
/// a third with INT8 and large groups; prefill is bound by L2.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_call.cuh"
#include "attention_steps.cuh"
#include "attention_tiles.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

inline constexpr int kAttentionKeys = 64;  // of a block: one per thread

/// Shared memory of a block.
template <typename Sums, typename Weights, typename Values>
struct AttentionArrays {
  Weights query;     // (head_dim), scaled
  Weights quarters;  // (4, value_dim) of a key block
  Sums sums;         // (value_dim) of a split, each of one thread
  Sums totals;       // (value_dim) of the splits before it
  Weights weights;   // (64) of a key block; negative: not seen
  Weights scales;    // (64) of its values
  Values values;     // (64) their rows
  Sums scratch;      // (warps)
};

template <typename TQ, typename TKV, typename Function, bool Masked>
struct AttentionRows {
  using Call = AttentionCall<TQ, TKV, Function>;
  using C = typename Call::C;
  static constexpr int kThreads = kAttentionKeys, kWarps = kThreads / kWarp;
  static constexpr bool kInt8 = std::is_same_v<TKV, std::int8_t>;
  /// Weights are made smaller, so that sums of finite values are finite: of 64 keys in float, of
  /// all in double.
  static constexpr double kFactor = sizeof(C) == 8 ? 0x1p-46 : 0x1p-6;
  Call call;
  Index splits;          // 0: a block has all of its row
  AttentionPart* parts;  // (rows, heads, splits)
  double* part_sums;     // (rows, heads, splits, value_dim)

  static std::size_t shared_size(Index head_dim, Index value_dim) {
    return shared_bytes<C>(head_dim) + shared_bytes<C>(4 * value_dim) +
           2 * shared_bytes<double>(value_dim) + 2 * shared_bytes<C>(kThreads) +
           shared_bytes<const TKV*>(kThreads) + shared_bytes<double>(kWarps);
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto& p = call.p;
    const auto query = block.template shared<C>(p.head_dim);
    const auto quarters = block.template shared<C>(4 * p.value_dim);
    const auto sums = block.template shared<double>(p.value_dim);
    const auto totals = block.template shared<double>(p.value_dim);
    const auto weights = block.template shared<C>(kThreads);
    const auto scales = block.template shared<C>(kThreads);
    const auto values = block.template shared<const TKV*>(kThreads);
    const auto scratch = block.template shared<double>(kWarps);
    const AttentionArrays<decltype(sums), decltype(weights), decltype(values)> arrays{
        query, quarters, sums, totals, weights, scales, values, scratch};
    const Index each = splits > 0 ? splits : 1;
    for (Index at = block.index(); at < call.row_count * p.heads * each; at += block.count()) {
      const AttentionQuery q = call.query_at(at / each);
      if (splits > 0)
        attend_split(block, arrays, q, at);
      else
        attend(block, arrays, q);
    }
  }

 private:
  template <typename Block, typename A>
  EIGENFORMER_DEVICE void attend_split(Block& block, const A& arrays, const AttentionQuery& q,
                                       Index at) const {
    const Index first = at % splits * kSplitKeys;
    if (!q.sees_any(first, first + kSplitKeys)) return;
    load_query(block, arrays, q);
    const AttentionPart part = part_of(block, arrays, q, first);
    if (block.thread() == 0) parts[at] = part;
    for (Index d = block.thread(); d < call.p.value_dim; d += block.size())
      part_sums[at * call.p.value_dim + d] = arrays.sums.load(d);
  }

  template <typename Block, typename A>
  EIGENFORMER_DEVICE void attend(Block& block, const A& arrays, const AttentionQuery& q) const {
    const Index value_dim = call.p.value_dim;
    AttentionPart all;
    if (q.sees_any()) load_query(block, arrays, q);
    for (Index d = block.thread(); d < value_dim; d += block.size()) arrays.totals.store(d, 0.0);
    for (Index first = q.begin() / kSplitKeys * kSplitKeys; first < q.end(); first += kSplitKeys) {
      if (!q.sees_any(first, first + kSplitKeys)) continue;
      const auto merged = merge_parts<double>(all, part_of(block, arrays, q, first));
      for (Index d = block.thread(); d < value_dim; d += block.size())
        arrays.totals.store(d, merge_sums(merged, arrays.totals.load(d), arrays.sums.load(d)));
      all = merged.part;
    }
    const auto end = call.end_of(q, all);
    if (block.thread() == 0) call.write_log_sum_exp(q, end.log_sum_exp);
    TQ* const to = call.p.output + call.index_of(q) * value_dim;
    for (Index d = block.thread(); d < value_dim; d += block.size())
      to[d] = end.factor == 0 ? TQ(0)
                              : call.output_of(arrays.totals.load(d) * (end.factor / kFactor / 2));
  }

  template <typename Block, typename A>
  EIGENFORMER_DEVICE void load_query(Block& block, const A& arrays, const AttentionQuery& q) const {
    const TQ* const query = call.query(q);
    for (Index d = block.thread(); d < call.p.head_dim; d += block.size())
      arrays.query.store(d, scaled_query<C>(q, query, d));
    block.barrier();
  }

  /// Element d of a query, times all that keys and scores have in common.
  template <typename S>
  EIGENFORMER_DEVICE S scaled_query(const AttentionQuery& q, const TQ* query, Index d) const {
    const S result = static_cast<S>(query[d]) * static_cast<S>(call.p.scale);
    if constexpr (kInt8)
      if (const float* const channels = call.p.source.key_channel_scales; channels != nullptr)
        return result * static_cast<S>(channels[q.head / call.group * call.p.head_dim + d]);
    return result;
  }

  /// The split from key `first` on; leaves its weighted sums of the values.
  template <typename Block, typename A>
  EIGENFORMER_DEVICE AttentionPart part_of(Block& block, const A& arrays, const AttentionQuery& q,
                                           Index first) const {
    const AttentionPart part = pass_over_keys<C>(block, arrays, q, first);
    // all threads of the block, or none
    if (is_large_score<TQ, TKV>(part.maximum) && part.weights > 0 && part.weights < call.kInfinity)
      return pass_over_keys<double>(block, arrays, q, first);
    return part;
  }

  /// Scores are of S.
  template <typename S, typename Block, typename A>
  EIGENFORMER_DEVICE AttentionPart pass_over_keys(Block& block, const A& arrays,
                                                  const AttentionQuery& q, Index first) const {
    for (Index d = block.thread(); d < call.p.value_dim; d += block.size())
      arrays.sums.store(d, 0.0);
    double maximum = -call.kInfinity, weights = 0;  // the weights of this thread
    bool any_seen = false;
    const Index last = first + kSplitKeys < q.end() ? first + kSplitKeys : q.end();
    for (Index begin = first; begin < last; begin += kAttentionKeys) {
      if (!q.sees_any(begin, begin + kAttentionKeys)) continue;
      const bool seen = call.template sees<Masked>(q, begin + block.thread());
      any_seen = any_seen || (Masked && seen);
      const double score =
          seen ? static_cast<double>(score_of<S>(block, arrays, q, begin)) : -call.kInfinity;
      const double before = maximum;
      maximum = LargerOrNan{}(before, reduce_block(block, arrays.scratch, score, LargerOrNan{}));
      const bool nothing = maximum == -call.kInfinity;  // all scores so far are -infinity
      const double fall = nothing ? 1.0 : std::exp(before - maximum);
      const C weight =
          std::exp(static_cast<C>(static_cast<S>(score) - static_cast<S>(nothing ? 0.0 : maximum)));
      weights = std::fma(weights, fall, seen ? static_cast<double>(weight) : 0.0);
      arrays.weights.store(block.thread(), seen ? weight * static_cast<C>(kFactor) : C(-1));
      block.barrier();
      add_values(block, arrays, fall);
    }
    weights = reduce_block(block, arrays.scratch, weights, Add{});
    if (!Masked || weights != 0) return {maximum, weights, true};
    // all scores are -infinity, or there are none
    any_seen = reduce_block(block, arrays.scratch, any_seen ? 1.0 : 0.0, Larger{}) > 0;
    return {maximum, weights, any_seen};
  }

  /// The score of this thread's key, and where its value is.
  template <typename S, typename Block, typename A>
  EIGENFORMER_DEVICE S score_of(Block& block, const A& arrays, const AttentionQuery& q,
                                Index begin) const {
    const auto& p = call.p;
    const Index b = q.s->key_sequence, h = q.head / call.group, j = begin + block.thread(),
                at = q.s->key_begin + j;
    arrays.values.store(block.thread(), call.rows.row(true, b, h, at));
    const TQ* const query = call.query(q);
    S product = key_product<S, C>(call.rows.row(false, b, h, at), p.head_dim, [&](Index d) {
      if constexpr (std::is_same_v<S, C>)
        return arrays.query.load(d);
      else
        return scaled_query<S>(q, query, d);
    });
    if constexpr (kInt8) {
      product *= static_cast<S>(*call.rows.scale(false, b, h, at));
      arrays.scales.store(block.thread(), static_cast<C>(*call.rows.scale(true, b, h, at)));
    }
    return problem::score_of_product<S, Masked>(p, p.function, call.score_row(q), j, product).value;
  }

  /// sums * fall + what the values of a key block add: 16 threads for each quarter of its keys, in
  /// order, then the quarters.
  template <typename Block, typename A>
  EIGENFORMER_DEVICE void add_values(Block& block, const A& arrays, double fall) const {
    constexpr int width = kKeyPack<TKV>, keys = kAttentionKeys / 4;
    const Index value_dim = call.p.value_dim;
    const int quarter = block.thread() / 16;
    for (Index d = block.thread() % 16 * width; d < value_dim; d += 16 * width) {
      C sums[width] = {};
      for (int i = quarter * keys; i < (quarter + 1) * keys; ++i) {
        const C weight = arrays.weights.load(i);
        if (weight < 0) continue;
        C scale = 1;
        if constexpr (kInt8) scale = arrays.scales.load(i);
        const auto pack = row_pack<width>(arrays.values.load(i), d, value_dim);
        EIGENFORMER_UNROLL_ALL
        for (int k = 0; k < width; ++k)
          sums[k] = std::fma(weight, static_cast<C>(pack[k]) * scale, sums[k]);
      }
      EIGENFORMER_UNROLL_ALL
      for (int k = 0; k < width; ++k)
        if (d + k < value_dim) arrays.quarters.store(quarter * value_dim + d + k, sums[k]);
    }
    block.barrier();
    for (Index d = block.thread(); d < value_dim; d += block.size()) {
      const auto of = [&](int i) { return arrays.quarters.load(i * value_dim + d); };
      const C sum = (of(0) + of(1)) + (of(2) + of(3));
      arrays.sums.store(d, std::fma(arrays.sums.load(d), fall, static_cast<double>(sum)));
    }
  }
};

/// Bytes that splits may leave for MergeSplits.
inline constexpr Index kMostSplitBytes = Index{256} << 20;

/// Into how many splits each of `rows` goes: 0 where its block takes them all, since there is one
/// at most, `blocks` fill the device, or what they leave takes too much memory.
template <typename S>
Index splits_of(Index rows, Index value_dim, Index longest, Index blocks, Index enough) {
  const Index all = (longest + kSplitKeys - 1) / kSplitKeys,
              bytes = static_cast<Index>(sizeof(AttentionPart)) +
                      static_cast<Index>(sizeof(S)) * value_dim;  // of a split of a row
  return all > 1 && blocks < enough && all <= kMostSplitBytes / bytes / rows ? all : 0;
}

/// Blocks that fill a device: fewer are split, where there is something to split.
inline constexpr Index kEnoughRowBlocks = 1024;

template <bool Masked, typename D, typename TQ, typename TKV, typename Function>
void launch_attention_rows(const Backend<D>& on, const AttentionCall<TQ, TKV, Function>& call,
                           Index longest) {
  constexpr auto name = "attention";
  using Kernel = AttentionRows<TQ, TKV, Function, Masked>;
  const auto& p = call.p;
  const std::size_t shared = Kernel::shared_size(p.head_dim, p.value_dim);
  const Index rows = call.row_count * p.heads,
              splits = splits_of<double>(rows, p.value_dim, longest, rows, kEnoughRowBlocks);
  if (splits == 0) return launch_rows(on, name, rows, shared, Kernel{call, 0, nullptr, nullptr});
  with_scratch<AttentionPart, double>(
      on, name, {rows * splits, rows * splits * p.value_dim},
      [&](AttentionPart* parts, double* sums) {
        launch_rows(on, name, rows * splits, shared, Kernel{call, splits, parts, sums});
        launch_rows(
            on, name, rows, 0,
            MergeSplits<typename Kernel::Call, double>{call, splits, parts, sums, Kernel::kFactor});
      });
}

/// Whether the tiles serve a request: by its scalars and widths only, so that a row's bits depend
/// on nothing else.
template <typename TQ, typename TKV>
inline constexpr bool kHasAttentionTiles = sizeof(TQ) == 2 && std::is_same_v<TQ, TKV>;
template <typename TQ, typename TKV, typename Function>
bool fits_tiles(const problem::Attention<TQ, TKV, Function>& p) {
  const auto fits = [](Index width) { return width > 0 && width <= 256; };
  return kHasAttentionTiles<TQ, TKV> && fits(p.head_dim) && fits(p.value_dim);
}

/// Blocks that fill a device of 132 multiprocessors: fewer are split, where there is something to
/// split.
inline constexpr Index kEnoughTileBlocks = 264;

template <bool Masked, typename D, typename T, typename Function>
void launch_attention_tiles(const Backend<D>& on, const AttentionCall<T, T, Function>& call,
                            const Index* first_tile, Index tiles, Index longest) {
  constexpr auto name = "attention";
  const auto& p = call.p;
  const auto start = [&](auto kernel) {
    using Kernel = decltype(kernel);
    const std::size_t shared = Kernel::shared_size(p.head_dim, p.value_dim);
    const Index rows = call.row_count * p.heads, blocks = tiles * p.kv_heads;
    if (longest <= kSplitKeys)
      return launch_rows(on, name, blocks, shared,
                         Kernel{call, first_tile, tiles, 0, nullptr, nullptr});
    const Index splits = splits_of<float>(rows, p.value_dim, longest, blocks, kEnoughTileBlocks),
                each = splits > 0 ? splits : 1;
    with_scratch<AttentionPart, float>(
        on, name, {rows * splits, rows * each * p.value_dim},
        [&](AttentionPart* parts, float* sums) {
          launch_rows(on, name, blocks * each, shared,
                      Kernel{call, first_tile, tiles, splits, parts, sums});
          if (splits > 0)
            launch_rows(on, name, rows, 0,
                        MergeSplits<typename Kernel::Call, float>{call, splits, parts, sums,
                                                                  Kernel::kFactor});
        });
  };
  if (p.value_dim <= 128)
    start(AttentionTiles<T, 4, Function, Masked>{});
  else
    start(AttentionTiles<T, 8, Function, Masked>{});
}

/// False where what splits leave would take too much memory.
template <bool Masked, typename D, typename T, typename Function>
bool launch_attention_steps(const Backend<D>& on, const AttentionCall<T, T, Function>& call,
                            Index longest) {
  constexpr auto name = "attention";
  using Kernel = AttentionSteps<T, Function, Masked>;
  const auto& p = call.p;
  const Index rows = call.row_count * p.heads, units = p.batch * p.kv_heads,
              splits = splits_of<float>(rows, p.value_dim, longest, 0, 1);
  if (longest > kSplitKeys && splits == 0) return false;
  with_scratch<AttentionPart, float>(
      on, name, {rows * splits, rows * splits * p.value_dim},
      [&](AttentionPart* parts, float* sums) {
        launch_rows(on, name, units * (splits > 0 ? splits : 1), Kernel::shared_size(),
                    Kernel{call, splits, parts, sums});
        if (splits > 0)
          launch_rows(on, name, rows, 0,
                      MergeSplits<typename Kernel::Call, float>{call, splits, parts, sums,
                                                                Kernel::kFactor});
      });
  return true;
}

template <typename D, typename TQ, typename TKV, typename Function>
void execute(const Backend<D>& on, const problem::Attention<TQ, TKV, Function>& p) {
  if (p.batch == 0 || p.heads == 0) return;
  const problem::AttentionSequence& last = p.sequences[p.batch - 1];
  const Index row_count = last.query_begin + last.tensor_rows;
  if (row_count == 0) return;
  const bool in_tiles = fits_tiles(p);
  Workspace::Frame frame(thread_workspace());
  const std::span<Index> first_tile(frame.take<Index>(in_tiles ? p.batch + 1 : 0),
                                    static_cast<std::size_t>(in_tiles ? p.batch + 1 : 0));
  Index longest = 0, tiles = 0, most_rows = 0;
  for (Index b = 0; b < p.batch; ++b) {
    longest = (std::max)(longest, p.sequences[b].key_length);
    most_rows = (std::max)(most_rows, p.sequences[b].tensor_rows * p.group());
    if (in_tiles) first_tile[static_cast<std::size_t>(b)] = tiles;
    tiles += (p.sequences[b].tensor_rows * p.group() + kTileRows - 1) / kTileRows;
    if (in_tiles) first_tile[static_cast<std::size_t>(b) + 1] = tiles;
  }
  const auto staged = stage_attention(on, "attention", p, first_tile);
  with_masked(p, [&](auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    const auto& [call, staged_tiles] = staged;
    if constexpr (kHasAttentionTiles<TQ, TKV> && !kMasked) {
      using Steps = AttentionSteps<TQ, Function, kMasked>;
      // it divides positions in 32 bits
      if (in_tiles && longest < Index{1} << 31 && most_rows <= Steps::kRows &&
          p.head_dim <= Steps::kWidth && p.value_dim <= Steps::kWidth &&
          launch_attention_steps<kMasked>(on, call, longest))
        return;
    }
    if constexpr (kHasAttentionTiles<TQ, TKV>)
      if (in_tiles) return launch_attention_tiles<kMasked>(on, call, staged_tiles, tiles, longest);
    launch_attention_rows<kMasked>(on, call, longest);
  });
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
