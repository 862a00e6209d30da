/// \file
/// Tests that run on every device from one source: a file named X_device_test.cpp is built as C++
/// (DefaultDevice, ThreadPoolDevice, and the CUDA kernels on emulated blocks) and, where CUDA is
/// on, as CUDA (GpuDevice). It moves data through a `Bench` and compares with the reference on the
/// host. Without a GPU the CUDA build skips aloud.
#pragma once

#include <gtest/gtest.h>

#include <cstdio>
#include <memory>
#include <vector>

#include "compare.h"
#if !defined(__CUDACC__) && __has_include(<sys/mman.h>)
#define EIGENFORMER_TEST_BLOCKS 1
#include "../emulators/block/device.h"
#endif

namespace eigenformer_test {

/// A GPU, emulated or not, and its stream.
template <typename S, typename D>
struct GpuBench {
  S stream;
  D device{&stream};

  template <typename T>
  T* allocate(Index count) const {
    return static_cast<T*>(device.allocate(static_cast<std::size_t>(count) * sizeof(T)));
  }
  void deallocate(void* pointer) const { device.deallocate(pointer); }
  template <typename T>
  void to_device(T* target, const T* source, Index count) const {
    device.memcpyHostToDevice(target, source, static_cast<std::size_t>(count) * sizeof(T));
    device.synchronize();
  }
  template <typename T>
  void to_host(T* target, const T* source, Index count) const {
    device.memcpyDeviceToHost(target, source, static_cast<std::size_t>(count) * sizeof(T));
    device.synchronize();
  }
};

/// A device of the host.
template <typename D>
struct HostBench {
  const D& device;

  template <typename T>
  T* allocate(Index count) const {
    return static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T)));
  }
  void deallocate(void* pointer) const { ::operator delete(pointer); }
  template <typename T>
  void to_device(T* target, const T* source, Index count) const {
    std::copy_n(source, count, target);
  }
  template <typename T>
  void to_host(T* target, const T* source, Index count) const {
    std::copy_n(source, count, target);
  }
};

#if defined(__CUDACC__)

/// Calls f(bench) on the GPU; skips aloud where there is none.
template <typename F>
void for_each_gpu(F&& f) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("[ SKIPPED  ] no CUDA device on this machine\n");
    GTEST_SKIP() << "no CUDA device on this machine";
  }
  static const cudaStream_t stream = [] {  // not the default one, which no graph captures
    cudaStream_t created = nullptr;
    EXPECT_EQ(cudaStreamCreate(&created), cudaSuccess);
    return created;
  }();
  const GpuBench<Eigen::GpuStreamDevice, Eigen::GpuDevice> bench{Eigen::GpuStreamDevice(&stream)};
  f(bench);
}
template <typename F>
void for_each_device(F&& f) {
  for_each_gpu(f);
}

#else

#if defined(EIGENFORMER_TEST_BLOCKS)
/// Keeps what was read, so that the bits of two schedules can be compared.
struct EmulatedBench : GpuBench<emulated::Stream, emulated::Device> {
  mutable std::vector<std::vector<char>> seen;

  template <typename T>
  void to_host(T* target, const T* source, Index count) const {
    GpuBench::to_host(target, source, count);
    const char* const bytes = reinterpret_cast<const char*>(target);
    seen.emplace_back(bytes, bytes + static_cast<std::size_t>(count) * sizeof(T));
  }
};
#endif

/// Calls f(bench) on emulated blocks: in order at once, and shuffled when the host waits, with the
/// same bits. For what has tests of its own on the CPU and takes a compiler long.
template <typename F>
void for_each_gpu([[maybe_unused]] F&& f) {
#if defined(EIGENFORMER_TEST_BLOCKS)
  const EmulatedBench in_order{{emulated::Stream()}, {}},
      shuffled{{emulated::Stream({.seed = 7, .deferred = true})}, {}};
  const auto before = emulated::DeviceMemory::instance().allocations();
  f(in_order);
  f(shuffled);
  EXPECT_TRUE(in_order.seen == shuffled.seen) << "the bits depend on the schedule";
  EXPECT_GT(emulated::DeviceMemory::instance().allocations(), before) << "no device was used";
#endif
}

/// Calls f(bench) on the calling thread, on a pool, and on emulated blocks.
template <typename F>
void for_each_device(F&& f) {
  const Eigen::DefaultDevice one;
  f(HostBench<Eigen::DefaultDevice>{one});
  Threads threads(2);
  f(HostBench<Eigen::ThreadPoolDevice>{threads.device});
  for_each_gpu(f);
}

#endif

/// A tensor in the memory of a bench's device, filled from one of the host (poisoned tensors
/// included).
template <typename B, typename T, int Rank>
class DeviceTensor {
 public:
  DeviceTensor(const B& bench, const ef::Tensor<T, Rank>& host)
      : bench_(bench), sizes_(host.dimensions()), data_(bench.template allocate<T>(host.size())) {
    bench_.to_device(data_, host.data(), host.size());
  }
  DeviceTensor(const DeviceTensor&) = delete;
  DeviceTensor& operator=(const DeviceTensor&) = delete;
  ~DeviceTensor() { bench_.deallocate(data_); }

  ef::TensorView<T, Rank> view() const { return {data_, sizes_}; }
  ef::TensorView<const T, Rank> cview() const { return {data_, sizes_}; }
  ef::Tensor<T, Rank> host() const {
    ef::Tensor<T, Rank> result(sizes_);
    bench_.to_host(result.data(), data_, result.size());
    return result;
  }

 private:
  const B& bench_;
  Eigen::DSizes<Index, Rank> sizes_;
  T* data_;
};

template <typename B, typename T, int Rank>
DeviceTensor<B, T, Rank> on_device(const B& bench, const ef::Tensor<T, Rank>& host) {
  return DeviceTensor<B, T, Rank>(bench, host);
}

}  // namespace eigenformer_test
