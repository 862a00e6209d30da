/// \file
/// The library of matrix products of an emulated device: plain sums in double or 64 bits, rounded
/// once. It fills its workspace with NaN, as one that uses it may.
#pragma once

#include <eigenformer/cuda/gemm.cuh>

#include "device.h"

namespace eigenformer_test::emulated {

/// cuda::gemm for this device. There is a product of all shapes.
template <typename T, typename R>
bool gemm(const ef::cuda::Backend<Device>& on, const char*, const ef::cuda::GemmShape& s, R* d,
          const T* a, const T* b, std::byte* workspace) {
  using Wide = std::conditional_t<sizeof(T) == 1, std::int64_t, double>;
  ++on.device.stream().products;
  on.device.stream().submit({[=] {
    const DeviceMemory::Opened opened;
    std::memset(workspace, 0xff, static_cast<std::size_t>(ef::cuda::kGemmWorkspace));
    for (Index row = 0; row < s.rows; ++row)
      for (Index column = 0; column < s.columns; ++column) {
        R& result = d[row * s.columns + column];
        Wide sum = s.adds ? static_cast<Wide>(result) : Wide(0);
        for (Index k = 0; k < s.depth; ++k)
          sum += static_cast<Wide>(a[s.a_by_depth ? k * s.a_stride + row : row * s.a_stride + k]) *
                 static_cast<Wide>(
                     b[s.b_by_depth ? k * s.b_stride + column : column * s.b_stride + k]);
        result = static_cast<R>(sum);
      }
  }});
  return true;
}

}  // namespace eigenformer_test::emulated
