/// \file
/// Where a CUDA kernel runs. A kernel is `execute(const Backend<D>&, const problem::X&)` in this
/// namespace, found by core/dispatch.h; cuda/kernels.cuh says how to add one. D is
/// Eigen::GpuDevice, or the emulated device of tests/emulators/block: what this folder has outside
/// of EIGENFORMER_CUDA_UNIT is plain C++.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "../core/device.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// A failure of the device or of the CUDA runtime: the text names the operator and the launch.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace cuda {

/// A device, and with it its stream.
template <typename D>
struct Backend {
  const D& device;
};

/// Lanes of a warp, and the mask that names them all.
inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

/// What a launch may have on every device: threads of a block, and bytes of shared memory without
/// asking for more.
inline constexpr int kMostThreads = 1024;
inline constexpr std::size_t kSharedBytes = 48 * 1024;

/// Bytes of a launch's shared memory that an array of `count` T takes: arrays begin at multiples
/// of 16 bytes.
template <typename T>
constexpr std::size_t shared_bytes(Index count) {
  return (static_cast<std::size_t>(count) * sizeof(T) + 15) / 16 * 16;
}

/// The shape of a launch, for the text of an error.
inline std::string launch_text(const char* name, Index blocks, int threads, std::size_t shared) {
  return std::string(name) + ": launch of " + std::to_string(blocks) + " blocks of " +
         std::to_string(threads) + " threads with " + std::to_string(shared) +
         " bytes of shared memory";
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
