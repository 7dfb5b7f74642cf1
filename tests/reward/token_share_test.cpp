#include "tests/reward/helpers.h"

namespace perigee::reward {
namespace {

RewardInput tokens(std::vector<int32_t> ids) {
  RewardInput input = sample("whatever they say");
  input.tokens = std::move(ids);
  return input;
}

TEST(TokenShare, CountsTokensByTheirIds) {
  const char* listed = R"([{"verifier": "token_share", "ids": [40, 7, 9]}])";
  EXPECT_DOUBLE_EQ(verdict(listed, tokens({7, 8, 40, 163839})).value, 0.5);
  EXPECT_DOUBLE_EQ(verdict(listed, tokens({1, 2})).value, 0);
  EXPECT_DOUBLE_EQ(verdict(listed, tokens({9})).value, 1);
  EXPECT_DOUBLE_EQ(verdict(listed, tokens({})).value, 0);
  const char* modular = R"([{"verifier": "token_share", "modulus": 4, "residue": 3}])";
  EXPECT_DOUBLE_EQ(verdict(modular, tokens({3, 7, 8, 0})).value, 0.5);
  EXPECT_DOUBLE_EQ(verdict(R"([{"verifier": "token_share", "modulus": 2}])", tokens({0, 1, 2})).value, 2.0 / 3);
  EXPECT_EQ(verdict(modular, tokens({3, 7, 8, 0})).detail, "2 of 4 tokens");
}

TEST(TokenShare, RefusesWhatSaysNothing) {
  EXPECT_NE(refusal(R"([{"verifier": "token_share"}])").find("either ids or modulus"), std::string::npos);
  EXPECT_NE(refusal(R"([{"verifier": "token_share", "ids": [1], "modulus": 2}])").find("either ids or modulus"),
            std::string::npos);
  EXPECT_NE(refusal(R"([{"verifier": "token_share", "ids": []}])").find("at least one"), std::string::npos);
  EXPECT_NE(refusal(R"([{"verifier": "token_share", "modulus": 4, "residue": 4}])").find("residue"), std::string::npos);
}

}  // namespace
}  // namespace perigee::reward
