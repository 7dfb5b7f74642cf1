#include "rollout/run/progress.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <regex>

namespace perigee::rollout {
namespace {

RunConfig with(const nlohmann::json& patch) {
  nlohmann::json value = {{"model", {{"config", {{"x", 1}}}}}, {"tasks", {{"kind", "arithmetic"}}}, {"reward", {{{"verifier", "numeric"}}}}};
  if (patch.is_object()) value.merge_patch(patch);
  return parse_run_config(value, "run.json");
}

TEST(Progress, TheViewSaysWhatTheEventsSaid) {
  const auto config = with({{"learn", {{"steps", 40}}}});
  std::FILE* out = std::tmpfile();
  Progress progress(config, out, Progress::Style::kLines);
  progress.event({{"event", "evaluation"}, {"phase", "warmup"}, {"step", 3}, {"n", 4}, {"correct", 1}, {"accuracy", 0.25}});
  progress.event({{"event", "step"},
                  {"phase", "rl"},
                  {"step", 10},
                  {"version", 13},
                  {"metrics", {{"reward_mean", 0.5}, {"entropy", 1.25}, {"length_mean", 33.0}, {"lag_max", 2.0}}}});
  const auto view = progress.view();
  ASSERT_EQ(view.size(), 3u);
  EXPECT_NE(view[0].find("10/40"), std::string::npos) << view[0];
  EXPECT_NE(view[1].find("reward 0.500   accuracy 0.250"), std::string::npos) << view[1];
  EXPECT_NE(view[1].find("entropy 1.250   length 33.0"), std::string::npos) << view[1];
  EXPECT_NE(view[2].find("max 2"), std::string::npos) << view[2];
  // Elsewhere than in a terminal: a line per step, without control characters.
  std::rewind(out);
  std::string text(4096, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), out));
  std::fclose(out);
  EXPECT_NE(text.find("1 of 4 held-out tasks right (25.0 %)"), std::string::npos) << text;
  EXPECT_NE(text.find("step 10/40  reward 0.500"), std::string::npos) << text;
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
}

TEST(Progress, TheKlIsShownOnlyWhereAReferenceIsMeasured) {
  const auto shown = [](const nlohmann::json& patch) {
    const auto config = with(patch);
    std::FILE* out = std::tmpfile();
    Progress progress(config, out, Progress::Style::kLines);
    progress.event({{"event", "step"}, {"phase", "rl"}, {"step", 1}, {"metrics", {{"kl", 0.0}}}});
    std::string text = progress.view()[1] + "\n";
    std::rewind(out);
    for (int c; (c = std::fgetc(out)) != EOF;) text += static_cast<char>(c);
    std::fclose(out);
    return text;
  };
  const std::string none = shown({{"learn", {{"kl_coef", 0}}}}), some = shown({{"learn", {{"kl_coef", 0.1}}}});
  EXPECT_NE(none.find("KL -   "), std::string::npos) << none;
  EXPECT_NE(none.find("kl -  "), std::string::npos) << none;
  EXPECT_NE(some.find("KL 0.00000   "), std::string::npos) << some;
  EXPECT_NE(some.find("kl 0.00000  "), std::string::npos) << some;
}

TEST(Progress, TimeLeftIsNothingAtTheLastStep) {
  const auto config = with({{"learn", {{"steps", 1}}}, {"warmup", {{"steps", 25}}}});
  Progress progress(config, stdout, Progress::Style::kSilent);
  const auto left = [&](const char* phase, int step) {
    progress.event({{"event", "step"}, {"phase", phase}, {"step", step}, {"metrics", nlohmann::json::object()}});
    const std::string line = progress.view()[0];
    return line.substr(line.find("left "));
  };
  EXPECT_EQ(left("warmup", 1), "left ?");
  EXPECT_EQ(left("warmup", 25), "left 0:00");
  EXPECT_EQ(left("rl", 1), "left 0:00");
}

TEST(Progress, OfAWarmUpThatIsNotThereNothingIsSaid) {
  const auto said = [](int steps) {
    const auto config = with({{"warmup", {{"steps", steps}}}});
    std::FILE* out = std::tmpfile();
    Progress progress(config, out, Progress::Style::kLines);
    progress.event({{"event", "evaluation"}, {"phase", "warmup"}, {"step", steps}, {"n", 4}, {"correct", 1}, {"accuracy", 0.25}});
    progress.event({{"event", "phase"}});
    std::rewind(out);
    std::string text;
    for (int c; (c = std::fgetc(out)) != EOF;) text += static_cast<char>(c);
    std::fclose(out);
    return text;
  };
  EXPECT_EQ(said(0), "evaluation before reinforcement learning: 1 of 4 held-out tasks right (25.0 %)\n");
  const std::string there = said(9);
  EXPECT_EQ(there.rfind("evaluation after warmup step 9: 1 of 4 held-out tasks right (25.0 %)\nwarm-up over after ", 0), 0u)
      << there;
  EXPECT_NE(there.find(" s; reinforcement learning begins\n"), std::string::npos) << there;
}

TEST(Progress, TheLiveViewKeepsWithinTheWindow) {
  const int terminal = ::posix_openpt(O_RDWR | O_NOCTTY);
  ASSERT_GE(terminal, 0);
  ASSERT_EQ(::grantpt(terminal), 0);
  ASSERT_EQ(::unlockpt(terminal), 0);
  winsize size{};
  size.ws_row = 24;
  size.ws_col = 40;
  ASSERT_EQ(::ioctl(terminal, TIOCSWINSZ, &size), 0);
  std::FILE* out = std::fopen(::ptsname(terminal), "r+");
  ASSERT_NE(out, nullptr);
  const auto config = with({});
  {
    Progress progress(config, out, Progress::Style::kLive);
    progress.event({{"event", "step"}, {"phase", "rl"}, {"step", 10}, {"metrics", nlohmann::json::object()}});
    for (const auto& line : progress.view()) EXPECT_GT(line.size(), 40u) << line;
    // However long that took.
    const auto first = [&](size_t columns) {
      return std::regex_replace(progress.view(columns)[0], std::regex("  [0-9]+:[0-9][0-9]"), "  0:00");
    };
    EXPECT_EQ(first(1000), "learning  [###...........................] 10/100  version 0  0:00  left ?");
    EXPECT_EQ(first(60), "learning  [##..............] 10/100  version 0  0:00  left ?");
    EXPECT_EQ(first(46), "learning  10/100  version 0  0:00  left ?");
    EXPECT_EQ(first(40), "learning  [#............] 10/100  left ?");
    EXPECT_EQ(first(24), "learning  10/100  left ?");
  }
  std::fflush(out);
  std::string text(4096, '\0');
  text.resize(static_cast<size_t>(std::max<ssize_t>(0, ::read(terminal, text.data(), text.size()))));
  std::fclose(out);
  ::close(terminal);
  EXPECT_NE(text.find("learning"), std::string::npos) << text;
  size_t width = 0;
  for (const char c : text.substr(0, text.find('\x1b'))) {
    width = c == '\r' || c == '\n' ? 0 : width + 1;
    ASSERT_LE(width, 40u) << text;
  }
}

}  // namespace
}  // namespace perigee::rollout
