// The servers that the protocol's authors publish, from the packages of tests/agents/clients.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "agents/mcp/mcp_tools.h"
#include "tests/base/temp_directory.h"

namespace perigee::agents {
namespace {

// `npm ci` in that folder, which ./perigee test does, brings them.
std::string package(const std::string& name) {
  return std::string(PERIGEE_SOURCE_DIR) + "/tests/agents/clients/node_modules/@modelcontextprotocol/" +
         name + "/dist/index.js";
}

std::unique_ptr<ToolBox> box_of(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "node");
  return make_toolbox({{{"tool", "mcp"}, {"command", arguments}}}, "test", {{"mcp", add_mcp_tools}});
}

TEST(McpRealServers, EverythingServesItsTools) {
  ASSERT_TRUE(std::filesystem::exists(package("server-everything"))) << "run npm ci in tests/agents/clients";
  const auto box = box_of({package("server-everything"), "stdio"});
  EXPECT_GT(box->names().size(), 5u);
  ASSERT_NE(box->find("echo"), nullptr);
  const ToolEvent echo = box->call("echo", R"({"message":"hällo"})", 0, {});
  EXPECT_EQ(echo.status, "ok") << echo.output;
  EXPECT_NE(echo.output.find("hällo"), std::string::npos) << echo.output;
  const ToolEvent wrong = box->call("echo", R"({"message":3})", 0, {});
  EXPECT_EQ(wrong.status, "error") << wrong.output;
  ASSERT_NE(box->find("get-tiny-image"), nullptr);
  const ToolEvent image = box->call("get-tiny-image", "{}", 0, {});
  EXPECT_NE(image.output.find("[image: image/png, "), std::string::npos) << image.output;
  const ToolEvent sum = box->call("get-sum", R"({"a":2,"b":40})", 0, {});
  EXPECT_NE(sum.output.find("42"), std::string::npos) << sum.output;
}

TEST(McpRealServers, FilesystemReadsAndWritesWithinItsFolder) {
  ASSERT_TRUE(std::filesystem::exists(package("server-filesystem"))) << "run npm ci in tests/agents/clients";
  const TempDirectory dir;
  const auto box = box_of({package("server-filesystem"), dir.path()});
  const std::string file = dir.path() + "/a.txt";
  const ToolEvent wrote =
      box->call("write_file", nlohmann::json{{"path", file}, {"content", "one\ntwo\n"}}.dump(), 0, {});
  EXPECT_EQ(wrote.status, "ok") << wrote.output;
  std::ifstream in(file);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(in), {}), "one\ntwo\n");
  const ToolEvent read = box->call("read_text_file", nlohmann::json{{"path", file}}.dump(), 0, {});
  EXPECT_NE(read.output.find("two"), std::string::npos) << read.output;
  const ToolEvent outside = box->call("read_text_file", R"({"path":"/etc/passwd"})", 0, {});
  EXPECT_EQ(outside.status, "error") << outside.output;
  EXPECT_EQ(outside.output.find("root:"), std::string::npos);
}

}  // namespace
}  // namespace perigee::agents
