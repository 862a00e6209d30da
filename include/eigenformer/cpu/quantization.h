/// \file
/// CPU kernels of INT8 quantization: a pass over the numbers for the scales, one that divides,
/// rounds and writes. Both are streams, 4 bytes read a number and 1 written. Where nothing must be
/// known of later rows, a row is still in cache in the second pass, and each number is read from
/// memory once. What leaves the caches anyway is written around them, which saves reading it first.
#pragma once

#include "../problem/quantization.h"
#include "backend.h"
#include "vector/quantize_int4.h"
#include "vector/streaming.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Whether `size` values, in rows of `row` and lines of `line` (the last of a row may be shorter),
/// are written around the caches.
template <typename V>
bool values_around_caches(const std::int8_t* values, Index size, Index row, Index line) {
  return written_around_caches(values, size, ReadsBeside::operands, V::lanes, {row, line});
}

constexpr Index kQuantizeChunk = 16384;  // numbers of one task where a whole tensor shares a scale

/// Values by the scales that p.scales holds; a NaN scale gives zeros.
template <typename D, typename Isa, typename T>
void quantize_values(const Backend<D, Isa>& on, const problem::Quantize<T>& p) {
  using V = simd::Vec<compute_type<T>, Isa>;
  const bool around_caches =
      values_around_caches<V>(p.values, p.rows * p.columns, p.columns, p.group);
  parallel_for(on, p.rows, Cost{p.columns, kPackCycles}, [&](Index first, Index last, int) {
    with_streaming<V>(around_caches, [&](auto streaming) {
      for (Index r = first; r < last; ++r)
        for (Index g = 0; g < p.groups(); ++g) {
          const Index at = r * p.columns + g * p.group;
          quantize_activation_line<Isa, decltype(streaming)::value>(
              p.weights + at, (std::min)(p.group, p.columns - g * p.group),
              p.scales[r * p.groups() + g], p.values + at);
        }
    });
  });
}

/// Scales and values in one read. False where a number is not quantizable: then some rows are
/// written and some are not.
template <typename D, typename Isa, typename T>
bool quantize_at_once(const Backend<D, Isa>& on, const problem::Quantize<T>& p) {
  using V = simd::Vec<compute_type<T>, Isa>;
  const bool around_caches =
      values_around_caches<V>(p.values, p.rows * p.columns, p.columns, p.group);
  std::atomic<bool> quantizable{true};
  parallel_for(on, p.rows, Cost{p.columns, kPackCycles}, [&](Index first, Index last, int) {
    with_streaming<V>(around_caches, [&](auto streaming) {
      constexpr bool kStreaming = decltype(streaming)::value;
      if (p.groups() > 1) {
        for (Index r = first; r < last; ++r)
          if (!quantize_line_in_groups<Isa, kStreaming>(p.weights + r * p.columns, p.columns,
                                                        p.group, p.scales + r * p.groups(),
                                                        p.values + r * p.columns))
            return quantizable.store(false, std::memory_order_relaxed);
        return;
      }
      auto found = magnitude<Isa>(p.weights + first * p.columns, p.columns);
      for (Index r = first; r < last; ++r) {
        p.scales[r] = int8_scale(found.largest);
        if (!found.finite || !std::isfinite(p.scales[r]))
          return quantizable.store(false, std::memory_order_relaxed);
        const T* row = p.weights + r * p.columns;
        std::int8_t* values = p.values + r * p.columns;
        if (r + 1 < last)
          found = quantize_and_measure<Isa, kStreaming>(row, p.columns, p.scales[r], values,
                                                        row + p.columns);
        else
          quantize_line<Isa, kStreaming>(row, p.columns, p.scales[r], values);
      }
    });
  });
  return quantizable.load(std::memory_order_relaxed);
}

template <typename D, typename Isa, typename T>
bool execute(const Backend<D, Isa>& on, const problem::Quantize<T>& p) {
  if (p.columns == 0) {
    if (p.group == 0) std::fill_n(p.scales, p.rows, 1.0f);
    return true;
  }
  if (p.rows == 0) return true;
  if (!p.check_first) return quantize_at_once(on, p);
  Workspace::Frame frame(on.workspace);
  float* found = frame.take<float>(p.rows * p.groups());
  if (!group_scales(on, p.weights, p.rows, p.columns, p.group, found)) return false;
  std::copy_n(found, p.rows * p.groups(), p.scales);
  quantize_values(on, p);
  return true;
}

template <typename D, typename Isa, typename T>
bool execute(const Backend<D, Isa>& on, const problem::QuantizeInt4<T>& p) {
  const Index groups = (p.columns + p.group - 1) / p.group, count = p.rows * groups;
  Workspace::Frame frame(on.workspace);
  float* const minimums = p.minimums == nullptr ? nullptr : frame.take<float>(count);
  const Int4Groups found{frame.take<float>(count), minimums, p.group, groups, p.fit};
  if (!find_int4_groups(on, p.weights, p.rows, p.columns, found)) return false;
  std::copy_n(found.scales, count, p.scales);
  if (minimums != nullptr) std::copy_n(minimums, count, p.minimums);
  parallel_for(on, p.rows, Cost{p.columns, kPackCycles}, [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r)
      quantize_int4_line<Isa>(p.weights + r * p.columns, 0, p.columns, found.of_row(r),
                              p.values + r * p.columns);
  });
  return true;
}

/// Scale and values of each row while it is in cache.
template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::QuantizeActivations<T>& p) {
  parallel_for(on, p.rows, Cost{p.columns, kPackCycles}, [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r) {
      const T* row = p.x + r * p.columns;
      p.scales[r] = activation_scale<Isa>(row, p.columns);
      quantize_activation_line<Isa>(row, p.columns, p.scales[r], p.values + r * p.columns);
    }
  });
}

/// max|w| of a whole tensor; `parts` has room for one number per chunk.
template <typename D, typename Isa, typename T>
Magnitude<compute_type<T>> tensor_magnitude(const Backend<D, Isa>& on, const T* numbers,
                                            Index count, compute_type<T>* parts) {
  const Index chunks = (count + kQuantizeChunk - 1) / kQuantizeChunk;
  std::atomic<bool> finite{true};
  parallel_for(on, chunks, Cost{kQuantizeChunk, kPackCycles}, [&](Index first, Index last, int) {
    for (Index c = first; c < last; ++c) {
      const auto found = magnitude<Isa>(numbers + c * kQuantizeChunk,
                                        (std::min)(kQuantizeChunk, count - c * kQuantizeChunk));
      parts[c] = found.largest;
      if (!found.finite) finite.store(false, std::memory_order_relaxed);
    }
  });
  compute_type<T> largest = 0;
  for (Index c = 0; c < chunks; ++c) largest = (std::max)(largest, parts[c]);
  return {largest, finite.load(std::memory_order_relaxed)};
}

template <typename D, typename Isa, typename T>
bool execute(const Backend<D, Isa>& on, const problem::QuantizeTensor<T>& p) {
  using V = simd::Vec<compute_type<T>, Isa>;
  Workspace::Frame frame(on.workspace);
  const Index chunks = (p.count + kQuantizeChunk - 1) / kQuantizeChunk;
  const auto found =
      tensor_magnitude(on, p.weights, p.count, frame.take<compute_type<T>>(chunks + 1));
  const float scale = int8_scale(found.largest);
  if (!found.finite || !std::isfinite(scale)) return false;
  *p.scale = scale;
  const bool around_caches =
      values_around_caches<V>(p.values, p.count, kQuantizeChunk, kQuantizeChunk);
  parallel_for(on, chunks, Cost{kQuantizeChunk, kPackCycles}, [&](Index first, Index last, int) {
    const Index begin = first * kQuantizeChunk, end = (std::min)(last * kQuantizeChunk, p.count);
    with_streaming<V>(around_caches, [&](auto streaming) {
      quantize_line<Isa, decltype(streaming)::value>(p.weights + begin, end - begin, scale,
                                                     p.values + begin);
    });
  });
  return true;
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::DequantizeTensor<T>& p) {
  const Index chunks = (p.count + kQuantizeChunk - 1) / kQuantizeChunk;
  parallel_for(on, chunks, Cost{kQuantizeChunk, kPackCycles}, [&](Index first, Index last, int) {
    const Index begin = first * kQuantizeChunk, end = (std::min)(last * kQuantizeChunk, p.count);
    dequantize_line<Isa>(p.values + begin, end - begin, p.scale, p.weights + begin);
  });
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::Dequantize<T>& p) {
  const Index groups = p.group == 0 ? 0 : (p.columns + p.group - 1) / p.group;
  parallel_for(on, p.rows, Cost{p.columns, kPackCycles}, [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r)
      for (Index g = 0; g < groups; ++g) {
        const Index at = r * p.columns + g * p.group,
                    n = (std::min)(p.group, p.columns - g * p.group);
        const float scale = p.scales[r * groups + g];
        if (p.minimums == nullptr)
          dequantize_line<Isa>(p.values + at, n, scale, p.weights + at);
        else
          dequantize_above<Isa>(p.values + at, n, scale, p.minimums[r * groups + g],
                                p.weights + at);
      }
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
