/// \file
/// One tile product by the tensor cores (sm_80 and later): 2,048 multiply-adds of 16-bit numbers,
/// or 4,096 of int8, in one instruction of a warp. And how its operands come there: fragments of
/// rows in shared memory, transposed on the way, pairs of floats in one register, and powers of 2.
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

/// Lane l brings the address of 8 columns of row l % 16, those from l / 16 * 8 on.
template <typename T>
__device__ void load_transposed(FragmentB<T> (&b)[2], const T* row) {
  static_assert(sizeof(T) == 2);
  auto* const x = reinterpret_cast<unsigned*>(b[0].values);
  auto* const y = reinterpret_cast<unsigned*>(b[1].values);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(y[0]), "=r"(y[1])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}

/// a in the lower half.
template <typename T>
__device__ unsigned rounded_pair(float a, float b) {
  unsigned pair;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  } else {
    static_assert(std::is_same_v<T, half>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  }
  return pair;
}

__device__ inline float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
#endif
