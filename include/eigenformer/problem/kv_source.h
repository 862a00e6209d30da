/// \file
/// Where attention finds keys and values: rows of head_dim and of value_dim elements, reached by
/// (sequence, KV head, position). One struct covers dense tensors and every cache, so that
/// attention is written once. A page table turns a position into a page; storage may be INT8 with
/// one scale per row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/tensor.h"
#include "visibility.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// Page i of a sequence stands at place(i) of its table: the first `begin` for good, later ones in
/// a ring of `pages`, each in the place of an older one. pages 0: all for good.
struct PageRing {
  Index begin, pages;

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE Index place(Index i) const {
    return pages == 0 || i < begin ? i : begin + (i - begin) % pages;
  }
};

}  // namespace problem

/// T is the stored type: float, double, bfloat16, half, or int8 with scales.
///
/// Dense (tables == nullptr): row (b, h, j) starts at keys + b * sequence_stride + j * row_stride +
/// h * head_stride.
///
/// Paged: position j of sequence b lies in page id tables[b][ring.place(j / page_size)]; that page
/// starts at pages[id], and within it
///   keys         layer_offset + 0                     (kv_heads, page_size, head_dim) of T
///   values       layer_offset + value_offset          (kv_heads, page_size, value_dim) of T
///   key scales   layer_offset + key_scale_offset      (kv_heads, page_size) of float, INT8 only
///   value scales layer_offset + value_scale_offset    (kv_heads, page_size) of float, INT8 only
/// Offsets are in bytes. Rows at or past lengths[b] may hold anything and must not be read.
template <typename T>
struct KvSource {
  Index batch = 0, kv_heads = 0, head_dim = 0;
  Index value_dim = -1;            // -1: head_dim
  const Index* lengths = nullptr;  // (batch) valid positions of each sequence
  // (batch) those of them that the cache has given up, which attention must not see; nullptr: none
  const problem::KeyRange* gone = nullptr;

  // INT8 only, (kv_heads, head_dim) of the backend's memory, or nullptr: keys are what is stored
  // times the scale of their channel (and of their row, which is then 1, or NaN)
  const float* key_channel_scales = nullptr;

  const T* keys = nullptr;
  const T* values = nullptr;
  // In elements: of the keys, of the values.
  Index sequence_stride = 0, row_stride = 0, head_stride = 0;
  Index value_sequence_stride = 0, value_row_stride = 0, value_head_stride = 0;

  const std::byte* const* pages = nullptr;      // [page id]
  const std::int32_t* const* tables = nullptr;  // [sequence][page of the sequence] -> page id
  Index page_size = 0;                          // positions in a page
  std::size_t layer_offset = 0, value_offset = 0, key_scale_offset = 0, value_scale_offset = 0;
  problem::PageRing ring = {};

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE Index value_width() const {
    return value_dim < 0 ? head_dim : value_dim;
  }
  EIGENFORMER_INLINE const T* key_row(Index b, Index h, Index j) const {
    if (tables == nullptr) return keys + b * sequence_stride + j * row_stride + h * head_stride;
    return paged_row<T>(b, h, j, 0, head_dim);
  }
  EIGENFORMER_INLINE const T* value_row(Index b, Index h, Index j) const {
    if (tables == nullptr)
      return values + b * value_sequence_stride + j * value_row_stride + h * value_head_stride;
    return paged_row<T>(b, h, j, value_offset, value_width());
  }
  /// The page of a sequence's positions from index * page_size on.
  EIGENFORMER_INLINE const std::byte* page(Index b, Index index) const {
    return pages[tables[b][ring.place(index)]] + layer_offset;
  }
  EIGENFORMER_INLINE float key_scale(Index b, Index h, Index j) const {
    return *key_scale_row(b, h, j);
  }
  EIGENFORMER_INLINE float value_scale(Index b, Index h, Index j) const {
    return *value_scale_row(b, h, j);
  }
  /// The scales from position j to the end of its page.
  EIGENFORMER_INLINE const float* key_scale_row(Index b, Index h, Index j) const {
    return paged_row<float>(b, h, j, key_scale_offset, 1);
  }
  EIGENFORMER_INLINE const float* value_scale_row(Index b, Index h, Index j) const {
    return paged_row<float>(b, h, j, value_scale_offset, 1);
  }

 private:
  template <typename U>
  EIGENFORMER_INLINE const U* paged_row(Index b, Index h, Index j, std::size_t offset,
                                        Index width) const {
    return reinterpret_cast<const U*>(page(b, j / page_size) + offset) +
           (h * page_size + j % page_size) * width;
  }
};

}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
