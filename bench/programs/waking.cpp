// What waking threads costs: a parallel_for of two parts that do nothing, one whose first part
// waits until the second has begun on another thread, and a decode-sized INT8 product on two
// threads; outside and inside of a ParallelRegion, back to back and after 200 us of serial work.
// Usage: waking [samples]
#include <eigenformer/linear.h>
#include <eigenformer/parallel_region.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <optional>
#include <random>
#include <vector>

namespace ef = eigenformer;

namespace {

using Clock = std::chrono::steady_clock;
using Eigen::Index;
using Region = std::optional<ef::ParallelRegion<Eigen::ThreadPoolDevice>>;

double microseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::micro>(duration).count();
}

struct Quantiles {
  double median, p99;
};
Quantiles quantiles(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  return {samples[samples.size() / 2], samples[samples.size() * 99 / 100]};
}

struct Gap {
  const char* name;
  double serial_work;  // us before each call
};
constexpr std::array<Gap, 2> kGaps{{{"back to back", 0}, {"after 200 us of serial", 200}}};

void wait_for(Gap gap) {
  for (const auto start = Clock::now(); microseconds(Clock::now() - start) < gap.serial_work;)
    continue;
}

/// Microseconds of each of `count` calls, the first tenth left out.
template <typename Call>
Quantiles time_calls(int count, Gap gap, Call&& call) {
  std::vector<double> samples;
  for (int i = 0; i < count; ++i) {
    wait_for(gap);
    const auto start = Clock::now();
    call();
    if (i >= count / 10) samples.push_back(microseconds(Clock::now() - start));
  }
  return quantiles(std::move(samples));
}

struct Setting {
  const char* name;
  int linger;  // us, 0 stands for no region
};

constexpr std::array<Setting, 3> kSettings{
    {{"no region", 0}, {"region", 100}, {"region, 1 ms", 1000}}};

void open(Region& region, const Eigen::ThreadPoolDevice& device, Setting setting) {
  if (setting.linger > 0)
    region.emplace(device, ef::ParallelRegionOptions{std::chrono::microseconds(setting.linger)});
}

void empty_calls(const Eigen::ThreadPoolDevice& device, int samples) {
  std::printf("%-41s %18s    %18s\n", "", "empty parts (us)", "both begun (us)");
  std::printf("%-41s %9s %8s    %9s %8s\n", "parallel_for, 2 parts", "median", "p99", "median",
              "p99");
  for (const Gap gap : kGaps)
    for (const Setting setting : kSettings) {
      Region region;
      open(region, device, setting);
      const int count = gap.serial_work > 0 ? samples / 10 : samples;
      const Quantiles empty = time_calls(count, gap, [&] {
        ef::cpu::parallel_for(device, 2, ef::cpu::kWorthAThread, [](Index, Index, int) {});
      });
      const Quantiles both = time_calls(count, gap, [&] {
        std::atomic<bool> begun{false};
        ef::cpu::parallel_for(device, 2, ef::cpu::kWorthAThread, [&](Index, Index, int worker) {
          if (worker == 1) begun = true;
          while (!begun) continue;
        });
      });
      std::printf("  %-22s  %-15s %9.2f %8.2f    %9.2f %8.2f\n", gap.name, setting.name,
                  empty.median, empty.p99, both.median, both.p99);
    }
}

struct Product {
  static constexpr Index kSize = 4096;
  Product()
      : x(1, kSize),
        y(1, kSize),
        results{ef::Tensor<float, 2>(1, kSize / 2), ef::Tensor<float, 2>(1, kSize / 2)} {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    ef::Tensor<float, 2> matrix(kSize, kSize);
    for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = normal(generator);
    for (Index i = 0; i < kSize; ++i) x.data()[i] = normal(generator);
    weight = ef::pack_weight<std::int8_t>(matrix);
    for (std::size_t half : {0, 1}) {
      const float* first = matrix.data() + (half == 0 ? 0 : matrix.size() / 2);
      halves[half] =
          ef::pack_weight<std::int8_t>(ef::TensorView<const float, 2>(first, kSize / 2, kSize));
    }
  }
  ef::Tensor<float, 2> x, y;
  std::array<ef::Tensor<float, 2>, 2> results;
  ef::PackedWeight<std::int8_t> weight;
  std::array<ef::PackedWeight<std::int8_t>, 2> halves;
};

/// Medians: us of a call, and the share of it beyond its longer half: waking and waiting.
struct Halves {
  double total, lost;
};
Halves time_halves(const Eigen::ThreadPoolDevice& device, Product& p, int count, Gap gap) {
  std::vector<double> totals, shares;
  for (int i = 0; i < count; ++i) {
    wait_for(gap);
    std::array<double, 2> spent{};
    const auto start = Clock::now();
    ef::cpu::parallel_for(device, 2, ef::cpu::kWorthAThread, [&](Index, Index, int worker) {
      const auto half = static_cast<std::size_t>(worker);
      const auto begun = Clock::now();
      ef::linear_into(Eigen::DefaultDevice{}, p.results[half], p.x, p.halves[half]);
      spent[half] = microseconds(Clock::now() - begun);
    });
    const double total = microseconds(Clock::now() - start);
    totals.push_back(total);
    shares.push_back((total - std::max(spent[0], spent[1])) / total);
  }
  return {quantiles(std::move(totals)).median, quantiles(std::move(shares)).median};
}

void products(const Eigen::ThreadPoolDevice& device, int samples) {
  const auto p = std::make_unique<Product>();
  const int count = samples / 20;
  std::printf("\n%-41s %9s %8s    %11s  %s\n", "linear 1 x 4096 x 4096 int8 (us)", "median", "p99",
              "two halves", "lost to waking");
  for (const Gap gap : kGaps) {
    const Quantiles one = time_calls(
        count, gap, [&] { ef::linear_into(Eigen::DefaultDevice{}, p->y, p->x, p->weight); });
    std::printf("  %-22s  %-15s %9.2f %8.2f\n", gap.name, "1 thread", one.median, one.p99);
    for (const Setting setting : kSettings) {
      Region region;
      open(region, device, setting);
      const Quantiles two =
          time_calls(count, gap, [&] { ef::linear_into(device, p->y, p->x, p->weight); });
      const Halves halves = time_halves(device, *p, count, gap);
      std::printf("  %-22s  %-15s %9.2f %8.2f    %11.2f  %13.1f%%\n", gap.name, setting.name,
                  two.median, two.p99, halves.total, 100 * halves.lost);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int samples = argc > 1 ? std::max(1000, std::atoi(argv[1])) : 40000;
  Eigen::ThreadPool pool(2);
  const Eigen::ThreadPoolDevice device(&pool, 2);
  empty_calls(device, samples);
  products(device, samples);
}
