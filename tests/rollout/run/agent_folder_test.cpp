// The folder of an episode that a second attempt goes on with: as its committed turns left it, whatever was lost.
#include <gtest/gtest.h>

#include <fstream>

#include "base/file.h"
#include "policy/engine/backend.h"
#include "policy/tokenizer/chat.h"
#include "rollout/roles/agent_episodes.h"
#include "rollout/setup/run_model.h"
#include "tests/rollout/run/tiny_run.h"

namespace perigee::rollout {
namespace {

namespace fs = std::filesystem;

std::vector<int32_t> call_of_files(const policy::Tokenizer& tokenizer, const std::string& arguments) {
  policy::Message said;
  said.role = policy::Role::kAssistant;
  said.tool_calls.push_back({});
  said.tool_calls.back().name = "files";
  said.tool_calls.back().arguments = arguments;
  std::vector<int32_t> opening, message;
  policy::append_generation_prompt(tokenizer, opening);
  int64_t number = 0;
  policy::append_message(tokenizer, said, number, message);
  return {message.begin() + static_cast<int64_t>(opening.size()), message.end()};
}

TEST(AgentFolder, OfASecondAttemptHoldsWhatCommittedTurnsLeftAndNoMore) {
  auto json = tiny_config();
  json["environment"] = {{"tools", {"files"}}, {"max_turns", 8}};
  const RunConfig config = parse_run_config(json, "test");
  const auto layout = make_layout(config);
  const policy::ByteTokenizer tokenizer(288);
  const auto environment = Environment::make(config);
  kernels::Context ctx(1);
  policy::Engine engine(policy::host_backend(ctx, *layout, int64_t{1} << 24), *layout, config.engine);
  TempDir dir;
  // What a killed worker left: a turn that it lost had overwritten one file and made another.
  fs::create_directories(dir.path / "7");
  std::ofstream(dir.path / "7" / "kept.txt") << "lost";
  std::ofstream(dir.path / "7" / "lost.txt") << "lost";

  AgentEpisodes agents(engine, tokenizer, *environment, dir.path);
  std::vector<int32_t> committed = call_of_files(tokenizer, R"({"action":"write","path":"kept.txt","content":"one"})");
  std::vector<uint8_t> mask(committed.size(), 1);
  committed.resize(committed.size() + 6, 1);
  mask.resize(committed.size(), 0);
  agents.begin({.id = 7,
                .folder = "7",
                .committed = committed,
                .mask = mask,
                .max_new_tokens = 500,
                .files = {{"notes.txt", "seven\n", false}}});
  const auto turn = call_of_files(tokenizer, R"({"action":"write","path":"second.txt","content":"two"})");
  for (size_t i = 0; i < turn.size(); ++i) {
    policy::GeneratedToken t;
    t.id = 7;
    t.token = turn[i];
    t.finish = i + 1 == turn.size() ? FinishReason::kStop : FinishReason::kNone;
    EXPECT_EQ(agents.take(t), FinishReason::kNone);
  }
  EXPECT_TRUE(agents.waiting());
  agents.wait(600000);
  EXPECT_EQ(read_file((dir.path / "7" / "kept.txt").string()), "one");
  EXPECT_EQ(read_file((dir.path / "7" / "second.txt").string()), "two");
  EXPECT_TRUE(fs::exists(dir.path / "7" / "notes.txt"));
  EXPECT_FALSE(fs::exists(dir.path / "7" / "lost.txt"));
}

}  // namespace
}  // namespace perigee::rollout
