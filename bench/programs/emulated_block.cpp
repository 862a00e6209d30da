// What the emulated CUDA device of the tests costs (tests/emulators/block): a switch of fibers, and
// a block of 256 threads with barriers, shuffles and shared memory.
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "../../tests/emulators/block/device.h"

namespace emulated = eigenformer_test::emulated;

namespace {

struct Turns : emulated::Fiber {
  int left = 1000000;
  void run() override {
    while (left-- > 0) suspend();
  }
};

/// Best of five, in microseconds.
template <typename F>
double microseconds(F&& f) {
  double best = 1e30;
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
    best = (std::min)(best, time.count());
  }
  return best;
}

}  // namespace

int main() {
  const double turns = microseconds([] {
    Turns fiber;
    while (fiber.left > 0) fiber.resume();
  });
  std::printf("there and back between two fibers   %8.1f ns\n", turns / 1000);

  constexpr int threads = 256, blocks = 100;
  const auto time = [&](const char* what, std::uint64_t seed, auto kernel) {
    emulated::Stream stream({.seed = seed});
    const emulated::Device device(&stream);
    const double each = microseconds([&] {
      launch(eigenformer::cuda::Backend<emulated::Device>{device}, what, blocks, threads, 8192,
             kernel);
    });
    std::printf("%-35s %8.1f us a block of %d, seed %d\n", what, each / blocks, threads,
                static_cast<int>(seed));
  };
  for (const std::uint64_t seed : {0, 1}) {
    time("nothing", seed, [](auto&) {});
    time("four barriers", seed, [](auto& block) {
      for (int i = 0; i < 4; ++i) block.barrier();
    });
    time("a reduction", seed, [](auto& block) {
      const auto scratch = block.template shared<float>(threads / 32);
      eigenformer::cuda::reduce_block(block, scratch, 1.0f, eigenformer::cuda::Add{});
    });
    time("four rounds of shared memory", seed, [](auto& block) {
      const auto values = block.template shared<float>(threads);
      for (int i = 0; i < 4; ++i) {
        values.store(block.thread(), 1.0f);
        block.barrier();
        values.load(threads - 1 - block.thread());
        block.barrier();
      }
    });
  }
}
