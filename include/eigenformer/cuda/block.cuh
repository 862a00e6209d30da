/// \file
/// What a kernel sees of the hardware: its thread block. Kernels are templates over Block; this one
/// is the hardware, tests/emulators/block/emulated_block.h the same on a CPU. All threads of a
/// block, or of the warp, make the calls marked with * and **.
///
///   thread()  size()                 this thread of the block, and how many it has
///   index()   count()                this block of the grid, and how many it has: one dimension
///   lane()    warp()                 this thread of its warp, and the warp of the block
///   barrier()                      * all threads have come, and see what the others wrote
///   shared<T>(count)               * the next array of the launch's shared memory, uninitialised
///   warp_barrier()                ** the same for the warp
///   shuffle(v, lane)              ** v of another lane; shuffle_xor(v, bits), shuffle_up(v, by)
///   ballot(b)  any(b)  all(b)     ** bit i: what lane i says; or and and of them
///   atomic_add(p, v)                 integers in device memory; returns what was there
///   mma(d, a, b)                  ** d += a * b, fragments of tile/fragment.cuh
///   load_rows(array, i, b)        ** two fragments b of 16-bit numbers, side by side: 8 columns of
///                                    row lane % 16, from lane / 16 * 8 on, begin at array[i]
///   round_pair<T>(d, a, b)           d[0], d[1] = a, b, floats rounded to 16 bits
///   exp2(x)                          2^x, to 2^-22 of itself; 0 below 2^-126
///   copy_async(array, i, p)          16 bytes from device memory to array[i ...], once waited for
///   commit_async()                   closes this thread's group of copies
///   wait_async<n>()                  all but this thread's last n groups have landed; the others'
///                                    threads see them after a barrier
///
/// An array has load(i), store(i, v), add(i, v) (atomic, integers; returns what was there) and
/// pack<V>(i), store_pack(i, V): several elements at once, aligned to sizeof(V). It is made before
/// the first loop, by all threads in one order. Shuffles and votes take a mask of lanes, all by
/// default; every lane of the mask must come.
#pragma once

#include "backend.cuh"
#include "tile/mma.cuh"

#if defined(EIGENFORMER_CUDA_UNIT)
#include <cuda_pipeline_primitives.h>

#include <cstring>

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// An array in shared memory.
template <typename T>
class Shared {
 public:
  __device__ explicit Shared(T* data) : data_(data) {}
  __device__ T load(Index i) const { return data_[i]; }
  __device__ void store(Index i, const T& value) const { data_[i] = value; }
  __device__ T add(Index i, T value) const { return atomicAdd(data_ + i, value); }
  template <typename V>
  __device__ V pack(Index i) const {
    return *reinterpret_cast<const V*>(data_ + i);
  }
  template <typename V>
  __device__ void store_pack(Index i, const V& value) const {
    *reinterpret_cast<V*>(data_ + i) = value;
  }
  __device__ T* data() const { return data_; }

 private:
  T* data_;
};

class Block {
 public:
  __device__ explicit Block(std::byte* arena) : arena_(arena) {}

  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ Index index() const { return blockIdx.x; }
  __device__ Index count() const { return gridDim.x; }
  __device__ int lane() const { return thread() % kWarp; }
  __device__ int warp() const { return thread() / kWarp; }

  __device__ void barrier() const { __syncthreads(); }
  __device__ void warp_barrier() const { __syncwarp(); }

  template <typename T>
  __device__ Shared<T> shared(Index count) {
    T* const data = reinterpret_cast<T*>(arena_);
    arena_ += shared_bytes<T>(count);
    return Shared<T>(data);
  }

  template <typename T>
  __device__ T shuffle(const T& value, int lane, unsigned mask = kAllLanes) const {
    return by_words(value, [=](unsigned word) { return __shfl_sync(mask, word, lane); });
  }
  template <typename T>
  __device__ T shuffle_xor(const T& value, int bits, unsigned mask = kAllLanes) const {
    return by_words(value, [=](unsigned word) { return __shfl_xor_sync(mask, word, bits); });
  }
  template <typename T>
  __device__ T shuffle_up(const T& value, int by, unsigned mask = kAllLanes) const {
    return by_words(value, [=](unsigned word) { return __shfl_up_sync(mask, word, by); });
  }
  __device__ unsigned ballot(bool value, unsigned mask = kAllLanes) const {
    return __ballot_sync(mask, value);
  }
  __device__ bool any(bool value, unsigned mask = kAllLanes) const {
    return __any_sync(mask, value) != 0;
  }
  __device__ bool all(bool value, unsigned mask = kAllLanes) const {
    return __all_sync(mask, value) != 0;
  }

  template <typename T>
  __device__ T atomic_add(T* at, T value) const {
    static_assert(std::is_integral_v<T>, "eigenformer: sums of floats have a fixed order");
    return atomicAdd(at, value);
  }

  template <typename T>
  __device__ void mma(FragmentD<T>& d, const FragmentA<T>& a, const FragmentB<T>& b) const {
    multiply_add(d, a, b);
  }

  template <typename T>
  __device__ void load_rows(const Shared<T>& array, Index i, FragmentB<T> (&b)[2]) const {
    load_transposed(b, array.data() + i);
  }
  template <typename T>
  __device__ void round_pair(T* to, float a, float b) const {
    const unsigned pair = rounded_pair<T>(a, b);
    std::memcpy(static_cast<void*>(to), &pair, sizeof pair);
  }
  __device__ float exp2(float x) const { return power_of_2(x); }

  template <typename T>
  __device__ void copy_async(const Shared<T>& to, Index i, const T* from) const {
    __pipeline_memcpy_async(to.data() + i, from, 16);
  }
  __device__ void commit_async() const { __pipeline_commit(); }
  template <int Groups>
  __device__ void wait_async() const {
    __pipeline_wait_prior(Groups);
  }

 private:
  /// A value of any size, a register at a time.
  template <typename T, typename F>
  __device__ static T by_words(const T& value, F shuffle_word) {
    static_assert(std::is_trivially_copyable_v<T>);
    constexpr int count = (sizeof(T) + 3) / 4;
    unsigned words[count] = {};
    std::memcpy(words, &value, sizeof(T));
    for (int i = 0; i < count; ++i) words[i] = shuffle_word(words[i]);
    T result;
    std::memcpy(&result, words, sizeof(T));
    return result;
  }

  std::byte* arena_;
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
#endif
