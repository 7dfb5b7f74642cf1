// What clients and administrators of a server of days depend on.
#include <filesystem>
#include <fstream>

#include "tests/agents/server/served_model.h"

namespace perigee::agents {
namespace {

json endless(json more = json::object()) {
  json out = {{"messages", {user("go on")}}, {"max_tokens", 6000}, {"ignore_eos", true}, {"seed", 1}};
  out.update(more);
  return out;
}

std::string request_text(uint16_t port, const std::string& path, const std::string& body) {
  return "POST " + path + " HTTP/1.1\r\nHost: localhost:" + std::to_string(port) +
         "\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

json turn(const std::string& session, const json& messages) {
  return {{"messages", messages}, {"session_id", session}, {"max_tokens", 12}, {"seed", 1}};
}

// The answer to a request that was sent again costs the client's books what the first one did.
TEST(ServerOfDays, ARepeatedTurnCountsTheTokensOfTheFirst) {
  ServedModel s;
  json messages = json::array({user("one")});
  for (int i = 0; i < 3; ++i) {
    const json first = s.post("/v1/chat/completions", turn("s", messages));
    const json again = s.post("/v1/chat/completions", turn("s", messages));
    for (const char* key : {"prompt_tokens", "completion_tokens", "total_tokens"})
      EXPECT_EQ(again["usage"][key], first["usage"][key]) << key;
    EXPECT_EQ(again["usage"]["total_tokens"], s.get("/v1/sessions/s")["tokens"]);
    messages.push_back(first["choices"][0]["message"]);
    messages.push_back(user("more"));
  }
}

// A server that stops may commit a turn as far as it came; who asks again gets that.
TEST(ServerOfDays, ATurnThatWasSetDownIsAnsweredAsFarAsItCame) {
  MemoryLog log;
  ServedOptions o;
  o.log = &log;
  json body = turn("s", json::array({user("one")}));
  body["max_tokens"] = 6000;
  body["logit_bias"] = {{"261", -100}, {"257", -100}, {"260", -100}};
  {
    ServedModel s(o);
    RawClient c(s.port());
    body["stream"] = true;
    c.send(request_text(s.port(), "/v1/chat/completions", body.dump()));
    ASSERT_TRUE(c.wait_for("\"content\":\"", 60));
    s.host().stop(PauseMode::kKeep);
  }
  ServedModel s(o);
  const json seen = s.get("/v1/sessions/s?tokens=true");
  ASSERT_EQ(seen["turns"], 1);
  body["stream"] = false;
  body["return_token_ids"] = true;
  const json again = s.post("/v1/chat/completions", body);
  EXPECT_EQ(again["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(again["choices"][0]["message"]["content"], seen["messages"][1]["content"]);
  EXPECT_EQ(again["usage"]["total_tokens"], seen["tokens"]);
  const json next =
      s.post("/v1/chat/completions",
             turn("s", json::array({user("one"), again["choices"][0]["message"], user("and now?")})));
  EXPECT_EQ(next["choices"].size(), 1u);
}

// Nested without end: what is recursive over JSON must not see it.
TEST(ServerOfDays, ArgumentsAreOfAModestDepthEverywhere) {
  ServedModel s;
  const std::string deep = "{\"a\":" + std::string(2000, '[') + std::string(2000, ']') + "}";
  const json call = {{"id", "c"}, {"type", "function"}, {"function", {{"name", "f"}, {"arguments", deep}}}};
  const json messages = {user("x"), {{"role", "assistant"}, {"tool_calls", {call}}}, user("y")};
  s.post("/v1/sessions", {{"id", "deep"}}, 201);
  EXPECT_EQ(s.post("/v1/chat/completions", {{"messages", messages}}, 400)["error"]["param"],
            "messages[1].tool_calls[0].function.arguments");
  EXPECT_EQ(s.post("/v1/sessions/deep/run", {{"messages", messages}}, 400)["error"]["param"],
            "messages[1].tool_calls[0].function.arguments");
  EXPECT_EQ(s.post("/tokenize", {{"messages", messages}}, 400)["error"]["param"],
            "messages[1].tool_calls[0].function.arguments");
  const json input = {user("x"),
                      {{"type", "function_call"}, {"call_id", "c"}, {"name", "f"}, {"arguments", deep}}};
  EXPECT_EQ(s.post("/v1/responses", {{"input", input}}, 400)["error"]["param"], "input[1].arguments");
}

// Several prompts in one request: the one that finds no room says why, not those that ended for its sake.
TEST(ServerOfDays, WhatKeepsOnePromptOfSeveralFromStartingIsTheAnswer) {
  ServedOptions o;
  o.max_queued = 2;
  ServedModel s(o);
  s.host().pause(PauseMode::kKeep);
  const std::string prompts = json{{"prompt", {"a", "b", "c"}}, {"max_tokens", 2}}.dump();
  const RawAnswer a = ask(s.port(), "POST", "/v1/completions", prompts);
  EXPECT_EQ(a.status, 503);
  EXPECT_EQ(json::parse(a.body)["error"]["code"], "overloaded");
  EXPECT_FALSE(a.headers.contains("x-should-retry")) << "trying again later may help";
  EXPECT_TRUE(ServedModel::eventually([&] { return s.host().stats().queued == 0; }, 60));
  s.host().resume();
  EXPECT_EQ(s.post("/v1/completions", {{"prompt", {"a", "b"}}, {"max_tokens", 2}})["choices"].size(), 2u);
  EXPECT_TRUE(ServedModel::eventually([&] { return s.quiet(); }));
}

// Pausing until all is done may take hours: whoever asked for it twice can still be overruled.
TEST(ServerOfDays, APauseThatWaitsLeavesTheAdministratorInCharge) {
  ServedModel s;
  RawClient c(s.port());
  c.send(request_text(s.port(), "/v1/chat/completions", endless({{"stream", true}}).dump()));
  ASSERT_TRUE(c.wait_for("\"content\"", 60));
  std::vector<std::unique_ptr<RawClient>> waiting;
  for (int i = 0; i < 6; ++i) {
    waiting.push_back(std::make_unique<RawClient>(s.api().admin_port()));
    waiting.back()->send(request_text(s.api().admin_port(), "/admin/pause", R"({"mode":"wait"})"));
  }
  // A request that comes later is put off: the pause has begun.
  EXPECT_EQ(s.get("/liveness")["status"], "ok");
  EXPECT_EQ(ask(s.api().admin_port(), "GET", "/admin/status").status, 200);
  s.admin("resume", json::object());
  for (const auto& w : waiting) w->wait_for("\r\n\r\n", 0.05);
  s.admin("pause", {{"mode", "abort"}});
  for (const auto& w : waiting) {
    EXPECT_TRUE(w->wait_for("\r\n\r\n", 60));
    EXPECT_EQ(take_answer(w->received()).status, 200);
  }
  s.admin("resume", json::object());
  EXPECT_EQ(s.post("/v1/chat/completions", endless({{"max_tokens", 3}}))["usage"]["completion_tokens"], 3);
}

TEST(ServerOfDays, ASessionsFilesGoWithIt) {
  ServedModel s;
  const json run = {{"messages", json::array({user("x")})}, {"max_tokens", 20}};
  s.post("/v1/sessions", {{"id", "s"}}, 201);
  s.post("/v1/sessions/s/run", run);
  ASSERT_TRUE(std::filesystem::is_directory(s.work() / "s"));
  std::filesystem::create_directories(s.work() / "s/deep");
  std::ofstream(s.work() / "s/deep/secret") << "of the first";
  std::ofstream(s.work() / "other") << "not the session's";
  std::filesystem::create_symlink(s.work() / "other", s.work() / "s/link");
  EXPECT_EQ(ask(s.port(), "DELETE", "/v1/sessions/s").status, 200);
  EXPECT_FALSE(std::filesystem::exists(s.work() / "s"));
  EXPECT_TRUE(std::filesystem::exists(s.work() / "other"));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(s.work()), {}), 1);
  s.post("/v1/sessions", {{"id", "s"}}, 201);
  s.post("/v1/sessions/s/run", run);
  EXPECT_TRUE(std::filesystem::is_empty(s.work() / "s"));
}

}  // namespace
}  // namespace perigee::agents
