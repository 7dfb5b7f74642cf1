// `perigee serve` itself, as a process: killed in the middle of turns, stopped in order, stopped twice, refused.
#include <signal.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <random>
#include <thread>

#include "base/process.h"
#include "tests/apps/run_program.h"
#include "tests/base/net/http/raw_client.h"

namespace perigee {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

json user(const std::string& text) {
  return {{"role", "user"}, {"content", text}};
}

// Of the tiny model's end tokens: its turns are as long as they may be. (A session refuses ignore_eos.)
const json kNoEnd = {{"257", -100}, {"260", -100}, {"261", -100}};

std::string post_text(uint16_t port, const std::string& path, const json& body) {
  const std::string text = body.dump();
  return "POST " + path + " HTTP/1.1\r\nHost: localhost:" + std::to_string(port) +
         "\r\nContent-Length: " + std::to_string(text.size()) + "\r\n\r\n" + text;
}

class Program {
 public:
  Program(const std::string& model, std::vector<std::string> more, const std::string& log) : log_(log) {
    std::remove(log.c_str());
    std::vector<std::string> arguments = {"serve", "--model",
                                          model,   "--port",
                                          "0",     "--threads",
                                          "1",     "--memory-mib",
                                          "64",    "--prefix-cache-mib",
                                          "8",     "--max-context",
                                          "16384"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    child_ = Child::start(PERIGEE_PROGRAM, arguments, log);
    const std::string mark = "at http://127.0.0.1:";
    for (int i = 0; i < 3000 && port_ == 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      const std::string said = slurp(log);
      const size_t at = said.find(mark);
      if (at != std::string::npos && said.find('\n', at) != std::string::npos)
        port_ = static_cast<uint16_t>(std::stoi(said.substr(at + mark.size())));
      if (child_.poll()) break;
    }
    EXPECT_NE(port_, 0) << slurp(log);
  }
  uint16_t port() const { return port_; }
  std::string said() const { return slurp(log_); }
  void signal(int number) { child_.signal(number); }
  // 1000 + the signal; -1: it still runs.
  int wait(double within_s) {
    const auto end = child_.wait(static_cast<int>(within_s * 1000));
    return !end ? -1 : end->signal != 0 ? 1000 + end->signal : end->exit_code;
  }
  json post(const std::string& path, const json& body, int expect = 200) const {
    const RawAnswer a = ask(port_, "POST", path, body.dump());
    EXPECT_EQ(a.status, expect) << body.dump().substr(0, 300) << "\n" << a.body.substr(0, 500);
    return json::parse(a.body, nullptr, false);
  }
  json get(const std::string& path) const {
    return json::parse(ask(port_, "GET", path).body, nullptr, false);
  }

 private:
  const std::string log_;
  Child child_;
  uint16_t port_ = 0;
};

class ServeProgram : public ::testing::Test {
 protected:
  void SetUp() override {
    const Said made = run_perigee(
        {"init", "--config", golden("tiny/config.json"), "--out", place_ / "tiny", "--seed", "3"});
    ASSERT_EQ(made.code, 0) << made.err;
  }
  Program serve(std::vector<std::string> more = {}) const {
    return Program(place_ / "tiny", std::move(more), place_ / "log");
  }
  Program serve_kept(std::vector<std::string> more = {}) const {
    more.insert(more.begin(), {"--dir", place_ / "dir"});
    return serve(std::move(more));
  }
  static json endless(json more = json::object()) {
    json out = {{"messages", json::array({user("go on")})},
                {"max_tokens", 12000},
                {"ignore_eos", true},
                {"seed", 1},
                {"stream", true},
                {"return_token_ids", true}};
    out.update(more);
    return out;
  }
  static int64_t chunks(const std::string& text) {
    int64_t n = 0;
    for (size_t at = text.find("data: "); at != std::string::npos; at = text.find("data: ", at + 6)) ++n;
    return n;
  }
  TempDirectory place_;
};

// One turn of a session: what is sent does not depend on what came back, but for the messages that must be repeated.
json turn_of(const std::string& name, int turn, const json& messages) {
  std::mt19937 random(static_cast<unsigned>(std::hash<std::string>()(name) + static_cast<size_t>(turn)));
  return {{"messages", messages},    {"session_id", name},   {"max_tokens", 20 + random() % 60},
          {"seed", random() % 1000}, {"logit_bias", kNoEnd}, {"return_token_ids", true}};
}
std::string question(const std::string& name, int turn) {
  return name + " asks for the " + std::to_string(turn) + "th time";
}

// Clients hold conversations, some of them streamed, until the server is killed in the middle of them; it comes back, and
// they go on where they were. Every acknowledged turn is there, at most one more per session, whole or not at all; and the
// conversations are token for token those of a server that nobody killed.
TEST_F(ServeProgram, KilledAtAnyMomentAcknowledgedTurnsPersistAndSessionsGoOn) {
  constexpr int kSessions = 4, kRounds = 6;
  struct Talk {
    std::string name;
    json messages = json::array();
    std::vector<int32_t> acknowledged;
    int turns = 0;
  };
  std::vector<Talk> talks(kSessions);
  for (int i = 0; i < kSessions; ++i) talks[i].name = "talk-" + std::to_string(i);
  std::mt19937 random(11);
  int unacknowledged = 0, cut_streams = 0;
  for (int round = 0; round < kRounds || (cut_streams == 0 && round < 5 * kRounds); ++round) {
    Program server = serve_kept();
    // What the disk has, against what was acknowledged.
    for (Talk& t : talks) {
      const json s = server.get("/v1/sessions/" + t.name + "?tokens=true");
      if (t.turns == 0 && s.contains("error")) continue;
      const auto tokens = s["token_ids"].get<std::vector<int32_t>>();
      ASSERT_GE(tokens.size(), t.acknowledged.size()) << t.name;
      EXPECT_TRUE(std::equal(t.acknowledged.begin(), t.acknowledged.end(), tokens.begin())) << t.name;
      ASSERT_TRUE(s["turns"] == t.turns || s["turns"] == t.turns + 1)
          << t.name << " " << s["turns"] << " " << t.turns;
      for (const char* key : {"mask", "logprobs", "versions"}) EXPECT_EQ(s[key].size(), tokens.size()) << key;
      if (s["turns"] == t.turns) {
        EXPECT_EQ(tokens.size(), t.acknowledged.size()) << t.name << ": part of a turn";
      } else {
        ++unacknowledged;
      }
    }
    std::vector<std::thread> clients;
    std::atomic<int> cut{0}, answered{0};
    for (Talk& t : talks)
      clients.emplace_back([&t, &cut, &answered, port = server.port(), round] {
        while (t.turns < 200) {
          json messages = t.messages;
          messages.push_back(user(question(t.name, t.turns)));
          const bool streamed = (t.turns + round) % 2 == 0;
          json body = turn_of(t.name, t.turns, messages);
          std::vector<int32_t> tokens;
          json message;
          if (streamed) {
            body["stream"] = true;
            RawClient c(port);
            if (!c.send(post_text(port, "/v1/chat/completions", body)) || !c.wait_for("data: [DONE]")) {
              cut += c.received().find("data: ") != std::string::npos;
              return;
            }
            std::string text, reasoning;
            const RawAnswer a = take_answer(c.received().append("\r\n0\r\n\r\n"));
            for (size_t at = a.body.find("data: {"); at != std::string::npos;
                 at = a.body.find("data: {", at + 7)) {
              const json e = json::parse(a.body.substr(at + 6, a.body.find('\n', at) - at - 6));
              const json& choice = e["choices"][0];
              for (const char* key : {"prompt_token_ids", "token_ids"})
                if (choice.contains(key))
                  for (const json& id : choice[key]) tokens.push_back(id);
              text += choice["delta"].value("content", "");
              reasoning += choice["delta"].value("reasoning_content", "");
            }
            message = {{"role", "assistant"}, {"content", text}};
            if (!reasoning.empty()) message["reasoning_content"] = reasoning;
          } else {
            const RawAnswer a = ask(port, "POST", "/v1/chat/completions", body.dump());
            if (!a.complete || a.status != 200) return;
            const json choice = json::parse(a.body)["choices"][0];
            for (const char* key : {"prompt_token_ids", "token_ids"})
              for (const json& id : choice[key]) tokens.push_back(id);
            message = choice["message"];
          }
          t.messages = std::move(messages);
          t.messages.push_back(message);
          t.acknowledged.insert(t.acknowledged.end(), tokens.begin(), tokens.end());
          ++t.turns;
          ++answered;
        }
      });
    // However slow the machine is, the conversations go on a little in each round.
    for (int i = 0; i < 3000 && answered < 2 * kSessions; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    std::this_thread::sleep_for(std::chrono::milliseconds(random() % 200));
    server.signal(SIGKILL);
    for (std::thread& c : clients) c.join();
    EXPECT_EQ(server.wait(10), 1000 + SIGKILL);
    cut_streams += cut;
  }
  EXPECT_GT(cut_streams, 0) << "no stream was cut: the kills came at no interesting moment";

  // The same conversations on a server that nobody kills.
  Program killed = serve_kept();
  Program control(place_ / "tiny", {"--dir", place_ / "control"}, place_ / "control.log");
  for (const Talk& t : talks) {
    ASSERT_GT(t.turns, 1) << t.name;
    std::vector<int32_t> tokens;
    for (int k = 0; k < t.turns; ++k) {
      json messages = json::array();
      for (int m = 0; m < 2 * k + 1; ++m) messages.push_back(t.messages[static_cast<size_t>(m)]);
      const json choice = control.post("/v1/chat/completions", turn_of(t.name, k, messages))["choices"][0];
      for (const char* key : {"prompt_token_ids", "token_ids"})
        for (const json& id : choice[key]) tokens.push_back(id);
    }
    EXPECT_EQ(tokens, t.acknowledged) << t.name;
    // And one turn more, of both.
    json messages = t.messages;
    messages.push_back(user(question(t.name, t.turns)));
    const json next = turn_of(t.name, t.turns, messages);
    EXPECT_EQ(killed.post("/v1/chat/completions", next)["choices"][0]["token_ids"],
              control.post("/v1/chat/completions", next)["choices"][0]["token_ids"])
        << t.name;
  }
  const Said listed = run_perigee({"rollouts", place_ / "dir", "--json"});
  ASSERT_EQ(listed.code, 0) << listed.err;
  // A session reads like a rollout, its tokens as text: the store says which model made them.
  bool found = false;
  const json list = listed.json();
  for (const json& row : list["episodes"]) {
    const Said shown = run_perigee({"show", place_ / "dir", std::to_string(row["episode"].get<int64_t>()), "--json"});
    ASSERT_EQ(shown.code, 0) << shown.err;
    const json episode = shown.json();
    std::vector<json> tokens(episode["prompt_ids"].begin(), episode["prompt_ids"].end());
    for (const json& t : episode["tokens"]) {
      EXPECT_TRUE(t["text"].is_string());
      tokens.push_back(t["id"]);
    }
    for (const auto& t : talks) {
      const size_t n = t.acknowledged.size();
      found |= n > 0 && tokens.size() >= n && std::equal(t.acknowledged.begin(), t.acknowledged.end(), tokens.begin());
    }
  }
  EXPECT_TRUE(found);
}

TEST_F(ServeProgram, TermFinishesWhatRunsAndTakesNoMore) {
  Program server = serve();
  RawClient c(server.port());
  c.send(post_text(server.port(), "/v1/chat/completions", endless({{"max_tokens", 3000}})));
  ASSERT_TRUE(c.wait_for("\"content\""));
  server.signal(SIGTERM);
  const auto until = Clock::now() + std::chrono::seconds(10);
  while (RawClient(server.port()).connected() && Clock::now() < until)
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  EXPECT_FALSE(RawClient(server.port()).connected());
  EXPECT_EQ(server.wait(0), -1) << "it ended before what ran was done";
  ASSERT_TRUE(c.wait_for("data: [DONE]", 60));
  EXPECT_NE(c.received().find("\"finish_reason\":\"length\""), std::string::npos);
  EXPECT_EQ(server.wait(20), 0) << server.said();
}

TEST_F(ServeProgram, TermHasPatienceForSoLong) {
  Program server = serve({"--patience", "1"});
  RawClient c(server.port());
  c.send(post_text(server.port(), "/v1/chat/completions", endless({{"max_tokens", 16000}})));
  ASSERT_TRUE(c.wait_for("\"content\""));
  const auto start = Clock::now();
  server.signal(SIGTERM);
  c.rest(30);
  EXPECT_EQ(server.wait(20), 0) << server.said();
  EXPECT_LT(Clock::now() - start, std::chrono::seconds(15));
}

TEST_F(ServeProgram, TermSetsSessionsDownWhereTheyAre) {
  std::vector<int32_t> before, after;
  {
    Program server = serve_kept({"--stop", "checkpoint"});
    RawClient c(server.port());
    c.send(post_text(server.port(), "/v1/chat/completions",
                     endless({{"session_id", "long"}, {"ignore_eos", false}, {"logit_bias", kNoEnd}})));
    while (chunks(c.received()) < 50) ASSERT_TRUE(c.receive());
    const auto start = Clock::now();
    server.signal(SIGTERM);
    EXPECT_EQ(server.wait(20), 0) << server.said();
    EXPECT_LT(Clock::now() - start, std::chrono::seconds(10)) << "it waited for 12,000 tokens";
  }
  Program server = serve_kept();
  const json s = server.get("/v1/sessions/long?tokens=true");
  ASSERT_EQ(s["turns"], 1) << s;
  before = s["token_ids"].get<std::vector<int32_t>>();
  EXPECT_GT(before.size(), 40u);
  EXPECT_LT(before.size(), 12000u);
  // As far as it came it is what the whole turn would have been.
  json whole = endless(
      {{"max_tokens", static_cast<int64_t>(before.size())}, {"ignore_eos", false}, {"logit_bias", kNoEnd}});
  whole["stream"] = false;
  const json choice = server.post("/v1/chat/completions", whole)["choices"][0];
  for (const char* key : {"prompt_token_ids", "token_ids"})
    for (const json& id : choice[key]) after.push_back(id);
  ASSERT_GE(after.size(), before.size());
  after.resize(before.size());
  EXPECT_EQ(before, after);
  // And it goes on.
  json messages = json::array({user("go on")});
  messages.push_back({{"role", "assistant"}, {"content", s["messages"][1]["content"]}});
  messages.push_back(user("and now?"));
  EXPECT_EQ(server.post("/v1/chat/completions", turn_of("long", 1, messages))["choices"].size(), 1u);
}

// A path says nothing of what stands there: a checkpoint may have been replaced between two starts.
TEST_F(ServeProgram, OtherWeightsInTheSameDirectoryDoNotGoOnFromStates) {
  json messages = json::array({user("one")});
  const auto refused = [](const Program& server) {
    const std::string m = ask(server.port(), "GET", "/metrics").body;
    const std::string name = "\nperigee_snapshots_refused_total ";
    const size_t at = m.find(name);
    return at == std::string::npos ? -1 : std::stoi(m.substr(at + name.size()));
  };
  for (int start = 0; start < 3; ++start) {
    if (start == 2) {  // the same architecture, in the same place
      const Said made = run_perigee(
          {"init", "--config", golden("tiny/config.json"), "--out", place_ / "next", "--seed", "4"});
      ASSERT_EQ(made.code, 0) << made.err;
      std::filesystem::rename(place_ / "tiny", place_ / "before");
      std::filesystem::rename(place_ / "next", place_ / "tiny");
    }
    Program server = serve_kept();
    const json answer = server.post("/v1/chat/completions", turn_of("s", start, messages));
    messages.push_back(answer["choices"][0]["message"]);
    messages.push_back(user("more"));
    EXPECT_EQ(refused(server) > 0, start == 2) << start << ": " << refused(server);
    server.signal(SIGTERM);
    EXPECT_EQ(server.wait(60), 0) << server.said();
  }
}

TEST_F(ServeProgram, ASecondTermEndsItAtOnce) {
  std::vector<int32_t> acknowledged;
  {
    Program server = serve_kept({"--patience", "600"});
    const json first = server.post("/v1/chat/completions", turn_of("kept", 0, json::array({user("one")})));
    for (const char* key : {"prompt_token_ids", "token_ids"})
      for (const json& id : first["choices"][0][key]) acknowledged.push_back(id);
    RawClient c(server.port());
    c.send(post_text(server.port(), "/v1/chat/completions", endless({{"max_tokens", 16000}})));
    ASSERT_TRUE(c.wait_for("\"content\""));
    server.signal(SIGTERM);
    const auto until = Clock::now() + std::chrono::seconds(10);
    while (server.said().find("stopping") == std::string::npos && Clock::now() < until)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    EXPECT_NE(server.said().find("stopping: 1 requests to finish (again: now)"), std::string::npos)
        << server.said();
    EXPECT_EQ(server.wait(0.3), -1);
    const auto start = Clock::now();
    server.signal(SIGTERM);
    EXPECT_EQ(server.wait(60), 130);
    EXPECT_LT(Clock::now() - start, std::chrono::seconds(60)) << "its patience is ten minutes";
  }
  Program server = serve_kept();
  EXPECT_EQ(server.get("/v1/sessions/kept?tokens=true")["token_ids"], json(acknowledged));
}

TEST_F(ServeProgram, WhatKeepsItFromStartingIsOneLine) {
  Program server = serve();
  const auto refused = [&](std::vector<std::string> more, const std::string& needle) {
    more.insert(more.begin(), {"serve", "--model", place_ / "tiny"});
    const Said said = run_perigee(more);
    EXPECT_TRUE(said.code == 1 || said.code == 2) << said.code << said.err;
    EXPECT_EQ(said.out, "");
    EXPECT_EQ(std::count(said.err.begin(), said.err.end(), '\n'), 1) << said.err;
    EXPECT_TRUE(said.err.starts_with("perigee: error: ")) << said.err;
    EXPECT_NE(said.err.find(needle), std::string::npos) << said.err;
  };
  const std::string taken = std::to_string(server.port());
  refused({"--port", taken}, "127.0.0.1:" + taken + ": cannot listen there: Address already in use");
  refused({"--port", "0", "--admin-port", taken}, "127.0.0.1:" + taken + ": cannot listen there");
  refused({"--port", "0", "--host", "0.0.0.0"}, "--key-file");
  refused({"--port", "0", "--host", "example"}, "--host example");
  refused({"--port", "70000"}, "--port 70000");
  refused({"--port", "0", "--tools", "[\"nonsense\"]"}, "nonsense");
  EXPECT_EQ(server.get("/health")["status"], "ok");
  server.signal(SIGINT);
  EXPECT_EQ(server.wait(20), 0) << server.said();
}

// The server goes on with what was opened first, and the weights alone are others: what it answers is what a server of them
// answers. A model that has no place there changes nothing.
TEST_F(ServeProgram, OtherWeightsWhileItRuns) {
  const std::string next = place_ / "next", wide = place_ / "wide";
  ASSERT_EQ(run_perigee({"init", "--config", golden("tiny/config.json"), "--out", next, "--seed", "4"}).code, 0);
  json config = json::parse(slurp(golden("tiny/config.json")));
  config["intermediate_size"] = config["intermediate_size"].get<int>() * 2;
  spill(place_ / "wide.json", config.dump());
  ASSERT_EQ(run_perigee({"init", "--config", place_ / "wide.json", "--out", wide}).code, 0);
  const json body = {{"messages", json::array({user("go on")})}, {"max_tokens", 20}, {"seed", 1}, {"return_token_ids", true}};
  const auto tokens = [&](const Program& p) { return p.post("/v1/chat/completions", body)["choices"][0]["token_ids"]; };
  const json expected = tokens(Program(next, {}, place_ / "other"));

  Program server = serve({"--admin-port", "0"});
  const std::string said = server.said(), mark = "admin at http://127.0.0.1:";
  const auto admin = static_cast<uint16_t>(std::stoi(said.substr(said.find(mark) + mark.size())));
  const json first = tokens(server);
  EXPECT_NE(first, expected);
  for (const std::string& wrong : {wide, place_ / "nothing"}) {
    EXPECT_EQ(ask(admin, "POST", "/admin/weights", json{{"path", wrong}}.dump()).status, 400) << wrong;
    EXPECT_EQ(tokens(server), first);
  }
  for (int version = 1; version < 4; ++version) {
    const RawAnswer a = ask(admin, "POST", "/admin/weights", json{{"path", next}}.dump());
    ASSERT_EQ(a.status, 200) << a.body;
    const json answer = server.post("/v1/chat/completions", body);
    EXPECT_EQ(answer["choices"][0]["token_ids"], expected);
    EXPECT_EQ(answer["weight_version"], version);
    EXPECT_EQ(server.post("/tokenize", {{"prompt", "go on"}})["tokens"].size(), 5u) << "the tokenizer stays";
  }
  server.signal(SIGTERM);
  EXPECT_EQ(server.wait(20), 0) << server.said();
}

// Two servers on one directory would each believe they know the sessions.
TEST_F(ServeProgram, ADirectoryHasOneServer) {
  Program server = serve_kept();
  const Said said =
      run_perigee({"serve", "--model", place_ / "tiny", "--port", "0", "--dir", place_ / "dir"});
  EXPECT_NE(said.code, 0);
  EXPECT_TRUE(said.err.starts_with("perigee: error: ")) << said.err;
  EXPECT_EQ(server.get("/health")["status"], "ok");
}

}  // namespace
}  // namespace perigee
