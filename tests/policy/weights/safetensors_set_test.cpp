#include "policy/weights/safetensors_set.h"

#include <gtest/gtest.h>

#include <fstream>

#include "base/error.h"
#include "tests/base/temp_directory.h"

namespace perigee::policy {
namespace {

template <class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(e.exit_code(), 2);
    return e.what();
  }
  return "no error";
}

std::string open_error(const std::string& path) {
  return error_of([&] { SafetensorsSet set(path); });
}

// Ten tensors of 1..10 floats, tensor i filled with i + 0.5 (exact in bfloat16).
std::vector<TensorSpec> ten(TensorType type = TensorType::kF32) {
  std::vector<TensorSpec> specs;
  for (int64_t i = 1; i <= 10; ++i) specs.push_back({"layer." + std::to_string(i), type, {i}});
  return specs;
}

void write_ten(const std::string& dir, int64_t shard_bytes, TensorType type = TensorType::kF32) {
  SafetensorsSetWriter out(dir, ten(type), shard_bytes, {{"format", "pt"}});
  for (int64_t i = 1; i <= 10; ++i) {
    const std::vector<float> x(static_cast<size_t>(i), static_cast<float>(i) + 0.5f);
    out.write_float32(x.data(), i);
  }
  out.commit();
}

void expect_ten(const SafetensorsSet& set) {
  ASSERT_EQ(set.tensors().size(), 10u);
  for (int64_t i = 1; i <= 10; ++i) {
    const int64_t shape[] = {i};
    EXPECT_EQ(to_float32(set.need("layer." + std::to_string(i), shape)),
              std::vector<float>(static_cast<size_t>(i), static_cast<float>(i) + 0.5f));
  }
}

TEST(SafetensorsSet, AnyShardSizeReadsBackTheSame) {
  for (TensorType type : {TensorType::kF32, TensorType::kBf16})
    for (int64_t shard_bytes : {1, 8, 39, 40, 41, 100, 219, 220, 1 << 20}) {
      SCOPED_TRACE(shard_bytes);
      const TempDirectory dir;
      write_ten(dir.path(), shard_bytes, type);
      const SafetensorsSet set(dir.path());
      expect_ten(set);
      EXPECT_EQ(set.total_bytes(), 55 * tensor_type_bytes(type));
      EXPECT_EQ(file_exists(dir / "model.safetensors"), shard_bytes >= 55 * tensor_type_bytes(type));
      for (const auto& entry : std::filesystem::directory_iterator(dir.path())) {
        if (entry.path().extension() != ".safetensors") continue;
        const SafetensorsFile file(entry.path().string());
        int64_t bytes = 0;
        for (const TensorView& t : file.tensors()) bytes += t.bytes();
        EXPECT_TRUE(bytes <= shard_bytes || file.tensors().size() == 1);
      }
    }
}

TEST(SafetensorsSet, WritingAgainReplaces) {
  const TempDirectory dir;
  write_ten(dir.path(), 100);
  write_ten(dir.path(), 100);
  expect_ten(SafetensorsSet(dir.path()));
}

TEST(SafetensorsSet, OneFileOpensByItsName) {
  const TempDirectory dir;
  write_ten(dir.path(), 1 << 20);
  expect_ten(SafetensorsSet(dir / "model.safetensors"));
}

TEST(SafetensorsSet, WeightsOfAnotherLayoutAreNotMixed) {
  const TempDirectory dir;
  write_ten(dir.path(), 100);
  const std::string error = error_of([&] { write_ten(dir.path(), 1 << 20); });
  EXPECT_NE(error.find("holds weights of another layout"), std::string::npos) << error;
  expect_ten(SafetensorsSet(dir.path()));
}

TEST(SafetensorsSet, NothingAppearsBeforeTheCommit) {
  const TempDirectory dir;
  {
    SafetensorsSetWriter out(dir.path(), ten(), 100);
    const std::vector<float> x(54, 1.0f);
    out.write_float32(x.data(), 54);
    EXPECT_THROW(out.commit(), std::logic_error);
  }
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(SafetensorsSet, FaultsOfAShardedSetAreNamed) {
  const TempDirectory empty;
  EXPECT_NE(open_error(empty.path()).find("no weights here"), std::string::npos);

  const auto fresh = [](const TempDirectory& dir) { write_ten(dir.path(), 100); };  // 3 shards
  const auto index_replace = [](const TempDirectory& dir, const std::string& from, const std::string& to) {
    std::string text = read_file(dir / "model.safetensors.index.json");
    const size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos);
    text.replace(at, from.size(), to);
    write_file_atomic(dir / "model.safetensors.index.json", text);
  };
  const std::string first = "model-00001-of-00003.safetensors", second = "model-00002-of-00003.safetensors";
  {
    const TempDirectory dir;
    fresh(dir);
    ASSERT_TRUE(std::filesystem::remove(dir / second)) << "the layout of the test changed";
    EXPECT_NE(open_error(dir.path()).find("the shard \"" + second + "\" that"), std::string::npos)
        << open_error(dir.path());
  }
  {
    const TempDirectory dir;
    fresh(dir);
    index_replace(dir, "\"layer.1\": \"" + first, "\"layer.1\": \"" + second);
    EXPECT_NE(open_error(dir.path()).find("gives it to " + second), std::string::npos)
        << open_error(dir.path());
  }
  {
    const TempDirectory dir;
    fresh(dir);
    index_replace(dir, "\"layer.1\"", "\"layer.0\"");
    EXPECT_NE(open_error(dir.path()).find("tensor \"layer.1\" is in this shard, but not in"),
              std::string::npos);
  }
  {
    const TempDirectory dir;
    fresh(dir);
    index_replace(dir, "\"layer.1\"", "\"layer.0\": \"" + first + "\", \"layer.1\"");
    EXPECT_NE(open_error(dir.path()).find("tensor \"layer.0\" is missing in this shard"), std::string::npos);
  }
  {
    const TempDirectory dir;
    fresh(dir);
    std::filesystem::copy_file(dir / first, dir / second, std::filesystem::copy_options::overwrite_existing);
    EXPECT_NE(open_error(dir.path()).find("gives it to " + first), std::string::npos)
        << open_error(dir.path());
  }
  {
    const TempDirectory dir;
    fresh(dir);
    index_replace(dir, "\"layer.1\": \"" + first, "\"layer.1\": \"../" + first);
    EXPECT_NE(open_error(dir.path()).find("is not the name of a .safetensors file beside the index"),
              std::string::npos);
  }
  {
    const TempDirectory dir;
    fresh(dir);
    std::filesystem::copy_file(dir / first, dir / "model.safetensors");
    EXPECT_NE(open_error(dir.path()).find("holds both"), std::string::npos);
  }
  for (const char* text :
       {"", "[]", "{}", "{\"weight_map\": {}}", "{\"weight_map\": {\"a\": 1}}", "{\"weight_map\": 1}"}) {
    const TempDirectory dir;
    fresh(dir);
    write_file_atomic(dir / "model.safetensors.index.json", text);
    EXPECT_TRUE(open_error(dir.path()).starts_with(dir / "model.safetensors.index.json: "))
        << open_error(dir.path());
  }
}

TEST(SafetensorsSet, NeedNamesWhatIsWrong) {
  const TempDirectory dir;
  write_ten(dir.path(), 100);
  const SafetensorsSet set(dir.path());
  const int64_t three[] = {3};
  EXPECT_NE(
      error_of([&] { set.need("layr.3", three); }).find("tensor layr.3 is missing; did you mean layer.3?"),
      std::string::npos);
  EXPECT_NE(
      error_of([&] { set.need("layer.4", three); }).find("shape [4], but the configuration asks for [3]"),
      std::string::npos);
}

// What golden checkpoints and other programs write: tests/policy/model reads those; here only the large
// header.
TEST(SafetensorsSet, ManyTensorsOpenFast) {
  const TempDirectory dir;
  std::vector<TensorSpec> specs;
  for (int i = 0; i < 20000; ++i)
    specs.push_back({"model.layers.1.experts." + std::to_string(i) + ".w1.weight", TensorType::kBf16, {2}});
  SafetensorsSetWriter out(dir.path(), specs, 30000);
  const std::vector<float> x(40000, 2.0f);
  out.write_float32(x.data(), 40000);
  out.commit();
  const SafetensorsSet set(dir.path());
  EXPECT_EQ(set.tensors().size(), 20000u);
  EXPECT_EQ(to_float32(*set.find(specs[12345].name)), (std::vector<float>{2, 2}));
}

}  // namespace
}  // namespace perigee::policy
