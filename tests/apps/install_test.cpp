// cmake --install makes a tree that runs wherever it is put, with the libraries that lie in it.
#include <filesystem>

#include "tests/apps/run_program.h"

namespace perigee {
namespace {

namespace fs = std::filesystem;

// What the loader maps for the program: "libfmt.so.9 => /somewhere/libfmt.so.9 (0x7f...)", a line each.
std::vector<std::pair<std::string, fs::path>> loaded_libraries(RunOptions options) {
  options.environment.emplace_back("LD_TRACE_LOADED_OBJECTS=1");
  std::istringstream said(run_perigee({}, options).out);
  std::vector<std::pair<std::string, fs::path>> libraries;
  for (std::string line; std::getline(said, line);) {
    std::istringstream words(line);
    std::string name, arrow, path;
    if (words >> name >> arrow >> path && arrow == "=>") libraries.emplace_back(name, path);
  }
  return libraries;
}

// Of glibc, or its loader.
bool of_the_system(const std::string& name) {
  for (const char* stem : {"libc.", "libm.", "libmvec.", "libdl.", "librt.", "libpthread.", "libresolv."})
    if (name.rfind(stem, 0) == 0) return true;
  return false;
}

class Installed : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    place_ = new TempDirectory;
    const std::string build = fs::path(PERIGEE_PROGRAM).parent_path(), log = *place_ / "log";
    const std::string command = std::string(PERIGEE_CMAKE) + " --install " + build + " --strip --prefix " +
                                (*place_ / "here") + " > " + log + " 2>&1";
    ASSERT_EQ(std::system(command.c_str()), 0) << slurp(log);
    fs::create_directories(*place_ / "elsewhere");
    fs::rename(*place_ / "here", *place_ / "elsewhere/moved");
  }
  static void TearDownTestSuite() {
    delete place_;
    place_ = nullptr;
  }
  static fs::path tree() { return *place_ / "elsewhere/moved"; }
  static RunOptions options() {
    RunOptions o;
    o.program = tree() / "bin/perigee";
    o.directory = place_->path();
    o.environment = {"LD_LIBRARY_PATH="};
    return o;
  }

  static inline TempDirectory* place_ = nullptr;
};

TEST_F(Installed, RunsAfterItWasMoved) {
  const Said help = run_perigee({"--help"}, options());
  EXPECT_EQ(help.code, 0) << help.err;
  EXPECT_EQ(help.out, run_perigee({"--help"}).out);
  const Said doctor = run_perigee({"doctor", "--json"}, options());
  ASSERT_TRUE(doctor.json().is_object()) << doctor.out << doctor.err;
  EXPECT_EQ(doctor.err, "");
  EXPECT_EQ(doctor.code, doctor.json()["ok"] == true ? 0 : 1);
}

TEST_F(Installed, BringsItsLibrariesButNotThoseOfTheSystem) {
  const auto libraries = loaded_libraries(options());
  EXPECT_GT(libraries.size(), 5u);
  for (const auto& [name, path] : libraries) {
    const bool ours = fs::exists(path) && fs::equivalent(path.parent_path(), tree() / "lib");
    EXPECT_EQ(ours, !of_the_system(name)) << name << " => " << path;
  }
  for (const auto& file : fs::directory_iterator(tree() / "lib"))
    EXPECT_FALSE(of_the_system(file.path().filename())) << file.path();
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST_F(Installed, IsSmallEnoughToCopyAround) {
  const std::string command = "tar -C " + tree().string() + " -czf " + (*place_ / "tree.tar.gz") + " .";
  ASSERT_EQ(std::system(command.c_str()), 0);
  EXPECT_LE(fs::file_size(*place_ / "tree.tar.gz"), 60'000'000u);
}
#endif

TEST_F(Installed, FindsItsConfigurationsFromAnywhere) {
  for (const char* file :
       {"share/perigee/configs/quickstart.json", "share/perigee/configs/model/kimi-linear-48b.json",
        "share/perigee/README.md", "share/perigee/LICENSE"})
    EXPECT_TRUE(fs::is_regular_file(tree() / file)) << file;
  const Said config = run_perigee({"config", "configs/quickstart.json"}, options());
  EXPECT_EQ(config.code, 0) << config.err;
  EXPECT_EQ(config.json()["run"]["name"], "quickstart");
  // What lies where the user stands goes first.
  fs::create_directories(*place_ / "configs");
  spill(*place_ / "configs/quickstart.json", small_run(*place_ / "run").dump());
  EXPECT_EQ(run_perigee({"config", "configs/quickstart.json"}, options()).json()["run"]["name"], "small");
  expect_refused({"config", "configs/quickstrat.json"}, "configs/quickstrat.json", options());
}

}  // namespace
}  // namespace perigee
