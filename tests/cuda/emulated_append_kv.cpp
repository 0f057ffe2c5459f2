// emulated_append_kv.cpp: the kernels of append_kv for the emulated driver, and the memory that each launch may touch.

#include "cuda/sm80/append_kv.cu"
#include "emulated_driver.h"

namespace {

using mixattn::AppendKvParams;
using mixattn::KvDType;

// Bytes from the first to behind the last element, gaps included.
size_t span_bytes(std::initializer_list<std::pair<int64_t, int64_t>> sizes_and_strides, int64_t row_bytes,
                  int64_t element_bytes) {
  int64_t last = 0;
  for (const auto& [size, stride] : sizes_and_strides) {
    if (size == 0) return 0;
    last += (size - 1) * stride * element_bytes;
  }
  return static_cast<size_t>(last + row_bytes);
}

std::vector<emu::Region> regions_of(const AppendKvParams& p) {
  const bool is_quantised = mixattn::cuda::is_quantised(p.kv_dtype);
  const int64_t cache_element_bytes = is_quantised ? 1 : 2;
  const auto rows = [&](int64_t num_heads, int64_t token_stride, int64_t head_stride, int64_t width) {
    return span_bytes({{p.num_tokens, token_stride}, {num_heads, head_stride}}, 2 * width, 2);
  };
  const auto pages = [&](int64_t page_stride, int64_t token_stride, int64_t head_stride, int64_t width) {
    return span_bytes({{p.num_pages, page_stride}, {p.page_size, token_stride}, {p.num_kv_heads, head_stride}},
                      p.kv_dtype == KvDType::kInt4 ? width / 2 : width * cache_element_bytes, cache_element_bytes);
  };
  const auto scales = [&](const mixattn::KvScale& scale) {
    return emu::Region{
        "scale", scale.data,
        span_bytes(
            {{p.num_pages, scale.page_stride}, {p.page_size, scale.token_stride}, {p.num_kv_heads, scale.head_stride}},
            sizeof(float), sizeof(float))};
  };
  return {
      {"k", p.k, rows(p.num_kv_heads, p.k_token_stride, p.k_head_stride, p.head_dim)},
      {"v", p.v, rows(p.num_kv_heads, p.v_token_stride, p.v_head_stride, p.v_head_dim)},
      {"q", p.q, rows(p.num_q_heads, p.q_token_stride, p.q_head_stride, p.head_dim)},
      {"q_out", p.q_out, rows(p.num_q_heads, p.q_out_token_stride, p.q_out_head_stride, p.head_dim)},
      {"k_cache", p.k_cache, pages(p.k_cache_page_stride, p.k_cache_token_stride, p.k_cache_head_stride, p.head_dim)},
      {"v_cache", p.v_cache, pages(p.v_cache_page_stride, p.v_cache_token_stride, p.v_cache_head_stride, p.v_head_dim)},
      scales(p.k_scale),
      scales(p.v_scale)};
}

const AppendKvParams& params_of(void** arguments) {
  return *static_cast<const AppendKvParams*>(arguments[0]);
}

bool add(const char* name, void (*kernel)(AppendKvParams)) {
  return emulated_driver::add_kernel(name, {[kernel](void** arguments) { kernel(params_of(arguments)); },
                                            [](void** arguments) { return regions_of(params_of(arguments)); },
                                            {sizeof(AppendKvParams)}});
}

#define STRING(text) #text
#define NAME(name) STRING(name)
#define ADD(element, stored, kStored) \
  add(NAME(MIXATTN_APPEND_KV_NAME(element, stored)), MIXATTN_APPEND_KV_NAME(element, stored)),
[[maybe_unused]] const bool kAdded[] = {MIXATTN_APPEND_KV_INSTANCES(ADD)};

}  // namespace
