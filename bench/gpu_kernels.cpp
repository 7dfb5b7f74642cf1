// KDA and latent attention of one layer of the 48B model on a GPU: 32 heads, bf16; and the general transition that KDA is a
// case of, on the same inputs.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/random.h"
#include "bench/gpu.h"
#include "kernels/dplr/dplr_device.h"
#include "kernels/gemm/gemm.h"
#include "kernels/kda/kda_device.h"
#include "kernels/mla/mla_device.h"

namespace perigee::bench {

using namespace kernels;

namespace {

constexpr KdaShape kKda{32, 128, 128};
constexpr int64_t kWidth = kKda.heads * kKda.dk;
constexpr int64_t kPeriod = 512;  // rows of different inputs; further ones repeat them

bf16 narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>((bits + 0x8000) >> 16)};
}

float symmetric(Random& random) {
  return 2 * random.next_float() - 1;
}

std::vector<bf16> random_bf16(int64_t n, uint64_t seed) {
  Random random(seed);
  std::vector<bf16> values(static_cast<size_t>(n));
  for (bf16& v : values) v = narrow(symmetric(random));
  return values;
}

// Rows of heads of length `length` each.
std::vector<bf16> random_directions(int64_t rows, float length, uint64_t seed) {
  Random random(seed);
  std::vector<bf16> values;
  std::vector<float> head(static_cast<size_t>(kKda.dk));
  for (int64_t i = 0; i < rows * kKda.heads; ++i) {
    double sum = 0;
    for (float& x : head) {
      x = symmetric(random);
      sum += static_cast<double>(x) * static_cast<double>(x);
    }
    for (const float x : head) values.push_back(narrow(x * length / static_cast<float>(std::sqrt(sum))));
  }
  return values;
}

struct KdaInputs {
  bf16 *q, *k, *v;
  float *g, *beta;

  KdaInputs(Arrays& arrays, int64_t rows) {
    const int64_t period = std::min(rows, kPeriod);
    q = arrays.repeat(random_directions(period, 1 / std::sqrt(static_cast<float>(kKda.dk)), 1),
                      rows * kWidth);
    k = arrays.repeat(random_directions(period, 1, 2), rows * kWidth);
    v = arrays.repeat(random_bf16(period * kWidth, 3), rows * kWidth);
    Random random(4);
    std::vector<float> decay(static_cast<size_t>(period * kWidth)),
        step(static_cast<size_t>(period * kKda.heads));
    for (float& x : decay) x = -random.next_float() * random.next_float();
    for (float& x : step) x = random.next_float();
    g = arrays.repeat(decay, rows * kWidth);
    beta = arrays.repeat(step, rows * kKda.heads);
  }
};

DeviceBatch one_sequence(Arrays& arrays, int64_t rows) {
  DeviceBatch batch;
  batch.rows = batch.max_count = static_cast<int32_t>(rows);
  batch.slices = 1;
  batch.slice = arrays.upload<DeviceSlice>({{0, static_cast<int32_t>(rows), 0, 0}});
  return batch;
}

void kda_forward_figure(Rig& rig, Device& device, double copy, int64_t rows, double target_ms) {
  const std::string name = fmt::format("gpu-kda-forward-{}", rows);
  if (!rig.wants(name)) return;
  Arrays arrays(device);
  const KdaInputs in(arrays, rows);
  bf16* out = arrays.take<bf16>(rows * kWidth);
  std::byte* state = arrays.take<std::byte>(kda_state_bytes<bf16>(kKda));
  device.zero(state, kda_state_bytes<bf16>(kKda));
  DeviceBatch batch = one_sequence(arrays, rows);
  batch.recurrent = arrays.upload<std::byte*>({state});
  const std::vector<double> seconds = replays(device, rows > 65536 ? 1 : 3, 20, [&](int64_t) {
    kda_forward<bf16>(device, kKda, in.q, in.k, in.v, in.g, in.beta, batch, 0, out);
  });
  // q, k, v, out in 2 bytes, g in 4.
  rig.report(time_figure(name, "ms", Bound::kMemory,
                         static_cast<double>(rows) * (12.0 * kWidth + 4 * kKda.heads), copy, target_ms,
                         seconds, fmt::format("one sequence of {} tokens, unbounded gate", rows)));
}

void kda_both_figure(Rig& rig, Device& device, double copy, int64_t rows, double target_ms) {
  const std::string name = fmt::format("gpu-kda-backward-{}", rows);
  if (!rig.wants(name)) return;
  Arrays arrays(device);
  const KdaInputs in(arrays, rows);
  const int64_t n = rows * kWidth;
  bf16 *out = arrays.take<bf16>(n), *dq = arrays.take<bf16>(n), *dk = arrays.take<bf16>(n),
       *dv = arrays.take<bf16>(n);
  bf16* dout = arrays.repeat(random_bf16(kPeriod * kWidth, 5), n);
  bf16* states = arrays.take<bf16>(kda_chunk_slots(rows, 1) * kKda.heads * kKda.dk * kKda.dv);
  float *dg = arrays.take<float>(n), *dbeta = arrays.take<float>(rows * kKda.heads);
  const DeviceBatch batch = one_sequence(arrays, rows);
  const std::vector<double> seconds = replays(device, 1, 20, [&](int64_t) {
    kda_forward<bf16>(device, kKda, in.q, in.k, in.v, in.g, in.beta, batch, 0, out, states);
    kda_backward<bf16>(device, kKda, in.q, in.k, in.v, in.g, in.beta, states, batch, dout, dq, dk, dv, dg,
                       dbeta);
  });
  // Forward as above; backward reads q, k, v, dout, g and writes dq, dk, dv, dg: 12 and 10 bytes.
  rig.report(time_figure(name, "ms", Bound::kMemory,
                         static_cast<double>(rows) * (34.0 * kWidth + 12 * kKda.heads), copy, target_ms,
                         seconds, fmt::format("forward and backward of one sequence of {} tokens", rows)));
}

void kda_decode_figure(Rig& rig, Device& device, double copy, int64_t sequences, double target_us) {
  const std::string name = fmt::format("gpu-kda-decode-{}", sequences);
  if (!rig.wants(name)) return;
  constexpr int64_t kSets = 2,
                    kSteps = 2 * kKdaChunk;  // of states, in turn, so that none is in the L2 when wanted
  Arrays arrays(device);
  const KdaInputs in(arrays, sequences);
  bf16* out = arrays.take<bf16>(sequences * kWidth);
  const int64_t bytes = kda_state_bytes<bf16>(kKda);
  std::byte* states = arrays.take<std::byte>(kSets * sequences * bytes);
  device.zero(states, kSets * sequences * bytes);
  std::vector<DeviceBatch> steps;
  for (int64_t step = 0; step < kSteps; ++step) {
    std::vector<DeviceSlice> slices;
    std::vector<std::byte*> memory;
    for (int64_t i = 0; i < sequences; ++i) {
      // At different places in their chunks, and each goes through a whole one.
      slices.push_back(
          {static_cast<int32_t>(i), 1, static_cast<int32_t>(1024 + i % kKdaChunk + step / kSets), 0});
      memory.push_back(states + (step % kSets * sequences + i) * bytes);
    }
    DeviceBatch batch;
    batch.rows = batch.slices = static_cast<int32_t>(sequences);
    batch.max_count = 1;
    batch.slice = arrays.upload(slices);
    batch.recurrent = arrays.upload(memory);
    steps.push_back(batch);
  }
  const std::vector<double> seconds = replays(device, kSteps, 20, [&](int64_t step) {
    kda_forward<bf16>(device, kKda, in.q, in.k, in.v, in.g, in.beta, steps[static_cast<size_t>(step)], 0,
                      out);
  });
  // S in bf16 read; the open chunk's rows, half of them on average; a row of them, and one of the inputs; a sixteenth of
  // S's rest read and of S written.
  const double s = 2.0 * kKda.dk * kKda.dv, open = static_cast<double>(bytes) / kKda.heads - 2 * s;
  const double head = s + open / 2 + open / kKdaChunk + 12.0 * kKda.dk + 3 * s / kKdaChunk;
  rig.report(time_figure(name, "us", Bound::kMemory, static_cast<double>(sequences * kKda.heads) * head, copy,
                         target_us, seconds, fmt::format("one layer, batch {}", sequences)));
}

// KDA's inputs as T, and the same recurrence as the general one takes it: a = beta k, b = exp(g) . k, and beta k is written.
template <class T>
struct DplrPair {
  T *q, *k, *v, *removed, *written, *read, *out;
  float *g, *beta;

  DplrPair(Arrays& arrays, int64_t rows) {
    const int64_t period = std::min(rows, kPeriod);
    const std::vector<float> queries = widened(
                                 random_directions(period, 1 / std::sqrt(static_cast<float>(kKda.dk)), 1)),
                             keys = widened(random_directions(period, 1, 2)),
                             values = widened(random_bf16(period * kWidth, 3));
    Random random(4);
    std::vector<float> decay(keys.size()), step(keys.size() / kKda.dk), strong(keys), decayed(keys);
    for (float& x : decay) x = -random.next_float() * random.next_float();
    for (float& x : step) x = random.next_float();
    for (size_t i = 0; i < keys.size(); ++i) {
      strong[i] *= step[i / kKda.dk];
      decayed[i] *= std::exp(decay[i]);
    }
    const auto place = [&](const std::vector<float>& x) { return arrays.repeat(as_t(x), rows * kWidth); };
    q = place(queries), k = place(keys), v = place(values);
    // The general one reads two arrays where these are one.
    removed = place(strong), written = place(strong), read = place(decayed);
    out = arrays.take<T>(rows * kWidth);
    g = arrays.repeat(decay, rows * kWidth);
    beta = arrays.repeat(step, rows * kKda.heads);
  }
  DplrDeviceInputs<T> general() const { return {q, written, v, removed, read, g}; }

  static std::vector<float> widened(const std::vector<bf16>& x) {
    std::vector<float> r;
    for (const bf16 e : x) r.push_back(from_bf16(e.bits));
    return r;
  }
  static std::vector<T> as_t(const std::vector<float>& x) {
    if constexpr (std::is_same_v<T, float>) return x;
    std::vector<T> r;
    if constexpr (std::is_same_v<T, bf16>)
      for (const float e : x) r.push_back({to_bf16(e)});
    return r;
  }
  std::vector<float> result(Device& device, int64_t rows) const {
    std::vector<T> x(static_cast<size_t>(rows * kWidth));
    device.copy_out(x.data(), out, static_cast<int64_t>(x.size() * sizeof(T)));
    if constexpr (std::is_same_v<T, bf16>)
      return widened(x);
    else
      return x;
  }
};

// ||a - b|| / ||b||
double relative_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    difference += d * d;
    size += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return std::sqrt(difference / size);
}

template <class T>
void dplr_figure(Rig& rig, Device& device, double copy, const std::string& name, int64_t rows) {
  if (!rig.wants(name)) return;
  Arrays arrays(device);
  const DplrPair<T> in(arrays, rows);
  DeviceBatch batch = one_sequence(arrays, rows);
  const int64_t bytes = std::max(kda_state_bytes<T>(kKda), dplr_state_bytes<T>(kKda));
  std::byte* state = arrays.take<std::byte>(bytes);
  batch.recurrent = arrays.upload<std::byte*>({state});
  const auto tied = [&](int64_t) {
    kda_forward<T>(device, kKda, in.q, in.k, in.v, in.g, in.beta, batch, 0, in.out);
  };
  const auto general = [&](int64_t) { dplr_forward<T>(device, kKda, in.general(), batch, 0, in.out); };
  device.zero(state, bytes);
  tied(0);
  const std::vector<float> expected = in.result(device, rows);
  device.zero(state, bytes);
  general(0);
  // bf16: both round what they multiply, the general one its inputs too.
  const double difference = relative_difference(in.result(device, rows), expected);
  PERIGEE_CHECK(difference < (sizeof(T) == 4 ? 1e-5 : 8.0 / 512), "two forms of KDA differ by {}",
                difference);
  device.zero(state, bytes);
  const double tied_ms = 1e3 * median(replays(device, 3, 20, tied));
  device.zero(state, bytes);
  const std::vector<double> seconds = replays(device, 3, 20, general);
  // q, k, v, a, b, out, and g in float.
  rig.report(time_figure(name, "ms", Bound::kMemory,
                         static_cast<double>(rows * kWidth * (6 * static_cast<int64_t>(sizeof(T)) + 4)), copy,
                         0, seconds,
                         fmt::format("general transition, one sequence of {} tokens; KDA on the same inputs "
                                     "{:.3g} ms: {:.2f} times as fast",
                                     rows, tied_ms, 1e3 * median(seconds) / tied_ms)));
}

}  // namespace

std::vector<std::string> gpu_kernel_figure_names() {
  return {"gpu-kda-forward-32768",  "gpu-kda-forward-131072", "gpu-kda-backward-8192",
          "gpu-kda-backward-32768", "gpu-kda-decode-64",      "gpu-kda-decode-256",
          "gpu-kda-dplr-8192",      "gpu-kda-dplr-32768",     "gpu-kda-dplr-f32-8192",
          "gpu-kda-dplr-f32-32768", "gpu-mla-decode"};
}

void bench_gpu_kda(Rig& rig, double copy) {
  const std::vector<std::string> names = gpu_kernel_figure_names();
  if (std::none_of(names.begin(), names.end() - 1, [&](const std::string& n) { return rig.wants(n); }))
    return;
  Device device(0, int64_t{3} << 30);
  kda_forward_figure(rig, device, copy, 32768, 1.4);
  kda_forward_figure(rig, device, copy, 131072, 5);
  kda_both_figure(rig, device, copy, 8192, 3.5);
  kda_both_figure(rig, device, copy, 32768, 11);
  kda_decode_figure(rig, device, copy, 64, 60);
  kda_decode_figure(rig, device, copy, 256, 220);
  for (const int64_t rows : {8192, 32768}) {
    dplr_figure<bf16>(rig, device, copy, fmt::format("gpu-kda-dplr-{}", rows), rows);
    dplr_figure<float>(rig, device, copy, fmt::format("gpu-kda-dplr-f32-{}", rows), rows);
  }
}

void bench_gpu_mla(Rig& rig, double copy) {
  if (!rig.wants("gpu-mla-decode")) return;
  constexpr int64_t kTokens = int64_t{1} << 20, kPages = kTokens / kLatentPage;
  const MlaShape shape{32, 512, 64, 1 / std::sqrt(192.0f)};
  Device device(0, int64_t{1} << 30);
  Arrays arrays(device);
  const int64_t page = latent_page_bytes<bf16>(shape);
  bf16* latents = arrays.repeat(random_bf16(16 * page / 2, 1), kPages * page / 2);
  std::vector<std::byte*> pages;
  for (int64_t i = 0; i < kPages; ++i) pages.push_back(reinterpret_cast<std::byte*>(latents) + i * page);
  DeviceBatch batch;
  batch.rows = batch.slices = batch.max_count = 1;
  batch.max_pages = static_cast<int32_t>(kPages);
  batch.slice = arrays.upload<DeviceSlice>({{0, 1, static_cast<int32_t>(kTokens - 1), 0}});
  batch.recurrent = arrays.upload<std::byte*>({nullptr});  // not null itself: no training
  batch.pages = arrays.upload(pages);
  const bf16* q = arrays.upload(random_bf16(shape.heads * shape.width(), 2));
  bf16* out = arrays.take<bf16>(shape.heads * shape.latent);
  const std::vector<double> seconds = replays(
      device, 4, 20, [&](int64_t) { mla_forward<bf16>(device, shape, q, batch, 0, nullptr, out, nullptr); });
  const double bytes = static_cast<double>(kTokens * shape.width() * 2);
  rig.report(time_figure("gpu-mla-decode", "us", Bound::kMemory, bytes, copy,
                         1.25e6 * bytes / kNominalMemoryRate, seconds,
                         fmt::format("one layer, one sequence of {} tokens; {:.2f} x bytes / 4.2 TB/s",
                                     kTokens, median(seconds) * kNominalMemoryRate / bytes)));
}

}  // namespace perigee::bench
