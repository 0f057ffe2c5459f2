// primitives.cpp: the kernels of primitives.cuh for Python, emulated.

#include "primitives.cuh"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

#include "primitives_sm90.cuh"

namespace py = pybind11;
using Words = py::array_t<uint32_t, py::array::c_style>;

namespace {

using Kernel = std::function<void(uint32_t*, uint32_t*)>;

const std::map<std::string, Kernel>& kernels() {
  using namespace primitives;
  static const std::map<std::string, Kernel> all = {
      {"ldmatrix", ldmatrix<false>},
      {"ldmatrix_trans", ldmatrix<true>},
      {"mma_f16", mma<f16>},
      {"mma_bf16", mma<bf16>},
      {"shuffle_xor", shuffle_xor},
      {"shuffle_idx", shuffle_idx},
      {"any_lane", any_lane},
      {"copy", copy<true>},
      {"copy_unwaited", copy<false>},
      {"copy_groups", copy_groups},
      {"neighbour_unsynced", neighbour<0>},
      {"neighbour_sync_threads", neighbour<1>},
      {"neighbour_bar_sync", neighbour<2>},
      {"neighbour_sync_warp", neighbour<3>},
      {"arrive", primitives::arrive},
      {"lanes", lanes<true>},
      {"lanes_unsynced", lanes<false>},
      {"message_unfenced", message<0>},
      {"message", message<1>},
      {"message_fenced_too_early", message<2>},
      {"store_widths", store_widths},
      {"functions", functions},
      {"pack_f16", pack<f16>},
      {"pack_bf16", pack<bf16>},
      {"banks_4", banks<4>},
      {"banks_8", banks<8>},
      {"banks_16", banks<16>},
      {"banks_ldmatrix", banks<32>},
      {"block_size", block_size},
      {"move_vectors", move_vectors},
      {"unpack_f16", unpack<f16>},
      {"unpack_bf16", unpack<bf16>},
      {"rounded", rounded},
      {"shared_vectors", shared_vectors},
      {"permute_bytes", permute_bytes},
      {"fma_pairs", fma_pairs},
      {"divergent", divergent},
      {"deadlock", deadlock},
      {"barrier_counts", barrier_counts},
      {"bad_access", bad_access},
      {"wgmma_64_f16", wgmma_product<64, 0, true, f16>},
      {"wgmma_128_bf16", wgmma_product<128, 3, false, bf16>},
      {"wgmma_registers_96_f16", wgmma_from_registers<96, 1, f16>},
      {"wgmma_registers_128_bf16", wgmma_from_registers<128, 7, bf16>},
      {"mbarrier", primitives::mbarrier<true>},
      {"mbarrier_unwaited", primitives::mbarrier<false>},
      {"registers", registers},
      {"wgmma_unfenced_memory", bad_wgmma<0>},
      {"wgmma_unfenced_registers", bad_wgmma<1>},
      {"wgmma_misaligned", bad_wgmma<2>},
      {"wgmma_read_early", bad_wgmma<3>},
      {"wgmma_overwritten_early", bad_wgmma<4>},
      {"wgmma_not_waited_for", bad_wgmma<5>},
      {"barrier_not_there", barrier_not_there},
      {"too_many_registers", too_many_registers},
  };
  return all;
}

using BoxedKernel = std::function<void(const mx::TensorMap&, uint32_t*, uint32_t*)>;

const std::map<std::string, BoxedKernel>& boxed_kernels() {
  using namespace primitives;
  static const std::map<std::string, BoxedKernel> all = {
      {"box_16", box<16, BoxFault::kNone>},
      {"box_64", box<64, BoxFault::kNone>},
      {"box_not_waited_for", box<16, BoxFault::kNotWaitedFor>},
      {"box_too_few_bytes", box<16, BoxFault::kTooFewBytes>},
      {"box_too_many_bytes", box<16, BoxFault::kTooManyBytes>},
      {"box_no_bytes", box<16, BoxFault::kNoBytes>},
      {"box_misaligned", box<16, BoxFault::kMisaligned>},
      {"box_barrier_not_fenced", box<16, BoxFault::kBarrierNotFenced>},
      {"box_place_not_fenced", box<16, BoxFault::kPlaceNotFenced>},
      {"box_read_by_wgmma", box<64, BoxFault::kReadByWgmma>},
      {"box_never_waited_for", box<16, BoxFault::kNeverWaitedFor>},
  };
  return all;
}

// Sizes, strides of the outer dimensions in bytes, and the box, the innermost dimension first.
struct Boxes {
  std::vector<uint64_t> sizes, strides;
  std::vector<uint32_t> box;
};

// Throws std::invalid_argument with what the driver would refuse it for.
mx::TensorMap encode(const char* data, const Boxes& boxes) {
  emu::BoxedTensor tensor = {data, int(boxes.sizes.size()), {}, {}, {}};
  std::copy(boxes.sizes.begin(), boxes.sizes.end(), tensor.sizes);
  std::copy(boxes.strides.begin(), boxes.strides.end(), tensor.strides + 1);
  std::copy(boxes.box.begin(), boxes.box.end(), tensor.box);
  mx::TensorMap map;
  const char* const refused = emu::encode_map(&map, tensor);
  if (refused != nullptr) throw std::invalid_argument(refused);
  return map;
}

// Those of boxed_kernels(), over a tensor of in. Returns how many boxes were loaded.
uint64_t run_boxed(const std::string& kernel, Words in, Words out, std::vector<uint64_t> sizes,
                   std::vector<uint64_t> strides, std::vector<uint32_t> box, int num_threads, uint64_t seed,
                   size_t shared_bytes) {
  const BoxedKernel& body = boxed_kernels().at(kernel);
  const std::vector<emu::Region> regions = {{"in", in.data(), size_t(in.nbytes())},
                                            {"out", out.data(), size_t(out.nbytes())}};
  uint32_t* const in_words = in.mutable_data();
  uint32_t* const out_words = out.mutable_data();
  const mx::TensorMap map = encode(reinterpret_cast<const char*>(in_words + 16), {sizes, strides, box});
  return emu::launch(emu::config_of_seed(seed), 1, num_threads, shared_bytes, regions,
                     [&] { body(map, in_words, out_words); })
      .num_boxes;
}

// Runs the kernel on in and out, both written in place; returns (wavefronts, conflicts).
std::pair<uint64_t, uint64_t> run(const std::string& kernel, Words in, Words out, int num_blocks, int num_threads,
                                  uint64_t seed, size_t shared_bytes) {
  const Kernel& body = kernels().at(kernel);
  const std::vector<emu::Region> regions = {{"in", in.data(), size_t(in.nbytes())},
                                            {"out", out.data(), size_t(out.nbytes())}};
  uint32_t* const in_words = in.mutable_data();
  uint32_t* const out_words = out.mutable_data();
  const emu::Stats stats = emu::launch(emu::config_of_seed(seed), num_blocks, num_threads, shared_bytes, regions,
                                       [&] { body(in_words, out_words); });
  uint64_t num_conflicts = 0;
  for (const auto& [line, count] : stats.conflicts) num_conflicts += count;
  return {stats.num_wavefronts, num_conflicts};
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  m.def("run", &run);
  m.def("run_boxed", &run_boxed);
  m.def("encode",
        [](uint64_t data, std::vector<uint64_t> sizes, std::vector<uint64_t> strides, std::vector<uint32_t> box) {
          encode(reinterpret_cast<const char*>(data), {sizes, strides, box});
        });
}
