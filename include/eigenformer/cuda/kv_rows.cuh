/// \file
/// Where kernels find the rows of a KvSource. Its tables are host memory and name pages by number:
/// what goes to the device is a pointer for each page that the call touches, sequence after
/// sequence, in the one copy of the call's arguments.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <tuple>

#include "../core/workspace.h"
#include "../problem/kv_source.h"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// A KvSource on the device; rows and scales are (keys or values, sequence, head, position).
template <typename T>
struct KvRows {
  KvSource<T> source;             // its pages: those of all sequences, one after the other
  const Index* first_page;        // (batch) where page 0 of a sequence would be among them
  const std::byte* const* pages;  // nullptr: dense

  EIGENFORMER_DEVICE T* row(bool values, Index b, Index h, Index j) const {
    const KvSource<T>& s = source;
    if (pages != nullptr)
      return cell<T>(b, h, j, values ? s.value_offset : 0, values ? s.value_width() : s.head_dim);
    const T* const found =
        values ? s.values + b * s.value_sequence_stride + j * s.value_row_stride +
                     h * s.value_head_stride
               : s.keys + b * s.sequence_stride + j * s.row_stride + h * s.head_stride;
    return const_cast<T*>(found);  // whoever appends owns the memory behind it
  }
  EIGENFORMER_DEVICE float* scale(bool values, Index b, Index h, Index j) const {
    return cell<float>(b, h, j, values ? source.value_scale_offset : source.key_scale_offset, 1);
  }

 private:
  template <typename U>
  EIGENFORMER_DEVICE U* cell(Index b, Index h, Index j, std::size_t offset, Index width) const {
    const Index size = source.page_size;
    const std::byte* const page =
        pages[first_page[b] + source.ring.place(j / size)] + source.layer_offset + offset;
    return reinterpret_cast<U*>(const_cast<std::byte*>(page)) + (h * size + j % size) * width;
  }
};

/// Positions of one sequence.
struct Positions {
  Index begin, end;
};

/// The rows of a source, touched(b) of sequence b, and more arrays of the call, on the device.
template <typename D, typename T, typename Touched, typename... U>
std::tuple<KvRows<T>, const U*...> stage_rows(const Backend<D>& on, const char* name,
                                              const KvSource<T>& source, Touched&& touched,
                                              std::span<const U>... more) {
  if (source.tables == nullptr) {
    const auto staged = stage(on, name, more...);
    return std::tuple_cat(std::tuple(KvRows<T>{source, nullptr, nullptr}), staged);
  }
  Workspace::Frame frame(thread_workspace());
  const Index batch = source.batch, size = source.page_size;
  const auto pages_of = [&](Index b) {
    const Positions p = touched(b);
    if (source.ring.pages > 0 && p.begin < p.end)  // all of its table: two ranges of it, mostly
      return Positions{0,
                       (std::min)((p.end - 1) / size + 1, source.ring.begin + source.ring.pages)};
    return p.begin < p.end ? Positions{p.begin / size, (p.end - 1) / size + 1} : Positions{0, 0};
  };
  auto* const first = frame.take<Index>(batch);
  Index count = 0;
  for (Index b = 0; b < batch; ++b) {
    const Positions pages = pages_of(b);
    first[b] = count - pages.begin;
    count += pages.end - pages.begin;
  }
  auto* const flat = frame.take<const std::byte*>(count);
  for (Index b = 0; b < batch; ++b) {
    const Positions pages = pages_of(b);
    for (Index i = pages.begin; i < pages.end; ++i)
      flat[first[b] + i] = source.pages[source.tables[b][i]];
  }
  const auto staged =
      stage(on, name, std::span<const Index>(first, static_cast<std::size_t>(batch)),
            std::span<const std::byte* const>(flat, static_cast<std::size_t>(count)), more...);
  return std::apply(
      [&](const Index* first_page, const std::byte* const* pages, const U*... arrays) {
        return std::tuple<KvRows<T>, const U*...>(KvRows<T>{source, first_page, pages}, arrays...);
      },
      staged);
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
