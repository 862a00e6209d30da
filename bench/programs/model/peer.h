/// \file
/// llama-bench of llama.cpp, run on the same file.
#pragma once

#include <cstdio>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../report/statistics.h"

namespace programs {

/// Tokens per second, medians, and what llama-bench calls the model.
struct PeerRates {
  std::string model;
  double prefill = 0, decode = 0;
};

namespace detail {

/// `word` as one word of a shell's command.
inline std::string quoted(const std::string& word) {
  std::string result = "'";
  for (const char c : word) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return result + "'";
}

/// What a command writes. Throws std::runtime_error where it fails.
inline std::string output_of(const std::string& command) {
  std::FILE* const pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) throw std::runtime_error("no process for: " + command);
  std::string text;
  char part[4096];
  for (std::size_t size; (size = std::fread(part, 1, sizeof part, pipe)) > 0;)
    text.append(part, size);
  if (::pclose(pipe) != 0) throw std::runtime_error("this failed: " + command);
  return text;
}

}  // namespace detail

/// What `llama-bench -o json` wrote: a test of a prompt and one of written tokens. Throws
/// std::runtime_error for other text.
inline PeerRates read_llama_bench(const std::string& text) {
  PeerRates rates;
  try {
    for (const nlohmann::json& test : nlohmann::json::parse(text)) {
      rates.model = test.at("model_type");
      (test.at("n_gen") == 0 ? rates.prefill : rates.decode) =
          bench::median(test.at("samples_ts").get<std::vector<double>>());
    }
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(std::string("llama-bench wrote what is not its JSON: ") +
                             error.what());
  }
  if (rates.prefill <= 0 || rates.decode <= 0)
    throw std::runtime_error("llama-bench wrote no rates");
  return rates;
}

/// Runs llama-bench on CPU threads, and what it says on the way goes to the errors' stream.
inline PeerRates run_llama_bench(const std::string& program, const std::string& file, long threads,
                                 long prompt_tokens, long decode_tokens, long repetitions) {
  return read_llama_bench(detail::output_of(
      detail::quoted(program) + " -m " + detail::quoted(file) + " -t " + std::to_string(threads) +
      " -p " + std::to_string(prompt_tokens) + " -n " + std::to_string(decode_tokens) + " -r " +
      std::to_string(repetitions) + " -ngl 0 -o json"));
}

}  // namespace programs
