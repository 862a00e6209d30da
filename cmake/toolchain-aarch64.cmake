# cmake -DCMAKE_TOOLCHAIN_FILE=cmake/toolchain-aarch64.cmake -C cmake/isa/neon_dotprod.cmake ... : our programs for 64-bit Arm, built and, by
# qemu, run on another machine (Debian: g++-aarch64-linux-gnu qemu-user googletest).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
find_program(EIGENFORMER_QEMU qemu-aarch64)
if(EIGENFORMER_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${EIGENFORMER_QEMU} -L /usr/aarch64-linux-gnu)
endif()
# Libraries of the target alone. Packages of headers (Eigen, nlohmann-json) come from this machine's /usr/share; its packages of
# libraries lie in lib/x86_64-linux-gnu, which is not searched for this target.
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
