// Words, names and sentences that long prompts are made of. All of it is made up from lists: no text of anybody's.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "base/random.h"

namespace perigee::rollout::words {

// A bijection of [0, size) drawn from random numbers, for words that are to differ.
class Shuffled {
 public:
  // REQUIRES size > 0.
  Shuffled(int64_t size, Random& random);
  // REQUIRES 0 <= i < size().
  int64_t at(int64_t i) const;
  int64_t size() const { return size_; }

 private:
  int64_t size_, factor_, offset_;
};

// One sentence and "\n". Holds no digit, no hyphen and no capital but the first.
void append_sentence(Random& random, std::string& out);

// Names such as "amber-otter"; from kShortNames on longer ones, "amber-windy-otter".
extern const int64_t kShortNames, kNames;
std::string name(int64_t i);  // i < kNames

// Words that are in no dictionary, such as "betaro".
extern const int64_t kCodedWords;
std::string coded_word(int64_t i);  // i < kCodedWords

// All strings of so many letters of an alphabet, in order; the number of them, at most 2^62.
int64_t string_count(std::string_view alphabet, int64_t length);
std::string string_at(std::string_view alphabet, int64_t length, int64_t i);
std::string random_string(std::string_view alphabet, int64_t length, Random& random);
// "3f2a-..." of 32 hex digits in five groups.
std::string random_uuid(Random& random);

// Of conversations.
extern const int64_t kForms, kTopics;
std::string_view form(int64_t i);   // "poem"
std::string_view topic(int64_t i);  // "otters"
// A sentence about the topic, such as a piece of writing would hold, without white space around it.
std::string topic_sentence(std::string_view topic, Random& random);

}  // namespace perigee::rollout::words
