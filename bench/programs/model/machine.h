/// \file
/// What a model of a program works on: threads, or in a program for CUDA the GPU.
#pragma once

#include <eigenformer/model.h>

#include <algorithm>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <thread>

#if !defined(__CUDACC__)
#include <unistd.h>
#endif

namespace programs {

#if defined(__CUDACC__)

inline constexpr const char* kDevice = "cuda";

/// Throws std::runtime_error where there is none: Eigen's stream would end the program.
struct PresentGpu {
  PresentGpu() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0)
      throw std::runtime_error(std::string("there is no GPU that CUDA can use: ") +
                               cudaGetErrorString(error) + "; --device cpu needs none");
  }
};

struct Machine {
  explicit Machine(long) {}
  PresentGpu present;
  Eigen::GpuStreamDevice stream;
  Eigen::GpuDevice device{&stream};
  std::string text() const { return stream.deviceProperties().name; }
};

[[noreturn]] inline void run_on_other_device(char**) {
  throw std::runtime_error("this is the program for GPUs; generate works on CPUs");
}

#else

inline constexpr const char* kDevice = "cpu";

struct Machine {
  /// 0: as many threads as the machine has.
  explicit Machine(long threads)
      : count(threads > 0 ? static_cast<int>(threads)
                          : (std::max)(1, static_cast<int>(std::thread::hardware_concurrency()))),
        pool(count),
        device(&pool, count) {}
  int count;
  Eigen::ThreadPool pool;
  Eigen::ThreadPoolDevice device;
  std::string text() const {
    return std::string(eigenformer::isa::best::name) + " kernels, " + std::to_string(count) +
           " threads";
  }
};

/// Goes on as generate_cuda, which lies beside this program where it was built.
[[noreturn]] inline void run_on_other_device(char** arguments) {
  std::error_code none;
  const auto other =
      std::filesystem::read_symlink("/proc/self/exe", none).parent_path() / "generate_cuda";
  ::execv(other.c_str(), arguments);
  throw std::runtime_error("--device cuda needs " + other.string() +
                           ", which is built where CMake is told -DEIGENFORMER_CUDA=ON");
}

#endif

}  // namespace programs
