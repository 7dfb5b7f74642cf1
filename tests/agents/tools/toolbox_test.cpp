#include "agents/tools/toolbox.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <thread>

#include "base/error.h"
#include "base/hash.h"
#include "tests/base/temp_directory.h"

namespace perigee::agents {
namespace {

namespace fs = std::filesystem;

class Tools : public ::testing::Test {
 protected:
  Tools() { context_.work = work_.path(); }
  ToolEvent call(const char* config, std::string_view name, const nlohmann::json& arguments) {
    const auto box = make_toolbox(nlohmann::json::parse(config), "test");
    return box->call(name, arguments.dump(), 0, context_);
  }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(work_ / name, std::ios::binary) << text;
  }
  std::string read(const std::string& name) const {
    std::ifstream in(work_ / name, std::ios::binary);
    std::stringstream text;
    text << in.rdbuf();
    return text.str();
  }
  TempDirectory work_;
  ToolContext context_;
};

using ToolBoxTest = Tools;

TEST_F(ToolBoxTest, RecordsAllThatRunningAgainNeeds) {
  const auto box = make_toolbox(nlohmann::json::parse(R"(["calculator"])"), "test");
  const ToolEvent e =
      box->call({{"functions.calculator:0", "calculator", R"({"expression":"6*7"})"}, ""}, 3, context_);
  EXPECT_EQ(e.turn, 3);
  EXPECT_EQ(e.name, "calculator");
  EXPECT_EQ(e.input, R"({"expression":"6*7"})");
  EXPECT_EQ(e.output, "42");
  EXPECT_EQ(e.status, "ok");
  EXPECT_EQ(e.digest, hash_hex("42"));
  EXPECT_GT(e.started_us, 1'700'000'000'000'000);
  EXPECT_GE(e.duration_us, 0);
  EXPECT_EQ(box->declarations().find(R"([{"type":"function","function":{"name":"calculator")"), 0u);
  EXPECT_EQ(nlohmann::json::parse(box->declarations()).size(), 1u);
  EXPECT_NE(box->find("calculator"), nullptr);
  EXPECT_EQ(box->find("x"), nullptr);
  EXPECT_EQ((*box->parameters("calculator"))["required"][0], "expression");
  EXPECT_EQ(make_toolbox(nlohmann::json::array(), "test")->declarations(), "");
}

TEST_F(ToolBoxTest, EveryBadCallIsASentence) {
  const auto box = make_toolbox(nlohmann::json::parse(R"(["calculator", "search"])"), "test");
  const auto said = [&](std::string_view name, std::string_view arguments) {
    const ToolEvent e = box->call(name, arguments, 0, context_);
    EXPECT_EQ(e.status, "error");
    EXPECT_EQ(e.digest, hash_hex(e.output));
    return e.output;
  };
  EXPECT_EQ(said("calculater", "{}"), "there is no tool \"calculater\"; did you mean calculator?");
  EXPECT_EQ(said("zzz", "{}"), "there is no tool \"zzz\"; the tools are calculator, search, read");
  EXPECT_EQ(said("calculator", "{}"), "arguments: \"expression\" is missing");
  EXPECT_EQ(said("calculator", R"({"expression":3})"), "expression: a text is expected, not the number 3");
  EXPECT_EQ(said("calculator", R"({"expression":"1","x":2})"),
            "arguments: \"x\" is not known here, only expression");
  EXPECT_EQ(said("calculator", "[]"), "arguments: a JSON object is expected");
  for (const char* bad :
       {"", "{", "{\"expression\":\"1\"} x", "{\"expression\":\"\xff\"}", "nul", "{\"a\":1,\"a\":2}"})
    EXPECT_EQ(said("calculator", bad).find("arguments: "), 0u) << bad << ": " << said("calculator", bad);
  EXPECT_NE(said("calculator", std::string(5 << 20, ' ')), "");
  EXPECT_NE(said("calculator", std::string(100000, '[')), "");
  const std::string hostile = std::string("\x1b[2J\0\n", 6) + std::string(500, 'A');
  const ToolEvent e = box->call(hostile, "{}", 0, context_);
  EXPECT_EQ(e.output.find('\x1b'), std::string::npos);
  EXPECT_LT(e.output.size(), 200u);
  EXPECT_LT(e.name.size(), 100u);
  const ToolEvent broken = box->call({{"", "calculator", "{"}, "cut short"}, 0, context_);
  EXPECT_EQ(broken.output, "this call cannot be run: cut short");
  EXPECT_EQ(broken.status, "error");
}

TEST_F(ToolBoxTest, BadConfigurationsSayWhere) {
  const auto refusal = [](const char* config) {
    try {
      make_toolbox(nlohmann::json::parse(config), "tools");
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refusal(R"({})"), "tools: a list of tools is expected, not an object");
  EXPECT_EQ(refusal(R"(["x"])"),
            "tools[0]: there is no kind of tool \"x\"; there are calculator, command, files, python, search, "
            "shell, sql");
  EXPECT_EQ(refusal(R"(["calculator","calculator"])"), "tool calculator: this name is there twice");
  EXPECT_NE(refusal(R"([{"tool":"python","walls":5}])").find("tools[0]: walls: unknown key"),
            std::string::npos);
  EXPECT_NE(refusal(R"([{"tool":"python","wall_s":"x"}])").find("tools[0]: wall_s"), std::string::npos);
  EXPECT_NE(refusal(R"([{"tool":"command","name":"a b","argv":["x"],"schema":{"type":"object"}}])")
                .find("a name is"),
            std::string::npos);
  EXPECT_NE(
      refusal(R"([{"tool":"command","name":"a","argv":["{b}"],"schema":{"type":"object"}}])").find("argv"),
      std::string::npos);
  EXPECT_NE(refusal(R"([{"tool":"command","name":"a","argv":["x"],"schema":{"type":"object","oneOf":[]}}])")
                .find("#/oneOf"),
            std::string::npos);
  EXPECT_NE(refusal("[3]"), "accepted");
}

class Throws final : public Tool {
 public:
  const std::string& name() const override { return name_; }
  nlohmann::ordered_json declaration() const override {
    return nlohmann::ordered_json::parse(R"({"type":"function","function":{"name":"throws"}})");
  }
  ToolResult call(const nlohmann::json& arguments, const ToolContext&) override {
    if (arguments.contains("long")) return {std::string(100000, 'x'), "ok"};
    throw std::runtime_error("boom");
  }

 private:
  const std::string name_ = "throws";
};

TEST_F(ToolBoxTest, HoldsToolsToTheirContract) {
  ToolBox box;
  box.add(std::make_unique<Throws>());
  EXPECT_EQ(box.call("throws", "{}", 0, context_).output, "the tool failed: boom");
  context_.output_bytes = 1000;
  const ToolEvent e = box.call("throws", R"({"long":1})", 0, context_);
  EXPECT_LE(e.output.size(), 1000u);
  EXPECT_NE(e.output.find("of 100000 bytes]"), std::string::npos);
}

using ProgramTools = Tools;

TEST_F(ProgramTools, PythonRunsInTheWorkFolder) {
  write("numbers.txt", "1\n2\n3\n");
  ToolEvent e =
      call(R"(["python"])", "python",
           {{"code", "print(sum(map(int, open('numbers.txt'))))\nopen('out.txt', 'w').write('x')"}});
  EXPECT_EQ(e.output, "6\n");
  EXPECT_EQ(e.status, "ok");
  EXPECT_EQ(read("out.txt"), "x");
  e = call(R"(["python"])", "python", {{"code", "print('a')\n1/0"}});
  EXPECT_EQ(e.status, "error");
  EXPECT_EQ(e.output.find("a\n[errors]\nTraceback"), 0u);
  EXPECT_NE(e.output.find("ZeroDivisionError: division by zero\n[exit code 1]"), std::string::npos)
      << e.output;
  EXPECT_EQ(call(R"(["python"])", "python", {{"code", "x = 1"}}).output, "[no output]");
}

TEST_F(ProgramTools, LimitsAreStatuses) {
  ToolEvent e = call(R"([{"tool":"python","wall_s":0.4}])", "python",
                     {{"code", "print('on', flush=True)\nimport time\ntime.sleep(9)"}});
  EXPECT_EQ(e.status, "timeout");
  EXPECT_EQ(e.output, "on\n[stopped: it took longer than 0.4 s]");
  context_.deadline_s = 0.3;
  e = call(R"(["shell"])", "shell", {{"command", "sleep 9"}});
  EXPECT_EQ(e.output, "[stopped: it took longer than 0.3 s]");
  context_.deadline_s = 0;
  context_.output_bytes = 2000;
  e = call(R"(["python"])", "python", {{"code", "while True: print('x' * 1000)"}});
  EXPECT_EQ(e.status, "limit");
  EXPECT_LE(e.output.size(), 2000u);
  EXPECT_NE(e.output.find("[stopped: it wrote far too much output]"), std::string::npos);
  // The last lines of a long traceback matter most, and the first of the output.
  e = call(R"(["python"])", "python",
           {{"code", "import sys\nprint('first', 'o' * 3000)\nprint('e' * 3000, 'last', file=sys.stderr)"}});
  EXPECT_LE(e.output.size(), 2000u);
  EXPECT_EQ(e.output.find("first"), 0u);
  EXPECT_NE(e.output.find("last"), std::string::npos);
  std::stop_source stop;
  stop.request_stop();
  context_.stop = stop.get_token();
  EXPECT_EQ(call(R"(["shell"])", "shell", {{"command", "sleep 9"}}).status, "timeout");
}

TEST_F(ProgramTools, ShellAndCommands) {
  EXPECT_EQ(call(R"(["shell"])", "shell", {{"command", "printf 'b\\na\\n' | sort; echo $HOME"}}).output,
            "a\nb\n/work\n");
  EXPECT_EQ(call(R"(["shell"])", "shell", {{"command", "exit 3"}}).output, "[exit code 3]");
  const char* config =
      R"([{"tool":"command","name":"words","argv":["printf","%s|","{text}","{n}","{absent}"],
    "schema":{"type":"object","properties":{"text":{"type":"string"},"n":{"type":"integer"},"absent":{"type":"string"}},
              "required":["text"]}}])";
  // An argument is one argument, whatever is in it.
  EXPECT_EQ(call(config, "words", {{"text", "a b; $(id) '"}, {"n", 3}}).output, "a b; $(id) '|3|");
  EXPECT_EQ(call(config, "words", {{"n", 3}}).status, "error");
  const char* json = R"([{"tool":"command","name":"echo","argv":["cat"],"schema":{"type":"object"}}])";
  EXPECT_EQ(call(json, "echo", {{"a", 1}}).output, R"({"a":1})");
}

TEST_F(ProgramTools, AWorkFolderThatIsTooBigIsASentence) {
  write("big", std::string(3 << 20, 'x'));
  const ToolEvent e = call(R"([{"tool":"python","disk_mib":1}])", "python", {{"code", "1"}});
  EXPECT_EQ(e.status, "error");
  EXPECT_EQ(e.output.find("this could not be run: work folder"), 0u) << e.output;
}

using FilesTool = Tools;

TEST_F(FilesTool, ReadsWritesListsAndDeletes) {
  const auto files = [&](const nlohmann::json& arguments) {
    const ToolEvent e = call(R"(["files"])", "files", arguments);
    return (e.status == "ok" ? "" : e.status + ": ") + e.output;
  };
  EXPECT_EQ(files({{"action", "list"}, {"path", "."}}), "[empty]");
  EXPECT_EQ(files({{"action", "write"}, {"path", "a/b/c.txt"}, {"content", "hi\n"}}),
            "wrote 3 bytes to \"a/b/c.txt\"");
  EXPECT_EQ(files({{"action", "read"}, {"path", "/work/a/./b//c.txt"}}), "hi\n");
  EXPECT_EQ(files({{"action", "write"}, {"path", "x y"}, {"content", ""}}), "wrote 0 bytes to \"x y\"");
  EXPECT_EQ(files({{"action", "list"}, {"path", "."}}), "a/\nx y 0\n");
  EXPECT_EQ(files({{"action", "list"}, {"path", "a/b"}}), "c.txt 3\n");
  EXPECT_EQ(files({{"action", "delete"}, {"path", "a"}}), "error: \"a\": Directory not empty");
  EXPECT_EQ(files({{"action", "delete"}, {"path", "a/b/c.txt"}}), "deleted \"a/b/c.txt\"");
  EXPECT_EQ(files({{"action", "delete"}, {"path", "a/b"}}), "deleted \"a/b\"");
  EXPECT_EQ(files({{"action", "read"}, {"path", "none"}}), "error: \"none\": there is no such file");
  EXPECT_EQ(files({{"action", "read"}, {"path", "a"}}), "error: \"a\": this is a directory");
  EXPECT_EQ(files({{"action", "list"}, {"path", "x y"}}), "error: \"x y\": this is no directory");
  EXPECT_EQ(files({{"action", "write"}, {"path", "a"}}), "error: content is missing: the text to write");
  EXPECT_EQ(files({{"action", "write"}, {"path", "x y/z"}, {"content", ""}}),
            "error: \"x y\": Not a directory");
  context_.work.clear();
  EXPECT_EQ(files({{"action", "list"}, {"path", "."}}), "error: this session has no work folder");
}

TEST_F(FilesTool, NothingLeadsOutOfTheFolder) {
  const TempDirectory outside;
  std::ofstream(outside / "secret") << "hush";
  fs::create_symlink(outside / "secret", work_ / "link");
  fs::create_symlink(outside.path(), work_ / "dir");
  ASSERT_EQ(mkfifo((work_ / "pipe").c_str(), 0600), 0);
  const auto files = [&](const char* action, const std::string& path) {
    nlohmann::json a = {{"action", action}, {"path", path}};
    if (std::string_view(action) == "write") a["content"] = "changed";
    return call(R"(["files"])", "files", a);
  };
  for (const std::string& path :
       {std::string("link"), std::string("dir/secret"), std::string("dir"),
        std::string("../") + fs::path(outside.path()).filename().string() + "/secret", outside / "secret",
        std::string("/etc/passwd"), std::string("a/../../x"), std::string("/work/../etc/passwd"),
        std::string("pipe"), std::string("a\0b", 3), std::string(5000, 'a'), std::string()}) {
    for (const char* action : {"read", "write", "list"}) {
      const ToolEvent e = files(action, path);
      EXPECT_EQ(e.status, "error") << action << " " << path << ": " << e.output;
      EXPECT_EQ(e.output.find("hush"), std::string::npos);
    }
  }
  EXPECT_EQ(files("delete", "dir/secret").status, "error");
  std::ifstream in(outside / "secret");
  std::string text;
  in >> text;
  EXPECT_EQ(text, "hush");
  EXPECT_EQ(std::distance(fs::directory_iterator(outside.path()), fs::directory_iterator{}), 1);
  EXPECT_EQ(files("list", ".").output, "[empty]");  // what it does not follow it does not show
  EXPECT_EQ(files("delete", "link").status, "ok");  // the link itself
}

TEST_F(FilesTool, TheFolderHasASize) {
  write("big", std::string(900 << 10, 'x'));
  const char* config = R"([{"tool":"files","disk_mib":1,"files":3}])";
  EXPECT_EQ(
      call(config, "files", {{"action", "write"}, {"path", "a"}, {"content", std::string(200 << 10, 'y')}})
          .status,
      "limit");
  EXPECT_EQ(call(config, "files", {{"action", "write"}, {"path", "a"}, {"content", "y"}}).status, "ok");
  context_.output_bytes = 1000;
  const ToolEvent e = call(config, "files", {{"action", "read"}, {"path", "big"}});
  EXPECT_EQ(e.status, "limit");
  EXPECT_EQ(e.output.size(), 1000u);
  EXPECT_NE(e.output.find("[cut: 921600 bytes in all]"), std::string::npos);
}

using DocumentTools = Tools;

TEST_F(DocumentTools, SearchGivesLinesAndBytes) {
  write("d.txt", "one\ntwo needle\n\nthree\nNeedle four\nlast needle");
  const char* config = R"([{"tool":"search","path":"d.txt"}])";
  EXPECT_EQ(call(config, "search", {{"pattern", "needle"}}).output,
            "2@4: two needle\n6@34: last needle\n[2 lines]");
  EXPECT_EQ(call(config, "search", {{"pattern", "needle"}, {"ignore_case", true}, {"limit", 2}}).output,
            "2@4: two needle\n5@22: Needle four\n[more: go on with offset 34]");
  EXPECT_EQ(call(config, "search", {{"pattern", "needle"}, {"offset", 34.0}}).output,
            "6@34: last needle\n[1 line]");
  EXPECT_EQ(call(config, "search", {{"pattern", "^t[wh]"}, {"regex", true}}).output,
            "2@4: two needle\n4@16: three\n[2 lines]");
  EXPECT_EQ(call(config, "search", {{"pattern", "^t[wh]"}}).output, "[no line matches]");
  EXPECT_EQ(call(config, "search", {{"pattern", "("}, {"regex", true}}).status, "error");
  EXPECT_EQ(call(config, "search", {{"pattern", "x"}, {"offset", 99}}).output,
            "offset: the document ends at byte 45");
  EXPECT_EQ(call(R"(["search"])", "search", {{"pattern", "three"}, {"path", "d.txt"}}).output,
            "4@16: three\n[1 line]");
  EXPECT_EQ(call(R"(["search"])", "search", {{"pattern", "x"}}).output, "arguments: \"path\" is missing");
}

TEST_F(DocumentTools, ReadIsExactToTheByte) {
  const std::string text = "one\ntwo\xC3\xA4\n\nfour";
  write("d.txt", text);
  const char* config = R"([{"tool":"search","path":"d.txt"}])";
  const auto read = [&](const nlohmann::json& a) { return call(config, "read", a).output; };
  EXPECT_EQ(read(nlohmann::json::object()), "[bytes 0 to 15 of 15]\n" + text);
  EXPECT_EQ(read({{"line", 2}}), "[bytes 4 to 15 of 15]\ntwo\xC3\xA4\n\nfour");
  EXPECT_EQ(read({{"line", 4}}), "[bytes 11 to 15 of 15]\nfour");
  EXPECT_EQ(read({{"line", 5}}), "line: the document has 4 lines");
  EXPECT_EQ(read({{"offset", 4}, {"bytes", 4}}), "[bytes 4 to 7 of 15; go on with that offset]\ntwo");
  EXPECT_EQ(read({{"offset", 7}, {"bytes", 1}}), "[bytes 7 to 8 of 15; go on with that offset]\n\xC3");
  EXPECT_EQ(read({{"offset", 15}}), "[bytes 15 to 15 of 15]\n");
  EXPECT_EQ(read({{"offset", 16}}), "offset: the document ends at byte 15");
  EXPECT_EQ(read({{"offset", 1}, {"line", 1}}), "either line or offset, not both");
  EXPECT_EQ(read({{"offset", -1}}), "offset: at least 0 is expected, not -1");
  write("d.txt", "");
  EXPECT_EQ(read(nlohmann::json::object()), "[bytes 0 to 0 of 0]\n");
  EXPECT_EQ(read({{"line", 2}}), "line: the document has 0 lines");
}

// Against a plain reading of the whole document: random documents with lines of all lengths, some longer than the
// window that the tool reads at a time.
TEST_F(DocumentTools, AgreesWithAPlainReading) {
  const unsigned seed = 31;
  std::mt19937 random(seed);
  const auto box = make_toolbox(nlohmann::json::parse(R"([{"tool":"search","path":"d.txt"}])"), "test");
  for (int round = 0; round < 12; ++round) {
    std::string text;
    std::vector<size_t> starts = {0};
    const size_t longest = round % 3 == 0 ? 1'500'000 : 200;
    while (text.size() < (round % 3 == 0 ? 3'000'000u : 20'000u)) {
      const size_t n = random() % 7 == 0 ? random() % longest : random() % 60;
      for (size_t i = 0; i < n; ++i)
        text += static_cast<char>("abcdefgh \xC3\xA4\xF0\x9F\x98\x80\xff"[random() % 17]);
      if (random() % 50 == 0) text += "needle";
      text += '\n';
      starts.push_back(text.size());
    }
    starts.pop_back();
    write("d.txt", text);
    // All of it, read piece by piece with the offsets that the tool names.
    std::string again;
    int64_t offset = 0;
    context_.output_bytes = 1 << 20;
    for (int piece = 0; offset < static_cast<int64_t>(text.size()); ++piece) {
      ASSERT_LT(piece, 100000);
      const std::string out =
          box->call("read", nlohmann::json{{"offset", offset}, {"bytes", 1 + random() % 500000}}.dump(), 0,
                    context_)
              .output;
      const size_t head = out.find('\n');
      ASSERT_NE(head, std::string::npos);
      again += out.substr(head + 1);
      offset = static_cast<int64_t>(again.size());
    }
    ASSERT_TRUE(again == text) << "seed " << seed << " round " << round;
    for (int k = 0; k < 20; ++k) {
      const size_t line = random() % starts.size();
      const std::string out =
          box->call("read", nlohmann::json{{"line", line + 1}, {"bytes", 1}}.dump(), 0, context_).output;
      ASSERT_EQ(out.find("[bytes " + std::to_string(starts[line]) + " to "), 0u)
          << "seed " << seed << " line " << line;
    }
    // The first match, from a random line on.
    context_.output_bytes = 16 << 10;
    for (int k = 0; k < 5; ++k) {
      const size_t from = starts[random() % starts.size()];
      const size_t at = text.find("needle", from);
      const std::string out =
          box->call("search", nlohmann::json{{"pattern", "needle"}, {"offset", from}, {"limit", 1}}.dump(), 0,
                    context_)
              .output;
      if (at == std::string::npos) {
        ASSERT_EQ(out.find("[no line"), 0u);
        continue;
      }
      const size_t line =
          static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), at) - starts.begin());
      const std::string want = std::to_string(line) + "@" + std::to_string(starts[line - 1]) + ": ";
      if (at - starts[line - 1] < 900'000) {
        ASSERT_EQ(out.substr(0, want.size()), want) << "seed " << seed << " round " << round;
      }
    }
  }
}

TEST_F(DocumentTools, RandomArgumentsNeverThrowAndStayInBounds) {
  const unsigned seed = 77;
  std::mt19937_64 random(seed);
  std::string text;
  for (int i = 0; i < 5000; ++i) text += static_cast<char>(random() % 7 == 0 ? '\n' : random());
  write("d.txt", text);
  const auto box = make_toolbox(nlohmann::json::parse(R"([{"tool":"search","path":"d.txt"}])"), "test");
  const auto any = [&]() -> nlohmann::json {
    switch (random() % 9) {
      case 0:
        return -static_cast<int64_t>(random() % 10);
      case 1:
        return random();
      case 2:
        return 1e300;
      case 3:
        return INT64_MAX;
      case 4:
        return random() % 6000;
      case 5:
        return random() % 3 == 0;
      case 6:
        return std::string(random() % 5, static_cast<char>('(' + random() % 60));
      case 7:
        return 1.5;
      default:
        return random() % 10;
    }
  };
  for (int i = 0; i < 3000; ++i) {
    nlohmann::json a = nlohmann::json::object();
    for (const char* key : {"pattern", "regex", "ignore_case", "offset", "limit", "line", "bytes"})
      if (random() % 3 == 0) a[key] = any();
    if (random() % 2 == 0)
      a["pattern"] = std::string(1 + random() % 3, static_cast<char>('a' + random() % 26));
    context_.output_bytes = static_cast<int64_t>(random() % 2000);
    for (const char* tool : {"search", "read"}) {
      const ToolEvent e = box->call(tool, a.dump(), 0, context_);
      ASSERT_LE(static_cast<int64_t>(e.output.size()), context_.output_bytes)
          << "seed " << seed << " " << a.dump();
      ASSERT_NE(e.output.find("the tool failed"), 0u) << e.output << " " << a.dump();
    }
  }
}

}  // namespace
}  // namespace perigee::agents
