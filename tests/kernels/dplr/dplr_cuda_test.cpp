// The general delta rule over float on the device: the bits of the CPU's functions.
#include "tests/kernels/dplr/device_case.h"

namespace perigee::kernels {
namespace {

using DplrF32Device = DeviceTest;

struct Shapes {
  DplrShape shape;
  std::vector<int64_t> lengths;  // of the sequences
};

const std::vector<Shapes> kCases = {
    {{1, 1, 1}, {1, 33}},
    {{2, 16, 16}, {16, 0, 40}},
    {{3, 5, 7}, {70, 1}},
    {{1, 24, 40}, {17, 31, 2}},
    {{2, 128, 128}, {50, 0, 37}},
    {{1, 72, 136}, {20}},
    {{2, 17, 33}, {1, 1, 2, 3, 15, 16, 17, 0, 5, 48, 9, 31}},
};

Floats to_floats(const std::vector<std::byte>& bytes, int64_t n) {
  Floats f(static_cast<size_t>(n));
  std::memcpy(f.data(), bytes.data(), f.size() * sizeof(float));
  return f;
}

TEST_F(DplrF32Device, a_state_takes_whole_lines_of_memory) {
  for (const Shapes& x : kCases) {
    const int64_t bytes = dplr_state_bytes<float>(x.shape), floats = 4 * dplr_state_floats(x.shape);
    EXPECT_EQ(bytes % 256, 0);
    EXPECT_TRUE(bytes >= floats && bytes < floats + 256);
  }
}

// Calls of random sizes, from one row (decoding) to more than a chunk: outputs and states after every call.
TEST_F(DplrF32Device, the_forward_and_its_states_have_the_bits_of_the_cpu) {
  Device& d = device();
  Context ctx(2);
  uint64_t seed = 1;
  for (const Shapes& shapes : kCases) {
    const DplrOnDevice<float> x(shapes.shape, shapes.lengths, seed % 2 ? Decay::kMixed : Decay::kMild, seed);
    Random random(++seed);
    const DplrArrays<float> in(d, x.c);
    const std::vector<Slice> sequences = x.whole();
    const int64_t floats = dplr_state_floats(x.shape);
    std::vector<Floats> expected_states(sequences.size(), empty_state(x.shape));
    const DplrStates states(d, dplr_state_bytes<float>(x.shape), sequences.size());
    std::vector<int64_t> done(sequences.size());
    for (int call = 0;; ++call) {
      // What each sequence has done so far, and a random piece of the rest.
      std::vector<Slice> slices;
      std::vector<DplrSlice> cpu;
      int64_t left = 0;
      for (size_t i = 0; i < sequences.size(); ++i) {
        const int64_t rest = sequences[i].count - done[i];
        left += rest;
        const float kind = random.next_float();
        const int64_t piece = kind < 0.4f   ? 1
                              : kind < 0.5f ? 0
                                            : 1 + static_cast<int64_t>(random.next_float() * 40.0f);
        slices.push_back({sequences[i].begin + done[i], std::min(rest, piece), done[i]});
        cpu.push_back({slices.back(), expected_states[i].data()});
        done[i] += slices.back().count;
      }
      if (left == 0) break;
      const DeviceArray<DeviceSlice> slice_memory(d, device_slices(slices));
      DeviceBatch batch = batch_of(x.rows(), slices, slice_memory);
      batch.recurrent = states.pointers();
      const DeviceArray<float> out(d, Floats(x.c.v.size(), -7.0f));
      dplr_forward<float>(d, x.shape, in.inputs(), batch, DplrStates::kOffset, out);
      const Floats expected = run_forward(ctx, x.c, cpu);
      ASSERT_EQ(first_difference(out.get(), expected), -1)
          << "dk " << x.shape.dk << " dv " << x.shape.dv << " call " << call;
      for (size_t i = 0; i < sequences.size(); ++i)
        ASSERT_EQ(first_difference(to_floats(states.get(i), floats), expected_states[i]), -1)
            << "dk " << x.shape.dk << " dv " << x.shape.dv << " call " << call << " sequence " << i
            << " position " << done[i];
    }
  }
}

TEST_F(DplrF32Device, training_has_the_bits_of_the_cpu) {
  Device& d = device();
  Context ctx(2);
  uint64_t seed = 100;
  for (const Shapes& shapes : kCases)
    for (const Decay decay : {Decay::kMild, Decay::kStrong, Decay::kMixed, Decay::kExtreme}) {
      const DplrOnDevice<float> x(shapes.shape, shapes.lengths, decay, ++seed);
      const std::vector<Slice> slices = x.whole();
      const DplrTraining<float> got = train(d, x, slices);

      std::vector<DplrSlice> cpu;
      std::vector<Floats> states(slices.size(), empty_state(x.shape));
      int64_t chunks = 0;
      for (size_t i = 0; i < slices.size(); ++i) {
        cpu.push_back({slices[i], states[i].data()});
        chunks += (slices[i].count + kKdaChunk - 1) / kKdaChunk;
      }
      const int64_t one = x.key_width() * x.shape.dv;
      Floats expected_states(static_cast<size_t>(chunks * one));
      ASSERT_EQ(first_difference(got.out, run_forward(ctx, x.c, cpu, expected_states.data())), -1);
      int64_t chunk = 0;
      for (size_t i = 0; i < slices.size(); ++i)
        for (int64_t j = 0; j < (slices[i].count + kKdaChunk - 1) / kKdaChunk; ++j, ++chunk) {
          const int64_t slot = kda_chunk_slot(slices[i].begin, static_cast<int64_t>(i), j);
          ASSERT_EQ(std::memcmp(&got.states[static_cast<size_t>(slot * one)],
                                &expected_states[static_cast<size_t>(chunk * one)],
                                static_cast<size_t>(one) * sizeof(float)),
                    0)
              << "slice " << i << " chunk " << j;
        }

      const DplrGrads e = run_backward(ctx, x.c, slices);
      const std::string at = "dk " + std::to_string(x.shape.dk) + " dv " + std::to_string(x.shape.dv);
      EXPECT_EQ(first_difference(got.dq, e.dq), -1) << at;
      EXPECT_EQ(first_difference(got.dk, e.dk), -1) << at;
      EXPECT_EQ(first_difference(got.dv, e.dv), -1) << at;
      EXPECT_EQ(first_difference(got.da, e.da), -1) << at;
      EXPECT_EQ(first_difference(got.db, e.db), -1) << at;
      EXPECT_EQ(first_difference(got.dg, e.dg), -1) << at;
    }
}

}  // namespace
}  // namespace perigee::kernels
