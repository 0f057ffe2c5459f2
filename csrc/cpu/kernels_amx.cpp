// kernels_amx.cpp: as kernels_avx512_bf16.cpp, with products of many rows by the tiles of AMX (AMX_TILE, AMX_BF16,
// AMX_INT8): Intel's Sapphire Rapids and later.
#define MIXATTN_ISA_AVX512
#define MIXATTN_ISA_AVX512_VNNI
#define MIXATTN_ISA_AVX512_BF16
#define MIXATTN_ISA_AMX
#define MIXATTN_ISA_NAME "amx"
#define MIXATTN_ISA_KERNELS kAmxKernels
#include "cpu/kernels-inl.h"
