// mixed_attention_hd96.cu: the image of the sm_90 kernel for head_dim 96.

#include "cuda/sm90/entry.cuh"

MIXATTN_SM90_INSTANCES_96(MIXATTN_SM90_ENTRY)
