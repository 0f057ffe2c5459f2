// kernels_neon_bf16.cpp: as kernels_neon.cpp, with products of bfloat16 pairs and of unsigned bytes (BF16, I8MM).
#define MIXATTN_ISA_NEON
#define MIXATTN_ISA_NEON_BF16
#define MIXATTN_ISA_NAME "neon_bf16"
#define MIXATTN_ISA_KERNELS kNeonBf16Kernels
#include "cpu/kernels-inl.h"
