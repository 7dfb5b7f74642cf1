#include "policy/weights/safetensors.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>

#include "base/error.h"
#include "base/random.h"
#include "tests/base/temp_directory.h"

namespace perigee::policy {
namespace {

std::string with_header(const std::string& header, size_t data_bytes) {
  const uint64_t n = header.size();
  std::string out(8, '\0');
  std::memcpy(out.data(), &n, 8);
  return out + header + std::string(data_bytes, 'x');
}

void put(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

template <class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
    return e.what();
  }
  return "no error";
}

// Three tensors of three types, one empty.
std::string valid_file() {
  const TempDirectory dir;
  const std::vector<float> a{1, -2.5f, 3, 0, 5e-8f, 7};
  const std::vector<uint16_t> b{0x3F80, 0xC000, 0x7F80};
  const std::vector<int64_t> c{-1, 1ll << 40};
  const NamedTensor tensors[] = {{{"a", TensorType::kF32, {2, 3}}, a.data()},
                                 {{"empty", TensorType::kF32, {0, 5}}, nullptr},
                                 {{"model.b", TensorType::kBf16, {3}}, b.data()},
                                 {{"c", TensorType::kI64, {2, 1}}, c.data()}};
  write_safetensors(dir / "f", tensors, {{"format", "pt"}});
  return read_file(dir / "f");
}

TEST(Safetensors, WhatIsWrittenIsRead) {
  const TempDirectory dir;
  put(dir / "f.safetensors", valid_file());
  SafetensorsFile opened(dir / "f.safetensors");
  const SafetensorsFile file = std::move(opened);  // views survive a move
  ASSERT_EQ(file.tensors().size(), 4u);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.find("nothing"), nullptr);
  const TensorView& a = *file.find("a");
  EXPECT_EQ(a.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(to_float32(a), (std::vector<float>{1, -2.5f, 3, 0, 5e-8f, 7}));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(file.tensors()[0].data) % 64, 0u)
      << "the data of a written file is aligned";
  EXPECT_EQ(to_float32(*file.find("model.b")), (std::vector<float>{1, -2, INFINITY}));
  EXPECT_EQ(to_int64(*file.find("c")), (std::vector<int64_t>{-1, 1ll << 40}));
  EXPECT_EQ(file.find("empty")->elements, 0);
  float two[2];
  to_float32(a, 1, 2, two);
  EXPECT_EQ(two[0], -2.5f);
  EXPECT_EQ(two[1], 3);
  EXPECT_NE(error_of([&] { to_float32(*file.find("c")); }).find("I64 where floating point"),
            std::string::npos);
  EXPECT_NE(error_of([&] { to_int64(a); }).find("F32 where integers"), std::string::npos);
}

// The bytes of the format itself, so that a reader and a writer wrong in the same way would show.
TEST(Safetensors, AFileMadeByHandIsRead) {
  const TempDirectory dir;
  std::string bytes =
      with_header(R"({"x":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"s":{"dtype":"I32","shape":[],)"
                  R"("data_offsets":[4,8]}}   )",
                  0);
  bytes += std::string("\x00\x3c\x01\x80", 4) + std::string("\xfe\xff\xff\xff", 4);
  put(dir / "f", bytes);
  const SafetensorsFile file(dir / "f");
  EXPECT_EQ(to_float32(*file.find("x")), (std::vector<float>{1, -0x1p-24f}));
  EXPECT_EQ(file.find("s")->shape.size(), 0u);
  EXPECT_EQ(to_int64(*file.find("s")), (std::vector<int64_t>{-2}));
}

// A definition of binary16 by powers, for every bit pattern.
TEST(Safetensors, EveryHalfIsWidenedExactly) {
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  TensorView t;
  t.type = TensorType::kF16;
  t.elements = 65536;
  t.data = reinterpret_cast<const std::byte*>(all.data());
  const std::vector<float> x = to_float32(t);
  for (size_t i = 0; i < all.size(); ++i) {
    const int exponent = static_cast<int>((i >> 10) & 31), mantissa = static_cast<int>(i & 1023);
    double want = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) want = mantissa == 0 ? INFINITY : NAN;
    if (i >> 15) want = -want;
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(x[i])) << i;
    } else {
      ASSERT_EQ(static_cast<double>(x[i]), want) << i;
    }
    ASSERT_EQ(std::signbit(x[i]), (i >> 15) != 0) << i;
  }
}

TEST(Safetensors, Float32IsRoundedToBfloat16AndBackExactly) {
  const TempDirectory dir;
  // 1 + 2^-8 is halfway between 1 and 1 + 2^-7: to even.
  const std::vector<float> x{1 + 0x1p-8f, 1 + 0x3p-8f, -3, 1e-40f, NAN, INFINITY};
  const TensorSpec spec{"x", TensorType::kBf16, {6}};
  SafetensorsWriter out(dir / "f", {&spec, 1});
  out.write_float32(x.data(), 6, TensorType::kBf16);
  EXPECT_EQ(out.remaining_bytes(), 0);
  out.commit();
  const SafetensorsFile file(dir / "f");
  const std::vector<float> y = to_float32(file.tensors()[0]);
  EXPECT_EQ(y[0], 1);
  EXPECT_EQ(y[1], 1 + 0x1p-6f);
  EXPECT_EQ(y[2], -3);
  EXPECT_TRUE(std::isnan(y[4]));
  EXPECT_EQ(first_non_finite(y.data(), 6), 4);
  EXPECT_EQ(first_non_finite(y.data(), 4), std::nullopt);
}

TEST(Safetensors, DamageIsNamed) {
  const std::string one = R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  const struct {
    std::string bytes;
    const char* says;
  } cases[] = {
      {"", "not a safetensors file: 0 bytes"},
      {"abc", "not a safetensors file: 3 bytes"},
      {std::string(8, '\xff'), "its header would have 18446744073709551615 bytes"},
      {with_header(one, 8).substr(0, 30), "the file only 30; it is truncated"},
      {with_header(one, 7),
       "tensor \"x\": data_offsets [0,8] reach outside the 7 bytes of data; the file is truncated"},
      {with_header(one, 9), "1 bytes of data belong to no tensor"},
      {with_header(" " + one, 8), "does not start with '{'"},
      {with_header("{\"x\":", 0), "not JSON"},
      {with_header("{\"x\": 1}", 0), "tensor \"x\": its header is not"},
      {with_header(one.substr(0, one.size() - 1) + "," + one.substr(1), 8), "the key \"x\" stands twice"},
      {with_header(R"({"x":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}})", 2),
       "dtype \"F8_E4M3\" is not supported"},
      {with_header(R"({"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", 8),
       "shape [-2] is not a list of sizes"},
      {with_header(R"({"x":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})", 8),
       "shape [2.0] is not a list of sizes"},
      {with_header(R"({"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8),
       "F32 [3] needs 12 bytes, but"},
      {with_header(R"({"x":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}})",
                   0),
       "overflows"},
      {with_header(R"({"x":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}})", 0),
       "overflows"},
      {with_header(R"({"x":{"dtype":"F32","shape":[0],"data_offsets":[8,4]}})", 8), "reach outside"},
      {with_header(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8),
       "its data starts at 4, after the end"},
      {with_header(
           R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
           12),
       "tensor \"y\": its data starts at 4, before the end of what comes before it (8)"},
      {with_header(R"({"__metadata__":{"a":1}})", 0), "__metadata__: \"a\" is not a text"},
      {with_header(R"({"__metadata__":[]})", 0), "__metadata__ is not an object"},
      {with_header(R"({"x":{"dtype":"F32","shape":[[[[1]]]],"data_offsets":[0,8]}})", 8), "nested deeper"},
  };
  const TempDirectory dir;
  for (const auto& c : cases) {
    put(dir / "f", c.bytes);
    const std::string error = error_of([&] { SafetensorsFile file(dir / "f"); });
    EXPECT_TRUE(error.starts_with(dir / "f: ")) << error;
    EXPECT_NE(error.find(c.says), std::string::npos) << "wanted: " << c.says << "\ngot: " << error;
  }
  EXPECT_NE(error_of([&] { SafetensorsFile file(dir / "absent"); }).find("absent: cannot open"),
            std::string::npos);
  EXPECT_NE(error_of([&] { SafetensorsFile file(dir.path()); }).find("is a directory"), std::string::npos);
}

// Whatever is cut off or flipped, the file is refused or every view lies inside it: all its bytes are read.
TEST(Safetensors, RandomTruncationsAndFlippedBytesNeverReachOutside) {
  const std::string good = valid_file();
  const TempDirectory dir;
  const uint64_t header = 8 + (good.size() - 8 - (24 + 6 + 16));
  int refused = 0, opened = 0;
  for (uint64_t seed = 0; seed < 3000; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    std::string bytes = good;
    if (seed % 3 == 0) bytes.resize(static_cast<size_t>(random.next_int(0, std::ssize(good) - 1)));
    const int flips = static_cast<int>(random.next_int(seed % 3 == 0 ? 0 : 1, 4));
    for (int i = 0; i < flips && !bytes.empty(); ++i) {
      // Mostly in the header, where it matters, and often a digit for a digit, which stays valid JSON.
      const int64_t end = std::min<int64_t>(std::ssize(bytes), static_cast<int64_t>(header));
      char& c = bytes[static_cast<size_t>(random.next_int(0, end - 1))];
      if (c >= '0' && c <= '9')
        c = static_cast<char>('0' + random.next_int(0, 9));
      else if (random.next_int(0, 2) == 0)
        c = static_cast<char>(random.next_u32());
    }
    // A name of its own each time: some file systems flush a file that is truncated and written again, which
    // is slow.
    const std::string path = dir / std::to_string(seed);
    put(path, bytes);
    try {
      const SafetensorsFile file(path);
      ++opened;
      int64_t total = 0;
      unsigned sum = 0;
      for (const TensorView& t : file.tensors()) {
        total += t.bytes();
        for (int64_t i = 0; i < t.bytes(); ++i) sum += static_cast<unsigned>(t.data[i]);
      }
      EXPECT_LE(total, std::ssize(bytes));
      EXPECT_NE(sum, 1u << 31);
    } catch (const Error& e) {
      ++refused;
      EXPECT_EQ(e.exit_code(), 2) << e.what();
    }
    std::filesystem::remove(path);
  }
  EXPECT_GT(refused, 1000);
  EXPECT_GT(opened, 100);
}

TEST(Safetensors, AnUnfinishedFileLeavesTheOldOne) {
  const TempDirectory dir;
  put(dir / "f", valid_file());
  {
    const TensorSpec spec{"x", TensorType::kF32, {1000}};
    SafetensorsWriter out(dir / "f", {&spec, 1});
    const float one = 1;
    out.write(&one, 4);
    EXPECT_THROW(out.commit(), std::logic_error);
    std::vector<float> many(1000);
    EXPECT_THROW(out.write(many.data(), 4000), std::logic_error);
  }
  EXPECT_EQ(read_file(dir / "f"), valid_file());
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(dir.path()), {}), 1)
      << "no temporary file stays";
}

TEST(Safetensors, NamesWithAnyTextSurvive) {
  const TempDirectory dir;
  const float x = 4;
  const NamedTensor tensors[] = {{{"quote\" back\\ tab\t ü", TensorType::kF32, {}}, &x},
                                 {{"", TensorType::kF32, {1}}, &x}};
  write_safetensors(dir / "f", tensors);
  const SafetensorsFile file(dir / "f");
  EXPECT_EQ(to_float32(*file.find("quote\" back\\ tab\t ü")), std::vector<float>{4});
  EXPECT_NE(file.find(""), nullptr);
}

}  // namespace
}  // namespace perigee::policy
