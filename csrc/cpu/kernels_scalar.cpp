// kernels_scalar.cpp: the CPU kernels for scalar; flags in setup.py, run only where dispatch.cpp finds the ISA.
#define MIXATTN_ISA_SCALAR
#define MIXATTN_ISA_NAME "scalar"
#define MIXATTN_ISA_KERNELS kScalarKernels
#include "cpu/kernels-inl.h"
