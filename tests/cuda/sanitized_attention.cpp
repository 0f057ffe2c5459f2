// sanitized_attention.cpp: of the attention kernels, one of each body, for programs that sanitizers watch.

#define EMULATED_SM80(X)   \
  X(bf16, 64, plain)       \
  X(bf16, 64, capped)      \
  X(bf16, 64, any)         \
  X(bf16, 192_v128, plain) \
  X(bf16, 256, plain)
#define EMULATED_SM80_QUANTISED(X) \
  X(int8, kInt8, 64, plain)        \
  X(int4, kInt4, 64, plain)        \
  X(e4m3, kFloat8E4M3, 64, any)    \
  X(int8, kInt8, 192_v128, plain)
#define EMULATED_SM90(X) \
  X(bf16, 64, plain)     \
  X(bf16, 128, plain)
#include "emulated_attention.cpp"
