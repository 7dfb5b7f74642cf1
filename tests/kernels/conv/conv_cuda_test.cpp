// The short convolution with its normalisation on the device: float against the CPU's bits, bf16 against float64, any
// split of a sequence against the whole.
#include "kernels/conv/short_conv.h"
#include "kernels/conv/short_conv_device.h"
#include "kernels/simd/simd.h"
#include "tests/kernels/conv/short_conv_ref.h"
#include "tests/kernels/device_values.h"

namespace perigee::kernels {
namespace {

using ConvDevice = DeviceTest;

// What l2norm_forward and l2norm_backward of kernels/kda do to one head.
void l2norm(const float* x, int64_t d, float scale, float* y) {
  const float factor = scale / __builtin_sqrtf(simd::dot(x, x, d) + 1e-6f);
  for (int64_t i = 0; i < d; ++i) y[i] = x[i] * factor;
}
void l2norm_gradient(const float* x, const float* dy, int64_t d, float scale, float* dx) {
  const float square = simd::dot(x, x, d) + 1e-6f, factor = scale / __builtin_sqrtf(square);
  const float along = simd::dot(x, dy, d) / square;
  for (int64_t i = 0; i < d; ++i) dx[i] = factor * __builtin_fmaf(-x[i], along, dy[i]);
}

constexpr int64_t kWindowOffset = 48;

// Sequences on the device, each with recurrent memory in which its window lies.
template <class T>
class Sequences {
 public:
  Sequences(Device& device, const ConvShape& shape, size_t count) : device_(device), bytes_(kWindowOffset + shape.window_elements() * 4) {
    for (size_t i = 0; i < count; ++i) {
      memory_.push_back(std::make_unique<DeviceArray<std::byte>>(device, bytes_));
      device.zero(memory_.back()->data(), bytes_);
    }
  }
  // A batch of slices, each of the sequence of the same index.
  DeviceBatch batch(const std::vector<DeviceSlice>& slices, int64_t rows, bool training = false) {
    std::vector<std::byte*> at;
    int32_t most = 0;
    for (size_t i = 0; i < slices.size(); ++i) {
      at.push_back(training ? nullptr : memory_[i]->data());
      most = std::max(most, slices[i].count);
    }
    slices_ = std::make_unique<DeviceArray<DeviceSlice>>(device_, slices);
    at_ = std::make_unique<DeviceArray<std::byte*>>(device_, at);
    DeviceBatch b;
    b.rows = static_cast<int32_t>(rows);
    b.slices = static_cast<int32_t>(slices.size());
    b.max_count = most;
    b.slice = slices_->data();
    b.recurrent = training ? nullptr : at_->data();
    return b;
  }
  std::vector<T> window(size_t i, const ConvShape& shape) const {
    std::vector<T> v(static_cast<size_t>(shape.window_elements()));
    device_.copy_out(v.data(), memory_[i]->data() + kWindowOffset, static_cast<int64_t>(v.size() * sizeof(T)));
    return v;
  }

 private:
  Device& device_;
  int64_t bytes_;
  std::vector<std::unique_ptr<DeviceArray<std::byte>>> memory_;
  std::unique_ptr<DeviceArray<DeviceSlice>> slices_;
  std::unique_ptr<DeviceArray<std::byte*>> at_;
};

template <class T>
struct Outputs {
  std::vector<T> q, k, v;
};

template <class T>
Outputs<T> run(Device& device, const ConvShape& shape, const std::vector<T>& qkv, const DeviceArray<float>& w,
               const DeviceBatch& batch) {
  const DeviceArray<T> in(device, qkv);
  const int64_t n = batch.rows * shape.wide();
  const DeviceArray<T> q(device, n), k(device, n), v(device, n);
  conv_forward(device, shape, in.data(), w, batch, kWindowOffset, q.data(), k.data(), v.data());
  return {q.get(), k.get(), v.get()};
}

const ConvShape kShapes[] = {{1, 1}, {3, 5}, {2, 16}, {5, 33}, {3, 64}, {4, 128}, {3, 5, false}, {3, 64, false}};

float q_scale(const ConvShape& s) { return 1.0f / __builtin_sqrtf(static_cast<float>(s.d)); }

TEST_F(ConvDevice, float_has_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const ConvShape& s : kShapes) {
    const int64_t wide = s.wide(), rows = 160;
    // A padding slice between the others, and rows of nobody.
    const std::vector<DeviceSlice> slices = {{0, 1, 0}, {1, 2, 0}, {0, 0, 0}, {4, 70, 0}, {80, 33, 0}};
    const Floats w = normals(3 * wide * 4, 1), dq = normals(rows * wide, 6), dk = normals(rows * wide, 7),
                 dv = normals(rows * wide, 8);
    const DeviceArray<float> dev_w(device(), w);
    Sequences<float> sequences(device(), s, slices.size());
    Floats windows(static_cast<size_t>(s.window_elements()) * slices.size(), 0.0f);
    // Twice, so that the second starts from the windows of the first.
    for (uint64_t round = 0; round < 2; ++round) {
      const Floats qkv = normals(rows * 3 * wide, 2 + round);
      Floats raw[3], out[3];
      for (auto& r : raw) r.assign(static_cast<size_t>(rows * wide), 0.0f);
      std::vector<ConvSlice> conv;
      for (size_t i = 0; i < slices.size(); ++i)
        conv.push_back({{slices[i].begin, slices[i].count, slices[i].position},
                        windows.data() + static_cast<int64_t>(i) * s.window_elements(),
                        3 * wide});
      for (int64_t part = 0; part < 3; ++part) {
        short_conv_forward(ctx, wide, qkv.data() + part * wide, 3 * wide, w.data() + part * wide * 4, conv,
                           raw[part].data(), wide);
        for (ConvSlice& c : conv) c.window += wide;
        out[part] = raw[part];
        if (part < 2 && s.normalise)
          for (int64_t i = 0; i < rows * s.heads; ++i)
            l2norm(&raw[part][static_cast<size_t>(i * s.d)], s.d, part == 0 ? q_scale(s) : 1.0f,
                   &out[part][static_cast<size_t>(i * s.d)]);
      }
      const DeviceBatch batch = sequences.batch(slices, rows);
      const auto got = run<float>(device(), s, qkv, dev_w, batch);
      for (const DeviceSlice& slice : slices) {
        const int64_t from = slice.begin * wide, n = slice.count * wide;
        EXPECT_EQ(first_difference(part(got.q, from, n), part(out[0], from, n)), -1) << s.d;
        EXPECT_EQ(first_difference(part(got.k, from, n), part(out[1], from, n)), -1) << s.d;
        EXPECT_EQ(first_difference(part(got.v, from, n), part(out[2], from, n)), -1) << s.d;
      }
      EXPECT_TRUE(std::isnan(got.q[static_cast<size_t>(3 * wide)])) << "a row of no slice was written";
      for (size_t i = 0; i < slices.size(); ++i) {
        EXPECT_EQ(first_difference(sequences.window(i, s), part(windows, static_cast<int64_t>(i) * s.window_elements(),
                                                                s.window_elements())), -1);
      }
    }
  }
}

TEST_F(ConvDevice, bf16_is_near_float64) {
  for (const ConvShape& s : kShapes) {
    const int64_t wide = s.wide(), rows = 75;
    const Floats w = normals(3 * wide * 4, 1, 0.5f), x = held<bf16>(normals(rows * 3 * wide, 2));
    const DeviceArray<float> dev_w(device(), w);
    Sequences<bf16> sequences(device(), s, 1);
    const auto got = run<bf16>(device(), s, narrow(x), dev_w, sequences.batch({{0, static_cast<int32_t>(rows), 0}}, rows, true));
    const Doubles y = reference::short_conv(doubles(x), doubles(w), static_cast<size_t>(3 * wide));
    Doubles expected[3];
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t head = 0; head < 3 * s.heads; ++head) {
        const double* const e = &y[static_cast<size_t>((t * 3 * s.heads + head) * s.d)];
        const int64_t part = head / s.heads;
        double sum = 1e-6;
        for (int64_t c = 0; c < s.d; ++c) sum += e[c] * e[c];
        const double factor = part == 2 || !s.normalise ? 1 : (part == 0 ? 1 / std::sqrt(static_cast<double>(s.d)) : 1) / std::sqrt(sum);
        for (int64_t c = 0; c < s.d; ++c) expected[part].push_back(e[c] * factor);
      }
    EXPECT_LT(relative_error(got.q, expected[0]), kOneRounding) << s.d;
    EXPECT_LT(relative_error(got.k, expected[1]), kOneRounding) << s.d;
    EXPECT_LT(relative_error(got.v, expected[2]), kOneRounding) << s.d;
  }
}

template <class T>
void splits_agree(Device& device, const ConvShape& s) {
  const int32_t rows = 101;
  const int64_t wide = s.wide();
  const std::vector<T> x = as<T>(normals(rows * 3 * wide, 2));
  const DeviceArray<float> w(device, normals(3 * wide * 4, 1));
  Sequences<T> whole(device, s, 1), pieces(device, s, 1);
  const auto expected = run<T>(device, s, x, w, whole.batch({{0, rows, 0}}, rows));
  const auto trained = run<T>(device, s, x, w, whole.batch({{0, rows, 0}}, rows, true));
  EXPECT_TRUE(same_bits(trained.q, expected.q) && same_bits(trained.k, expected.k) && same_bits(trained.v, expected.v));
  int32_t begin = 0;
  for (const int32_t count : {1, 1, 2, 3, 1, 37, 4, 1, 32, 19}) {
    const auto got = run<T>(device, s, part(x, begin * 3 * wide, count * 3 * wide), w, pieces.batch({{0, count, begin}}, count));
    EXPECT_TRUE(same_bits(got.q, part(expected.q, begin * wide, count * wide))) << begin;
    EXPECT_TRUE(same_bits(got.k, part(expected.k, begin * wide, count * wide))) << begin;
    EXPECT_TRUE(same_bits(got.v, part(expected.v, begin * wide, count * wide))) << begin;
    begin += count;
  }
  EXPECT_EQ(begin, rows);
  EXPECT_TRUE(same_bits(whole.window(0, s), pieces.window(0, s)));
}

TEST_F(ConvDevice, any_split_gives_the_bits_of_the_whole) {
  for (const ConvShape& s : kShapes) {
    splits_agree<float>(device(), s);
    splits_agree<bf16>(device(), s);
  }
}

TEST_F(ConvDevice, a_decoding_batch_gives_each_row_as_alone) {
  const ConvShape s{4, 128};
  const int32_t rows = 300;  // more than a block takes
  const int64_t wide = s.wide();
  const std::vector<bf16> x = narrow(normals(rows * 3 * wide, 2));
  const DeviceArray<float> w(device(), normals(3 * wide * 4, 1));
  Sequences<bf16> all(device(), s, rows), one(device(), s, 1);
  std::vector<DeviceSlice> slices;
  for (int32_t i = 0; i < rows; ++i) slices.push_back({i, i == 17 ? 0 : 1, 5});
  const auto got = run<bf16>(device(), s, x, w, all.batch(slices, rows));
  for (const int32_t i : {0, 150, 299}) {
    Sequences<bf16> alone(device(), s, 1);
    const auto row = run<bf16>(device(), s, part(x, i * 3 * wide, 3 * wide), w, alone.batch({{0, 1, 5}}, 1));
    EXPECT_TRUE(same_bits(row.q, part(got.q, i * wide, wide))) << i;
    EXPECT_TRUE(same_bits(row.v, part(got.v, i * wide, wide))) << i;
    EXPECT_TRUE(same_bits(alone.window(0, s), all.window(static_cast<size_t>(i), s))) << i;
  }
  EXPECT_TRUE(same_bits(all.window(17, s), std::vector<bf16>(static_cast<size_t>(s.window_elements()), bf16{0})));
}

// The gradients of the CPU: over float their bits; over bf16 within the rounding of dqkv, and dw in another order.
template <class T>
void gradients(Device& device, const ConvShape& s) {
  Context ctx(2);
  const int64_t wide = s.wide(), rows = 400;
  const std::vector<DeviceSlice> slices = {{0, 1, 0}, {1, 2, 0}, {0, 0, 0}, {4, 290, 0}, {300, 33, 0}, {340, 60, 0}};
  std::vector<Slice> cpu_slices;
  for (const DeviceSlice& e : slices) cpu_slices.push_back({e.begin, e.count, e.position});
  const Floats w = normals(3 * wide * 4, 1, 0.5f), qkv = held<T>(normals(rows * 3 * wide, 2));
  Floats dout[3], dw = normals(3 * wide * 4, 9), dqkv(qkv.size(), 0.0f);
  for (uint64_t i = 0; i < 3; ++i) dout[i] = held<T>(normals(rows * wide, 3 + i));
  const DeviceArray<float> dev_w(device, w), dev_dw(device, dw);
  const DeviceArray<T> dev_qkv(device, as<T>(qkv)), dev_dq(device, as<T>(dout[0])), dev_dk(device, as<T>(dout[1])),
      dev_dv(device, as<T>(dout[2])), dev_dqkv(device, as<T>(dqkv));
  Sequences<T> sequences(device, s, slices.size());
  conv_backward(device, s, dev_qkv.data(), dev_w, sequences.batch(slices, rows, true), dev_dq.data(), dev_dk.data(),
                dev_dv.data(), dev_dqkv.data(), dev_dw);
  for (int64_t part = 0; part < 3; ++part) {
    Floats raw(static_cast<size_t>(rows * wide), 0.0f), windows(static_cast<size_t>(3 * wide) * slices.size(), 0.0f);
    std::vector<ConvSlice> conv;
    for (size_t i = 0; i < slices.size(); ++i) conv.push_back({cpu_slices[i], windows.data() + static_cast<int64_t>(i) * 3 * wide, wide});
    short_conv_forward(ctx, wide, qkv.data() + part * wide, 3 * wide, w.data() + part * wide * 4, conv, raw.data(), wide);
    Floats d = dout[part];
    if (part < 2 && s.normalise)
      for (int64_t i = 0; i < rows * s.heads; ++i)
        l2norm_gradient(&raw[static_cast<size_t>(i * s.d)], &dout[part][static_cast<size_t>(i * s.d)], s.d,
                        part == 0 ? q_scale(s) : 1.0f, &d[static_cast<size_t>(i * s.d)]);
    short_conv_backward(ctx, wide, qkv.data() + part * wide, 3 * wide, w.data() + part * wide * 4, cpu_slices, d.data(),
                        wide, dqkv.data() + part * wide, 3 * wide, dw.data() + part * wide * 4);
  }
  if constexpr (std::is_same_v<T, float>) {
    EXPECT_EQ(first_difference(dev_dqkv.get(), dqkv), -1) << s.d;
    EXPECT_EQ(first_difference(dev_dw.get(), dw), -1) << s.d;
  } else {
    EXPECT_LT(relative_error(dev_dqkv.get(), doubles(dqkv)), kOneRounding) << s.d;
    EXPECT_LT(relative_error(dev_dw.get(), doubles(dw)), 5e-6) << s.d;
  }
}

TEST_F(ConvDevice, gradients_over_float_have_the_bits_of_the_cpu) {
  for (const ConvShape& s : kShapes) gradients<float>(device(), s);
}
TEST_F(ConvDevice, gradients_over_bf16_are_near_the_cpu) {
  // With one channel the normalised value is a sign: its gradient is all cancellation.
  for (const ConvShape& s : kShapes)
    if (s.d > 1) gradients<bf16>(device(), s);
}

// Without taps: what taps that take the row itself alone would give, no window and no gradient of taps.
template <class T>
void silu_alone(Device& device, const ConvShape& s) {
  const int64_t wide = s.wide(), rows = 75;
  Floats unit(static_cast<size_t>(3 * wide * 4), 0.0f);
  for (size_t i = 3; i < unit.size(); i += 4) unit[i] = 1;
  const std::vector<T> x = as<T>(normals(rows * 3 * wide, 2)), dq = as<T>(normals(rows * wide, 3)),
                       dk = as<T>(normals(rows * wide, 4)), dv = as<T>(normals(rows * wide, 5));
  const DeviceArray<float> w(device, unit), dw(device, 3 * wide * 4);
  Sequences<T> sequences(device, s, 2);
  const std::vector<DeviceSlice> slices = {{0, 70, 0}, {70, 5, 0}};
  const DeviceArray<T> in(device, x), dev_dq(device, dq), dev_dk(device, dk), dev_dv(device, dv);
  const auto forward = [&](const float* taps, const std::vector<DeviceSlice>& parts, int64_t n) {
    const DeviceArray<T> q(device, n * wide), k(device, n * wide), v(device, n * wide);
    conv_forward<T>(device, s, in, taps, sequences.batch(parts, n), kWindowOffset, q, k, v);
    return Outputs<T>{q.get(), k.get(), v.get()};
  };
  const auto backward = [&](const float* taps) {
    const DeviceArray<T> dqkv(device, rows * 3 * wide);
    conv_backward<T>(device, s, in, taps, sequences.batch(slices, rows, true), dev_dq, dev_dk, dev_dv, dqkv,
                     taps == nullptr ? nullptr : dw.data());
    return dqkv.get();
  };
  const Outputs<T> plain = forward(nullptr, slices, rows), row = forward(nullptr, {{0, 1, 0}}, 1);
  EXPECT_TRUE(same_bits(sequences.window(0, s), std::vector<T>(static_cast<size_t>(s.window_elements()), T{})));
  const Outputs<T> with_taps = forward(w, slices, rows);
  EXPECT_TRUE(same_bits(plain.q, with_taps.q) && same_bits(plain.k, with_taps.k) && same_bits(plain.v, with_taps.v)) << s.d;
  EXPECT_TRUE(same_bits(row.q, part(plain.q, 0, wide)) && same_bits(row.v, part(plain.v, 0, wide))) << s.d;
  EXPECT_TRUE(same_bits(backward(nullptr), backward(w))) << s.d;
}
TEST_F(ConvDevice, silu_alone_is_taps_of_the_row_itself) {
  for (const ConvShape& s : kShapes) {
    silu_alone<float>(device(), s);
    silu_alone<bf16>(device(), s);
  }
}

}  // namespace
}  // namespace perigee::kernels
