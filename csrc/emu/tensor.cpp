// tensor.cpp: tensor maps, and the boxes that are copied by them while threads go on.

#include "emu/machine.h"

namespace emu {
namespace {

constexpr uint64_t kMark = 0x70616d726f736e74;  // of the maps that are made here
constexpr uintptr_t kMapAlignment = 64;
constexpr uint64_t kElementBytes = 2;
constexpr uint64_t kMostRowBytes = 128;   // of a box, in the 128-byte swizzle
constexpr uint32_t kBoxAlignment = 1024;  // where that swizzle repeats
constexpr uint64_t kMostSize = uint64_t{1} << 32;
constexpr uint64_t kStrideLimit = uint64_t{1} << 40;
constexpr uint32_t kMostBox = 256;

// What lies in the 128 bytes. The address has a word of its own, so that a replayed launch can move it.
struct Encoded {
  uint64_t mark;
  const char* data;
  uint64_t strides[BoxedTensor::kMostDims - 1];  // of the outer dimensions
  uint32_t last[BoxedTensor::kMostDims];         // sizes, less 1
  uint16_t box[BoxedTensor::kMostDims];
  uint16_t num_dims;
};
static_assert(sizeof(Encoded) <= 128, "a map has 128 bytes");

BoxedTensor decode(const void* map, Site site) {
  if (reinterpret_cast<uintptr_t>(map) % kMapAlignment != 0) fail("a tensor map is not a multiple of 64", site);
  Encoded encoded;
  memcpy(&encoded, map, sizeof encoded);
  if (encoded.mark != kMark) fail("there is no tensor map at this address", site);
  BoxedTensor tensor = {encoded.data, encoded.num_dims, {}, {}, {}};
  for (int d = 0; d < tensor.num_dims; ++d) {
    tensor.sizes[d] = uint64_t{encoded.last[d]} + 1;
    tensor.strides[d] = d == 0 ? kElementBytes : encoded.strides[d - 1];
    tensor.box[d] = encoded.box[d];
  }
  return tensor;
}

}  // namespace

const char* encode_map(void* map, const BoxedTensor& tensor) {
  if (reinterpret_cast<uintptr_t>(map) % kMapAlignment != 0) return "the map's address";
  if (tensor.num_dims < 1 || tensor.num_dims > BoxedTensor::kMostDims) return "the number of dimensions";
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0) return "the tensor's address";
  Encoded encoded = {kMark, tensor.data, {}, {}, {}, uint16_t(tensor.num_dims)};
  for (int d = 0; d < tensor.num_dims; ++d) {
    if (tensor.sizes[d] < 1 || tensor.sizes[d] > kMostSize) return "a size";
    if (tensor.box[d] < 1 || tensor.box[d] > kMostBox) return "the box";
    if (d > 0) {
      if (tensor.strides[d] % 16 != 0 || tensor.strides[d] >= kStrideLimit) return "a stride";
      encoded.strides[d - 1] = tensor.strides[d];
    }
    encoded.last[d] = uint32_t(tensor.sizes[d] - 1);
    encoded.box[d] = uint16_t(tensor.box[d]);
  }
  const uint64_t row_bytes = tensor.box[0] * kElementBytes;
  if (row_bytes % 16 != 0 || row_bytes > kMostRowBytes) return "the box's rows";
  memset(map, 0, 128);
  memcpy(map, &encoded, sizeof encoded);
  return nullptr;
}

void check_map(const void* map, Site site) {
  decode(map, site);
}

void load_box(uint32_t to, const void* map, BoxPlace place, uint32_t barrier_address, Site site) {
  sanitizer::Quiet quiet;
  maybe_yield();
  const BoxedTensor tensor = decode(map, site);
  if (tensor.num_dims != 4) fail("load_box: the map has " + std::to_string(tensor.num_dims) + " dimensions", site);
  if (tensor.box[0] * kElementBytes != kMostRowBytes) fail("load_box: only rows of 128 bytes are emulated", site);
  const uint32_t num_rows = tensor.box[1] * tensor.box[2] * tensor.box[3];
  const uint32_t num_bytes = num_rows * uint32_t(kMostRowBytes);
  shared_bytes_at(to, num_bytes, kBoxAlignment, "load_box", site);
  MemoryBarrier& barrier = memory_barrier(barrier_address, "load_box", site);
  check_fenced(barrier_address - kSharedBase, "load_box reports to", site);
  PendingBox box = {current->block, barrier_address - kSharedBase, {}, site, EMU_CALLER, nullptr};
  for (uint32_t row = 0; row < num_rows; ++row) {
    const int64_t outer[] = {int64_t{place.x[1]} + row % tensor.box[1],
                             int64_t{place.x[2]} + row / tensor.box[1] % tensor.box[2],
                             int64_t{place.x[3]} + row / (tensor.box[1] * tensor.box[2])};
    bool is_inside = true;
    int64_t offset = 0;
    for (int d = 0; d < 3; ++d) {
      is_inside = is_inside && outer[d] >= 0 && outer[d] < int64_t(tensor.sizes[d + 1]);
      offset += outer[d] * int64_t(tensor.strides[d + 1]);
    }
    for (uint32_t chunk = 0; chunk < kMostRowBytes / kGranuleBytes; ++chunk) {
      constexpr int kGranuleElements = kGranuleBytes / int(kElementBytes);
      const int64_t x0 = int64_t{place.x[0]} + chunk * kGranuleElements;
      const uint32_t at = to - kSharedBase + row * uint32_t(kMostRowBytes) + ((chunk ^ row % 8) * kGranuleBytes);
      const bool has_part = x0 > -kGranuleElements && x0 < int64_t(tensor.sizes[0]);
      const bool is_whole = x0 >= 0 && x0 + kGranuleElements <= int64_t(tensor.sizes[0]);
      if (is_inside && has_part && !is_whole) fail("load_box: only whole chunks of 16 bytes are emulated", site);
      const char* const source = is_inside && is_whole ? tensor.data + offset + x0 * int64_t(kElementBytes) : nullptr;
      if (source != nullptr) check_global(source, kGranuleBytes, kGranuleBytes, "load_box", site);
      check_fenced(at, "load_box overwrites", site);
      box.pieces.push_back({at, source});
    }
  }
  for (const PendingBox::Piece& piece : box.pieces) {
    char* const granule = current->block->shared.data() + piece.shared_offset;
    memset(granule, 0xff, kGranuleBytes);
    current->block->unfenced_writer[piece.shared_offset / kGranuleBytes] = kBoxUnderWay;
    sanitizer::Loud loud;
    if (piece.source != nullptr) sanitizer::read(piece.source, kGranuleBytes, box.line);
    sanitizer::write(granule, kGranuleBytes, box.line);
  }
  ++barrier.num_boxes;
  ++machine.stats.num_boxes;
  box.agent = std::make_unique<sanitizer::Agent>();
  machine.boxes.push_back(std::move(box));
  maybe_yield();
}

void land_box() {
  std::vector<PendingBox>& boxes = machine.boxes;
  std::swap(boxes[machine.random(uint32_t(boxes.size()))], boxes.back());
  PendingBox box = std::move(boxes.back());
  boxes.pop_back();
  MemoryBarrier& barrier = box.block->memory_barriers.at(box.barrier);
  for (const PendingBox::Piece& piece : box.pieces) {
    char* const to = box.block->shared.data() + piece.shared_offset;
    if (piece.source == nullptr) {
      memset(to, 0, kGranuleBytes);
    } else {
      memcpy(to, piece.source, kGranuleBytes);
    }
    box.block->unfenced_writer[piece.shared_offset / kGranuleBytes] = 0;
  }
  machine.agents.push_back(std::move(box.agent));
  sanitizer::As as(machine.agents.back()->identity());
  for (const PendingBox::Piece& piece : box.pieces) {
    if (piece.source != nullptr) sanitizer::read(piece.source, kGranuleBytes, box.line);
    sanitizer::write(box.block->shared.data() + piece.shared_offset, kGranuleBytes, box.line);
  }
  --barrier.num_boxes;
  barrier.missing_bytes -= int64_t(box.pieces.size() * kGranuleBytes);
  release_phase(barrier);
  end_phase_if_complete(barrier, box.site);
}

}  // namespace emu
