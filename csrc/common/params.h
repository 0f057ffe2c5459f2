// params.h: what a call of a kernel gets: raw addresses, sizes, strides in elements. Filled by the bindings.
// Names as in the Python doors (mixattn/ops); the last dimension of every tensor is contiguous. Strides and everything
// multiplied with them are 64-bit: a pool of pages passes 2^31 elements.
#pragma once

#include <cstdint>

#include "common/work_item.h"

namespace mixattn {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// What K and V are stored as. kInt4: two elements in a byte, the first in the low nibble; value = nibble - 8.
enum class KvDType : int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kInt8 = 3,
  kFloat8E4M3 = 4,
  kFloat8E5M2 = 5,
  kInt4 = 6
};

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kHeadDimMultiple = 8;

// What turns stored elements of K or V into real ones: real = stored * scale.
struct KvScale {
  float* data;          // nullptr: `value` is the scale of all
  float value;          // read without data
  bool is_per_token;    // data is [num_pages, page_size, num_kv_heads], append_kv writes it; else [num_kv_heads]
  int64_t page_stride;  // 0 unless is_per_token, as is token_stride
  int64_t token_stride;
  int64_t head_stride;
};

struct AttentionParams {
  DType dtype;                  // of q and out
  KvDType kv_dtype;             // of k_cache and v_cache
  const void* q;                // [total_q, num_q_heads, head_dim]
  const void* k_cache;          // [num_pages, page_size, num_kv_heads, head_dim]; int4: bytes, head_dim / 2
  const void* v_cache;          // [num_pages, page_size, num_kv_heads, v_head_dim]; int4: bytes, v_head_dim / 2
  KvScale k_scale;              // of k_cache
  KvScale v_scale;              // of v_cache
  void* out;                    // [total_q, num_q_heads, v_head_dim]
  float* lse;                   // [total_q, num_q_heads], natural log; nullptr: not wanted
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  const int32_t* seq_lens;      // [num_seqs]
  const int32_t* block_table;   // [num_seqs, max_pages]
  const int32_t* plan;          // [plan_words], work_item.h
  const float* alibi_slopes;    // [num_seqs, num_q_heads]; nullptr: off
  const float* sinks;           // [num_q_heads], natural log; nullptr: off
  const int64_t* tree_mask;     // [total_q] words; bit d: whether the row sees the key d before it; nullptr: off
  float* partial_out;           // [num_partial_rows, v_head_dim], each row normalised by its own sum
  float* partial_lse;           // [num_partial_rows], natural log (CPU) or base 2 (CUDA); -inf marks an empty part
  int32_t* tickets;             // [num_tickets], all zero between calls

  int64_t total_q, num_seqs, num_q_heads, num_kv_heads, head_dim, v_head_dim, num_pages, page_size, max_pages;
  int64_t plan_words, num_partial_rows, num_tickets;
  int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
  int64_t k_page_stride, k_token_stride, k_head_stride;
  int64_t v_page_stride, v_token_stride, v_head_stride;
  int64_t lse_token_stride, block_table_stride;
  int64_t alibi_seq_stride;  // 0: one set of slopes for all sequences

  float softmax_scale;
  float soft_cap;       // 0: off
  int64_t window_left;  // -1: no window
  bool causal;
  bool invariant;  // a row's bits depend on its own q and keys alone; the plan is an invariant one
  bool rounds_q;   // q and weights may be rounded to what is multiplied fastest with K and V as they are stored

  int64_t group_size() const { return num_q_heads / num_kv_heads; }
};

struct AppendKvParams {
  DType dtype;                  // of k, v, q and q_out
  KvDType kv_dtype;             // of k_cache and v_cache
  const void* k;                // [num_tokens, num_kv_heads, head_dim]
  const void* v;                // [num_tokens, num_kv_heads, v_head_dim]
  void* k_cache;                // [num_pages, page_size, num_kv_heads, head_dim]; int4: bytes, head_dim / 2
  void* v_cache;                // [num_pages, page_size, num_kv_heads, v_head_dim]; int4: bytes, v_head_dim / 2
  KvScale k_scale;              // of k_cache
  KvScale v_scale;              // of v_cache
  const int64_t* slot_mapping;  // [num_tokens]
  const void* q;                // [num_tokens, num_q_heads, head_dim] or nullptr
  void* q_out;                  // the same; may be q
  const int64_t* positions;     // [num_tokens] or nullptr: no rotation
  const float* rope_cos_sin;    // [max_positions, rotary_dim]: rotary_dim / 2 cosines, then as many sines

  int64_t num_tokens, num_q_heads, num_kv_heads, head_dim, v_head_dim, num_pages, page_size, max_positions, rotary_dim;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  int64_t q_token_stride, q_head_stride, q_out_token_stride, q_out_head_stride;
  int64_t k_cache_page_stride, k_cache_token_stride, k_cache_head_stride;
  int64_t v_cache_page_stride, v_cache_token_stride, v_cache_head_stride;
  int64_t rope_stride;
  bool interleaved;
};

struct MergeStatesParams {
  DType dtype;        // of outs and out
  const void* outs;   // [num_states, num_tokens, num_heads, head_dim]
  const float* lses;  // [num_states, num_tokens, num_heads], natural log
  void* out;          // [num_tokens, num_heads, head_dim], contiguous
  float* lse;         // [num_tokens, num_heads], contiguous

  int64_t num_states, num_tokens, num_heads, head_dim;
  int64_t outs_state_stride, outs_token_stride, outs_head_stride;
  int64_t lses_state_stride, lses_token_stride;
};

}  // namespace mixattn
