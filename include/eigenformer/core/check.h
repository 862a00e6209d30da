/// \file
/// Argument checks. They stay on in release builds and cost O(shape). The text of an exception
/// names the operator, the argument, what was expected and what came; it is put together only when
/// the check fails.
#pragma once

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "error.h"
#include "memory.h"
#include "tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

inline void append_part(std::string& text, std::string_view part) { text += part; }
template <typename T>
  requires std::is_arithmetic_v<T>
void append_part(std::string& text, T value) {
  text += std::to_string(value);
}

/// Sizes that read as "(2, 3, 4)" in a text.
template <std::size_t Rank>
struct ShapeText {
  std::array<Index, Rank> sizes;
};
template <std::size_t Rank>
void append_part(std::string& text, const ShapeText<Rank>& shape) {
  text += '(';
  for (std::size_t d = 0; d < Rank; ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(shape.sizes[d]);
  }
  text += ')';
}

/// The shape of a view, to say in a text: no memory is taken where the check holds.
template <typename View>
auto shape_text(const View& view) {
  ShapeText<static_cast<std::size_t>(rank_of<View>)> shape{};
  for (std::size_t d = 0; d < shape.sizes.size(); ++d) shape.sizes[d] = view.dimension(d);
  return shape;
}

template <typename... Parts>
std::string join(std::string_view operation, const Parts&... parts) {
  std::string text(operation);
  text += ": ";
  (append_part(text, parts), ...);
  return text;
}

/// Throws std::invalid_argument "operation: parts..." unless `ok`.
/// require_that(rows == n, "linear", "bias has ", rows, " elements, weight has ", n, " rows");
template <typename... Parts>
void require_that(bool ok, std::string_view operation, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail<std::invalid_argument>(join(operation, parts...));
}

/// Throws std::length_error unless `ok`: a capacity ran out.
template <typename... Parts>
void require_capacity(bool ok, std::string_view operation, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail<std::length_error>(join(operation, parts...));
}

/// Throws std::out_of_range unless `ok`: a key is unknown.
template <typename... Parts>
void require_known(bool ok, std::string_view operation, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail<std::out_of_range>(join(operation, parts...));
}

/// Throws std::invalid_argument unless kernels of a device work on the memory that `what` lies in.
inline void require_memory(std::string_view operation, std::string_view what, const Memory& memory,
                           const Memory& of_device) {
  require_that(memory.backend == of_device.backend, operation, what, " lies in memory of ",
               memory.backend, ", the device works on that of ", of_device.backend);
}

/// The shapes of two tensors must agree in every dimension.
template <typename A, typename B>
void require_same_shape(std::string_view operation, std::string_view name_a, const A& a,
                        std::string_view name_b, const B& b) {
  static_assert(rank_of<A> == rank_of<B>, "eigenformer: two tensors of this call differ in rank");
  bool same = true;
  for (int d = 0; d < rank_of<A>; ++d)
    same = same &&
           a.dimension(static_cast<std::size_t>(d)) == b.dimension(static_cast<std::size_t>(d));
  if (!same) [[unlikely]]
    require_that(false, operation, name_a, " has shape ", shape_text(a), ", ", name_b,
                 " has shape ", shape_text(b));
}

/// Product of two sizes; throws std::invalid_argument where it does not fit an Index or a size is
/// negative.
inline Index checked_product(Index a, Index b, std::string_view operation, std::string_view what) {
  require_that(a >= 0 && b >= 0, operation, what, " has a negative size (", a, " x ", b, ")");
  Index product = 0;
  require_that(multiply_fits(a, b, product), operation, what, " of ", a, " x ", b,
               " elements overflows");
  return product;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
