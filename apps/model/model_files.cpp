#include "apps/model/model_files.h"

#include <charconv>

#include "base/error.h"
#include "base/text.h"

namespace perigee::apps {

std::vector<int32_t> parse_ids(const std::string& text, int64_t vocab) {
  std::vector<int32_t> ids;
  const char* p = text.data();
  const char* const end = p + text.size();
  while (p < end) {
    if (*p == ',' || *p == ' ' || *p == '\n' || *p == '\t' || *p == '[' || *p == ']') {
      ++p;
      continue;
    }
    int64_t id = 0;
    const auto [after, error] = std::from_chars(p, end, id);
    if (error != std::errc{})
      throw_input("--ids: {} is not a token id",
                  quote(std::string_view(p, static_cast<size_t>(end - p)), 20));
    if (id < 0 || id >= vocab)
      throw_input("--ids: token id {} is outside the vocabulary, 0 to {}", id, vocab - 1);
    ids.push_back(static_cast<int32_t>(id));
    p = after;
  }
  return ids;
}

void declare_sampling(Command& command, SamplingOptions& o) {
  command.option("--temperature", o.temperature, "X", "0: always the most likely token")
      .option("--top-k", o.top_k, "N", "only the N most likely tokens; 0: off")
      .option("--top-p", o.top_p, "X", "only the most likely tokens that make up this probability; 1: off")
      .option("--min-p", o.min_p, "X", "no token less likely than X times the most likely; 0: off")
      .option("--repetition-penalty", o.repetition_penalty, "X", "1: off")
      .option("--presence-penalty", o.presence_penalty, "X", "0: off")
      .option("--frequency-penalty", o.frequency_penalty, "X", "0: off")
      .list("--logit-bias", o.logit_bias, "ID=B",
            "adds B to the logit of this token; -inf: never; may be repeated")
      .option("--seed", o.seed, "N", "the same seed gives the same tokens");
}

namespace {
std::pair<int32_t, float> parse_bias(const std::string& text) {
  int32_t id = 0;
  float bias = 0;
  const char* const end = text.data() + text.size();
  const auto [equals, error] = std::from_chars(text.data(), end, id);
  if (error == std::errc{} && equals != end && *equals == '=')
    if (const auto [after, wrong] = std::from_chars(equals + 1, end, bias);
        wrong == std::errc{} && after == end)
      return {id, bias};
  throw_input("--logit-bias {}: ID=B is expected, a token id and a number", quote(text));
}
}  // namespace

kernels::SamplingParams SamplingOptions::params(int64_t vocab) const {
  kernels::SamplingParams p;
  p.temperature = static_cast<float>(temperature);
  if (top_k < 0 || top_k > INT32_MAX) throw_input("--top-k {}: 0 or more is expected", top_k);
  p.top_k = static_cast<int32_t>(top_k);
  p.top_p = static_cast<float>(top_p);
  p.min_p = static_cast<float>(min_p);
  p.repetition_penalty = static_cast<float>(repetition_penalty);
  p.presence_penalty = static_cast<float>(presence_penalty);
  p.frequency_penalty = static_cast<float>(frequency_penalty);
  for (const std::string& bias : logit_bias) p.logit_bias.push_back(parse_bias(bias));
  p.validate(vocab);
  return p;
}

}  // namespace perigee::apps
