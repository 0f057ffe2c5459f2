// quantised_hd96.cu: the image of the sm_80 kernel for K and V in int8, float8 and int4, for head_dim 96.

#include "cuda/sm80/entry.cuh"

MIXATTN_SM80_QUANTISED_INSTANCES_OF(MIXATTN_SM80_QUANTISED_ENTRY, 96)
