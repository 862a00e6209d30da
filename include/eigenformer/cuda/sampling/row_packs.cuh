/// \file
/// Passes over logits that ask for several packs at a time: a multiprocessor needs some 64 kB on
/// their way to be served at its full rate, and a block of 256 threads with one pack each has 4.
#pragma once

#include <cstdint>

#include "../packs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// body(token, logits, count) for the packs that begin at first, first + step, ... and below end;
/// `first` and `step` are multiples of the pack's width. Which they are does not depend on
/// alignment. The last pack of a line may hold less than its width, zeros behind.
template <int Depth, typename T, typename Body>
EIGENFORMER_DEVICE void for_each_pack_between(const T* logits, Index first, Index step, Index end,
                                              Body body) {
  using C = compute_type<T>;
  using Place = std::uint32_t;  // a vocabulary has less than 2^31 tokens
  constexpr int width = pack_width<T>;
  const auto run = [&](auto load) {
    const auto apart = static_cast<Place>(step), past = static_cast<Place>(end);
    for (Place t = static_cast<Place>(first); t + width <= past; t += Depth * apart) {
      Pack<T, width> packs[Depth];
      EIGENFORMER_UNROLL_ALL
      for (Place j = 0; j < Depth; ++j)
        if (t + j * apart + width <= past) packs[j] = load(t + j * apart);
      EIGENFORMER_UNROLL_ALL
      for (Place j = 0; j < Depth; ++j) {
        if (t + j * apart + width > past) continue;
        Pack<C, width> x;
        for (int i = 0; i < width; ++i) x[i] = static_cast<C>(packs[j][i]);
        body(static_cast<Index>(t + j * apart), x, width);
      }
    }
  };
  if (packs_fit<width>(logits, width))
    run([&](Place t) { return *reinterpret_cast<const Pack<T, width>*>(logits + t); });
  else
    run([&](Place t) {
      Pack<T, width> pack;
      for (int i = 0; i < width; ++i) pack[i] = logits[t + i];
      return pack;
    });
  const Index last = end / width * width;
  if (last == end || last < first || (last - first) % step != 0) return;
  Pack<C, width> x;
  for (int i = 0; i < width; ++i) x[i] = last + i < end ? static_cast<C>(logits[last + i]) : C(0);
  body(last, x, static_cast<int>(end - last));
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
