/// \file
/// The peer of linear layers: cuBLASLt, its first choice with 32 MiB of workspace. Its header is
/// needed to build this; its library is looked for when the program runs, so that built programs
/// travel without it.
#pragma once

#include "rows.h"

#if defined(EIGENFORMER_BENCH_CUBLASLT)
#include <cublasLt.h>
#include <dlfcn.h>

#include <memory>
#include <stdexcept>

namespace gpu_day {
namespace cublaslt {

/// The library, nullptr where there is none.
inline void* library() {
  static const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
  static void* const found = dlopen(name.c_str(), RTLD_NOW);
  return found;
}

template <typename F>
F* function(F*, const char* name) {
  void* const found = dlsym(library(), name);
  if (found == nullptr) throw std::runtime_error(std::string("cuBLASLt has no ") + name);
  return reinterpret_cast<F*>(found);
}
/// A call of the library's function of this name.
#define EIGENFORMER_CUBLASLT_CALL(name) function(static_cast<decltype(&name)>(nullptr), #name)

inline void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string("cuBLASLt: ") + what + " gives " +
                             std::to_string(static_cast<int>(status)));
}

/// Row-major (m, k) is a column-major (k, m): y^T (n, m) = weight^T^T (n, k) * x^T (k, m).
class Product {
 public:
  Product(Memory& memory, Index m, Index n, Index k)
      : stream_(memory.device().stream()),
        x_(memory.tensor<ef::bfloat16>(m, k).data()),
        weight_(memory.tensor<ef::bfloat16>(n, k).data()),
        y_(memory.tensor<ef::bfloat16>(m, n).data()),
        workspace_(memory.tensor<std::int8_t>(kWorkspace).data()) {
    check(EIGENFORMER_CUBLASLT_CALL(cublasLtCreate)(&handle_), "cublasLtCreate");
    check(EIGENFORMER_CUBLASLT_CALL(cublasLtMatmulDescCreate)(&product_, CUBLAS_COMPUTE_32F,
                                                              CUDA_R_32F),
          "a description");
    const cublasOperation_t transposed = CUBLAS_OP_T;
    check(EIGENFORMER_CUBLASLT_CALL(cublasLtMatmulDescSetAttribute)(
              product_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)),
          "a description");
    check(EIGENFORMER_CUBLASLT_CALL(cublasLtMatrixLayoutCreate)(&a_, CUDA_R_16BF, k, n, k),
          "a layout");
    check(EIGENFORMER_CUBLASLT_CALL(cublasLtMatrixLayoutCreate)(&b_, CUDA_R_16BF, k, m, k),
          "a layout");
    check(EIGENFORMER_CUBLASLT_CALL(cublasLtMatrixLayoutCreate)(&c_, CUDA_R_16BF, n, m, n),
          "a layout");
    cublasLtMatmulPreference_t preference = nullptr;
    check(EIGENFORMER_CUBLASLT_CALL(cublasLtMatmulPreferenceCreate)(&preference), "a preference");
    const std::size_t bytes = kWorkspace;
    check(EIGENFORMER_CUBLASLT_CALL(cublasLtMatmulPreferenceSetAttribute)(
              preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes)),
          "a preference");
    int found = 0;
    check(EIGENFORMER_CUBLASLT_CALL(cublasLtMatmulAlgoGetHeuristic)(
              handle_, product_, a_, b_, c_, c_, preference, 1, &choice_, &found),
          "its choice");
    EIGENFORMER_CUBLASLT_CALL(cublasLtMatmulPreferenceDestroy)(preference);
    if (found == 0) throw std::runtime_error("cuBLASLt: no algorithm");
  }
  ~Product() {
    EIGENFORMER_CUBLASLT_CALL(cublasLtMatrixLayoutDestroy)(a_);
    EIGENFORMER_CUBLASLT_CALL(cublasLtMatrixLayoutDestroy)(b_);
    EIGENFORMER_CUBLASLT_CALL(cublasLtMatrixLayoutDestroy)(c_);
    EIGENFORMER_CUBLASLT_CALL(cublasLtMatmulDescDestroy)(product_);
    EIGENFORMER_CUBLASLT_CALL(cublasLtDestroy)(handle_);
  }
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  void operator()() const {
    const float one = 1, zero = 0;
    check(EIGENFORMER_CUBLASLT_CALL(cublasLtMatmul)(handle_, product_, &one, weight_, a_, x_, b_,
                                                    &zero, y_, c_, y_, c_, &choice_.algo,
                                                    workspace_, kWorkspace, stream_),
          "the product");
  }

 private:
  static constexpr Index kWorkspace = Index{32} << 20;
  cudaStream_t stream_;
  const void *x_, *weight_;
  void *y_, *workspace_;
  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t product_ = nullptr;
  cublasLtMatrixLayout_t a_ = nullptr, b_ = nullptr, c_ = nullptr;
  cublasLtMatmulHeuristicResult_t choice_{};
};

}  // namespace cublaslt

/// y (m, n) = x (m, k) * weight (n, k)^T of bfloat16; empty where there is no cuBLASLt.
inline Prepare cublaslt_linear(Index m, Index n, Index k) {
  if (cublaslt::library() == nullptr) return {};
  return [=](Memory& memory) -> Call {
    const auto product = std::make_shared<cublaslt::Product>(memory, m, n, k);
    return [=] { (*product)(); };
  };
}

}  // namespace gpu_day

#else

namespace gpu_day {
inline Prepare cublaslt_linear(Index, Index, Index) { return {}; }
}  // namespace gpu_day

#endif
