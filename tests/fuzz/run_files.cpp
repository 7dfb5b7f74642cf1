// The files of a run that people write, or that lay about since another version wrote them: its configuration, as it begins
// and as a resumed run compares it with the one in its store, and its tasks. The first byte says which.
#include <cstdlib>
#include <fstream>
#include <string_view>

#include "base/error.h"
#include "base/json.h"
#include "base/leftovers.h"
#include "rollout/run/resume_check.h"
#include "rollout/tasks/tasks.h"
#include "tests/fuzz/target.h"

namespace {

using namespace perigee;
using namespace perigee::rollout;

void require(bool holds) {
  if (!holds) std::abort();
}

std::string put(const char* name, std::string_view bytes) {
  static const TemporaryFolder folder("fuzz");
  std::ofstream(folder.path() / name, std::ios::binary | std::ios::trunc) << bytes;
  return (folder.path() / name).string();
}

// Without these there is no run.
constexpr const char* kNeeded =
    R"("model":{"config":{"architectures":["KimiLinearForCausalLM"],"model_type":"kimi_linear","dtype":"float32","vocab_size":288,"hidden_size":64,"intermediate_size":128,"moe_intermediate_size":32,"num_hidden_layers":2,"num_attention_heads":2,"num_key_value_heads":2,"head_dim":32,"hidden_act":"silu","q_lora_rank":null,"kv_lora_rank":32,"qk_nope_head_dim":32,"qk_rope_head_dim":16,"v_head_dim":32,"mla_use_nope":true,"num_experts":8,"num_experts_per_token":2,"num_shared_experts":1,"first_k_dense_replace":1,"moe_layer_freq":1,"num_expert_group":1,"topk_group":1,"use_grouped_topk":true,"moe_renormalize":true,"moe_router_activation_func":"sigmoid","routed_scaling_factor":1.0,"rms_norm_eps":1e-05,"rope_theta":10000.0,"rope_scaling":null,"tie_word_embeddings":false,"model_max_length":4096,"bos_token_id":256,"eos_token_id":257,"pad_token_id":258,"initializer_range":0.08,"num_nextn_predict_layers":0,"use_cache":true,"linear_attn_config":{"kda_layers":[1],"full_attn_layers":[2],"head_dim":32,"num_heads":2,"short_conv_kernel_size":4}}},"tasks":{"kind":"arithmetic","min_digits":2,"max_digits":2},"reward":[{"verifier":"numeric","take":"whole"}])";

// What the store remembers of a run is the effective configuration.
void read_config(const nlohmann::json& value) {
  static const RunConfig plain =
      parse_run_config(nlohmann::json::parse(std::string("{") + kNeeded + "}"), "plain");
  const RunConfig c = parse_run_config(value, "config.json");
  const RunConfig again = parse_run_config(nlohmann::json::parse(c.effective.dump()), "store.sqlite");
  require(again.effective == c.effective && changed_keys(again, c).empty());
  for (const auto& lines : {changed_keys(plain, c), changed_keys(c, plain)})
    for (const std::string& line : lines) require(line.find('\n') == std::string::npos);
}

void read_tasks(std::string_view bytes) {
  const std::string path = put("train.jsonl", bytes);
  const std::string held_out = put("held_out.jsonl", R"({"prompt": "of this alone", "answer": "4"})");
  const auto tasks =
      make_task_source({{"kind", "jsonl"}, {"path", path}, {"held_out_path", held_out}}, "tasks", 3);
  for (uint64_t i = 0; i < std::min<uint64_t>(2 * tasks->train_count(), 20); ++i) {
    const Task t = tasks->train(i);
    require(t.index == i && t.prompt.empty() != t.messages.empty());
  }
}

void make_tasks(const nlohmann::json& value) {
  const auto tasks = make_task_source(value, "tasks", 3);
  if (tasks->levels() > 8) return;
  for (uint64_t i = 0; i < 2 * tasks->levels(); ++i) require(tasks->train(i) == tasks->train(i));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    switch (data[0] % 3) {
      case 0:
        read_config(parse_json(bytes, "config.json", {.comments = true}));
        break;
      case 1:
        read_tasks(bytes);
        break;
      default: {
        const nlohmann::json value = parse_json(bytes, "tasks");
        // A file of this machine is none of the input's.
        if (value.is_object() && value.value("kind", nlohmann::json()) != "jsonl") make_tasks(value);
      }
    }
  } catch (const Error& e) {
    require(e.kind() == Error::Kind::kInput &&
            std::string_view(e.what()).find('\n') == std::string_view::npos);
  }
  return 0;
}

std::vector<std::string> fuzz_seeds() {
  const std::string needed = kNeeded;
  return {
      std::string(1, '\0') + "{" + needed +
          R"(,"run":{"name":"r","seed":1,"numerics":"portable","device":"cpu"},"warmup":{"steps":4,"batch":6,"lr":3e-3},"rollout":{"groups_per_step":4,"group_size":8,"max_new_tokens":48,"temperature":0.5,"logit_bias":{"3":-1}},"engine":{"max_running":12,"prefill_chunk":96},"learn":{"steps":14,"loss":"dapo","lr":2e-4,"lora":{"rank":8,"targets":["q_proj"]}},"eval":{"every":20,"tasks":6},"checkpoint":{"every":20},"storage":{"keep":"all"},"bus":{"window":64},"workers":{"policy":2}})",
      std::string(1, '\0') + "{" + needed + "}",
      std::string(1, '\0') + "// a comment\n{" + needed +
          R"(,"environment":{"tools":["calculator"],"max_turns":2,"declare":false},"learn":{"steps":3,"schedule":"cosine"},"rollout":{"mode":"async","max_policy_lag":2}})",
      "\1{\"prompt\":\"1+1\",\"answer\":2,\"verifier\":\"numeric\",\"worked_example\":\"so "
      "2\"}\n\n{\"prompt\":\"2+1\",\"answer\":\"3\",\"id\":7}\r\n",
      "\1"
      R"({"messages":[{"role":"system","content":"s"},{"role":"user","content":"u"},{"role":"assistant","content":null,"tool_calls":[{"id":"functions.f:0","type":"function","function":{"name":"f","arguments":"{\"a\":1}"}}]},{"role":"tool","tool_call_id":"functions.f:0","content":"1"}],"tools":[{"type":"function","function":{"name":"f"}}],"answer":"4","worked_turns":[{"role":"assistant","content":"4"}],"files":{"a.txt":"x"},"databases":{"d.db":"create table t"}})",
      "\2"
      R"({"kind":"arithmetic","min_digits":1,"max_digits":2,"min_operands":2,"max_operands":3,"operators":"+-*","negative":true})",
      "\2"
      R"({"kind":"countdown","min_numbers":3,"max_numbers":4,"max_number":10,"max_target":100})",
      "\2"
      R"({"kind":"sort","items":"letters","min_length":3,"max_length":6,"max_number":99})",
      "\2"
      R"({"kind":"mqar","length":64,"pairs":4,"queries":4,"values":10,"key_length":1,"gaps":"near"})",
      "\2"
      R"({"kind":"stack","length":64,"stacks":4,"elements":26,"pushes":0.6})",
      "\2"
      R"({"kind":"palindrome","lengths":[16,32],"held_out_lengths":[48],"symbols":26,"curriculum":{"floor":0.05}})",
      "\2"
      R"({"kind":"needle","length":512,"variant":"single","levels":[{"name":"a","length":512,"weight":1},{"name":"b","length":700,"weight":0}]})",
  };
}

std::vector<std::string> fuzz_words() {
  return {"{",
          "}",
          "[",
          "]",
          ",",
          ":",
          "\"",
          "\n",
          "null",
          "true",
          "false",
          "-1",
          "0",
          "1",
          "2",
          "1e999",
          "1e300",
          "1e-300",
          "0.5",
          "2147483648",
          "4294967296",
          "9223372036854775807",
          "9223372036854775808",
          "18446744073709551615",
          "9007199254740993",
          "{}",
          "[]",
          "\"kind\":",
          "\"levels\":",
          "\"lengths\":",
          "\"weight\":",
          "\"length\":",
          "\"name\":",
          "\"numbers\"",
          "\"curriculum\":",
          "\"run\":",
          "\"learn\":",
          "\"lora\":",
          "\"loss\":",
          "\"dr_grpo\"",
          "\"gspo\"",
          "\"cispo\"",
          "\"schedule\":",
          "\"cosine\"",
          "\"mode\":",
          "\"async\"",
          "\"max_policy_lag\":",
          "\"messages\":",
          "\"role\":",
          "\"tool\"",
          "\"assistant\"",
          "\"content\":",
          "\"prompt\":",
          "\"tools\":",
          "\"answer\":",
          "\"files\":",
          "\"logit_bias\":",
          "\"-inf\"",
          "\"variable_tracking\"",
          "\"common_words\"",
          "\"frequent_words\"",
          "\"mrcr\"",
          "\\u0000",
          "\\n",
          "\\ud83d\\ude00",
          "\xff",
          "\xc3\xa9",
          "[[[[[[[[",
          "//",
          "/*"};
}
