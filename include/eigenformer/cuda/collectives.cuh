/// \file
/// Reductions and scans over the threads of a block, in a fixed tree: the same bits for a row
/// whatever the grid and the schedule. `combine` is commutative; blocks are whole warps.
#pragma once

#include "backend.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Threads of a block that works on one row.
inline constexpr int kRowThreads = 256;

struct Add {
  template <typename T>
  EIGENFORMER_DEVICE T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

struct Larger {
  template <typename T>
  EIGENFORMER_DEVICE T operator()(const T& a, const T& b) const {
    return a > b ? a : b;
  }
};

struct Smaller {
  template <typename T>
  EIGENFORMER_HOST_DEVICE T operator()(const T& a, const T& b) const {
    return a < b ? a : b;
  }
};

/// The larger one; NaN where one is NaN.
struct LargerOrNan {
  template <typename T>
  EIGENFORMER_HOST_DEVICE T operator()(const T& a, const T& b) const {
    return a != a || b != b ? a + b : (a > b ? a : b);
  }
};

/// combine over the lanes of the warp, for every lane.
template <typename Block, typename T, typename Combine>
EIGENFORMER_DEVICE T reduce_warp(Block& block, T value, Combine combine) {
  for (int apart = kWarp / 2; apart > 0; apart /= 2)
    value = combine(value, block.shuffle_xor(value, apart));
  return value;
}

/// combine over the threads of the block, for every thread: two barriers. `scratch` has an element
/// for each warp and may be used again at once.
template <typename Block, typename Scratch, typename T, typename Combine>
EIGENFORMER_DEVICE T reduce_block(Block& block, const Scratch& scratch, T value, Combine combine) {
  value = reduce_warp(block, value, combine);
  if (block.lane() == 0) scratch.store(block.warp(), value);
  block.barrier();
  T result = scratch.load(0);
  for (int warp = 1; warp < block.size() / kWarp; ++warp)
    result = combine(result, scratch.load(warp));
  block.barrier();
  return result;
}

/// Sums over the threads before this one, and over all.
template <typename T>
struct Scan {
  T before, total;
};

/// Two barriers. `scratch` has an element for each warp and may be used again at once. Sums of
/// floats may round, so that they need not grow from thread to thread.
template <typename Block, typename Scratch, typename T>
EIGENFORMER_DEVICE Scan<T> scan_block(Block& block, const Scratch& scratch, T value) {
  T sum = value;  // of this lane and those before
  for (int by = 1; by < kWarp; by *= 2) {
    const T other = block.shuffle_up(sum, by);
    if (block.lane() >= by) sum = other + sum;
  }
  const T lanes_before = block.shuffle_up(sum, 1);
  if (block.lane() == kWarp - 1) scratch.store(block.warp(), sum);
  block.barrier();
  Scan<T> result{T(0), T(0)};
  for (int warp = 0; warp < block.size() / kWarp; ++warp) {
    if (warp == block.warp()) result.before = result.total;
    result.total = result.total + scratch.load(warp);
  }
  if (block.lane() > 0) result.before = result.before + lanes_before;
  block.barrier();
  return result;
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
