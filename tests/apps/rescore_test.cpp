// Stored episodes under other rewards.
#include <cmath>

#include "apps/runs/rescoring.h"
#include "tests/apps/made_run.h"

namespace perigee {
namespace {

using apps::apply_reward_sets;
using apps::rank_correlation;

TEST(Rescore, RankCorrelationIsSpearmans) {
  const std::vector<double> a = {1, 2, 3, 4, 5};
  EXPECT_DOUBLE_EQ(*rank_correlation(a, std::vector<double>{10, 20, 30, 40, 500}), 1);
  EXPECT_DOUBLE_EQ(*rank_correlation(a, std::vector<double>{5, 4, 3, 2, 1}), -1);
  // By the formula for ranks without ties: 1 - 6 sum d^2 / (n (n^2 - 1)).
  EXPECT_NEAR(*rank_correlation(a, std::vector<double>{2, 1, 4, 3, 5}), 1 - 6.0 * 4 / 120, 1e-12);
  // Ties share their mean rank: ranks 0.5 0.5 2 3 and 0 1.5 1.5 3; Pearson of those is 3.75 / sqrt(4.5 * 4.5).
  EXPECT_NEAR(*rank_correlation(std::vector<double>{1, 1, 2, 3}, std::vector<double>{0, 5, 5, 9}), 3.75 / 4.5, 1e-12);
  EXPECT_FALSE(rank_correlation(std::vector<double>{1, 1}, std::vector<double>{1, 2}));
  EXPECT_FALSE(rank_correlation(std::vector<double>{1}, std::vector<double>{1}));
}

TEST(Rescore, SetsChangeASection) {
  nlohmann::json section = {{{"verifier", "numeric"}}, {{"verifier", "regex"}, {"name", "a.b"}, {"pattern", "x"}}};
  EXPECT_TRUE(apply_reward_sets(section, std::vector<std::string>{"numeric.weight=0.5", "a.b.weight=-2"}, "here"));
  EXPECT_EQ(section[0]["weight"], 0.5);
  EXPECT_EQ(section[1]["weight"], -2);
  EXPECT_FALSE(apply_reward_sets(section, std::vector<std::string>{"a.b.pattern=[0-9]+"}, "here"));
  EXPECT_EQ(section[1]["pattern"], "[0-9]+");
}

// What a run's own reward says of its episodes is what the run recorded: of a real run, and of one with an altered weight it is
// what adding up by hand gives.
TEST(Rescore, TheSameRewardAgainChangesNothing) {
  TempDirectory place;
  const std::string dir = place / "run";
  spill(place / "run.json", small_run(dir).dump());
  const Said trained = run_perigee({"train", place / "run.json", "--in-process", "--json"});
  ASSERT_EQ(trained.code, 0) << trained.err;
  const std::string store = slurp(dir + "/store.sqlite");

  const nlohmann::json same = run_perigee({"rescore", dir, "--reward", place / "run.json", "--json", "--all"}).json();
  ASSERT_TRUE(same.is_object());
  EXPECT_EQ(same["episodes"], 16);
  EXPECT_EQ(same["compared"], 16);
  EXPECT_EQ(same["changed"], 0);
  EXPECT_EQ(same["old_mean"], same["new_mean"]);
  EXPECT_TRUE(same["verifiers_ran"]);
  EXPECT_TRUE(same["changed_most"].empty());

  // The verifier run again and the stored values with another weight agree.
  nlohmann::json reward = small_run(dir)["reward"];
  reward[1]["weight"] = 4;
  spill(place / "reward.json", reward.dump());
  const nlohmann::json again = run_perigee({"rescore", dir, "--reward", place / "reward.json", "--json", "--all"}).json();
  const nlohmann::json weighed = run_perigee({"rescore", dir, "--set", "regex.weight=4", "--json", "--all"}).json();
  EXPECT_FALSE(weighed["verifiers_ran"]);
  EXPECT_EQ(again["all"], weighed["all"]);
  EXPECT_EQ(again["changed"], weighed["changed"]);
  EXPECT_GT(again["changed"], 0);
  for (const auto& e : again["all"]) EXPECT_EQ(e["new"], e["old"].get<double>() / 0.5 * 4) << e;  // numeric is 0 for all
  EXPECT_EQ(slurp(dir + "/store.sqlite"), store) << "nothing stored is modified";
}

TEST(Rescore, ComparesAndNamesWhatChanged) {
  TempDirectory place;
  const MadeRun made = make_run(place / "run");
  const std::string dir = made.directory;
  // Of the plain groups the first member is right; of the hostile ones the two in whose texts the last number is 1.
  spill(place / "numeric.json", R"([{"verifier": "numeric"}])");
  const nlohmann::json out = run_perigee({"rescore", dir, "--reward", place / "numeric.json", "--json", "--show", "3"}).json();
  ASSERT_TRUE(out.is_object());
  EXPECT_EQ(out["episodes"], 16);
  EXPECT_EQ(out["old_mean"], (1.5 + 0.5) / 4);
  EXPECT_EQ(out["correct"], 5);
  EXPECT_EQ(out["new_mean"], 5.0 / 16);
  ASSERT_EQ(out["changed_most"].size(), 3u);
  EXPECT_EQ(out["changed_most"][0]["episode"], made.episodes[1]);  // 0 -> 1
  const Said text = run_perigee({"rescore", dir, "--set", "regex.weight=0", "--where", "step > 1"});
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_NE(text.out.find("12 episodes, their stored components"), std::string::npos) << text.out;
  EXPECT_NE(text.out.find("mean reward       0.5000 -> 0.2500"), std::string::npos) << text.out;
  EXPECT_NE(text.out.find("changed           6"), std::string::npos) << text.out;
  for (const char c : text.out) EXPECT_TRUE(static_cast<unsigned char>(c) >= 0x20 || c == '\n');
  expect_refused({"rescore", dir}, "--reward");
  expect_refused({"rescore", dir, "--set", "regx.weight=1"}, "did you mean regex?");
  expect_refused({"rescore", dir, "--set", "weight=1"}, "NAME.KEY=VALUE");
  expect_refused({"rescore", dir, "--set", "regex.wieght=1"}, "did you mean weight?");
  spill(place / "bad.json", R"([{"verifier": "numerik"}])");
  expect_refused({"rescore", dir, "--reward", place / "bad.json"}, "numeric");
}

}  // namespace
}  // namespace perigee
