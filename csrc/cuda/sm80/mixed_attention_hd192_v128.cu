// mixed_attention_hd192_v128.cu: the image of the sm_80 kernel for head_dim 192 and v_head_dim 128.

#include "cuda/sm80/entry.cuh"

MIXATTN_SM80_INSTANCES_OF(MIXATTN_SM80_ENTRY, 192_v128)
