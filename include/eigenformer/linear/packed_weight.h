/// \file
/// Weights of linear layers packed once into the order that the matrix kernels stream: panels of rows, k-major, 64-byte aligned (2
/// MiB aligned, in huge pages where the system grants them, from 4 MiB on).
///
///   ef::PackedWeight<Eigen::bfloat16> w = ef::pack_weight<Eigen::bfloat16>(weight);   // (out, in) of any floating scalar
///   ef::PackedWeight<std::int8_t> w8 = ef::pack_weight<std::int8_t>(weight);          // quantized, one scale a row of weight
///   ef::PackedWeight<std::int8_t> w9 = ef::pack_weight(q, scales);                    // from int8 values in [-127, 127] and their
///   scales ef::pack_weight_into(device, w, weight);                                          // again, reusing w's memory:
///   training, every step
///
/// bfloat16 and half round to nearest even. int8 is symmetric per row: scale = max|w| / 127, 1 for a row of zeros. A packed weight
/// carries the layout of the ISA it was packed for, and a product refuses another. Packing the rows [a, b) gives the bits of the
/// same rows of the whole weight. Cost: one read and one write of the weights (int8: one more read, for the scales).
///
/// Throws std::invalid_argument: for int8, NaN or infinity in the weight (named by its first index, before `packed` is touched);
/// scales that do not match; an input dimension above 133,144 for int8, where the sum of products could leave 32 bits.
#pragma once

#include <cstdlib>
#include <string_view>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../core/check.h"
#include "../core/device.h"
#include "../core/workspace.h"
#include "../cpu/linear.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// What a packed weight looks like in memory.
struct PanelLayout {
  std::string_view isa;  ///< of the kernels that read it
  int columns = 0;       ///< rows of the weight in a panel
  int step = 0;          ///< consecutive k that lie together
  friend bool operator==(const PanelLayout&, const PanelLayout&) = default;
};

namespace detail {

/// An array of uninitialised numbers that grows but does not shrink.
template <typename T>
class PackedArray {
 public:
  PackedArray() = default;
  PackedArray(const PackedArray& other) { *this = other; }
  PackedArray(PackedArray&& other) noexcept { swap(other); }
  PackedArray& operator=(const PackedArray& other) {
    if (this == &other) return *this;
    resize(other.size_);
    if (size_ > 0) std::memcpy(static_cast<void*>(data_), other.data_, static_cast<std::size_t>(size_) * sizeof(T));
    return *this;
  }
  PackedArray& operator=(PackedArray&& other) noexcept {
    swap(other);
    return *this;
  }
  ~PackedArray() { release(); }

  /// Contents are lost where it grows. Throws std::bad_alloc, and then keeps what it had.
  void resize(Index size) {
    if (size > capacity_) {
      const std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
      const std::size_t alignment = bytes >= kHugeFrom ? kHugePage : 64;
      T* fresh = static_cast<T*>(::operator new(bytes, std::align_val_t{alignment}));
#if defined(__linux__)
      if (bytes >= kHugeFrom) madvise(fresh, bytes, MADV_HUGEPAGE);  // a hint: without it the bits are the same
#endif
      release();
      data_ = fresh;
      capacity_ = size;
      alignment_ = alignment;
    }
    size_ = size;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  Index size() const { return size_; }

 private:
  static constexpr std::size_t kHugePage = std::size_t{2} << 20, kHugeFrom = std::size_t{4} << 20;
  void release() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{alignment_});
    data_ = nullptr;
    size_ = capacity_ = 0;
  }
  void swap(PackedArray& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
    std::swap(alignment_, other.alignment_);
  }
  T* data_ = nullptr;
  Index size_ = 0, capacity_ = 0;
  std::size_t alignment_ = 64;
};

template <typename T, typename Isa>
PanelLayout panel_layout(Isa) {
  using Dot = tile::Dot<T, T, Isa>;
  return {Isa::name, Dot::columns, Dot::step};
}

/// The largest k whose sum of int8 products fits 32 bits: 127 * 127 * k < 2^31.
inline constexpr Index kLargestInt8Depth = ((Index{1} << 31) - 1) / (127 * 127);

inline void require_int8_depth(Index depth, std::string_view operation) {
  require(depth <= kLargestInt8Depth, operation, "weight has ", depth, " columns, int8 sums are exact up to ", kLargestInt8Depth);
}

}  // namespace detail

template <typename T>
struct WeightAccess;

/// A weight (rows = outputs, columns = inputs) in packed order. T: float, double, bfloat16, half, or int8 with a scale for each
/// row.
template <typename T>
class PackedWeight {
 public:
  Index rows() const { return rows_; }
  Index columns() const { return columns_; }
  const PanelLayout& layout() const { return layout_; }
  /// Bytes that a product streams.
  Index bytes() const { return data_.size() * static_cast<Index>(sizeof(T)); }
  /// (rows) of an int8 weight, nullptr otherwise.
  const float* scales() const { return scales_.data(); }

  PackedPanels<T> panels() const { return {data_.data(), offsets_.data()}; }

 private:
  friend struct WeightAccess<T>;
  Index rows_ = 0, columns_ = 0;
  PanelLayout layout_;
  detail::PackedArray<T> data_;
  detail::PackedArray<float> scales_;
  detail::PackedArray<std::int32_t> offsets_;  // 128 * sum of the row, of int8
};

/// How packing reaches the inside of a PackedWeight.
template <typename T>
struct WeightAccess {
  template <typename Isa>
  static void reshape(PackedWeight<T>& packed, Isa isa, Index rows, Index columns) {
    using Dot = tile::Dot<T, T, Isa>;
    const Index panels = (rows + Dot::columns - 1) / Dot::columns, steps = (columns + Dot::step - 1) / Dot::step;
    const Index panel = checked_product(steps, Index{Dot::columns} * Dot::step, "pack_weight", "weight");
    packed.data_.resize(checked_product(panels, panel, "pack_weight", "weight"));
    if constexpr (std::is_same_v<T, std::int8_t>) {
      packed.scales_.resize(rows);
      packed.offsets_.resize(panels * Dot::columns);
    }
    packed.rows_ = rows;
    packed.columns_ = columns;
    packed.layout_ = detail::panel_layout<T>(isa);
  }
  static T* data(PackedWeight<T>& packed) { return packed.data_.data(); }
  static float* scales(PackedWeight<T>& packed) { return packed.scales_.data(); }
  static std::int32_t* offsets(PackedWeight<T>& packed) { return packed.offsets_.data(); }
};

namespace detail {

/// "operation: weights[3, 17] is nan, expected finite numbers", for the element at `flat`.
template <typename View>
[[noreturn]] void throw_not_quantizable(std::string_view operation, const View& view, Index flat) {
  std::string at;
  Index rest = flat;
  for (int d = rank_of<View> - 1; d >= 0; --d) {
    const Index size = view.dimension(static_cast<std::size_t>(d));
    at = std::to_string(rest % size) + (at.empty() ? "" : ", ") + at;
    rest /= size;
  }
  require(false, operation, "weights[", at, "] is ", static_cast<double>(view.data()[flat]),
          ", expected finite numbers whose scale fits a float");
  std::abort();  // not reached
}

/// Calls pack(panel, first row, valid rows, memory of the panel) for all panels, in parallel.
template <typename T, typename Isa, typename D, typename Pack>
void for_each_panel(Isa, const D& device, PackedWeight<T>& packed, Pack&& pack) {
  using Dot = tile::Dot<T, T, Isa>;
  const Index rows = packed.rows(), depth = packed.columns(), panels = (rows + Dot::columns - 1) / Dot::columns;
  const Index panel_size = (depth + Dot::step - 1) / Dot::step * Dot::step * Dot::columns;
  T* data = WeightAccess<T>::data(packed);
  parallel_for(device, panels, 1 + 65536 / (panel_size + 1), [&](Index first, Index last, int) {
    for (Index p = first; p < last; ++p) {
      const Index row = p * Dot::columns;
      pack(row, std::min<Index>(Dot::columns, rows - row), data + p * panel_size);
      if constexpr (std::is_same_v<T, std::int8_t>) {
        std::int32_t* offsets = WeightAccess<T>::offsets(packed) + row;
        std::fill_n(offsets, Dot::columns, 0);
        tile::add_offsets<Dot>(data + p * panel_size, panel_size / (Dot::columns * Dot::step), offsets);
      }
    }
  });
}

template <typename Isa, typename D, typename T, typename W>
void pack_float_weight(Isa isa, const D& device, PackedWeight<T>& packed, TensorView<const W, 2> weight) {
  const Index rows = weight.dimension(0), depth = weight.dimension(1);
  WeightAccess<T>::reshape(packed, isa, rows, depth);
  const MatrixOperand<W> source{weight.data(), depth, 1};
  for_each_panel(isa, device, packed, [&](Index row, Index valid, T* to) {
    tile::pack_panel<tile::Dot<T, T, Isa>>(isa, source, row, valid, 0, depth, to);
  });
}

template <typename Isa, typename D, typename W>
void pack_quantized_weight(Isa isa, const D& device, PackedWeight<std::int8_t>& packed, TensorView<const W, 2> weight,
                           Workspace& workspace) {
  using Dot = tile::Dot<std::int8_t, std::int8_t, Isa>;
  const Index rows = weight.dimension(0), depth = weight.dimension(1);
  require_int8_depth(depth, "pack_weight");
  Workspace::Frame frame(workspace);
  float* scales = frame.take<float>(rows);
  std::fill_n(scales, rows, 1.0f);
  if (depth > 0 && !cpu::group_scales(isa, device, weight.data(), rows, depth, depth, scales))
    throw_not_quantizable("pack_weight", weight, cpu::first_not_quantizable(weight.data(), rows * depth));
  WeightAccess<std::int8_t>::reshape(packed, isa, rows, depth);
  std::copy_n(scales, rows, WeightAccess<std::int8_t>::scales(packed));
  for_each_panel(isa, device, packed, [&](Index row, Index valid, std::int8_t* to) {
    tile::pack_lines<std::int8_t>(isa, valid, Dot::columns, depth, reinterpret_cast<std::uint32_t*>(to),
                                  [&](Index r, Index k, int n, std::int8_t* stage) {
                                    cpu::quantize_line<Isa>(weight.data() + (row + r) * depth + k, n, scales[row + r], stage);
                                  });
  });
}

template <typename Isa, typename D>
void pack_int8_weight(Isa isa, const D& device, PackedWeight<std::int8_t>& packed, TensorView<const std::int8_t, 2> values,
                      TensorView<const float, 1> scales) {
  using Dot = tile::Dot<std::int8_t, std::int8_t, Isa>;
  const Index rows = values.dimension(0), depth = values.dimension(1);
  require_int8_depth(depth, "pack_weight");
  require(scales.dimension(0) == rows, "pack_weight", "scales has ", scales.dimension(0), " elements, weight has ", rows, " rows");
  WeightAccess<std::int8_t>::reshape(packed, isa, rows, depth);
  std::copy_n(scales.data(), rows, WeightAccess<std::int8_t>::scales(packed));
  const MatrixOperand<std::int8_t> source{values.data(), depth, 1};
  for_each_panel(isa, device, packed,
                 [&](Index row, Index valid, std::int8_t* to) { tile::pack_panel<Dot>(isa, source, row, valid, 0, depth, to); });
}

template <typename Isa, typename D, typename T, typename W>
void pack_weight_on(Isa isa, const D& device, PackedWeight<T>& packed, TensorView<const W, 2> weight, Workspace& workspace) {
  static_assert(FloatingScalar<W>,
                "eigenformer: pack_weight takes float, double, Eigen::bfloat16 or Eigen::half; int8 needs its scales");
  static_assert(FloatingScalar<T> || std::is_same_v<T, std::int8_t>,
                "eigenformer: a PackedWeight holds a floating scalar or std::int8_t");
  if constexpr (std::is_same_v<T, std::int8_t>)
    pack_quantized_weight(isa, device, packed, weight, workspace);
  else
    pack_float_weight(isa, device, packed, weight);
}

}  // namespace detail

/// Packs `weight` (out, in) into `packed`, whose memory is reused; nothing is allocated where it suffices.
template <CpuDevice D, typename T, typename Weight>
void pack_weight_into(const D& device, PackedWeight<T>& packed, const Weight& weight, Workspace& workspace = thread_workspace()) {
  detail::pack_weight_on(isa::best{}, device, packed, input_view<2>(weight), workspace);
}

/// Packs int8 values (out, in) with one scale a row (out).
template <CpuDevice D, typename Values, typename Scales>
  requires(!std::same_as<Scales, Workspace>)
void pack_weight_into(const D& device, PackedWeight<std::int8_t>& packed, const Values& values, const Scales& scales) {
  detail::pack_int8_weight(isa::best{}, device, packed, input_view<2>(values), input_view<1>(scales));
}

template <typename T, CpuDevice D, typename Weight>
PackedWeight<T> pack_weight(const D& device, const Weight& weight) {
  PackedWeight<T> packed;
  pack_weight_into(device, packed, weight);
  return packed;
}

template <typename T, typename Weight>
PackedWeight<T> pack_weight(const Weight& weight) {
  return pack_weight<T>(Eigen::DefaultDevice{}, weight);
}

template <typename T = std::int8_t, CpuDevice D, typename Values, typename Scales>
  requires std::same_as<T, std::int8_t>
PackedWeight<T> pack_weight(const D& device, const Values& values, const Scales& scales) {
  PackedWeight<T> packed;
  pack_weight_into(device, packed, values, scales);
  return packed;
}

template <typename T = std::int8_t, typename Values, typename Scales>
  requires(std::same_as<T, std::int8_t> && !Device<Values>)
PackedWeight<T> pack_weight(const Values& values, const Scales& scales) {
  return pack_weight<T>(Eigen::DefaultDevice{}, values, scales);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
