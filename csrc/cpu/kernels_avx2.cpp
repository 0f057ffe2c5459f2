// kernels_avx2.cpp: the CPU kernels for avx2; flags in setup.py, run only where dispatch.cpp finds the ISA.
#define MIXATTN_ISA_AVX2
#define MIXATTN_ISA_NAME "avx2"
#define MIXATTN_ISA_KERNELS kAvx2Kernels
#include "cpu/kernels-inl.h"
