// The launches that do all of latent attention between its products, for a few short sequences, have the bits of the
// separate calls.
#include <algorithm>

#include "base/random.h"
#include "kernels/gemm/gemm_device.h"
#include "kernels/mla/mla_layer_device.h"
#include "tests/kernels/device_fixture.h"

namespace perigee::kernels {
namespace {

using MlaLayer = DeviceTest;

constexpr int64_t kNope = 128, kV = 128, kOffset = 1280;
constexpr float kEps = 1e-6f;

std::vector<float> normals(Random& random, int64_t n, float scale) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = scale * static_cast<float>(random.next_normal());
  return x;
}

// Matrices of heads, and pages that hold tokens of any kind before the one that is decoded, and after it what is no
// number.
class Layer {
 public:
  Layer(Device& device, int64_t heads)
      : device_(device),
        shape_{heads, 512, 64, 0.07f},
        random_(heads),
        absorb_k_(device, matrices(512, kNope)),
        absorb_v_(device, matrices(kV, 512)),
        norm_w_(device, normals(random_, 512, 1.0f)) {}

  // One step of these positions, -1 for padding; true where the launches made it. `loud`: large scores.
  bool expect_same(const std::vector<int32_t>& positions, int64_t max_pages, float loud) {
    const int64_t rows = static_cast<int64_t>(positions.size()), H = shape_.heads, width = shape_.width(),
                  q_width = kNope + shape_.rope, block = kOffset + latent_page_bytes<bf16>(shape_) + 384;
    const DeviceArray<bf16> q(device_, narrow(normals(random_, rows * H * q_width, loud)));
    const DeviceArray<float> kv(device_, normals(random_, rows * width, 1.0f));
    std::vector<DeviceSlice> slices;
    for (int32_t r = 0; r < rows; ++r)
      slices.push_back(positions[static_cast<size_t>(r)] < 0
                           ? DeviceSlice{r, 0, 0, 0}
                           : DeviceSlice{r, 1, positions[static_cast<size_t>(r)], 0});
    // Blocks in the order of their use turned round.
    std::vector<uint16_t> memory(static_cast<size_t>(rows * max_pages * block / 2), 0xffff);
    std::vector<int64_t> at(static_cast<size_t>(rows * max_pages));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t p = 0; p < max_pages; ++p) {
        const int64_t place = (rows * max_pages - 1 - r * max_pages - p) * block;
        at[static_cast<size_t>(r * max_pages + p)] = place;
        for (int64_t t = 0; t < 64 && p * 64 + t < positions[static_cast<size_t>(r)]; ++t)
          for (int64_t j = 0; j < width; ++j)
            memory[static_cast<size_t>((place + kOffset) / 2 + tiled_index(width, t, j))] = next_element();
      }
    const DeviceArray<uint16_t> parts_memory(device_, memory), whole_memory(device_, memory);
    const auto table = [&](const DeviceArray<uint16_t>& of) {
      std::vector<std::byte*> pages;
      for (const int64_t place : at) pages.push_back(reinterpret_cast<std::byte*>(of.data()) + place);
      return pages;
    };
    const DeviceArray<std::byte*> parts_pages(device_, table(parts_memory)),
        whole_pages(device_, table(whole_memory));
    const DeviceArray<DeviceSlice> entries(device_, slices);
    std::byte* recurrent = nullptr;
    DeviceBatch batch;
    batch.rows = batch.slices = static_cast<int32_t>(rows);
    batch.max_count = 1, batch.max_pages = static_cast<int32_t>(max_pages);
    batch.slice = entries, batch.recurrent = &recurrent;

    batch.pages = parts_pages;
    const DeviceArray<bf16> absorbed(device_, rows * H * width), latent(device_, rows * H * 512),
        expected(device_, rows * H * kV), got(device_, rows * H * kV);
    latent_store<bf16>(device_, shape_, kv, norm_w_, kEps, batch, kOffset, nullptr);
    std::vector<DeviceMatmulTask<bf16>> tasks;
    for (int64_t h = 0; h < H; ++h)
      tasks.push_back({absorb_k_.data() + h * kMatrix, 512, kNope, q + h * q_width, H * q_width, rows,
                       absorbed + h * width, H * width, Store::kAct});
    matmul<bf16>(device_, tasks);
    device_.copy_2d(absorbed + 512, width * 2, q + kNope, q_width * 2, 128, rows * H);
    mla_forward<bf16>(device_, shape_, absorbed, batch, kOffset, nullptr, latent, nullptr);
    tasks.clear();
    for (int64_t h = 0; h < H; ++h)
      tasks.push_back({absorb_v_.data() + h * kMatrix, kV, 512, latent + h * 512, H * 512, rows,
                       expected + h * kV, H * kV, Store::kAct});
    matmul<bf16>(device_, tasks);

    batch.pages = whole_pages;
    MlaDecodeLayer layer;
    layer.q = q, layer.kv = kv, layer.norm_w = norm_w_, layer.eps = kEps;
    layer.absorb_k = absorb_k_, layer.absorb_v = absorb_v_;
    layer.absorb_k_step = layer.absorb_v_step = kMatrix * 2;
    if (!mla_decode_layer(device_, shape_, layer, batch, kOffset, got)) return false;
    device_.synchronize();
    const std::vector<float> a = widen(expected.get()), b = widen(got.get());
    for (int64_t r = 0; r < rows; ++r) {
      if (positions[static_cast<size_t>(r)] < 0) continue;
      const auto from = static_cast<size_t>(r * H * kV), to = from + static_cast<size_t>(H * kV);
      EXPECT_EQ(first_difference({b.begin() + from, b.begin() + to}, {a.begin() + from, a.begin() + to}), -1)
          << "row " << r << " at " << positions[static_cast<size_t>(r)] << " of " << rows << ", " << H
          << " heads";
      EXPECT_TRUE(std::all_of(a.begin() + from, a.begin() + to, [](float x) { return x == x; }));
    }
    EXPECT_TRUE(parts_memory.get() == whole_memory.get()) << "pages";
    return true;
  }

 private:
  static constexpr int64_t kMatrix = 512 * 128;

  std::vector<bf16> matrices(int64_t n, int64_t k) {
    std::vector<bf16> tiles(static_cast<size_t>(shape_.heads * kMatrix));
    for (int64_t h = 0; h < shape_.heads; ++h)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j)
          tiles[static_cast<size_t>(h * kMatrix + tiled_index(k, i, j))] = {
              to_bf16(0.1f * static_cast<float>(random_.next_normal()))};
    return tiles;
  }
  // Of a prime number of normal values, again and again: many rows are wanted.
  uint16_t next_element() {
    if (pool_.empty())
      for (const float x : normals(random_, 100'003, 1.0f)) pool_.push_back(to_bf16(x));
    return pool_[pool_at_++ % pool_.size()];
  }

  Device& device_;
  MlaShape shape_;
  Random random_;
  DeviceArray<bf16> absorb_k_, absorb_v_;
  DeviceArray<float> norm_w_;
  std::vector<uint16_t> pool_;
  size_t pool_at_ = 0;
};

TEST_F(MlaLayer, a_decoded_row_has_the_bits_of_the_parts) {
  if (device().info().capability != 90) return;
  Layer layer(device(), 32);
  for (const float loud : {1.0f, 12.0f}) {
    for (const int32_t position : {0, 1, 31, 32, 63, 64, 100, 255, 256, 257, 320, 511, 1000, 1023})
      EXPECT_TRUE(layer.expect_same({position}, position < 512 ? 8 : 16, loud));
    for (const int32_t position : {5, 700, 1023, 1024, 1030, 1535, 1536, 2047})
      EXPECT_TRUE(layer.expect_same({position}, 32, loud));
    for (const int32_t position : {77, 1023, 1500, 3000, 4095})
      EXPECT_TRUE(layer.expect_same({position}, 64, loud));
    for (const int32_t position : {900, 3000, 4096, 5119, 5120, 6000, 8191})
      EXPECT_TRUE(layer.expect_same({position}, 128, loud));
    for (const int32_t position : {4160, 12000, 16383}) EXPECT_TRUE(layer.expect_same({position}, 256, loud));
  }
}

TEST_F(MlaLayer, decoded_rows_have_the_bits_of_the_parts) {
  if (device().info().capability != 90) return;
  Layer layer(device(), 32);
  EXPECT_TRUE(layer.expect_same({300, -1, 17, 800}, 16, 1.0f));
  EXPECT_TRUE(layer.expect_same({1300, 40}, 32, 1.0f));
  EXPECT_TRUE(layer.expect_same({64, 63, -1, 500, 0, 128, 257, -1}, 8, 1.0f));
  EXPECT_TRUE(layer.expect_same({630, 1, 900, 257}, 16, 4.0f));
  EXPECT_TRUE(layer.expect_same({3000, 2048}, 64, 1.0f));
  EXPECT_TRUE(layer.expect_same({5000, 3000}, 128, 1.0f));
  Layer wide(device(), 64);
  EXPECT_TRUE(wide.expect_same({300, 900}, 16, 1.0f));
}

TEST_F(MlaLayer, what_it_does_not_do_it_declines) {
  DeviceBatch batch;
  std::byte* none = nullptr;
  batch.recurrent = &none;
  batch.rows = batch.slices = 1, batch.max_count = 1, batch.max_pages = 8;
  const bool can = device().info().capability == 90;
  const auto decodes = [&](int64_t heads, int64_t latent, int64_t rope, int64_t nope, int64_t v) {
    return mla_decodes_layer(device(), {heads, latent, rope, 1.0f}, nope, v, batch);
  };
  EXPECT_EQ(decodes(32, 512, 64, 128, 128), can);
  EXPECT_FALSE(decodes(16, 512, 64, 128, 128));
  EXPECT_FALSE(decodes(32, 256, 64, 128, 128));
  EXPECT_FALSE(decodes(32, 512, 32, 128, 128));
  EXPECT_FALSE(decodes(32, 512, 64, 64, 128));
  EXPECT_FALSE(decodes(32, 512, 64, 128, 64));
  batch.max_pages = 512;
  EXPECT_FALSE(decodes(32, 512, 64, 128, 128));
  batch.max_pages = 8, batch.max_count = 2;
  EXPECT_FALSE(decodes(32, 512, 64, 128, 128));
  batch.max_count = 1, batch.rows = batch.slices = 16;
  EXPECT_FALSE(decodes(32, 512, 64, 128, 128));
}

}  // namespace
}  // namespace perigee::kernels
