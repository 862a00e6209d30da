/// \file
/// Weights of linear layers packed once into the order that the matrix kernels stream: panels of
/// rows, k-major. linear/pack.h is the manual, core/packed_array.h the memory.
#pragma once

#include <string_view>

#include "../core/check.h"
#include "../core/packed_array.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

/// What a packed weight looks like in memory.
struct PanelLayout {
  std::string_view isa;  ///< of the kernels that read it; AMX reads that of avx512_bf16
  int columns = 0;       ///< rows of the weight in a panel
  int step = 0;          ///< consecutive k that lie together
  friend bool operator==(const PanelLayout&, const PanelLayout&) = default;
};

template <typename T>
struct WeightAccess;

}  // namespace detail

/// A weight (rows = outputs, columns = inputs) in packed order. T: float, double, bfloat16, half,
/// or int8 with a scale for each row or for each group of inputs.
template <typename T>
class PackedWeight {
 public:
  using scalar = T;

  PackedWeight() = default;
  PackedWeight(const PackedWeight&) = default;
  PackedWeight(PackedWeight&& other) noexcept { swap(other); }
  PackedWeight& operator=(const PackedWeight& other) {
    if (this != &other) {
      PackedWeight copy(other);  // may throw std::bad_alloc, before anything has changed
      swap(copy);
    }
    return *this;
  }
  PackedWeight& operator=(PackedWeight&& other) noexcept {
    swap(other);
    return *this;
  }

  Index rows() const { return rows_; }
  Index columns() const { return columns_; }
  const detail::PanelLayout& layout() const { return layout_; }
  /// Inputs that share a scale; 0 where there is one per row, or none.
  Index group_size() const { return group_; }
  /// Bytes of the panels, which a product streams.
  Index bytes() const { return data_.size() * static_cast<Index>(sizeof(T)); }
  /// Of int8, in the order of the panels: (rows) and padding, or [panel][group][column of the
  /// panel]. nullptr otherwise.
  const float* scales() const { return scales_.data(); }

  /// The panels, in the order of layout().
  const T* data() const { return data_.data(); }

 private:
  friend struct detail::WeightAccess<T>;
  void swap(PackedWeight& other) noexcept {
    std::swap(rows_, other.rows_);
    std::swap(columns_, other.columns_);
    std::swap(group_, other.group_);
    std::swap(layout_, other.layout_);
    std::swap(data_, other.data_);
    std::swap(scales_, other.scales_);
  }
  Index rows_ = 0, columns_ = 0, group_ = 0;
  detail::PanelLayout layout_;
  detail::PackedArray<T> data_;
  detail::PackedArray<float> scales_;
};

/// Two weights of one shape, gate and up, whose outputs lie side by side in each panel: one product
/// gives function(gate) * up without writing either (gated_linear_into in linear.h).
template <typename T>
class PackedGatedWeight {
 public:
  /// Outputs: rows of gate, and of up.
  Index rows() const { return pair_.rows() / 2; }
  Index columns() const { return pair_.columns(); }
  const detail::PanelLayout& layout() const { return pair_.layout(); }
  Index group_size() const { return pair_.group_size(); }
  Index bytes() const { return pair_.bytes(); }
  /// Both as one weight, in panels of half gate and half up.
  const PackedWeight<T>& pair() const { return pair_; }

 private:
  friend struct detail::WeightAccess<T>;
  PackedWeight<T> pair_;
};

namespace detail {

/// How packing reaches the inside of a PackedWeight.
template <typename T>
struct WeightAccess {
  /// Memory for `rows` rows in panels of `matrices` matrices each and `steps` steps.
  static void reshape(PackedWeight<T>& packed, const PanelLayout& layout, Index steps, Index rows,
                      Index columns, int matrices, Index group) {
    constexpr auto name = "pack_weight";
    const Index width = layout.columns / matrices, panels = (rows + width - 1) / width;
    const Index panel = checked_product(steps, Index{layout.columns} * layout.step, name, "weight");
    const Index elements = checked_product(panels, panel, name, "weight"),
                all_rows = checked_product(rows, matrices, name, "weight");
    const Index groups = group == 0 ? 1 : (columns + group - 1) / group;
    [[maybe_unused]] const Index scales = checked_product(
        checked_product(panels, Index{layout.columns}, name, "scales"), groups, name, "scales");
    packed.rows_ = packed.columns_ = 0;  // empty, should memory run out
    packed.data_.resize(elements);
    if constexpr (std::is_same_v<T, std::int8_t>) packed.scales_.resize(scales);
    packed.rows_ = all_rows;
    packed.columns_ = columns;
    packed.group_ = group;
    packed.layout_ = layout;
  }
  static T* data(PackedWeight<T>& packed) { return packed.data_.data(); }
  static float* scales(PackedWeight<T>& packed) { return packed.scales_.data(); }
  static PackedWeight<T>& pair(PackedGatedWeight<T>& packed) { return packed.pair_; }
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
