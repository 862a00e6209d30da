/// \file
/// Peers on the same file: llama-bench and llama-batched-bench of llama.cpp, or of a program like
/// it.
#pragma once

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace programs {

/// A peer as the command line names it: NAME=PROGRAM, or PROGRAM of llama.cpp.
struct Peer {
  std::string name, program;

  static Peer of(const std::string& text) {
    const std::size_t at = text.find('=');
    if (at == std::string::npos) return {"llama.cpp", text};
    return {text.substr(0, at), text.substr(at + 1)};
  }
  /// Throws std::runtime_error where there is no such program; one without a folder is looked for
  /// when it runs.
  void require_there() const {
    if (program.find('/') != std::string::npos && ::access(program.c_str(), X_OK) != 0)
      throw std::runtime_error(program + " is no program that can be run");
  }
  /// The program of several sequences lies beside the one of one, or is not there.
  std::string batched_program() const {
    const auto path = std::filesystem::path(program).replace_filename("llama-batched-bench");
    return std::filesystem::exists(path) ? path.string() : "";
  }
};

/// Tokens per second of each repetition, and what llama-bench calls the model.
struct PeerRates {
  std::string model;
  std::vector<double> prefill, decode, batch;
  double peak_bytes = 0;  ///< the most memory that it held
};

/// The work of both.
struct BenchWork {
  std::string file;
  long threads, prompt_tokens, decode_tokens, batch, repetitions;
};

namespace detail {

struct Output {
  std::string text;
  double peak_bytes;
};

/// What a program writes; what it says on the way goes to the errors' stream. Throws
/// std::runtime_error where it fails.
inline Output output_of(const std::vector<std::string>& command) {
  std::vector<char*> words;
  for (const std::string& word : command) words.push_back(const_cast<char*>(word.c_str()));
  words.push_back(nullptr);
  int ends[2];
  if (::pipe(ends) != 0) throw std::runtime_error("no pipe for " + command[0]);
  const pid_t child = ::fork();
  if (child == 0) {
    ::dup2(ends[1], STDOUT_FILENO);
    ::close(ends[0]);
    ::close(ends[1]);
    ::execvp(words[0], words.data());
    ::_exit(127);
  }
  ::close(ends[1]);
  Output result{};
  char part[4096];
  for (ssize_t size; child > 0 && (size = ::read(ends[0], part, sizeof part)) > 0;)
    result.text.append(part, static_cast<std::size_t>(size));
  ::close(ends[0]);
  int status = -1;
  ::rusage usage{};
  if (child > 0) ::wait4(child, &status, 0, &usage);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
    throw std::runtime_error(command[0] + " cannot be run: is it installed?");
  if (status != 0) throw std::runtime_error("this failed: " + command[0]);
  result.peak_bytes = 1024.0 * static_cast<double>(usage.ru_maxrss);
  return result;
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
          test.at("samples_ts").get<std::vector<double>>();
    }
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(std::string("llama-bench wrote what is not its JSON: ") +
                             error.what());
  }
  const auto has_rates = [](const std::vector<double>& samples) {
    return !samples.empty() && *std::min_element(samples.begin(), samples.end()) > 0;
  };
  if (!has_rates(rates.prefill) || !has_rates(rates.decode))
    throw std::runtime_error("llama-bench wrote no rates");
  return rates;
}

/// What `llama-batched-bench --output-format jsonl` wrote, a line for each repetition among others.
inline std::vector<double> read_batched_bench(const std::string& text) {
  std::vector<double> rates;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = (std::min)(text.find('\n', at), text.size());
    const auto line = nlohmann::json::parse(text.substr(at, end - at), nullptr, false);
    if (line.is_object() && line.contains("speed_tg")) rates.push_back(line["speed_tg"]);
    at = end + 1;
  }
  if (rates.empty()) throw std::runtime_error("llama-batched-bench wrote no rates");
  return rates;
}

/// Runs a peer on CPU threads. Where the batch is larger than one and the program of several
/// sequences is there it runs as well: prompts of one token each, written tokens in turn.
inline PeerRates run_peer(const Peer& peer, const BenchWork& work) {
  const auto number = [](long n) { return std::to_string(n); };
  const detail::Output one =
      detail::output_of({peer.program, "-m", work.file, "-t", number(work.threads), "-p",
                         number(work.prompt_tokens), "-n", number(work.decode_tokens), "-r",
                         number(work.repetitions), "-ngl", "0", "-o", "json"});
  PeerRates rates = read_llama_bench(one.text);
  rates.peak_bytes = one.peak_bytes;
  const std::string batched = peer.batched_program();
  if (work.batch < 2 || batched.empty()) return rates;
  std::string turns = number(work.batch);
  for (long r = 1; r < work.repetitions; ++r) turns.append(",").append(number(work.batch));
  rates.batch = read_batched_bench(
      detail::output_of({batched, "-m", work.file, "-t", number(work.threads), "-c",
                         number(work.batch * (work.decode_tokens / 256 + 1) * 256), "-npp", "1",
                         "-ntg", number(work.decode_tokens), "-npl", turns, "-ngl", "0",
                         "--output-format", "jsonl"})
          .text);
  return rates;
}

}  // namespace programs
