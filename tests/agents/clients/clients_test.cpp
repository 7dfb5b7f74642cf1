// The npm clients against the program: tests/agents/clients/*.mjs, each a server of its own.
#include <fcntl.h>
#include <sys/wait.h>

#include <filesystem>
#include <thread>

#include "base/process.h"
#include "tests/apps/run_program.h"

namespace perigee {
namespace {

namespace fs = std::filesystem;

const std::string kFolder = std::string(PERIGEE_SOURCE_DIR) + "/tests/agents/clients";
const std::string kKey = "a-key-for-tests";

// Runs a command, all of its output in `said`.
int run(const std::string& command, std::string& said) {
  TempDirectory place;
  const std::string out = place / "out";
  const int status = std::system((command + " >" + out + " 2>&1").c_str());
  said = slurp(out);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000;
}

void check_client(const std::string& script) {
  std::string said;
  ASSERT_EQ(run("node --version", said), 0)
      << "node is missing: `./perigee test` installs it, and then the clients";
  ASSERT_TRUE(fs::exists(kFolder + "/node_modules/openai"))
      << "the clients are missing: `./perigee test` installs them (npm ci in " << kFolder << ")";

  TempDirectory place;
  const Said made =
      run_perigee({"init", "--config", golden("tiny/config.json"), "--out", place / "tiny", "--seed", "3"});
  ASSERT_EQ(made.code, 0) << made.err;
  spill(place / "key", kKey + "\n");
  chmod((place / "key").c_str(), 0600);
  const std::string log = place / "log";
  Child server = Child::start(
      PERIGEE_PROGRAM,
      {"serve", "--model", place / "tiny", "--port", "0", "--key-file", place / "key", "--dir", place / "dir",
       "--threads", "1", "--memory-mib", "128", "--prefix-cache-mib", "32", "--max-context", "8192"},
      log);
  std::string line, address;
  for (int i = 0; i < 600 && address.empty(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    line = slurp(log);
    const size_t at = line.find("http://");
    if (at != std::string::npos && line.find(',', at) != std::string::npos)
      address = line.substr(at, line.find(',', at) - at);
    ASSERT_FALSE(server.poll()) << line;
  }
  ASSERT_NE(address, "") << line;
  EXPECT_EQ(run("cd " + kFolder + " && timeout 300 node " + script + " " + address + " " + kKey, said), 0)
      << said << "\nthe server:\n"
      << slurp(log);
  // Ends in order, with what runs finished.
  server.signal(SIGTERM);
  const auto end = server.wait(20'000);
  ASSERT_TRUE(end) << "the server did not end";
  EXPECT_EQ(end->exit_code, 0) << slurp(log);
  EXPECT_EQ(end->signal, 0);
}

TEST(NpmClients, OpenAI) {
  check_client("openai.mjs");
}
TEST(NpmClients, AiSdk) {
  check_client("ai_sdk.mjs");
}
TEST(NpmClients, Agents) {
  check_client("agents.mjs");
}

// The lock names versions and their digests, and no registry: it is installed from whichever one is configured.
TEST(NpmClients, TheLockNamesNoRegistry) {
  const std::string lock = slurp(kFolder + "/package-lock.json");
  EXPECT_GT(lock.size(), 1000u);
  EXPECT_EQ(lock.find("\"resolved\""), std::string::npos);
  EXPECT_NE(lock.find("\"integrity\""), std::string::npos);
}

}  // namespace
}  // namespace perigee
