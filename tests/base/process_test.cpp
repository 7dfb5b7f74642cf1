#include "base/process.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "base/error.h"

namespace perigee {
namespace {

TEST(Process, EndsAreToldApart) {
  EXPECT_EQ(Child::start("/bin/sh", {"-c", "exit 3"}).wait(5000)->exit_code, 3);
  auto child = Child::start("/bin/sleep", {"100"});
  EXPECT_FALSE(child.poll().has_value());
  child.signal(SIGKILL);
  const auto end = child.wait(5000);
  ASSERT_TRUE(end.has_value());
  EXPECT_EQ(end->signal, SIGKILL);
  EXPECT_EQ(child.poll()->signal, SIGKILL);
}

TEST(Process, AProgramThatIsNotThereIsAnErrorWithItsName) {
  try {
    Child::start("/no/such/program", {});
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("/no/such/program"), std::string::npos);
  }
}

TEST(Process, OutputGoesToTheFileAndTheChildDiesWithTheObject) {
  const auto path = std::filesystem::temp_directory_path() / ("perigee-process-" + std::to_string(::getpid()));
  std::filesystem::remove(path);
  EXPECT_EQ(Child::start("/bin/sh", {"-c", "echo out; echo err >&2"}, path.string()).wait(5000)->exit_code, 0);
  std::ifstream file(path);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  EXPECT_EQ(text, "out\nerr\n");
  std::filesystem::remove(path);
  pid_t pid;
  {
    const auto child = Child::start("/bin/sleep", {"100"});
    pid = child.pid();
    EXPECT_EQ(::kill(pid, 0), 0);
  }
  EXPECT_NE(::kill(pid, 0), 0);
}

}  // namespace
}  // namespace perigee
