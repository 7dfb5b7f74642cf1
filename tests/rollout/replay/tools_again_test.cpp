// Tools of stored episodes, run again: a folder that remembers, every kind of difference, and branches of branches.
#include "rollout/replay/tools_again.h"

#include <gtest/gtest.h>

#include "agents/loop/loop.h"
#include "base/error.h"
#include "base/hash.h"
#include "policy/tokenizer/chat.h"
#include "rollout/setup/environment.h"
#include "storage/store.h"
#include "tests/rollout/hub/cluster.h"

namespace perigee::rollout {
namespace {

RunConfig config_with(const nlohmann::json& tools) {
  auto config = cluster_config();
  config["environment"] = {{"tools", tools}, {"max_turns", 8}};
  return parse_run_config(config, "test");
}

struct Conversation {
  policy::ByteTokenizer tokenizer{288};
  RunConfig config = config_with({"files", "calculator"});
  std::unique_ptr<Environment> environment = Environment::make(config);
  std::vector<TaskFile> files = {{"notes.txt", "seven\n", false}};
  WholeEpisode episode;
  TempDir place;

  // A turn that makes these calls, and what the tools answer, as a run records them.
  void turn(const std::vector<std::pair<std::string, std::string>>& calls) {
    policy::Message said;
    said.role = policy::Role::kAssistant;
    said.content = "let me see";
    for (const auto& [name, arguments] : calls) {
      said.tool_calls.push_back({});
      said.tool_calls.back().name = name;
      said.tool_calls.back().arguments = arguments;
    }
    std::vector<int32_t> opening, message;
    policy::append_generation_prompt(tokenizer, opening);
    policy::append_message(tokenizer, said, number_of_calls_, message);
    const std::vector<int32_t> tokens(message.begin() + static_cast<ptrdiff_t>(opening.size()),
                                      message.end());
    add(tokens, 1);
    const auto folder = place.path / "recorded";
    if (turns_ == 0) prepare_workspace(folder, files);
    agents::ToolContext context;
    context.work = folder;
    const auto end =
        agents::end_turn(tokenizer, tokens, FinishReason::kStop, turns_, environment->config().limits);
    auto events =
        agents::run_calls(environment->tools(), end.message, turns_++, context, environment->config().limits);
    add(agents::answer_tokens(tokenizer, end.message, events), 0);
    for (auto& e : events) episode.tools.push_back(std::move(e));
  }
  void answer(const std::string& text) {
    std::vector<int32_t> tokens;
    tokenizer.append_plain(text, tokens);
    add(tokens, 1);
  }
  void add(const std::vector<int32_t>& tokens, uint8_t sampled) {
    episode.tokens.insert(episode.tokens.end(), tokens.begin(), tokens.end());
    episode.sampled.resize(episode.tokens.size(), sampled);
    episode.logprobs.resize(episode.tokens.size());
    episode.versions.resize(episode.tokens.size());
  }
  ToolTally replay(bool execute = true) const {
    ToolReplayer replayer(*environment, tokenizer, execute);
    WholeEpisode copy = episode;
    copy.record.spec.episode_id = 5;
    replayer.add(std::move(copy), files);
    replayer.finish();
    return replayer.tally();
  }

 private:
  int64_t number_of_calls_ = 0;
  int32_t turns_ = 0;
};

struct ToolsAgain : public ::testing::Test {
  Conversation c;
  void SetUp() override {
    c.turn(
        {{"files", R"({"action":"read","path":"notes.txt"})"}, {"calculator", R"({"expression":"12*12"})"}});
    c.turn({{"files", R"({"action":"write","path":"out.txt","content":"one two three"})"}});
    c.turn({{"files", R"({"action":"read","path":"out.txt"})"}, {"nonsense", "{}"}});
    c.answer("done");
    ASSERT_EQ(c.episode.tools.size(), 5u);
    ASSERT_EQ(c.episode.tools[1].output, "144");
    ASSERT_NE(c.episode.tools[3].output.find("one two three"), std::string::npos)
        << c.episode.tools[3].output;
  }
};

TEST_F(ToolsAgain, TheFolderRemembersFromTurnToTurn) {
  const ToolTally t = c.replay();
  EXPECT_EQ(t.calls, 5);
  EXPECT_EQ(t.run, 5);
  for (const auto& d : t.differences)
    ADD_FAILURE() << d.turn << " " << d.tool << " " << d.detail << " " << d.again;
}

TEST_F(ToolsAgain, RecordedRunsNothing) {
  const ToolTally t = c.replay(false);
  EXPECT_EQ(t.calls, 5);
  EXPECT_EQ(t.run, 0);
  EXPECT_TRUE(t.differences.empty());
}

TEST_F(ToolsAgain, AnAlteredByteOfAnAnswerIsNamed) {
  c.episode.tools[3].output[c.episode.tools[3].output.find("two")] = 'T';
  for (const bool execute : {true, false}) {
    const ToolTally t = c.replay(execute);
    ASSERT_EQ(t.differences.size(), 1u);
    const ToolDifference& d = t.differences[0];
    EXPECT_EQ(d.what, ToolDifference::What::kStored);
    EXPECT_EQ(d.episode, 5);
    EXPECT_EQ(d.turn, 2);
    EXPECT_EQ(d.call, 0);
    EXPECT_EQ(d.tool, "files");
    EXPECT_NE(d.detail.find(d.digest_then), std::string::npos);
    if (!execute) continue;
    EXPECT_EQ(d.digest_again, d.digest_then) << "the tool says what it said";
    EXPECT_EQ(static_cast<size_t>(d.first_byte), c.episode.tools[3].output.find("Two"));
    EXPECT_NE(d.then.find("one Two three"), std::string::npos) << d.then;
    EXPECT_NE(d.again.find("one two three"), std::string::npos) << d.again;
  }
}

// A tool that answers something else than then, though the record is sound: it is not a pure function.
TEST_F(ToolsAgain, AnAnswerThatIsAnotherNowIsNamed) {
  auto& then = c.episode.tools[1];
  then.output = "143";
  then.digest = hash128(then.output).hex();
  const ToolTally t = c.replay();
  ASSERT_EQ(t.differences.size(), 1u);
  EXPECT_EQ(t.differences[0].what, ToolDifference::What::kOutput);
  EXPECT_EQ(t.differences[0].tool, "calculator");
  EXPECT_EQ(t.differences[0].first_byte, 2);
  EXPECT_EQ(t.differences[0].then, "143");
  EXPECT_EQ(t.differences[0].again, "144");
  // Without running it, the tokens that were fed tell that the record contradicts itself.
  const ToolTally recorded = c.replay(false);
  ASSERT_EQ(recorded.differences.size(), 1u);
  EXPECT_EQ(recorded.differences[0].what, ToolDifference::What::kTokens);
}

TEST_F(ToolsAgain, AnotherStatusInputOrNumberOfCallsIsNamed) {
  c.episode.tools[0].status = "error";
  c.episode.tools[2].input = "{}";
  c.episode.tools.pop_back();
  const ToolTally t = c.replay();
  ASSERT_EQ(t.differences.size(), 3u);
  EXPECT_EQ(t.differences[0].what, ToolDifference::What::kOutput);
  EXPECT_EQ(t.differences[0].status_again, "ok");
  EXPECT_EQ(t.differences[1].what, ToolDifference::What::kCall);
  EXPECT_EQ(t.differences[2].what, ToolDifference::What::kCall);
  EXPECT_NE(t.differences[2].detail.find("2 calls, 1"), std::string::npos) << t.differences[2].detail;
}

TEST_F(ToolsAgain, OtherFilesOfTheTaskAreFound) {
  c.files[0].text = "eight\n";
  const ToolTally t = c.replay();
  ASSERT_EQ(t.differences.size(), 1u);
  EXPECT_EQ(t.differences[0].turn, 0);
  EXPECT_NE(t.differences[0].again.find("eight"), std::string::npos);
}

TEST_F(ToolsAgain, AFolderThatCannotBeMadeIsNamed) {
  c.files[0].name = "a/b";
  const ToolTally t = c.replay();
  ASSERT_EQ(t.differences.size(), 1u);
  EXPECT_EQ(t.differences[0].what, ToolDifference::What::kFailed);
}

// What a branch took over is run for its folder, and compared with its parent only.
TEST_F(ToolsAgain, OfABranchOnlyItsOwnTurnsAreCompared) {
  const auto turns = turns_of(c.episode);
  ASSERT_EQ(turns.size(), 4u);
  EXPECT_EQ(turns[0].tools.size(), 2u);
  EXPECT_EQ(turns[3].end, turns[3].fed_end);
  c.episode.own = turns[2].begin + 3;
  const ToolTally t = c.replay();
  EXPECT_EQ(t.calls, 2);
  EXPECT_EQ(t.run, 2);
  EXPECT_TRUE(t.differences.empty());
}

TEST(WholeEpisode, ABranchOfABranchTakesOverBoth) {
  TempDir dir;
  StoreOptions options;
  options.open = StoreOptions::Open::kCreate;
  Store store(dir.path / "store.sqlite", options);
  auto t = store.begin();
  RunRecord run;
  run.id = "run";
  store.create_run(run);
  const auto finish = [&](int64_t id, const std::vector<int32_t>& tokens) {
    Segment s;
    s.episode_id = id;
    s.attempt = *store.begin_attempt(id);
    s.tokens = tokens;
    s.logprobs.assign(tokens.size(), -1.0f);
    s.versions.assign(tokens.size(), 3);
    s.finish = FinishReason::kStop;
    EXPECT_EQ(store.append_segment(s), Append::kAppended);
  };
  GroupRecord group;
  std::vector<EpisodeSpec> root(1);
  root[0].prompt = {1, 2};
  root[0].max_new_tokens = 10;
  store.open_group("run", group, root);
  finish(root[0].episode_id, {10, 11, 12, 13});
  const auto branch = [&](int64_t parent, std::vector<int32_t> prompt, int32_t taken) {
    GroupRecord g;
    std::vector<EpisodeSpec> spec(1);
    spec[0].prompt = std::move(prompt);
    spec[0].parent_episode_id = parent;
    spec[0].parent_tokens = taken;
    spec[0].max_new_tokens = 10;
    store.open_branch("run", g, spec);
    return spec[0].episode_id;
  };
  const int64_t child = branch(root[0].episode_id, {1, 2, 10, 11}, 2);
  finish(child, {20, 21, 22});
  const int64_t grandchild = branch(child, {1, 2, 10, 11, 20}, 3);
  finish(grandchild, {30});
  t.commit();
  const WholeEpisode whole = whole_episode(store, grandchild);
  EXPECT_EQ(whole.prompt, (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(whole.tokens, (std::vector<int32_t>{10, 11, 20, 30}));
  EXPECT_EQ(whole.own, 3u);
  EXPECT_EQ(whole.sampled, (std::vector<uint8_t>{1, 1, 1, 1}));
}

}  // namespace
}  // namespace perigee::rollout
