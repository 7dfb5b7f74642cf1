// init, score and generate agree with each other.
#include <algorithm>
#include <filesystem>

#include "tests/apps/run_program.h"

namespace perigee {
namespace {

std::string make_model(const std::string& out, const std::string& seed,
                       const std::string& dtype = "float32") {
  const Said said = run_perigee(
      {"init", "--config", golden("tiny/config.json"), "--out", out, "--seed", seed, "--dtype", dtype});
  EXPECT_EQ(said.code, 0) << said.err;
  return slurp(out + "/model.safetensors");
}

TEST(Init, IsAFunctionOfTheSeed) {
  TempDirectory place;
  const std::string a = make_model(place / "a", "1"), b = make_model(place / "deep/b", "1"),
                    c = make_model(place / "c", "2");
  EXPECT_FALSE(a.empty());
  EXPECT_EQ(a, b);
  EXPECT_NE(a, c);
  EXPECT_LT(make_model(place / "d", "1", "bfloat16").size(), a.size() * 6 / 10);
}

// The sampler's log-probabilities are the learner's, bit for bit (JSON prints floats so that they come back).
TEST(Generate, LogProbabilitiesAreThoseOfScore) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    const Said generated =
        run_perigee({"generate", "--model", golden("tiny"), "--ids", "256,49,43,50,61", "-n", "3", "--seed",
                     "5", "--max-tokens", "70", "--ignore-stop", "--dtype", dtype, "--json"});
    ASSERT_EQ(generated.code, 0) << generated.err;
    const nlohmann::json samples = generated.json()["samples"];
    ASSERT_EQ(samples.size(), 3u);
    EXPECT_NE(samples[0]["tokens"], samples[1]["tokens"]);
    for (const auto& sample : samples) {
      std::string ids = "256,49,43,50,61";
      for (const auto& id : sample["tokens"]) ids += "," + std::to_string(id.get<int>());
      const Said scored = run_perigee({"score", "--model", golden("tiny"), "--ids", ids, "--dtype", dtype});
      ASSERT_EQ(scored.code, 0) << scored.err;
      const nlohmann::json tokens = scored.json()["tokens"];
      ASSERT_EQ(tokens.size(), sample["tokens"].size() + 5);
      EXPECT_TRUE(tokens[0]["logprob"].is_null());
      for (size_t i = 0; i < sample["tokens"].size(); ++i)
        EXPECT_EQ(tokens[i + 5]["logprob"], sample["logprobs"][i]) << dtype << " token " << i;
    }
  }
}

TEST(Generate, SameSeedSameText) {
  const std::vector<std::string> args{
      "generate", "--model", golden("tiny"), "--prompt", "12+30=", "--seed", "9", "--max-tokens", "20"};
  const Said a = run_perigee(args), b = run_perigee(args);
  EXPECT_EQ(a.code, 0) << a.err;
  EXPECT_EQ(a.out, b.out);
  EXPECT_EQ(a.out.empty() ? '\0' : a.out.back(), '\n');
}

TEST(Generate, LogitBiasMovesTheChoice) {
  const auto tokens = [](std::vector<std::string> more) {
    std::vector<std::string> args{
        "generate",     "--model", golden("tiny"), "--prompt",     "12+30=", "--temperature", "0",
        "--max-tokens", "4",       "--json",       "--ignore-stop"};
    args.insert(args.end(), more.begin(), more.end());
    const Said said = run_perigee(args);
    EXPECT_EQ(said.code, 0) << said.err;
    return said.json()["samples"][0]["tokens"].get<std::vector<int>>();
  };
  const std::vector<int> plain = tokens({});
  EXPECT_EQ(tokens({"--logit-bias", "65=1000"}), (std::vector<int>{65, 65, 65, 65}));
  EXPECT_NE(tokens({"--logit-bias", std::to_string(plain[0]) + "=-inf"})[0], plain[0]);
}

// A conversation from files is the one that --chat makes of the same words; tools change the prompt.
TEST(Generate, ConversationsAndToolsFromFiles) {
  TempDirectory place;
  const auto text = [](std::vector<std::string> more) {
    std::vector<std::string> args{"generate", "--model", golden("tiny"), "--max-tokens",
                                  "12",       "--json",  "--ignore-stop"};
    args.insert(args.end(), more.begin(), more.end());
    const Said said = run_perigee(args);
    EXPECT_EQ(said.code, 0) << said.err;
    return said.json()["samples"][0]["logprobs"].dump();
  };
  spill(place / "m.json", R"([{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2?"}])");
  spill(place / "t.json", R"([{"type": "function", "function": {"name": "add"}}])");
  const std::string chat = text({"--system", "Add.", "--chat", "1+2?"}),
                    file = text({"--messages", place / "m.json"});
  EXPECT_EQ(chat, file);
  const std::string with_tools = text({"--messages", place / "m.json", "--tools", place / "t.json"});
  EXPECT_NE(with_tools, file);
  EXPECT_EQ(with_tools, text({"--system", "Add.", "--chat", "1+2?", "--tools", place / "t.json"}));
  spill(place / "m.json", R"([{"role": "usr", "content": "1+2?"}])");
  expect_refused({"generate", "--model", golden("tiny"), "--messages", place / "m.json"},
                 "did you mean user?");
  expect_refused({"generate", "--model", golden("tiny"), "--prompt", "x", "--tools", place / "t.json"},
                 "--messages");
}

TEST(Score, TextIsBytesAfterTheBeginToken) {
  const nlohmann::json tokens =
      run_perigee({"score", "--model", golden("tiny"), "--text", "a\nb"}).json()["tokens"];
  ASSERT_EQ(tokens.size(), 4u);
  EXPECT_EQ(tokens[0]["id"], 256);
  EXPECT_EQ(tokens[1]["id"], 'a');
  EXPECT_EQ(tokens[2]["text"], "\n");
  const nlohmann::json empty = run_perigee({"score", "--model", golden("tiny"), "--text", ""}).json();
  EXPECT_EQ(empty["tokens"].size(), 1u);
  EXPECT_TRUE(empty["perplexity"].is_null());
}

}  // namespace
}  // namespace perigee
