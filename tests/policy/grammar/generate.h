// Random schemas, values of them in the generated form, and vocabularies whose tokens cross the symbols of JSON.
#pragma once
#include <nlohmann/json.hpp>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/random.h"
#include "policy/tokenizer/tokenizer.h"

namespace perigee::policy {

// Plain tokens as given, then the named special tokens.
class ListTokenizer : public Tokenizer {
 public:
  explicit ListTokenizer(std::vector<std::string> tokens);
  void append_plain(std::string_view text, std::vector<int32_t>& out) const override;  // the longest first
  std::string token(int32_t id) const override;

 private:
  std::vector<std::string> tokens_;
  std::map<std::string, int32_t, std::less<>> ids_;
};

// All single bytes, and pieces of JSON and of words, up to `count` tokens.
std::unique_ptr<ListTokenizer> crossing_vocabulary(size_t count, uint64_t seed);

// A schema that is supported and that some value satisfies.
nlohmann::ordered_json random_schema(Random& random);

// A value of the schema as it is generated, or nullopt where the dice nest too deep.
std::optional<std::string> random_instance(const nlohmann::ordered_json& schema, Random& random);

// The text in tokens, cut at random.
std::vector<int32_t> random_tokens(const Tokenizer& tokenizer, std::string_view text, Random& random);

}  // namespace perigee::policy
