/// \file
/// A GPU for machines without one: `emulated::Device` stands where Eigen::GpuDevice stands in
/// public calls, and kernels of cuda/*.cuh run on emulated blocks (emulated_block.h), compiled by
/// the C++ compiler alone. The whole call is the hardware's: checks, staging, launches, errors.
///
///   emulated::Stream stream({.seed = 3});
///   emulated::Device device(&stream);
///   void* const memory = device.allocate(bytes);        // host code that touches it gets SIGSEGV
///   ef::rms_norm_into(device, y, x, weight);            // a Fault or a DeviceError is thrown here
///   device.synchronize();                               // or here, where the stream is deferred
///
/// Blocks run one after the other, in an order that the seed shuffles as it does the threads.
/// `emulated::same_bits_for_schedules` runs a launch under several. A deferred stream keeps its
/// work until somebody synchronizes, as hardware may: what a call lent it must live that long.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <eigenformer/cuda/kernels.cuh>

#include "device_memory.h"
#include "emulated_block.h"

namespace eigenformer_test::emulated {

/// What a stream is told to be.
struct StreamOptions {
  std::uint64_t seed = 0;  ///< of the schedule; 0 takes threads and blocks in order
  bool deferred = false;   ///< work waits for synchronize()
  std::size_t most_shared_bytes = 227 * 1024;  ///< of a block; H100: 227 KiB
};

/// Work in the order it was given. Counts it, for tests of what a call costs.
class Stream {
 public:
  using Operation = std::function<void()>;
  /// What was recorded between begin_capture() and end_capture().
  using Graph = std::vector<Operation>;

  explicit Stream(const StreamOptions& options = {}) : options_(options) {}

  const StreamOptions& options() const { return options_; }
  int launches = 0, copies = 0;

  void submit(Operation operation) {
    if (capturing_)
      captured_.push_back(std::move(operation));
    else if (options_.deferred)
      waiting_.push_back(std::move(operation));
    else
      operation();
  }
  void synchronize() {
    if (capturing_)
      throw ef::DeviceError("synchronize: the stream is being captured, and nothing of it has run");
    for (const Operation& operation : std::exchange(waiting_, {})) operation();
  }

  void begin_capture() { capturing_ = true; }
  Graph end_capture() {
    capturing_ = false;
    return std::exchange(captured_, {});
  }
  bool capturing() const { return capturing_; }
  void replay(const Graph& graph) {
    for (const Operation& operation : graph) submit(operation);
  }

 private:
  StreamOptions options_;
  bool capturing_ = false;
  std::vector<Operation> waiting_;
  Graph captured_;
};

/// The members of Eigen::GpuDevice that the library and its tests use.
class Device {
 public:
  explicit Device(Stream* stream) : stream_(stream) {}
  Stream& stream() const { return *stream_; }

  void* allocate(std::size_t bytes) const { return emulated::malloc(bytes); }
  void deallocate(void* block) const { emulated::free(block); }
  void synchronize() const { stream_->synchronize(); }

  void memcpyHostToDevice(void* to, const void* from, std::size_t bytes) const {
    copy("memcpyHostToDevice", to, from, bytes, to);
  }
  void memcpyDeviceToHost(void* to, const void* from, std::size_t bytes) const {
    copy("memcpyDeviceToHost", to, from, bytes, from);
  }

 private:
  void copy(const char* name, void* to, const void* from, std::size_t bytes,
            const void* device_side) const {
    if (!DeviceMemory::instance().holds(device_side, bytes))
      throw ef::DeviceError(std::string(name) + ": the device's side is no memory of the device");
    ++stream_->copies;
    stream_->submit([=] {
      const DeviceMemory::Opened opened;
      if (bytes > 0) std::memcpy(to, from, bytes);
    });
  }

  Stream* stream_;
};

/// Runs all blocks of a launch; faults say which kernel and block.
inline void run_blocks(const std::string& name, Index blocks, const BlockRunner::Launch& launch) {
  static thread_local BlockRunner runner;
  std::vector<Index> order(static_cast<std::size_t>(blocks));
  std::iota(order.begin(), order.end(), Index{0});
  if (launch.seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937_64(launch.seed));
  const DeviceMemory::Opened opened;
  for (const Index block : order) {
    try {
      runner.run(launch, block);
    } catch (const Fault& fault) {
      throw Fault(name + ", block " + std::to_string(block) + ": " + fault.what());
    }
  }
}

/// cuda::launch for this device.
template <typename Kernel>
void launch(const ef::cuda::Backend<Device>& on, const char* name, Index blocks, int threads,
            std::size_t shared, const Kernel& kernel) {
  Stream& stream = on.device.stream();
  const auto refuse = [&](const std::string& why) {
    throw ef::DeviceError(ef::cuda::launch_text(name, blocks, threads, shared) + ": " + why);
  };
  if (blocks < 1 || blocks > 2147483647) refuse("blocks must be 1 to 2147483647");
  if (threads < 1 || threads > ef::cuda::threads_of<Kernel>())
    refuse("threads must be 1 to " + std::to_string(ef::cuda::threads_of<Kernel>()));
  if (shared > stream.options().most_shared_bytes)
    refuse("a block of this device has at most " +
           std::to_string(stream.options().most_shared_bytes) + " bytes");
  ++stream.launches;
  stream.submit([=, name = std::string(name), seed = stream.options().seed] {
    run_blocks(name, blocks,
               {threads, shared, seed, [&](BlockRunner& runner, int thread, Index index) {
                  Block block(runner, thread, index, blocks);
                  kernel(block);
                }});
  });
}

}  // namespace eigenformer_test::emulated

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
template <>
inline constexpr bool detail::is_gpu_device<eigenformer_test::emulated::Device> = true;
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
