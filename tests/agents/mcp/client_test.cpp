// The client against servers of both eras, well behaved and not.
#include "agents/mcp/client.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <thread>

#include "agents/mcp/keeper.h"
#include "agents/mcp/mcp_tools.h"
#include "base/error.h"
#include "tests/base/temp_directory.h"

namespace perigee::agents {
namespace {

using json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

std::vector<std::string> fake(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), PERIGEE_MCP_FAKE_SERVER);
  return arguments;
}

McpClientOptions quick() {
  McpClientOptions o;
  o.connect_s = 10;
  o.probe_s = 1;
  o.call_s = 5;
  return o;
}

McpClient client_of(std::vector<std::string> arguments, McpClientOptions options = quick()) {
  const McpCommand command{fake(std::move(arguments)), {{"GIVEN", "yes"}}, ""};
  return McpClient(
      [command](McpOnNotification f) { return start_stdio_transport(command, {}, std::move(f)); }, "test",
      options);
}

std::string text(const McpReply& reply) {
  return mcp_tool_result(reply, 1 << 20).output;
}

std::string connect_error(std::vector<std::string> arguments, McpClientOptions options = quick()) {
  try {
    client_of(std::move(arguments), options);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

double seconds_since(Clock::time_point t) {
  return std::chrono::duration<double>(Clock::now() - t).count();
}

bool is_alive(pid_t pid) {
  return ::kill(pid, 0) == 0;
}
bool ends_within(pid_t pid, double seconds) {
  const auto begin = Clock::now();
  while (is_alive(pid))
    if (seconds_since(begin) > seconds)
      return false;
    else
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
  return true;
}
pid_t read_pid(const std::string& file) {
  for (int i = 0; i < 500; ++i) {
    pid_t pid = 0;
    if (std::ifstream(file) >> pid) return pid;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return -1;
}

class Mcp : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Eras, Mcp, ::testing::Values("modern", "legacy"),
                         [](const auto& p) { return std::string(p.param); });

TEST_P(Mcp, ListsAndCalls) {
  const bool modern = std::string(GetParam()) == "modern";
  McpClient c = client_of({GetParam()});
  EXPECT_EQ(c.era(), modern ? McpEra::kModern : McpEra::kLegacy);
  EXPECT_EQ(c.version(), modern ? "2026-07-28" : "2025-11-25");
  EXPECT_EQ(c.tools().size(), 7u);
  EXPECT_EQ(text(c.call("echo", {{"text", "héllo\n"}}, 0, {})), "héllo\n");
  const ToolResult failed = mcp_tool_result(c.call("fail", json::object(), 0, {}), 1000);
  EXPECT_EQ(failed.status, "error");
  EXPECT_EQ(failed.output, "it failed");
  EXPECT_EQ(text(c.call("picture", json::object(), 0, {})),
            "see\n[image: image/png, 5 B]\n[resource readme: file:///r]\n[resource "
            "file:///t]\ninside\n[content of the type \"hologram\"]");
  EXPECT_EQ(text(c.call("structured", json::object(), 0, {})), R"({"b":1,"a":2})");
  EXPECT_EQ(mcp_tool_result(c.call("ask.user", json::object(), 0, {}), 1000).status, "error");
  EXPECT_EQ(text(c.call("none", json::object(), 0, {})), "the server no longer has this tool.");
  EXPECT_EQ(text(c.call("add", json::object(), 0, {})), "no such tool: add.");
  const ToolResult cut = mcp_tool_result(c.call("echo", {{"text", std::string(5000, 'x')}}, 0, {}), 100);
  EXPECT_LE(cut.output.size(), 100u);
}

TEST_P(Mcp, AServerGetsNoSecretsOfTheEnvironment) {
  ::setenv("OPENAI_API_KEY", "secret", 1);
  McpClient c = client_of({GetParam()});
  const std::string environment = text(c.call("environment", json::object(), 0, {}));
  ::unsetenv("OPENAI_API_KEY");
  EXPECT_EQ(environment.find("OPENAI"), std::string::npos) << environment;
  EXPECT_NE(environment.find("PATH="), std::string::npos);
  EXPECT_NE(environment.find("GIVEN=yes"), std::string::npos);
}

TEST_P(Mcp, ListsComeInPagesAndNoiseIsPassedOver) {
  McpClient c = client_of({GetParam(), "pages", "noise", "slow-start"});
  EXPECT_EQ(c.tools().size(), 7u);
  EXPECT_EQ(text(c.call("echo", {{"text", "a"}}, 0, {})), "a");
  EXPECT_NE(connect_error({GetParam(), "pages", "endless"}).find("does not end"), std::string::npos);
}

TEST(Mcp, WhoIgnoresTheProbeIsAskedToInitialize) {
  McpClient c = client_of({"legacy", "silent-probe"});
  EXPECT_EQ(c.era(), McpEra::kLegacy);
  EXPECT_EQ(text(c.call("echo", {{"text", "a"}}, 0, {})), "a");
}

TEST_P(Mcp, AnotherRevisionIsRefusedByName) {
  EXPECT_NE(connect_error({GetParam(), "old"}).find("the server speaks "), std::string::npos);
}

TEST_P(Mcp, RequestsOfTheServerAreAnswered) {
  McpClient c = client_of({GetParam(), "asks"});
  const std::string answers = text(c.call("echo", json::object(), 0, {}));
  EXPECT_NE(answers.find(R"("id":"s1","result":{})"), std::string::npos) << answers;
  EXPECT_NE(answers.find(R"("id":"s2","error":{"code":-32601)"), std::string::npos) << answers;
}

TEST_P(Mcp, WhatChangesIsListedAgain) {
  McpClient c = client_of({GetParam(), "grow"});
  EXPECT_EQ(c.tools().size(), 7u);
  c.call("echo", {{"text", "a"}}, 0, {});
  c.call("echo", {{"text", "a"}}, 0, {});
  EXPECT_EQ(c.tools().size(), 8u);
  EXPECT_EQ(text(c.call("extra0", json::object(), 0, {})), "no such tool: extra0.");  // it was asked
}

TEST_P(Mcp, ACallThatIsNotAnsweredTimesOutAndIsCancelled) {
  const TempDirectory dir;
  const std::string file = dir.path() +
                           "/"
                           "cancelled";
  McpClientOptions patient = quick();
  patient.call_s = 300;
  McpClient c = client_of({GetParam(), "hang", "cancelled:" + file}, patient);
  const auto begin = Clock::now();
  EXPECT_EQ(mcp_tool_result(c.call("echo", json::object(), 0.3, {}), 1000).status, "timeout");
  EXPECT_LT(seconds_since(begin), 200);
  EXPECT_GT(read_pid(file), 0);  // the id of the request
  std::stop_source stop;
  std::thread stopper([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    stop.request_stop();
  });
  EXPECT_EQ(c.call("echo", json::object(), 0, stop.get_token()).outcome, McpReply::kStopped);
  stopper.join();
}

TEST_P(Mcp, HostileServersCostAnErrorAndNoMore) {
  {
    McpClient c = client_of({GetParam(), "die"});
    const std::string said = text(c.call("echo", json::object(), 0, {}));
    EXPECT_EQ(said, "the server has ended; it said \"out of luck\".");
  }
  {
    McpClient c = client_of({GetParam(), "huge"});
    EXPECT_EQ(text(c.call("echo", json::object(), 0, {})), "the server sent a message over 16 MiB.");
  }
  {
    McpClient c = client_of({GetParam(), "deaf"});
    const ToolResult r =
        mcp_tool_result(c.call("echo", {{"text", std::string(1 << 20, 'x')}}, 0.3, {}), 1000);
    EXPECT_NE(r.status, "ok");
  }
  McpClientOptions hasty = quick();
  hasty.connect_s = 1;
  hasty.probe_s = 0.3;
  EXPECT_NE(connect_error({GetParam(), "wrong-id"}, hasty), "");
  const McpCommand none{{"no-such-program-anywhere"}, {}, ""};
  EXPECT_THROW(start_stdio_transport(none, {}, [](const json&) {}), Error);
  const McpCommand folder{{"/"}, {}, ""};
  EXPECT_THROW(start_stdio_transport(folder, {}, [](const json&) {}), Error);
  const McpCommand garbage{{"/bin/cat"}, {}, ""};  // echoes requests: they are no answers
  EXPECT_THROW(
      McpClient([&](McpOnNotification f) { return start_stdio_transport(garbage, {}, std::move(f)); }, "cat",
                hasty),
      Error);
}

TEST_P(Mcp, MessagesOfOddTypesArePassedOver) {
  McpClient c = client_of({GetParam(), "odd"});
  for (int i = 0; i < 3; ++i) EXPECT_EQ(text(c.call("echo", {{"text", "still here"}}, 0, {})), "still here");
}

TEST_P(Mcp, AServerThatHasEndedIsStartedAgain) {
  const TempDirectory dir;
  McpClient c = client_of({GetParam(), "die-once:" + dir.path() +
                                           "/"
                                           "died"});
  EXPECT_EQ(c.call("echo", {{"text", "a"}}, 0, {}).outcome, McpReply::kLost);
  EXPECT_EQ(c.call("echo", {{"text", "a"}}, 0, {}).outcome, McpReply::kLost);  // too soon: not in a circle
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  EXPECT_EQ(text(c.call("echo", {{"text", "a"}}, 0, {})), "a");
}

TEST_P(Mcp, CallsMayBeMadeAtOnce) {
  McpClient c = client_of({GetParam()});
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 25; ++i) {
        const std::string said = std::to_string(t * 1000 + i);
        if (text(c.call("echo", {{"text", said}}, 0, {})) == said) ++right;
      }
    });
  for (auto& t : threads) t.join();
  EXPECT_EQ(right, 200);
}

// Whatever a server leaves behind is gone with the client: also what ignores signals, and daemons.
// Answers what a modern server does, until it is told to be gone; the next one answers nothing until it is let.
struct Script {
  std::mutex mutex;
  std::condition_variable changed;
  bool gone = false, let = false;
  int started = 0, held = 0;
};
class ScriptedTransport : public McpTransport {
 public:
  ScriptedTransport(Script& script, bool holds) : script_(script), holds_(holds) {}
  McpReply request(const json& message, const McpHeaders&, const McpWait&) override {
    std::unique_lock lock(script_.mutex);
    if (holds_ && !script_.let) {
      ++script_.held;
      script_.changed.notify_all();
      script_.changed.wait(lock, [&] { return script_.let; });
    }
    McpReply reply;
    reply.outcome = McpReply::kResult;
    reply.result = {{"supportedVersions", {"2026-07-28"}},
                    {"tools", {{{"name", "echo"}}}},
                    {"content", {{{"type", "text"}, {"text", message.at("method")}}}}};
    return reply;
  }
  void notify(const json&, const McpWait&) override {}
  bool post(const json&, const McpWait&) override { return true; }
  void set_version(McpEra, const std::string&) override {}
  bool alive(std::string*) const override {
    const std::lock_guard lock(script_.mutex);
    return holds_ || !script_.gone;
  }

 private:
  Script& script_;
  const bool holds_;
};

// One call starts a server that is slow; others have their own time, and their own stop.
TEST(Mcp, WhoWaitsForAServerToStartCanBeStopped) {
  Script script;
  McpClient c(
      [&](McpOnNotification) {
        const std::lock_guard lock(script.mutex);
        return std::make_unique<ScriptedTransport>(script, script.started++ > 0);
      },
      "test", quick());
  EXPECT_EQ(text(c.call("echo", json::object(), 0, {})), "tools/call");
  {
    const std::lock_guard lock(script.mutex);
    script.gone = true;
  }
  std::thread starts([&] {
    // It is started again at most once a second.
    while (c.call("echo", json::object(), 0, {}).outcome != McpReply::kResult) std::this_thread::yield();
  });
  {
    std::unique_lock lock(script.mutex);
    script.changed.wait(lock, [&] { return script.held > 0; });
  }
  std::stop_source stop;
  stop.request_stop();
  EXPECT_NE(c.call("echo", json::object(), 0, stop.get_token()).outcome, McpReply::kResult);
  EXPECT_NE(c.call("echo", json::object(), 0.01, {}).outcome, McpReply::kResult);
  {
    const std::lock_guard lock(script.mutex);
    script.let = true;
  }
  script.changed.notify_all();
  starts.join();
  EXPECT_EQ(text(c.call("echo", json::object(), 0, {})), "tools/call");
  EXPECT_EQ(script.started, 2);
}

TEST(McpKeeper, NothingOutlivesTheClient) {
  const TempDirectory dir;
  const std::string file = dir.path() +
                           "/"
                           "pid";
  pid_t daemon = 0;
  const auto begin = Clock::now();
  {
    McpClient c = client_of({"modern", "stay", "grandchild:" + file});
    daemon = read_pid(file);
    ASSERT_GT(daemon, 0);
    EXPECT_TRUE(is_alive(daemon));
  }
  EXPECT_FALSE(is_alive(daemon));
  EXPECT_LT(seconds_since(begin), 60);
  EXPECT_EQ(::waitpid(-1, nullptr, WNOHANG), -1);  // no zombie either
}

// Whatever descriptor is the one that is missing: nothing starts, and none is lost.
TEST(McpKeeper, WithoutDescriptorsNothingIsStarted) {
  const auto open_ones = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {});
  };
  const auto before = open_ones();
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  const int free = ::dup(0);
  ::close(free);
  int refused = 0;
  for (int room = 0; room < 40; ++room) {
    rlimit tight = limit;
    tight.rlim_cur = static_cast<rlim_t>(free + room);
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &tight), 0);
    std::string why;
    try {
      const KeptChild child({"/bin/cat"}, {}, "");
      char byte = 'x';
      EXPECT_EQ(::write(child.input(), &byte, 1), 1);
      pollfd answer = {child.output(), POLLIN, 0};
      EXPECT_EQ(::poll(&answer, 1, 30'000), 1);
      EXPECT_EQ(::read(child.output(), &byte, 1), 1) << "its streams are the pipes";
    } catch (const Error& e) {
      why = e.what();
    }
    ::setrlimit(RLIMIT_NOFILE, &limit);
    refused += why.empty() ? 0 : 1;
    if (!why.empty()) {
      EXPECT_NE(why.find("oo many open files"), std::string::npos) << why;
    }
    EXPECT_EQ(open_ones(), before) << room;
  }
  EXPECT_GT(refused, 10);
  EXPECT_LT(refused, 40);
}

TEST(McpKeeper, ADaemonIsGoneWithAServerThatEnds) {
  const TempDirectory dir;
  const std::string file = dir.path() +
                           "/"
                           "pid";
  McpClient c = client_of({"legacy", "die", "grandchild:" + file});
  const pid_t daemon = read_pid(file);
  ASSERT_GT(daemon, 0);
  c.call("echo", json::object(), 0, {});
  EXPECT_TRUE(ends_within(daemon, 5));
}

// kill -9 of the owner: the kernel closes its end of the lifeline.
TEST(McpKeeper, NothingOutlivesAKilledOwner) {
  const TempDirectory dir;
  const std::string file = dir.path() +
                           "/"
                           "pid",
                    ready = dir.path() +
                            "/"
                            "ready";
  const pid_t owner = ::fork();
  if (owner == 0) {
    McpClient c = client_of({"modern", "stay", "grandchild:" + file});
    std::ofstream(ready) << ::getpid() << std::endl;
    for (;;) ::pause();
  }
  const pid_t daemon = read_pid(file);
  ASSERT_EQ(read_pid(ready), owner);
  ASSERT_TRUE(is_alive(daemon));
  ::kill(owner, SIGKILL);
  ::waitpid(owner, nullptr, 0);
  EXPECT_TRUE(ends_within(daemon, 5));
}

TEST(McpTools, StandBesideOthersByConfiguration) {
  const nlohmann::json config = {
      "calculator",
      {{"tool", "mcp"}, {"command", fake({"legacy"})}, {"prefix", "f_"}, {"only", {"echo", "ask.user"}}}};
  const auto box = make_toolbox(config, "tools", {{"mcp", add_mcp_tools}});
  EXPECT_EQ(box->names(), (std::vector<std::string>{"calculator", "f_echo", "f_ask_user"}));
  const ToolEvent e = box->call("f_echo", R"({"text":"hi"})", 0, {});
  EXPECT_EQ(e.output, "hi");
  EXPECT_EQ(e.status, "ok");
  const auto refusal = [&](const nlohmann::json& entry) -> std::string {
    try {
      make_toolbox(nlohmann::json::array({entry}), "tools", {{"mcp", add_mcp_tools}});
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(refusal({{"tool", "mcp"}}).find("either \"command\""), std::string::npos);
  EXPECT_NE(
      refusal({{"tool", "mcp"}, {"command", fake({"legacy"})}, {"only", {"eko"}}}).find("no tool \"eko\""),
      std::string::npos);
  EXPECT_NE(refusal({{"tool", "mcp"}, {"url", "https://x/"}}).find("https is not supported"),
            std::string::npos);
  EXPECT_NE(refusal({{"tool", "mcp"}, {"url", "ftp://x/"}}).find("a URL such as"), std::string::npos);
  EXPECT_NE(
      refusal({{"tool", "mcp"}, {"url", "http://127.0.0.1/"}, {"headers", {{"a", "b\nc"}}}}).find("one line"),
      std::string::npos);
  EXPECT_NE(refusal({{"tool", "mcp"}, {"command", {"no-such-program"}}}).find("no such program in PATH"),
            std::string::npos);
  EXPECT_NE(refusal({{"tool", "mcp"}, {"command", {"x"}}, {"shell", true}}).find("unknown key"),
            std::string::npos);
}

TEST(McpMessages, FormsAreThoseOfTheSpecification) {
  EXPECT_EQ(header_value("us-west1"), "us-west1");
  EXPECT_EQ(header_value("Hello, 世界"), "=?base64?SGVsbG8sIOS4lueVjA==?=");
  EXPECT_EQ(header_value(" padded "), "=?base64?IHBhZGRlZCA=?=");
  EXPECT_EQ(header_value("line1\nline2"), "=?base64?bGluZTEKbGluZTI=?=");
  EXPECT_EQ(header_value("=?base64?literal?="), "=?base64?PT9iYXNlNjQ/bGl0ZXJhbD89?=");
  std::vector<std::string> events;
  EventStream stream;
  const std::string bytes =
      ": hello\r\nevent: message\r\ndata: {\"a\":\r\ndata: 1}\r\n\r\nid: 3\ndata:x\n\ndata\n\n\n";
  for (char c : bytes) stream.feed(std::string_view(&c, 1), events);
  EXPECT_EQ(events, (std::vector<std::string>{"{\"a\":\n1}", "x", ""}));
  EXPECT_TRUE(parse_message(std::string(500, '[')).is_null());
  EXPECT_TRUE(parse_message("{\"a\":" + std::string(200, '[') + std::string(200, ']') + "}").is_null());
  std::vector<HeaderParameter> parameters;
  EXPECT_EQ(
      header_parameters(
          json::parse(
              R"({"properties":{"r":{"type":"string","x-mcp-header":"Region"},"o":{"properties":{"n":{"type":"integer","x-mcp-header":"N"}}}}})"),
          &parameters),
      "");
  const McpHeaders headers = parameter_headers(parameters, json::parse(R"({"r":"é","o":{"n":-7}})"));
  EXPECT_EQ(headers, (McpHeaders{{"Mcp-Param-Region", "=?base64?w6k=?="}, {"Mcp-Param-N", "-7"}}));
  EXPECT_TRUE(parameter_headers(parameters, json::parse(R"({"r":null})")).empty());
  EXPECT_NE(header_parameters(json::parse(R"({"properties":{"r":{"type":"number","x-mcp-header":"R"}}})"),
                              &parameters),
            "");
  EXPECT_NE(
      header_parameters(json::parse(R"({"properties":{"r":{"items":{"x-mcp-header":"R"}}}})"), &parameters),
      "");
  EXPECT_EQ(mcp_tool_name("p_", "a.b/c"), "p_a_b_c");
}

}  // namespace
}  // namespace perigee::agents
