// kernels_avx512_vnni.cpp: as kernels_avx512.cpp, with products of four bytes and of int16 pairs (AVX512_VNNI).
#define MIXATTN_ISA_AVX512
#define MIXATTN_ISA_AVX512_VNNI
#define MIXATTN_ISA_NAME "avx512_vnni"
#define MIXATTN_ISA_KERNELS kAvx512VnniKernels
#include "cpu/kernels-inl.h"
