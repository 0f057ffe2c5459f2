// kernels_avx512.cpp: the CPU kernels for avx512; flags in setup.py, run only where dispatch.cpp finds the ISA.
#define MIXATTN_ISA_AVX512
#define MIXATTN_ISA_NAME "avx512"
#define MIXATTN_ISA_KERNELS kAvx512Kernels
#include "cpu/kernels-inl.h"
