/// \file
/// Tests on ranks that have a GPU each, from one source. In C++ ranks are threads with an emulated
/// device each, over an emulated NCCL; in CUDA they are threads with one of the machine's GPUs
/// each. Without EIGENFORMER_NCCL, or a GPU, the CUDA build skips aloud.
#pragma once

#include "device.h"
#if defined(EIGENFORMER_TEST_BLOCKS)
#include "../emulators/nccl/nccl.h"
#endif
#if defined(EIGENFORMER_TEST_BLOCKS) || defined(EIGENFORMER_NCCL)
#include <eigenformer/communicator/nccl.h>
#endif

namespace eigenformer_test {

#if defined(EIGENFORMER_TEST_BLOCKS)

using NcclOptions = ef::NcclOptions;

/// f(bench, communicator, threads) on each rank; `threads` is a communicator of the host.
template <typename F>
void on_ranks(int ranks, const NcclOptions& options, const emulated::StreamOptions& stream, F&& f) {
  ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& threads) {
    const EmulatedBench bench{{emulated::Stream(stream)}, {}};
    ef::BasicNcclCommunicator<emulated::Device> communicator(bench.device, threads, options);
    f(bench, communicator, threads);
  });
}

/// The same on 1 to `most` ranks whose devices work at once, in order, and on such that wait,
/// shuffled.
template <typename F>
void for_each_world(int most, const NcclOptions& options, F&& f) {
  for (int ranks = 1; ranks <= most; ++ranks) {
    on_ranks(ranks, options, {}, f);
    on_ranks(ranks, options, {.seed = 7, .deferred = true}, f);
  }
}

#elif defined(EIGENFORMER_NCCL)

using NcclOptions = ef::NcclOptions;

/// f(bench, communicator, threads) on each of 1 to `most` ranks, as far as there are GPUs.
template <typename F>
void for_each_world(int most, const NcclOptions& options, F&& f) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("[ SKIPPED  ] no CUDA device on this machine\n");
    GTEST_SKIP() << "no CUDA device on this machine";
  }
  for (int ranks = 1; ranks <= (std::min)(most, count); ++ranks)
    ef::ThreadCommunicator::run(ranks, [&](ef::ThreadCommunicator& threads) {
      if (cudaSetDevice(threads.rank()) != cudaSuccess)
        throw std::runtime_error("this GPU is not to be had");
      const GpuBench<Eigen::GpuStreamDevice, Eigen::GpuDevice> bench{};
      ef::NcclCommunicator communicator(bench.device, threads, options);
      f(bench, communicator, threads);
    });
}

#else

struct NcclOptions {
  bool compare_calls = false;
  int largest_scratch = 0;
};

template <typename F>
void for_each_world(int, const NcclOptions&, F&&) {
  std::printf("[ SKIPPED  ] built without EIGENFORMER_NCCL\n");
  GTEST_SKIP() << "built without EIGENFORMER_NCCL";
}

#endif

}  // namespace eigenformer_test
