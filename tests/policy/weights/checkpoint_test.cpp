// Models on disk: what is saved is what was loaded, and what cannot be a model is refused by name.
#include "policy/weights/checkpoint.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>

#include "base/error.h"
#include "policy/weights/safetensors_set.h"
#include "tests/base/temp_directory.h"

namespace perigee::policy {
namespace {

namespace fs = std::filesystem;

std::string golden(const std::string& name) {
  return std::string(PERIGEE_SOURCE_DIR) + "/tests/golden/" + name;
}

// The bytes of every tensor of a directory, by name.
std::map<std::string, std::string> tensors_of(const std::string& directory) {
  const SafetensorsSet set(directory);
  std::map<std::string, std::string> out;
  for (const TensorView* t : set.tensors())
    out[t->name] = shape_text(t->shape) + " " + tensor_type_name(t->type) + " " +
                   std::string(reinterpret_cast<const char*>(t->data), static_cast<size_t>(t->bytes()));
  return out;
}

// The message of the input error that loading throws; "" when it does not.
std::string refusal(const std::string& directory) {
  try {
    load_model(directory, Dtype::kF32);
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), Error::Kind::kInput);
    return e.what();
  }
  return "";
}

// Copies the golden model with one change: `edit` sees each tensor's name, shape and values, and says whether
// it stays.
using Edit = std::function<bool(std::string& name, std::vector<int64_t>& shape, std::vector<float>& values)>;
void write_edited(const std::string& from, const std::string& to, const Edit& edit) {
  fs::create_directories(to);
  fs::copy_file(fs::path(from) / "config.json", fs::path(to) / "config.json");
  const SafetensorsSet set(from);
  std::vector<std::vector<float>> values;
  std::vector<TensorSpec> specs;
  for (const TensorView* t : set.tensors()) {
    std::string name = t->name;
    std::vector<int64_t> shape = t->shape;
    std::vector<float> x = to_float32(*t);
    if (!edit(name, shape, x)) continue;
    specs.push_back({name, TensorType::kF32, shape});
    values.push_back(std::move(x));
  }
  std::vector<NamedTensor> named;
  for (size_t i = 0; i < specs.size(); ++i) named.push_back({specs[i], values[i].data()});
  write_safetensors((fs::path(to) / "model.safetensors").string(), named);
}

class Golden : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Checkpoint, Golden, ::testing::Values("tiny", "grouped"));

TEST_P(Golden, SavedIsLoadedByteForByte) {
  TempDirectory place;
  const LoadedModel model = load_model(golden(GetParam()), Dtype::kF32);
  save_model(place / "one", *model.layout, model.flat.data(), Dtype::kF32);
  EXPECT_EQ(tensors_of(place / "one"), tensors_of(golden(GetParam())));
  EXPECT_EQ(load_model_config(place / "one"), model.layout->config());
}

TEST_P(Golden, ShardsHoldTheSame) {
  TempDirectory place;
  const LoadedModel model = load_model(golden(GetParam()), Dtype::kF32);
  save_model(place / "shards", *model.layout, model.flat.data(), Dtype::kF32, 100 << 10);
  EXPECT_FALSE(fs::exists(place / "shards/model.safetensors"));
  EXPECT_TRUE(fs::exists(place / "shards/model.safetensors.index.json"));
  EXPECT_EQ(tensors_of(place / "shards"), tensors_of(golden(GetParam())));
  EXPECT_EQ(load_model(place / "shards", Dtype::kF32).flat, model.flat);
}

// bfloat16 keeps the upper half of each float, rounded to nearest even; saving what was loaded changes
// nothing more.
TEST_P(Golden, Bfloat16RoundsOnce) {
  TempDirectory place;
  const LoadedModel model = load_model(golden(GetParam()), Dtype::kF32);
  save_model(place / "half", *model.layout, model.flat.data(), Dtype::kBf16);
  const SafetensorsSet half(place / "half"), whole(golden(GetParam()));
  int64_t rounded = 0, kept = 0;
  for (const TensorView* t : whole.tensors()) {
    const TensorView* h = half.find(t->name);
    ASSERT_NE(h, nullptr) << t->name;
    const std::vector<float> a = to_float32(*t), b = to_float32(*h);
    const bool stays = t->name.ends_with("A_log") || t->name.ends_with("dt_bias") ||
                       t->name.ends_with("e_score_correction_bias");
    EXPECT_EQ(h->type == TensorType::kF32, stays) << t->name;
    for (size_t i = 0; i < a.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &a[i], 4);
      if (!stays) bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
      float expected;
      std::memcpy(&expected, &bits, 4);
      ASSERT_EQ(b[i], expected) << t->name << " " << i;
      (a[i] == b[i] ? kept : rounded) += 1;
    }
  }
  EXPECT_GT(rounded, kept);
  const LoadedModel again = load_model(place / "half", Dtype::kBf16);
  EXPECT_EQ(again.layout->config().dtype, Dtype::kBf16);
  save_model(place / "half2", *again.layout, again.flat.data(), Dtype::kBf16);
  EXPECT_EQ(tensors_of(place / "half2"), tensors_of(place / "half"));
}

TEST(Checkpoint, NotANumberIsNamedWithItsPlace) {
  TempDirectory place;
  const std::string name = "model.layers.1.self_attn.k_proj.weight";
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    const std::string directory = place / (std::isnan(bad) ? "nan" : "infinite");
    write_edited(golden("tiny"), directory,
                 [&](std::string& n, std::vector<int64_t>&, std::vector<float>& x) {
                   if (n == name) x[77] = bad;
                   return true;
                 });
    const std::string said = refusal(directory);
    EXPECT_NE(said.find("model.safetensors"), std::string::npos) << said;
    EXPECT_NE(said.find(name), std::string::npos) << said;
    EXPECT_NE(said.find("element 77"), std::string::npos) << said;
  }
}

// A tensor's name is whatever the file says: it must not write lines, or to the terminal, of its own.
TEST(Checkpoint, AStrangeNameStaysOnItsLine) {
  TempDirectory place;
  write_edited(golden("tiny"), place / "strange", [&](std::string& n, std::vector<int64_t>&, std::vector<float>&) {
    if (n == "model.layers.1.self_attn.k_proj.weight") n = "k_proj\nall is well\x1b[2J";
    return true;
  });
  const std::string said = refusal(place / "strange");
  EXPECT_NE(said.find("is not part of the architecture"), std::string::npos) << said;
  EXPECT_EQ(said.find_first_of("\n\x1b"), std::string::npos) << said;
}

TEST(Checkpoint, EveryTensorIsNeeded) {
  TempDirectory place;
  const std::string name = "model.layers.3.self_attn.kv_b_proj.weight";
  write_edited(golden("tiny"), place / "missing",
               [&](std::string& n, std::vector<int64_t>&, std::vector<float>&) { return n != name; });
  EXPECT_NE(refusal(place / "missing").find(name), std::string::npos) << refusal(place / "missing");
}

TEST(Checkpoint, NoOtherTensorIsTaken) {
  TempDirectory place;
  const std::string extra = "model.layers.9.self_attn.rotary.weight";
  write_edited(golden("tiny"), place / "renamed",
               [&](std::string& n, std::vector<int64_t>&, std::vector<float>&) {
                 if (n == "model.norm.weight") n = extra;
                 return true;
               });
  EXPECT_NE(refusal(place / "renamed").find(extra), std::string::npos) << refusal(place / "renamed");
}

TEST(Checkpoint, ShapesMustFit) {
  TempDirectory place;
  const std::string name = "lm_head.weight";
  write_edited(golden("tiny"), place / "shape",
               [&](std::string& n, std::vector<int64_t>& shape, std::vector<float>&) {
                 if (n == name) std::swap(shape[0], shape[1]);
                 return true;
               });
  const std::string said = refusal(place / "shape");
  EXPECT_NE(said.find(name), std::string::npos) << said;
  EXPECT_NE(said.find("[64, 320]"), std::string::npos) << said;
  EXPECT_NE(said.find("[320, 64]"), std::string::npos) << said;
}

TEST(Checkpoint, AModelIsNotWrittenOver) {
  TempDirectory place;
  const LoadedModel model = load_model(golden("tiny"), Dtype::kF32);
  save_model(place / "m", *model.layout, model.flat.data(), Dtype::kF32);
  EXPECT_THROW(save_model(place / "m", *model.layout, model.flat.data(), Dtype::kF32), Error);
  std::vector<float> other = model.flat;
  other[0] += 1;
  save_model(place / "m", *model.layout, other.data(), Dtype::kF32, int64_t{5} << 30, true);
  EXPECT_EQ(load_model(place / "m", Dtype::kF32).flat, other);
}

// Every element of the arena but padding belongs to exactly one place of the checkpoint.
TEST(Checkpoint, FlatArenaAndTensorsAreOneToOne) {
  const LoadedModel model = load_model(golden("tiny"), Dtype::kF32);
  const ParamLayout& layout = *model.layout;
  std::vector<float> flat(static_cast<size_t>(layout.elements()), 0.0f);
  float next = 1;
  for (const CheckpointTensor& t : layout.checkpoint()) {
    int64_t n = 1;
    for (const int64_t s : t.shape) n *= s;
    std::vector<float> values(static_cast<size_t>(n));
    for (float& v : values) v = next++;
    layout.write_flat(flat.data(), t, values.data());
  }
  EXPECT_EQ(static_cast<int64_t>(next) - 1, layout.parameter_count());
  std::vector<float> seen;
  for (const float v : flat)
    if (v != 0) seen.push_back(v);
  std::sort(seen.begin(), seen.end());
  ASSERT_EQ(static_cast<int64_t>(seen.size()), layout.parameter_count());
  for (size_t i = 0; i < seen.size(); ++i) ASSERT_EQ(seen[i], static_cast<float>(i + 1));
}

}  // namespace
}  // namespace perigee::policy
