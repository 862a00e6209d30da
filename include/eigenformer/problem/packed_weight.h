/// \file
/// Packed weights as kernels see them: panels of rows, k-major. linear/packed_weight.h owns their
/// memory, linear/pack.h is the manual.
#pragma once

#include <string_view>
#include <type_traits>

#include "../core/int4.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// Whether weights of T are values with scales.
template <typename T>
inline constexpr bool is_quantized_weight =
    std::is_same_v<T, std::int8_t> || std::is_same_v<T, int4>;

/// What a packed weight looks like in memory.
struct PanelLayout {
  std::string_view isa;      ///< of the kernels that read it; AMX reads that of avx512_bf16
  int columns;               ///< rows of the weight in a panel
  int step;                  ///< consecutive k that lie together
  std::string_view backend;  ///< of these kernels, and of the memory that the panels lie in

  friend EIGENFORMER_INLINE bool operator==(const PanelLayout& a, const PanelLayout& b) {
    return a.columns == b.columns && a.step == b.step && a.isa == b.isa && a.backend == b.backend;
  }
};

/// The panels of a weight (rows, columns), or of a pair with the rows of both: const T to read, T
/// to write. Those of a GPU are rows, one per panel (cuda/linear_pack.cuh).
template <typename T>
struct PackedPanels {
  using Factor = std::conditional_t<std::is_const_v<T>, const float, float>;
  T* data;  // in the order of the layout
  // Of int8 and int4: (rows) and padding, or [panel][group][column of the panel], a GPU's (rows,
  // groups); nullptr otherwise, and where they are halves.
  Factor* scales;
  Index rows, columns;
  Index group;  // inputs that share a scale; 0 where there is one per row, or none
  PanelLayout layout;
  // Of int4. In the order of the scales, nullptr where weights are scale * (u - 8) and not
  // scale * u + minimum; u is what is stored, 0 to 15.
  Factor* minimums = nullptr;
  bool quantizes_activations = true;  // false: they stay what they are, and weights are widened
  // Of int8 in groups on a CPU, in place of `scales` and in their order, where each is a half.
  const half* half_scales = nullptr;
};

/// How much memory a backend packs one weight (rows, columns) into, or `matrices` of them side by
/// side. The kernel returns PanelSizes.
template <typename T>
struct PanelsOf {
  static constexpr bool kUsesTiles = true;  // as the packing does: both see one layout
  Index rows, columns, group;
  int matrices;
  bool minimums = false, quantizes_activations = true;  // of int4, as PackedPanels has them
  bool half_scales = false;  // of int8 in groups on a CPU: where each scale is a half
};

struct PanelSizes {
  PanelLayout layout;
  Index elements;  // of T: of int4 two weights each
  Index scales;    // and as many minimums, where there are any
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
