// cuda.cpp: the CUDA kernels for Python: the driver, images, launches. Addresses and streams are integers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/append_kv_call.h"
#include "bindings/attention_call.h"
#include "bindings/merge_states_call.h"
#include "common/checks.h"
#include "cuda/append_kv.cuh"
#include "cuda/image.h"
#include "cuda/instances.h"
#include "cuda/merge_states.cuh"
#include "cuda/plan.cuh"
#include "cuda/sm90/key_maps.h"

namespace py = pybind11;

namespace {

using mixattn::at;
using mixattn::AttentionParams;
using mixattn::PlanHeader;
using mixattn::PlanSpec;
using mixattn::cuda::BoxedTensor;
using mixattn::cuda::DeviceDescription;
using mixattn::cuda::Driver;
using mixattn::cuda::Image;
using mixattn::cuda::Instance;
using mixattn::cuda::Kernel;
using mixattn::cuda::Launch;
using mixattn::cuda::LaunchParams;
using mixattn::cuda::StreamHandle;
using mixattn::cuda::sm90::KeyMaps;

py::dict describe(const Kernel& kernel) {
  py::dict result;
  result["name"] = kernel.name;
  result["image"] = kernel.image;
  result["num_threads"] = kernel.num_threads;
  result["shared_bytes"] = kernel.shared_bytes;
  return result;
}

py::dict describe(const Instance& instance) {
  py::dict result = describe(Kernel{instance.name, instance.image, instance.num_threads, instance.shared_bytes});
  result["workers_per_sm"] = instance.workers_per_sm;
  result["separates_small"] = instance.separates_small;
  return result;
}

py::list cuda_instances() {
  py::list all;
  for (const Instance& instance : mixattn::cuda::instances()) all.append(describe(instance));
  for (const Kernel& kernel : mixattn::cuda::other_kernels()) all.append(describe(kernel));
  return all;
}

py::list devices(const Driver& driver) {
  py::list all;
  for (const DeviceDescription& device : driver.devices()) {
    py::dict one;
    one["name"] = device.name;
    one["capability"] = py::make_tuple(device.capability / 10, device.capability % 10);
    one["num_sms"] = device.num_sms;
    one["shared_bytes_per_block"] = device.shared_bytes_per_block;
    all.append(one);
  }
  return all;
}

void launch(const Image& image, const Launch& launch, uintptr_t stream, void** arguments) {
  const py::gil_scoped_release unlocked;
  image.launch(launch, reinterpret_cast<StreamHandle>(stream), arguments);
}

py::dict cuda_instance(const AttentionParams& p, std::pair<int, int> capability, bool has_small_apart) {
  mixattn::cuda::check_call(p);
  return describe(mixattn::cuda::instance_for(p, 10 * capability.first + capability.second, has_small_apart));
}

// The maps of a call's K and V; none where its pages or the driver allow none.
KeyMaps make_key_maps(const AttentionParams& p, const Image& image) {
  namespace sm90 = mixattn::cuda::sm90;
  KeyMaps maps = {{}, {}, image.has_maps() ? sm90::box_slots(p) : 0};
  if (maps.box_slots == 0) return maps;
  const auto encode = [&](const void* data, int64_t head_stride, int64_t token_stride, int64_t page_stride,
                          mx::TensorMap& map) {
    image.encode_map({data,
                      {p.head_dim, p.num_kv_heads, p.page_size, p.num_pages},
                      {head_stride, token_stride, page_stride},
                      {sm90::kPanelColumns, 1, maps.box_slots, 1}},
                     &map);
  };
  encode(p.k_cache, p.k_head_stride, p.k_token_stride, p.k_page_stride, maps.k);
  encode(p.v_cache, p.v_head_stride, p.v_token_stride, p.v_page_stride, maps.v);
  return maps;
}

// p.plan is on the host, or nullptr; device_plan has the same words where the kernel reads them.
void cuda_attention(AttentionParams p, Image& image, uintptr_t device_plan, bool has_small_apart, int64_t num_sms,
                    uintptr_t stream) {
  mixattn::cuda::check_call(p);
  if (p.plan != nullptr) mixattn::cuda::check_workspace(p, *reinterpret_cast<const PlanHeader*>(p.plan));
  mixattn::check_range("num_sms", num_sms, 1, image.num_sms());
  const Instance& instance = mixattn::cuda::instance_for(p, image.capability(), has_small_apart);
  Launch prepared = image.prepare(instance.name, instance.num_threads, instance.shared_bytes);
  prepared.num_blocks = prepared.num_blocks / image.num_sms() * static_cast<int>(num_sms);
  p.plan = at<const int32_t>(device_plan);
  LaunchParams params = mixattn::cuda::make_launch_params(p);
  KeyMaps maps = instance.has_maps ? make_key_maps(p, image) : KeyMaps{};
  void* arguments[] = {&params, &maps};  // kernels without maps have one parameter: the second is not looked at
  launch(image, prepared, stream, arguments);
}

// Of one block, whatever the batch. Addresses are of device memory.
void cuda_plan(const PlanSpec& spec, Image& image, uintptr_t cu_seqlens_q, uintptr_t seq_lens, int64_t num_seqs,
               uintptr_t block_table, int64_t block_table_stride, int64_t page_size, uintptr_t out, uintptr_t scratch,
               int64_t capacity_items, int64_t capacity_merges, int64_t capacity_partial_rows, int num_threads,
               uintptr_t stream) {
  const Kernel& kernel = mixattn::cuda::plan_kernel();
  mixattn::check_range("num_seqs", num_seqs, 0, INT32_MAX - 1);
  mixattn::check_range("capacity_items", capacity_items, 0, INT32_MAX / mixattn::kWorkItemWords);
  mixattn::check_range("capacity_merges", capacity_merges, 0, INT32_MAX / mixattn::kMergeWords);
  mixattn::check_range("capacity_partial_rows", capacity_partial_rows, 0, INT32_MAX);
  mixattn::check_range("num_threads", num_threads, mx::kWarpSize, kernel.num_threads);
  mixattn::check_range("page_size", page_size, block_table == 0 ? 0 : 1, INT32_MAX);
  mixattn::cuda::PlanLaunch params = {
      spec,
      at<const int32_t>(cu_seqlens_q),
      at<const int32_t>(seq_lens),
      {at<const int32_t>(block_table), block_table_stride, static_cast<int32_t>(page_size)},
      at<int32_t>(out),
      at<int64_t>(scratch),
      static_cast<int32_t>(num_seqs),
      static_cast<int32_t>(capacity_items),
      static_cast<int32_t>(capacity_merges),
      static_cast<int32_t>(capacity_partial_rows)};
  Launch prepared = image.prepare(kernel.name, kernel.num_threads, kernel.shared_bytes);
  prepared.num_blocks = 1;
  prepared.num_threads = num_threads;
  void* arguments[] = {&params};
  launch(image, prepared, stream, arguments);
}

// One launch over num_rows rows of up to head_dim, each of some lanes.
template <class Params>
void launch_rows(Params p, const Kernel& kernel, int64_t num_rows, int64_t head_dim, Image& image, uintptr_t stream) {
  const int64_t rows_per_block = kernel.num_threads / mixattn::cuda::lanes_per_row(head_dim);
  const int64_t num_blocks = (num_rows + rows_per_block - 1) / rows_per_block;
  mixattn::check_range("blocks of this call", num_blocks, 1, INT32_MAX);
  Launch prepared = image.prepare(kernel.name, kernel.num_threads, kernel.shared_bytes);
  prepared.num_blocks = static_cast<int>(num_blocks);
  void* arguments[] = {&p};
  launch(image, prepared, stream, arguments);
}

void cuda_append_kv(const mixattn::AppendKvParams& p, Image& image, uintptr_t stream) {
  launch_rows(p, mixattn::cuda::append_kv_kernel(p), p.num_tokens * (2 * p.num_kv_heads + p.num_q_heads),
              mixattn::cuda::widest_head(p), image, stream);
}

void cuda_merge_states(const mixattn::MergeStatesParams& p, Image& image, uintptr_t stream) {
  launch_rows(p, mixattn::cuda::merge_states_kernel(p), p.num_tokens * p.num_heads, p.head_dim, image, stream);
}

// A tensor of BoxedTensor's dimensions: address, sizes, strides, box.
using BoxedArgument = std::tuple<uintptr_t, std::array<int64_t, 4>, std::array<int64_t, 3>, std::array<int32_t, 4>>;

// A kernel of a tensor map, if there is one, and pointers, with a grid of its own: for bench/static/selftest_device.py.
void launch_pointers(Image& image, const std::string& kernel, int num_blocks, int num_threads, int shared_bytes,
                     std::vector<uintptr_t> pointers, const std::optional<BoxedArgument>& boxed, uintptr_t stream) {
  Launch prepared = image.prepare(kernel, num_threads, shared_bytes);
  prepared.num_blocks = num_blocks;
  std::vector<void*> arguments;
  mx::TensorMap map;
  if (boxed) {
    const auto& [data, sizes, strides, box] = *boxed;
    BoxedTensor tensor = {at<const void>(data), {}, {}, {}};
    std::copy(sizes.begin(), sizes.end(), tensor.sizes);
    std::copy(strides.begin(), strides.end(), tensor.strides);
    std::copy(box.begin(), box.end(), tensor.box);
    image.encode_map(tensor, &map);
    arguments.push_back(&map);
  }
  for (uintptr_t& pointer : pointers) arguments.push_back(&pointer);
  launch(image, prepared, stream, arguments.data());
}

}  // namespace

void bind_cuda(py::module_& m) {
  using py::arg;
  // Valid calls that no kernel takes; in this module nothing else throws it.
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::domain_error& error) {
      PyErr_SetString(PyExc_NotImplementedError, error.what());
    }
  });
  py::class_<Driver>(m, "CudaDriver", "NVIDIA's driver, or what stands in for it, opened from a shared library.")
      .def(py::init<const std::string&>(), arg("path"))
      .def_property_readonly("version", &Driver::version)
      .def_property_readonly("is_emulation", &Driver::is_emulation)
      .def("devices", &devices);
  py::class_<Image>(m, "CudaImage", "The kernels of a fatbin on one device.")
      .def(py::init([](const Driver& driver, int device_idx, const py::bytes& data) {
             return new Image(driver, device_idx, data);
           }),
           py::keep_alive<1, 2>(), arg("driver"), arg("device_idx"), arg("data"))
      .def(
          "num_blocks",
          [](Image& image, const std::string& kernel, int num_threads, int shared_bytes) {
            return image.prepare(kernel, num_threads, shared_bytes).num_blocks;
          },
          py::kw_only(), arg("kernel"), arg("num_threads"), arg("shared_bytes"))
      .def("launch_pointers", &launch_pointers, py::kw_only(), arg("kernel"), arg("num_blocks"), arg("num_threads"),
           arg("shared_bytes"), arg("pointers"), arg("boxed") = py::none(), arg("stream"));
  m.def("cuda_instances", &cuda_instances, "Every kernel that is compiled for GPUs.");
  m.def("cuda_plan_kernel", [] { return describe(mixattn::cuda::plan_kernel()); });
  m.def("cuda_plan_scratch_words", &mixattn::cuda::plan_scratch_words, arg("spec"), arg("num_seqs"),
        arg("capacity_items"), "int64 words of scratch that cuda_plan needs.");
  m.def("cuda_plan", &cuda_plan, py::kw_only(), arg("spec"), arg("image"), arg("cu_seqlens_q"), arg("seq_lens"),
        arg("num_seqs"), arg("block_table"), arg("block_table_stride"), arg("page_size"), arg("out"), arg("scratch"),
        arg("capacity_items"), arg("capacity_merges"), arg("capacity_partial_rows"), arg("num_threads"), arg("stream"),
        "Puts the planner on a stream, to write the plan of a batch to out, on the device. Why a batch has no plan is "
        "in\n"
        "the header.");
  mixattn::def_append_kv<>(
      m, "cuda_append_kv_kernel",
      [](const mixattn::AppendKvParams& p) { return describe(mixattn::cuda::append_kv_kernel(p)); },
      "The kernel of a call. NotImplementedError names the nearest call that has one. What addresses hold is not "
      "read.");
  mixattn::def_append_kv<Image&, uintptr_t>(m, "cuda_append_kv", &cuda_append_kv, arg("image"), arg("stream"),
                                            "Stores rows of K (rotated) and V in their slots and rotates q, put on a "
                                            "stream. Slots and positions are not looked at.");
  mixattn::def_merge_states<>(
      m, "cuda_merge_states_kernel",
      [](const mixattn::MergeStatesParams& p) { return describe(mixattn::cuda::merge_states_kernel(p)); },
      "The kernel of a call. NotImplementedError names the nearest call that has one. What addresses hold is not "
      "read.");
  mixattn::def_merge_states<Image&, uintptr_t>(
      m, "cuda_merge_states", &cuda_merge_states, arg("image"), arg("stream"),
      "Attention over a union of disjoint key sets, from the result over each, put on a stream.");
  mixattn::def_attention<std::pair<int, int>, bool>(
      m, "cuda_instance", &cuda_instance, arg("capability"), arg("has_small_apart"),
      "The kernel of a call. NotImplementedError names the nearest call that has one. Addresses are not read.");
  mixattn::def_attention<Image&, uintptr_t, bool, int64_t, uintptr_t>(
      m, "cuda_attention", &cuda_attention, arg("image"), arg("device_plan"), arg("has_small_apart"), arg("num_sms"),
      arg("stream"),
      "Paged attention of a batch by its plan, put on a stream, in the blocks that num_sms of the device's SMs hold "
      "at\n"
      "once. Nothing is allocated or waited for.");
}
