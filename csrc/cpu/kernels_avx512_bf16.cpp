// kernels_avx512_bf16.cpp: as kernels_avx512_vnni.cpp, with products of bfloat16 pairs (AVX512_BF16).
#define MIXATTN_ISA_AVX512
#define MIXATTN_ISA_AVX512_VNNI
#define MIXATTN_ISA_AVX512_BF16
#define MIXATTN_ISA_NAME "avx512_bf16"
#define MIXATTN_ISA_KERNELS kAvx512Bf16Kernels
#include "cpu/kernels-inl.h"
