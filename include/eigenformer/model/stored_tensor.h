/// \file
/// Tensors as files of models hold them: a name, a format, a shape and bytes that lie in the file.
/// What reads the bytes as numbers is in dequantize.h.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../core/compiler.h"
#include "error.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

static_assert(std::endian::native == std::endian::little,
              "eigenformer: the numbers in files of models are little endian, and so must be those "
              "of the machine that maps them");

/// How the elements of a tensor are stored. Plain numbers first; then the blocks of GGUF, each of
/// which is 32 or 256 neighbours of one row with scales of their own.
enum class StoredFormat : unsigned char {
  f64,
  f32,
  f16,
  bf16,
  i64,
  i32,
  i16,
  i8,
  u64,
  u32,
  u16,
  u8,
  boolean,
  q8_0,
  q5_0,
  q5_1,
  q4_0,
  q4_1,
  q6_k,
  q5_k,
  q4_k,
  mxfp4
};

inline constexpr int kStoredFormats = 22;

/// A format's name in messages and the layout of its blocks.
struct StoredLayout {
  std::string_view name;
  std::int64_t block_elements;
  std::int64_t block_bytes;
};
constexpr StoredLayout layout_of(StoredFormat format) {
  constexpr std::array<StoredLayout, kStoredFormats> layouts{
      {{"F64", 1, 8},      {"F32", 1, 4},    {"F16", 1, 2},      {"BF16", 1, 2},
       {"I64", 1, 8},      {"I32", 1, 4},    {"I16", 1, 2},      {"I8", 1, 1},
       {"U64", 1, 8},      {"U32", 1, 4},    {"U16", 1, 2},      {"U8", 1, 1},
       {"BOOL", 1, 1},     {"Q8_0", 32, 34}, {"Q5_0", 32, 22},   {"Q5_1", 32, 24},
       {"Q4_0", 32, 18},   {"Q4_1", 32, 20}, {"Q6_K", 256, 210}, {"Q5_K", 256, 176},
       {"Q4_K", 256, 144}, {"MXFP4", 32, 17}}};
  return layouts[static_cast<std::size_t>(format)];
}

/// A tensor in a mapped file: it ends with the object that maps it. Row-major, the outermost
/// dimension first, whatever order the file has. The bytes are as many as format and shape ask for,
/// and need not be aligned.
struct StoredTensor {
  std::string name;
  StoredFormat format = StoredFormat::f32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;

  /// Elements of a row: the innermost dimension, 1 of a scalar.
  std::int64_t columns() const { return shape.empty() ? 1 : shape.back(); }
  std::int64_t rows() const {
    std::int64_t rows = 1;
    for (std::size_t d = 0; d + 1 < shape.size(); ++d) rows *= shape[d];
    return rows;
  }
};

namespace detail {

/// The bytes of a tensor of this shape, or -1 where they, or the number of elements, overflow a
/// signed 64-bit number, a size is negative, or a row is no multiple of the format's block.
constexpr std::int64_t stored_bytes(StoredFormat format, std::span<const std::int64_t> shape) {
  const StoredLayout layout = layout_of(format);
  const std::int64_t columns = shape.empty() ? 1 : shape.back();
  if (columns % layout.block_elements != 0) return -1;
  // Sizes are multiplied as if none were 0, so that a 0 does not hide an overflow of the others.
  std::int64_t elements = 1, bytes = 0;
  bool empty = false;
  for (const std::int64_t size : shape) {
    if (size < 0) return -1;
    empty = empty || size == 0;
    if (size > 0 && !multiply_fits(elements, size, elements)) return -1;
  }
  const std::int64_t blocks = elements / layout.block_elements;
  if (!multiply_fits((blocks > 0 ? blocks : 1), layout.block_bytes, bytes)) return -1;
  return empty ? 0 : bytes;
}

/// Rows of a tensor, which are within it, as a tensor of their own.
inline StoredTensor stored_rows(const StoredTensor& tensor, std::int64_t first, std::int64_t rows) {
  const std::size_t row = tensor.bytes.size() / static_cast<std::size_t>(tensor.rows());
  return {tensor.name,
          tensor.format,
          {rows, tensor.columns()},
          tensor.bytes.subspan(static_cast<std::size_t>(first) * row,
                               static_cast<std::size_t>(rows) * row)};
}

/// "(2, 3)"
inline std::string stored_shape_text(std::span<const std::int64_t> shape) {
  std::string text = "(";
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(shape[d]);
  }
  return text + ")";
}

}  // namespace detail

/// The tensors of a model by name, of one file or of several.
class StoredTensors {
 public:
  using Map = std::map<std::string, StoredTensor, std::less<>>;
  StoredTensors() = default;
  /// `file` is named in messages.
  StoredTensors(std::string file, Map map) : file_(std::move(file)), map_(std::move(map)) {}

  const Map& map() const { return map_; }
  const std::string& file() const { return file_; }
  const StoredTensor* find(std::string_view name) const {
    const auto found = map_.find(name);
    return found == map_.end() ? nullptr : &found->second;
  }
  /// Throws ModelFileError where there is none, or one of another shape.
  const StoredTensor& at(std::string_view name) const {
    const StoredTensor* const tensor = find(name);
    if (tensor == nullptr) detail::fail_model(file_, name, "this tensor is missing");
    return *tensor;
  }
  const StoredTensor& at(std::string_view name, std::span<const std::int64_t> shape) const {
    const StoredTensor& tensor = at(name);
    if (!std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end()))
      detail::fail_model(file_, name,
                         "has shape " + detail::stored_shape_text(tensor.shape) + ", expected " +
                             detail::stored_shape_text(shape));
    return tensor;
  }

 private:
  std::string file_;
  Map map_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
