// mixed_attention_hd192.cu: the image of the sm_80 kernel for head_dim 192.

#include "cuda/sm80/entry.cuh"

MIXATTN_SM80_INSTANCES_OF(MIXATTN_SM80_ENTRY, 192)
