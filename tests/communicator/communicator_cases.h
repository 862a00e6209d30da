/// \file
/// What every communicator must do, as functions that each rank calls: the same cases run on one
/// rank, on threads and under MPI.
#pragma once

#include <eigenformer/communicator.h>

#include <array>

#include "compare.h"

namespace eigenformer_test {

/// Element i of rank r's data: exact in every scalar, different on every rank.
template <typename T>
T element(int rank, Index i) {
  return static_cast<T>(static_cast<float>((rank * 31 + i * 7) % 113));
}

template <typename T, ef::Communicator C>
void check_all_gather(C& communicator) {
  const int ranks = communicator.size(), rank = communicator.rank();
  for (Index equal : {0, 1, 3, 64, 1001}) {
    std::vector<T> part(static_cast<std::size_t>(equal)),
        whole(static_cast<std::size_t>(equal * ranks));
    for (Index i = 0; i < equal; ++i) part[static_cast<std::size_t>(i)] = element<T>(rank, i);
    communicator.all_gather(std::span<const T>(part), std::span<T>(whole));
    for (int r = 0; r < ranks; ++r)
      for (Index i = 0; i < equal; ++i)
        ASSERT_EQ(whole[static_cast<std::size_t>(r * equal + i)], element<T>(r, i))
            << r << " " << i;
  }
  for (Index largest : {1, 5, 700}) {  // unequal parts, some empty
    std::vector<Index> counts, begins;
    Index total = 0;
    for (int r = 0; r < ranks; ++r) {
      counts.push_back((r * 3 + 1) % (largest + 1));
      begins.push_back(total);
      total += counts.back();
    }
    const auto own = static_cast<std::size_t>(rank);
    std::vector<T> part(static_cast<std::size_t>(counts[own])),
        whole(static_cast<std::size_t>(total));
    for (Index i = 0; i < counts[own]; ++i) part[static_cast<std::size_t>(i)] = element<T>(rank, i);
    communicator.all_gather(std::span<const T>(part), std::span<T>(whole),
                            std::span<const Index>(counts));
    std::vector<T> in_place(static_cast<std::size_t>(total));
    std::copy(part.begin(), part.end(), in_place.begin() + begins[own]);
    communicator.all_gather(
        std::span<const T>(in_place).subspan(static_cast<std::size_t>(begins[own]), part.size()),
        in_place, counts);
    for (int r = 0; r < ranks; ++r)
      for (Index i = 0; i < counts[static_cast<std::size_t>(r)]; ++i) {
        const auto at = static_cast<std::size_t>(begins[static_cast<std::size_t>(r)] + i);
        ASSERT_EQ(whole[at], element<T>(r, i)) << r << " " << i;
        ASSERT_EQ(in_place[at], element<T>(r, i)) << r << " " << i;
      }
  }
}

/// Values whose sum depends on its order: all magnitudes.
template <typename T>
std::vector<T> values_to_sum(int rank, Index count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  std::mt19937 generator(static_cast<unsigned>(17 + rank));
  for (T& value : values) {
    if constexpr (std::is_integral_v<T>)
      value = static_cast<T>((static_cast<std::uint64_t>(generator()) << 32) | generator());
    else
      value = static_cast<T>(std::ldexp(static_cast<float>(generator()) * 0x1p-31f - 1.0f,
                                        static_cast<int>(generator() % 12)));
  }
  return values;
}

template <typename T, ef::Communicator C>
void check_all_reduce(C& communicator) {
  using Sum = std::conditional_t<std::is_integral_v<T>, std::uint64_t, ef::compute_type<T>>;
  for (Index count : {0, 1, 2, 63, 64, 65, 513, 5000}) {
    std::vector<T> values = values_to_sum<T>(communicator.rank(), count),
                   expected = values_to_sum<T>(0, count);
    std::vector<Sum> sums(expected.begin(), expected.end());
    for (int r = 1; r < communicator.size(); ++r) {
      const std::vector<T> other = values_to_sum<T>(r, count);
      for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += static_cast<Sum>(other[i]);
    }
    for (std::size_t i = 0; i < sums.size(); ++i) expected[i] = static_cast<T>(sums[i]);
    communicator.all_reduce_sum(std::span<T>(values));
    ASSERT_TRUE(count == 0 ||
                std::memcmp(values.data(), expected.data(), values.size() * sizeof(T)) == 0)
        << count;
  }
}

template <typename T, ef::Communicator C>
void check_broadcast(C& communicator) {
  for (int root = 0; root < communicator.size(); ++root)
    for (Index count : {0, 1, 1000}) {
      std::vector<T> values(static_cast<std::size_t>(count));
      for (Index i = 0; i < count; ++i)
        values[static_cast<std::size_t>(i)] = element<T>(communicator.rank(), i);
      communicator.broadcast(std::span<T>(values), root);
      for (Index i = 0; i < count; ++i)
        ASSERT_EQ(values[static_cast<std::size_t>(i)], element<T>(root, i));
    }
}

template <ef::Communicator C>
void check_collectives(C& communicator) {
  check_all_gather<float>(communicator);
  check_all_gather<double>(communicator);
  check_all_gather<ef::bfloat16>(communicator);
  check_all_gather<std::int8_t>(communicator);
  communicator.barrier();
  check_all_reduce<float>(communicator);
  check_all_reduce<double>(communicator);
  check_all_reduce<ef::bfloat16>(communicator);
  check_all_reduce<ef::half>(communicator);
  check_all_reduce<std::int32_t>(communicator);
  check_all_reduce<std::int64_t>(communicator);
  communicator.barrier();
  check_broadcast<float>(communicator);
  check_broadcast<ef::half>(communicator);
  check_broadcast<std::array<char, 3>>(communicator);
}

template <>
inline std::array<char, 3> element<std::array<char, 3>>(int rank, Index i) {
  return {static_cast<char>(rank), static_cast<char>(i % 100), 'x'};
}

/// Contradictions within one rank's arguments: refused before anything is sent, so the other ranks
/// need not know.
template <ef::Communicator C>
void check_bad_arguments(C& communicator) {
  const int ranks = communicator.size();
  std::vector<float> part(2), whole(static_cast<std::size_t>(2 * ranks + 1), 7.0f);
  expect_throws<std::invalid_argument>(
      [&] { communicator.all_gather(part, whole); },
      {"all_gather", "whole has " + std::to_string(2 * ranks + 1), std::to_string(2 * ranks)});
  std::vector<Index> counts(static_cast<std::size_t>(ranks) + 1, 2);
  expect_throws<std::invalid_argument>(
      [&] { communicator.all_gather(part, whole, counts); },
      {"counts has " + std::to_string(ranks + 1), "expected " + std::to_string(ranks)});
  counts.assign(static_cast<std::size_t>(ranks), 3);
  expect_throws<std::invalid_argument>([&] { communicator.all_gather(part, whole, counts); },
                                       {"part has 2 elements", "is 3"});
  counts.assign(static_cast<std::size_t>(ranks), -2);
  expect_throws<std::invalid_argument>([&] { communicator.all_gather(part, whole, counts); },
                                       {"counts[0] is -2"});
  expect_throws<std::invalid_argument>([&] { communicator.broadcast(part, ranks); },
                                       {"broadcast", "root is " + std::to_string(ranks)});
  expect_throws<std::invalid_argument>([&] { communicator.broadcast(part, -1); }, {"root is -1"});
  for (float value : whole) ASSERT_EQ(value, 7.0f);
  communicator.barrier();
}

/// Ranks that call different collectives all get an error that says which, and can go on together.
template <ef::Communicator C>
void check_mismatches(C& communicator) {
  const int last = communicator.size() - 1;
  if (last == 0) return;
  const bool odd = communicator.rank() == last;
  const std::string name = "rank " + std::to_string(last);
  std::vector<float> values(8, 1.0f), whole(static_cast<std::size_t>(8 * communicator.size()));
  std::vector<std::int32_t> integers(8);
  const auto expect = [&](auto&& usual, auto&& unusual, std::vector<std::string> fragments) {
    fragments.push_back(name);
    expect_throws<ef::CommunicatorError>([&] { odd ? unusual() : usual(); }, fragments);
    check_all_gather<float>(communicator);
  };
  expect([&] { communicator.barrier(); }, [&] { communicator.all_reduce_sum(values); },
         {"barrier", "all_reduce_sum of 8 float"});
  expect([&] { communicator.all_reduce_sum(values); },
         [&] { communicator.all_reduce_sum(std::span(values).first(3)); }, {"8 float", "3 float"});
  expect([&] { communicator.all_reduce_sum(values); },
         [&] { communicator.all_reduce_sum(integers); }, {"8 float", "8 int32"});
  expect([&] { communicator.broadcast(values, 0); }, [&] { communicator.broadcast(values, 1); },
         {"from rank 0", "from rank 1"});
  expect([&] { communicator.all_gather(values, whole); }, [&] { communicator.barrier(); },
         {"all_gather", "barrier"});
  std::vector<Index> counts(static_cast<std::size_t>(communicator.size()), 8);
  expect([&] { communicator.all_gather(values, whole, counts); },
         [&] {  // the same total, divided in another way
           counts[0] -= 1;
           counts[static_cast<std::size_t>(last)] += 1;
           std::vector<float> nine(9);
           communicator.all_gather(nine, whole, counts);
         },
         {"in parts of other sizes"});
  EXPECT_EQ(values[0], 1.0f);
}

}  // namespace eigenformer_test
