/// \file
/// How a benchmark file states its cases once: a row is a shape, what bounds it on any machine, our
/// call and its peers. The operator's own binary runs the rows under Google Benchmark; `report`
/// runs all rows of all operators, ours and peers in turn, and prints the table.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <eigenformer/core/device.h>

namespace bench {

/// Peak arithmetic a row is held against.
enum class Peak { none, float_fma, bfloat16, int8 };

/// What a row must at least do: bytes it must read and write, operations it must perform. The floor
/// is the longest of these at the limits measured on this machine, in the cache level that holds
/// the footprint.
struct Limit {
  double bytes_read = 0;
  double bytes_written = 0;
  double operations = 0;
  Peak peak = Peak::none;
  /// bytes that repeated calls go through; 0 means bytes_read + bytes_written
  double footprint = 0;

  static Limit read_bytes(double bytes) { return {bytes, 0, 0, Peak::none}; }
  static Limit write_bytes(double bytes) { return {0, bytes, 0, Peak::none}; }
  static Limit copy_bytes(double read, double written) { return {read, written, 0, Peak::none}; }
  /// A product of `flops` (a multiply-add counts two) that reads at least `bytes`.
  static Limit product(double flops, double bytes, Peak peak = Peak::float_fma) {
    return {bytes, 0, flops, peak};
  }
  /// The same limit where calls take turns on several copies of their input, `bytes` in all
  /// (weights that come out of DRAM).
  Limit rotating_through(double bytes) const {
    Limit limit = *this;
    limit.footprint = bytes;
    return limit;
  }
};

using OnOneThread = std::function<void(const Eigen::DefaultDevice&)>;
using OnPool = std::function<void(const Eigen::ThreadPoolDevice&)>;

struct Call {
  std::string name;
  OnOneThread one_thread;
  OnPool pool;  // empty where the call has no threaded form
  /// The library whose own threads the call runs on, empty where it runs on ours. Thread pools
  /// disturb each other, so `report` times each family in a process of its own.
  std::string family = {};
  /// What is wrong with the call's result, empty where it is right. `report` asks once, before
  /// timing.
  std::function<std::string()> mismatch = {};
};

struct Row {
  std::string name;
  Limit limit;
  std::vector<Call> calls;  // ours first

  /// `f(device)` for both devices.
  template <typename F>
  Row& ours(F f) {
    calls.insert(calls.begin(), Call{"eigenformer", f, f});
    return *this;
  }
  template <typename F>
  Row& peer(std::string peer_name, F f) {
    calls.push_back(Call{std::move(peer_name), f, f});
    return *this;
  }
  /// A peer that runs on the calling thread only.
  template <typename F>
  Row& peer_one_thread(std::string peer_name, F f) {
    calls.push_back(Call{std::move(peer_name), [f](const Eigen::DefaultDevice&) { f(); }, {}});
    return *this;
  }
  /// A peer with a thread pool of its own: `f(threads)` sets the pool's size and runs. `mismatch`
  /// runs it and judges the result.
  template <typename F>
  Row& peer_with_own_threads(std::string peer_name, std::string family, F f,
                             std::function<std::string()> mismatch) {
    calls.push_back(Call{std::move(peer_name), [f](const Eigen::DefaultDevice&) { f(1); },
                         [f](const Eigen::ThreadPoolDevice& device) { f(device.numThreads()); },
                         std::move(family), std::move(mismatch)});
    return *this;
  }
};

/// The rows of one benchmark file. Inputs are random, never zeros, and owned by the lambdas
/// (std::shared_ptr).
struct Suite {
  std::vector<std::unique_ptr<Row>> rows;
  Row& row(std::string name, Limit limit) {
    rows.push_back(std::make_unique<Row>(Row{std::move(name), limit, {}}));
    return *rows.back();
  }
};

using CaseFunction = void (*)(Suite&);
struct RegisteredCase {
  std::string operator_name;  ///< X of operators/X_bench.cpp
  std::string name;
  CaseFunction function;
};
inline std::vector<RegisteredCase>& registered_cases() {
  static std::vector<RegisteredCase> cases;
  return cases;
}
struct Registration {
  Registration(const std::string& file, std::string name, CaseFunction function) {
    const std::size_t start = file.rfind('/') + 1;  // 0 where the name has no folder
    registered_cases().push_back(
        {file.substr(start, file.rfind("_bench.") - start), std::move(name), function});
  }
};

}  // namespace bench

#define EIGENFORMER_BENCHMARK(function) \
  static const bench::Registration registration_##function(__FILE__, #function, function);
