/// \file
/// The CUDA benchmarks, stated once: a row is a shape, the bytes and operations that no kernel can
/// do without, our call and its peers. gpu_rows.cu times them, gpu_day.cpp runs that program. One
/// more operator is one more function add_X_rows in a file X_rows.cuh, which gpu_rows.cu includes:
/// a CUDA source of its own takes nvcc 15 seconds for Eigen alone.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <eigenformer/core/dispatch.h>

namespace gpu_day {

namespace ef = eigenformer;
using ef::Index;

EIGENFORMER_DEVICE inline unsigned hash(unsigned x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

template <typename T>
struct Fill {
  T* to;
  unsigned seed;
  EIGENFORMER_DEVICE void operator()(Index at) const {
    const unsigned bits = hash(static_cast<unsigned>(at) + seed * 0x9e3779b9u);
    if constexpr (std::is_same_v<T, std::int8_t>)
      to[at] = static_cast<T>(static_cast<int>(bits % 255) - 127);
    else
      to[at] = static_cast<T>(static_cast<float>(bits >> 8) * 0x1p-23f - 1.0f);
  }
};

struct FillIds {
  std::int32_t* to;
  unsigned below;
  EIGENFORMER_DEVICE void operator()(Index at) const {
    to[at] = static_cast<std::int32_t>(hash(static_cast<unsigned>(at)) % below);
  }
};

/// Memory of the device, given back with this.
class Memory {
 public:
  explicit Memory(const Eigen::GpuDevice& device) : device_(device) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    device_.synchronize();
    for (void* pointer : pointers_) device_.deallocate(pointer);
  }

  const Eigen::GpuDevice& device() const { return device_; }

  /// Random numbers in [-1, 1), or in [-127, 127] of int8.
  template <typename T, typename... Sizes>
  ef::TensorView<T, sizeof...(Sizes)> tensor(Sizes... sizes) {
    const Index count = (Index{1} * ... * sizes);
    T* const data = allocate<T>(count);
    ef::cuda::launch_for_each(ef::cuda::Backend<Eigen::GpuDevice>{device_}, "fill", count,
                              Fill<T>{data, ++seed_});
    return {data, static_cast<Index>(sizes)...};
  }
  /// Random ids in [0, below).
  ef::TensorView<std::int32_t, 1> ids(Index count, unsigned below) {
    std::int32_t* const data = allocate<std::int32_t>(count);
    ef::cuda::launch_for_each(ef::cuda::Backend<Eigen::GpuDevice>{device_}, "fill", count,
                              FillIds{data, below});
    return {data, count};
  }

 private:
  template <typename T>
  T* allocate(Index count) {
    pointers_.push_back(device_.allocate(static_cast<std::size_t>(count) * sizeof(T)));
    return static_cast<T*>(pointers_.back());
  }

  const Eigen::GpuDevice& device_;
  std::vector<void*> pointers_;
  unsigned seed_ = 0;
};

/// What the operations of a row are held against.
enum class Peak { none, bfloat16, int8 };

using Call = std::function<void()>;
/// Makes the tensors of a call, which live as long as the memory.
using Prepare = std::function<Call(Memory&)>;

struct Row {
  std::string operator_name, name;
  double bytes = 0, operations = 0;
  Peak peak = Peak::none;
  Prepare prepare;
  std::vector<std::pair<std::string, Prepare>> peers = {};
};
using Rows = std::vector<Row>;

inline double mega(double count) { return count * 1048576; }

}  // namespace gpu_day
