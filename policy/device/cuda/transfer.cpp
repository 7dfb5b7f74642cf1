#include "policy/device/transfer.h"

#include <cuda_runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <filesystem>
#include <mutex>
#include <thread>
#include <unordered_set>
#include <vector>

#include "base/file.h"
#include "kernels/device/runtime.h"
#include "policy/weights/safetensors_set.h"

namespace perigee::policy {
namespace {

using namespace kernels;
using Clock = std::chrono::steady_clock;

constexpr int64_t kSlotBytes = int64_t{8} << 20;
constexpr int kMostThreads = 8;  // that read: 34 GB/s out of the page cache into an H200, and 29 with 16 (8.5 with one)

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// A pinned buffer, as much device memory, and the event after which both are free again.
class Slot {
 public:
  Slot(Device& device, std::byte* device_memory) : device_(device), memory_(device_memory), host_(kSlotBytes) {
    PERIGEE_CUDA(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming));
  }
  ~Slot() { cudaEventDestroy(done_); }
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;

  std::byte* host() const { return host_.data(); }
  std::byte* memory() const { return memory_; }
  void record() { PERIGEE_CUDA(cudaEventRecord(done_, device_.stream())); }
  void wait() { PERIGEE_CUDA(cudaEventSynchronize(done_)); }

 private:
  Device& device_;
  std::byte* memory_;
  PinnedMemory host_;
  cudaEvent_t done_ = nullptr;
};

// Device memory for the slots, given back at the end.
class SlotMemory {
 public:
  SlotMemory(Device& device, int64_t bytes) : device_(device), data_(static_cast<std::byte*>(device.allocate(bytes))) {}
  ~SlotMemory() { cudaFree(data_); }
  SlotMemory(const SlotMemory&) = delete;
  SlotMemory& operator=(const SlotMemory&) = delete;
  std::byte* data() const { return data_; }

 private:
  Device& device_;
  std::byte* data_;
};

device::FileType file_type(TensorType t) {
  if (t == TensorType::kBf16) return device::FileType::kBf16;
  return t == TensorType::kF16 ? device::FileType::kF16 : device::FileType::kF32;
}

// Asks the kernel to read ahead; what it does with it is its business.
void will_need(const std::byte* data, int64_t bytes) {
  static const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
  ::madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes) - begin,
            MADV_WILLNEED);
}

struct Piece {
  size_t tensor;
  int64_t begin, count;  // elements
};

struct Loader {
  Device& device;
  std::vector<const TensorView*> views;
  std::vector<device::Placement> placements;
  std::vector<Piece> pieces;
  unsigned long long* bad = nullptr;  // device, one for each tensor
  std::atomic<size_t> next{0};
  std::mutex launching;
  std::exception_ptr failure;
  int ordinal = 0;

  void read(Slot& a, Slot& b) {
    try {
      PERIGEE_CUDA(cudaSetDevice(ordinal));
      Slot* slots[2] = {&a, &b};
      for (int turn = 0;; turn ^= 1) {
        const size_t i = next.fetch_add(1);
        if (i >= pieces.size()) return;
        Slot& slot = *slots[turn];
        slot.wait();
        const Piece& p = pieces[i];
        const TensorView& view = *views[p.tensor];
        const int64_t size = tensor_type_bytes(view.type);
        const std::byte* from = view.data + p.begin * size;
        will_need(from, p.count * size);
        std::memcpy(slot.host(), from, static_cast<size_t>(p.count * size));
        const std::lock_guard lock(launching);
        if (failure) return;
        device.copy_in(slot.memory(), slot.host(), p.count * size);
        device::scatter(device, placements[p.tensor], p.begin, p.count, slot.memory(), file_type(view.type), bad + p.tensor);
        slot.record();
      }
    } catch (...) {
      const std::lock_guard lock(launching);
      if (!failure) failure = std::current_exception();
      next = pieces.size();
    }
  }
};

}  // namespace

namespace device {

Placement placement_of(const ParamLayout& layout, const CheckpointTensor& t, std::byte* weights) {
  const ParamSpec& spec = layout.tensor(t.tensor);
  Placement p;
  p.first = weights + spec.byte_offset;
  p.k = spec.k;
  p.row_offset = t.row_offset;
  p.form = spec.form;
  p.narrow = spec.in_dtype() && layout.dtype() == Dtype::kBf16;
  if (t.piece == CheckpointTensor::Piece::kKvB) {
    const ModelConfig& c = layout.config();
    const ParamSpec& value = layout.tensor(t.tensor2);
    p.second = weights + value.byte_offset;
    p.k = c.kv_lora_rank;
    p.nope = c.qk_nope_head_dim;
    p.v = c.v_head_dim;
    if (c.num_heads > 1) {
      p.first_stride = layout.tensor(t.tensor + 1).byte_offset - spec.byte_offset;
      p.second_stride = layout.tensor(t.tensor2 + 1).byte_offset - value.byte_offset;
    }
  }
  return p;
}

}  // namespace device

Transfer device_load(Device& device, const ParamLayout& layout, const std::string& directory, std::byte* weights,
                     int threads) {
  const auto start = Clock::now();
  const SafetensorsSet set(directory);
  std::unordered_set<std::string> known;
  for (const CheckpointTensor& t : layout.checkpoint()) known.insert(t.name);
  for (const TensorView* t : set.tensors())
    if (!known.contains(t->name))
      throw_input("{}: tensor {} is not part of the architecture in {}/config.json", t->file, t->name, directory);

  Loader loader{device};
  Transfer done;
  PERIGEE_CUDA(cudaGetDevice(&loader.ordinal));
  for (const CheckpointTensor& t : layout.checkpoint()) {
    const TensorView& view = set.need(t.name, t.shape);
    const int64_t most = kSlotBytes / tensor_type_bytes(view.type);
    for (int64_t begin = 0; begin < view.elements; begin += most)
      loader.pieces.push_back({loader.views.size(), begin, std::min(most, view.elements - begin)});
    loader.views.push_back(&view);
    loader.placements.push_back(device::placement_of(layout, t, weights));
    done.bytes += view.bytes();
  }
  // In the order of the files, so that the disk reads forward.
  std::stable_sort(loader.pieces.begin(), loader.pieces.end(), [&](const Piece& a, const Piece& b) {
    const TensorView &x = *loader.views[a.tensor], &y = *loader.views[b.tensor];
    if (x.file != y.file) return x.file < y.file;
    return x.data != y.data ? x.data < y.data : a.begin < b.begin;
  });

  const auto tensors = static_cast<int64_t>(loader.views.size());
  if (threads <= 0) threads = std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 2, kMostThreads);
  const SlotMemory memory(device, 2 * threads * kSlotBytes + tensors * 8);
  loader.bad = reinterpret_cast<unsigned long long*>(memory.data() + 2 * threads * kSlotBytes);
  PERIGEE_CUDA(cudaMemsetAsync(loader.bad, 0xff, static_cast<size_t>(tensors) * 8, device.stream()));
  device.zero(weights, layout.weight_bytes());  // padding, and the gaps between tensors
  std::vector<std::unique_ptr<Slot>> slots;
  for (int i = 0; i < 2 * threads; ++i) slots.push_back(std::make_unique<Slot>(device, memory.data() + i * kSlotBytes));
  {
    std::vector<std::jthread> readers;
    for (int i = 0; i < threads; ++i)
      readers.emplace_back([&loader, &slots, i] {
        loader.read(*slots[static_cast<size_t>(2 * i)], *slots[static_cast<size_t>(2 * i + 1)]);
      });
  }
  if (loader.failure) std::rethrow_exception(loader.failure);
  std::vector<unsigned long long> bad(static_cast<size_t>(tensors));
  device.copy_out(bad.data(), loader.bad, tensors * 8);
  for (size_t i = 0; i < bad.size(); ++i) {
    if (bad[i] == ~0ull) continue;
    const auto at = static_cast<int64_t>(bad[i]);
    float value = 0;
    to_float32(*loader.views[i], at, 1, &value);
    throw_input("{}: tensor {} holds {} at element {}", loader.views[i]->file, loader.views[i]->name,
                std::isnan(value) ? "NaN" : "infinity", at);
  }
  done.seconds = seconds_since(start);
  return done;
}

Transfer device_save(Device& device, const ParamLayout& layout, const std::byte* weights, const std::string& directory,
                     Dtype dtype, int64_t max_shard_bytes) {
  namespace fs = std::filesystem;
  const auto start = Clock::now();
  make_directories(directory);
  std::vector<TensorSpec> specs;
  std::vector<device::Placement> placements;
  std::vector<Piece> pieces;
  for (const CheckpointTensor& t : layout.checkpoint()) {
    specs.push_back({t.name, t.f32_in_file ? TensorType::kF32 : tensor_type_of(dtype), t.shape});
    placements.push_back(device::placement_of(layout, t, const_cast<std::byte*>(weights)));
    const int64_t most = kSlotBytes / tensor_type_bytes(specs.back().type);
    for (int64_t begin = 0; begin < specs.back().elements(); begin += most)
      pieces.push_back({specs.size() - 1, begin, std::min(most, specs.back().elements() - begin)});
  }
  SafetensorsSetWriter writer(directory, specs, max_shard_bytes, {{"format", "pt"}});
  constexpr size_t kAhead = 4;  // pieces on their way while one is written
  const SlotMemory memory(device, kAhead * kSlotBytes);
  std::vector<std::unique_ptr<Slot>> slots;
  for (size_t i = 0; i < kAhead; ++i)
    slots.push_back(std::make_unique<Slot>(device, memory.data() + static_cast<int64_t>(i) * kSlotBytes));
  const auto bytes_of = [&](const Piece& p) { return p.count * tensor_type_bytes(specs[p.tensor].type); };
  const auto fetch = [&](size_t i) {
    const Piece& p = pieces[i];
    Slot& slot = *slots[i % kAhead];
    device::gather(device, placements[p.tensor], p.begin, p.count, slot.memory(), file_type(specs[p.tensor].type));
    PERIGEE_CUDA(cudaMemcpyAsync(slot.host(), slot.memory(), static_cast<size_t>(bytes_of(p)), cudaMemcpyDeviceToHost,
                                 device.stream()));
    slot.record();
  };
  Transfer done;
  for (size_t i = 0; i < std::min(kAhead, pieces.size()); ++i) fetch(i);
  for (size_t i = 0; i < pieces.size(); ++i) {
    Slot& slot = *slots[i % kAhead];
    slot.wait();
    writer.write(slot.host(), bytes_of(pieces[i]));
    done.bytes += bytes_of(pieces[i]);
    if (i + kAhead < pieces.size()) fetch(i + kAhead);
  }
  writer.commit();
  ModelConfig config = layout.config();
  config.dtype = dtype;
  write_file_atomic((fs::path(directory) / "config.json").string(), to_json(config).dump(1) + "\n");
  done.seconds = seconds_since(start);
  return done;
}

}  // namespace perigee::policy
