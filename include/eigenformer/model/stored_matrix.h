/// \file
/// Matrices of a model's file as packing reads them: where they lie if their scalar and order allow
/// it, else converted to float.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

#include "../core/packed_array.h"
#include "../core/tensor.h"
#include "config.h"
#include "dequantize.h"
#include "stored_int4.h"
#include "stored_tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// dequantize_rows on the threads of a device.
template <typename D>
void convert_rows(const D& device, const StoredTensor& tensor, Index first,
                  std::span<float> values) {
  const Index columns = tensor.columns(), rows = columns == 0 ? 0 : std::ssize(values) / columns;
  for_ranges_of_rows(device, rows, columns, [&](Index begin, Index end) {
    dequantize_rows(tensor, first + begin,
                    values.subspan(static_cast<std::size_t>(begin * columns),
                                   static_cast<std::size_t>((end - begin) * columns)));
  });
}

/// `count` rows of a tensor, from `first` on, as columns: column c to to(c), a pointer. On the
/// threads of a device, each of which turns a tile at a time.
template <typename D, typename To>
void convert_turned(const D& device, const StoredTensor& tensor, Index first, Index count,
                    To&& to) {
  constexpr Index kRows = 16, kColumns = 256;  // a cache line of each column; whole blocks
  const StoredLayout layout = layout_of(tensor.format);
  const Index columns = tensor.columns(), strips = (count + kRows - 1) / kRows;
  for_ranges_of_rows(device, strips, kRows * columns, [&](Index begin, Index end) {
    std::array<float, kRows * kColumns> tile;
    for (Index row = begin * kRows; row < (std::min)(count, end * kRows); row += kRows)
      for (Index column = 0; column < columns; column += kColumns) {
        const Index high = (std::min)(kRows, count - row),
                    wide = (std::min)(kColumns, columns - column);
        const auto bytes_of = [&](Index elements) {
          return static_cast<std::size_t>(elements / layout.block_elements * layout.block_bytes);
        };
        for (Index r = 0; r < high; ++r)
          dequantize_row(
              tensor.format,
              tensor.bytes.subspan(bytes_of((first + row + r) * columns + column), bytes_of(wide)),
              {tile.data() + r * kColumns, static_cast<std::size_t>(wide)});
        for (Index c = 0; c < wide; ++c)
          for (Index r = 0; r < high; ++r)
            to(column + c)[row + r] = tile[static_cast<std::size_t>(r * kColumns + c)];
      }
  });
}

class StoredMatrix {
 public:
  template <typename W>
  using View = TensorView<const W, 2>;

  /// `transposed`: (in, out) in the file, (out, in) here. `keeps_int4`: blocks of four bits become
  /// INT4 and not float.
  template <typename D>
  StoredMatrix(const D& device, const StoredTensor& tensor, bool transposed = false,
               bool keeps_int4 = false)
      : tensor_(&tensor), transposed_(transposed) {
    rows_ = transposed ? tensor.columns() : tensor.rows();
    columns_ = transposed ? tensor.rows() : tensor.columns();
    if (keeps_int4 && !transposed && has_int4_blocks(tensor.format))
      int4_.emplace(device, tensor);
    else if (transposed || !is_read_in_place(tensor))
      convert(device);
  }

  Index rows() const { return rows_; }
  Index columns() const { return columns_; }
  bool converted() const { return values_.size() > 0; }
  bool is_int4() const { return int4_.has_value(); }
  /// The file's, and that of what is read, where Q4_0 stands for all of INT4.
  StoredFormat stored() const { return tensor_->format; }
  StoredFormat format() const {
    return is_int4() ? StoredFormat::q4_0 : converted() ? StoredFormat::f32 : tensor_->format;
  }

  /// A float copy, where it is not one yet.
  template <typename D>
  void convert(const D& device) {
    int4_.reset();
    if (converted() || rows_ * columns_ == 0) return;
    values_.resize(rows_ * columns_);
    float* const values = values_.data();
    if (transposed_)
      convert_turned(device, *tensor_, 0, columns_, [&](Index o) { return values + o * columns_; });
    else
      convert_rows(device, *tensor_, 0, {values, static_cast<std::size_t>(values_.size())});
  }

  /// Whether rows of a tensor are read where they lie, and not as a float copy.
  static bool is_read_in_place(const StoredTensor& tensor) {
    return lies_as<float>(tensor) || lies_as<bfloat16>(tensor) || lies_as<half>(tensor);
  }
  /// f(std::type_identity<W>), W the scalar that rows of a tensor are read in.
  template <typename F>
  static void visit_scalar(const StoredTensor& tensor, F&& f) {
    if (lies_as<bfloat16>(tensor))
      f(std::type_identity<bfloat16>{});
    else if (lies_as<half>(tensor))
      f(std::type_identity<half>{});
    else
      f(std::type_identity<float>{});
  }
  /// f(view), of float, bfloat16 or half, of one that keeps no INT4.
  template <typename F>
  void visit(F&& f) const {
    if (converted())
      f(view<float>());
    else
      visit_scalar(*tensor_,
                   [&]<typename W>(std::type_identity<W>) { f(this->template view<W>()); });
  }
  /// As INT4, with minimums where `minimums` says so.
  bool has_minimums() const { return is_int4() && int4_->has_minimums(); }
  Int4View int4_view(bool minimums) {
    if (minimums) int4_->add_minimums();
    return int4_->view();
  }
  template <typename W>
  View<W> view() const {
    const void* const data = converted() ? static_cast<const void*>(values_.data())
                                         : static_cast<const void*>(tensor_->bytes.data());
    return {static_cast<const W*>(data), rows_, columns_};
  }

 private:
  template <typename W>
  static constexpr StoredFormat kFormat = std::is_same_v<W, float>      ? StoredFormat::f32
                                          : std::is_same_v<W, bfloat16> ? StoredFormat::bf16
                                                                        : StoredFormat::f16;
  template <typename W>
  static bool lies_as(const StoredTensor& tensor) {
    return tensor.format == kFormat<W> &&
           reinterpret_cast<std::uintptr_t>(tensor.bytes.data()) % alignof(W) == 0;
  }

  const StoredTensor* tensor_;
  bool transposed_;
  Index rows_, columns_;
  PackedArray<float> values_;
  std::optional<StoredInt4> int4_;
};

/// f(views...) of matrices in one scalar, or of Int4View: where theirs differ, of float copies.
template <typename D, typename F, typename... Matrices>
void visit_matrices(const D& device, F&& f, StoredMatrix& first, Matrices&... others) {
  if (!((first.format() == others.format()) && ...)) {
    first.convert(device);
    (others.convert(device), ...);
  }
  if (first.is_int4()) {
    const bool minimums = (first.has_minimums() || ... || others.has_minimums());
    return f(first.int4_view(minimums), others.int4_view(minimums)...);
  }
  first.visit([&]<typename W>(const TensorView<const W, 2>& view) {
    f(view, others.template view<W>()...);
  });
}

/// Rows of the parts of a fused tensor: those of queries (part 0), keys (1) or values (2).
struct QkvRows {
  QkvLayout layout;
  Index heads, kv_heads, head_dim;

  Index count(int part) const { return (part == 0 ? heads : kv_heads) * head_dim; }
  Index total() const { return (heads + 2 * kv_heads) * head_dim; }
  /// Where the rows of head h of a part begin.
  Index first_row(int part, Index h) const {
    const Index group = heads / kv_heads;
    if (layout == QkvLayout::by_head) return (3 * h + part) * head_dim;
    if (layout == QkvLayout::by_group) {
      const Index kv = part == 0 ? h / group : h;
      return (kv * (group + 2) + (part == 0 ? h % group : group + part - 1)) * head_dim;
    }
    return (h + (part > 0 ? heads : 0) + (part > 1 ? kv_heads : 0)) * head_dim;
  }
  /// The rows of a part of `from` (rows, columns), one below the other.
  template <typename W>
  std::vector<W> gather(int part, const W* from, Index columns) const {
    std::vector<W> to(static_cast<std::size_t>(count(part) * columns));
    for (Index h = 0; h < count(part) / head_dim; ++h)
      std::copy_n(from + first_row(part, h) * columns, head_dim * columns,
                  to.data() + h * head_dim * columns);
    return to;
  }
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
