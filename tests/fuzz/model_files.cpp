// The files that others make: weights, adapters, a model's configuration, its vocabulary. The first byte says which. What is
// not taken is refused with one line; what is taken can be read to its end.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string_view>

#include "base/error.h"
#include "base/json.h"
#include "base/leftovers.h"
#include "policy/tokenizer/tiktoken.h"
#include "policy/weights/adapter_checkpoint.h"
#include "policy/weights/safetensors.h"
#include "tests/fuzz/target.h"
#include "tests/policy/adapter_model.h"

namespace {

using namespace perigee;
using namespace perigee::policy;

void require(bool holds) {
  if (!holds) std::abort();
}

std::string put(const char* name, std::string_view bytes) {
  static const TemporaryFolder folder("fuzz");
  std::ofstream(folder.path() / name, std::ios::binary | std::ios::trunc) << bytes;
  return (folder.path() / name).string();
}

// Mutations would hardly ever keep the length in front.
std::string with_length(std::string_view header, size_t data_bytes) {
  const uint64_t n = header.size();
  std::string out(8, '\0');
  std::memcpy(out.data(), &n, 8);
  return out.append(header).append(data_bytes, '\x3f');
}

void read_weights(std::string_view bytes) {
  const SafetensorsFile file(put("model.safetensors", bytes));
  int64_t read = 0;
  for (const TensorView& t : file.tensors()) {
    require(file.find(t.name) == &t);
    read += t.bytes();
    const bool integers = t.type == TensorType::kI32 || t.type == TensorType::kI64;
    require(static_cast<int64_t>(integers ? to_int64(t).size() : to_float32(t).size()) == t.elements);
  }
  require(read <= static_cast<int64_t>(bytes.size()));
}

void read_adapter(std::string_view header) {
  static const ParamLayout base(testing::adapter_config(), Dtype::kF32);
  static const AdapterLayout layout(base, testing::lora_config(8, {"kv_a_proj_with_mqa"}));
  static const size_t bytes = [] {
    int64_t elements = 0;
    for (const AdapterLayout::Adapter& a : layout.adapters()) elements += layout.config().rank * (a.n + a.k);
    return static_cast<size_t>(elements) * 4;
  }();
  const std::string path = put("adapter_model.safetensors", with_length(header, bytes));
  require(std::ssize(load_adapter(path.substr(0, path.rfind('/')), layout)) == layout.elements());
}

void read_adapter_config(std::string_view bytes) {
  const std::string path = put("adapter_config.json", bytes);
  const AdapterHead head = read_adapter_head(path.substr(0, path.rfind('/')));
  require(parse_lora_config(to_json(head.lora), "again") == head.lora);
}

void read_config(std::string_view bytes) {
  const ModelConfig c = parse_model_config(parse_json(bytes, "config.json"), "config.json");
  require(parse_model_config(to_json(c), "again") == c);
  if (c.num_layers * std::max<int64_t>(c.num_experts, 1) > 1000) return;  // a long list, and nothing new
  const ParamLayout layout(c, c.dtype);
  require(layout.elements() > 0 && !layout.checkpoint().empty());
}

// Bytes after the 256 that each vocabulary must have.
void read_vocabulary(std::string_view bytes) {
  static const std::string single = [] {
    const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string out;
    for (int b = 0; b < 256; ++b)
      out += {digits[b >> 2], digits[(b & 3) << 4], '=', '=', ' '}, out += std::to_string(b) + "\n";
    return out;
  }();
  for (int64_t tokens = 256; tokens < 262; ++tokens) try {
      const TiktokenTokenizer t(single + std::string(bytes), "tiktoken.model", tokens + 256);
      require(t.decode(t.encode(bytes)) == bytes);
      return;
    } catch (const Error& e) {
      if (std::string_view(e.what()).find("do not make the model's vocabulary") == std::string_view::npos)
        throw;
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    switch (data[0] % 6) {
      case 0:
        read_weights(bytes);
        break;
      case 1:
        read_weights(with_length(bytes, 28));
        break;
      case 2:
        read_adapter(bytes);
        break;
      case 3:
        read_adapter_config(bytes);
        break;
      case 4:
        read_config(bytes);
        break;
      default:
        read_vocabulary(bytes);
    }
  } catch (const Error& e) {
    require(e.kind() == Error::Kind::kInput &&
            std::string_view(e.what()).find('\n') == std::string_view::npos);
  }
  return 0;
}

std::vector<std::string> fuzz_seeds() {
  const std::string weights =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[16,20]},"c":{"dtype":"I64","shape":[],"data_offsets":[20,28]},"none":{"dtype":"F16","shape":[0,7],"data_offsets":[28,28]}})";
  // Of the two layers with latents: A [8, 48], B [24, 8].
  const auto pair = [](int layer, int at) {
    const std::string name =
        "\"base_model.model.model.layers." + std::to_string(layer) + ".self_attn.kv_a_proj_with_mqa.lora_";
    const auto entry = [&](const char* which, const char* shape, int from, int to) {
      return name + which + R"(.weight":{"dtype":"F32","shape":)" + shape + ",\"data_offsets\":[" +
             std::to_string(from) + "," + std::to_string(to) + "]}";
    };
    return entry("A", "[8,48]", at, at + 1536) + "," + entry("B", "[24,8]", at + 1536, at + 2304);
  };
  const std::string kimi =
      R"({"architectures":["KimiLinearForCausalLM"],"model_type":"kimi_linear","dtype":"float32","vocab_size":97,"hidden_size":48,"intermediate_size":80,"moe_intermediate_size":24,"num_hidden_layers":5,"num_attention_heads":3,"num_key_value_heads":3,"head_dim":16,"q_lora_rank":null,"kv_lora_rank":20,"qk_nope_head_dim":12,"qk_rope_head_dim":4,"v_head_dim":16,"mla_use_nope":true,"num_experts":8,"num_experts_per_token":2,"num_shared_experts":1,"first_k_dense_replace":1,"moe_layer_freq":1,"num_expert_group":1,"topk_group":1,"moe_renormalize":true,"moe_router_activation_func":"sigmoid","routed_scaling_factor":1.5,"hidden_act":"silu","rms_norm_eps":1e-5,"rope_theta":10000.0,"rope_scaling":null,"tie_word_embeddings":false,"model_max_length":4096,"bos_token_id":0,"eos_token_id":1,"pad_token_id":2,"initializer_range":0.15,"num_nextn_predict_layers":0,"linear_attn_config":{"full_attn_layers":[3,5],"kda_layers":[1,2,4],"head_dim":16,"num_heads":3,"short_conv_kernel_size":4}})";
  const std::string hybrid =
      R"({"model_type":"perigee_hybrid","token_mixers":["kda","gdn","mamba2","dplr","mla","mla_rope","attention"],"num_hidden_layers":7,"vocab_size":53,"hidden_size":40,"intermediate_size":56,"linear_attn_config":{"num_heads":3,"head_dim":16,"short_conv_kernel_size":4,"output_gate":"swish"},"num_attention_heads":4,"num_key_value_heads":2,"head_dim":12,"rope_theta":10000.0,"kv_lora_rank":20,"qk_nope_head_dim":12,"qk_rope_head_dim":6,"v_head_dim":10,"rms_norm_eps":1e-5,"initializer_range":0.15,"model_max_length":4096,"bos_token_id":0,"eos_token_id":1,"pad_token_id":2,"dtype":"bfloat16","num_experts":6,"num_experts_per_token":2,"num_shared_experts":1,"first_k_dense_replace":1,"moe_intermediate_size":32})";
  const std::string head =
      R"({"peft_type":"LORA","task_type":"CAUSAL_LM","r":8,"lora_alpha":12.0,"lora_dropout":0.0,"bias":"none","target_modules":["q_proj","w1"],"base_model_name_or_path":"","perigee":{"base":{"seed":3,"made_on":"cpu"},"dtype":"float32","fingerprint":"00","seed":5}})";
  return {std::string(1, '\0') + with_length(weights, 28),
          "\1" + weights,
          "\2{" + pair(2, 0) + "," + pair(4, 2304) + "}",
          "\3" + head,
          "\4" + kimi,
          "\4" + hybrid,
          "\5YWI= 256\nYWJj 257\n",
          "\5YWI= 256\r\n\r\nYWE= 257"};
}

std::vector<std::string> fuzz_words() {
  return {"\"dtype\":",
          "\"shape\":",
          "\"data_offsets\":",
          "\"F32\"",
          "\"BF16\"",
          "\"F16\"",
          "\"I32\"",
          "\"I64\"",
          "[0,0]",
          "[0,28]",
          "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]",
          "9223372036854775807",
          "18446744073709551615",
          "4294967296",
          "-1",
          "0",
          "1",
          "1.0",
          "1e999",
          "1e-400",
          "0.5",
          "true",
          "null",
          "{}",
          "[]",
          "{",
          "}",
          "[",
          "]",
          ",",
          ":",
          "\"",
          "\\u0000",
          "\\n",
          "\n",
          "\r",
          " ",
          "\"__metadata__\":",
          "lora_A",
          "lora_B",
          "layers.2",
          "w3",
          "\"r\":",
          "\"lora_alpha\":",
          "\"target_modules\":",
          "\"perigee\":",
          "\"base\":",
          "\"seed\":",
          "kda_layers",
          "full_attn_layers",
          "\"num_experts\":",
          "\"topk_group\":",
          "\"num_hidden_layers\":",
          "\"perigee_hybrid\"",
          "\"token_mixers\":",
          "\"mamba2\"",
          "\"attention\"",
          "\"mla_rope\"",
          "\"gdn\"",
          "YWI=",
          "YQ==",
          " 256",
          "\xff",
          "\xc3\xa9",
          "[[[[[[[["};
}
