// kernels_neon.cpp: the CPU kernels for neon; flags in setup.py, run only where dispatch.cpp finds the ISA.
#define MIXATTN_ISA_NEON
#define MIXATTN_ISA_NAME "neon"
#define MIXATTN_ISA_KERNELS kNeonKernels
#include "cpu/kernels-inl.h"
