// What is typed: names of runs that are names of commands, misspelt options, values that do not fit, --version, help.
#include <filesystem>

#include "tests/apps/run_program.h"

namespace perigee {
namespace {

TEST(CommandLine, ARunMayBeCalledAsACommandIs) {
  TempDirectory place;
  const RunOptions there{place.path(), {}};
  // Not there: looked for under this name, not taken for the command of the name.
  for (const char* name : {"serve", "train", "show"}) {
    expect_refused({"rollouts", name}, std::string("no run \"") + name + "\"", there);
    expect_refused({"show", name, "1"}, std::string("no run \"") + name + "\"", there);
    expect_refused({"diff", name, "1", "2"}, std::string("no run \"") + name + "\"", there);
  }
  spill(place / "run.json", small_run(place / "serve").dump());
  ASSERT_EQ(run_perigee({"train", "run.json", "--quiet", "--in-process"}, there).code, 0);
  EXPECT_EQ(run_perigee({"rollouts", "serve"}, there).code, 0);
  EXPECT_EQ(run_perigee({"store", "check", "serve"}, there).code, 0);
}

TEST(CommandLine, ValuesThatDoNotFitAreToldInOneWay) {
  expect_refused({"init", "--config", "x", "--out", "y", "--seed", "1.5"}, "init: --seed: a whole number is expected, not \"1.5\"");
  expect_refused({"init", "--config", "x", "--out", "y", "--seed", "99999999999999999999"}, "--seed: 99999999999999999999 is too large a number");
  expect_refused({"score", "--model", "x", "--temperature", "warm"}, "score: --temperature: a number is expected, not \"warm\"");
  expect_refused({"train", "x.json", "--set"}, "train: --set needs a value: --set KEY=VALUE");
  expect_refused({"init", "--seed"}, "init: --seed needs a value: --seed N");
  expect_refused({"init", "--config", "x", "--out", "y", "--seed", "1", "--seed", "2"}, "--seed is given more than once");
}

TEST(CommandLine, AMisspeltOptionIsToldBeforeWhatIsMissing) {
  expect_refused({"train", "--hlep"}, "unknown option \"--hlep\"; did you mean --help?");
  expect_refused({"init", "--config", "x", "--otu", "y"}, "did you mean --out?");
}

TEST(CommandLine, VersionAndHelp) {
  const Said version = run_perigee({"--version"});
  EXPECT_EQ(version.code, 0);
  EXPECT_EQ(version.out.rfind("perigee, built from commit ", 0), 0u) << version.out;
  EXPECT_EQ(run_perigee({"help"}).out, run_perigee({"--help"}).out);
  const Said help = run_perigee({"help", "train"});
  EXPECT_EQ(help.code, 0);
  EXPECT_EQ(help.out, run_perigee({"train", "--help"}).out);
  EXPECT_NE(help.out.find("Usage: perigee train"), std::string::npos) << help.out;
  expect_refused({"help", "trian"}, "did you mean train?");
}

}  // namespace
}  // namespace perigee
