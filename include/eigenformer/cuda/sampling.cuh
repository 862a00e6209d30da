/// \file
/// CUDA kernels of greedy and top-k sampling, one block per row.
///
/// Greedy: one pass, the largest logit and its lowest index. Top-k: the k-th largest by radix
/// selection (four passes over 8 bits of the ordered keys, from the highest), then two passes in
/// which every thread owns a run of consecutive tokens: one sums the weights of the tokens kept,
/// one finds the token where the cumulative weight passes u. Weights are exp in double; the sum
/// runs in token order by threads. The random number is Philox of (seed, position, row), as on the
/// CPU.
#pragma once

#include "../problem/sampling.h"
#include "block.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// What one pass finds out about a row.
template <typename C>
struct RowBest {
  C value;
  Index index;
  int flags;  // 1: NaN seen, 2: +infinity seen
};

struct BetterRow {
  template <typename C>
  __device__ RowBest<C> operator()(const RowBest<C>& a, const RowBest<C>& b) const {
    const bool first = a.value > b.value || (a.value == b.value && a.index <= b.index);
    return {first ? a.value : b.value, first ? a.index : b.index, a.flags | b.flags};
  }
};

template <typename T>
__device__ RowBest<compute_type<T>> best_of_row(const T* logits, Index vocab) {
  using C = compute_type<T>;
  const C infinity = static_cast<C>(__int_as_float(0x7f800000));
  RowBest<C> best{-infinity, vocab, 0};
  for (Index t = threadIdx.x; t < vocab; t += kRowThreads) {
    const C x = static_cast<C>(logits[t]);
    best.flags |= (x != x ? 1 : 0) | (x == infinity ? 2 : 0);
    if (x > best.value) {
      best.value = x;
      best.index = t;
    }
  }
  return reduce_block(best, BetterRow{});
}

template <typename C>
__device__ SampleStatus status_of(const RowBest<C>& best, Index vocab) {
  if ((best.flags & 1) != 0) return SampleStatus::nan;
  if ((best.flags & 2) != 0) return SampleStatus::positive_infinity;
  return best.index == vocab ? SampleStatus::no_token : SampleStatus::ok;
}

/// Larger numbers have larger keys.
__device__ inline unsigned long long ordered_key(float x) {
  const unsigned bits = __float_as_uint(x == 0.0f ? 0.0f : x);  // -0 and 0 are equal
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline unsigned long long ordered_key(double x) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(x == 0.0 ? 0.0 : x));
  return (bits >> 63) != 0 ? ~bits : bits | 0x8000000000000000ull;
}

template <typename T>
struct SampleBody {
  const T* logits;
  Index vocab, top_k;
  double temperature;
  bool greedy, keep_ties;
  Philox random;
  std::int32_t* ids;
  SampleStatus* statuses;

  using C = compute_type<T>;

  __device__ void operator()(Index row) const {
    const T* own = logits + row * vocab;
    const RowBest<C> best = best_of_row(own, vocab);
    const SampleStatus status = status_of(best, vocab);
    std::int32_t id = -1;
    if (status == SampleStatus::ok)
      id = greedy ? static_cast<std::int32_t>(best.index) : draw(own, best.value, row);
    if (threadIdx.x == 0) {
      ids[row] = id;
      if (statuses != nullptr) statuses[row] = status;
    }
  }

 private:
  struct Threshold {
    unsigned long long key;  // of the k-th largest
    Index ties;              // how many tokens of that very key are kept, from the lowest index
  };

  // Radix selection: after each pass the leading digits of the k-th largest are known.
  __device__ Threshold select(const T* own) const {
    __shared__ unsigned histogram[256];
    __shared__ unsigned long long prefix;
    __shared__ Index wanted;
    constexpr int bits = 8 * static_cast<int>(sizeof(C));
    if (threadIdx.x == 0) {
      prefix = 0;
      wanted = top_k < vocab ? top_k : vocab;
    }
    for (int shift = bits - 8; shift >= 0; shift -= 8) {
      histogram[threadIdx.x] = 0;
      __syncthreads();
      for (Index t = threadIdx.x; t < vocab; t += kRowThreads) {
        const unsigned long long key = ordered_key(static_cast<C>(own[t]));
        if (shift + 8 == bits || key >> (shift + 8) == prefix >> (shift + 8))
          atomicAdd(&histogram[key >> shift & 255], 1u);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        int digit = 255;
        while (digit > 0 && static_cast<Index>(histogram[digit]) < wanted)
          wanted -= histogram[digit--];
        prefix |= static_cast<unsigned long long>(digit) << shift;
      }
      __syncthreads();
    }
    const Threshold result{prefix, keep_ties ? vocab : wanted};
    __syncthreads();
    return result;
  }

  // Calls visit(token, weight) for the kept tokens of [begin, end) in order; `ties_before` tokens
  // of the threshold's key lie before.
  template <typename Visit>
  __device__ void for_each_kept(const T* own, Index begin, Index end, C largest,
                                Threshold threshold, Index ties_before, Visit visit) const {
    for (Index t = begin; t < end; ++t) {
      const C x = static_cast<C>(own[t]);
      const unsigned long long key = ordered_key(x);
      if (key < threshold.key || (key == threshold.key && ties_before++ >= threshold.ties))
        continue;
      visit(t, exp((static_cast<double>(x) - static_cast<double>(largest)) / temperature));
    }
  }

  __device__ std::int32_t draw(const T* own, C largest, Index row) const {
    __shared__ double sums[kRowThreads + 1];
    __shared__ Index ties[kRowThreads + 1];
    __shared__ std::int32_t chosen;
    const Threshold threshold = select(own);
    const Index run = (vocab + kRowThreads - 1) / kRowThreads;
    const Index begin = threadIdx.x * run < vocab ? threadIdx.x * run : vocab,
                end = begin + run < vocab ? begin + run : vocab;
    Index own_ties = 0;
    for (Index t = begin; t < end; ++t)
      own_ties += ordered_key(static_cast<C>(own[t])) == threshold.key ? 1 : 0;
    ties[threadIdx.x + 1] = own_ties;
    __syncthreads();
    if (threadIdx.x == 0) {
      ties[0] = 0;
      for (int i = 0; i < kRowThreads; ++i) ties[i + 1] += ties[i];
    }
    __syncthreads();
    double sum = 0;
    for_each_kept(own, begin, end, largest, threshold, ties[threadIdx.x],
                  [&](Index, double weight) { sum += weight; });
    sums[threadIdx.x + 1] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      sums[0] = 0;
      for (int i = 0; i < kRowThreads; ++i) sums[i + 1] += sums[i];
      chosen = -1;
    }
    __syncthreads();
    const double target = random.uniform(static_cast<std::uint32_t>(row)) * sums[kRowThreads];
    // Exactly one run holds the target: the last one that has weight takes what rounding leaves
    // over.
    const bool holds =
        sum > 0 && target >= sums[threadIdx.x] &&
        (target < sums[threadIdx.x + 1] || sums[threadIdx.x + 1] == sums[kRowThreads]);
    if (holds) {
      double passed = sums[threadIdx.x];
      std::int32_t id = -1;
      bool found = false;
      for_each_kept(own, begin, end, largest, threshold, ties[threadIdx.x],
                    [&](Index t, double weight) {
                      if (found || weight == 0) return;
                      passed += weight;
                      id = static_cast<std::int32_t>(t);
                      found = target < passed;
                    });
      chosen = id;
    }
    __syncthreads();
    const std::int32_t result = chosen;
    __syncthreads();
    return result;
  }
};

template <typename T>
void execute(const Backend& on, const problem::GreedySampling<T>& p) {
  launch_rows(
      on.device, "greedy_sample", p.batch,
      SampleBody<T>{p.logits, p.vocab, p.vocab, 0, true, false, Philox(), p.ids, p.statuses});
}

/// Throws std::invalid_argument for what only CPU devices do: one generator per row.
template <typename T>
void execute(const Backend& on, const problem::TopKSampling<T>& p) {
  const problem::RowParams& params = p.params[0];
  const bool greedy = params.temperature == 0;
  detail::require_that(greedy || p.generators_stride == 0, "top_k_sample on a GPU",
                       "generators come one per row, expected one for the batch");
  launch_rows(on.device, "top_k_sample", p.batch,
              SampleBody<T>{p.logits, p.vocab, params.top_k, params.temperature, greedy,
                            params.top_k_ties == TopKTies::keep_all,
                            greedy ? Philox() : p.generators[0], p.ids, p.statuses});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
