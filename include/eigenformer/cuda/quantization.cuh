/// \file
/// CUDA kernels of INT8 quantization. By row or group: one block per scale, one pass for the
/// largest magnitude and one that divides, rounds and writes, 16 bytes per thread: two reads and a
/// quarter of a write, the second read out of L1 or L2 for rows that fit. A group of 32 leaves most
/// threads of its block idle. By tensor: a launch for the magnitude of each chunk, one for the
/// values, and between them the host, which waits for the chunks because it returns the scale. Back
/// to numbers: 16 bytes written per thread, a byte read for 2 to 8. All are bound by bandwidth, of
/// which long rows and tensors should see more than half. The numbers are those of the CPU kernels,
/// bit for bit.
#pragma once

#include <cstdint>

#include "../core/workspace.h"
#include "../problem/quantization.h"
#include "int4.cuh"
#include "int8.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
struct QuantizeKernel {
  using C = compute_type<T>;
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp;
  problem::Quantize<T> p;
  Index groups;  // of a row
  Index stride;  // from one row of values to the next, with zeros from `columns` on

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = block.template shared<C>(kWarps);
    for (Index at = block.index(); at < p.rows * groups; at += block.count())
      quantize(block, scratch, at);
  }

 private:
  template <typename Block, typename Scratch>
  EIGENFORMER_DEVICE void quantize(Block& block, const Scratch& scratch, Index at) const {
    const Index row = at / groups, column = at % groups * p.group;
    const Index count = p.group < p.columns - column ? p.group : p.columns - column;
    const Index end = column + count < p.columns ? count : stride - column;
    const T* weights = p.weights + row * p.columns + column;
    std::int8_t* values = p.values + row * stride + column;
    const float scale = int8_scale(reduce_block(
        block, scratch, magnitude<C>(weights, count, block.thread(), block.size()), LargerOrNan{}));
    if (block.thread() == 0) p.scales[at] = scale;
    quantize_line<C>(weights, values, count, scale, block.thread(), block.size());
    for (Index j = count + block.thread(); j < end; j += block.size()) values[j] = 0;
  }
};

template <typename D, typename T>
void quantize_rows(const Backend<D>& on, const char* name, const problem::Quantize<T>& p,
                   Index groups, Index stride) {
  using Kernel = QuantizeKernel<T>;
  launch_rows(on, name, p.rows * groups, shared_bytes<typename Kernel::C>(Kernel::kWarps),
              Kernel{p, groups, stride});
}

/// Rows, or groups, with NaN or infinity get the scale NaN and zeros.
template <typename D, typename T>
bool execute(const Backend<D>& on, const problem::Quantize<T>& p) {
  const Index groups = p.group == 0 ? 1 : p.groups();  // a row without columns has a scale, 1
  quantize_rows(on, "quantize_weights_int8", p, groups, p.columns);
  return true;
}

/// Tokens with NaN or infinity get the scale NaN and zeros, as everywhere.
template <typename D, typename T>
void execute(const Backend<D>& on, const problem::QuantizeActivations<T>& p) {
  const problem::Quantize<T> rows{p.x, p.values, p.scales, p.rows, p.columns, p.columns, false};
  quantize_rows(on, "quantize_activations_int8", rows, 1, p.columns);
}

/// Numbers of one block where all of them have one result.
inline constexpr Index kQuantizeChunk = 16384;

/// results[c]: what look(begin, end, thread, threads) finds in a chunk, combined over its threads.
template <typename Look>
struct ChunkKernel {
  using Result = typename Look::Result;
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp;
  Look look;
  Index count, chunks;
  Result* results;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = block.template shared<Result>(kWarps);
    for (Index at = block.index(); at < chunks; at += block.count()) {
      const Index begin = at * kQuantizeChunk,
                  end = kQuantizeChunk < count - begin ? begin + kQuantizeChunk : count;
      const Result found = reduce_block(
          block, scratch, look(begin, end, block.thread(), block.size()), typename Look::Combine{});
      if (block.thread() == 0) results[at] = found;
    }
  }
};

/// use(results of all chunks, on the host, how many); waits for them.
template <typename D, typename Look, typename Use>
void look_at_chunks(const Backend<D>& on, const char* name, Index count, const Look& look,
                    Use&& use) {
  using Kernel = ChunkKernel<Look>;
  using Result = typename Look::Result;
  const Index chunks = (count + kQuantizeChunk - 1) / kQuantizeChunk;
  Workspace::Frame frame(thread_workspace());
  Result* const found = frame.take<Result>(chunks);
  fetch(on, name, found, chunks, [&](Result* results) {
    launch_rows(on, name, chunks, shared_bytes<Result>(Kernel::kWarps),
                Kernel{look, count, chunks, results});
  });
  use(found, chunks);
}

/// The largest magnitude, NaN where a number is NaN.
template <typename T>
struct LargestMagnitude {
  using Result = compute_type<T>;
  using Combine = LargerOrNan;
  const T* numbers;

  EIGENFORMER_DEVICE Result operator()(Index begin, Index end, Index thread, Index threads) const {
    return magnitude<Result>(numbers + begin, end - begin, thread, threads);
  }
};

template <typename T>
struct QuantizeBody {
  const T* weights;
  std::int8_t* values;
  float scale;

  template <int N>
  EIGENFORMER_DEVICE void operator()(WidthOf<N>, Index, Index at) const {
    const auto numbers = load_pack<compute_type<T>, N>(weights + at);
    Pack<std::int8_t, N> results;
    for (int i = 0; i < N; ++i) results[i] = int8_value(numbers[i], scale);
    store_pack<N>(results, values + at);
  }
};

template <typename D, typename T>
bool execute(const Backend<D>& on, const problem::QuantizeTensor<T>& p) {
  using C = compute_type<T>;
  constexpr auto name = "quantize_weights_int8";
  C largest = 0;
  look_at_chunks(on, name, p.count, LargestMagnitude<T>{p.weights}, [&](const C* found, Index n) {
    for (Index c = 0; c < n; ++c) largest = LargerOrNan{}(largest, found[c]);
  });
  const float scale = int8_scale(largest);
  if (scale != scale) return false;
  *p.scale = scale;
  constexpr int width = pack_width<T, std::int8_t>;
  launch_for_each_pack<width>(on, name, 1, p.count,
                              packs_fit<width>(p.weights, 0) && packs_fit<width>(p.values, 0),
                              QuantizeBody<T>{p.weights, p.values, scale});
  return true;
}

template <typename T>
struct DequantizeBody {
  problem::Dequantize<T> p;
  Index groups;  // of a row

  template <int N>
  EIGENFORMER_DEVICE void operator()(WidthOf<N>, Index row, Index column) const {
    using C = compute_type<T>;
    const Index at = row * p.columns + column, first = column / p.group;
    auto numbers = load_pack<C, N>(p.values + at);
    const bool one = (column + N - 1) / p.group == first;  // group, as where it is a multiple of N
    for (int i = 0; i < N; ++i) {
      const Index group = row * groups + (one ? first : (column + i) / p.group);
      const C scale = static_cast<C>(p.scales[group]);
      numbers[i] = p.minimums == nullptr
                       ? numbers[i] * scale
                       : std::fma(numbers[i], scale, static_cast<C>(p.minimums[group]));
    }
    store_pack<N>(numbers, p.weights + at);
  }
};

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::Dequantize<T>& p) {
  if (p.columns == 0) return;
  constexpr int width = pack_width<T>;  // a load of half as many bytes as the store, or fewer
  launch_for_each_pack<width>(
      on, "dequantize", p.rows, p.columns,
      packs_fit<width>(p.values, p.columns) && packs_fit<width>(p.weights, p.columns),
      DequantizeBody<T>{p, (p.columns + p.group - 1) / p.group});
}

template <typename T>
struct DequantizeTensorBody {
  problem::DequantizeTensor<T> p;

  template <int N>
  EIGENFORMER_DEVICE void operator()(WidthOf<N>, Index, Index at) const {
    using C = compute_type<T>;
    auto numbers = load_pack<C, N>(p.values + at);
    for (int i = 0; i < N; ++i) numbers[i] *= static_cast<C>(p.scale);
    store_pack<N>(numbers, p.weights + at);
  }
};

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::DequantizeTensor<T>& p) {
  constexpr int width = pack_width<T>;
  launch_for_each_pack<width>(on, "dequantize", 1, p.count,
                              packs_fit<width>(p.values, 0) && packs_fit<width>(p.weights, 0),
                              DequantizeTensorBody<T>{p});
}

/// The first number that has no scale, or `count`.
template <typename T>
struct FirstWithoutScale {
  using Result = Index;
  using Combine = Smaller;
  const T* numbers;
  Index count;
  int steps;

  EIGENFORMER_DEVICE Index operator()(Index begin, Index end, Index thread, Index threads) const {
    for (Index j = begin + thread; j < end; j += threads) {
      const float scale = int8_scale(magnitude<compute_type<T>>(numbers + j, 1, 0, 1), steps);
      if (scale != scale) return j;
    }
    return count;
  }
};

template <typename D, typename T>
Index execute(const Backend<D>& on, const problem::FirstNotQuantizable<T>& p) {
  Index first = p.count;
  look_at_chunks(on, "first_not_quantizable", p.count,
                 FirstWithoutScale<T>{p.numbers, p.count, p.steps},
                 [&](const Index* found, Index n) {
                   for (Index c = 0; c < n; ++c) first = Smaller{}(first, found[c]);
                 });
  return first < p.count ? first : -1;
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
