// The memory of every device: bytes go in, across and out again, and what owns memory takes it from
// there.
#include <eigenformer/kv_cache.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

TEST(MemoryOnDevice, CopiesInAcrossAndOut) {
  for_each_device([&](const auto& bench) {
    const ef::Memory& memory = ef::memory_of(bench.device);
    const auto numbers = random_tensor<float, 1>({1000}, 1);
    const std::size_t bytes = 1000 * sizeof(float);
    ef::detail::MemoryBlock first(bytes, memory), second(bytes, memory);
    ef::Tensor<float, 1> back(1000);
    memory.copy_in(first.data(), numbers.data(), bytes);
    memory.copy(second.data(), first.data(), bytes);
    memory.copy_out(back.data(), second.data(), bytes);
    for (Index i = 0; i < 1000; ++i) ASSERT_EQ(back(i), numbers(i));
    memory.clear(second.data(), bytes);
    memory.copy_out(back.data(), second.data(), bytes);
    for (Index i = 0; i < 1000; ++i) ASSERT_EQ(back(i), 0.0f);
  });
}

TEST(MemoryOnDevice, HoldsThePagesOfACache) {
  for_each_device([&](const auto& bench) {
    ef::KvCache<float> cache(ef::memory_of(bench.device));
    cache.reserve(1, 2, 100, 2, 8);
    EXPECT_EQ(cache.capacity(0), 128);
    const auto copy = cache;
    EXPECT_EQ(copy.capacity(0), 128);
  });
}

TEST(MemoryOnDevice, HoldsScratch) {
  for_each_device([&](const auto& bench) {
    auto frame = ef::detail::tensor_frame(bench.device, ef::thread_workspace());
    float* const numbers = frame.template take<float>(64);
    ef::memory_of(bench.device).clear(numbers, 64 * sizeof(float));
    float first = 1;
    ef::memory_of(bench.device).copy_out(&first, numbers, sizeof first);
    EXPECT_EQ(first, 0.0f);
  });
}

}  // namespace
