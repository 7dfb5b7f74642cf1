// Kimi Delta Attention over float on the device: the bits of the CPU's functions.
#include "kernels/kda/kda_device.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/kda/cases.h"

namespace perigee::kernels {
namespace {

using KdaF32Device = DeviceTest;

constexpr int64_t kStateOffset = 512;

struct Shapes {
  KdaShape shape;
  std::vector<int64_t> lengths;  // of the sequences
};

const std::vector<Shapes> kCases = {
    {{1, 1, 1}, {1, 33}},       {{2, 16, 16}, {16, 0, 40}},   {{3, 5, 7}, {70, 1}},
    {{1, 24, 40}, {17, 31, 2}}, {{2, 128, 128}, {50, 0, 37}}, {{1, 72, 136}, {20}},
};

struct Inputs {
  Inputs(Device& d, const KdaCase& c) : q(d, c.q), k(d, c.k), v(d, c.v), g(d, c.g), beta(d, c.beta) {}
  DeviceArray<float> q, k, v, g, beta;
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

Floats to_floats(const std::vector<std::byte>& bytes, int64_t offset, int64_t n) {
  Floats f(static_cast<size_t>(n));
  std::memcpy(f.data(), bytes.data() + offset, f.size() * sizeof(float));
  return f;
}

TEST_F(KdaF32Device, a_state_takes_whole_lines_of_memory) {
  for (const Shapes& x : kCases) {
    const int64_t bytes = kda_state_bytes<float>(x.shape), floats = 4 * kda_state_floats(x.shape);
    EXPECT_EQ(bytes % 256, 0);
    EXPECT_TRUE(bytes >= floats && bytes < floats + 256);
  }
}

// Calls of random sizes, from one row (decoding) to more than a chunk: outputs and states after every call.
TEST_F(KdaF32Device, the_forward_and_its_states_have_the_bits_of_the_cpu) {
  Device& d = device();
  Context ctx(2);
  uint64_t seed = 1;
  for (const Shapes& x : kCases) {
    const std::vector<Slice> sequences = whole(x.lengths);
    int64_t rows = 0;
    for (const int64_t n : x.lengths) rows += n;
    const KdaCase c = make_kda_case(x.shape, rows, seed % 2 ? Decay::kMixed : Decay::kMild, seed);
    Random random(++seed);
    const Inputs in(d, c);
    const int64_t floats = kda_state_floats(x.shape), bytes = kStateOffset + kda_state_bytes<float>(x.shape);
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
      std::vector<KdaSlice> cpu;
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
      const Floats before(c.v.size(), -7.0f);
      const DeviceArray<float> out(d, before);
      kda_forward<float>(d, x.shape, in.q, in.k, in.v, in.g, in.beta, batch, kStateOffset, out);
      const Floats expected = run_forward(ctx, c, cpu);
      ASSERT_EQ(first_difference(out.get(), expected), -1)
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

TEST_F(KdaF32Device, training_has_the_bits_of_the_cpu) {
  Device& d = device();
  Context ctx(2);
  uint64_t seed = 100;
  for (const Shapes& x : kCases) {
    for (const Decay decay : {Decay::kMild, Decay::kStrong, Decay::kMixed, Decay::kExtreme}) {
      const std::vector<Slice> slices = whole(x.lengths);
      int64_t rows = 0;
      for (const int64_t n : x.lengths) rows += n;
      const KdaCase c = make_kda_case(x.shape, rows, decay, ++seed);
      const Inputs in(d, c);
      const DeviceArray<DeviceSlice> slice_memory(d, device_slices(slices));
      const DeviceBatch batch = batch_of(rows, slices, slice_memory);
      const int64_t one = x.shape.heads * x.shape.dk * x.shape.dv;
      const DeviceArray<float> chunk_states(d, kda_chunk_slots(rows, batch.slices) * one);
      const DeviceArray<float> out(d, static_cast<int64_t>(c.v.size()));
      kda_forward<float>(d, x.shape, in.q, in.k, in.v, in.g, in.beta, batch, 0, out, chunk_states);

      std::vector<KdaSlice> cpu;
      std::vector<Floats> states(slices.size(), Floats(static_cast<size_t>(kda_state_floats(x.shape))));
      int64_t chunks = 0;
      for (size_t i = 0; i < slices.size(); ++i) {
        cpu.push_back({slices[i], states[i].data()});
        chunks += (slices[i].count + kKdaChunk - 1) / kKdaChunk;
      }
      Floats expected_states(static_cast<size_t>(chunks * one));
      const Floats expected = run_forward(ctx, c, cpu, expected_states.data());
      ASSERT_EQ(first_difference(out.get(), expected), -1);
      const Floats got = chunk_states.get();
      int64_t chunk = 0;
      for (size_t i = 0; i < slices.size(); ++i)
        for (int64_t j = 0; j < (slices[i].count + kKdaChunk - 1) / kKdaChunk; ++j, ++chunk) {
          const int64_t slot = kda_chunk_slot(slices[i].begin, static_cast<int64_t>(i), j);
          ASSERT_EQ(std::memcmp(&got[static_cast<size_t>(slot * one)],
                                &expected_states[static_cast<size_t>(chunk * one)],
                                static_cast<size_t>(one) * sizeof(float)),
                    0)
              << "slice " << i << " chunk " << j;
        }

      const DeviceArray<float> dout(d, c.dout), dq(d, in.q.size()), dk(d, in.q.size()), dv(d, in.v.size()),
          dg(d, in.q.size()), dbeta(d, in.beta.size());
      kda_backward<float>(d, x.shape, in.q, in.k, in.v, in.g, in.beta, chunk_states, batch, dout, dq, dk, dv,
                          dg, dbeta);
      const Gradients e = run_backward(ctx, c, slices);
      const std::string at = "dk " + std::to_string(x.shape.dk) + " dv " + std::to_string(x.shape.dv);
      EXPECT_EQ(first_difference(dq.get(), e.dq), -1) << at;
      EXPECT_EQ(first_difference(dk.get(), e.dk), -1) << at;
      EXPECT_EQ(first_difference(dv.get(), e.dv), -1) << at;
      EXPECT_EQ(first_difference(dg.get(), e.dg), -1) << at;
      EXPECT_EQ(first_difference(dbeta.get(), e.dbeta), -1) << at;
    }
  }
}

}  // namespace
}  // namespace perigee::kernels
