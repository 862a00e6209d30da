// Bandwidths and float multiply-add peak, through the same vectors as the kernels.
#include "machine_limits.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include <eigenformer/cpu/simd/simd.h>

#include "statistics.h"

namespace bench {
namespace {

namespace ef = eigenformer;
using V = ef::simd::Vec<float, ef::isa::best>;
using Clock = std::chrono::steady_clock;

constexpr int kRounds = 9;
constexpr double kMiB = 1 << 20;

/// Size of a cache level in bytes. Linux's own description first: sysconf counts the L3 of other
/// sockets on some machines.
double cache_bytes(int level, double otherwise) {
  for (int index = 0; index < 8; ++index) {
    const std::string folder =
        "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    std::ifstream level_file(folder + "level"), size_file(folder + "size");
    int found = 0;
    double size = 0;
    char unit = 0;
    if (level_file >> found && found == level && size_file >> size) {
      size_file >> unit;
      return size * (unit == 'M' ? kMiB : 1024.0);
    }
  }
  return otherwise;
}

/// Memory in 2 MiB pages where the system gives them, touched by the caller's threads.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes)
      : bytes_((bytes + kPage - 1) / kPage * kPage), data_(std::aligned_alloc(kPage, bytes_)) {
    if (data_ == nullptr) throw std::bad_alloc();
    madvise(data_, bytes_, MADV_HUGEPAGE);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  float* data() { return static_cast<float*>(data_); }

 private:
  static constexpr std::size_t kPage = std::size_t{2} << 20;
  std::size_t bytes_;
  void* data_;
};

constexpr std::size_t kUnroll = 8;
constexpr std::size_t kStep = kUnroll * static_cast<std::size_t>(V::lanes);

/// Keeps the compiler from leaving out what produced *p.
void keep(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

/// Reads `data` as `Streams` parts side by side. A core follows several streams out of DRAM faster
/// than one (29 against 23 GB/s on a Zen 3), and kernels have several: weights of some rows, K and
/// V.
template <std::size_t Streams>
void read_pass(const float* data, std::size_t count) {
  constexpr std::size_t unroll = kUnroll / Streams, step = unroll * V::lanes;
  const std::size_t part = count / Streams;
  V sums[kUnroll];
  for (V& sum : sums) sum = V::zero();
  for (std::size_t i = 0; i < part; i += step)
    for (std::size_t s = 0; s < Streams; ++s)
      for (std::size_t u = 0; u < unroll; ++u)
        sums[s * unroll + u] =
            sums[s * unroll + u] +
            V::load(data + s * part + i + u * static_cast<std::size_t>(V::lanes));
  for (std::size_t u = 1; u < kUnroll; ++u) sums[0] = sums[0] + sums[u];
  float result[V::lanes];
  sums[0].store(result);
  keep(result);
}

template <bool Streaming>
void put(const V& value, float* p) {
  if constexpr (Streaming)
    value.store_streaming(p);
  else
    value.store(p);
}

/// Of ones: Zen 4 writes lines of zeros past its caches several times faster than any other (77
/// instead of 10 GB/s, seen on a busy machine).
template <bool Streaming>
void write_pass(float* data, std::size_t count) {
  const V value = V::set1(1.0f);
  for (std::size_t i = 0; i < count; i += kStep)
    for (std::size_t u = 0; u < kUnroll; ++u)
      put<Streaming>(value, data + i + u * static_cast<std::size_t>(V::lanes));
  if constexpr (Streaming) V::fence_streaming();
  keep(data);
}

template <bool Streaming>
void copy_pass(const float* from, float* to, std::size_t count) {
  for (std::size_t i = 0; i < count; i += kStep)
    for (std::size_t u = 0; u < kUnroll; ++u)
      put<Streaming>(V::load(from + i + u * static_cast<std::size_t>(V::lanes)),
                     to + i + u * static_cast<std::size_t>(V::lanes));
  if constexpr (Streaming) V::fence_streaming();
  keep(to);
}

/// Numbers changed where they stand, four streams side by side: each line is read and written
/// without a second read for it, as an optimizer's step does.
void update_pass(float* data, std::size_t count) {
  constexpr std::size_t streams = 4, unroll = kUnroll / streams, step = unroll * V::lanes;
  const std::size_t part = count / streams;
  const V one = V::set1(1.0f);
  for (std::size_t i = 0; i < part; i += step)
    for (std::size_t s = 0; s < streams; ++s)
      for (std::size_t u = 0; u < unroll; ++u) {
        float* const p = data + s * part + i + u * static_cast<std::size_t>(V::lanes);
        (V::load(p) + one).store(p);
      }
  keep(data);
}

struct ReadWriteCopy {
  double read, write, copy;
};

/// `bytes` is what one thread goes through, again and again.
ReadWriteCopy bandwidth(int threads, std::size_t bytes) {
  constexpr std::size_t whole = 8 * kStep;  // eight streams of whole steps, two halves to copy
  const std::size_t count = std::max<std::size_t>(bytes / sizeof(float) / whole, 1) * whole,
                    half = count / 2;
  const int passes =
      static_cast<int>(std::max(1.0, 96.0 * kMiB / static_cast<double>(count * sizeof(float))));
  std::vector<std::unique_ptr<Buffer>> buffers;
  for (int t = 0; t < threads; ++t)
    buffers.push_back(std::make_unique<Buffer>(count * sizeof(float)));
  const auto rate = [&](auto&& pass) {
    const double seconds = detail::seconds_together(threads, kRounds, [&](int t) {
      for (int p = 0; p < passes; ++p) pass(buffers[static_cast<std::size_t>(t)]->data());
    });
    return static_cast<double>(count * sizeof(float)) * passes * threads / seconds;
  };
  const double write = std::max(rate([&](float* p) { write_pass<false>(p, count); }),
                                rate([&](float* p) { write_pass<true>(p, count); }));
  const double copy = (std::max)({rate([&](float* p) { copy_pass<false>(p, p + half, half); }),
                                  rate([&](float* p) { copy_pass<true>(p, p + half, half); }),
                                  2 * rate([&](float* p) { update_pass(p, count); })});
  const double read = (std::max)({rate([&](float* p) { read_pass<1>(p, count); }),
                                  rate([&](float* p) { read_pass<4>(p, count); }),
                                  rate([&](float* p) { read_pass<8>(p, count); })});
  return {read, write, copy};
}

/// Independent chains of multiply-adds: enough to cover 2 units of 4 cycles latency, few enough to
/// stay in registers.
double float_fma_peak(int threads) {
  constexpr int chains = std::is_base_of_v<ef::isa::avx512, ef::isa::best> ||
                                 std::is_base_of_v<ef::isa::neon, ef::isa::best>
                             ? 16
                         : std::is_base_of_v<ef::isa::avx2, ef::isa::best> ? 12
                                                                           : 6;
  constexpr int iterations = 400000;
  const double seconds = detail::seconds_together(threads, kRounds, [](int) {
    volatile float one = 1.0f, tiny = 1e-9f;  // the compiler must not know them
    const V factor = V::set1(one), addend = V::set1(tiny);
    V chain[chains];
    for (V& c : chain) c = V::set1(one);
    for (int i = 0; i < iterations; ++i)
      for (V& c : chain) c = fma(c, factor, addend);
    for (int c = 1; c < chains; ++c) chain[0] = chain[0] + chain[c];
    float result[V::lanes];
    chain[0].store(result);
    keep(result);
  });
  return 2.0 * chains * V::lanes * iterations * threads / seconds;
}

/// The level that holds what repeated calls go through. Half of L3, since it has other users.
double level(const Bandwidth& bandwidth, double footprint, const Limits& limits) {
  if (footprint <= 0.8 * limits.l2_bytes * limits.threads) return bandwidth.l2;
  return footprint <= 0.5 * limits.l3_bytes ? bandwidth.l3 : bandwidth.dram;
}

}  // namespace

double detail::seconds_together(int threads, int rounds, const std::function<void(int)>& round) {
  const std::size_t n = static_cast<std::size_t>(threads);
  std::vector<std::vector<Clock::time_point>> starts(n), ends(n);
  std::barrier start(threads);
  const auto work = [&](int thread) {
    const std::size_t t = static_cast<std::size_t>(thread);
    for (int r = -1; r < rounds; ++r) {  // the first round warms up: pages, caches, clock
      start.arrive_and_wait();
      const auto begin = Clock::now();
      round(thread);
      const auto end = Clock::now();
      if (r < 0) continue;
      starts[t].push_back(begin);
      ends[t].push_back(end);
    }
  };
  std::vector<std::thread> crew;
  for (int t = 1; t < threads; ++t) crew.emplace_back(work, t);
  work(0);
  for (std::thread& member : crew) member.join();
  std::vector<double> seconds;
  for (std::size_t r = 0; r < static_cast<std::size_t>(rounds); ++r) {
    auto first = starts[0][r], last = ends[0][r];
    for (std::size_t t = 1; t < n; ++t) {
      first = std::min(first, starts[t][r]);
      last = std::max(last, ends[t][r]);
    }
    seconds.push_back(std::chrono::duration<double>(last - first).count());
  }
  return median(seconds);
}

Limits measure_limits(int threads) {
  Limits limits;
  limits.threads = threads;
  limits.l2_bytes = cache_bytes(2, 1.0 * kMiB);
  limits.l3_bytes = cache_bytes(3, 2 * limits.l2_bytes);
  const auto measure = [&](double Bandwidth::*member, double bytes) {
    const ReadWriteCopy rates = bandwidth(threads, static_cast<std::size_t>(bytes));
    limits.read.*member = rates.read;
    limits.write.*member = rates.write;
    limits.copy.*member = rates.copy;
  };
  measure(&Bandwidth::l2, limits.l2_bytes / 2);
  measure(&Bandwidth::l3, std::max(limits.l3_bytes / 4 / threads, 1.5 * limits.l2_bytes));
  // Of what is read again and again an L3 of 32 MiB still finds a part: one thread of a Zen 5 reads
  // 256 MiB at 54 GB/s, 512 at 52, 1024 at 51.5.
  measure(&Bandwidth::dram, std::clamp(32 * limits.l3_bytes, 128 * kMiB, 1024 * kMiB) / threads);
  limits.float_fma = float_fma_peak(threads);
  const detail::DotPeaks dot = detail::measure_dot_peaks(threads);
  limits.bfloat16 = dot.bfloat16;
  limits.int8 = dot.int8;
  limits.dot_instruction = dot.instruction;
  return limits;
}

double memory_seconds(const Limit& limit, const Limits& limits) {
  const double bytes = limit.bytes_read + limit.bytes_written;
  const double footprint = limit.footprint > 0 ? limit.footprint : bytes;
  const double alone = std::max(limit.bytes_read / level(limits.read, footprint, limits),
                                limit.bytes_written / level(limits.write, footprint, limits));
  if (limit.bytes_read <= 0 || limit.bytes_written <= 0) return alone;
  // A copy at its measured rate, as far as reads and writes are in balance; what is left over at
  // its own rate.
  const double both = 2 * std::min(limit.bytes_read, limit.bytes_written);
  const double rest = bytes - both;
  const double rest_rate =
      level(limit.bytes_read > limit.bytes_written ? limits.read : limits.write, footprint, limits);
  return std::max(alone, both / level(limits.copy, footprint, limits) + rest / rest_rate);
}

double arithmetic_seconds(const Limit& limit, const Limits& limits) {
  double peak = limits.float_fma;
  if (limit.peak == Peak::bfloat16) peak = std::max(peak, limits.bfloat16);
  if (limit.peak == Peak::int8) peak = std::max(peak, limits.int8);
  return limit.operations / peak;
}

Limits better_of(const Limits& a, const Limits& b) {
  const auto bandwidth = [](const Bandwidth& x, const Bandwidth& y) {
    return Bandwidth{(std::max)(x.l2, y.l2), (std::max)(x.l3, y.l3), (std::max)(x.dram, y.dram)};
  };
  Limits best = a;
  best.read = bandwidth(a.read, b.read);
  best.write = bandwidth(a.write, b.write);
  best.copy = bandwidth(a.copy, b.copy);
  best.float_fma = (std::max)(a.float_fma, b.float_fma);
  best.bfloat16 = (std::max)(a.bfloat16, b.bfloat16);
  best.int8 = (std::max)(a.int8, b.int8);
  return best;
}

double floor_seconds(const Limit& limit, const Limits& limits) {
  return std::max(memory_seconds(limit, limits), arithmetic_seconds(limit, limits));
}

}  // namespace bench
