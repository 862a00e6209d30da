// The memory of backends: what lies where, who may work on it, and that all of it goes back. A
// table of the test's own counts what is taken from it and puts a guard before each block; under
// the name of another backend it stands for a GPU's.
#include <eigenformer/attention.h>
#include <eigenformer/kv_cache.h>
#include <eigenformer/linear.h>
#include <eigenformer/optimizer.h>
#include <eigenformer/paged_kv_cache.h>

#include "compare.h"

using namespace eigenformer_test;

namespace {

struct Counts {
  int live = 0, made = 0, copies = 0, copies_in = 0, broken = 0;
};
Counts counts;

constexpr unsigned char kGuard = 0xa5;

void* allocate(std::size_t bytes, std::size_t alignment) {
  ++counts.live;
  ++counts.made;
  auto* const guard =
      static_cast<unsigned char*>(ef::host_memory.allocate(alignment + bytes, alignment));
  std::memset(guard, kGuard, alignment);
  return guard + alignment;
}
void release(void* data, std::size_t bytes, std::size_t alignment) noexcept {
  --counts.live;
  auto* const guard = static_cast<unsigned char*>(data) - alignment;
  for (std::size_t i = 0; i < alignment; ++i) counts.broken += guard[i] != kGuard ? 1 : 0;
  ef::host_memory.release(guard, alignment + bytes, alignment);
}
void copy(void* to, const void* from, std::size_t bytes) {
  counts.copies += bytes > 0 ? 1 : 0;
  ef::host_memory.copy(to, from, bytes);
}
void copy_in(void* to, const void* from, std::size_t bytes) {
  ++counts.copies_in;
  std::memcpy(to, from, bytes);
}

constexpr ef::Memory counting{
    "cpu", allocate, release, copy, copy_in, ef::host_memory.copy_out, ef::host_memory.clear};
constexpr ef::Memory elsewhere{
    "elsewhere", allocate, release, copy, copy_in, ef::host_memory.copy_out, ef::host_memory.clear};

/// Everything went back, and nobody wrote before a block.
class MemoryTable : public testing::Test {
 protected:
  void SetUp() override { counts = {}; }
  void TearDown() override {
    EXPECT_EQ(counts.live, 0);
    EXPECT_EQ(counts.broken, 0);
  }
};

bool aligned(const void* data, std::size_t alignment) {
  return reinterpret_cast<std::uintptr_t>(data) % alignment == 0;
}

TEST_F(MemoryTable, BlocksAreAlignedAndGoBack) {
  using ef::detail::MemoryBlock, ef::detail::Pages;
  const std::size_t huge = std::size_t{4} << 20;
  for (const ef::Memory* memory : {&ef::host_memory, &counting})
    for (std::size_t bytes : {std::size_t{1}, std::size_t{63}, std::size_t{4097}, huge}) {
      EXPECT_TRUE(aligned(MemoryBlock(bytes, *memory).data(), 64));
      const MemoryBlock streamed(bytes, *memory, Pages::huge);
      EXPECT_TRUE(aligned(streamed.data(), bytes < huge ? 64 : std::size_t{2} << 20));
      EXPECT_EQ(streamed.size(), bytes);
    }
  EXPECT_EQ(MemoryBlock(0, counting).data(), nullptr);
  MemoryBlock a(10, counting), b(20, counting);
  a = std::move(b);
  EXPECT_EQ(a.size(), 20u);
  EXPECT_EQ(counts.live, 1);
  MemoryBlock c(std::move(a));
  EXPECT_EQ(&c.memory(), &counting);
}

TEST_F(MemoryTable, AWorkspaceTakesItsFramesThere) {
  ef::Workspace workspace(counting);
  for (int i = 0; i < 3; ++i) {
    ef::Workspace::Frame frame(workspace);
    float* const first = frame.take<float>(10);
    EXPECT_TRUE(aligned(first, 64) && aligned(frame.take<double>(1000), 64));
    first[9] = 1;
  }
  EXPECT_EQ(counts.made, 3);  // two, then one in their place
}

/// A weight that another memory holds, in the panels of the CPU and under the name of a backend.
template <typename T>
ef::PackedWeight<T> packed_in(const ef::Memory& memory, const ef::Tensor<float, 2>& weight) {
  const Eigen::DefaultDevice device;
  const ef::problem::PanelsOf<T> shape{weight.dimension(0), weight.dimension(1), 0, 1};
  auto sizes = ef::detail::run(device, shape);
  sizes.layout.backend = memory.backend;
  ef::PackedWeight<T> packed;
  ef::detail::Packing<T> packing(packed, shape, sizes, memory);
  ef::detail::run(device, ef::problem::PackWeight<T, float, 1>{packing.panels(), {weight.data()}});
  packing.finish();
  return packed;
}

template <typename T>
void check_packed_weight() {
  const auto weight = random_tensor<float, 2>({37, 20}, 1), x = random_tensor<float, 2>({3, 20}, 2);
  const auto there = packed_in<T>(counting, weight);
  const auto expected = ef::linear(x, ef::pack_weight<T>(weight));
  EXPECT_EQ(there.layout().backend, "cpu");
  EXPECT_TRUE(same_bits(ef::linear(x, there), expected));
  const int made = counts.made;
  const ef::PackedWeight<T> copy(there);
  EXPECT_EQ(counts.made, 2 * made);
  EXPECT_EQ(counts.copies, made);
  EXPECT_TRUE(same_bits(ef::linear(x, copy), expected));

  ef::PackedWeight<T> reused(there);  // packing again on the host's side takes memory of the host
  ef::pack_weight_into(Eigen::DefaultDevice{}, reused, weight);
  EXPECT_TRUE(same_bits(ef::linear(x, reused), expected));
}

TEST_F(MemoryTable, APackedWeightAndItsCopiesLieThere) {
  check_packed_weight<float>();
  counts.copies = counts.made = 0;
  check_packed_weight<std::int8_t>();
}

TEST_F(MemoryTable, AProductRefusesTheWeightOfAnotherBackend) {
  const auto weight = random_tensor<float, 2>({8, 20}, 1), x = random_tensor<float, 2>({3, 20}, 2);
  const auto there = packed_in<float>(elsewhere, weight);
  EXPECT_EQ(there.layout().backend, "elsewhere");
  ef::Tensor<float, 2> y(3, 8);
  y.setConstant(7.0f);
  expect_throws<std::invalid_argument>(
      [&] { ef::linear_into(Eigen::DefaultDevice{}, y, x, there); },
      {"linear", "packed for elsewhere", "read cpu", "pack it again"});
  EXPECT_EQ(y(2, 7), 7.0f);

  const ef::problem::PanelsOf<float> shape{8, 20, 0, 1};
  ef::PackedWeight<float> packed;
  expect_throws<std::invalid_argument>(
      [&] {
        ef::detail::Packing<float>(packed, shape, ef::detail::run(Eigen::DefaultDevice{}, shape),
                                   elsewhere);
      },
      {"panels for cpu", "memory of elsewhere"});
}

template <typename Storage>
void check_kv_cache() {
  const auto keys = random_tensor<float, 4>({2, 70, 3, 5}, 1),
             values = random_tensor<float, 4>({2, 70, 3, 5}, 2);
  ef::KvCache<float, Storage> here, there(counting);
  for (auto* cache : {&here, &there}) ef::update_kv_cache(*cache, keys, values, 0);
  EXPECT_TRUE(same_bits(there.keys(0), here.keys(0)));
  EXPECT_TRUE(same_bits(there.values(0), here.values(0)));
  EXPECT_EQ(counts.live, 1);
  const auto copy = there;
  EXPECT_EQ(counts.live, 2);
  EXPECT_EQ(counts.copies, 4);  // two pages for each sequence
  EXPECT_TRUE(same_bits(copy.keys(0), here.keys(0)));
  there = std::move(here);
  EXPECT_EQ(there.length(0), 70);
}

TEST_F(MemoryTable, TheSlabsOfACacheLieThere) {
  check_kv_cache<float>();
  counts = {};
  check_kv_cache<std::int8_t>();
}

TEST_F(MemoryTable, ACacheRefusesDevicesThatWorkElsewhere) {
  const ef::Tensor<float, 4> rows = random_tensor<float, 4>({1, 3, 2, 4}, 1);
  ef::KvCache<float> cache(elsewhere);
  expect_throws<std::invalid_argument>([&] { ef::update_kv_cache(cache, rows, rows, 0); },
                                       {"update_kv_cache", "memory of elsewhere", "that of cpu"});
  EXPECT_EQ(cache.length(0), 0);
  cache.reserve(1, 1, 64, 2, 4);
  EXPECT_EQ(counts.live, 1);
  expect_throws<std::invalid_argument>([&] { cache.keys(0); }, {"elsewhere", "cpu"});
  expect_throws<std::invalid_argument>([&] { ef::attention_with_kv_cache(rows, cache, 0); },
                                       {"attention_with_kv_cache", "elsewhere", "cpu"});

  ef::PagedKvCache<float> pages({.layers = 1, .kv_heads = 2, .head_dim = 4, .page_count = 2},
                                elsewhere);
  const auto sequence = pages.add_sequence();
  const ef::SequenceId ids[] = {sequence};
  expect_throws<std::invalid_argument>([&] { pages.append(ids, 0, rows, rows); },
                                       {"PagedKvCache", "memory of elsewhere", "that of cpu"});
  expect_throws<std::invalid_argument>([&] { pages.keys(sequence, 0); }, {"elsewhere", "cpu"});
  EXPECT_EQ(pages.length(sequence), 0);
}

TEST_F(MemoryTable, APoolAndThePagesItCopiesLieThere) {
  const auto rows = random_tensor<float, 4>({1, 3, 2, 4}, 1);
  ef::PagedKvCache<float> cache({.layers = 1, .kv_heads = 2, .head_dim = 4, .page_count = 4},
                                counting);
  EXPECT_EQ(counts.made, 1);
  const ef::SequenceId first[] = {cache.add_sequence()};
  cache.append(first, 0, rows, rows);
  const ef::SequenceId second[] = {cache.fork(first[0])};
  cache.append(second, 0, rows, rows);
  EXPECT_EQ(counts.copies, 1);
  EXPECT_EQ(cache.statistics().copies, 1);
  const auto keys = cache.keys(second[0], 0);
  for (Index i = 0; i < keys.size(); ++i) ASSERT_EQ(keys.data()[i], rows.data()[i % rows.size()]);
  auto moved = std::move(cache);
  EXPECT_EQ(moved.length(first[0]), 3);
  EXPECT_EQ(counts.made, 1);
}

TEST_F(MemoryTable, TheStateOfAnOptimizerLiesThere) {
  auto weights = random_tensor<float, 1>({100}, 1), gradients = random_tensor<float, 1>({100}, 2);
  auto same_weights = weights;
  const auto parameters = [&](ef::Tensor<float, 1>& values) {
    return std::vector<ef::Parameter>{{ef::TensorView<float, 1>(values.data(), 100),
                                       ef::TensorView<float, 1>(gradients.data(), 100)}};
  };
  ef::AdamW here(parameters(weights)), there(parameters(same_weights), {}, counting);
  EXPECT_EQ(counts.live, 1);
  for (int i = 0; i < 3; ++i) here.step(), there.step();
  EXPECT_TRUE(same_bits(same_weights, weights));
  there.load_state(here.state(), 3);
  EXPECT_EQ(counts.copies_in, 1);

  ef::AdamW elsewhere_kept(parameters(weights), {}, elsewhere);
  expect_throws<std::invalid_argument>([&] { elsewhere_kept.step(); },
                                       {"AdamW", "the state", "memory of elsewhere", "cpu"});
  EXPECT_EQ(elsewhere_kept.step_count(), 0);
  EXPECT_TRUE(same_bits(same_weights, weights));
}

}  // namespace
