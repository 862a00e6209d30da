/// \file
/// Tiles of matrices as the tensor cores take them: D (16, 8) += A (16, depth) * B (depth, 8), of
/// bfloat16 or half (depth 16, sums in float) or int8 (depth 32, sums in int32). Each lane of a
/// warp holds a part: element i of the fragment of lane l is
///
///   A:  row l / 4 + 8 * (i / e % 2),   column l % 4 * e + i % e + 4 * e * (i / (2 * e))
///   B:  row l % 4 * e + i % e + 4 * e * (i / e),   column l / 4
///   D:  row l / 4 + 8 * (i / 2),   column l % 4 * 2 + i % 2
///
/// with e elements in a register of 4 bytes: the layouts of mma.m16n8k16 and mma.m16n8k32 in the
/// PTX ISA, "Matrix Fragments for mma".
#pragma once

#include <cstdint>

#include "../backend.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
struct Tile {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, half> ||
                    std::is_same_v<T, std::int8_t>,
                "eigenformer: tensor cores multiply bfloat16, half and int8");
  using sum = std::conditional_t<std::is_same_v<T, std::int8_t>, std::int32_t, float>;
  static constexpr int kRows = 16, kColumns = 8;
  static constexpr int kEach = 4 / static_cast<int>(sizeof(T));  // elements of a register
  static constexpr int kDepth = 8 * kEach;
};

template <typename T>
struct alignas(16) FragmentA {
  static constexpr int kEach = Tile<T>::kEach, kSize = 4 * kEach;
  T values[kSize];
  EIGENFORMER_HOST_DEVICE static constexpr int row(int lane, int i) {
    return lane / 4 + 8 * (i / kEach % 2);
  }
  EIGENFORMER_HOST_DEVICE static constexpr int column(int lane, int i) {
    return lane % 4 * kEach + i % kEach + 4 * kEach * (i / (2 * kEach));
  }
};

template <typename T>
struct alignas(8) FragmentB {
  static constexpr int kEach = Tile<T>::kEach, kSize = 2 * kEach;
  T values[kSize];
  EIGENFORMER_HOST_DEVICE static constexpr int row(int lane, int i) {
    return lane % 4 * kEach + i % kEach + 4 * kEach * (i / kEach);
  }
  EIGENFORMER_HOST_DEVICE static constexpr int column(int lane, int) { return lane / 4; }
};

template <typename T>
struct alignas(16) FragmentD {
  static constexpr int kSize = 4;
  typename Tile<T>::sum values[kSize];
  EIGENFORMER_HOST_DEVICE static constexpr int row(int lane, int i) {
    return lane / 4 + 8 * (i / 2);
  }
  EIGENFORMER_HOST_DEVICE static constexpr int column(int lane, int i) {
    return lane % 4 * 2 + i % 2;
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
