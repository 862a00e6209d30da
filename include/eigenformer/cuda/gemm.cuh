/// \file
/// Products of many tokens by cuBLASLt, for who asks for it: EIGENFORMER_CUBLASLT, the CMake option
/// and the macro, which links CUDA::cublasLt. Its kernels use what our tiles do not (wgmma and TMA
/// on Hopper): 512 tokens of an 8192 x 8192 bfloat16 layer took 117 us on an H200, our tiles 252,
/// and 4096 tokens 0.84 and 1.92 ms. It takes what
/// has kGemmTokens tokens and more, factors of one scalar (float, bfloat16, half; int8 with a scale
/// for each row) whose lines begin at multiples of 16 bytes. int8 sums are exact, and keep their
/// bits. Floating sums come in an order of cuBLASLt's own, chosen for the shape: results of so many
/// tokens then differ in their last bits from those of fewer, and gradients of micro-batches from
/// those of one batch.
///
///   gemm<T>(on, name, shape, d, a, b, workspace)    false where there is no such product: nothing
///                                                   is launched then
///
/// The one below is that of Eigen::GpuDevice; another device brings its own, found by the type of
/// the backend. An algorithm is chosen when a stream sees a shape first, and kept; nothing is
/// allocated but scratch, of which a call that is captured into a graph keeps its own: 8 MiB and
/// the sums (the calls of an ef::StepGraph share theirs).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>

#include "stage.cuh"
#include "tile/operand.cuh"

#if defined(EIGENFORMER_CUBLASLT) && defined(EIGENFORMER_CUDA_UNIT)
#include <cublasLt.h>
#endif

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

#if defined(EIGENFORMER_CUBLASLT)
inline constexpr bool kUsesGemm = true;
#else
inline constexpr bool kUsesGemm = false;
#endif

/// Fewer tokens stream the weight, which our kernels do at the memory's pace.
inline constexpr Index kGemmTokens = 64;

/// Bytes of the device for partial sums.
inline constexpr Index kGemmWorkspace = Index{8} << 20;

/// d (rows, columns) = the sums over depth of a times b, or += them. Lines of a factor hold all k
/// of a row (of a column), or, by_depth, all rows (columns) of a k. Those of d have no gaps.
struct GemmShape {
  Index rows, columns, depth;
  Index a_stride, b_stride;  // from one line to the next
  bool a_by_depth, b_by_depth, adds;

  std::string text() const {
    return std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(depth);
  }
};

template <typename T, typename D, typename R>
bool multiply_by_gemm(const Backend<D>& on, const char* name, const GemmShape& shape, R* d,
                      const T* a, const T* b, std::byte* workspace) {
  if (shape.rows == 0 || shape.columns == 0 || shape.depth == 0) return false;
  if (!packs_fit<pack_width<T>>(a, shape.a_stride) || !packs_fit<pack_width<T>>(b, shape.b_stride))
    return false;
  if (!packs_fit<pack_width<R>>(d, 0) || shape.columns % 4 != 0) return false;  // as int8 needs
  return gemm(on, name, shape, d, a, b, workspace);
}

/// The same for calls that need no other scratch.
template <typename T, typename D, typename R>
bool multiply_by_gemm(const Backend<D>& on, const char* name, const GemmShape& shape, R* d,
                      const T* a, const T* b) {
  bool done = false;
  with_scratch<std::byte>(on, name, {kGemmWorkspace}, [&](std::byte* workspace) {
    done = multiply_by_gemm(on, name, shape, d, a, b, workspace);
  });
  return done;
}

/// What is made of sums that lie in memory, those of one matrix after those of the other.
template <typename Sum, int Matrices, typename End>
struct StoreSums {
  const Sum* sums;  // (tokens, rows) each
  Index rows, count;
  End end;

  EIGENFORMER_DEVICE void operator()(Index at) const {
    Sum values[Matrices];
    for (int m = 0; m < Matrices; ++m) values[m] = sums[m * count + at];
    end.store(at / rows, at % rows, values);
  }
};

template <typename T>
using gemm_sum = std::conditional_t<std::is_same_v<T, std::int8_t>, std::int32_t, float>;

/// Whether factors of these scalars, multiplied as T, may come to it at all.
template <typename T, typename... Factors>
inline constexpr bool takes_gemm =
    kUsesGemm && !std::is_same_v<T, double> && (std::is_same_v<T, Factors> && ...);

/// Bytes of scratch for a layer of `matrices`; 0 where it does not come to it.
template <typename T>
Index gemm_scratch(Index tokens, Index rows, int matrices) {
  if (!kUsesGemm || tokens < kGemmTokens) return 0;
  return kGemmWorkspace + matrices * tokens * rows * static_cast<Index>(sizeof(gemm_sum<T>));
}

/// end.store(token, row, sums) for all of (x.rows, weight.rows), by a product and a pass over its
/// sums; false where there is no such product.
template <typename T, typename D, int Matrices, typename W, typename X, typename End>
bool layer_by_gemm([[maybe_unused]] const Backend<D>& on, [[maybe_unused]] const char* name,
                   [[maybe_unused]] const Operand<T, W, Matrices>& weight,
                   [[maybe_unused]] const Operand<T, X>& x, [[maybe_unused]] const End& end,
                   [[maybe_unused]] std::byte* scratch) {
  if constexpr (takes_gemm<T, W, X>) {
    if (x.rows < kGemmTokens || !weight.whole || !x.whole) return false;
    using Sum = gemm_sum<T>;
    constexpr Index each = Operand<T, X>::kEach;  // zeros follow, as `whole` says
    const GemmShape shape{x.rows,   weight.rows,   (x.depth + each - 1) / each * each,
                          x.stride, weight.stride, false,
                          false,    false};
    const Index count = x.rows * weight.rows;
    Sum* const sums = reinterpret_cast<Sum*>(scratch + kGemmWorkspace);
    for (int m = 0; m < Matrices; ++m)
      if (!multiply_by_gemm(on, name, shape, sums + m * count, x.data[0], weight.data[m], scratch))
        return false;
    launch_for_each(on, name, count, StoreSums<Sum, Matrices, End>{sums, weight.rows, count, end});
    return true;
  } else {
    return false;
  }
}

/// The same for calls that need no other scratch.
template <typename T, typename D, int Matrices, typename W, typename X, typename End>
bool layer_by_gemm([[maybe_unused]] const Backend<D>& on, [[maybe_unused]] const char* name,
                   [[maybe_unused]] const Operand<T, W, Matrices>& weight,
                   [[maybe_unused]] const Operand<T, X>& x, [[maybe_unused]] const End& end) {
  bool done = false;
  if constexpr (takes_gemm<T, W, X>)
    if (const Index bytes = gemm_scratch<T>(x.rows, weight.rows, Matrices); bytes > 0)
      with_scratch<std::byte>(on, name, {bytes}, [&](std::byte* scratch) {
        done = layer_by_gemm(on, name, weight, x, end, scratch);
      });
  return done;
}

#if defined(EIGENFORMER_CUBLASLT) && defined(EIGENFORMER_CUDA_UNIT)

template <typename T>
inline constexpr cudaDataType_t gemm_type = [] {
  if (std::is_same_v<T, float>) return CUDA_R_32F;
  if (std::is_same_v<T, bfloat16>) return CUDA_R_16BF;
  if (std::is_same_v<T, half>) return CUDA_R_16F;
  return std::is_same_v<T, std::int8_t> ? CUDA_R_8I : CUDA_R_32I;
}();

/// What a stream knows of cuBLASLt: a handle, and the products it has seen.
class GemmPlans {
 public:
  struct Plan {
    cublasLtMatmulDesc_t product = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;  // in the order of cuBLASLt
    cublasLtMatmulAlgo_t algorithm{};
    bool exists = false;
  };

  template <typename T, typename R>
  bool multiply(cudaStream_t stream, const char* name, const GemmShape& shape, R* d, const T* a,
                const T* b, std::byte* workspace) {
    const Plan& plan = plan_of(name, shape, gemm_type<T>, gemm_type<R>);
    if (!plan.exists) return false;
    const gemm_sum<T> alpha = 1, beta = shape.adds ? 1 : 0;
    // row-major (rows, columns) is what cuBLASLt calls (columns, rows): d^T = b^T a^T
    const cublasStatus_t status = cublasLtMatmul(
        handle_, plan.product, &alpha, b, plan.a, a, plan.b, &beta, d, plan.d, d, plan.d,
        &plan.algorithm, workspace, static_cast<std::size_t>(kGemmWorkspace), stream);
    // It refuses some small products that its heuristic has an algorithm for, before any launch.
    if (status == CUBLAS_STATUS_INVALID_VALUE || status == CUBLAS_STATUS_NOT_SUPPORTED)
      return false;
    check(status, name, shape);
    return true;
  }

 private:
  using Key = std::array<Index, 10>;

  static void check(cublasStatus_t status, const char* name, const GemmShape& shape) {
    if (status != CUBLAS_STATUS_SUCCESS)
      detail::fail<DeviceError>(std::string(name) + ": product of " + shape.text() +
                                ": cuBLASLt says " + cublasLtGetStatusString(status));
  }

  const Plan& plan_of(const char* name, const GemmShape& s, cudaDataType_t factors,
                      cudaDataType_t result) {
    const Key key{s.rows,
                  s.columns,
                  s.depth,
                  s.a_stride,
                  s.b_stride,
                  Index{s.adds},
                  Index{s.a_by_depth},
                  Index{s.b_by_depth},
                  Index{factors},
                  Index{result}};
    const std::lock_guard lock(mutex_);
    const auto found = plans_.find(key);
    if (found != plans_.end()) return found->second;
    // the stream may be captured: what is allocated here is no part of its graph
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), name);
    Plan plan;
    const cublasStatus_t status = choose(plan, s, factors, result);
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), name);
    check(status, name, s);
    return plans_.emplace(key, plan).first->second;
  }

  /// The first call that fails ends it.
  cublasStatus_t choose(Plan& plan, const GemmShape& s, cudaDataType_t factors,
                        cudaDataType_t result) {
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    const auto call = [&](auto function, auto... arguments) {
      if (status == CUBLAS_STATUS_SUCCESS) status = function(arguments...);
    };
    const auto option = [&](cublasLtMatmulDescAttributes_t which, cublasOperation_t value) {
      call(cublasLtMatmulDescSetAttribute, plan.product, which, &value, sizeof(value));
    };
    const auto layout = [&](cublasLtMatrixLayout_t& to, cudaDataType_t type, Index line,
                            Index lines, Index stride) {
      call(cublasLtMatrixLayoutCreate, &to, type, static_cast<std::uint64_t>(line),
           static_cast<std::uint64_t>(lines), std::int64_t{stride});
    };
    const bool exact = factors == CUDA_R_8I;
    if (handle_ == nullptr) call(cublasLtCreate, &handle_);
    call(cublasLtMatmulDescCreate, &plan.product, exact ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F,
         exact ? CUDA_R_32I : CUDA_R_32F);
    option(CUBLASLT_MATMUL_DESC_TRANSA, s.b_by_depth ? CUBLAS_OP_N : CUBLAS_OP_T);
    option(CUBLASLT_MATMUL_DESC_TRANSB, s.a_by_depth ? CUBLAS_OP_T : CUBLAS_OP_N);
    layout(plan.a, factors, s.b_by_depth ? s.columns : s.depth, s.b_by_depth ? s.depth : s.columns,
           s.b_stride);
    layout(plan.b, factors, s.a_by_depth ? s.rows : s.depth, s.a_by_depth ? s.depth : s.rows,
           s.a_stride);
    layout(plan.d, result, s.columns, s.rows, s.columns);
    cublasLtMatmulPreference_t limits = nullptr;
    call(cublasLtMatmulPreferenceCreate, &limits);
    const auto limit = [&](cublasLtMatmulPreferenceAttributes_t which, auto value) {
      call(cublasLtMatmulPreferenceSetAttribute, limits, which, &value, sizeof(value));
    };
    limit(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::size_t>(kGemmWorkspace));
    for (const auto which :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      limit(which, std::uint32_t{16});
    cublasLtMatmulHeuristicResult_t found{};
    int count = 0;
    call(cublasLtMatmulAlgoGetHeuristic, handle_, plan.product, plan.a, plan.b, plan.d, plan.d,
         limits, 1, &found, &count);
    if (limits != nullptr) cublasLtMatmulPreferenceDestroy(limits);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED) return CUBLAS_STATUS_SUCCESS;
    plan.exists = count > 0 && found.state == CUBLAS_STATUS_SUCCESS;
    plan.algorithm = found.algo;
    return status;
  }

  std::mutex mutex_;
  cublasLtHandle_t handle_ = nullptr;
  std::map<Key, Plan> plans_;  // whose elements stay where they are
};

/// Those of a stream are never destroyed, as its staging is not.
template <typename T, typename R>
bool gemm(const Backend<Eigen::GpuDevice>& on, const char* name, const GemmShape& shape, R* d,
          const T* a, const T* b, std::byte* workspace) {
  static auto& mutex = *new std::mutex;
  static auto& all = *new std::map<cudaStream_t, GemmPlans>;
  const cudaStream_t stream = on.device.stream();
  GemmPlans* plans = nullptr;
  {
    const std::lock_guard lock(mutex);
    plans = &all[stream];
  }
  return plans->multiply(stream, name, shape, d, a, b, workspace);
}

#endif

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
