/// \file
/// GGUF files, put together from metadata and tensors.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

namespace eigenformer_test {

class GgufWriter {
 public:
  /// A value with its type, as golden/gguf_models.json has it.
  void value(const std::string& key, const nlohmann::json& typed) {
    const auto type = typed.at(0).get<std::string>();
    const nlohmann::json& value = typed.at(1);
    if (type == "string") {
      text(key, value.get<std::string>());
    } else if (type == "float32") {
      put_value(key, 6, value.get<float>());
    } else if (type == "bool") {
      put_value(key, 7, static_cast<std::uint8_t>(value.get<bool>()));
    } else if (type == "bools") {
      booleans(key, value.get<std::vector<bool>>());
    } else {
      integer(key, value.get<std::uint32_t>());
    }
  }
  void integer(const std::string& key, std::uint32_t value) { put_value(key, 4, value); }
  void text(const std::string& key, std::string_view value) {
    key_of(key, 8);
    put_text(metadata_, value);
  }
  void texts(const std::string& key, const std::vector<std::string>& values) {
    key_of(key, 9);
    put(metadata_, std::uint32_t{8});
    put(metadata_, std::uint64_t{values.size()});
    for (const std::string& value : values) put_text(metadata_, value);
  }
  void booleans(const std::string& key, const std::vector<bool>& values) {
    key_of(key, 9);
    put(metadata_, std::uint32_t{7});
    put(metadata_, std::uint64_t{values.size()});
    for (const bool value : values) put(metadata_, static_cast<std::uint8_t>(value));
  }
  void tensor(const std::string& name, const std::vector<std::uint64_t>& shape,
              const std::vector<float>& values) {
    constexpr std::uint32_t f32 = 0;
    tensor(name, shape, f32,
           {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)});
  }
  /// Of a type by GGUF's number.
  void tensor(const std::string& name, const std::vector<std::uint64_t>& shape, std::uint32_t type,
              std::string_view bytes) {
    put_text(tensors_, name);
    put(tensors_, static_cast<std::uint32_t>(shape.size()));
    for (std::size_t d = shape.size(); d > 0; --d) put(tensors_, shape[d - 1]);
    put(tensors_, type);
    put(tensors_, std::uint64_t{data_.size()});
    data_ += bytes;
    data_.resize((data_.size() + 31) / 32 * 32);
    ++tensor_count_;
  }
  std::string file() const {
    std::string head = "GGUF";
    put(head, std::uint32_t{3});
    put(head, tensor_count_);
    put(head, value_count_);
    head += metadata_ + tensors_;
    head.resize((head.size() + 31) / 32 * 32);
    return head + data_;
  }

 private:
  template <typename T>
  static void put(std::string& to, T value) {
    to.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  static void put_text(std::string& to, std::string_view value) {
    put(to, std::uint64_t{value.size()});
    to += value;
  }
  void key_of(const std::string& key, std::uint32_t type) {
    put_text(metadata_, key);
    put(metadata_, type);
    ++value_count_;
  }
  template <typename T>
  void put_value(const std::string& key, std::uint32_t type, T value) {
    key_of(key, type);
    put(metadata_, value);
  }

  std::string metadata_, tensors_, data_;
  std::uint64_t tensor_count_ = 0, value_count_ = 0;
};

}  // namespace eigenformer_test
