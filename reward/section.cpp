#include "reward/section.h"

#include <array>

#include "base/text.h"

namespace perigee::reward {

bool is_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}

std::string_view trim(std::string_view text) {
  while (!text.empty() && is_space(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
  return text;
}

Section::Section(JsonReader& options, bool accept_truncated) {
  const std::string where = options.string("section", "auto");
  think_close_ = options.string("think_close", "</think>");
  answer_open_ = options.string("answer_open", "<answer>");
  answer_close_ = options.string("answer_close", "</answer>");
  accept_truncated_ = options.boolean("accept_truncated", accept_truncated);
  if (where == "response")
    where_ = Where::kResponse;
  else if (where == "answer")
    where_ = Where::kAnswer;
  else if (where != "auto") {
    const std::array<std::string, 3> names = {"auto", "response", "answer"};
    options.fail("section", "one of auto, response, answer is expected, not " + quote(where) +
                                did_you_mean(where, names));
  }
  if (think_close_.empty()) options.fail("think_close", "must not be empty");
  if (answer_open_.empty() || answer_close_.empty())
    options.fail(answer_open_.empty() ? "answer_open" : "answer_close", "must not be empty");
}

std::optional<std::string_view> Section::find(const RewardInput& input, std::string& why) const {
  if (input.finish == FinishReason::kLength && !accept_truncated_) {
    why = "cut off at the token limit";
    return std::nullopt;
  }
  const std::string_view text = input.response;
  if (where_ == Where::kResponse) return trim(text);
  if (where_ == Where::kAnswer) {
    const size_t open = text.rfind(answer_open_);
    const size_t begin = open + answer_open_.size();
    const size_t close = open == text.npos ? text.npos : text.find(answer_close_, begin);
    if (close == text.npos) {
      why = "no answer block";
      return std::nullopt;
    }
    return trim(text.substr(begin, close - begin));
  }
  const size_t close = text.rfind(think_close_);
  return trim(close == text.npos ? text : text.substr(close + think_close_.size()));
}

}  // namespace perigee::reward
