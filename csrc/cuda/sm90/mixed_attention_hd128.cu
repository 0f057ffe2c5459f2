// mixed_attention_hd128.cu: the image of the sm_90 kernel for head_dim 128.

#include "cuda/sm90/entry.cuh"

MIXATTN_SM90_INSTANCES_128(MIXATTN_SM90_ENTRY)
