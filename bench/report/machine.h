/// \file
/// What a figure was measured on: the machine, the compiler and its ISA, the versions of the peers.
#pragma once

#include <string>
#include <vector>

namespace bench {

struct Machine {
  std::string cpu;       ///< model name
  int cores = 1;         ///< that this process may use
  std::string isa;       ///< best ISA tag of this build, and its dot-product extensions
  std::string compiler;  ///< name and version
  std::string eigen;     ///< version
  std::vector<std::string> peers;
  double load = 0;  ///< load average of the minute before
};

Machine describe_machine();

}  // namespace bench
