// Attention over bf16 pages on the device: against the definition in double, and against itself, bit for bit, however
// the rows reach it.
#include <algorithm>
#include <map>

#include "kernels/mla/mla_device.h"
#include "kernels/norm/norm.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/mla/case.h"

namespace perigee::kernels {
namespace {

using testing::normals;
using MlaBf16 = DeviceTest;

// What a row of attention leaves.
struct Row {
  std::vector<uint16_t> out;
  std::vector<float> lse;
  bool operator==(const Row&) const = default;
};

struct Part {
  int sequence;
  int64_t position, count;
};

// Sequences with their latent rows in pages that lie apart, in no order, poisoned past the last row.
class Sequences {
 public:
  Sequences(Device& device, const MlaShape& shape, std::vector<int64_t> lengths, float q_scale = 1.0f)
      : device_(device), shape_(shape), lengths_(std::move(lengths)) {
    const std::vector<float> pool = normals(100'003, 5);
    const int64_t q_row = shape.heads * shape.width();
    int64_t total = 0, pages = 0;
    for (int64_t n : lengths_) {
      begin_.push_back(total);
      first_page_.push_back(pages);
      total += n;
      pages += (n + kLatentPage - 1) / kLatentPage;
      max_pages_ = std::max(max_pages_, (n + kLatentPage - 1) / kLatentPage);
    }
    q_.resize(static_cast<size_t>(total * q_row));
    for (size_t i = 0; i < q_.size(); ++i) q_[i] = {to_bf16(q_scale * pool[i * 31 % pool.size()])};
    kv_.resize(static_cast<size_t>(total * shape.width()));
    for (size_t i = 0; i < kv_.size(); ++i) kv_[i] = pool[(i * 17 + 9) % pool.size()];
    norm_w_ = normals(shape.latent, 6);
    block_bytes_ = kOffset + latent_page_bytes<bf16>(shape) + 384;
    blocks_ = std::make_unique<DeviceArray<std::byte>>(device, pages * block_bytes_);
    pages_ = pages;
    c_device_ = std::make_unique<DeviceArray<bf16>>(device, total * shape.width());
    // Rows are written in parts, as a prompt and then tokens.
    DeviceArray<float> kv(device, kv_), w(device, norm_w_);
    for (size_t s = 0; s < lengths_.size(); ++s) {
      const int64_t cut = lengths_[s] / 3;
      for (const Part& p :
           {Part{static_cast<int>(s), 0, cut}, Part{static_cast<int>(s), cut, lengths_[s] - cut}}) {
        if (p.count == 0) continue;
        const Batch b(*this, {p}, false);
        const int64_t row = begin_[s] + p.position;
        latent_store<bf16>(device, shape, kv + row * shape.width(), w, kEps, b.batch, kOffset,
                           *c_device_ + row * shape.width());
        device.synchronize();
      }
    }
    c_ = c_device_->get();
  }

  // The parts as one batch; in training their rows of c go along.
  std::vector<Row> attend(const std::vector<Part>& parts, bool training = false) const {
    Batch b(*this, parts, training);
    std::vector<bf16> q, c;
    for (const Part& p : parts) {
      const int64_t first = begin_[static_cast<size_t>(p.sequence)] + p.position,
                    row = shape_.heads * shape_.width();
      q.insert(q.end(), q_.begin() + first * row, q_.begin() + (first + p.count) * row);
      c.insert(c.end(), c_.begin() + first * shape_.width(), c_.begin() + (first + p.count) * shape_.width());
    }
    DeviceArray<bf16> dq(device_, q), dc(device_, c),
        out(device_, b.batch.rows * shape_.heads * shape_.latent);
    DeviceArray<float> lse(device_, b.batch.rows * shape_.heads);
    mla_forward<bf16>(device_, shape_, dq, b.batch, training ? 0 : kOffset, training ? dc.data() : nullptr,
                      out, lse);
    device_.synchronize();
    const std::vector<bf16> o = out.get();
    const std::vector<float> l = lse.get();
    std::vector<Row> rows(static_cast<size_t>(b.batch.rows));
    for (size_t r = 0; r < rows.size(); ++r) {
      const size_t n = static_cast<size_t>(shape_.heads * shape_.latent),
                   h = static_cast<size_t>(shape_.heads);
      for (size_t i = 0; i < n; ++i) rows[r].out.push_back(o[r * n + i].bits);
      rows[r].lse.assign(l.begin() + static_cast<int64_t>(r * h),
                         l.begin() + static_cast<int64_t>((r + 1) * h));
    }
    return rows;
  }
  std::vector<Row> whole(int sequence, bool training = false) const {
    return attend({{sequence, 0, lengths_[static_cast<size_t>(sequence)]}}, training);
  }

  // Row t of a sequence by the definition, in double.
  void expect_close(int sequence, int64_t t, const Row& row) const {
    const int64_t first = begin_[static_cast<size_t>(sequence)], width = shape_.width();
    std::vector<double> want, lse;
    for (int64_t h = 0; h < shape_.heads; ++h) {
      std::vector<double> s(static_cast<size_t>(t + 1)), o(static_cast<size_t>(shape_.latent));
      double most = -INFINITY, sum = 0;
      for (int64_t i = 0; i <= t; ++i) {
        double dot = 0;
        for (int64_t j = 0; j < width; ++j)
          dot += wide(q_, ((first + t) * shape_.heads + h) * width + j) * wide(c_, (first + i) * width + j);
        s[static_cast<size_t>(i)] = dot * static_cast<double>(shape_.scale);
        most = std::max(most, s[static_cast<size_t>(i)]);
      }
      for (double& x : s) sum += x = std::exp(x - most);
      for (int64_t i = 0; i <= t; ++i)
        for (int64_t j = 0; j < shape_.latent; ++j)
          o[static_cast<size_t>(j)] += s[static_cast<size_t>(i)] / sum * wide(c_, (first + i) * width + j);
      want.insert(want.end(), o.begin(), o.end());
      lse.push_back(most + std::log(sum));
    }
    std::vector<bf16> got;
    for (uint16_t bits : row.out) got.push_back({bits});
    // Two roundings to bf16, of the weights and of the result, of 2^-9 at most and half of that in the mean square.
    EXPECT_LT(kernels::relative_error(got, want), 1.0 / 256) << "sequence " << sequence << " row " << t;
    for (size_t h = 0; h < lse.size(); ++h)
      EXPECT_NEAR(row.lse[h], lse[h], 2e-5 * (1 + std::abs(lse[h]))) << "row " << t << " head " << h;
  }

  const std::vector<bf16>& c() const { return c_; }
  const std::vector<float>& kv() const { return kv_; }
  const std::vector<float>& norm_w() const { return norm_w_; }
  static constexpr float kEps = 1e-6f;
  static constexpr int64_t kOffset = 1280;

 private:
  static double wide(const std::vector<bf16>& x, int64_t i) {
    return from_bf16(x[static_cast<size_t>(i)].bits);
  }

  struct Batch {
    Batch(const Sequences& s, const std::vector<Part>& parts, bool training) {
      std::vector<DeviceSlice> slices;
      std::vector<std::byte*> table;
      for (const Part& p : parts) {
        slices.push_back({batch.rows, static_cast<int32_t>(p.count), static_cast<int32_t>(p.position), 0});
        batch.rows += static_cast<int32_t>(p.count);
        batch.max_count = std::max(batch.max_count, static_cast<int32_t>(p.count));
        for (int64_t i = 0; i < s.max_pages_; ++i) {
          const int64_t page = s.first_page_[static_cast<size_t>(p.sequence)] + i;
          // 7 and the number of pages may share a factor; then the pages lie in order.
          const int64_t place = s.pages_ % 7 == 0 ? page : page * 7 % s.pages_;
          table.push_back(page < s.pages_ ? s.blocks_->data() + place * s.block_bytes_ : nullptr);
        }
      }
      batch.slices = static_cast<int32_t>(slices.size());
      batch.max_pages = static_cast<int32_t>(s.max_pages_);
      slice = std::make_unique<DeviceArray<DeviceSlice>>(s.device_, slices);
      pages = std::make_unique<DeviceArray<std::byte*>>(s.device_, table);
      batch.slice = *slice;
      if (training) return;
      batch.pages = *pages;
      batch.recurrent = *pages;
    }
    DeviceBatch batch;
    std::unique_ptr<DeviceArray<DeviceSlice>> slice;
    std::unique_ptr<DeviceArray<std::byte*>> pages;
  };

  Device& device_;
  MlaShape shape_;
  std::vector<int64_t> lengths_, begin_, first_page_;
  int64_t max_pages_ = 0, pages_ = 0, block_bytes_ = 0;
  std::vector<bf16> q_, c_;
  std::vector<float> kv_, norm_w_;
  std::unique_ptr<DeviceArray<std::byte>> blocks_;
  std::unique_ptr<DeviceArray<bf16>> c_device_;
};

MlaShape shape_of(int64_t heads, int64_t latent, int64_t rope) {
  return testing::shape_of(heads, latent, rope);
}

TEST_F(MlaBf16, rows_are_normalised_as_on_the_cpu_and_rounded) {
  const MlaShape shape = shape_of(1, 72, 24);
  Sequences s(device(), shape, {130});
  Context ctx(1);
  std::vector<float> y(130 * 72);
  rms_norm_forward(ctx, 130, 72, s.kv().data(), 96, s.norm_w().data(), Sequences::kEps, y.data(), 72);
  for (int64_t r = 0; r < 130; ++r)
    for (int64_t j = 0; j < 96; ++j) {
      const float x = j < 72 ? y[static_cast<size_t>(r * 72 + j)] : s.kv()[static_cast<size_t>(r * 96 + j)];
      ASSERT_EQ(s.c()[static_cast<size_t>(r * 96 + j)].bits, to_bf16(x)) << r << " " << j;
    }
}

TEST_F(MlaBf16, follows_the_definition) {
  for (const MlaShape& shape :
       {shape_of(32, 512, 64), shape_of(4, 512, 64), shape_of(3, 48, 16), shape_of(40, 64, 0),
        shape_of(70, 128, 64), shape_of(5, 200, 24), shape_of(2, 512, 0)}) {
    Sequences s(device(), shape, {200});
    const std::vector<Row> rows = s.whole(0);
    for (int64_t t : {0, 1, 62, 63, 64, 65, 127, 128, 199})
      s.expect_close(0, t, rows[static_cast<size_t>(t)]);
    for (int64_t t : {0, 63, 64, 199}) s.expect_close(0, t, s.attend({{0, t, 1}})[0]);
  }
}

TEST_F(MlaBf16, follows_the_definition_over_many_splits) {
  Sequences s(device(), shape_of(4, 512, 64), {5000});
  const std::vector<Row> rows = s.whole(0);
  for (int64_t t : {255, 256, 257, 1000, 2047, 2048, 4095, 4096, 4999})
    s.expect_close(0, t, rows[static_cast<size_t>(t)]);
}

TEST_F(MlaBf16, large_scores_neither_overflow_nor_vanish) {
  // Scores of some hundreds: the reference moves again and again.
  Sequences s(device(), shape_of(32, 512, 64), {700}, 40.0f);
  const std::vector<Row> rows = s.whole(0);
  for (int64_t t : {0, 64, 300, 699}) s.expect_close(0, t, rows[static_cast<size_t>(t)]);
  for (int64_t t : {63, 64, 300, 511, 512, 699})
    EXPECT_EQ(s.attend({{0, t, 1}})[0], rows[static_cast<size_t>(t)]) << t;
}

TEST_F(MlaBf16, decoding_prefill_and_training_give_the_same_bits) {
  for (const MlaShape& shape : {shape_of(32, 512, 64), shape_of(3, 48, 16), shape_of(70, 128, 64)}) {
    const std::vector<int64_t> lengths = {1, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1000};
    Sequences s(device(), shape, lengths);
    std::vector<Row> expected;
    std::vector<Part> all;
    for (size_t i = 0; i < lengths.size(); ++i) {
      const std::vector<Row> rows = s.whole(static_cast<int>(i));
      expected.insert(expected.end(), rows.begin(), rows.end());
      all.push_back({static_cast<int>(i), 0, lengths[i]});
    }
    EXPECT_EQ(s.attend(all), expected) << "together";
    EXPECT_EQ(s.attend(all, true), expected) << "in training";
    // Every row of all sequences as a batch of single tokens, padded with nothing, in pieces.
    std::vector<Part> singles;
    for (const Part& p : all)
      for (int64_t t = 0; t < p.count; ++t) singles.push_back({p.sequence, t, 1});
    EXPECT_EQ(s.attend(singles), expected) << "decoding all at once";
    for (size_t i = 0; i < singles.size(); i += 97)
      EXPECT_EQ(s.attend({singles[i]})[0], expected[i]) << "decoding row " << i << " alone";
  }
}

TEST_F(MlaBf16, padding_entries_are_passed_over) {
  Sequences s(device(), shape_of(32, 512, 64), {300, 70});
  const std::vector<Part> parts = {{0, 299, 1}, {1, 69, 1}, {0, 100, 1}}, prompt = {{0, 10, 200}, {1, 0, 70}};
  const Part nothing = {0, 0, 0};
  EXPECT_EQ(s.attend({nothing, parts[0], parts[1], nothing, nothing, parts[2], nothing}), s.attend(parts));
  EXPECT_EQ(s.attend({prompt[0], nothing, prompt[1], nothing}), s.attend(prompt));
}

TEST_F(MlaBf16, splits_of_a_prompt_do_not_matter) {
  Sequences s(device(), shape_of(32, 512, 64), {1300});
  const std::vector<Row> expected = s.whole(0);
  Random random(4);
  for (int round = 0; round < 4; ++round) {
    std::vector<Row> got;
    std::vector<Part> together;
    for (int64_t at = 0; at < 1300;) {
      const int64_t n = std::min<int64_t>(1300 - at, 1 + static_cast<int64_t>(random.next_float() * 400));
      const std::vector<Row> rows = s.attend({{0, at, n}});
      got.insert(got.end(), rows.begin(), rows.end());
      together.push_back({0, at, n});
      at += n;
    }
    EXPECT_EQ(got, expected);
    EXPECT_EQ(s.attend(together), expected);
  }
}

TEST_F(MlaBf16, long_sequences_decode_to_the_bits_of_prefill) {
  Sequences s(device(), shape_of(4, 512, 64), {5000, 17000});
  for (int sequence : {0, 1}) {
    const std::vector<Row> expected = s.whole(sequence);
    std::vector<Part> some;
    for (int64_t t : {2047, 2048, 3000, 4095, 4096, 4999, 16383, 16384, 16999})
      if (t < static_cast<int64_t>(expected.size())) some.push_back({sequence, t, 1});
    const std::vector<Row> together = s.attend(some);
    for (size_t i = 0; i < some.size(); ++i) {
      EXPECT_EQ(together[i], expected[static_cast<size_t>(some[i].position)]) << some[i].position;
      EXPECT_EQ(s.attend({some[i]})[0], together[i]) << some[i].position;
    }
  }
}

}  // namespace
}  // namespace perigee::kernels
