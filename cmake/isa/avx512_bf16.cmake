# cmake -C cmake/isa/avx512_bf16.cmake ... : our tests and benchmarks for this ISA
set(EIGENFORMER_ISA_FLAGS "-march=x86-64-v4 -mavx512vnni -mavx512bf16" CACHE STRING "")
