// Episodes as JSON: what --json prints, what the page reads and what exports write is one form.
#pragma once
#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <vector>

#include "policy/tokenizer/tokenizer.h"
#include "storage/records.h"

namespace perigee::apps {

// The text of a token. Ids beyond the tokenizer's (a vocabulary rounded up) have none: <|ID|>.
std::string token_text(const policy::Tokenizer& tokenizer, int32_t id);
std::string text_of(const policy::Tokenizer& tokenizer, const std::vector<int32_t>& ids);

// A line of a listing.
nlohmann::json to_json(const EpisodeRow& row);
// Whole: task, prompt, tokens with log-probability and version, tools, reward. Texts may hold broken UTF-8.
nlohmann::json to_json(const EpisodeRecord& episode, const GroupRecord& group,
                       const policy::Tokenizer& tokenizer);

}  // namespace perigee::apps
