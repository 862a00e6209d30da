/// \file
/// One tile product by the tensor cores (sm_80 and later): 2,048 multiply-adds of 16-bit numbers,
/// or 4,096 of int8, in one instruction of a warp.
#pragma once

#include "fragment.cuh"

#if defined(EIGENFORMER_CUDA_UNIT)
namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
__device__ void multiply_add(FragmentD<T>& d, const FragmentA<T>& a, const FragmentB<T>& b) {
  const auto* x = reinterpret_cast<const unsigned*>(a.values);
  const auto* y = reinterpret_cast<const unsigned*>(b.values);
  auto& v = d.values;
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  else if constexpr (std::is_same_v<T, half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
#endif
