#!/bin/sh
# The README's two commands, on a machine that has nothing but git and sh:
#   sh cmake/bootstrap.sh demo [arguments of bench/end_to_end]   builds and runs the main job
#   sh cmake/bootstrap.sh test                                   builds and passes all tests
# and for scripts:
#   sh cmake/bootstrap.sh packages demo|test|ci                  only installs what is missing
# Installs missing packages with the system's package manager and downloads nothing else. Safe to run twice.
# EIGENFORMER_BUILD_DIR chooses the build folder (default: build/demo and build/test), EIGENFORMER_ISA a file of cmake/isa (default: native).
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

say() { printf 'eigenformer: %s\n' "$*"; }
fail() { printf 'eigenformer: %s\n' "$*" >&2; exit 1; }

# ---- which packages, by package manager ------------------------------------------------------------------------------------------
# One word a need; its package in apt, dnf, pacman, brew ("-": comes with another or is part of the system), and how to see that it is there.
needs_of() {
  case "$1" in
    demo) echo compiler cmake ninja eigen json ;;
    test) echo compiler cmake ninja eigen json pcre gtest mpi ;;
    ci) echo compiler cmake ninja eigen json pcre gtest mpi benchmark ccache clang onednn openblas format cross platforms ;;
    *) fail "unknown package set '$1', expected demo, test or ci" ;;
  esac
}
package_of() {  # need, manager
  case "$2:$1" in
    apt:compiler) echo g++ ;;          dnf:compiler) echo gcc-c++ ;;       pacman:compiler) echo gcc ;;           brew:compiler) echo - ;;
    apt:cmake) echo cmake ;;           dnf:cmake) echo cmake ;;            pacman:cmake) echo cmake ;;            brew:cmake) echo cmake ;;
    apt:ninja) echo ninja-build ;;     dnf:ninja) echo ninja-build ;;      pacman:ninja) echo ninja ;;            brew:ninja) echo ninja ;;
    apt:eigen) echo libeigen3-dev ;;   dnf:eigen) echo eigen3-devel ;;     pacman:eigen) echo eigen ;;            brew:eigen) echo eigen ;;
    apt:json) echo nlohmann-json3-dev ;; dnf:json) echo json-devel ;;      pacman:json) echo nlohmann-json ;;     brew:json) echo nlohmann-json ;;
    apt:pcre) echo libpcre2-dev ;;     dnf:pcre) echo pcre2-devel ;;       *:pcre) echo pcre2 ;;
    apt:gtest) echo libgtest-dev ;;    dnf:gtest) echo gtest-devel ;;      pacman:gtest) echo gtest ;;            brew:gtest) echo googletest ;;
    apt:mpi) echo libopenmpi-dev openmpi-bin ;; dnf:mpi) echo openmpi-devel ;; pacman:mpi) echo openmpi ;;        brew:mpi) echo open-mpi ;;
    apt:benchmark) echo libbenchmark-dev ;; dnf:benchmark) echo google-benchmark-devel ;; pacman:benchmark) echo benchmark ;; brew:benchmark) echo google-benchmark ;;
    *:ccache) echo ccache ;;
    apt:clang) echo clang-16 libclang-rt-16-dev ;; *:clang) echo clang ;;
    apt:onednn) echo libdnnl-dev ;;    dnf:onednn) echo onednn-devel ;;    pacman:onednn) echo onednn ;;          brew:onednn) echo onednn ;;
    apt:openblas) echo libopenblas-dev ;; dnf:openblas) echo openblas-devel ;; *:openblas) echo openblas ;;
    apt:format) echo clang-format-16 ;; *:format) echo - ;;
    # The 32-bit libraries by their version: g++-multilib itself shuts out the cross compilers.
    apt:platforms) echo libc++-16-dev libc++abi-16-dev g++-12-multilib g++-mingw-w64-x86-64-posix wine wine64 ;; *:platforms) echo - ;;
    apt:cross) echo g++-aarch64-linux-gnu qemu-user googletest ;; *:cross) echo - ;;
  esac
}

installed() {  # package, manager
  case "$2" in
    apt) dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'ok installed' ;;
    dnf) rpm -q "$1" >/dev/null 2>&1 ;;
    pacman) pacman -Q "$1" >/dev/null 2>&1 ;;
    brew) brew list --versions "$1" >/dev/null 2>&1 ;;
  esac
}

find_manager() {
  for manager in apt-get dnf pacman brew; do
    if command -v "$manager" >/dev/null 2>&1; then
      echo "${manager%-get}"
      return
    fi
  done
  echo none
}

install_packages() {  # set
  manager=$(find_manager)
  if [ "$manager" = none ]; then
    say "no package manager that this script knows (apt, dnf, pacman, brew): taking the needs ($(needs_of "$1")) as installed"
    return
  fi
  missing=''
  for need in $(needs_of "$1"); do
    for package in $(package_of "$need" "$manager"); do
      if [ "$package" != - ] && ! installed "$package" "$manager"; then missing="$missing $package"; fi
    done
  done
  if [ -z "$missing" ]; then return; fi
  case "$manager" in
    apt) command="apt-get install -y --no-install-recommends$missing" ;;
    dnf) command="dnf install -y$missing" ;;
    pacman) command="pacman -S --needed --noconfirm$missing" ;;
    brew) command="brew install$missing" ;;
  esac
  if [ "$manager" != brew ] && [ "$(id -u)" != 0 ]; then
    fail "these packages are missing:$missing
  Installing needs root. Run this, then the same command again:
    sudo $command"
  fi
  say "installing:$missing"
  if [ "$manager" = apt ]; then
    DEBIAN_FRONTEND=noninteractive
    export DEBIAN_FRONTEND
    apt-get update -qq || fail "apt-get update failed: is a package source reachable?"
  fi
  log=$(mktemp)
  # shellcheck disable=SC2086
  if ! $command >"$log" 2>&1; then
    cat "$log" >&2
    fail "the package manager failed (above). Mend that, then run the same command again."
  fi
  rm -f "$log"
}

# ---- configure and build ----------------------------------------------------------------------------------------------------------
isa_file() {
  if [ -n "${EIGENFORMER_ISA:-}" ]; then
    echo "$root/cmake/isa/$EIGENFORMER_ISA.cmake"
  elif echo 'int main() { return 0; }' | "${CXX:-c++}" -march=native -x c++ -fsyntax-only - 2>/dev/null; then
    echo "$root/cmake/isa/native.cmake"
  else
    echo "$root/cmake/isa/generic.cmake"
  fi
}

configure() {  # build folder, options...
  build=$1
  shift
  mkdir -p "$build"
  if ! cmake -S "$root" -B "$build" -G Ninja -C "$(isa_file)" -DCMAKE_BUILD_TYPE=Release "$@" >"$build/configure.log" 2>&1; then
    cat "$build/configure.log" >&2
    fail "CMake failed (above; also in $build/configure.log)"
  fi
}

case "${1:-}" in
  demo)
    shift
    install_packages demo
    build=${EIGENFORMER_BUILD_DIR:-$root/build/demo}
    say "building the main job in $build (about a minute)"
    configure "$build" -DEIGENFORMER_BUILD_TESTS=OFF -DEIGENFORMER_BUILD_BENCHMARKS=ON
    cmake --build "$build" --target end_to_end
    exec "$build/bench/end_to_end" "$@"
    ;;
  test)
    install_packages test
    build=${EIGENFORMER_BUILD_DIR:-$root/build/test}
    # OpenMPI of Fedora lives behind environment modules.
    if [ -d /usr/lib64/openmpi/bin ]; then PATH=$PATH:/usr/lib64/openmpi/bin; export PATH; fi
    say "building the tests in $build (a few minutes)"
    # -O1: of the time most is the compiler's, and -O2 takes it a third more. What is compiled at -O2 besides: tests/CMakeLists.txt.
    configure "$build" -DEIGENFORMER_BUILD_TESTS=ON -DEIGENFORMER_BUILD_BENCHMARKS=OFF -DEIGENFORMER_MPI=ON -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG"
    cmake --build "$build"
    cd "$build"
    exec ctest --output-on-failure -j "$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
    ;;
  packages)
    install_packages "${2:-test}"
    ;;
  *)
    fail "usage: sh cmake/bootstrap.sh demo [arguments] | test | packages demo|test|ci"
    ;;
esac
