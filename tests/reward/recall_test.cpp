#include "tests/reward/helpers.h"

namespace perigee::reward {
namespace {

double recall(const std::string& response, const std::string& answer) {
  return verdict(R"([{"verifier": "recall"}])", sample(response, answer)).value;
}
double match(const std::string& response, const std::string& prefix, const std::string& text) {
  return verdict(R"([{"verifier": "match"}])",
                 sample(response, nlohmann::json{{"prefix", prefix}, {"text", text}}.dump()))
      .value;
}
// Letters matched, as difflib.SequenceMatcher(None, a, b, autojunk=False) counts them.
int matched(const std::string& a, const std::string& b) {
  const double value = match("#" + a, "#", b);
  return static_cast<int>(value * static_cast<double>(a.size() + b.size()) / 2 + 0.5);
}

TEST(Recall, IsTheShareOfTheStringsThatAreThere) {
  EXPECT_EQ(recall("7310482", "7310482"), 1);
  EXPECT_EQ(recall("The numbers are 12, 34 and 56.", "56, 12, 34"), 1);
  EXPECT_EQ(recall("12 and 34", "12, 34, 56, 78"), 0.5);
  EXPECT_EQ(recall("none", "12"), 0);
  EXPECT_EQ(recall("", "12"), 0);
  EXPECT_EQ(recall("AMBER-Otter", "amber-otter"), 1);
}

TEST(Recall, AStringInsideALongerOneIsNotThere) {
  EXPECT_EQ(recall("73104821", "7310482"), 0);
  EXPECT_EQ(recall("07310482", "7310482"), 0);
  EXPECT_EQ(recall("amber-otter-x", "amber-otter"), 0);
  EXPECT_EQ(recall("73104821 7310482", "7310482"), 0.5);
}

TEST(Recall, CountsAResponseThatWasCutOffUnlessToldOtherwise) {
  RewardInput input = sample("12 and then", "12");
  input.finish = FinishReason::kLength;
  EXPECT_EQ(verdict(R"([{"verifier": "recall"}])", input).value, 1);
  EXPECT_EQ(verdict(R"([{"verifier": "recall", "accept_truncated": false}])", input).value, 0);
}

TEST(Recall, StrictlyNamingEverythingIsWorthLittle) {
  const char* strict = R"([{"verifier": "recall", "strict": true}])";
  EXPECT_EQ(verdict(strict, sample("12, 34", "34, 12")).value, 1);
  EXPECT_EQ(verdict(strict, sample("12, 34, 56, 78", "12")).value, 0.25);
  EXPECT_EQ(verdict(strict, sample("12", "34, 12")).value, 0.5);
}

TEST(Recall, LettersBeyondAsciiMakeWordsTooAndAPointInANumberIsPartOfIt) {
  EXPECT_EQ(recall("café", "caf"), 0);
  EXPECT_EQ(recall("ёлка", "лка"), 0);
  EXPECT_EQ(recall("un café, “12” ×34", "café, 12, 34"), 1);
  EXPECT_EQ(recall("答案是12。", "12"), 1);
  EXPECT_EQ(recall("١،12،", "12"), 1);
  EXPECT_EQ(recall("12.5", "12"), 0);
  EXPECT_EQ(recall("12.5", "5"), 0);
  EXPECT_EQ(recall("It is 12.", "12"), 1);
  EXPECT_EQ(recall("12.5", "12.5"), 1);
}

TEST(Recall, StrictlyAStringOfSeveralWordsIsWorthAllToo) {
  const char* strict = R"([{"verifier": "recall", "strict": true}])";
  EXPECT_EQ(verdict(strict, sample("New York, Rio", "New York, Rio")).value, 1);
  EXPECT_EQ(verdict(strict, sample("New York, Rio, 3.14, Ürümqi", "New York, Rio")).value, 0.5);
  EXPECT_EQ(verdict(strict, sample("New York, Rio, Bonn", "New York")).value, 1.0 / 3);
}

// "7000001, 7000002, ...": what a response says that knows nothing and lists the whole text.
std::string everything(int count) {
  std::string all;
  for (int i = 1; i <= count; ++i) all += fmt::format("{}{}", i > 1 ? ", " : "", 7000000 + i);
  return all;
}

TEST(Recall, NamingEverythingIsWorthLittle) {
  EXPECT_EQ(recall(everything(4), "7000003"), 0.25);
  EXPECT_EQ(recall(everything(50), "7000003"), 1.0 / 50);
  EXPECT_EQ(recall("The password of amber-otter, of 3 that were asked for (see 1. above), is 7000003.", "7000003"), 1);
  EXPECT_EQ(recall("1. 7000001\n2. 7000002\n3. 7000003", "7000001, 7000002, 7000003"), 1);
  std::string words, told;
  for (int i = 0; i < 400; ++i) words += fmt::format("{}{}-{}", i > 0 ? " " : "", static_cast<char>('a' + i % 26), std::string(1 + static_cast<size_t>(i / 26), 'x'));
  EXPECT_LT(recall(words, "a-x, b-x"), 0.01);
  EXPECT_EQ(recall("The two words that stand most often in the numbered list above are these: amber and otter.", "amber, otter"), 1);
  // Letters and digits among the answers: every word may be one.
  EXPECT_LT(recall(words, "a-x, 12"), 0.01);
}

TEST(Recall, WithoutABoundItIsRulers) {
  const char* any = R"([{"verifier": "recall", "spare_words": -1}])";
  EXPECT_EQ(verdict(any, sample(everything(50), "7000003")).value, 1);
  const char* none = R"([{"verifier": "recall", "spare_words": 0}])";
  EXPECT_EQ(verdict(none, sample("amber otter heron", "amber")).value, 0.5);
  EXPECT_THROW(rubric(R"([{"verifier": "recall", "strict": true, "spare_words": 3}])"), Error);
}

TEST(Match, IsThatOfSequenceMatcher) {
  EXPECT_EQ(matched("abcd", "bcde"), 3);
  EXPECT_EQ(matched("the quick brown fox", "the quack brawn fax"), 16);
  EXPECT_EQ(matched("aXbXc", "abc"), 3);
  EXPECT_EQ(matched("private thread", "private volatile thread"), 14);
  EXPECT_EQ(matched("aaaa", "aa"), 2);
  EXPECT_EQ(matched("WIKIMEDIA", "WIKIMANIA"), 7);
  EXPECT_EQ(matched("GESTALT PATTERN MATCHING", "GESTALT PRACTICE"), 12);
  EXPECT_EQ(matched("x", "y"), 0);
  EXPECT_EQ(matched("ababab", "bababa"), 5);
  // Many blocks of one length: the first of the first text is taken, then the first of the second.
  EXPECT_EQ(
      matched(
          "abacbbaaaabcbaaccbbaabaacbbaabbccbacbcbcaaabbacbabccbcabbcbbbaabbaaabcbcccbcbacaabaccbbabbccbccaba"
          "aca"
          "bccaababbaabcabccbabbbacbccabcabbabbcabcabababbbcababaaaaacaccacacbcabaacbbcabaabbbaabbacbabaaabba"
          "caabb"
          "ababcacbccccabbabacabbcbcbbcaccbbbbabccaabcabcaaccbcbcbbaaaaacbabbacaaaccbcbcbaaaccabcbcaabacabb",
          "aacbbabbabbaaacbcbbcbacacbbbacabaacabbbbcacaacbacabccbcacabbbaacacacbcbcbcbccbbabcbcbabacaccabbacb"
          "ccaab"
          "cabcbbabacacabaaacbccaaacbccaccbcbcabcabbacbcccbbcbbbbbcabacbcccbbbcaacabcbcbabbacbcaaaabaaabccc"
          "c"),
      123);
}

TEST(Match, NeedsThePrefixAndIsOneForTheTextAlone) {
  EXPECT_EQ(match("Zx9 The owls wait.", "Zx9", "The owls wait."), 1);
  EXPECT_EQ(match("Zx9The owls wait.\n", "Zx9", "The owls wait."), 1);
  EXPECT_EQ(match("The owls wait.", "Zx9", "The owls wait."), 0);
  EXPECT_EQ(match("Zx9", "Zx9", "The owls wait."), 0);
  const double nearly = match("Zx9 The owls wait!", "Zx9", "The owls wait.");
  EXPECT_GT(nearly, 0.9);
  EXPECT_LT(nearly, 1);
}

TEST(Match, ALongResponseCostsLittleAndIsWorthLittle) {
  const std::string text(2000, 'a');
  EXPECT_LT(match("#" + std::string(1000000, 'a'), "#", text), 0.01);
}

TEST(Match, AReferenceOfAnotherFormIsAFailure) {
  EXPECT_TRUE(rubric(R"([{"verifier": "match"}])").score(sample("x", "x")).failed);
  EXPECT_TRUE(rubric(R"([{"verifier": "recall"}])").score(sample("x", " , ")).failed);
}

TEST(Recall, ATaskMayNameBoth) {
  RewardInput input = sample("12, 34", "34, 12");
  input.verifier = "recall";
  EXPECT_EQ(verdict(R"([{"verifier": "task"}])", input).value, 1);
  input.verifier = "match";
  input.answer = R"({"prefix": "1", "text": "2, 34"})";
  EXPECT_EQ(verdict(R"([{"verifier": "task"}])", input).value, 1);
}

}  // namespace
}  // namespace perigee::reward
