// Every subcommand explains itself, and the pages that the program prints are up to date.
#include "tests/apps/run_program.h"

namespace perigee {
namespace {

// The names that `perigee --help` lists.
std::vector<std::string> commands() {
  std::vector<std::string> names;
  std::istringstream help(run_perigee({"--help"}).out);
  for (std::string line; std::getline(help, line);)
    if (line.rfind("  ", 0) == 0 && line.size() > 2 && line[2] >= 'a' && line[2] <= 'z')
      names.push_back(line.substr(2, line.find(' ', 2) - 2));
  return names;
}

TEST(Help, ListsTheCommands) {
  const std::vector<std::string> names = commands();
  for (const char* name : {"train", "resume", "init", "score", "generate", "eval", "runs", "rollouts", "show",
                           "verify", "doctor", "config"})
    EXPECT_NE(std::find(names.begin(), names.end(), name), names.end()) << name;
  EXPECT_EQ(std::find(names.begin(), names.end(), "role"), names.end()) << "not for people";
}

TEST(Help, EveryCommandExplainsItself) {
  for (const std::string& name : commands()) {
    const Said said = run_perigee({name, "--help"});
    EXPECT_EQ(said.code, 0) << name;
    EXPECT_EQ(said.err, "") << name;
    EXPECT_NE(said.out.find("Usage: perigee " + name), std::string::npos) << said.out;
    EXPECT_NE(said.out.find("Examples:\n  perigee " + name), std::string::npos) << said.out;
  }
}

TEST(Help, WithoutArgumentsIsHelp) {
  const Said said = run_perigee({});
  EXPECT_EQ(said.code, 0);
  EXPECT_EQ(said.out, run_perigee({"--help"}).out);
}

TEST(Help, ConfigurationPageIsUpToDate) {
  const Said said = run_perigee({"config", "--markdown"});
  EXPECT_EQ(said.code, 0) << said.err;
  EXPECT_EQ(said.out, slurp(std::string(PERIGEE_SOURCE_DIR) + "/docs/configuration.md"))
      << "run: ./perigee config --markdown > docs/configuration.md";
}

TEST(Help, ConfigurationPageSaysThingsOnce) {
  const std::string page = run_perigee({"config", "--markdown"}).out;
  for (const char* heading : {"# Configuration\n", "## Environment variables\n", "## run\n", "## bus\n"}) {
    const size_t first = ("\n" + page).find(std::string("\n") + heading);
    ASSERT_NE(first, std::string::npos) << heading;
    EXPECT_EQ(("\n" + page).find(std::string("\n") + heading, first + 1), std::string::npos) << heading;
  }
}

TEST(Doctor, FindsTheMachineFit) {
  const Said said = run_perigee({"doctor", "--json"});
  const nlohmann::json report = said.json();
  ASSERT_TRUE(report.is_object()) << said.out;
  EXPECT_EQ(said.code, report["ok"] == true ? 0 : 1);
  std::vector<std::string> names;
  for (const auto& finding : report["findings"]) {
    names.push_back(finding["name"]);
    EXPECT_EQ(finding["verdict"] == "ok", finding["fix"] == "") << finding.dump();
  }
  for (const char* name :
       {"processor", "vectors", "cores", "memory", "GPU", "disk", "shared memory", "libraries", "SQLite"})
    EXPECT_NE(std::find(names.begin(), names.end(), name), names.end()) << name;
}

TEST(Doctor, ChecksAConfiguration) {
  TempDirectory place;
  spill(place / "good.json", small_run(place / "run").dump());
  EXPECT_EQ(run_perigee({"doctor", "--config", place / "good.json"}).code, 0);
  nlohmann::json bad = small_run(place / "run");
  bad["learn"]["stepps"] = 3;
  spill(place / "bad.json", bad.dump());
  const Said said = run_perigee({"doctor", "--config", place / "bad.json", "--json"});
  EXPECT_EQ(said.code, 1);
  EXPECT_NE(said.out.find("learn.steps"), std::string::npos) << said.out;
}

}  // namespace
}  // namespace perigee
