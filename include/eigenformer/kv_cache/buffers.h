/// \file
/// Keys and values appended to the caller's own dense buffers; caches that own their memory are in
/// kv_cache.h.
#pragma once

#include <algorithm>
#include <span>
#include <string_view>

#include "../core/check.h"
#include "../core/device.h"
#include "../core/dispatch.h"
#include "../core/heads_view.h"
#include "../cpu/kv_cache.h"
#include "../kv/page.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Two tensors differ in their last dimension at most.
template <typename A, typename B>
void require_same_rows(std::string_view operation, std::string_view a_name, const A& a,
                       std::string_view b_name, const B& b) {
  bool same = true;
  for (std::size_t d = 0; d + 1 < rank_of<A>; ++d) same = same && a.dimension(d) == b.dimension(d);
  if (!same)
    require_that(false, operation, a_name, " has shape ", shape_text(a), ", ", b_name,
                 " has shape ", shape_text(b), ", expected them to differ in width only");
}

}  // namespace detail

/// The cache as a plain buffer of the caller's, on any device: writes new_keys and new_values
/// (batch, n, kv_heads, head_dim; of values value_dim) of T into key_buffer and value_buffer
/// (batch, capacity, kv_heads, the same width) of T or a narrower floating-point scalar, sequence b
/// at positions [positions[b], positions[b] + n). A negative position leaves its sequence out.
/// Other rows are not touched; buffers and new rows must not overlap. `positions` (batch) is memory
/// of the device. Throws std::invalid_argument for shapes and sizes that overflow,
/// std::length_error where a position + n exceeds the capacity, before anything is written; on a
/// GPU positions cannot be read by the host, and a row past the capacity is left out instead.
/// Allocates nothing.
template <Device D, typename KeyBuffer, typename ValueBuffer, typename Keys, typename Values>
void append_kv_into(const D& device, KeyBuffer&& key_buffer, ValueBuffer&& value_buffer,
                    const Keys& new_keys, const Values& new_values,
                    std::span<const Index> positions) {
  constexpr auto name = "append_kv_into";
  using T = scalar_of<Keys>;
  using Storage = scalar_of<KeyBuffer>;
  auto key_rows = output_view<4>(key_buffer);
  auto value_rows = output_view<4>(value_buffer);
  const auto keys = detail::heads_input<4>(new_keys);
  const auto values = detail::heads_input<4>(new_values);
  static_assert(
      std::is_same_v<scalar_of<Values>, T> && std::is_same_v<scalar_of<ValueBuffer>, Storage>,
      "eigenformer: keys and values have one scalar, and so have their buffers");
  static_assert(KvStorage<Storage, T> && FloatingScalar<Storage>,
                "eigenformer: a buffer holds the scalar of the new rows or a narrower "
                "floating-point one; INT8 needs the scales of a cache");
  detail::require_same_rows(name, "new_keys", keys, "new_values", values);
  detail::require_same_rows(name, "key_buffer", key_rows, "value_buffer", value_rows);
  const Index batch = keys.dimension(0), added = keys.dimension(1),
              capacity = key_rows.dimension(1);
  const auto require_buffer = [&](std::string_view what, const auto& buffer, const auto& rows) {
    if (buffer.dimension(0) != batch || buffer.dimension(2) != rows.dimension(2) ||
        buffer.dimension(3) != rows.dimension(3))
      detail::require_that(
          false, name, what, "_buffer (batch, capacity, kv_heads, width) has shape ",
          detail::shape_text(buffer), ", new_", what, "s has shape ", detail::shape_text(rows));
  };
  require_buffer("key", key_rows, keys);
  require_buffer("value", value_rows, values);
  detail::require_that(static_cast<Index>(positions.size()) == batch, name, "positions has ",
                       positions.size(), " elements, new_keys has a batch of ", batch);
  if constexpr (detail::host_readable<D>)
    for (Index b = 0; b < batch; ++b) {
      const Index position = positions[static_cast<std::size_t>(b)];
      detail::require_capacity(position < 0 || (added <= capacity && position <= capacity - added),
                               name, "sequence ", b, " at position ", position, " + ", added,
                               " new ones exceeds the capacity of ", capacity);
    }
  const Index width = (std::max)(keys.dimension(3), values.dimension(3));
  if (batch == 0 || added == 0 || keys.dimension(2) == 0 || width == 0)
    return;  // and sizes of tensors that hold nothing may overflow
  detail::checked_size(name, "key_buffer", key_rows);
  detail::checked_size(name, "value_buffer", value_rows);
  detail::checked_size(name, "new_keys", keys);
  detail::checked_size(name, "new_values", values);
  KvSource<Storage> target{};
  target.batch = batch;
  target.kv_heads = keys.dimension(2);
  target.head_dim = target.head_stride = keys.dimension(3);
  target.row_stride = target.kv_heads * target.head_dim;
  target.sequence_stride = capacity * target.row_stride;
  target.value_dim = target.value_head_stride = values.dimension(3);
  target.value_row_stride = target.kv_heads * target.value_dim;
  target.value_sequence_stride = capacity * target.value_row_stride;
  target.keys = key_rows.data();
  target.values = value_rows.data();
  detail::run(device,
              problem::KvBufferAppend<T, Storage>{
                  {keys.data(), values.data(), detail::strides_of(keys), detail::strides_of(values),
                   batch * added, added, nullptr, positions.data(), capacity, target}});
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
