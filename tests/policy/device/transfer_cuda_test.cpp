// Weights between files and a GPU: the bits that the host's loader gives, and the files that the host writes.
#include "policy/device/transfer.h"

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "base/file.h"
#include "policy/device/initialize.h"
#include "policy/device/resident.h"
#include "policy/weights/checkpoint.h"
#include "policy/weights/safetensors_set.h"
#include "tests/kernels/device_fixture.h"

namespace perigee::policy {
namespace {

namespace fs = std::filesystem;

struct TempDirectory {
  std::string path;
  TempDirectory() {
    std::string pattern = (fs::temp_directory_path() / "perigee-transfer-XXXXXX").string();
    path = ::mkdtemp(pattern.data());
  }
  ~TempDirectory() {
    std::error_code error;
    fs::remove_all(path, error);
  }
};

// Every kind of tensor; sizes that fill neither tiles nor panels.
ModelConfig model() {
  return parse_model_config(nlohmann::json::parse(R"({"architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear",
    "vocab_size": 301, "hidden_size": 72, "intermediate_size": 104, "moe_intermediate_size": 40, "num_hidden_layers": 4,
    "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 24, "q_lora_rank": null,
    "kv_lora_rank": 48, "qk_nope_head_dim": 20, "qk_rope_head_dim": 12, "v_head_dim": 28, "mla_use_nope": true,
    "num_experts": 5, "num_experts_per_token": 2, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "num_expert_group": 1, "topk_group": 1, "moe_renormalize": true,
    "moe_router_activation_func": "sigmoid", "routed_scaling_factor": 1.0, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": false,
    "model_max_length": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    "initializer_range": 0.1, "num_nextn_predict_layers": 0, "dtype": "float32",
    "linear_attn_config": {"full_attn_layers": [2, 4], "kda_layers": [1, 3], "head_dim": 24, "num_heads": 3,
                           "short_conv_kernel_size": 4}})"),
                            "test");
}

class TransferDevice : public kernels::DeviceTest {
 protected:
  static std::vector<std::byte> device_arena(const ParamLayout& layout, const std::string& directory, int threads) {
    ResidentWeights memory = ResidentWeights::create(&device(), layout.weight_bytes());
    device_load(device(), layout, directory, memory.writable(), threads);
    std::vector<std::byte> arena(static_cast<size_t>(layout.weight_bytes()));
    device().copy_out(arena.data(), memory.data(), layout.weight_bytes());
    return arena;
  }
};

TEST_F(TransferDevice, GivesTheBitsOfTheHostsLoader) {
  for (const Dtype file : {Dtype::kF32, Dtype::kBf16})
    for (const auto& [dtype, form] : {std::pair{Dtype::kBf16, MatrixForm::kTiles}, std::pair{Dtype::kBf16, MatrixForm::kPanels},
                                      std::pair{Dtype::kF32, MatrixForm::kPanels}}) {
      const ParamLayout layout(model(), dtype, form);
      TempDirectory place;
      std::vector<float> flat(static_cast<size_t>(layout.elements()));
      initialize(layout, 5, flat.data());
      save_model(place.path, layout, flat.data(), file, 60000, true);  // some shards
      const LoadedModel loaded = load_model(place.path, dtype, form);
      std::vector<std::byte> expected(static_cast<size_t>(layout.weight_bytes()));
      layout.flat_to_weights(loaded.flat.data(), expected.data());
      EXPECT_EQ(device_arena(layout, place.path, 3), expected);
      EXPECT_EQ(device_arena(layout, place.path, 0), expected);
      // The fingerprint is the same wherever the bytes lie.
      ResidentWeights memory = ResidentWeights::create(&device(), layout.weight_bytes());
      device_load(device(), layout, place.path, memory.writable());
      EXPECT_EQ(weights_fingerprint(device(), memory.data(), layout.weight_bytes()),
                weights_fingerprint(expected.data(), layout.weight_bytes()));
    }
}

TEST_F(TransferDevice, WritesTheFilesOfTheHost) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
    const ParamLayout layout(model(), Dtype::kBf16, MatrixForm::kTiles);
    ResidentWeights memory = ResidentWeights::create(&device(), layout.weight_bytes());
    device_initialize(device(), layout, 3, memory.writable());
    TempDirectory ours, theirs;
    device_save(device(), layout, memory.data(), ours.path, dtype, 60000);
    std::vector<std::byte> arena(static_cast<size_t>(layout.weight_bytes()));
    device().copy_out(arena.data(), memory.data(), layout.weight_bytes());
    std::vector<float> flat(static_cast<size_t>(layout.elements()));
    layout.weights_to_flat(arena.data(), flat.data());
    save_model(theirs.path, layout, flat.data(), dtype, 60000, true);
    int files = 0;
    for (const auto& entry : fs::directory_iterator(theirs.path)) {
      const std::string name = entry.path().filename().string();
      EXPECT_EQ(read_file(ours.path + "/" + name), read_file(entry.path().string())) << name;
      ++files;
    }
    EXPECT_GT(files, 3);
    int64_t tensors = 0;
    const SafetensorsSet written(ours.path);
    tensors = written.total_bytes();
    EXPECT_EQ(checkpoint_bytes(layout, dtype), tensors);
  }
}

TEST_F(TransferDevice, RefusesWhatTheHostsLoaderRefuses) {
  const ParamLayout layout(model(), Dtype::kBf16, MatrixForm::kTiles);
  TempDirectory place;
  std::vector<float> flat(static_cast<size_t>(layout.elements()));
  initialize(layout, 5, flat.data());
  const CheckpointTensor& broken = layout.checkpoint()[20];
  std::vector<float> values(1 << 20);
  layout.read_flat(flat.data(), broken, values.data());
  values[17] = INFINITY;
  values[40] = NAN;
  layout.write_flat(flat.data(), broken, values.data());
  save_model(place.path, layout, flat.data(), Dtype::kF32, 60000, true);
  std::string on_host, on_device;
  try {
    load_model(place.path, Dtype::kBf16, MatrixForm::kTiles);
  } catch (const Error& e) {
    on_host = e.what();
  }
  try {
    device_arena(layout, place.path, 2);
  } catch (const Error& e) {
    on_device = e.what();
  }
  EXPECT_NE(on_host.find("infinity at element 17"), std::string::npos) << on_host;
  EXPECT_EQ(on_device, on_host);
}

// A model that fills the buffers many times over: pieces of one tensor, and slots used again.
TEST_F(TransferDevice, LargeTensorsGoInPieces) {
  ModelConfig config = model();
  config.vocab_size = 70001;
  config.hidden_size = 264;
  const ParamLayout layout(config, Dtype::kBf16, MatrixForm::kTiles);
  ResidentWeights memory = ResidentWeights::create(&device(), layout.weight_bytes());
  device_initialize(device(), layout, 3, memory.writable());
  TempDirectory place;
  device_save(device(), layout, memory.data(), place.path, Dtype::kF32);
  std::vector<std::byte> expected(static_cast<size_t>(layout.weight_bytes()));
  device().copy_out(expected.data(), memory.data(), layout.weight_bytes());
  EXPECT_EQ(device_arena(layout, place.path, 2), expected);
}

TEST_F(TransferDevice, ADescriptorIsMappedAgainAndReadOnly) {
  constexpr int64_t kBytes = (int64_t{5} << 20) + 64;
  ResidentWeights made = ResidentWeights::create(&device(), kBytes);
  std::vector<std::byte> values(kBytes);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<std::byte>(i * 13);
  device().copy_in(made.writable(), values.data(), kBytes);
  device().synchronize();
  const int kept = ::dup(made.descriptor());
  made = ResidentWeights();
  const ResidentWeights again = ResidentWeights::map(&device(), kept, kBytes);
  std::vector<std::byte> read(kBytes);
  device().copy_out(read.data(), again.data(), kBytes);
  EXPECT_EQ(read, values);
}

}  // namespace
}  // namespace perigee::policy
