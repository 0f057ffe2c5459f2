// kernels-inl.h: one ISA's kernels and their table; the whole of a kernels_<isa>.cpp.
#pragma once

#include "cpu/elementwise-inl.h"
#include "cpu/kernels.h"
#include "cpu/kv_cache-inl.h"
#include "cpu/linear-inl.h"
#include "cpu/linear_int8-inl.h"
#if defined(MIXATTN_ISA_AMX)
#include "cpu/linear_tiles-inl.h"
#endif
#include "cpu/merge-inl.h"
#include "cpu/mixed_attention-inl.h"
#include "cpu/roof-inl.h"
#include "cpu/vec.h"

namespace mixattn {
namespace cpu {

const IsaKernels MIXATTN_ISA_KERNELS = {
    MIXATTN_ISA_NAME,
#if defined(MIXATTN_SIMDE) || defined(MIXATTN_EMULATED_AMX) || defined(MIXATTN_EMULATED_AVX_VNNI)
    true,
#else
    false,
#endif
    attend_scratch_bytes,
    attend,
    merge_splits,
    append_kv_rows,
    merge_states_rows,
    linear_panels,
    scale_for_nibbles,
    linear_int8_panels,
    quantise_rows,
#if defined(MIXATTN_ISA_AMX)
    linear_tiles,
    split_rows,
    least_tiled_rows,
#else
    nullptr,
    nullptr,
    nullptr,
#endif
    kTileCols,
    kTileRows,
    unpack_weight_row,
    rms_norm_rows,
    silu_mul_rows,
    fma_loop,
    read_loop,
    kFmaFlopsPerRound,
#if defined(MIXATTN_ISA_AVX512_BF16) && !defined(MIXATTN_ISA_AMX)
    bfloat16_loop,
#else
    nullptr,
#endif
};

}  // namespace cpu
}  // namespace mixattn
