// Times the CUDA benchmarks on the first GPU and prints what it finds, an object of JSON per line:
//   gpu_rows --device               what the machine is; exit status 3 where it has no CUDA device
//   gpu_rows --limits               bandwidth of copies, products of tiles in a second
//   gpu_rows --list                 the operators that have rows
//   gpu_rows --operator NAME        the rows of one operator
// A call is timed by events of its stream, after the L2 cache was overwritten. What the host does
// before the first kernel of a call hides behind that, but for calls that wait for the device.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <set>

#include "../../report/statistics.h"
#include "attention_rows.cuh"
#include "cublaslt.cuh"
#include "elementwise_rows.cuh"
#include "linear_rows.cuh"
#include "memory_rows.cuh"
#include "sampling_rows.cuh"
#include "training_rows.cuh"

namespace gpu_day {
namespace {

constexpr double kSecondsOfRow = 0.6;
constexpr std::size_t kFewest = 3, kMost = 60;
constexpr int kNoDevice = 3;

using ef::cuda::check_cuda;

class Clock {
 public:
  explicit Clock(Memory& memory) : stream_(memory.device().stream()) {
    int l2 = 0;
    check_cuda(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, 0), "the size of L2");
    flushed_ = std::max<std::size_t>(std::size_t{2} * static_cast<std::size_t>(l2), 1 << 26);
    trash_ = memory.tensor<std::int8_t>(static_cast<Index>(flushed_)).data();
    check_cuda(cudaEventCreate(&start_), "an event");
    check_cuda(cudaEventCreate(&end_), "an event");
  }
  ~Clock() {
    cudaEventDestroy(start_);
    cudaEventDestroy(end_);
  }
  Clock(const Clock&) = delete;
  Clock& operator=(const Clock&) = delete;

  /// Seconds of one call, out of a cold cache.
  double once(const Call& call) const {
    check_cuda(cudaMemsetAsync(trash_, 0, flushed_, stream_), "overwriting L2");
    check_cuda(cudaEventRecord(start_, stream_), "an event");
    call();
    check_cuda(cudaEventRecord(end_, stream_), "an event");
    check_cuda(cudaEventSynchronize(end_), "a call");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, start_, end_), "a call");
    return 1e-3 * static_cast<double>(milliseconds);
  }

  bench::Timing of(const Call& call) const {
    once(call);
    const double first = once(call);
    const auto count = static_cast<std::size_t>(kSecondsOfRow / std::max(first, 1e-6));
    std::vector<double> samples(std::clamp(count, kFewest, kMost));
    for (double& sample : samples) sample = once(call);
    return bench::timing_of(std::move(samples));
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t start_ = nullptr, end_ = nullptr;
  std::size_t flushed_;
  void* trash_;
};

/// A copy of our own: 16 bytes per thread and turn.
struct CopyLine {
  const uint4* from;
  uint4* to;
  EIGENFORMER_DEVICE void operator()(Index at) const { to[at] = from[at]; }
};

/// Products of tiles, eight sums on the way in each warp: the sums are stored where nobody looks
/// unless they are what they cannot be.
template <typename T>
struct TileProducts {
  static constexpr int kThreads = 256, kSums = 8, kTurns = 2048;
  int* never;
  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    ef::cuda::FragmentA<T> a{};
    ef::cuda::FragmentB<T> b{};
    for (auto& value : a.values) value = static_cast<T>(block.lane() % 3);
    for (auto& value : b.values) value = static_cast<T>(block.warp() % 5);
    ef::cuda::FragmentD<T> sums[kSums] = {};
    for (int turn = 0; turn < kTurns; ++turn)
      for (auto& sum : sums) block.mma(sum, a, b);
    auto total = sums[0].values[0];
    for (const auto& sum : sums)
      for (const auto value : sum.values) total += value;
    if (total < 0) *never = static_cast<int>(total);
  }
  static double operations(Index blocks) {
    using Tile = ef::cuda::Tile<T>;
    return 2.0 * Tile::kRows * Tile::kColumns * Tile::kDepth * kSums * kTurns * (kThreads / 32) *
           static_cast<double>(blocks);
  }
};

void print_limit(const char* name, double per_second) {
  std::printf("{\"limit\":\"%s\",\"per_second\":%.4g}\n", name, per_second);
}

template <typename T>
double tile_operations_per_second(Memory& memory, const Clock& clock, int processors) {
  const Index blocks = Index{8} * processors;
  int* const never = reinterpret_cast<int*>(memory.ids(1, 1).data());
  const ef::cuda::Backend<Eigen::GpuDevice> on{memory.device()};
  const auto timing = clock.of([&] {
    ef::cuda::launch(on, "tiles", blocks, TileProducts<T>::kThreads, 0, TileProducts<T>{never});
  });
  return TileProducts<T>::operations(blocks) / timing.lower_quartile;
}

void limits(const Eigen::GpuDevice& device) {
  Memory memory(device);
  const Clock clock(memory);
  constexpr Index bytes = Index{1} << 30;
  auto from = memory.tensor<std::int8_t>(bytes), to = memory.tensor<std::int8_t>(bytes);
  const ef::cuda::Backend<Eigen::GpuDevice> on{device};
  const auto runtime = clock.of([&] {
    check_cuda(
        cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, device.stream()),
        "a copy");
  });
  const CopyLine line{reinterpret_cast<const uint4*>(from.data()),
                      reinterpret_cast<uint4*>(to.data())};
  const auto own = clock.of([&] { ef::cuda::launch_for_each(on, "copy", bytes / 16, line); });
  print_limit("copy by the runtime, bytes", 2.0 * bytes / runtime.median);
  print_limit("copy by a kernel, bytes", 2.0 * bytes / own.median);
  int processors = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0), "device");
  print_limit("bfloat16", tile_operations_per_second<ef::bfloat16>(memory, clock, processors));
  print_limit("int8", tile_operations_per_second<std::int8_t>(memory, clock, processors));
  if (const Prepare peer = cublaslt_linear(8192, 8192, 8192)) {
    const Call call = peer(memory);
    print_limit("bfloat16 by cuBLASLt", 2.0 * 8192 * 8192 * 8192 / clock.of(call).median);
  }
}

void print_timing(const char* key, const std::string& name, const bench::Timing& t) {
  std::printf("\"%s\":\"%s\",\"seconds\":%.4g,\"lower_quartile\":%.4g,\"upper_quartile\":%.4g", key,
              name.c_str(), t.median, t.lower_quartile, t.upper_quartile);
}

/// What went wrong, as it may stand in JSON.
std::string plain(const char* text) {
  std::string result = text;
  for (char& c : result)
    if (c == '"' || c == '\\' || static_cast<unsigned char>(c) < ' ') c = ' ';
  return result;
}

/// False where the row or a peer failed.
bool time_row(const Eigen::GpuDevice& device, const Row& row) {
  const auto failed = [&](const std::string& whose, const char* why) {
    std::printf("{\"row\":\"%s\",\"failed\":\"%s: %s\"}\n", row.name.c_str(), whose.c_str(),
                plain(why).c_str());
    return false;
  };
  bool good = true;
  try {
    Memory memory(device);
    const Clock clock(memory);
    const bench::Timing timing = clock.of(row.prepare(memory));
    static constexpr const char* kPeaks[] = {"", "bfloat16", "int8"};
    std::printf("{\"operator\":\"%s\",\"bytes\":%.6g,\"operations\":%.6g,\"peak\":\"%s\",",
                row.operator_name.c_str(), row.bytes, row.operations,
                kPeaks[static_cast<int>(row.peak)]);
    print_timing("row", row.name, timing);
    std::printf("}\n");
  } catch (const std::exception& error) {
    good = failed("eigenformer", error.what());
  }
  for (const auto& [name, prepare] : row.peers) {
    try {
      Memory memory(device);
      const Clock clock(memory);
      const bench::Timing timing = clock.of(prepare(memory));
      std::printf("{\"peer\":\"%s\",", name.c_str());
      print_timing("row", row.name, timing);
      std::printf("}\n");
    } catch (const std::exception& error) {
      good = failed(name, error.what());
    }
  }
  std::fflush(stdout);
  return good;
}

void describe() {
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, 0), "the device");
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  std::printf(
      "{\"gpu\":\"%s\",\"processors\":%d,\"memory\":%zu,\"l2\":%d,\"capability\":\"%d.%d\","
      "\"driver\":\"%d.%d\",\"runtime\":\"%d.%d\"}\n",
      plain(properties.name).c_str(), properties.multiProcessorCount, properties.totalGlobalMem,
      properties.l2CacheSize, properties.major, properties.minor, driver / 1000, driver % 1000 / 10,
      runtime / 1000, runtime % 1000 / 10);
}

int run(int count, char** arguments) {
  Rows rows;
  add_normalization_rows(rows);
  add_elementwise_rows(rows);
  add_memory_rows(rows);
  add_training_rows(rows);
  add_attention_rows(rows);
  add_sampling_rows(rows);
  add_linear_rows(rows);
  const std::string what = count > 1 ? arguments[1] : "";
  if (what == "--list" && count == 2) {
    std::set<std::string> seen;
    for (const Row& row : rows)
      if (seen.insert(row.operator_name).second) std::printf("%s\n", row.operator_name.c_str());
    return 0;
  }
  if (!(count == 2 && (what == "--device" || what == "--limits")) &&
      !(count == 3 && what == "--operator")) {
    std::fprintf(stderr, "usage: gpu_rows --device | --limits | --list | --operator NAME\n");
    return 2;
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device on this machine\n");
    return kNoDevice;
  }
  if (what == "--device") {
    describe();
    return 0;
  }
  const Eigen::GpuStreamDevice stream;
  const Eigen::GpuDevice device(&stream);
  if (what == "--limits") {
    limits(device);
    return 0;
  }
  bool good = true;
  for (const Row& row : rows)
    if (row.operator_name == arguments[2]) good = time_row(device, row) && good;
  return good ? 0 : 1;
}

}  // namespace
}  // namespace gpu_day

int main(int count, char** arguments) {
  try {
    return gpu_day::run(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_rows: %s\n", error.what());
    return 1;
  }
}
