// Adapters on disk: the names and shapes that the peft library gives them, those of single experts too, and nothing lost.
#include "policy/weights/adapter_checkpoint.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "policy/weights/safetensors.h"
#include "tests/base/temp_directory.h"
#include "tests/policy/adapter_model.h"

namespace perigee::policy {
namespace {

TEST(AdapterCheckpoint, HoldsEveryAdapterUnderTheNameOfItsModule) {
  const ParamLayout base(testing::adapter_config(), Dtype::kF32);
  testing::SmallAdapters adapters(base, 0.1);
  TempDirectory place;
  const std::string directory = place / "adapters";
  save_adapter(directory, adapters.layout, adapters.flat.data(), {{{"seed", 3}}, "float32", std::string(32, '0')});

  const SafetensorsFile file(directory + "/adapter_model.safetensors");
  EXPECT_EQ(file.tensors().size(), 2 * adapters.layout.adapters().size());
  const auto shape = [&](const std::string& name) {
    const TensorView* t = file.find("base_model.model.model.layers." + name + ".weight");
    return t == nullptr ? std::vector<int64_t>{} : std::vector<int64_t>(t->shape.begin(), t->shape.end());
  };
  const ModelConfig& c = base.config();
  const int64_t D = c.hidden_size, I = c.moe_intermediate_size;
  using Shape = std::vector<int64_t>;
  EXPECT_EQ(shape("0.self_attn.q_proj.lora_A"), (Shape{8, D}));
  for (const char* gate_or_up : {"w1", "w3"}) {
    const std::string module = std::string("3.block_sparse_moe.experts.5.") + gate_or_up;
    EXPECT_EQ(shape(module + ".lora_A"), (Shape{8, D}));
    EXPECT_EQ(shape(module + ".lora_B"), (Shape{I, 8}));
  }
  EXPECT_EQ(shape("3.block_sparse_moe.experts.5.w2.lora_A"), (Shape{8, I}));
  EXPECT_EQ(shape("3.block_sparse_moe.experts.5.w2.lora_B"), (Shape{D, 8}));
  EXPECT_EQ(shape("0.block_sparse_moe.experts.5.w2.lora_B"), Shape{}) << "the first layer is dense";

  EXPECT_EQ(read_adapter_head(directory).lora, adapters.layout.config());
  EXPECT_EQ(load_adapter(directory, adapters.layout), adapters.flat);
  // Fewer targets are other adapters.
  const AdapterLayout without(base, testing::lora_config(8, {"q_proj", "w1"}));
  EXPECT_THROW(load_adapter(directory, without), Error);
}

TEST(AdapterCheckpoint, AStrangeNameStaysOnItsLine) {
  const ParamLayout base(testing::adapter_config(), Dtype::kF32);
  const AdapterLayout layout(base, testing::lora_config(8, {"q_proj"}));
  TempDirectory place;
  const float one = 1;
  const NamedTensor strange = {{"q_proj\nall is well\x1b[2J", TensorType::kF32, {1}}, &one};
  write_safetensors(place / "adapter_model.safetensors", std::span(&strange, 1));
  try {
    load_adapter(place.path(), layout);
    FAIL() << "it was taken";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), Error::Kind::kInput);
    EXPECT_EQ(std::string_view(e.what()).find_first_of("\n\x1b"), std::string_view::npos) << e.what();
  }
}

TEST(AdapterCheckpoint, WhatItsHeadSaysIsReadAsItStands) {
  const ParamLayout base(testing::adapter_config(), Dtype::kF32);
  testing::SmallAdapters adapters(base, 0.1);
  TempDirectory place;
  const std::string directory = place / "adapters", head = directory + "/adapter_config.json";
  save_adapter(directory, adapters.layout, adapters.flat.data(), {{{"seed", 3}}, "float32", std::string(32, '0')});
  const nlohmann::json good = nlohmann::json::parse(read_file(head));
  const auto refusal = [&](auto change) -> std::string {
    nlohmann::json j = good;
    change(j);
    write_file_atomic(head, j.dump());
    try {
      read_adapter_head(directory);
    } catch (const Error& e) {
      EXPECT_EQ(e.exit_code(), 2);
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(refusal([](nlohmann::json&) {}), "");
  using Json = nlohmann::json;
  for (const auto& [key, value] : {std::pair<const char*, Json>{"r", 8.5}, {"r", true}, {"r", "8"}, {"r", 0}, {"r", nullptr},
                                   {"lora_alpha", true}, {"lora_alpha", nullptr}, {"target_modules", Json::array()},
                                   {"target_modules", "q_proj"}, {"target_modules", {"q_proj", "q_proj"}}}) {
    const std::string why = refusal([&](Json& j) { j[key] = value; });
    EXPECT_NE(why.find(head), std::string::npos) << key << " " << value << ": " << why;
  }
  for (const Json& seed : {Json(-1), Json(1.5), Json(true), Json(nullptr)})
    EXPECT_NE(refusal([&](Json& j) { j["perigee"]["seed"] = seed; }), "") << seed;
  for (const char* key : {"r", "lora_alpha", "target_modules", "perigee"})
    EXPECT_NE(refusal([&](Json& j) { j.erase(key); }), "") << key;
}

}  // namespace
}  // namespace perigee::policy
