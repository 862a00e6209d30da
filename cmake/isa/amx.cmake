# cmake -C cmake/isa/amx.cmake ... : our tests and benchmarks for this ISA
# Sapphire Rapids less what the kernels do not ask for, so that other CPUs with AVX-512 can run the tests (AMX on an emulator).
set(EIGENFORMER_ISA_FLAGS "-march=x86-64-v4 -mavx512vnni -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16" CACHE STRING "")
