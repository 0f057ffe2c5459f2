// mixed_attention_hd64.cu: the image of the sm_90 kernel for head_dim 64.

#include "cuda/sm90/entry.cuh"

MIXATTN_SM90_INSTANCES_64(MIXATTN_SM90_ENTRY)
