/// \file
/// What every test compares with: random and poisoned tensors, tolerances (in this one place),
/// relative errors, equal bits, the devices and ISA tags to sweep.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include <eigenformer/core/dispatch.h>
#include <eigenformer/core/tensor.h>
#include <eigenformer/cpu/simd/simd.h>

#if defined(EIGENFORMER_ISA_AMX)
#include "../emulators/amx/amx_emulator.h"
#endif

namespace eigenformer_test {

namespace ef = eigenformer;
using ef::Index;

/// Relative Frobenius error allowed against a double reference on normal(0, 1) inputs: the
/// contract's numbers.
template <typename T>
constexpr double tolerance() {
  if constexpr (std::is_same_v<T, double>)
    return 1e-12;
  else if constexpr (std::is_same_v<T, float>)
    return 1e-5;
  else if constexpr (std::is_same_v<T, ef::half>)
    return 2e-3;
  else
    return 1e-2;
}

/// Eigen has an array type of its own in CUDA code, so sizes go through its dimensions.
template <int Rank>
Eigen::DSizes<Index, Rank> dimensions_of(
    const std::array<Index, static_cast<std::size_t>(Rank)>& sizes) {
  Eigen::DSizes<Index, Rank> result;
  for (int d = 0; d < Rank; ++d) result[d] = sizes[static_cast<std::size_t>(d)];
  return result;
}

/// normal(0, 1) values, the same for a seed on every machine up to the standard library.
template <typename T, int Rank>
ef::Tensor<T, Rank> random_tensor(std::array<Index, static_cast<std::size_t>(Rank)> sizes,
                                  unsigned seed, double scale = 1.0) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0.0, scale);
  ef::Tensor<T, Rank> tensor(dimensions_of<Rank>(sizes));
  for (Index i = 0; i < tensor.size(); ++i)
    tensor.data()[i] = static_cast<T>(static_cast<float>(normal(generator)));
  return tensor;
}

/// Numbers whose groups of 32 to 128 have scales that are halves, those of GGUF's Q8_0: the largest
/// of every 32 is 127 in magnitude.
inline ef::Tensor<float, 2> in_blocks(const ef::Tensor<float, 2>& weight) {
  ef::Tensor<float, 2> rounded(weight);
  for (Index r = 0; r < weight.dimension(0); ++r)
    for (Index i = 0; i < weight.dimension(1); ++i)
      rounded(r, i) = (i % 32 == 0 ? 127 : std::round(63 * std::tanh(weight(r, i)))) / 1024;
  return rounded;
}

/// A tensor full of NaN (of -128 for integers): memory that must be written before it is read.
template <typename T, int Rank>
ef::Tensor<T, Rank> poisoned_tensor(std::array<Index, static_cast<std::size_t>(Rank)> sizes) {
  ef::Tensor<T, Rank> tensor(dimensions_of<Rank>(sizes));
  for (Index i = 0; i < tensor.size(); ++i) {
    if constexpr (std::is_integral_v<T>)
      tensor.data()[i] = std::numeric_limits<T>::min();
    else
      tensor.data()[i] = std::numeric_limits<T>::quiet_NaN();
  }
  return tensor;
}

/// The same values in double.
template <typename X>
auto to_double(const X& x) {
  constexpr int rank = ef::rank_of<X>;
  ef::Tensor<double, rank> result(ef::detail::sizes_of<rank>(x));
  for (Index i = 0; i < result.size(); ++i) result.data()[i] = static_cast<double>(x.data()[i]);
  return result;
}

/// ||actual - expected|| / ||expected||, infinite where a value is not finite or shapes differ.
template <typename A, typename B>
double relative_error(const A& actual, const B& expected) {
  for (int d = 0; d < ef::rank_of<A>; ++d)
    if (actual.dimension(static_cast<std::size_t>(d)) !=
        expected.dimension(static_cast<std::size_t>(d)))
      return std::numeric_limits<double>::infinity();
  double difference = 0, norm = 0;
  for (Index i = 0; i < actual.size(); ++i) {
    const double a = static_cast<double>(actual.data()[i]),
                 e = static_cast<double>(expected.data()[i]);
    if (!std::isfinite(a)) return std::numeric_limits<double>::infinity();
    difference += (a - e) * (a - e);
    norm += e * e;
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

/// relative_error, and beside it every element: |actual - expected| of no more than `element_bound`
/// times |expected| and the root mean square of the whole together. The norm alone would pass one
/// wrong element among 1 / bound^2.
template <typename A, typename B>
::testing::AssertionResult within(const A& actual, const B& expected, double bound,
                                  double element_bound) {
  const double error = relative_error(actual, expected);
  if (!(error <= bound))
    return ::testing::AssertionFailure() << "relative error " << error << ", allowed " << bound;
  double norm = 0;
  for (Index i = 0; i < expected.size(); ++i) {
    const double e = static_cast<double>(expected.data()[i]);
    norm += e * e;
  }
  const double mean = std::sqrt(norm / static_cast<double>(expected.size() + (norm == 0)));
  for (Index i = 0; i < expected.size(); ++i) {
    const double a = static_cast<double>(actual.data()[i]),
                 e = static_cast<double>(expected.data()[i]);
    if (!(std::abs(a - e) <= element_bound * (std::abs(e) + mean)))
      return ::testing::AssertionFailure()
             << "element " << i << " is " << a << ", expected " << e << " within " << element_bound
             << " of it and of " << mean;
  }
  return ::testing::AssertionSuccess();
}
template <typename A, typename B>
::testing::AssertionResult within(const A& actual, const B& expected, double bound) {
  return within(actual, expected, bound, bound);
}

/// Every bit of the two tensors is equal.
template <typename A, typename B>
::testing::AssertionResult same_bits(const A& a, const B& b) {
  static_assert(std::is_same_v<ef::scalar_of<A>, ef::scalar_of<B>>);
  if (a.size() != b.size())
    return ::testing::AssertionFailure() << "sizes " << a.size() << " and " << b.size();
  for (Index i = 0; i < a.size(); ++i)
    if (std::memcmp(a.data() + i, b.data() + i, sizeof(*a.data())) != 0)
      return ::testing::AssertionFailure()
             << "element " << i << ": " << static_cast<double>(a.data()[i]) << " and "
             << static_cast<double>(b.data()[i]);
  return ::testing::AssertionSuccess();
}

/// The same bits, or NaN in both: which NaN an operation makes is the machine's.
template <typename A, typename B>
::testing::AssertionResult same_numbers(const A& a, const B& b) {
  A known = a;
  for (Index i = 0; i < std::min<Index>(a.size(), b.size()); ++i)
    if (std::isnan(static_cast<double>(a.data()[i])) &&
        std::isnan(static_cast<double>(b.data()[i])))
      known.data()[i] = b.data()[i];
  return same_bits(known, b);
}

/// The statement throws Exception, and its text contains each of the fragments.
template <typename Exception, typename F>
void expect_throws(F&& statement, const std::vector<std::string>& fragments) {
  try {
    statement();
    ADD_FAILURE() << "no exception";
  } catch (const Exception& error) {
    for (const std::string& fragment : fragments)
      EXPECT_NE(std::string(error.what()).find(fragment), std::string::npos)
          << "\"" << error.what() << "\" does not contain \"" << fragment << "\"";
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another exception: " << error.what();
  }
}

/// A pool with a device on it, for tests that sweep thread counts.
struct Threads {
  explicit Threads(int count) : pool(count), device(&pool, count) {}
  Eigen::ThreadPool pool;
  Eigen::ThreadPoolDevice device;
};

/// The calling thread with the kernels of a tag: what an operator takes in a device's place.
template <typename Isa>
ef::cpu::Backend<Eigen::DefaultDevice, Isa> on(Isa isa) {
  static const Eigen::DefaultDevice device;
  return ef::cpu::backend(device, isa);
}

/// Calls f(tag) for every tag of a list.
template <typename... Tags, typename F>
void for_each_tag(ef::isa::List<Tags...>, F&& f) {
  (f(Tags{}), ...);
}

// Sanitizers look at reads, writes and threads, which differ by instruction set and size of a
// scalar, and take long to compile: their builds sweep the best ISA and two sizes (.ci/run builds
// the generic kernels so besides). A build for one ISA (.ci/run neon and amx) sweeps that alone.
#if defined(EIGENFORMER_SANITIZED) || defined(EIGENFORMER_EXPECTED_ISA)
using EveryIsa = ef::isa::List<ef::isa::best>;
#else
using EveryIsa = ef::isa::Callable;
#endif
#if defined(EIGENFORMER_SANITIZED)
using EveryScalar = ::testing::Types<float, ef::bfloat16>;
#else
using EveryScalar = ::testing::Types<float, double, ef::bfloat16, ef::half>;
#endif

/// Calls f(tag) for the tags with vectors of their own: the others run the same code but in
/// products.
template <typename F>
void for_each_isa(F&& f) {
#if defined(EIGENFORMER_ISA_AMX)
  provide_amx();
#endif
  for_each_tag(EveryIsa{}, [&](auto isa) {
    using Isa = decltype(isa);
    if constexpr (ef::simd::has_own_vectors<Isa> || std::is_same_v<EveryIsa, ef::isa::List<Isa>>)
      f(isa);
  });
}

/// Calls f(tag) for every ISA this build may call: what has products of matrices, which differ in
/// each. AMX, where the machine has none, on the emulator.
template <typename F>
void for_each_product_isa(F&& f) {
#if defined(EIGENFORMER_ISA_AMX)
  provide_amx();
#endif
  for_each_tag(EveryIsa{}, f);
}

// .ci/run: the flags of cmake/isa/X.cmake make X the best tag.
#if defined(EIGENFORMER_EXPECTED_ISA)
static_assert(std::is_same_v<ef::isa::best, ef::isa::EIGENFORMER_EXPECTED_ISA>);
#endif

/// Rows [first, first + count) of a matrix, in place.
template <typename T>
ef::TensorView<const T, 2> rows_of(const ef::Tensor<T, 2>& matrix, Index first, Index count) {
  return {matrix.data() + first * matrix.dimension(1), count, matrix.dimension(1)};
}

}  // namespace eigenformer_test
