// Laws: matrices of different formats in one decoder give the bits of the float decoder whose
// weights were rounded to them before; INT8 by groups is what pack_weight gives; bytes are those of
// the numbers and scales; an embedding is the head, or lies in blocks, with the same bits.
#include <eigenformer/decoder.h>

#include <cstddef>
#include <functional>
#include <list>
#include <span>

#include "decoder_support.h"

using namespace eigenformer_test;
using ef::WeightFormat;

namespace {

constexpr ef::DecoderConfig kWide{.vocabulary = 37,
                                  .features = 72,
                                  .layers = 2,
                                  .heads = 6,
                                  .kv_heads = 3,
                                  .head_dim = 12,
                                  .hidden = 136};

ef::Tensor<float, 2> logits_of(ef::Decoder<float>& model, const std::vector<Index>& chunks) {
  ef::KvCache<float> cache;
  ef::Tensor<float, 2> logits;
  std::int32_t next = 1;
  for (const Index chunk : chunks) {
    ef::Tensor<std::int32_t, 2> ids(1, chunk);
    for (Index i = 0; i < chunk; ++i) ids(0, i) = next++ * 5 % 37;
    logits = model.prefill(ids, cache);
  }
  return logits;
}

/// Rounds a tensor of the masters to what a format holds.
void round_to(WeightFormat format, ef::TensorView<float, 2> tensor) {
  for (Index i = 0; i < tensor.size(); ++i) {
    float& x = tensor.data()[i];
    if (format == WeightFormat::bfloat16) x = static_cast<float>(ef::bfloat16(x));
    if (format == WeightFormat::half) x = static_cast<float>(ef::half(x));
  }
}

/// Matrices in copies of scalar W, which live as long as this.
template <typename W>
class Copies {
 public:
  explicit Copies(const ef::DecoderWeights& masters) : masters_(masters) {}
  ef::TensorView<const W, 2> operator()(std::size_t tensor) {
    kept_.push_back(masters_.matrix(tensor).cast<W>());
    return ef::input_view<2>(kept_.back());
  }

 private:
  const ef::DecoderWeights& masters_;
  std::list<ef::Tensor<W, 2>> kept_;
};

/// Packs each matrix of a layer in the format that follows the one before it in a list.
class Mixed {
 public:
  explicit Mixed(std::shared_ptr<ef::DecoderWeights> masters) : masters_(std::move(masters)) {}

  static WeightFormat format(int place) {
    constexpr std::array formats{WeightFormat::bfloat16, WeightFormat::activation,
                                 WeightFormat::half};
    return formats[static_cast<std::size_t>(place % 3)];
  }

  auto packed() const {
    auto to = std::make_shared<ef::PackedDecoderWeights<float>>(kWide);
    const ef::DecoderWeights& m = *masters_;
    for (Index l = 0; l < kWide.layers; ++l) {
      const int place = static_cast<int>(l);
      const auto all = m.views(l);
      const auto pack = [&](int of, const ef::DecoderLayerViews<float>& views) {
        to->pack_layer(kOneThread, l, views, format(place + of), alone_);
      };
      pack(0, {.attention_norm = all.attention_norm,
               .query = all.query,
               .key = all.key,
               .value = all.value,
               .feed_forward_norm = all.feed_forward_norm});
      pack(1, {.output = all.output});
      pack(2, {.gate = all.gate, .up = all.up});
      pack(3, {.down = all.down});
    }
    to->pack_head(kOneThread, m.vector(m.norm()), m.matrix(m.head()), format(2), alone_);
    to->set_embedding(m.matrix(m.embedding()), masters_);
    return to;
  }

  /// The masters become what the formats hold.
  void round() {
    ef::DecoderWeights& m = *masters_;
    for (Index l = 0; l < kWide.layers; ++l) {
      const int place = static_cast<int>(l);
      const auto& w = m.layer(l);
      for (const std::size_t t : {w.query, w.key, w.value}) round_to(format(place), m.matrix(t));
      round_to(format(place + 1), m.matrix(w.output));
      for (const std::size_t t : {w.gate, w.up}) round_to(format(place + 2), m.matrix(t));
      round_to(format(place + 3), m.matrix(w.down));
    }
    round_to(format(2), m.matrix(m.head()));
  }

 private:
  std::shared_ptr<ef::DecoderWeights> masters_;
  ef::SelfCommunicator alone_;
};

TEST(PackedMatrices, OfDifferentFormatsGiveTheBitsOfRoundedWeights) {
  const auto masters = std::make_shared<ef::DecoderWeights>(kWide, 3);
  Mixed mixed(masters);
  ef::Decoder<float> served(mixed.packed(), kOneThread), exact(masters, kOneThread);
  const auto whole = logits_of(served, {11});
  EXPECT_FALSE(same_bits(whole, logits_of(exact, {11})));
  mixed.round();
  ef::Decoder<float> rounded(masters, kOneThread);
  EXPECT_TRUE(same_bits(whole, logits_of(rounded, {11})));
  EXPECT_TRUE(same_bits(whole, logits_of(served, {4, 1, 6})));
}

TEST(PackedMatrices, GroupsOfInt8ServeAsPacked) {
  const auto masters = make_weights(kWide, 4);
  ef::Decoder<float> exact(masters, kOneThread);
  const auto expected = logits_of(exact, {9});
  for (const Index group : {0, 32, 64, 128}) {
    const auto packed = std::make_shared<ef::PackedDecoderWeights<float>>(
        kWide, ef::WeightStorage{WeightFormat::int8, group});
    packed->pack(kOneThread, masters, ef::SelfCommunicator());
    const auto& down = std::get<ef::PackedColumnShard<std::int8_t>>(packed->layers()[1].down);
    const auto alone =
        ef::pack_weight<std::int8_t>(*std::as_const(*masters).views(1).down, {.group_size = group});
    EXPECT_EQ(down.weight.group_size(), group);
    ASSERT_EQ(down.weight.bytes(), alone.bytes());
    EXPECT_EQ(
        std::memcmp(down.weight.data(), alone.data(), static_cast<std::size_t>(alone.bytes())), 0);
    ef::Decoder<float> model(packed, kOneThread);
    const auto logits = logits_of(model, {9});
    EXPECT_LT(relative_error(logits, expected), 0.1) << group;
    EXPECT_TRUE(same_bits(logits, logits_of(model, {2, 1, 6}))) << group;
  }
}

/// The layers' matrices become what four bits hold of them.
void round_to_int4(ef::DecoderWeights& m, Index group) {
  for (Index l = 0; l < kWide.layers; ++l) {
    const auto& w = m.layer(l);
    for (const std::size_t t : {w.query, w.key, w.value, w.output, w.gate, w.up, w.down}) {
      const auto [values, scales, minimums] =
          ef::quantize_weights_int4_with_minimums(m.matrix(t), group, ef::Int4Fit::least_squares);
      m.matrix(t) = ef::dequantize_grouped(values, scales, minimums, group);
    }
  }
}

// The head has eight bits, and may be the embedding. From the float decoder of the rounded weights
// it differs by activations in INT8 and by the head.
TEST(PackedMatrices, GroupsOfInt4ServeAsPacked) {
  const auto masters = make_weights(kWide, 4);
  for (const Index group : {0, 32, 64, 128}) {
    const auto packed = std::make_shared<ef::PackedDecoderWeights<float>>(
        kWide, ef::WeightStorage{WeightFormat::int4, group});
    packed->pack(kOneThread, masters, ef::SelfCommunicator());
    const auto& down = std::get<ef::PackedColumnShard<ef::int4>>(packed->layers()[1].down);
    const auto alone = ef::pack_weight<ef::int4>(*std::as_const(*masters).views(1).down,
                                                 {.group_size = group == 0 ? Index{32} : group,
                                                  .zero_points = true,
                                                  .fit = ef::Int4Fit::least_squares});
    EXPECT_EQ(down.weight.group_size(), alone.group_size());
    EXPECT_NE(down.weight.minimums(), nullptr);
    ASSERT_EQ(down.weight.bytes(), alone.bytes());
    EXPECT_EQ(
        std::memcmp(down.weight.data(), alone.data(), static_cast<std::size_t>(alone.bytes())), 0);
    EXPECT_TRUE(std::holds_alternative<ef::PackedColumnShard<std::int8_t>>(packed->head()));
    packed->tie_embedding();
    ef::Decoder<float> model(packed, kOneThread);
    EXPECT_TRUE(same_bits(logits_of(model, {9}), logits_of(model, {2, 1, 6}))) << group;
    packed->set_embedding(std::as_const(*masters).matrix(masters->embedding()), masters);
    ef::Decoder<float> apart(packed, kOneThread);
    const auto logits = logits_of(apart, {9});
    const auto rounded = make_weights(kWide, 4);
    round_to_int4(*rounded, alone.group_size());
    ef::Decoder<float> expected(rounded, kOneThread);
    EXPECT_LT(relative_error(logits, logits_of(expected, {9})), 0.1) << group;
    EXPECT_TRUE(same_bits(logits, logits_of(apart, {2, 1, 6}))) << group;
  }
}

// Values that a file has are packed as they are: by any number of ranks the decoder that finds them
// itself.
TEST(PackedMatrices, FourBitValuesArePackedAsTheyAre) {
  const auto masters = make_weights(kWide, 4);
  const auto& m = std::as_const(*masters);
  const ef::WeightStorage storage{WeightFormat::int4, 64};
  const auto found = std::make_shared<ef::PackedDecoderWeights<float>>(kWide, storage);
  found->pack(kOneThread, masters, ef::SelfCommunicator());
  ef::Decoder<float> model(found, kOneThread);
  const auto expected = logits_of(model, {9});
  const Int4Layer layers[] = {{m.views(0), 64}, {m.views(1), 64}};
  const auto pack = [&](const auto& communicator) {
    auto to = std::make_shared<ef::PackedDecoderWeights<float>>(kWide, storage);
    for (const Index l : {0, 1}) {
      const auto all = m.views(l);
      to->pack_layer(kOneThread, l,
                     ef::DecoderLayerViews<float>{.attention_norm = all.attention_norm,
                                                  .feed_forward_norm = all.feed_forward_norm},
                     communicator);
      to->pack_layer(kOneThread, l, layers[l].views, WeightFormat::as_stored, communicator);
    }
    to->pack_head(kOneThread, m.vector(m.norm()), m.matrix(m.head()), communicator);
    to->set_embedding(m.matrix(m.embedding()), masters);
    return to;
  };
  const auto packed = pack(ef::SelfCommunicator());
  EXPECT_EQ(packed->bytes(), found->bytes());
  ef::Decoder<float> taken(packed, kOneThread);
  EXPECT_TRUE(same_bits(logits_of(taken, {9}), expected));
  ef::ThreadCommunicator::run(2, [&](auto& communicator) {
    ef::Decoder<float, Eigen::DefaultDevice, std::remove_reference_t<decltype(communicator)>> rank(
        pack(communicator), kOneThread, communicator);
    ef::KvCache<float> cache;
    ef::Tensor<std::int32_t, 2> ids(1, 9);
    for (Index i = 0; i < 9; ++i) ids(0, i) = static_cast<std::int32_t>(i + 1) * 5 % 37;
    EXPECT_TRUE(same_bits(rank.prefill(ids, cache), expected));
  });
  const ef::SelfCommunicator alone;
  expect_throws<std::invalid_argument>(
      [&] { packed->pack_layer(kOneThread, 0, layers[0].views, WeightFormat::int8, alone); },
      {"as stored alone"});
  ef::DecoderLayerViews<ef::int4, float> wrong;
  wrong.down = layers[0].views.output;
  expect_throws<std::invalid_argument>(
      [&] { packed->pack_layer(kOneThread, 0, wrong, WeightFormat::as_stored, alone); },
      {"down has shape (72, 72)", "(72, 136)"});
  ef::PackedDecoderWeights<double> wide(kWide);
  expect_throws<std::invalid_argument>(
      [&] { wide.pack_layer(kOneThread, 0, layers[0].views, WeightFormat::as_stored, alone); },
      {"activations of double"});
}

TEST(PackedMatrices, BytesAreThoseOfNumbersAndScales) {
  const auto masters = std::make_shared<ef::DecoderWeights>(kWide, 5);
  constexpr std::size_t kLinear =  // numbers of linear layers, and of what stays float
      2 * (72 * 72 * 2 + 36 * 72 * 2 + 3 * 136 * 72) + 37 * 72,
                        kFloats = 5 * 72 + 37 * 72;
  ef::Decoder<float> model(masters, kOneThread);
  const auto bytes = [&](const ef::WeightStorage& storage) {
    model.pack(storage);
    return model.weight_bytes();
  };
  EXPECT_EQ(bytes(WeightFormat::activation), 4 * (kLinear + kFloats));
  EXPECT_EQ(bytes(WeightFormat::as_stored), 4 * (kLinear + kFloats));
  EXPECT_EQ(bytes(WeightFormat::bfloat16), 2 * kLinear + 4 * kFloats);
  EXPECT_EQ(bytes(WeightFormat::half), 2 * kLinear + 4 * kFloats);
  constexpr std::size_t kOf72 = 2 * (144 + 72 + 2 * 136) + 37, kOf136 = 2 * 72;  // rows
  EXPECT_EQ(bytes(WeightFormat::int8), kLinear + 4 * (kOf72 + kOf136 + kFloats));
  EXPECT_EQ(bytes({WeightFormat::int8, 32}), kLinear + 4 * (3 * kOf72 + 5 * kOf136 + kFloats));
  EXPECT_EQ(bytes({WeightFormat::int8, 128}), kLinear + 4 * (kOf72 + 2 * kOf136 + kFloats));
  constexpr std::size_t kHead = 37 * (72 + 4 * 3),
                        kBehindHead = kOf72 - 37,      // INT8 by 32; the rest
      kOfGroups = 2 * (3 * kBehindHead + 5 * kOf136);  // scales and minimums
  EXPECT_EQ(bytes(WeightFormat::int4),
            (kLinear - 37 * 72) / 2 + 37 * (72 + 4) + 4 * (kOfGroups + kFloats));
  EXPECT_EQ(bytes({WeightFormat::int4, 32}),
            (kLinear - 37 * 72) / 2 + kHead + 4 * (kOfGroups + kFloats));
  EXPECT_EQ(bytes({WeightFormat::int4, 32, {.zero_points = false}}),
            (kLinear - 37 * 72) / 2 + kHead + 4 * (kOfGroups / 2 + kFloats));
}

// Activations of bfloat16 and half have products with their own scalar and INT8: other floating
// formats are rounded to it.
TEST(PackedMatrices, OfOtherFloatingFormatsAreRoundedToNarrowActivations) {
  const auto masters = std::make_shared<ef::DecoderWeights>(kWide, 6);
  Copies<ef::half> copies(*masters);
  const auto check = [&]<typename T>(T) {
    ef::PackedDecoderWeights<T> packed(kWide, WeightFormat::as_stored);
    ef::DecoderLayerViews<ef::half> views;
    views.down.emplace(copies(masters->layer(1).down));
    packed.pack_layer(kOneThread, 1, views, ef::SelfCommunicator());
    using Shard = ef::PackedColumnShard<T>;
    const auto& down = packed.layers()[1].down;
    ASSERT_TRUE(std::holds_alternative<Shard>(down));
    const auto expected = ef::pack_weight<T>(*views.down);
    const auto& got = std::get<Shard>(down).weight;
    ASSERT_EQ(got.bytes(), expected.bytes());
    EXPECT_EQ(std::memcmp(got.data(), expected.data(), static_cast<std::size_t>(got.bytes())), 0);
  };
  check(ef::bfloat16{});
  check(ef::half{});
  check(double{});
}

// A head that is the embedding too is one tensor: the bits of an embedding beside it in the head's
// format, and no byte more.
TEST(PackedMatrices, TiedEmbeddingIsTheHead) {
  const auto masters = make_weights(kWide, 8);
  const ef::SelfCommunicator alone;
  for (const auto format :
       {WeightFormat::activation, WeightFormat::bfloat16, WeightFormat::half, WeightFormat::int8}) {
    std::copy_n(masters->matrix(masters->head()).data(), kWide.vocabulary * kWide.features,
                masters->matrix(masters->embedding()).data());
    round_to(format, masters->matrix(masters->embedding()));
    const auto apart = std::make_shared<ef::PackedDecoderWeights<float>>(kWide, format);
    apart->pack(kOneThread, masters, alone);
    if (format == WeightFormat::int8) apart->own_embedding();
    const auto tied = std::make_shared<ef::PackedDecoderWeights<float>>(kWide, format);
    tied->pack(kOneThread, masters, alone);
    tied->tie_embedding();
    tied->own_embedding();  // it has no other
    ef::Decoder<float> one(tied, kOneThread), two(apart, kOneThread);
    const auto logits = logits_of(one, {11});
    EXPECT_TRUE(same_bits(logits, logits_of(two, {11})));
    EXPECT_TRUE(same_bits(logits, logits_of(one, {4, 1, 6})));
    EXPECT_EQ(two.weight_bytes() - one.weight_bytes(),
              static_cast<std::size_t>(kWide.vocabulary) *
                  (format == WeightFormat::int8 ? 72 + sizeof(float) : 72 * sizeof(float)));
    EXPECT_EQ(tied->bytes_of_layers(), tied->bytes());
    EXPECT_EQ(apart->bytes_of_layers(), tied->bytes());
  }
  ef::PackedDecoderWeights<float> none(kWide);
  EXPECT_THROW(none.tie_embedding(), std::logic_error);
  ef::ThreadCommunicator::run(2, [&](auto& communicator) {
    ef::PackedDecoderWeights<float> divided(kWide);
    divided.pack(kOneThread, masters, communicator);
    expect_throws<std::invalid_argument>([&] { divided.tie_embedding(); },
                                         {"the head is divided among 2 ranks"});
  });
}

// An embedding in blocks has the bits of its numbers, where it lies and as copies of its own.
TEST(PackedMatrices, AnEmbeddingInBlocksIsItsNumbers) {
  const auto masters = make_weights(kWide, 11);
  const ef::SelfCommunicator alone;
  std::vector<std::byte> bytes(static_cast<std::size_t>(kWide.vocabulary * 9));
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 37 % 251);
  // Eight numbers of a byte.
  const auto decode = [](int format, std::span<const std::byte> blocks, std::span<float> values) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      const int sum = std::to_integer<int>(blocks[i / 8]) + format * static_cast<int>(i % 8);
      values[i] = static_cast<float>(sum - 140) / 64;
    }
  };
  const ef::EncodedEmbedding table{bytes.data(), kWide.vocabulary, kWide.features, 8, 1, 3, decode};
  const auto numbers = masters->matrix(masters->embedding());
  decode(3, bytes, {numbers.data(), static_cast<std::size_t>(numbers.size())});
  const auto in_blocks = std::make_shared<ef::PackedDecoderWeights<float>>(kWide),
             plain = std::make_shared<ef::PackedDecoderWeights<float>>(kWide);
  for (const auto& packed : {in_blocks, plain}) packed->pack(kOneThread, masters, alone);
  in_blocks->set_embedding(table, nullptr);
  const auto expect_same = [&] {
    ef::Decoder<float> one(in_blocks, kOneThread), two(plain, kOneThread);
    EXPECT_TRUE(same_bits(logits_of(one, {11}), logits_of(two, {11})));
  };
  expect_same();
  EXPECT_EQ(plain->bytes() - in_blocks->bytes(),
            static_cast<std::size_t>(numbers.size()) * sizeof(float) - bytes.size());
  for (const auto format : {WeightFormat::activation, WeightFormat::int8}) {
    for (const auto& packed : {in_blocks, plain}) packed->own_embedding(kOneThread, format);
    expect_same();
    EXPECT_EQ(plain->bytes(), in_blocks->bytes());
  }
  const auto refused = [&](auto&& change, const std::vector<std::string>& words) {
    ef::EncodedEmbedding wrong = table;
    change(wrong);
    expect_throws<std::invalid_argument>([&] { plain->set_embedding(wrong, nullptr); }, words);
  };
  refused([](auto& t) { t.rows = 36; }, {"embedding has shape (36, 72)", "(37, 72)"});
  refused([](auto& t) { t.block_elements = 7; }, {"blocks of 7 elements", "a divisor of 256"});
  refused([](auto& t) { t.block_elements = 16; }, {"blocks of 16 elements", "of 72"});
  refused([](auto& t) { t.decode = nullptr; }, {"a function that decodes them"});
  expect_same();
}

TEST(PackedMatrices, RefusesStorageThatIsNone) {
  using Weights = ef::PackedDecoderWeights<float>;
  expect_throws<std::invalid_argument>(
      [] {
        Weights(kWide, {WeightFormat::bfloat16, 64});
      },
      {"PackedDecoderWeights", "group_size is 64", "only int8 and int4"});
  expect_throws<std::invalid_argument>(
      [] {
        Weights(kWide, {WeightFormat::int8, 48});
      },
      {"group_size is 48", "32, 64 or 128"});
  const ef::DecoderWeights masters(kWide, 7);
  Weights packed(kWide);
  expect_throws<std::invalid_argument>(
      [&] {
        packed.pack_layer(kOneThread, 0, masters.views(0), {WeightFormat::int8, -1},
                          ef::SelfCommunicator());
      },
      {"group_size is -1"});
  EXPECT_THROW(packed.require_complete(), std::logic_error);
}

}  // namespace
