/// \file
/// The memory of packed weights: one that a product takes (PackedWeight) and the pair of a gated
/// unit. linear/pack.h is the manual, core/packed_array.h the memory.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "../core/check.h"
#include "../core/memory.h"
#include "../core/packed_array.h"
#include "../problem/packed_weight.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

template <typename T>
class Packing;
template <typename T>
struct PairAccess;
struct PanelAccess;

}  // namespace detail

/// A weight (rows = outputs, columns = inputs) in packed order. T: float, double, bfloat16, half,
/// int8 with a scale for each row or for each group of inputs, or ef::int4 with one for each group,
/// and a minimum beside it or none. It lies in the memory of the backend that packed it, which
/// layout() names, and so do its copies.
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
  const problem::PanelLayout& layout() const { return layout_; }
  /// Inputs that share a scale; 0 where there is one per row, or none.
  Index group_size() const { return group_; }
  /// Bytes of the panels, which a product streams.
  Index bytes() const { return data_.size() * static_cast<Index>(sizeof(T)); }
  /// Of int8 and int4, in the order of the panels: (rows) and padding, or [panel][group][column of
  /// the panel]; on a GPU (rows) or (rows, groups). nullptr otherwise, and where they are halves.
  const float* scales() const { return scales_.data(); }
  /// Of int8 in groups, where each scale is a half and packing was asked for it (Int8Packing): in
  /// place of scales(), in their order. nullptr otherwise.
  const half* half_scales() const { return half_scales_.data(); }
  /// Of int4 with zero points, in the order of the scales; nullptr otherwise.
  const float* minimums() const { return minimums_.size() > 0 ? minimums_.data() : nullptr; }
  /// Of int4: false where activations stay what they are, and the weights are widened.
  bool quantizes_activations() const { return quantizes_activations_; }

  /// The panels, in the order of layout().
  const T* data() const { return data_.data(); }
  /// All of it, for kernels.
  problem::PackedPanels<const T> panels() const {
    return {data(),       scales(), rows_,      columns_,
            group_,       layout_,  minimums(), quantizes_activations_,
            half_scales()};
  }

 private:
  friend class detail::Packing<T>;
  friend struct detail::PanelAccess;
  void swap(PackedWeight& other) noexcept {
    std::swap(rows_, other.rows_);
    std::swap(columns_, other.columns_);
    std::swap(group_, other.group_);
    std::swap(layout_, other.layout_);
    std::swap(data_, other.data_);
    std::swap(scales_, other.scales_);
    std::swap(half_scales_, other.half_scales_);
    std::swap(minimums_, other.minimums_);
    std::swap(quantizes_activations_, other.quantizes_activations_);
  }
  Index rows_ = 0, columns_ = 0, group_ = 0;
  problem::PanelLayout layout_{};
  detail::PackedArray<T> data_;
  detail::PackedArray<float> scales_, minimums_;
  detail::PackedArray<half> half_scales_;
  bool quantizes_activations_ = true;
};

/// Two weights of one shape, gate and up, whose outputs lie side by side in each panel: one product
/// gives function(gate) * up without writing either (gated_linear_into in linear.h).
template <typename T>
class PackedGatedWeight {
 public:
  /// Outputs: rows of gate, and of up.
  Index rows() const { return pair_.rows() / 2; }
  Index columns() const { return pair_.columns(); }
  const problem::PanelLayout& layout() const { return pair_.layout(); }
  Index group_size() const { return pair_.group_size(); }
  Index bytes() const { return pair_.bytes(); }
  /// Both as one weight, in panels of half gate and half up.
  const PackedWeight<T>& pair() const { return pair_; }

 private:
  friend struct detail::PairAccess<T>;
  PackedWeight<T> pair_;
};

namespace detail {

/// Whether all numbers are halves; to[i] are those then.
inline bool narrow_exactly(const float* from, Index count, half* to) {
  for (Index i = 0; i < count; ++i) {
    to[i] = half(from[i]);
    if (static_cast<float>(to[i]) != from[i]) return false;
  }
  return true;
}

/// A weight while it is packed: panels in memory of its own, or in that of `packed` where it
/// suffices and is of the backend's. `packed` has them from finish() on. Throws std::bad_alloc, and
/// `packed` is then what it was; std::invalid_argument for panels of one backend in the memory of
/// another.
///
/// Scales may become halves, part by part, so that floats of all never lie beside them: what packs a
/// part writes floats to scales_of_part() and then calls keep_scales(). Where one is no half, all
/// are floats.
template <typename T>
class Packing {
 public:
  Packing(PackedWeight<T>& packed, const problem::PanelsOf<T>& shape,
          const problem::PanelSizes& sizes, const Memory& memory)
      : packed_(packed),
        memory_(memory),
        sizes_(sizes),
        minimums_(shape.minimums ? sizes.scales : 0),
        narrows_(std::is_same_v<T, std::int8_t> && shape.half_scales && shape.group > 0 &&
                 memory.backend == host_memory.backend),
        reuses_(!narrows_ && packed.data_.has_room(sizes.elements, memory) &&
                packed.scales_.has_room(sizes.scales, memory) &&
                packed.minimums_.has_room(minimums_, memory)) {
    require_that(sizes.layout.backend == memory.backend, "pack_weight", "panels for ",
                 sizes.layout.backend, " were to lie in memory of ", memory.backend);
    if (!reuses_) resize(fresh_);
    PackedWeight<T>& weight = reuses_ ? packed_ : fresh_;
    panels_ = {weight.data_.data(),
               weight.scales_.data(),  // nullptr where they may be halves
               shape.rows * shape.matrices,
               shape.columns,
               shape.group,
               sizes.layout,
               shape.minimums ? weight.minimums_.data() : nullptr,
               shape.quantizes_activations};
  }
  Packing(const Packing&) = delete;
  Packing& operator=(const Packing&) = delete;

  const problem::PackedPanels<T>& panels() const { return panels_; }
  /// All scales are one part.
  const problem::PackedPanels<T>& whole_panels() {
    panels_.scales = scales_of_part(0, sizes_.scales);
    return panels_;
  }

  float* scales_of_part(Index first, Index count) {
    if (!narrows_) return offset_by(panels_.scales, first);
    part_.resize(count, memory_);
    return part_.data();
  }
  void keep_scales(Index first, Index count) {
    half* const halves = fresh_.half_scales_.data();
    if (!narrows_ || narrow_exactly(part_.data(), count, offset_by(halves, first))) return;
    narrows_ = false;
    fresh_.scales_.resize(sizes_.scales, memory_);
    panels_.scales = fresh_.scales_.data();
    std::copy_n(halves, first, panels_.scales);
    std::copy_n(part_.data(), count, panels_.scales + first);
    fresh_.half_scales_ = {};
  }

  void finish() {
    if (reuses_) {
      resize(packed_);  // within its capacity
      packed_.half_scales_ = {};
    } else {
      packed_.swap(fresh_);
    }
    packed_.rows_ = panels_.rows;
    packed_.columns_ = panels_.columns;
    packed_.group_ = panels_.group;
    packed_.layout_ = panels_.layout;
    packed_.quantizes_activations_ = panels_.quantizes_activations;
  }

 private:
  void resize(PackedWeight<T>& weight) {
    weight.data_.resize(sizes_.elements, memory_);
    if (narrows_)
      weight.half_scales_.resize(sizes_.scales, memory_);
    else
      weight.scales_.resize(sizes_.scales, memory_);
    weight.minimums_.resize(minimums_, memory_);
  }

  PackedWeight<T>& packed_;
  const Memory& memory_;
  PackedWeight<T> fresh_;
  problem::PackedPanels<T> panels_{};
  problem::PanelSizes sizes_;
  PackedArray<float> part_;
  Index minimums_;  // how many
  bool narrows_;    // all scales so far are halves
  bool reuses_;
};

/// How packing reaches the inside of a PackedGatedWeight.
template <typename T>
struct PairAccess {
  static PackedWeight<T>& pair(PackedGatedWeight<T>& packed) { return packed.pair_; }
};

/// How files of packed weights reach their memory.
struct PanelAccess {
  template <typename T>
  static const PackedArray<T>& values(const PackedWeight<T>& weight) {
    return weight.data_;
  }
  template <typename T>
  static const PackedArray<float>& scales(const PackedWeight<T>& weight) {
    return weight.scales_;
  }
  template <typename T>
  static const PackedArray<half>& half_scales(const PackedWeight<T>& weight) {
    return weight.half_scales_;
  }
  /// Panels of a shape that lie there already, as large as `sizes` says.
  template <typename T>
  static PackedWeight<T> weight(const problem::PanelsOf<T>& shape,
                                const problem::PanelLayout& layout, PackedArray<T> values,
                                PackedArray<float> scales, PackedArray<half> half_scales,
                                PackedArray<float> minimums) {
    PackedWeight<T> weight;
    weight.rows_ = shape.rows * shape.matrices;
    weight.columns_ = shape.columns;
    weight.group_ = shape.group;
    weight.layout_ = layout;
    weight.data_ = std::move(values);
    weight.scales_ = std::move(scales);
    weight.half_scales_ = std::move(half_scales);
    weight.minimums_ = std::move(minimums);
    weight.quantizes_activations_ = shape.quantizes_activations;
    return weight;
  }
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
