// Mamba2's recurrence on the device: over float the CPU's bits; over bf16 the CPU's bits on the widened inputs, rounded once,
// since its arithmetic is the same (the CPU's functions are held against float64 in ssd_test.cpp).
#include "kernels/ssd/ssd_device.h"
#include "tests/kernels/device_values.h"
#include "tests/kernels/ssd/cases.h"

namespace perigee::kernels {
namespace {

using SsdDevice = DeviceTest;

constexpr int64_t kStateOffset = 512;

struct Shapes {
  SsdShape shape;
  std::vector<int64_t> lengths;  // of the sequences
};

const std::vector<Shapes> kCases = {
    {{1, 1, 1}, {1, 33}},       {{2, 16, 16}, {16, 0, 40}},   {{3, 5, 7}, {70, 1}},
    {{1, 24, 40}, {17, 31, 2}}, {{2, 128, 128}, {50, 0, 37}}, {{1, 72, 136}, {20}},
    {{2, 64, 32}, {100, 64}},   {{1, 200, 256}, {40}},
};

// The case as T holds it.
template <class T>
SsdCase case_of(const SsdShape& shape, int64_t rows, Decay decay, uint64_t seed) {
  SsdCase c = make_ssd_case(shape, rows, decay, seed);
  c.q = held<T>(c.q), c.k = held<T>(c.k), c.v = held<T>(c.v), c.dout = held<T>(c.dout);
  return c;
}

template <class T>
struct Inputs {
  Inputs(Device& d, const SsdCase& c)
      : q(d, as<T>(c.q)), k(d, as<T>(c.k)), v(d, as<T>(c.v)), dout(d, as<T>(c.dout)), g(d, c.g) {}
  DeviceArray<T> q, k, v, dout;
  DeviceArray<float> g;
};

std::vector<DeviceSlice> device_slices(const std::vector<Slice>& slices) {
  std::vector<DeviceSlice> r;
  for (const Slice& s : slices)
    r.push_back(
        {static_cast<int32_t>(s.begin), static_cast<int32_t>(s.count), static_cast<int32_t>(s.position)});
  return r;
}

DeviceBatch batch_of(int64_t rows, const std::vector<Slice>& slices, const DeviceArray<DeviceSlice>& memory) {
  DeviceBatch b;
  b.rows = static_cast<int32_t>(rows);
  b.slices = static_cast<int32_t>(slices.size());
  for (const Slice& s : slices) b.max_count = std::max(b.max_count, static_cast<int32_t>(s.count));
  b.slice = memory;
  return b;
}

std::vector<Slice> whole(const std::vector<int64_t>& lengths) {
  std::vector<Slice> slices;
  int64_t begin = 0;
  for (const int64_t n : lengths) {
    slices.push_back({begin, n, 0});
    begin += n;
  }
  return slices;
}

int64_t rows_of(const Shapes& x) {
  int64_t rows = 0;
  for (const int64_t n : x.lengths) rows += n;
  return rows;
}

Floats to_floats(const std::vector<std::byte>& bytes, int64_t offset, int64_t n) {
  Floats f(static_cast<size_t>(n));
  std::memcpy(f.data(), bytes.data() + offset, f.size() * sizeof(float));
  return f;
}

// Calls of random sizes, from one row (decoding) to more than a chunk: outputs and states after every call.
template <class T>
void forward_has_the_bits_of_the_cpu(Device& d, uint64_t seed) {
  Context ctx(2);
  for (const Shapes& x : kCases) {
    const std::vector<Slice> sequences = whole(x.lengths);
    const int64_t rows = rows_of(x), floats = ssd_state_floats(x.shape),
                  bytes = kStateOffset + ssd_state_bytes<T>(x.shape);
    const SsdCase c = case_of<T>(x.shape, rows, seed % 2 ? Decay::kMixed : Decay::kMild, seed);
    Random random(++seed);
    const Inputs<T> in(d, c);
    std::vector<Floats> states(sequences.size(), Floats(static_cast<size_t>(floats)));
    DeviceArray<std::byte> memory(d, bytes * static_cast<int64_t>(sequences.size()));
    d.zero(memory, memory.size());
    std::vector<std::byte*> recurrent;
    for (size_t i = 0; i < sequences.size(); ++i)
      recurrent.push_back(memory + static_cast<int64_t>(i) * bytes);
    const DeviceArray<std::byte*> pointers(d, recurrent);
    std::vector<int64_t> done(sequences.size());
    for (int call = 0;; ++call) {
      // What each sequence has done so far, and a random piece of the rest.
      std::vector<Slice> slices;
      std::vector<SsdSlice> cpu;
      int64_t left = 0;
      for (size_t i = 0; i < sequences.size(); ++i) {
        const int64_t rest = sequences[i].count - done[i];
        left += rest;
        const float kind = random.next_float();
        const int64_t piece = kind < 0.4f   ? 1
                              : kind < 0.5f ? 0
                                            : 1 + static_cast<int64_t>(random.next_float() * 40.0f);
        slices.push_back({sequences[i].begin + done[i], std::min(rest, piece), done[i]});
        cpu.push_back({slices.back(), states[i].data()});
        done[i] += slices.back().count;
      }
      if (left == 0) break;
      const DeviceArray<DeviceSlice> slice_memory(d, device_slices(slices));
      DeviceBatch batch = batch_of(rows, slices, slice_memory);
      batch.recurrent = pointers;
      const DeviceArray<T> out(d, as<T>(Floats(c.v.size(), -7.0f)));
      ssd_forward<T>(d, x.shape, in.q, in.k, in.v, in.g, batch, kStateOffset, out);
      const Floats expected = run_forward(ctx, c, cpu);
      ASSERT_TRUE(same_bits(out.get(), as<T>(expected)))
          << "dk " << x.shape.dk << " dv " << x.shape.dv << " call " << call;
      const std::vector<std::byte> got = memory.get();
      for (size_t i = 0; i < sequences.size(); ++i)
        ASSERT_EQ(first_difference(to_floats(got, static_cast<int64_t>(i) * bytes + kStateOffset, floats),
                                   states[i]),
                  -1)
            << "dk " << x.shape.dk << " dv " << x.shape.dv << " call " << call << " sequence " << i
            << " position " << done[i];
    }
  }
}

TEST_F(SsdDevice, a_state_takes_whole_lines_of_memory) {
  for (const Shapes& x : kCases) {
    const int64_t bytes = ssd_state_bytes<bf16>(x.shape), floats = 4 * ssd_state_floats(x.shape);
    EXPECT_EQ(bytes, ssd_state_bytes<float>(x.shape));
    EXPECT_EQ(bytes % 256, 0);
    EXPECT_TRUE(bytes >= floats && bytes < floats + 256);
  }
}

TEST_F(SsdDevice, the_forward_over_float_has_the_bits_of_the_cpu) {
  forward_has_the_bits_of_the_cpu<float>(device(), 1);
}

TEST_F(SsdDevice, the_forward_over_bf16_has_the_bits_of_the_cpu_rounded) {
  forward_has_the_bits_of_the_cpu<bf16>(device(), 50);
}

template <class T>
void training_has_the_bits_of_the_cpu(Device& d, uint64_t seed) {
  Context ctx(2);
  for (const Shapes& x : kCases)
    for (const Decay decay : {Decay::kMild, Decay::kStrong, Decay::kMixed, Decay::kExtreme}) {
      const std::vector<Slice> slices = whole(x.lengths);
      const int64_t rows = rows_of(x), one = x.shape.heads * x.shape.dk * x.shape.dv;
      const SsdCase c = case_of<T>(x.shape, rows, decay, ++seed);
      const Inputs<T> in(d, c);
      const DeviceArray<DeviceSlice> slice_memory(d, device_slices(slices));
      const DeviceBatch batch = batch_of(rows, slices, slice_memory);
      const DeviceArray<T> chunk_states(d, kda_chunk_slots(rows, batch.slices) * one);
      const DeviceArray<T> out(d, static_cast<int64_t>(c.v.size())), dq(d, static_cast<int64_t>(c.q.size())),
          dk(d, static_cast<int64_t>(c.k.size())), dv(d, static_cast<int64_t>(c.v.size()));
      const DeviceArray<float> dg(d, static_cast<int64_t>(c.g.size()));
      ssd_forward<T>(d, x.shape, in.q, in.k, in.v, in.g, batch, 0, out, chunk_states);
      ssd_backward<T>(d, x.shape, in.q, in.k, in.v, in.g, chunk_states, batch, in.dout, dq, dk, dv, dg);

      std::vector<Floats> states(slices.size(), ssd_empty_state(x.shape));
      std::vector<SsdSlice> cpu;
      for (size_t i = 0; i < slices.size(); ++i) cpu.push_back({slices[i], states[i].data()});
      const std::string what = "dk " + std::to_string(x.shape.dk) + " dv " + std::to_string(x.shape.dv) +
                               " seed " + std::to_string(seed);
      EXPECT_TRUE(same_bits(out.get(), as<T>(run_forward(ctx, c, cpu)))) << what;

      // The states, wherever the device keeps them, as T holds them; from these the same backward.
      const Floats exact = ssd_chunk_states(ctx, c, slices), kept = held<T>(exact),
                   on_device = floats_of(chunk_states.get());
      int64_t chunk = 0;
      for (size_t i = 0; i < slices.size(); ++i)
        for (int64_t j = 0; j < (slices[i].count + kKdaChunk - 1) / kKdaChunk; ++j, ++chunk)
          EXPECT_TRUE(same_bits(
              part(on_device, kda_chunk_slot(slices[i].begin, static_cast<int64_t>(i), j) * one, one),
              part(kept, chunk * one, one)))
              << what << " chunk " << chunk;
      SsdGrads grads{Floats(c.q.size()), Floats(c.k.size()), Floats(c.v.size()), Floats(c.g.size())};
      ssd_backward(ctx, x.shape, c.q.data(), c.k.data(), c.v.data(), c.g.data(), kept.data(), slices,
                   c.dout.data(), grads.dq.data(), grads.dk.data(), grads.dv.data(), grads.dg.data());
      EXPECT_TRUE(same_bits(dq.get(), as<T>(grads.dq))) << "dq, " << what;
      EXPECT_TRUE(same_bits(dk.get(), as<T>(grads.dk))) << "dk, " << what;
      EXPECT_TRUE(same_bits(dv.get(), as<T>(grads.dv))) << "dv, " << what;
      EXPECT_EQ(first_difference(dg.get(), grads.dg), -1) << "dg, " << what;
      // What the rounding of the states does to the gradients that read them, one rounding each of terms and of the sum.
      const SsdGrads truth = run_backward(ctx, c, slices);
      EXPECT_LT(relative_error(dq.get(), doubles(truth.dq)), 2 * kOneRounding) << what;
      EXPECT_LT(relative_error(dg.get(), doubles(truth.dg)), 2 * kOneRounding) << what;
    }
}

TEST_F(SsdDevice, training_over_float_has_the_bits_of_the_cpu) {
  training_has_the_bits_of_the_cpu<float>(device(), 100);
}

TEST_F(SsdDevice, training_over_bf16_has_the_bits_of_the_cpu_rounded) {
  training_has_the_bits_of_the_cpu<bf16>(device(), 200);
}

}  // namespace
}  // namespace perigee::kernels
