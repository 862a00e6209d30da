/// \file
/// What matrix kernels include: the register tiles of every ISA this translation unit may use, and
/// the dot that serves a tag.
#pragma once

#include "float.h"
#include "int4.h"
#if defined(EIGENFORMER_ISA_AMX)
#include "amx.h"
#endif

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace tile {
namespace detail {

Int8Generic pick_int8(isa::generic);
#if defined(EIGENFORMER_ISA_AVX2)
Int8Avx2 pick_int8(isa::avx2);
#endif
#if defined(EIGENFORMER_ISA_AVX_VNNI)
Int8AvxVnni pick_int8(isa::avx_vnni);
#endif
#if defined(EIGENFORMER_ISA_AVX512)
Int8Avx512 pick_int8(isa::avx512);
#endif
#if defined(EIGENFORMER_ISA_AVX512_VNNI)
Int8Avx512Vnni pick_int8(isa::avx512_vnni);
#endif
#if defined(EIGENFORMER_ISA_AMX)
Int8Amx pick_int8(isa::amx);
#endif
#if defined(EIGENFORMER_ISA_NEON)
Int8Neon pick_int8(isa::neon);
#endif
#if defined(EIGENFORMER_ISA_NEON_DOTPROD)
Int8NeonDotprod pick_int8(isa::neon_dotprod);
#endif

Int4Generic pick_int4(isa::generic);
#if defined(EIGENFORMER_ISA_AVX2)
Int4Avx2 pick_int4(isa::avx2);
#endif
#if defined(EIGENFORMER_ISA_AVX_VNNI)
Int4AvxVnni pick_int4(isa::avx_vnni);
#endif
#if defined(EIGENFORMER_ISA_AVX512)
Int4Avx512 pick_int4(isa::avx512);
#endif
#if defined(EIGENFORMER_ISA_AVX512_VNNI)
Int4Avx512Vnni pick_int4(isa::avx512_vnni);
#endif
#if defined(EIGENFORMER_ISA_NEON)
Int4Neon pick_int4(isa::neon);
#endif
#if defined(EIGENFORMER_ISA_NEON_DOTPROD)
Int4NeonDotprod pick_int4(isa::neon_dotprod);
#endif

LineDotGeneric pick_line(isa::generic);
#if defined(EIGENFORMER_ISA_AVX2)
LineDotAvx2 pick_line(isa::avx2);
#endif
#if defined(EIGENFORMER_ISA_AVX_VNNI)
LineDotAvxVnni pick_line(isa::avx_vnni);
#endif
#if defined(EIGENFORMER_ISA_AVX512)
LineDotAvx512 pick_line(isa::avx512);
#endif
#if defined(EIGENFORMER_ISA_AVX512_VNNI)
LineDotAvx512Vnni pick_line(isa::avx512_vnni);
#endif
#if defined(EIGENFORMER_ISA_NEON)
LineDotNeon pick_line(isa::neon);
#endif
#if defined(EIGENFORMER_ISA_NEON_DOTPROD)
LineDotNeonDotprod pick_line(isa::neon_dotprod);
#endif

template <typename Isa>
Widening<bfloat16, Isa> pick_bfloat16(isa::generic);
#if defined(EIGENFORMER_ISA_AVX512_BF16)
template <typename Isa>
Bfloat16Avx512 pick_bfloat16(isa::avx512_bf16);
#endif
#if defined(EIGENFORMER_ISA_AMX)
template <typename Isa>
Bfloat16Amx pick_bfloat16(isa::amx);
#endif

template <typename Stored, bool NarrowActivations, typename Isa>
auto pick_dot() {
  if constexpr (std::is_same_v<Stored, std::int8_t>)
    return decltype(pick_int8(Isa{})){};
  else if constexpr (std::is_same_v<Stored, int4>)
    return decltype(pick_int4(Isa{})){};
  else if constexpr (std::is_same_v<Stored, bfloat16> && NarrowActivations)
    return decltype(pick_bfloat16<Isa>(Isa{})){};
  else if constexpr (std::is_same_v<Stored, bfloat16> || std::is_same_v<Stored, half>)
    return Widening<Stored, Isa>{};
  else
    return Plain<Stored, Isa>{};
}

}  // namespace detail

/// The arithmetic for packed weights of Stored and activations of X: bfloat16 by bfloat16 may use
/// the ISA's bfloat16 products, int8 and int4 (always in groups) quantize the activations,
/// everything else widens to float (double to double).
template <typename Stored, typename X, typename Isa>
using Dot = decltype(detail::pick_dot<Stored, std::is_same_v<X, bfloat16>, Isa>());

/// The same for weights quantized in groups, whose sums are cut every 32 to 128 k: too short for
/// AMX.
template <typename Isa>
using GroupedDot = Dot<std::int8_t, std::int8_t,
                       std::conditional_t<std::is_base_of_v<isa::amx, Isa>, isa::avx512_bf16, Isa>>;

/// The same for four-bit weights.
template <typename Isa>
using DotOfInt4 = decltype(detail::pick_int4(Isa{}));

/// The arithmetic for rows of int8 weights where they lie.
template <typename Isa>
using LineDot = decltype(detail::pick_line(Isa{}));

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
