/// \file
/// Loops over the elements of tensors, several neighbours per thread: as many as 16 bytes hold of
/// the narrowest scalar, in loads and stores of 16 bytes, where every row begins at such a
/// multiple; one per thread elsewhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "launch.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Elements of a pack of each of these scalars.
template <typename... Ts>
inline constexpr int pack_width = static_cast<int>(16 / (std::min)({sizeof(Ts)...}));

/// Neighbours in memory. More than 16 bytes travel in several transfers.
template <typename T, int Width>
struct alignas(sizeof(T) * Width < 16 ? sizeof(T) * Width : 16) Pack {
  T values[Width];
  EIGENFORMER_DEVICE T& operator[](int i) { return values[i]; }
  EIGENFORMER_DEVICE const T& operator[](int i) const { return values[i]; }
};

/// Whether packs may begin at `first`, and at multiples of `stride` elements after it.
template <int Width, typename T>
EIGENFORMER_HOST_DEVICE bool packs_fit(const T* first, Index stride) {
  return reinterpret_cast<std::uintptr_t>(first) % alignof(Pack<T, Width>) == 0 &&
         stride % Width == 0;
}

/// The elements from `from` on, as C.
template <typename C, int Width, typename T>
EIGENFORMER_DEVICE Pack<C, Width> load_pack(const T* from) {
  const auto pack = *reinterpret_cast<const Pack<T, Width>*>(from);
  Pack<C, Width> result;
  for (int i = 0; i < Width; ++i) result[i] = static_cast<C>(pack[i]);
  return result;
}

/// Each element is rounded once.
template <int Width, typename C, typename T>
EIGENFORMER_DEVICE void store_pack(const Pack<C, Width>& values, T* to) {
  Pack<T, Width> pack;
  for (int i = 0; i < Width; ++i) pack[i] = static_cast<T>(values[i]);
  *reinterpret_cast<Pack<T, Width>*>(to) = pack;
}

/// Elements from `from` on as those from `to` on, each rounded once.
template <int Width, typename From, typename To>
EIGENFORMER_DEVICE void copy_pack(const From* from, To* to) {
  const auto pack = *reinterpret_cast<const Pack<From, Width>*>(from);
  if constexpr (std::is_same_v<From, To>)
    *reinterpret_cast<Pack<To, Width>*>(to) = pack;
  else
    store_pack<Width>(pack, to);
}

/// The width of a pack, as an argument.
template <int Width>
using WidthOf = std::integral_constant<int, Width>;

/// body(WidthOf<N>, j) for the elements of a line that are this thread's: packs of Width in turn,
/// one per thread. N is Width where the line begins at multiples of a pack in all arrays, and 1
/// else: the same elements in the same order, so that a sum over them has the same bits wherever
/// the line lies.
template <typename Body, int Width, typename... T>
EIGENFORMER_DEVICE void for_each_pack_of_line(WidthOf<Width>, Index thread, Index threads,
                                              Index count, const Body& body, const T*... arrays) {
  const bool fit = (packs_fit<Width>(arrays, 0) && ...);
  for (Index j = thread * Width; j < count; j += threads * Width) {
    if (fit && j + Width <= count)
      body(WidthOf<Width>{}, j);
    else
      for (Index i = j; i < j + Width && i < count; ++i) body(WidthOf<1>{}, i);
  }
}

/// The same with packs as wide as the narrowest scalar of the arrays allows.
template <typename Body, typename... T>
EIGENFORMER_DEVICE void for_each_pack_of_line(Index thread, Index threads, Index count,
                                              const Body& body, const T*... arrays) {
  for_each_pack_of_line(WidthOf<pack_width<T...>>{}, thread, threads, count, body, arrays...);
}

/// The same by all threads of a block.
template <typename Block, typename Body, typename... T>
EIGENFORMER_DEVICE void for_each_pack_of_line(const Block& block, Index count, const Body& body,
                                              const T*... arrays) {
  for_each_pack_of_line(block.thread(), block.size(), count, body, arrays...);
}

/// body(WidthOf<W>, row, column) for all of (rows, features); W is Width, and 1 at the end of a row
/// that is no multiple of it.
template <int Width, typename Body>
struct ForEachPack {
  static constexpr int kThreads = 256;
  Index rows, features;
  Body body;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const Index packs = (features + Width - 1) / Width, stride = block.count() * block.size();
    for (Index i = block.index() * block.size() + block.thread(); i < rows * packs; i += stride) {
      const Index row = rows == 1 ? 0 : i / packs, column = (i - row * packs) * Width;
      if (column + Width <= features)
        body(WidthOf<Width>{}, row, column);
      else
        for (Index j = column; j < features; ++j) body(WidthOf<1>{}, row, j);
    }
  }
};

/// `fit` says that all tensors of the body take packs of Width.
template <int Width, typename D, typename Body>
void launch_for_each_pack(const Backend<D>& on, const char* name, Index rows, Index features,
                          bool fit, const Body& body) {
  if (rows <= 0 || features <= 0) return;
  const auto start = [&](auto width) {
    using Kernel = ForEachPack<decltype(width)::value, Body>;
    const Index packs = rows * ((features + width - 1) / width);
    const Index blocks = (packs + Kernel::kThreads - 1) / Kernel::kThreads;
    launch(on, name, blocks < 65536 ? blocks : 65536, Kernel::kThreads, 0,
           Kernel{rows, features, body});
  };
  if (fit)
    start(WidthOf<Width>{});
  else
    start(WidthOf<1>{});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
