# cmake -C cmake/isa/avx512_vnni.cmake ... : our tests and benchmarks for this ISA
set(EIGENFORMER_ISA_FLAGS "-march=x86-64-v4 -mavx512vnni" CACHE STRING "")
