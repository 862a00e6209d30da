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
#if !defined(__CUDACC__)
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

#if defined(__CUDACC__)

/// Calls f(bench) on the GPU; skips aloud where there is none.
template <typename F>
void for_each_device(F&& f) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("[ SKIPPED  ] no CUDA device on this machine\n");
    GTEST_SKIP() << "no CUDA device on this machine";
  }
  const GpuBench<Eigen::GpuStreamDevice, Eigen::GpuDevice> bench{};
  f(bench);
}

#else

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

/// Calls f(bench) on the calling thread, on a pool, and on emulated blocks: in order at once, and
/// shuffled when the host waits.
template <typename F>
void for_each_device(F&& f) {
  const Eigen::DefaultDevice one;
  f(HostBench<Eigen::DefaultDevice>{one});
  Threads threads(2);
  f(HostBench<Eigen::ThreadPoolDevice>{threads.device});
  for (const emulated::StreamOptions options :
       {emulated::StreamOptions{}, emulated::StreamOptions{.seed = 7, .deferred = true}})
    f(GpuBench<emulated::Stream, emulated::Device>{emulated::Stream(options)});
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
