// emulated_attention.cpp: the attention kernels for the emulated driver, and the memory that each launch may touch.

#include "cuda/sm80/entry.cuh"
#include "cuda/sm90/entry.cuh"
#include "emulated_driver.h"

// sanitized_attention.cpp takes fewer.
#ifndef EMULATED_SM80
#define EMULATED_SM80 MIXATTN_SM80_INSTANCES
#define EMULATED_SM80_QUANTISED MIXATTN_SM80_QUANTISED_INSTANCES
#define EMULATED_SM90 MIXATTN_SM90_INSTANCES
#endif

EMULATED_SM80(MIXATTN_SM80_ENTRY)
EMULATED_SM80_QUANTISED(MIXATTN_SM80_QUANTISED_ENTRY)
EMULATED_SM90(MIXATTN_SM90_ENTRY)

namespace {

using mixattn::cuda::LaunchParams;
using mixattn::cuda::sm90::KeyMaps;

struct Dim {
  int64_t size;
  int64_t stride;
};

// From the first to behind the last element, gaps included.
size_t span_bytes(std::initializer_list<Dim> dims, size_t element_bytes) {
  int64_t last = 0;
  for (const Dim& dim : dims) {
    if (dim.size == 0) return 0;
    last += (dim.size - 1) * dim.stride;
  }
  return size_t(last + 1) * element_bytes;
}

std::vector<emu::Region> regions_of(const LaunchParams& launch) {
  const mixattn::AttentionParams& p = launch.call;
  const size_t element_bytes = 2;
  const bool is_stored_in_bytes = mixattn::cuda::is_quantised(p.kv_dtype);
  const auto rows = [&](int64_t token_stride, int64_t head_stride, int64_t width) {
    return span_bytes({{p.total_q, token_stride}, {p.num_q_heads, head_stride}, {width, 1}}, element_bytes);
  };
  const auto pages = [&](int64_t page_stride, int64_t token_stride, int64_t head_stride, int64_t width) {
    const Dim stored_row = {p.kv_dtype == mixattn::KvDType::kInt4 ? width / 2 : width, 1};
    return span_bytes(
        {{p.num_pages, page_stride}, {p.page_size, token_stride}, {p.num_kv_heads, head_stride}, stored_row},
        is_stored_in_bytes ? 1 : element_bytes);
  };
  return {{"q", p.q, rows(p.q_token_stride, p.q_head_stride, p.head_dim)},
          {"k_cache", p.k_cache, pages(p.k_page_stride, p.k_token_stride, p.k_head_stride, p.head_dim)},
          {"v_cache", p.v_cache, pages(p.v_page_stride, p.v_token_stride, p.v_head_stride, p.v_head_dim)},
          {"out", p.out, rows(p.out_token_stride, p.out_head_stride, p.v_head_dim)},
          {"lse", p.lse, span_bytes({{p.total_q, p.lse_token_stride}, {p.num_q_heads, 1}}, sizeof(float))},
          {"partial_out", p.partial_out,
           span_bytes({{p.num_partial_rows, p.v_head_dim}, {p.v_head_dim, 1}}, sizeof(float))},
          {"partial_lse", p.partial_lse, span_bytes({{p.num_partial_rows, 1}}, sizeof(float))},
          {"tickets", p.tickets, span_bytes({{p.num_tickets, 1}}, sizeof(int32_t))}};
}

// The argument may lie anywhere, a parameter may not.
template <class Param>
Param param_at(const void* argument) {
  Param param;
  memcpy(static_cast<void*>(&param), argument, sizeof param);
  return param;
}

std::vector<emu::Region> regions_at(void** arguments) {
  return regions_of(param_at<LaunchParams>(arguments[0]));
}

bool add(const char* name, void (*kernel)(LaunchParams)) {
  const auto run = [kernel](void** arguments) { kernel(param_at<LaunchParams>(arguments[0])); };
  return emulated_driver::add_kernel(name, {run, regions_at, {sizeof(LaunchParams)}});
}
bool add(const char* name, void (*kernel)(LaunchParams, KeyMaps)) {
  const auto run = [kernel](void** arguments) {
    kernel(param_at<LaunchParams>(arguments[0]), param_at<KeyMaps>(arguments[1]));
  };
  return emulated_driver::add_kernel(name, {run, regions_at, {sizeof(LaunchParams), sizeof(KeyMaps)}});
}

#define STRING(text) #text
#define NAME(name) STRING(name)
#define ADD_SM80(element, heads, scores) \
  add(NAME(MIXATTN_SM80_NAME(element, heads, scores)), MIXATTN_SM80_NAME(element, heads, scores)),
#define ADD_SM80_QUANTISED(stored, kStored, heads, scores) \
  add(NAME(MIXATTN_SM80_QUANTISED_NAME(stored, heads, scores)), MIXATTN_SM80_QUANTISED_NAME(stored, heads, scores)),
#define ADD_SM90(element, kHeadDim, scores) \
  add(NAME(MIXATTN_SM90_NAME(element, kHeadDim, scores)), MIXATTN_SM90_NAME(element, kHeadDim, scores)),
[[maybe_unused]] const bool kAdded[] = {EMULATED_SM80(ADD_SM80) EMULATED_SM80_QUANTISED(ADD_SM80_QUANTISED)
                                            EMULATED_SM90(ADD_SM90)};

}  // namespace
