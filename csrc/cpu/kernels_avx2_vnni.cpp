// kernels_avx2_vnni.cpp: as kernels_avx2.cpp, with products of four bytes and of int16 pairs (AVX_VNNI).
#define MIXATTN_ISA_AVX2
#define MIXATTN_ISA_AVX2_VNNI
#define MIXATTN_ISA_NAME "avx2_vnni"
#define MIXATTN_ISA_KERNELS kAvx2VnniKernels
#include "cpu/kernels-inl.h"
