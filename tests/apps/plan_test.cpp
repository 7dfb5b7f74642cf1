// perigee doctor --model: what a model takes of a device's memory.
#include "tests/apps/run_program.h"

namespace perigee {
namespace {

constexpr char kModel[] = "configs/model/kimi-linear-48b.json";

nlohmann::json plan_of(std::vector<std::string> args) {
  args.insert(args.begin(), {"doctor", "--json", "--model", kModel});
  const Said said = run_perigee(args);
  EXPECT_EQ(said.err, "");
  const nlohmann::json report = said.json();
  if (!report.is_object() || !report.contains("plan")) {
    ADD_FAILURE() << said.out;
    return {};
  }
  return report["plan"];
}

// Everything that fits, fits; one more would not.
void expect_consistent(const nlohmann::json& plan) {
  const int64_t memory = plan["device"]["bytes"], weights = plan["weight_bytes"], left = plan["left_bytes"];
  EXPECT_EQ(left, memory - weights - plan["temporary"]["bytes"].get<int64_t>());
  const int64_t block = plan["sequence"]["block_bytes"], of_block = plan["sequence"]["block_tokens"];
  for (const auto& c : plan["contexts"]) {
    const int64_t tokens = c["tokens"], bytes = c["bytes"], fit = c["fit"];
    EXPECT_EQ(bytes, plan["sequence"]["bytes"].get<int64_t>() + (tokens + of_block - 1) / of_block * block);
    EXPECT_LE(fit * bytes, left);
    EXPECT_GT((fit + 1) * bytes, left);
  }
}

// The architecture by hand: 27 layers of which 7 keep latents of 512 + 64 numbers a token, 20 layers with a state of
// 32 heads of 128 x 128.
TEST(Plan, KnowsTheArchitecture) {
  const nlohmann::json plan = plan_of({"--device", "cpu", "--memory-gib", "140"});
  ASSERT_TRUE(plan.is_object());
  EXPECT_EQ(plan["dtype"], "bfloat16");
  const int64_t parameters = plan["parameters"];
  EXPECT_EQ(parameters, 49122681728) << "as the checkpoint's index says";
  EXPECT_GE(plan["weight_bytes"], 2 * parameters);
  EXPECT_LE(plan["weight_bytes"], 2.01 * static_cast<double>(parameters));
  EXPECT_EQ(plan["token_bytes"], 7 * 576 * 4);
  EXPECT_EQ(plan["all_mla_token_bytes"], 27 * 576 * 4);
  EXPECT_GE(plan["sequence"]["bytes"], 20 * 32 * 128 * 128 * 4);
  EXPECT_LE(plan["sequence"]["bytes"], 20 * 32 * 128 * (128 + 3 * 16 + 16) * 4)
      << "state, windows, an open chunk";
  EXPECT_EQ(plan["training"]["bytes_per_element"], 16);
  EXPECT_GE(plan["training"]["bytes"], 16 * parameters);
  EXPECT_EQ(plan["training"]["fits"], false);
  // Two moments in 2.03 bytes an element instead of 8.
  const double saved = plan["training"]["bytes"].get<double>() - plan["training"]["bytes_8bit"].get<double>();
  EXPECT_NEAR(saved / (plan["training"]["bytes"].get<double>() / 16), 8 - 2.03125, 1e-3);
  EXPECT_EQ(plan["training"]["fits_8bit"], false);
  ASSERT_EQ(plan["contexts"].size(), 3u);
  EXPECT_EQ(plan["contexts"][0]["tokens"], 4096);
  EXPECT_EQ(plan["contexts"][2]["tokens"], 1 << 20);
  expect_consistent(plan);
  EXPECT_EQ(plan_of({"--device", "cpu", "--memory-gib", "2000"})["training"]["fits"], true);
  // Of adapters only they are held again: 1/3000 of the model here.
  EXPECT_EQ(plan["lora"]["rank"], 16);
  EXPECT_GT(plan["lora"]["parameters"].get<int64_t>(), 5000000);
  EXPECT_LT(plan["lora"]["bytes"].get<int64_t>(), plan["weight_bytes"].get<int64_t>() / 2);
}

TEST(Plan, OfAGpuThatIsElsewhere) {
#if defined(PERIGEE_HAVE_CUDA)
  const nlohmann::json plan = plan_of({"--device", "cuda", "--memory-gib", "139", "--contexts", "100,4k,1M"});
  ASSERT_TRUE(plan.is_object());
  EXPECT_EQ(plan["token_bytes"], 7 * 576 * 2) << "bfloat16 there";
  EXPECT_EQ(plan["all_mla_token_bytes"], 27 * 576 * 2);
  EXPECT_GE(plan["sequence"]["bytes"], 20 * 32 * 128 * 128 * 4) << "the states stay in float32";
  EXPECT_EQ(plan["contexts"][0]["tokens"], 100);
  EXPECT_GT(plan["contexts"][1]["fit"], 64);
  EXPECT_GE(plan["contexts"][2]["fit"], 4);
  expect_consistent(plan);
#else
  expect_refused({"doctor", "--model", kModel, "--device", "cuda", "--memory-gib", "139"}, "without CUDA");
#endif
}

TEST(Plan, WithoutAGpuSaysHowToPlanForOne) {
  const nlohmann::json report = run_perigee({"doctor", "--json"}).json();
  bool usable = false;
  for (const auto& finding : report["findings"])
    usable = usable || (finding["name"] == "GPU" &&
                        finding["value"].get<std::string>().find("multiprocessors") != std::string::npos);
  if (usable)
    expect_consistent(plan_of({"--device", "cuda"}));
  else
    expect_refused({"doctor", "--model", kModel, "--device", "cuda"}, "--memory-gib");
}

TEST(Plan, ReadsWell) {
  const Said said = run_perigee({"doctor", "--model", kModel, "--device", "cpu", "--memory-gib", "140"});
  for (const char* line :
       {"weights ", "temporary buffers ", "4k tokens ", "1M tokens ", "at once", "does not fit",
        "cache per token       16128 B  with MLA in every layer 62208 B: -74.1 %"})
    EXPECT_NE(said.out.find(line), std::string::npos) << line << "\n" << said.out;
}

TEST(Plan, OfASmallModelOnThisMachine) {
  const Said said = run_perigee({"doctor", "--json", "--device", "cpu", "--model", golden("tiny")});
  const nlohmann::json plan = said.json()["plan"];
  ASSERT_TRUE(plan.is_object()) << said.out << said.err;
  EXPECT_EQ(plan["dtype"], "float32");
  EXPECT_EQ(plan["training"]["bytes_per_element"], 12) << "float32 weights are their own masters";
  EXPECT_FALSE(plan["contexts"].empty());
  expect_consistent(plan);
}

// Any mixers. Temporary buffers by hand: what stands at once when a mixer's half ends.
TEST(Plan, OfAnyMixers) {
  const TempDirectory place;
  const auto plan = [&](const char* mixer) {
    const nlohmann::json config = {
        {"model_type", "perigee_hybrid"},
        {"token_mixers", {mixer}},
        {"num_hidden_layers", 400},
        {"vocab_size", 256},
        {"hidden_size", 64},
        {"intermediate_size", 64},
        {"linear_attn_config", {{"num_heads", 16}, {"head_dim", 128}, {"short_conv_kernel_size", 4}}},
        {"num_attention_heads", 16},
        {"num_key_value_heads", 8},
        {"head_dim", 128},
        {"kv_lora_rank", 32},
        {"qk_nope_head_dim", 16},
        {"qk_rope_head_dim", 8},
        {"v_head_dim", 16},
        {"bos_token_id", 0},
        {"eos_token_id", 1},
        {"pad_token_id", 2}};
    const std::string file = place / (std::string(mixer) + ".json");
    spill(file, config.dump());
    const Said said =
        run_perigee({"doctor", "--json", "--device", "cpu", "--memory-gib", "140", "--model", file});
    EXPECT_EQ(said.err, "") << mixer;
    const nlohmann::json report = said.json();
    return report.is_object() ? report["plan"] : nlohmann::json();
  };
  const auto temporary = [](const nlohmann::json& p, int64_t values) {
    const nlohmann::json& t = p["temporary"];
    EXPECT_GE(t["bytes"].get<int64_t>(),
              4 * t["rows"].get<int64_t>() * values + 2 * 4 * 256 * t["sequences"].get<int64_t>());
  };
  const int64_t D = 64, wide = 16 * 128;
  for (const char* mixer : {"kda", "gdn", "mamba2", "dplr", "mla", "mla_rope", "attention"}) {
    const nlohmann::json p = plan(mixer);
    ASSERT_TRUE(p.is_object()) << mixer;
    expect_consistent(p);
    const std::string_view name = mixer;
    // qkv before and after the convolution, q and k normalised, f, e, gate, g, what is written, o, normed
    if (name == "dplr") temporary(p, 4 * D + 15 * wide + 3 * 128);
    // q and o, as they are and group by group; keys and values of 8 heads
    if (name == "attention") temporary(p, 4 * D + 4 * wide + 2 * 8 * 128);
    // q_proj and o_proj alone of what adapters are added to by default
    if (name == "mla") {
      EXPECT_EQ(p["lora"]["parameters"], 400 * 16 * ((D + 16 * 24) + (16 * 16 + D)));
    }
    EXPECT_GE(p["lora"]["bytes"].get<int64_t>(), 4 * p["lora"]["tokens"].get<int64_t>() * D * (2 * 400 + 1))
        << mixer << ": the residual stream before and after every half";
  }
}

TEST(Plan, RefusesWhatCannotFitWithTheNumbers) {
  const std::vector<std::string> args = {"doctor", "--model",      kModel, "--device",
                                         "cpu",    "--memory-gib", "16"};
  expect_refused(args, "the weights alone take 91.5 GiB");
  expect_refused(args, "a machine has 16 GiB");
}

TEST(Plan, RefusesBadOptions) {
  const auto refused = [](std::vector<std::string> more, const std::string& needle) {
    more.insert(more.begin(), {"doctor", "--model", kModel, "--memory-gib", "140"});
    expect_refused(more, needle);
  };
  refused({"--device", "tpu"}, "--device \"tpu\": cpu or cuda is expected");
  for (const char* word : {"4q", "4k,,8k", "0", "-1", "4k,", "99999999999M"})
    refused({"--device", "cpu", "--contexts", word}, "--contexts:");
  refused({"--device", "cpu", "--contexts", "2M"}, "2097152 tokens are more than the 1048576");
  expect_refused({"doctor", "--model", kModel, "--device", "cpu", "--memory-gib", "0"}, "--memory-gib 0");
  expect_refused({"doctor", "--contexts", "4k"}, "go with --model");
  expect_refused({"doctor", "--model", "configs/model/none.json"}, "configs/model/none.json");
}

}  // namespace
}  // namespace perigee
