// mixed_attention.cu: what nvcc compiles of the sm_80 kernel: every dtype, head_dim and score function it has.

#include "cuda/sm80/mixed_attention.cuh"

namespace mixattn {
namespace cuda {
namespace sm80 {

#define MIXATTN_INSTANTIATE(T, kHeadDim)                                                                       \
  template __global__ void mixed_attention_kernel<T, kHeadDim, false>(const __grid_constant__ LaunchParams p); \
  template __global__ void mixed_attention_kernel<T, kHeadDim, true>(const __grid_constant__ LaunchParams p);
MIXATTN_INSTANTIATE(mx::bf16, 64)
MIXATTN_INSTANTIATE(mx::bf16, 128)
MIXATTN_INSTANTIATE(mx::f16, 64)
MIXATTN_INSTANTIATE(mx::f16, 128)
#undef MIXATTN_INSTANTIATE

}  // namespace sm80
}  // namespace cuda
}  // namespace mixattn
