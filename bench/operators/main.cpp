// main() of an operator's benchmark binary: every row, ours and peers, on one thread and on a pool,
// under Google Benchmark.
#include <benchmark/benchmark.h>

#include <thread>

#include "report/harness.h"

namespace {

void set_counters(benchmark::State& state, const bench::Limit& limit) {
  const auto rate = [&](double amount) {
    return benchmark::Counter(amount * static_cast<double>(state.iterations()),
                              benchmark::Counter::kIsRate);
  };
  if (limit.bytes_read + limit.bytes_written > 0)
    state.counters["bytes/s"] = rate(limit.bytes_read + limit.bytes_written);
  if (limit.operations > 0) state.counters["flop/s"] = rate(limit.operations);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  Eigen::ThreadPool pool(threads);
  Eigen::ThreadPoolDevice pool_device(&pool, threads);
  bench::Suite suite;
  for (const auto& registered : bench::registered_cases()) registered.function(suite);
  for (const auto& row : suite.rows)
    for (const auto& call : row->calls) {
      benchmark::RegisterBenchmark((row->name + " / " + call.name + " / 1 thread").c_str(),
                                   [&](benchmark::State& state) {
                                     call.one_thread(Eigen::DefaultDevice{});  // makes its inputs
                                     for (auto _ : state) call.one_thread(Eigen::DefaultDevice{});
                                     set_counters(state, row->limit);
                                   })
          ->UseRealTime();
      if (call.pool && threads > 1)
        benchmark::RegisterBenchmark(
            (row->name + " / " + call.name + " / " + std::to_string(threads) + " threads").c_str(),
            [&](benchmark::State& state) {
              call.pool(pool_device);
              for (auto _ : state) call.pool(pool_device);
              set_counters(state, row->limit);
            })
            ->UseRealTime();
    }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
