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
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <eigenformer/cuda/graph.cuh>
#include <eigenformer/cuda/kernels.cuh>
#include <eigenformer/cuda/stage.cuh>

#include "device_memory.h"
#include "emulated_block.h"

namespace eigenformer_test::emulated {

/// What a stream is told to be.
struct StreamOptions {
  std::uint64_t seed = 0;  ///< of the schedule; 0 takes threads and blocks in order
  bool deferred = false;   ///< work waits for synchronize()
  std::size_t most_shared_bytes = 227 * 1024;  ///< of a block; H100: 227 KiB
};

class Stream;

/// What a staging ring needs of a device.
class Staging {
 public:
  using Event = std::uint64_t;

  explicit Staging(Stream* stream) : stream_(stream) {}
  bool capturing() const;
  std::byte* allocate_host(const char*, std::size_t bytes) const { return new std::byte[bytes]; }
  std::byte* allocate_device(const char*, std::size_t bytes) const {
    return static_cast<std::byte*>(emulated::malloc(bytes));
  }
  void free(std::byte* host, std::byte* device) const;
  void copy(const char*, std::byte* device, const std::byte* host, std::size_t bytes) const;
  void fetch(const char*, void* host, const std::byte* device, std::size_t bytes) const;
  bool finished(const char*) const;
  void record(const char*, Event& event) const;
  void wait(const char*, Event& event) const;
  void forget(Event&) const {}

 private:
  Stream* stream_;
};

/// Work in the order it was given. Counts it, for tests of what a call costs.
class Stream {
 public:
  /// Begins where `ready` is empty or says so: what it waits for is other streams.
  struct Operation {
    std::function<void()> run;
    std::function<bool()> ready = {};
  };
  /// What was recorded between begin_capture() and end_capture().
  using Graph = std::vector<Operation>;

  explicit Stream(const StreamOptions& options = {}) : options_(options) { all().insert(this); }
  ~Stream() {
    all().erase(this);
    waiting_.clear();
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  const StreamOptions& options() const { return options_; }
  int launches = 0, copies = 0, products = 0;

  void submit(Operation operation) {
    if (capturing_) {
      captured_.push_back(std::move(operation));
      return;
    }
    ++submitted_;
    waiting_.push_back(std::move(operation));
    if (!options_.deferred) advance();
  }
  void synchronize() {
    if (capturing_)
      throw ef::DeviceError("synchronize: the stream is being captured, and nothing of it has run");
    wait(submitted_);
    if (fault_) std::rethrow_exception(std::exchange(fault_, nullptr));
  }
  /// Runs what was submitted up to then. After a fault nothing of what waited runs.
  void wait(std::uint64_t submitted) {
    while (submitted_ - waiting_.size() < submitted)
      if (!step()) std::this_thread::yield();
  }
  /// Runs what can be run now; whether that was all.
  bool finished() {
    advance();
    return waiting_.empty();
  }
  std::uint64_t submitted() const { return submitted_; }

  void copy(void* to, const void* from, std::size_t bytes) {
    ++copies;
    submit({[=] {
      const DeviceMemory::Opened opened;
      if (bytes > 0) std::memcpy(to, from, bytes);
    }});
  }

  /// The work of all streams of the calling thread, as cudaDeviceSynchronize waits for it.
  static void synchronize_all() {
    for (Stream* const stream : all()) stream->synchronize();
  }
  /// The same before memory is given back, as cudaFree does. Where it faults, the next that waits
  /// for the stream says so.
  static void settle_all() noexcept {
    for (Stream* const stream : all()) {
      try {
        stream->wait(stream->submitted());
      } catch (...) {
        stream->fault_ = std::current_exception();
      }
    }
  }

  void begin_capture() { capturing_ = true; }
  Graph end_capture() {
    capturing_ = false;
    return std::exchange(captured_, {});
  }
  bool capturing() const { return capturing_; }
  ef::cuda::StageRing<Staging>& staging() { return staging_; }
  void replay(const Graph& graph) {
    for (const Operation& operation : graph) submit(operation);
  }

 private:
  void advance() {
    while (!waiting_.empty() && step()) {
    }
  }
  /// The first of what waits, where it can begin.
  bool step() {
    if (waiting_.front().ready && !waiting_.front().ready()) return false;
    const Operation operation = std::move(waiting_.front());
    waiting_.pop_front();
    try {
      operation.run();
    } catch (...) {
      waiting_.clear();
      throw;
    }
    return true;
  }

  static std::set<Stream*>& all() {
    static thread_local std::set<Stream*> streams;
    return streams;
  }

  StreamOptions options_;
  bool capturing_ = false;
  std::uint64_t submitted_ = 0;
  std::deque<Operation> waiting_;
  std::exception_ptr fault_;
  Graph captured_;
  ef::cuda::StageRing<Staging> staging_{Staging(this)};
};

inline bool Staging::capturing() const { return stream_->capturing(); }
inline void Staging::free(std::byte* host, std::byte* device) const {
  if (device != nullptr) stream_->wait(stream_->submitted());
  delete[] host;
  emulated::free(device);
}
inline void Staging::copy(const char*, std::byte* device, const std::byte* host,
                          std::size_t bytes) const {
  stream_->copy(device, host, bytes);
}
inline void Staging::fetch(const char*, void* host, const std::byte* device,
                           std::size_t bytes) const {
  stream_->copy(host, device, bytes);
  stream_->synchronize();
}
inline bool Staging::finished(const char*) const { return stream_->finished(); }
inline void Staging::record(const char*, Event& event) const { event = stream_->submitted(); }
inline void Staging::wait(const char*, Event& event) const { stream_->wait(event); }

/// What a step graph needs of a device.
class ExecutableGraph {
 public:
  explicit ExecutableGraph(Stream* stream) : stream_(stream) {}
  void begin_capture(const char*) const { stream_->begin_capture(); }
  void abandon_capture() const { stream_->end_capture(); }
  void end_capture(const char*) { graph_ = stream_->end_capture(); }
  void launch(const char*) const { stream_->replay(graph_); }

 private:
  Stream* stream_;
  Stream::Graph graph_;
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
    stream_->copy(to, from, bytes);
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
  stream.submit({[=, title = std::string(name), seed = stream.options().seed] {
    run_blocks(title, blocks,
               {threads, shared, seed, [&](BlockRunner& runner, int thread, Index index) {
                  Block block(runner, thread, index, blocks);
                  kernel(block);
                }});
  }});
}

/// cuda::stage for it.
inline ef::cuda::StageRing<Staging>& stage_ring(const ef::cuda::Backend<Device>& on) {
  return on.device.stream().staging();
}

inline ExecutableGraph executable_graph(const ef::cuda::Backend<Device>& on) {
  return ExecutableGraph(&on.device.stream());
}

inline bool lies_on_device(const ef::cuda::Backend<Device>&, const void* data) {
  return DeviceMemory::instance().holds(data, 1);
}

/// The memory of such devices, for what the library owns there: packed weights, caches, scratch.
/// Copies wait for all streams, as those of cuda/memory.cuh do, and so does giving memory back.
inline const ef::Memory& device_memory(const ef::cuda::Backend<Device>&) {
  constexpr auto copy = [](void* to, const void* from, std::size_t bytes) {
    if (bytes > 0) Stream::synchronize_all();
    const DeviceMemory::Opened opened;
    if (bytes > 0) std::memcpy(to, from, bytes);
  };
  static constexpr ef::Memory memory{
      "cuda",
      [](std::size_t bytes, std::size_t) { return emulated::malloc(bytes); },
      [](void* data, std::size_t, std::size_t) noexcept {
        Stream::settle_all();
        emulated::free(data);
      },
      copy,
      copy,
      copy,
      [](void* data, std::size_t bytes) {
        if (bytes > 0) Stream::synchronize_all();
        const DeviceMemory::Opened opened;
        if (bytes > 0) std::memset(data, 0, bytes);
      }};
  return memory;
}

/// run(device) gives an array, the same bits under this many schedules and as many orders of the
/// blocks; else a Fault names the first element that differs.
template <typename Run>
void same_bits_for_schedules(std::uint64_t schedules, Run&& run) {
  const auto under = [&](std::uint64_t seed) {
    Stream stream({.seed = seed});
    const Device device(&stream);
    return run(device);
  };
  const auto first = under(0);
  for (std::uint64_t seed = 1; seed < schedules; ++seed) {
    const auto other = under(seed);
    if (other.size() != first.size()) throw Fault("schedule " + std::to_string(seed) + ": size");
    for (std::size_t i = 0; i < static_cast<std::size_t>(first.size()); ++i)
      if (std::memcmp(first.data() + i, other.data() + i, sizeof(*first.data())) != 0)
        throw Fault("element " + std::to_string(i) + " has other bits under schedule " +
                    std::to_string(seed) + " than under schedule 0");
  }
}

}  // namespace eigenformer_test::emulated

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
template <>
inline constexpr bool detail::is_gpu_device<eigenformer_test::emulated::Device> = true;
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
