#include "machine.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <thread>

#include <eigenformer/core/eigen.h>
#include <eigenformer/core/isa.h>

#include "peers/matmul.h"

namespace bench {
namespace {

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0)
      return line.substr(std::min(line.size(), line.find(':') + 2));
  return "unknown CPU";  // Arm's /proc/cpuinfo has no model name
}

int usable_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

std::string compiler_name() {
#if defined(__clang__)
  return __VERSION__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown compiler";
#endif
}

}  // namespace

Machine describe_machine() {
  const std::string eigen = std::to_string(EIGEN_WORLD_VERSION) + "." +
                            std::to_string(EIGEN_MAJOR_VERSION) + "." +
                            std::to_string(EIGEN_MINOR_VERSION);
  double load = 0;
  if (getloadavg(&load, 1) != 1) load = 0;
  return {cpu_model(),
          usable_cores(),
          eigenformer::isa::best::name,
          compiler_name(),
          eigen,
          peer_versions(),
          load};
}

}  // namespace bench
