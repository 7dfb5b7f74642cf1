// Softmax attention and the rotation on the device. Over float: every bit of the CPU's. Over bf16: the CPU's numbers from
// the widened inputs, rounded once, so that prefill, decoding, any cut and training agree by construction and by test.
#include "kernels/attention/attention.h"
#include "kernels/attention/attention_device.h"
#include "kernels/attention/rope.h"
#include "kernels/attention/rope_device.h"
#include "tests/kernels/device_values.h"

namespace perigee::kernels {
namespace {

struct Part {
  int64_t length, position, count;  // rows [position, position + count) of a sequence of `length` tokens
};

AttentionShape shape_of(int64_t heads, int64_t kv_heads, int64_t dim) {
  return {heads, kv_heads, dim, 1.0f / std::sqrt(static_cast<float>(dim))};
}

// Some rows of some sequences, as T holds them.
template <class T>
struct Case {
  Case(const AttentionShape& s, const std::vector<Part>& parts, uint64_t seed) : shape(s) {
    for (const Part& p : parts) {
      const Floats all_q = held<T>(normals(p.length * s.q_width(), ++seed, 1.5f));
      const Floats all_kv = held<T>(normals(p.length * s.kv_width(), ++seed));
      const Floats mine = part(all_q, p.position * s.q_width(), p.count * s.q_width());
      const Floats own = part(all_kv, p.position * s.kv_width(), p.count * s.kv_width());
      q.insert(q.end(), mine.begin(), mine.end());
      kv.insert(kv.end(), own.begin(), own.end());
      slices.push_back({rows, p.count, p.position});
      device_slices.push_back(
          {static_cast<int32_t>(rows), static_cast<int32_t>(p.count), static_cast<int32_t>(p.position), 0});
      const int64_t count = (p.length + kLatentPage - 1) / kLatentPage;
      sequences.emplace_back(static_cast<size_t>(count * kLatentPage * s.kv_width()), NAN);
      std::copy(all_kv.begin(), all_kv.end(), sequences.back().begin());
      rows += p.count;
      max_count = std::max(max_count, p.count);
      max_pages = std::max(max_pages, count);
    }
    device_slices.push_back({0, 0, 0, 0});  // padding
    for (const Floats& sequence : sequences) {
      pages.emplace_back();
      for (size_t at = 0; at < sequence.size(); at += static_cast<size_t>(kLatentPage * s.kv_width()))
        pages.back().push_back(sequence.data() + at);
    }
  }
  std::vector<AttentionSlice> cpu_slices() const {
    std::vector<AttentionSlice> v;
    for (size_t i = 0; i < slices.size(); ++i) v.push_back({slices[i], pages[i].data()});
    return v;
  }
  DeviceBatch batch(const DeviceSlice* on_device) const {
    DeviceBatch b;
    b.rows = static_cast<int32_t>(rows);
    b.slices = static_cast<int32_t>(device_slices.size());
    b.max_count = static_cast<int32_t>(max_count);
    b.max_pages = static_cast<int32_t>(max_pages);
    b.slice = on_device;
    return b;
  }
  AttentionShape shape;
  Floats q, kv;
  std::vector<Slice> slices;
  std::vector<DeviceSlice> device_slices;
  std::vector<Floats> sequences;  // whole pages; what lies past the last row is NaN
  std::vector<std::vector<const float*>> pages;
  int64_t rows = 0, max_count = 0, max_pages = 0;
};

struct Result {
  Floats out, lse;
};

template <class T>
Result on_cpu(const Case<T>& z) {
  static Context ctx(2);
  Result r{Floats(z.q.size()), Floats(static_cast<size_t>(z.rows * z.shape.heads))};
  attention_forward(ctx, z.shape, z.q.data(), z.cpu_slices(), r.out.data(), r.lse.data());
  r.out = held<T>(r.out);
  return r;
}

class AttentionDevice : public DeviceTest {
 protected:
  template <class T>
  static Result run(const Case<T>& z, const DeviceBatch& batch, int64_t offset, const T* kv) {
    Device& d = device();
    const DeviceArray<T> q(d, as<T>(z.q)), out(d, static_cast<int64_t>(z.q.size()));
    const DeviceArray<float> lse(d, z.rows * z.shape.heads);
    attention_forward<T>(d, z.shape, q, batch, offset, kv, out, lse);
    Result r{floats_of<T>(out.get()), lse.get()};
    attention_forward<T>(d, z.shape, q, batch, offset, kv, out, nullptr);
    EXPECT_EQ(first_difference(floats_of<T>(out.get()), r.out), -1) << "without lse";
    return r;
  }

  // Pages scattered, at an offset into their blocks, NaN where no row is; the batch's own rows are stored by the device.
  template <class T>
  static Result paged(const Case<T>& z) {
    Device& d = device();
    const int64_t page = kLatentPage * z.shape.kv_width(), offset = 256,
                  stride = offset / static_cast<int64_t>(sizeof(T)) + page + 64;
    int64_t total = 0;
    for (const auto& p : z.pages) total += static_cast<int64_t>(p.size());
    Floats host(static_cast<size_t>(total * stride), NAN);
    const DeviceArray<T> memory(d, total * stride);
    std::vector<std::byte*> table(z.device_slices.size() * static_cast<size_t>(z.max_pages), nullptr);
    int64_t n = 0;
    for (size_t i = 0; i < z.pages.size(); ++i)
      for (size_t p = 0; p < z.pages[i].size(); ++p, ++n) {
        const int64_t at = (total - 1 - n) * stride;
        for (int64_t j = 0; j < page; ++j) {
          const int64_t position = static_cast<int64_t>(p) * kLatentPage + j / z.shape.kv_width();
          if (position < z.slices[i].position)
            host[static_cast<size_t>(at + offset / static_cast<int64_t>(sizeof(T)) + j)] = z.pages[i][p][j];
        }
        table[i * static_cast<size_t>(z.max_pages) + p] = reinterpret_cast<std::byte*>(memory.data() + at);
      }
    const std::vector<T> values = as<T>(host);
    d.copy_in(memory, values.data(), static_cast<int64_t>(values.size() * sizeof(T)));
    const DeviceArray<std::byte*> pages(d, table),
        recurrent(d, std::vector<std::byte*>(z.device_slices.size()));
    const DeviceArray<DeviceSlice> slices(d, z.device_slices);
    DeviceBatch batch = z.batch(slices);
    batch.pages = pages;
    batch.recurrent = recurrent;
    const DeviceArray<T> kv(d, as<T>(z.kv));
    attention_store<T>(d, z.shape, kv, batch, offset);
    return run<T>(z, batch, offset, nullptr);
  }

  template <class T>
  static Result training(const Case<T>& z) {
    const DeviceArray<DeviceSlice> slices(device(), z.device_slices);
    const DeviceArray<T> kv(device(), as<T>(z.kv));
    return run<T>(z, z.batch(slices), 0, kv.data());
  }

  static void expect_same(const Result& got, const Result& want) {
    EXPECT_EQ(first_difference(got.out, want.out), -1);
    EXPECT_EQ(first_difference(got.lse, want.lse), -1);
  }

  template <class T>
  static void prefill() {
    for (const auto& s : {shape_of(1, 1, 2), shape_of(4, 2, 16), shape_of(6, 2, 10), shape_of(3, 3, 50),
                          shape_of(24, 1, 64), shape_of(4, 2, 256)}) {
      SCOPED_TRACE(s.dim);
      const Case<T> z(
          s,
          {{1, 0, 1}, {130, 0, 130}, {63, 0, 63}, {65, 3, 62}, {700, 500, 200}, {600, 64, 65}, {15, 15, 0}},
          3);
      expect_same(paged(z), on_cpu(z));
    }
  }
  template <class T>
  static void decode() {
    for (const auto& s : {shape_of(4, 2, 32), shape_of(1, 1, 18), shape_of(40, 2, 128)}) {
      SCOPED_TRACE(s.dim);
      std::vector<Part> parts;
      for (const int64_t t : {0, 1, 62, 63, 64, 65, 511, 512, 513, 575, 576, 1000, 1023, 1024, 1025, 1099})
        if (s.dim < 100 || t % 64 == 63) parts.push_back({t + 1, t, 1});
      const Case<T> z(s, parts, 5);
      expect_same(paged(z), on_cpu(z));
      const Case<T> near(s, {{1, 0, 1}, {64, 63, 1}, {65, 64, 1}, {400, 399, 1}}, 6);  // one span
      expect_same(paged(near), on_cpu(near));
    }
  }
  template <class T>
  static void backward() {
    Context ctx(2);
    Device& d = device();
    for (const auto& s : {shape_of(3, 3, 40), shape_of(4, 2, 34), shape_of(1, 1, 2), shape_of(10, 2, 16),
                          shape_of(2, 1, 256), shape_of(40, 1, 32)}) {
      SCOPED_TRACE(s.dim);
      const Case<T> z(
          s, {{1, 0, 1}, {65, 0, 65}, {15, 0, 15}, {0, 0, 0}, {300, 0, 300}, {33, 0, 33}, {64, 0, 64}}, 9);
      expect_same(training(z), on_cpu(z));
      const Result f = on_cpu(z);
      const Floats dout = held<T>(normals(static_cast<int64_t>(f.out.size()), 11));
      Floats dq(z.q.size()), dkv(z.kv.size());
      attention_backward(ctx, s, z.q.data(), z.kv.data(), z.slices, f.out.data(), f.lse.data(), dout.data(),
                         dq.data(), dkv.data());
      const DeviceArray<DeviceSlice> slices(d, z.device_slices);
      const DeviceArray<T> q(d, as<T>(z.q)), kv(d, as<T>(z.kv)), out(d, as<T>(f.out)), g(d, as<T>(dout));
      const DeviceArray<float> lse(d, f.lse);
      const DeviceArray<T> got_dq(d, q.size()), got_dkv(d, kv.size());
      attention_backward<T>(d, s, q, kv, z.batch(slices), out, lse, g, got_dq, got_dkv);
      EXPECT_EQ(first_difference(floats_of<T>(got_dq.get()), held<T>(dq)), -1) << s.heads << " heads";
      EXPECT_EQ(first_difference(floats_of<T>(got_dkv.get()), held<T>(dkv)), -1) << s.heads << " heads";
    }
  }

  template <class T>
  static void rotation() {
    Context ctx(2);
    Device& d = device();
    const std::vector<Part> parts = {{0, 0, 1},        {0, 3, 100},        {0, 4095, 2},
                                     {0, 1000000, 70}, {0, 2147480000, 5}, {0, 7, 0}};
    std::vector<Slice> slices;
    std::vector<DeviceSlice> device_slices;
    int64_t rows = 0;
    for (const Part& p : parts) {
      slices.push_back({rows, p.count, p.position});
      device_slices.push_back(
          {static_cast<int32_t>(rows), static_cast<int32_t>(p.count), static_cast<int32_t>(p.position), 0});
      rows += p.count;
    }
    const DeviceArray<DeviceSlice> on_device(d, device_slices);
    DeviceBatch batch;
    batch.rows = static_cast<int32_t>(rows);
    batch.slices = static_cast<int32_t>(slices.size());
    batch.max_count = 100;
    batch.slice = on_device;
    for (const int64_t dim : {2, 6, 64, 256}) {
      const int64_t heads = 3, head_stride = dim + 5, row_stride = heads * head_stride + 4;
      const std::vector<uint64_t> steps = rope_steps(dim, 10000.0);
      const Floats x = held<T>(normals(rows * row_stride, 17));
      for (const bool back : {false, true}) {
        Floats want = x;
        if (back)
          rope_backward(ctx, slices, heads, dim, steps, want.data(), head_stride, row_stride);
        else
          rope_forward(ctx, slices, heads, dim, steps, want.data(), head_stride, row_stride);
        const DeviceArray<T> got(d, as<T>(x));
        if (back)
          rope_backward<T>(d, batch, heads, dim, steps, got, head_stride, row_stride);
        else
          rope_forward<T>(d, batch, heads, dim, steps, got, head_stride, row_stride);
        EXPECT_EQ(first_difference(floats_of<T>(got.get()), held<T>(want)), -1) << dim << " " << back;
      }
    }
  }
};

TEST_F(AttentionDevice, prefill) {
  prefill<float>();
  prefill<bf16>();
}
TEST_F(AttentionDevice, decoding) {
  decode<float>();
  decode<bf16>();
}
TEST_F(AttentionDevice, training_and_its_gradients) {
  backward<float>();
  backward<bf16>();
}
TEST_F(AttentionDevice, rotation) {
  rotation<float>();
  rotation<bf16>();
}

}  // namespace
}  // namespace perigee::kernels
