/// \file
/// Loading a model on the threads of a program, with a progress bar.
#pragma once

#include <eigenformer/model.h>

#include <algorithm>
#include <cstdio>
#include <thread>

#include "../demo/progress.h"
#include "options.h"

namespace programs {

namespace ef = eigenformer;

/// f(model, pool's device), the model in the scalar that the options ask for.
template <typename F>
int with_model(const ModelOptions& options, std::FILE* log, F&& f) {
  const int threads = options.threads > 0
                          ? static_cast<int>(options.threads)
                          : (std::max)(1, static_cast<int>(std::thread::hardware_concurrency()));
  Eigen::ThreadPool pool(threads);
  const Eigen::ThreadPoolDevice device(&pool, threads);
  const auto start = demo::Clock::now();
  const bool terminal = ::isatty(fileno(log)) != 0;
  ef::LoadOptions how;
  if (options.int8) how.weights = ef::WeightFormat::int8;
  how.progress = [&](std::uint64_t done, std::uint64_t total) {
    if (!terminal || total == 0) return;
    const double seconds = demo::seconds_since(start),
                 fraction = static_cast<double>(done) / static_cast<double>(total);
    std::fprintf(log, "\rloading %3.0f%%  %.2f of %.2f GB  %.0f s left \033[K%s", 100 * fraction,
                 static_cast<double>(done) / 1e9, static_cast<double>(total) / 1e9,
                 seconds * (1 - fraction) / fraction, done == total ? "\n" : "");
    std::fflush(log);
  };
  const auto run = [&](auto&& model) {
    const auto& shape = model.config().shape;
    std::fprintf(log,
                 "%s: %td layers, %td features, %td tokens of vocabulary; %.1f MB of weights, "
                 "loaded in %.2f s; %s kernels, %d threads\n",
                 model.config().family.c_str(), shape.layers, shape.features, shape.vocabulary,
                 static_cast<double>(model.weight_bytes()) / 1e6, demo::seconds_since(start),
                 ef::isa::best::name, threads);
    return f(model, device);
  };
  if (options.bf16) return run(ef::load_model<Eigen::bfloat16>(device, options.path, how));
  return run(ef::load_model<float>(device, options.path, how));
}

}  // namespace programs
