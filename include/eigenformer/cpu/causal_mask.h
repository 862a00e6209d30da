/// \file
/// CPU kernel of the causal mask. A row is at most four runs of one value, so the kernel writes
/// runs: one write of batch * queries * keys * sizeof(T) bytes and no arithmetic on elements,
/// around the caches where they would not hold the mask. Packed documents are compared key by key.
#pragma once

#include <cstdint>
#include <limits>

#include "../problem/causal_mask.h"
#include "../problem/visibility.h"
#include "backend.h"
#include "vector/copy.h"
#include "vector/streaming.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// One row as runs: open before `prefix`, blocked before `begin`, open before `end`, blocked before
/// `length`.
template <typename Isa, typename T>
struct CausalMaskRow {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  Index prefix, begin, end, length;

  static V open() { return V::zero(); }
  static V blocked() { return V::set1(-std::numeric_limits<C>::infinity()); }

  /// Run by run, through the caches.
  void store(T* row) const {
    fill_line(row, prefix, open());
    fill_line(row + prefix, begin - prefix, blocked());
    fill_line(row + begin, end - begin, open());
    fill_line(row + end, length - end, blocked());
  }

  /// Around the caches: every line inside the row is written in full and in order, also where runs
  /// meet. A loop of its own, from aligned vector to aligned vector.
  void store_streaming(T* row) const {
    constexpr Index bytes = V::lanes * Index{sizeof(T)};
    const Index misaligned = static_cast<Index>(reinterpret_cast<std::uintptr_t>(row) %
                                                static_cast<std::uintptr_t>(bytes));
    Index j = (std::min)(length, (bytes - misaligned) % bytes / Index{sizeof(T)});
    if (j > 0) blend(0).store_partial(row, static_cast<int>(j));
    const auto run = [&](const V& value, Index run_end) {
      for (; j + V::lanes <= run_end; j += V::lanes) value.store_streaming(row + j);
      // every run that ends inside this vector is in it
      if (j < run_end && j + V::lanes <= length) {
        blend(j).store_streaming(row + j);
        j += V::lanes;
      }
    };
    run(open(), prefix);
    run(blocked(), begin);
    run(open(), end);
    run(blocked(), length);
    if (j < length) blend(j).store_partial(row + j, static_cast<int>(length - j));
  }

 private:
  /// Elements [j, j + lanes) of the row.
  V blend(Index j) const {
    C lanes[V::lanes];
    for (int i = 0; i < V::lanes; ++i) lanes[i] = static_cast<C>(i);
    const V lane = V::load(lanes);
    const auto before = [&](Index edge) {
      return less(lane, V::set1(static_cast<C>(std::clamp<Index>(edge - j, 0, V::lanes))));
    };
    return select(before(prefix), open(),
                  select(before(begin), blocked(), select(before(end), open(), blocked())));
  }
};

template <typename Isa, typename T>
CausalMaskRow<Isa, T> causal_mask_row(const problem::CausalMask<T>& p, Index i) {
  const Index prefix = (std::min)(p.visibility.prefix, p.key_length);
  const problem::KeyRange keys = p.visibility.keys(p.query_offset + i, p.key_length);
  const Index begin = std::clamp(keys.begin, prefix, p.key_length);
  return {prefix, begin, std::clamp(keys.end, begin, p.key_length), p.key_length};
}

/// Rows [first, last) of all sequences, of one document each.
template <typename Isa, bool Streaming, typename T>
void causal_mask_rows(const problem::CausalMask<T>& p, Index first, Index last) {
  for (Index r = first; r < last; ++r) {
    const auto row = causal_mask_row<Isa>(p, r % p.query_length);
    if constexpr (Streaming)
      row.store_streaming(p.mask + r * p.key_length);
    else
      row.store(p.mask + r * p.key_length);
  }
}

template <typename T>
void packed_causal_mask_rows(const problem::CausalMask<T>& p, Index first, Index last) {
  for (Index r = first; r < last; ++r)
    for (Index j = 0; j < p.key_length; ++j)
      p.mask[r * p.key_length + j] = p.visible(r / p.query_length, r % p.query_length, j)
                                         ? T(0)
                                         : -std::numeric_limits<T>::infinity();
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::CausalMask<T>& p) {
  if (p.key_length == 0) return;  // any number of rows may be empty
  const Index rows = p.batch * p.query_length;
  const bool around_caches =
      written_around_caches(p.mask, rows * p.key_length * Index{sizeof(T)}, ReadsBeside::nothing);
  parallel_for(on, rows, Cost{p.key_length}, [&](Index first, Index last, int) {
    if (p.segment_ids != nullptr) return packed_causal_mask_rows(p, first, last);
    with_streaming<simd::Vec<compute_type<T>, Isa>>(around_caches, [&](auto streaming) {
      causal_mask_rows<Isa, decltype(streaming)::value>(p, first, last);
    });
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
